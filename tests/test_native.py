"""The native Gram routine and gradient_stats: every path of the C code = the naive loop = torch = the exact value."""

import ctypes
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dtl

ROOT = Path(dtl.__file__).resolve().parent
MODULE, STATE = dtl.native_routine()
REQUIRED = os.environ.get("DTL_REQUIRE_NATIVE") == "1"  # CI: what is not built must fail, not be skipped
AUTO, GENERIC, FMA, AVX512, NAIVE = range(5)
PATHS = list(range(GENERIC, MODULE.lib.gc_best_path() + 1)) if MODULE else [GENERIC]
BACKENDS = ["native", "torch"] if MODULE or REQUIRED else ["torch"]
DTYPES = [torch.float32, torch.float64]
LIMIT = {torch.float32: 1e-7, torch.float64: 1e-14}  # of |g_i||g_j|, against the exact value
ROUNDING = 1e-13  # between two ways of adding the same few thousand products, of |g_i||g_j|
needs_native = pytest.mark.skipif(MODULE is None and not REQUIRED, reason=f"native routine: {STATE}")
KINDS = ["normal", "constant", "zero", "repeat", "cancel", "huge", "tiny", "spike"]


CHUNKS = st.integers(1, 40)
FEW_CHUNKS = st.integers(1, 9)
VALUES = st.one_of(st.integers(0, 40), st.integers(120, 140), st.integers(250, 530))  # about the C code's block sizes


@st.composite
def gradients(draw, n=CHUNKS, p=VALUES):
    """Rows (n, p) of the kinds that go wrong: parallel, nearly opposite, 1e15 beside 1e-15, one value above all."""
    n, p, dtype = draw(n), draw(p), draw(st.sampled_from(DTYPES))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows = torch.randn(n, p, dtype=torch.float64, generator=random)
    for i, kind in enumerate(draw(st.lists(st.sampled_from(KINDS), min_size=n, max_size=n))):
        before = rows[max(i - 1, 0)].clone()
        if kind == "constant":
            rows[i] = 0.1 * (i + 1)
        elif kind == "zero":
            rows[i] = 0
        elif kind == "repeat":
            rows[i] = before
        elif kind == "cancel":
            rows[i] = -before * (1 + 1e-7 * rows[i])
        elif kind in ("huge", "tiny"):
            rows[i] *= 1e15 if kind == "huge" else 1e-15
        elif kind == "spike" and p:
            rows[i, int(torch.randint(p, (), generator=random))] = 1e7
    return rows.to(dtype)


def split(rows, *cuts):
    """The chunks' gradients of a model with len(cuts) + 1 parameters."""
    return [list(row.tensor_split(cuts)) for row in rows]


def gram_by(path, rows, threads=2):
    """The C function itself, on a list of contiguous tensors or None."""
    some = next(row for row in rows if row is not None)
    pointers = torch.tensor([0 if row is None else row.data_ptr() for row in rows])
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    cast = MODULE.ffi.cast
    function = MODULE.lib.gc_gram_f32 if some.dtype == torch.float32 else MODULE.lib.gc_gram_f64
    code = function(
        cast("void **", pointers.data_ptr()), len(rows), some.numel(), threads, path, cast("double *", gram.data_ptr())
    )
    assert code == 0
    return gram


def assert_gram_close(actual, expected, limit=ROUNDING):
    norms = expected.diagonal().sqrt()
    assert ((actual - expected).abs() <= limit * norms[:, None] * norms).all()


def assert_exact_within(gram, rows, limit):
    """In integers: every float is a whole number of 2^-1074."""
    whole = [[int(a) * (2**1074 // b) for a, b in map(float.as_integer_ratio, row)] for row in rows.double().tolist()]
    exact = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in whole] for a in whole]
    for i, row in enumerate(gram.tolist()):
        for j, value in enumerate(row):
            top, bottom = value.as_integer_ratio()
            error = abs(top * 2**2148 - exact[i][j] * bottom)  # over bottom * 2^2148
            assert error * round(1 / limit) <= math.isqrt(exact[i][i] * exact[j][j]) * bottom, (i, j, value)


def test_native_routine_is_there_where_ci_says_so():
    assert MODULE is not None or not REQUIRED, STATE
    assert STATE in ("generic", "fma", "avx512") if MODULE else STATE.startswith("not built (")


# What must be equal


@needs_native
@pytest.mark.parametrize("path", PATHS)
@given(rows=gradients())
def test_every_path_equals_the_naive_loop(path, rows):
    assert_gram_close(gram_by(path, list(rows)), gram_by(NAIVE, list(rows)))


@pytest.mark.parametrize("backend", BACKENDS)
@given(rows=gradients(n=st.integers(1, 5)))
@settings(max_examples=50)
def test_accuracy_against_the_exact_value(backend, rows):
    assert_exact_within(dtl.gradient_stats(split(rows), backend).gram, rows, LIMIT[rows.dtype])


@needs_native
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e15 / 7, 1e-15 / 7])
def test_accuracy_of_long_constant_rows(path, dtype, value):
    """The case that a plain sum gets worst: every addition rounds the same way (a plain float64 sum: 1e-12)."""
    p = 300_001
    row = torch.full((p,), value, dtype=dtype)
    gram = gram_by(path, [row, -row])
    exact = p * Fraction(row[0].item()) ** 2
    assert abs(Fraction(gram[0, 0].item()) / exact - 1) <= LIMIT[dtype] / 5
    assert gram[0, 1] == -gram[0, 0]


@needs_native
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_longer_than_one_run_of_plain_additions(threads):
    p = 2 * 2**22 * threads + 3  # RUN in the C file, twice in every thread
    assert gram_by(AUTO, [torch.ones(p), torch.full((p,), 2.0)], threads).tolist() == [[p, 2 * p], [2 * p, 4 * p]]


@needs_native
@pytest.mark.parametrize("path", PATHS)
def test_float_rows_whose_squares_leave_the_range_of_float(path):
    big, small = torch.full((1000,), 3e38), torch.full((1000,), 1e-45)
    gram = gram_by(path, [big, small])
    expected = [[1000 * big[0].item() ** 2, 1000 * big[0].item() * small[0].item()], [0, 1000 * small[0].item() ** 2]]
    assert gram[0].tolist() == pytest.approx(expected[0], rel=1e-14)
    assert gram[1, 1].item() == pytest.approx(expected[1][1], rel=1e-14)


@given(rows=gradients(), seed=st.integers(0, 2**32))
def test_native_equals_torch_in_every_field(rows, seed):
    chunks = split(rows, rows.shape[1] // 3)
    stats = [dtl.gradient_stats(chunks, backend) for backend in BACKENDS]
    for other in stats[1:]:
        assert_gram_close(stats[0].gram, other.gram)
        assert torch.allclose(stats[0].cosine, other.cosine, rtol=0, atol=1e-12)
        assert torch.allclose(stats[0].norms, other.norms, rtol=1e-12)
        for name in ("mean_cosine", "min_cosine", "max_cosine"):
            assert getattr(stats[0], name) == pytest.approx(getattr(other, name), abs=1e-12)


# Properties


@pytest.mark.parametrize("backend", BACKENDS)
@given(rows=gradients())
def test_symmetric_positive_semidefinite_and_cosines_within_one(backend, rows):
    stats = dtl.gradient_stats(split(rows), backend)
    assert torch.equal(stats.gram, stats.gram.T)
    assert (stats.cosine.abs() <= 1 + 1e-12).all()
    assert torch.linalg.eigvalsh(stats.cosine)[0] >= -1e-12 * len(rows)
    nonzero = stats.norms > 0
    assert torch.allclose(stats.cosine.diagonal(), nonzero.double(), rtol=0, atol=1e-12)
    assert (stats.cosine[~nonzero] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@given(rows=gradients(), data=st.data())
def test_permuted_chunks_permute_the_gram(backend, rows, data):
    order = data.draw(st.permutations(range(len(rows))))
    gram = dtl.gradient_stats(split(rows), backend).gram
    assert_gram_close(dtl.gradient_stats(split(rows[order]), backend).gram, gram[order][:, order])


@pytest.mark.parametrize("backend", BACKENDS)
@given(rows=gradients(), data=st.data())
def test_parameter_lists_joined_add_their_grams(backend, rows, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, rows.shape[1]), max_size=4)))
    parts = split(rows, *cuts)
    summed = sum(dtl.gradient_stats([[chunk[k]] for chunk in parts], backend).gram for k in range(len(cuts) + 1))
    assert_gram_close(dtl.gradient_stats(parts, backend).gram, summed)
    assert_gram_close(summed, dtl.gradient_stats(split(rows), backend).gram)


@pytest.mark.parametrize("backend", BACKENDS)
@given(rows=gradients(), exponent=st.integers(-20, 20))
def test_scaling_by_a_power_of_two_is_exact(backend, rows, exponent):
    gram = dtl.gradient_stats(split(rows), backend).gram
    assert torch.equal(dtl.gradient_stats(split(rows * 2.0**exponent), backend).gram, gram * 4.0**exponent)


@pytest.mark.parametrize("backend", BACKENDS)
@given(rows=gradients(n=FEW_CHUNKS), offset=st.integers(0, 63))
def test_rows_may_start_at_any_byte(backend, rows, offset):
    moved = []
    for row in rows:
        buffer = ctypes.create_string_buffer(row.numel() * row.element_size() + 64)
        ctypes.memmove(ctypes.addressof(buffer) + offset, row.data_ptr(), row.numel() * row.element_size())
        if row.numel():
            row = torch.frombuffer(buffer, dtype=rows.dtype, count=row.numel(), offset=offset)
        moved.append([row])
    if backend == "torch":  # torch's own copies want whole elements
        moved = [[row.clone()] for row in rows] if offset % rows.element_size() else moved
    assert_gram_close(dtl.gradient_stats(moved, backend).gram, dtl.gradient_stats(split(rows), backend).gram)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_rows_mixed_shapes_and_mixed_dtypes(backend):
    random = torch.Generator().manual_seed(0)
    wide = torch.randn(5, 6, 8, generator=random)
    chunks = [[g[:, ::2], g.T, g[0, :0], g[0, 0].double(), g.expand(3, 6, 8), g.requires_grad_()] for g in wide.clone()]
    plain = torch.stack([torch.cat([g.detach().double().reshape(-1) for g in chunk]) for chunk in chunks])
    assert_gram_close(dtl.gradient_stats(chunks, backend).gram, plain @ plain.T)


@pytest.mark.parametrize("backend", BACKENDS)
def test_none_is_a_zero_gradient(backend):
    a, b = torch.ones(700), torch.full((3,), 2.0)
    stats = dtl.gradient_stats([[None, None, None], [None, -b, None], [a, b, None]], backend)
    assert stats.gram.tolist() == [[0, 0, 0], [0, 12, -12], [0, -12, 712]]
    assert stats.cosine[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, p", [(3, 5), (33, 300), (5, 140_000)])
def test_infinity_and_nan_spread_as_in_torch(backend, dtype, n, p):
    rows = torch.randn(n, p, dtype=dtype, generator=torch.Generator().manual_seed(1))
    rows[0, p // 2], rows[1, p - 1], rows[2, 0] = math.inf, -math.inf, math.nan
    expected = torch.tensor([[(a.double() * b.double()).sum().item() for b in rows[:4]] for a in rows])
    gram = dtl.gradient_stats(split(rows), backend).gram[:, :4]
    assert torch.equal(gram.isnan(), expected.isnan())
    special = ~expected.isfinite() & ~expected.isnan()
    assert special.any() and torch.equal(gram[special], expected[special].double())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_numbers_of_a_small_case(backend):
    stats = dtl.gradient_stats(
        [[torch.tensor([3.0, 4.0])], [torch.tensor([-4.0, 3.0])], [torch.tensor([-3.0, 0.0])]], backend
    )
    assert stats.gram.tolist() == [[25, 0, -9], [0, 25, 12], [-9, 12, 9]]
    assert stats.norms.tolist() == [5, 5, 3]
    assert stats.mean_dot == pytest.approx(1)
    assert stats.mean_cosine == pytest.approx((-0.6 + 0.8) / 3)
    assert (stats.min_cosine, stats.max_cosine) == pytest.approx((-0.6, 0.8))
    assert stats.collision_rate == pytest.approx(1 / 3)
    assert stats.backend == backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunks", [[[torch.ones(3)]], [[torch.ones(0)]], [[]], [[None]]])
def test_one_chunk_has_no_pairs(backend, chunks):
    stats = dtl.gradient_stats(chunks, backend)
    assert (stats.mean_dot, stats.mean_cosine, stats.min_cosine, stats.max_cosine, stats.collision_rate) == (0,) * 5
    assert stats.gram.shape == stats.cosine.shape == (1, 1)


# Which backend, and what is refused


def test_the_backend_is_chosen_and_told(monkeypatch):
    chunks = [[torch.ones(2)], [torch.ones(2)]]
    assert dtl.gradient_stats(chunks).backend == BACKENDS[0]
    assert dtl.gradient_stats(chunks, "torch").backend == "torch"
    monkeypatch.setattr(dtl, "native_routine", lambda: (None, "not built (optional)"))
    assert dtl.gradient_stats(chunks).backend == "torch"
    with pytest.raises(RuntimeError, match="build_native.py"):
        dtl.gradient_stats(chunks, "native")


@pytest.mark.parametrize("chunks, message", [
    ([], "one or more chunks"),
    ([[torch.ones(2)], [torch.ones(2), torch.ones(2)]], "as many gradients each"),
    ([[torch.ones(2)], [torch.ones(3)]], "parameter 0: .* differ in shape"),
    ([[torch.ones(2)], [torch.ones(2).double()]], "parameter 0: .* dtype"),
    ([[torch.ones(2).half()]], "float32 or float64"),
    ([[torch.ones(2).to_sparse()]], "dense"),
    ([[torch.ones(2), torch.ones(2, device="meta")]], "one device"),
])  # fmt: skip
def test_wrong_input_is_refused_with_what_was_seen(chunks, message):
    with pytest.raises(ValueError, match=message):
        dtl.gradient_stats(chunks)
    with pytest.raises(ValueError, match="choose auto, native or torch"):
        dtl.gradient_stats([[torch.ones(2)]], "numpy")


@needs_native
def test_native_by_name_refuses_what_is_not_on_the_cpu_and_too_many_chunks():
    with pytest.raises(ValueError, match="1 chunks on .*meta.*the CPU"):
        dtl.gradient_stats([[torch.ones(2, device="meta")]], "native")
    many = [[torch.ones(2)]] * 1025
    with pytest.raises(ValueError, match="1025 chunks .*n <= 1024"):
        dtl.gradient_stats(many, "native")
    assert dtl.gradient_stats(many).backend == "torch"
    assert dtl.gradient_stats(many[:1024], "native").gram.unique().tolist() == [2]


@needs_native
@pytest.mark.parametrize("name", ["gc_gram_f32", "gc_gram_f64"])
def test_error_codes_of_the_c_functions(name):
    function, new, null = getattr(MODULE.lib, name), MODULE.ffi.new, MODULE.ffi.NULL
    rows, gram = new("const void *[1]"), new("double[1]", [7.0])
    assert function(null, 1, 0, 1, AUTO, gram) == function(rows, 1, 0, 1, AUTO, null) == -1
    assert function(rows, 0, 0, 1, AUTO, gram) == function(rows, 1025, 0, 1, AUTO, gram) == -2
    assert function(rows, 1, 2**40 + 1, 1, AUTO, gram) == function(rows, 1, 2**64 - 1, 1, AUTO, gram) == -3
    assert function(rows, 1, 1, 1, -1, gram) == function(rows, 1, 1, 1, 5, gram) == -4
    assert gram[0] == 7
    assert function(rows, 1, 10**4, 1, AUTO, gram) == 0 and gram[0] == 7  # a NULL row is zeros, and it is added into


# Threads and the processor


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_thread_count_gives_the_same_bits(threads):
    rows = list(torch.randn(6, 100_003, generator=torch.Generator().manual_seed(2)))
    first = gram_by(AUTO, rows, threads)
    assert all(torch.equal(gram_by(AUTO, rows, threads), first) for _ in range(5))
    assert_gram_close(first, gram_by(NAIVE, rows), 1e-12)


@needs_native
def test_more_threads_than_work_or_machine():
    """The routine starts no more threads than there is work for: a hundred thousand stacks would end the process."""
    few, many = [list(torch.randn(6, p, generator=torch.Generator().manual_seed(3))) for p in (300, 300_003)]
    for rows in (few, many):
        gram = gram_by(AUTO, rows, 100_000)
        assert torch.equal(gram_by(AUTO, rows, 100_000), gram)
        assert_gram_close(gram, gram_by(AUTO, rows, 1))
        assert_gram_close(gram_by(AUTO, rows, 2**31 - 1), gram)


@needs_native
def test_eight_python_threads_at_once():
    sets = [torch.randn(5, 60_001, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    alone = [dtl.gradient_stats(split(rows, 7), "native").gram for rows in sets]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            together = list(pool.map(lambda rows: dtl.gradient_stats(split(rows, 7), "native").gram, sets))
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@needs_native
def test_other_python_threads_run_during_a_call():
    rows, gram = torch.ones(32, 1_000_000), torch.zeros(32, 32, dtype=torch.float64)
    pointers = MODULE.ffi.new("const void *[]", [MODULE.ffi.cast("void *", row.data_ptr()) for row in rows])
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    began = time.monotonic()
    MODULE.lib.gc_gram_f32(pointers, 32, 1_000_000, 1, NAIVE, MODULE.ffi.cast("double *", gram.data_ptr()))
    ended = time.monotonic()
    done.set()
    ticker.join()
    within = [t for t in ticks if began < t < ended]  # with the GIL held there would be none, or one at either end
    assert ended - began > 0.1 and len(within) >= 10, (ended - began, len(within))


@needs_native
def test_loading_and_calling_leave_the_floating_point_mode_alone():
    program = """
import ctypes, ctypes.util, sys
import torch
libm = ctypes.CDLL(ctypes.util.find_library("m"))
def mode():  # of this thread: rounding, denormals, traps; without the flags of what has happened (x86-64: MXCSR)
    state = ctypes.create_string_buffer(256)
    libm.fegetenv(state)
    control = int.from_bytes(state.raw[28:32], "little") & 0xFFC0 if sys.argv[1] == "x86_64" else 0
    return control, sys.float_info.min / 4 * 2, (torch.full((99,), 1e-40) / 2).sum().item()
before = mode()
import _gc_native_ext as native
loaded = mode()
rows, gram = torch.full((4, 200_000), 1e-310, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
pointers = torch.tensor([row.data_ptr() for row in rows])
cast = native.ffi.cast
rows_c, gram_c = cast("void **", pointers.data_ptr()), cast("double *", gram.data_ptr())
assert native.lib.gc_gram_f64(rows_c, 4, 200_000, 2, 0, gram_c) == 0
assert before == loaded == mode() and before[1] > 0 and before[2] > 0, (before, loaded, mode())
"""
    run = subprocess.run(
        [sys.executable, "-c", program, platform.machine()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(MODULE.__file__).parent)},
    )
    assert run.returncode == 0, run.stderr


# Without it, and building it


def test_everything_works_without_the_routine():
    program = """
import sys
import threading
import time
sys.modules["_gc_native_ext"] = None  # what a missing module does to an import
import dtl, torch
stats = dtl.gradient_stats([[torch.ones(3)], [-torch.ones(3)]])
print(dtl.native_routine()[1], stats.backend, stats.mean_cosine)
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[0] == "not built (optional) torch -1.0"


def build_in(folder, elsewhere, **environment):
    for name in ("build_native.py", "_gc_native.c"):
        shutil.copy(ROOT / name, folder)
    run = subprocess.run(
        [sys.executable, str(folder / "build_native.py")],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    return run, sorted(path.name for path in [*folder.iterdir(), *elsewhere.iterdir()])


def test_without_a_compiler_the_build_says_so_in_one_line(tmp_path_factory):
    pytest.importorskip("cffi")
    folder, elsewhere = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("elsewhere")
    run, files = build_in(folder, elsewhere, CC="/bin/false")
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith("build_native: not built: ") and run.stderr.count("\n") == 1
    assert files == ["_gc_native.c", "build_native.py"]


@needs_native
def test_the_build_leaves_one_file_wherever_it_is_called_from(tmp_path_factory):
    if not shutil.which("cc") and not os.environ.get("CC"):
        pytest.skip("no C compiler here")
    folder, elsewhere = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("elsewhere")
    run, files = build_in(folder, elsewhere)
    assert run.returncode == 0, run.stderr
    assert [name for name in files if not name.startswith("_gc_native_ext")] == ["_gc_native.c", "build_native.py"]
    assert len(files) == 3 and run.stdout.count("\n") == 1
