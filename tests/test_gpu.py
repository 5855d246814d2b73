"""What only a GPU can show: `python -m pytest -m gpu`. Without one all of it is skipped."""

import functools
import json
import re

import pytest
import torch
from test_cli import assert_one_error
from test_gc_loss import SIMILARITIES, distance, gradient, problem, streamed
from test_resume import Watched

import dtl

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture
def no_waiting():
    """no_waiting(on): whether an operation that waits for the GPU is an error. PyTorch sees most of them."""
    yield lambda on: torch.cuda.set_sync_debug_mode("error" if on else "default")
    torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------ the loss ------------------------------------------


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_both_forms_give_the_cpu_values_and_never_wait(similarity, no_waiting):
    losses, params = problem(3, 2)
    value, grads = streamed(losses, params, similarity)
    losses, on_gpu = problem(3, 2, device="cuda")
    streamed(losses, on_gpu, similarity)  # libraries initialise themselves
    no_waiting(True)
    value_gpu, grads_gpu = streamed(losses, on_gpu, similarity)
    first = dtl.gradient_collision_loss([f() for f in losses], on_gpu, similarity=similarity)
    grads_first = gradient(first, on_gpu)
    no_waiting(False)
    for seen, seen_grads in ((value_gpu, grads_gpu), (first, grads_first)):
        assert seen.item() == pytest.approx(value.item(), rel=1e-9)
        assert distance([g.cpu() for g in seen_grads], grads) <= 1e-9


def test_both_calls_of_a_chunk_see_one_dropout_mask():
    losses, params = problem(4, 1, dropout=0.5, device="cuda")
    torch.cuda.manual_seed(7)
    reference = dtl.gradient_collision_loss([f() for f in losses], params)
    after = torch.cuda.get_rng_state()
    torch.cuda.manual_seed(7)
    value, grads = streamed(losses, params, "dot")
    assert torch.equal(torch.cuda.get_rng_state(), after)
    assert value.item() == pytest.approx(reference.item(), rel=1e-12)
    assert distance(grads, gradient(reference, params)) <= 1e-12


def test_statistics_are_torchs_and_those_of_the_cpu(monkeypatch):
    """The native routine reads the CPU's memory: what lies on the GPU never reaches it."""
    chunks = [[torch.randn(30, 7), torch.randn(5)] for _ in range(3)]
    expected = dtl.gradient_stats(chunks, backend="torch")
    on_gpu = [[g.cuda() for g in chunk] for chunk in chunks]
    found = dtl.gradient_stats(on_gpu)
    assert found.backend == "torch" and torch.allclose(found.gram, expected.gram, rtol=1e-6)
    if dtl.native_routine()[0]:
        with pytest.raises(ValueError, match="the CPU"):
            dtl.gradient_stats(on_gpu, backend="native")


# ---------------------------------------- the pipeline ----------------------------------------


class Unwaiting(dtl.Progress):
    """A stage's second step, and the one after its graph was recorded, may not wait for the GPU."""

    def at(self, step, steps):
        super().at(step, steps)
        torch.cuda.set_sync_debug_mode("error" if step in (1, 4) else "default")


STEPS = dict(pretrain_steps=6, transfer_steps=6, dispose_steps=6, fresh_steps=6)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("precision", ["auto", "float32"])
@pytest.mark.parametrize("method", dtl.METHODS)
def test_a_step_never_waits(new_run, no_waiting, precision, method, graphs):
    run = new_run(progress=functools.partial(Unwaiting, device="cuda", graphs=graphs), precision=precision, **STEPS)
    scrubbed = run.model(f"disposed:{method}")
    assert scrubbed.mixed == (precision == "auto")
    assert all(p.is_cuda and p.dtype == torch.float32 and p.isfinite().all() for p in scrubbed.parameters())


@pytest.mark.parametrize("method", dtl.METHODS)
def test_a_graph_computes_what_the_step_does(new_run, monkeypatch, method):
    """Another batch, augmentation, head, weight and learning rate at every step, recorded once: the model that
    comes out is the one that separate launches give, but for rounding."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    found = []
    for graphs in (False, True):
        progress = functools.partial(dtl.Progress, device="cuda", graphs=graphs)
        run = new_run(progress=progress, precision="float32", **STEPS | dict(dispose_steps=12, fresh_steps=12))
        start = run.model("transferred")  # made once: what differs is disposal alone
        found.append([*run.model(name := f"disposed:{method}").parameters()])
        run.path(name).unlink()
    assert distance(found[1], found[0]) < 0.03 * distance(found[0], [*start.parameters()])


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_all_runs_and_goes_on(arguments, dtl_command, trained, tmp_path, precision):
    command = arguments("all", tmp_path, methods=dtl.METHODS, gpu=0, attackers="full", precision=precision)
    result = dtl_command(*command)
    assert result.code == 0 and "CUDA" in result.output, result.output
    report, made = (tmp_path / "report.md").read_bytes(), trained(tmp_path)
    assert not re.search(rb"\bnan\b|\binf\b", report) and len(made) > len(dtl.METHODS)
    next(tmp_path.glob("checkpoints/disposed-gc-seed0-*.pt")).unlink()
    results = tmp_path / "results.jsonl"
    lines = results.read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["model"] != "disposed:gc"]
    results.write_text("".join(kept))
    assert dtl_command(*command).code == 0
    assert {name.split()[2] for name in trained(tmp_path)[len(made) :]} == {"disposed:gc"}


def test_a_stage_goes_on_from_its_step(new_run, monkeypatch):
    """On optimiser state that was loaded onto the GPU."""
    monkeypatch.setattr(dtl, "SAVE_EVERY", 0)
    monkeypatch.setattr(dtl, "FETCH", 1)
    monkeypatch.setattr(Watched, "log", log := [])
    monkeypatch.setattr(Watched, "stop", 4)
    watched = functools.partial(Watched, device="cuda")
    with pytest.raises(KeyboardInterrupt):
        new_run(progress=watched).model("pretrained")
    monkeypatch.setattr(Watched, "stop", None)
    model = new_run(progress=watched).model("pretrained")
    assert [step for _, step in log] == [0, 1, 2, 3, 4, 4, 5] and all(p.isfinite().all() for p in model.parameters())


def test_a_gpu_that_is_not_there_is_one_line(arguments, dtl_command, tmp_path):
    result = dtl_command(*arguments("pretrain", tmp_path, gpu=99))
    assert_one_error(result, "--gpu 99")
    assert result.code == 1


def test_out_of_memory_is_one_line(arguments, dtl_command, tmp_path):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-5)
    try:
        result = dtl_command(*arguments("pretrain", tmp_path, gpu=0, image_size=16, batch_size=24))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_one_error(result, "out of memory")
    assert result.code == 1
