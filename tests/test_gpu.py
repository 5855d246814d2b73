"""What only a GPU can show: `python -m pytest -m gpu`. Without one all of it is skipped."""

import re

import pytest
import test_gc_loss as gc
import torch
from conftest import TINY

import dtl

no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
pytestmark = [pytest.mark.gpu, no_cuda]
STEPS = dict(pretrain_steps=6, transfer_steps=6, dispose_steps=6, fresh_steps=6)


@pytest.fixture
def no_waiting():
    """no_waiting(on): whether an operation that waits for the GPU, if PyTorch sees it, fails."""
    yield lambda on: torch.cuda.set_sync_debug_mode("error" if on else "default")
    torch.cuda.set_sync_debug_mode("default")


@gc.each_similarity
def test_the_loss_gives_the_cpu_values_and_never_waits(similarity, no_waiting):
    expected = gc.evaluate(*gc.problem(3, 2), similarity)
    losses, params = gc.problem(3, 2, device="cuda")
    gc.evaluate(losses, params, similarity)  # libraries initialise themselves
    no_waiting(True)
    value, grads = gc.evaluate(losses, params, similarity)
    no_waiting(False)
    gc.assert_close((value.cpu(), [g.cpu() for g in grads]), expected, 1e-9)


def test_the_balance_is_that_of_the_cpu_and_never_waits(no_waiting):
    found = []
    for device in ("cpu", "cuda"):
        balance = dtl.Balance(0.5)
        for step in range(3):
            losses, params = gc.problem(2, 1, device=device)
            retain, forget = losses[0](), losses[1]().square()
            no_waiting(step > 0)  # at first it moves to the device
            balance.backward(retain, forget, params)
            no_waiting(False)
        seen = [*balance.buffers(), *(p.grad for p in params[:3])]
        found.append([tensor.cpu() for tensor in seen])
    assert gc.distance(*found) <= 1e-6


def test_statistics_are_those_of_the_cpu():
    """The native routine reads the CPU's memory: what lies on the GPU never reaches it."""
    rows = torch.randn(3, 215)
    expected, found = dtl.gradient_stats(rows, "torch"), dtl.gradient_stats(rows.cuda())
    assert torch.allclose(found["gram"], expected["gram"], rtol=1e-6)
    with pytest.raises(ValueError, match="'native'"):
        dtl.gradient_stats(rows.cuda(), "native")


# ---- The pipeline ----


@pytest.fixture
def new_run(tmp_path):
    def make(**given):
        config, device = dtl.Config(**TINY | STEPS | given), torch.device("cuda", 0)
        return dtl.Run(tmp_path / "out", config, 0, tmp_path / "data", device)

    return make


def at_each_step(work, monkeypatch):
    """work(step) is done at the beginning of every training step."""

    def stream(*names, before=dtl.stream):
        if len(names) == 2 and isinstance(names[1], int):
            work(names[1])
        return before(*names)

    monkeypatch.setattr(dtl, "stream", stream)


@pytest.mark.parametrize("method", dtl.METHODS)
def test_a_step_never_waits(new_run, monkeypatch, no_waiting, method):
    at_each_step(lambda step: no_waiting(step in (1, 4)), monkeypatch)
    scrubbed = new_run().model(method)
    for p in scrubbed.parameters():
        assert p.is_cuda and p.dtype == torch.float32 and p.isfinite().all()


def test_all_runs_and_goes_on(arguments, dtl_command, trained, tmp_path):
    command = arguments("all", tmp_path, methods=dtl.METHODS, gpu=0)
    result = dtl_command(*command)
    assert result.code == 0 and "CUDA" in result.output, result.output
    report, made = (tmp_path / "report.md").read_text(), trained(tmp_path)
    assert not re.search(r"\bnan\b|\binf\b", report) and len(made) > len(dtl.METHODS)
    (tmp_path / "seed0" / "gc.pt").unlink()
    assert dtl_command(*command).code == 0
    again = trained(tmp_path)[len(made) :]
    assert again and {stage.split()[2].strip(",") for stage in again} == {"gc"}


def test_what_the_machine_lacks_is_one_line(arguments, dtl_command, tmp_path):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-5)
    try:
        small = dtl_command(*arguments("pretrain", tmp_path, gpu=0, image_size=16, batch_size=24))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    missing = dtl_command(*arguments("pretrain", tmp_path, gpu=99))
    for result, told in ((small, "out of memory"), (missing, "--gpu 99")):
        assert result.code == 1 and re.findall("^Error:.*", result.output, re.M)[0].find(told) > 0
        assert "Traceback" not in result.output
