"""More than one process on one folder, and streams and paths that are not as usual."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {"OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--local-addr", "127.0.0.1",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]  # a machine's own name may not resolve


STARTED = []


def start(command):
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    STARTED.append(subprocess.Popen(command, env=ENVIRONMENT, **how))
    return STARTED[-1]


@pytest.fixture(autouse=True)
def nothing_left_running():
    yield
    while STARTED:
        with contextlib.suppress(ProcessLookupError):  # its group's number is its own
            os.killpg(STARTED.pop().pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def one(tmp_path_factory, arguments, root, records):
    """What one process measures, and the command line that goes on with it in another folder."""
    out = tmp_path_factory.mktemp("one") / "out"
    command = lambda out, **given: [root / "dtl.py", *arguments("all", out, methods=["gc"], **given)]  # noqa: E731
    subprocess.run([sys.executable, *command(out)], env=ENVIRONMENT, check=True, capture_output=True)
    return records(out), command


def test_two_ranks_measure_what_one_process_does(one, records, tmp_path):
    """To the bit, each number once, and one of them prints."""
    expected, command = one
    run = start([*TORCHRUN, *command(tmp_path)])
    said = run.communicate(timeout=400)[0].decode()
    assert run.returncode == 0, said
    assert records(tmp_path) == expected
    assert said.count("wrote ") == 1 and (tmp_path / "report.md").exists()


def ranks_of(run):
    """The worker processes that torchrun started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            pid, _, rest = path.read_text().rpartition(")")
            found += [int(pid.split()[0])] * (int(rest.split()[1]) == run.pid)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc to find a rank in")
def test_a_killed_rank_ends_the_run_and_the_same_command_goes_on(one, records, tmp_path):
    expected, command = one
    run = start([*TORCHRUN, *command(tmp_path)])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("checkpoints/*.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(ranks_of(run)[-1], signal.SIGKILL)
    said = run.communicate(timeout=400)[0].decode()
    assert run.returncode, said
    assert not (tmp_path / "report.md").exists()
    again = start([*TORCHRUN, *command(tmp_path)])
    said = again.communicate(timeout=400)[0].decode()
    assert again.returncode == 0, said
    assert records(tmp_path) == expected


def test_a_failing_rank_says_which_and_in_what_stage(one, tmp_path):
    _, command = one
    (tmp_path / "checkpoints").write_text("in the way")
    run = start([*TORCHRUN, *command(tmp_path)])
    said = run.communicate(timeout=400)[0].decode()
    told = [line for line in said.splitlines() if line.startswith("Error: ")]
    right = r"Error: rank [01]: seed 0 (pretrained|scratch|oracle|random): cannot write .*"
    assert run.returncode and told and all(re.fullmatch(right, line) for line in told), said


def test_two_runs_in_one_folder_do_no_harm(one, records, tmp_path):
    """At the same time: some numbers may be measured twice, and are the same."""
    expected, command = one
    runs = [start([sys.executable, *command(tmp_path)]) for _ in range(2)]
    for run in runs:
        said = run.communicate(timeout=400)[0].decode()
        assert run.returncode == 0 and "warning" not in said, said
    found = records(tmp_path)
    assert [r for k, r in enumerate(found) if r not in found[:k]] == expected
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.part.pt"))


@pytest.mark.parametrize(("redirection", "code"), [
    (">/dev/full", 1), ("2>/dev/full >/dev/null", 0), ("2>&- >/dev/null", 0), (">&-", 0), ("| head -1", 0),
], ids=["full stdout", "full stderr", "no stderr", "no stdout", "closed pipe"])  # fmt: skip
def test_streams_that_take_nothing(arguments, root, tmp_path, redirection, code):
    """One line and a non-zero code where what is printed is lost; no half-written measurement."""
    command = arguments("pretrain", tmp_path)
    line = " ".join(f"'{part}'" for part in [sys.executable, root / "dtl.py", *command])
    run = start(["sh", "-c", f"{line} {redirection}"])
    said = run.communicate(timeout=200)[0].decode()
    assert run.returncode == code and "Traceback" not in said, said
    assert said.count("Error:") == (redirection in (">/dev/full", "| head -1")), said
    for results in tmp_path.glob("results.jsonl"):
        assert results.read_bytes().endswith(b"\n")


def test_a_folder_whose_name_is_no_text(arguments, root, tmp_path):
    out = os.fsencode(tmp_path) + b"/\xff\xfe"
    command = [sys.executable, root / "dtl.py", *arguments("all", "OUT", methods=["uniform"])]
    run = start([out if part == "OUT" else part for part in command])
    said = run.communicate(timeout=200)[0]
    assert run.returncode == 0, said
    assert b"uniform" in open(out + b"/report.md", "rb").read()
