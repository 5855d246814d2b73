"""More than one process on one folder, and streams and paths that are not as usual."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
TORCHRUN += ["--local-addr", "127.0.0.1"]  # a machine's own name may not resolve
TORCHRUN += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
PIPES = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
STARTED = []


def start(command):
    STARTED.append(subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **PIPES))
    return STARTED[-1]


def finish(run):
    said = run.communicate(timeout=300)[0].decode(errors="replace")
    return run.returncode, said


@pytest.fixture(autouse=True)
def nothing_left_running():
    yield
    while STARTED:
        with contextlib.suppress(ProcessLookupError):  # its group's number is its own
            os.killpg(STARTED.pop().pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def command(tmp_path_factory, arguments, root):
    """command(out) -> the arguments of a run of two seeds, on own data, which is read at once."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "own.npz"
    x, y = rng.integers(0, 256, (160, 8, 8, 3), dtype=np.uint8), np.arange(160) % 4
    np.savez(path, x_train=x[:80], y_train=y[:80], x_test=x[80:], y_test=y[80:])
    tasks = dict(source=path, target=f"{path}[0:2]@4", downstream=f"{path}[2:4]@4")

    def build(stage, out, **given):
        how = dict(methods=["gc"], seeds="0,1", out=out) | tasks | given
        return [str(root / "dtl.py"), *arguments(stage, **how)]

    return build


@pytest.fixture(scope="module")
def alone(tmp_path_factory, command, records):
    """What one process measures and reports; in a folder whose name is no text."""
    out = tmp_path_factory.mktemp("one") / os.fsdecode(b"\xff\xfe")
    done = subprocess.run(
        [sys.executable, *command("all", out)], env=ENVIRONMENT, check=True, **PIPES
    )
    return records(out), rows(out), done.stdout


def rows(out):
    return [line for line in (out / "report.md").read_text().splitlines() if line[:1] in "|-"]


def test_a_folder_whose_name_is_no_text(alone):
    _, table, said = alone
    assert len(table) > 6 and table[2].encode() in said and b"Traceback" not in said
    assert b"/report.md, " in said


def ranks_of(run):
    """The worker processes that torchrun started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            pid, _, rest = path.read_text().rpartition(")")
            found += [int(pid.split()[0])] * (int(rest.split()[1]) == run.pid)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc to find a rank in")
def test_two_ranks_measure_what_one_process_does(alone, command, records, tmp_path):
    """To the bit, a seed each, and one of them tells the story; also if one was killed before."""
    run, deadline = start([*TORCHRUN, *command("all", tmp_path)]), time.monotonic() + 60
    while not list(tmp_path.glob("seed*/*.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(ranks_of(run)[-1], signal.SIGKILL)
    code, said = finish(run)
    assert code and not (tmp_path / "report.md").exists(), said
    code, said = finish(start([*TORCHRUN, *command("all", tmp_path)]))
    assert code == 0 and records(tmp_path) == alone[0] and rows(tmp_path) == alone[1], said
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(alone[0])
    each = [f"seed {seed} gc: target_accuracy" for seed in (0, 1)]
    for once in (f"{tmp_path}: seed", "wrote ", alone[1][2], *each):
        assert said.count(once) == 1, once


def test_a_failing_rank_says_what_is_wrong_and_ends_the_run(command, tmp_path):
    (tmp_path / "seed1").write_text("in the way")
    code, said = finish(start([*TORCHRUN, *command("pretrain", tmp_path)]))
    told = [line for line in said.splitlines() if line.startswith("Error: ")]
    assert code and len(told) == 1, said
    assert re.match(rf"Error: seed 1 pretrained: {tmp_path / 'seed1'}", told[0])


def test_streams_that_take_nothing(command, tmp_path):
    """A non-zero code and one line where what is printed is lost; no half-written measurement."""
    harmless = ("2>/dev/full >/dev/null", "2>&- >/dev/null", ">&-")
    runs = {}
    for k, redirection in enumerate((">/dev/full", "| head -1", *harmless)):
        given = [sys.executable, *command("pretrain", tmp_path / str(k))]
        line = " ".join(f"'{part}'" for part in given)
        runs[redirection] = start(["sh", "-c", f"{line} {redirection}"])
    for k, (redirection, run) in enumerate(runs.items()):
        code, said = finish(run)
        assert "Traceback" not in said and said.count("Error: output:") <= 1, said
        results = tmp_path / str(k) / "results.jsonl"
        if redirection in harmless:
            assert code == 0 and "Error" not in said and results.exists(), said
        if redirection == ">/dev/full":
            assert code and "Error: output: No space left on device" in said
        assert not results.exists() or results.read_bytes().endswith(b"\n")
