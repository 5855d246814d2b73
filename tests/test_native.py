"""The native Gram routine and gradient_stats: every path, the naive loop, torch, exact values."""

import ctypes
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dtl

ROOT = Path(dtl.__file__).resolve().parent
MODULE, STATE = dtl.native_routine()
REQUIRED = os.environ.get("DTL_REQUIRE_NATIVE") == "1"  # CI: not built is a failure, not a skip
AUTO, GENERIC, FMA, AVX512, NAIVE = range(5)
PATHS = list(range(GENERIC, MODULE.lib.gc_best_path() + 1)) if MODULE else [GENERIC]
BACKENDS = ["native", "torch"] if MODULE or REQUIRED else ["torch"]
DTYPES = [torch.float32, torch.float64]
LIMIT = {torch.float32: 1e-7, torch.float64: 1e-14}  # of |g_i||g_j|, against the exact value
ROUNDING = 1e-13  # between two ways of adding the same few thousand products, of |g_i||g_j|
ONES = torch.ones(2)
KINDS = ["normal", "constant", "zero", "repeat", "cancel", "huge", "tiny", "spike"]
needs_native = pytest.mark.skipif(MODULE is None and not REQUIRED, reason=f"native: {STATE}")
each_path = pytest.mark.parametrize("path", PATHS)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
VALUES = st.one_of(st.integers(0, 40), st.integers(120, 140), st.integers(250, 530))  # see COLUMNS


def changed(row, before, kind, random):
    """A row of a kind that goes wrong; `before` is the one above it."""
    if kind == "spike" and len(row):
        row[int(torch.randint(len(row), (), generator=random))] = 1e7
    parallel = dict(repeat=before, cancel=-before * (1 + 1e-7 * row))
    scale = dict(zero=0.0, huge=1e15, tiny=1e-15).get(kind, 1.0)
    return torch.full_like(row, 0.1) if kind == "constant" else parallel.get(kind, row * scale)


@st.composite
def gradients(draw, n=40):
    """1 to n rows (p,): parallel, nearly opposite, 1e15 beside 1e-15, one value above all."""
    n, p, dtype = draw(st.integers(1, n)), draw(VALUES), draw(st.sampled_from(DTYPES))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows = torch.randn(n, p, dtype=torch.float64, generator=random)
    for i, kind in enumerate(draw(st.lists(st.sampled_from(KINDS), min_size=n, max_size=n))):
        rows[i] = changed(rows[i].clone(), rows[i - 1].clone(), kind, random)
    return rows.to(dtype)


def gram_by(path, rows, threads=2, gram=None):
    """The C function itself, on a list of contiguous tensors or None; adds into gram."""
    some = next(row for row in rows if row is not None)
    pointers = torch.tensor([0 if row is None else row.data_ptr() for row in rows])
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64) if gram is None else gram
    function = MODULE.lib.gc_gram_f32 if some.dtype == torch.float32 else MODULE.lib.gc_gram_f64
    at = MODULE.ffi.cast("void **", pointers.data_ptr())
    into = MODULE.ffi.cast("double *", gram.data_ptr())
    assert function(at, len(rows), some.numel(), threads, path, into) == 0
    return gram


def gram_of(rows, backend):
    return dtl.gradient_stats(list(rows), backend)["gram"]


def assert_gram_close(actual, expected, limit=ROUNDING):
    norms = expected.diagonal().sqrt()
    assert ((actual - expected).abs() <= limit * norms[:, None] * norms).all()


def assert_exact_within(gram, rows, limit):
    """In integers: every float is a whole number of 2^-1074."""
    ratios = [[value.as_integer_ratio() for value in row] for row in rows.double().tolist()]
    whole = [[a * (2**1074 // b) for a, b in row] for row in ratios]
    exact = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in whole] for a in whole]
    for i, row in enumerate(gram.tolist()):
        for j, value in enumerate(row):
            top, bottom = value.as_integer_ratio()
            error = abs(top * 2**2148 - exact[i][j] * bottom)  # over bottom * 2^2148
            allowed = math.isqrt(exact[i][i] * exact[j][j]) * bottom
            assert error * round(1 / limit) <= allowed, (i, j, value)


def normal(n, p, seed, dtype=torch.float32):
    return torch.randn(n, p, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_native_routine_is_there_where_ci_says_so():
    assert MODULE is not None or not REQUIRED, STATE
    assert STATE in ("generic", "fma", "avx512") if MODULE else STATE.startswith("not built (")


# ---- What must be equal ----


@needs_native
@each_path
@given(rows=gradients())
def test_every_path_equals_the_naive_loop(path, rows):
    assert_gram_close(gram_by(path, list(rows)), gram_by(NAIVE, list(rows)))


@each_backend
@given(rows=gradients(n=5))
@settings(max_examples=50)
def test_accuracy_against_the_exact_value(backend, rows):
    assert_exact_within(gram_of(rows, backend), rows, LIMIT[rows.dtype])


@needs_native
@each_path
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e15 / 7, 1e-15 / 7])
def test_accuracy_of_long_constant_rows(path, dtype, value):
    """The worst case for a plain sum: every addition rounds the same way (in float64: 1e-12)."""
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
    gram = gram_by(AUTO, [torch.ones(p), torch.full((p,), 2.0)], threads)
    assert gram.tolist() == [[p, 2 * p], [2 * p, 4 * p]]


@needs_native
@each_path
def test_float_rows_whose_squares_leave_the_range_of_float(path):
    rows = [torch.full((1000,), 3e38), torch.full((1000,), 1e-45)]
    big, small = (row[0].item() for row in rows)
    expected = [1000 * big * big, 1000 * big * small, 1000 * big * small, 1000 * small * small]
    assert gram_by(path, rows).flatten().tolist() == pytest.approx(expected, rel=1e-14, abs=0)


# ---- Properties ----


@each_backend
@given(rows=gradients())
def test_the_gram_is_the_plain_product_and_the_rest_follows_from_it(backend, rows):
    stats, n, wide = dtl.gradient_stats(rows, backend), len(rows), rows.double()
    gram, norms = stats["gram"], stats["gram"].diagonal().sqrt()
    assert torch.equal(gram, gram.T) and gram.dtype == torch.float64
    assert_gram_close(gram, wide @ wide.T)
    cosine = torch.where(gram == 0, 0.0, gram / (norms[:, None] * norms))
    assert torch.linalg.eigvalsh(cosine)[0] >= -1e-12 * n
    pairs = [(i, j) for i in range(n) for j in range(i)]
    dot = math.fsum(gram[i, j].item() for i, j in pairs) / max(1, len(pairs))
    cos = math.fsum(cosine[i, j].item() for i, j in pairs) / max(1, len(pairs))
    assert stats["gc_cos"] == pytest.approx(cos, abs=1e-12)
    assert stats["squared_norm"] == pytest.approx(norms.square().mean().item(), rel=1e-12)
    assert stats["gc_dot"] == pytest.approx(dot, abs=1e-12 * stats["squared_norm"])


@needs_native
@given(rows=gradients(), data=st.data())
def test_columns_called_in_parts_add_up_in_the_gram(rows, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, rows.shape[1]), max_size=4)))
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for part in rows.tensor_split(cuts, 1):
        gram_by(AUTO, list(part.contiguous()), gram=gram)
    assert_gram_close(gram, gram_by(NAIVE, list(rows)))


@each_backend
@given(rows=gradients(), exponent=st.integers(-20, 20))
def test_scaling_by_a_power_of_two_is_exact(backend, rows, exponent):
    scaled = gram_of(rows * 2.0**exponent, backend)
    assert torch.equal(scaled, gram_of(rows, backend) * 4.0**exponent)


@needs_native
@given(rows=gradients(n=9), offset=st.integers(0, 63))
def test_rows_may_start_at_any_byte(rows, offset):
    moved, size = [], rows[0].numel() * rows.element_size()
    for row in rows:
        buffer = ctypes.create_string_buffer(size + 64)
        ctypes.memmove(ctypes.addressof(buffer) + offset, row.data_ptr(), size)
        if size:
            row = torch.frombuffer(buffer, dtype=rows.dtype, count=row.numel(), offset=offset)
        moved.append(row)
    assert_gram_close(gram_of(moved, "native"), gram_of(rows, "native"))


@each_backend
def test_strided_negated_and_differentiable_rows(backend):
    wide = normal(6, 40, 0).requires_grad_()
    negated = torch.view_as_complex(normal(20, 2, 1)).conj().imag  # a view with the negative bit
    rows = [wide[0, ::2], wide[1, 0].expand(20), wide.T[:20, 2], negated]
    plain = torch.stack([row.detach().clone() for row in rows]).double()
    assert negated.is_neg() and not rows[0].is_contiguous()
    assert_gram_close(gram_of(rows, backend), plain @ plain.T)


@needs_native
@each_path
def test_a_null_row_is_a_zero_gradient(path):
    a, b = torch.ones(700), torch.full((700,), -2.0)
    gram = gram_by(path, [None, a, None, b])
    assert gram.tolist() == [[0] * 4, [0, 700, 0, -1400], [0] * 4, [0, -1400, 0, 2800]]


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, p", [(3, 5), (33, 300), (5, 140_000)])
def test_infinity_and_nan_spread_as_in_torch(backend, dtype, n, p):
    rows = normal(n, p, 1, dtype)
    rows[0, p // 2], rows[1, p - 1], rows[2, 0] = math.inf, -math.inf, math.nan
    wide = rows.double()
    expected = torch.stack([(row * wide[:4]).sum(1) for row in wide])
    gram = gram_of(rows, backend)[:, :4]
    assert torch.equal(gram.isnan(), expected.isnan())
    special = ~expected.isfinite() & ~expected.isnan()
    assert special.any() and torch.equal(gram[special], expected[special])


@each_backend
def test_the_numbers_of_a_small_case(backend):
    rows = [torch.tensor(row) for row in ([3.0, 4.0], [-4.0, 3.0], [-3.0, 0.0], [0.0, 0.0])]
    stats = dtl.gradient_stats(rows, backend)
    assert set(stats) == {"gram", "gc_dot", "gc_cos", "squared_norm"}
    assert stats["gram"].tolist() == [[25, 0, -9, 0], [0, 25, 12, 0], [-9, 12, 9, 0], [0] * 4]
    assert stats["gc_dot"] == pytest.approx((-9 + 12) / 6)
    assert stats["gc_cos"] == pytest.approx((-0.6 + 0.8) / 6)
    assert stats["squared_norm"] == pytest.approx((25 + 25 + 9) / 4)


@each_backend
@pytest.mark.parametrize("length", [3, 0])
def test_one_chunk_has_no_pairs(backend, length):
    stats = dtl.gradient_stats([torch.ones(length)], backend)
    assert stats == dict(gram=torch.tensor([[length]]), gc_dot=0, gc_cos=0, squared_norm=length)


# ---- Which backend, and what is refused ----


def test_the_backend_is_chosen_and_its_error_told(monkeypatch):
    nothing, failing = lambda *_: None, SimpleNamespace(gc_gram_f32=lambda *_: -5)
    module = SimpleNamespace(lib=failing, ffi=SimpleNamespace(cast=nothing, new=nothing))
    monkeypatch.setattr(dtl, "native_routine", lambda: (module, "fma"))
    for backend in ("auto", "native"):
        with pytest.raises(RuntimeError, match="error -5 for 3 rows of 2"):
            dtl.gradient_stats([ONES] * 3, backend)
    assert gram_of([ONES] * 3, "torch").unique().tolist() == [2]
    monkeypatch.setattr(dtl, "native_routine", lambda: (None, "not built (why; optional)"))
    assert gram_of([ONES] * 3, "auto").unique().tolist() == [2]
    with pytest.raises(ValueError, match=r"backend 'native' for 3 .* not built \(why"):
        dtl.gradient_stats([ONES] * 3, "native")


KINDS_MIXED = [ONES, torch.ones(3)], [ONES, ONES.double()], [ONES, torch.ones(2, device="meta")]
NO_VECTORS = [], [ONES.half()], [torch.ones(2, 2)], [torch.tensor(1.0)]


@pytest.mark.parametrize("rows", [*KINDS_MIXED, *NO_VECTORS])
def test_wrong_input_is_refused(rows):
    with pytest.raises(ValueError, match="vectors .* float32 or float64 of one kind are needed"):
        dtl.gradient_stats(rows)
    with pytest.raises(ValueError, match="backend 'numpy'"):
        dtl.gradient_stats([ONES], "numpy")


@needs_native
def test_native_by_name_refuses_what_is_not_on_the_cpu_and_too_many_rows():
    for rows in ([torch.ones(2, device="meta")], [ONES] * 1025):
        with pytest.raises(ValueError, match=f"backend 'native' for {len(rows)} "):
            dtl.gradient_stats(rows, "native")
    for n, backend in ((1025, "auto"), (1024, "native")):
        assert gram_of([ONES] * n, backend).unique().tolist() == [2]


@needs_native
@pytest.mark.parametrize("name", ["gc_gram_f32", "gc_gram_f64"])
def test_error_codes_of_the_c_functions(name):
    function, new, null = getattr(MODULE.lib, name), MODULE.ffi.new, MODULE.ffi.NULL
    rows, gram = new("const void *[1]"), new("double[1]", [7.0])
    assert function(null, 1, 0, 1, AUTO, gram) == function(rows, 1, 0, 1, AUTO, null) == -1
    assert function(rows, 0, 0, 1, AUTO, gram) == function(rows, 1025, 0, 1, AUTO, gram) == -2
    for p in (2**40 + 1, 2**64 - 1):
        assert function(rows, 1, p, 1, AUTO, gram) == -3
    assert function(rows, 1, 1, 1, -1, gram) == function(rows, 1, 1, 1, 5, gram) == -4
    assert gram[0] == 7
    assert function(rows, 1, 10**4, 1, AUTO, gram) == 0 and gram[0] == 7  # zeros, added into it


# ---- Threads and the processor ----


@needs_native
@pytest.mark.parametrize("p", [300, 100_003])
@pytest.mark.parametrize("threads", [1, 2, 3, 100_000, 2**31 - 1])
def test_the_same_thread_count_gives_the_same_bits(threads, p):
    """No more start than there is work for: 100,000 stacks would end the process."""
    rows = list(normal(6, p, 2))
    first = gram_by(AUTO, rows, threads)
    assert all(torch.equal(gram_by(AUTO, rows, threads), first) for _ in range(5))
    assert_gram_close(first, gram_by(NAIVE, rows), 1e-12)


@needs_native
def test_eight_python_threads_at_once():
    sets = [normal(5, 60_001, seed) for seed in range(8)]
    alone = [gram_of(rows, "native") for rows in sets]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            together = list(pool.map(lambda rows: gram_of(rows, "native"), sets))
            assert all(map(torch.equal, alone, together))


def python(*arguments, cwd=ROOT, **environment):
    how = dict(cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment})
    return subprocess.run([sys.executable, *arguments], **how)


# ---- Without it, and building it ----


def test_everything_works_without_the_routine():
    program = """
import sys
sys.modules["_gc_native_ext"] = None  # what a missing module does to an import
import dtl, torch
stats = dtl.gradient_stats([torch.ones(3), -torch.ones(3)])
print(dtl.native_routine()[1], stats["gc_cos"])
"""
    run = python("-c", program)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("not built (") and run.stdout.endswith("optional) -1.0\n")


def build_in(tmp_path, **environment):
    """build_native.py run from another folder; the run, and the names in both folders."""
    folder, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    folder.mkdir(), elsewhere.mkdir()
    for name in ("build_native.py", "_gc_native.c"):
        shutil.copy(ROOT / name, folder)
    run = python(str(folder / "build_native.py"), cwd=elsewhere, **environment)
    return run, sorted(path.name for path in [*folder.iterdir(), *elsewhere.iterdir()])


def test_without_a_compiler_the_build_says_so_in_one_line(tmp_path):
    pytest.importorskip("cffi")
    run, files = build_in(tmp_path, CC="/bin/false")
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith("build_native: not built: ") and run.stderr.count("\n") == 1
    assert files == ["_gc_native.c", "build_native.py"]


@needs_native
def test_the_build_leaves_one_file_wherever_it_is_called_from(tmp_path):
    if not shutil.which("cc") and not os.environ.get("CC"):
        pytest.skip("no C compiler here")
    run, files = build_in(tmp_path)
    assert run.returncode == 0 and run.stdout.count("\n") == 1, run.stderr
    others = [name for name in files if not name.startswith("_gc_native_ext")]
    assert others == ["_gc_native.c", "build_native.py"] and len(files) == 3
