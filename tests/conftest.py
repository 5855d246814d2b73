"""What the tests share: seeds, the Hypothesis profile, a tiny experiment, the command line run in
this process."""

import functools
import json
import os
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import settings

import dtl

settings.register_profile("dtl", deadline=None, print_blob=True, derandomize="CI" in os.environ)
settings.load_profile("dtl")

TINY = dict(
    source="shapes[0:3]@8",
    target="shapes[16:18]@4",
    downstream="shapes[24:26]@4",
    subset_per_class=4,
    oracle_per_class=6,
    image_size=8,
    network="resnet8",
    batch_size=8,
    chunks=2,
    chunk_size=4,
    pretrain_steps=6,
    transfer_steps=4,
    dispose_steps=4,
    fresh_steps=4,
    attack_steps=1,
)
TINY_METHODS = ("uniform", "gc", "gc-fresh")  # without, with, and with GC into a fresh backbone
TASKS = ("source-subset", "downstream")
MODELS = ("scratch", "oracle", "transferred", *TINY_METHODS)  # the rows of its table

THREADS = torch.get_num_threads()
torch.set_num_threads(1)  # the networks are tiny: more threads only wait for one another
dtl.draw_shapes = functools.cache(dtl.draw_shapes)  # a second each time; nobody writes into them


@pytest.fixture(autouse=True)
def seeds(request):
    torch.set_num_threads(THREADS if request.module.__name__ == "test_native" else 1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_handlers_left():
    """A run's Watch belongs to its process; here many runs share one."""
    yield
    dtl.LOG.handlers.clear()


@pytest.fixture(scope="session")
def arguments():
    """arguments(stage, out, **settings) -> the command line of a tiny experiment."""

    def build(stage, out, methods=TINY_METHODS, seeds="0", **given):
        flags = dict(methods=",".join(methods), seeds=seeds, out=out) | TINY | given
        pairs = (("--" + k.replace("_", "-"), str(v)) for k, v in flags.items())
        return [stage, *(part for pair in pairs for part in pair)]

    return build


@pytest.fixture(scope="session")
def dtl_command():
    """Run `dtl ARGUMENTS...` here; .code, .output (both streams). Whatever it raises but an exit is
    a failure."""

    def run(*arguments, **how):
        command = SimpleNamespace(name="dtl.py", main=dtl.main)
        result = CliRunner().invoke(command, [str(a) for a in arguments], **how)
        dtl.LOG.handlers.clear()
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return SimpleNamespace(code=result.exit_code, output=result.output)

    return run


@pytest.fixture(scope="session")
def records():
    """The measurements in OUT/results.jsonl, sorted; `having` filters."""

    def read(out, **having):
        lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        lines = [r for r in lines if having.items() <= r.items()]
        return sorted(lines, key=lambda r: [str(r[name]) for name in dtl.RESULT])

    return read


@pytest.fixture(scope="session")
def trained():
    """The stages and attacks in OUT/log.jsonl that were trained to their end, in their order."""

    def read(out):
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return [r["stage"] for r in rows if r.get("step") and r["step"] == r["steps"]]

    return read


@pytest.fixture(scope="session")
def finished(tmp_path_factory, arguments, dtl_command):
    """A tiny experiment with two attackers: .out and .output. Read or copy it; do not change it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    result = dtl_command(*arguments("all", out, attackers="fixed,long"))
    assert result.code == 0, result.output
    return SimpleNamespace(out=out, output=result.output)


@pytest.fixture
def new_run(tmp_path):
    """new_run(folder, seed, **settings) -> a Run of the tiny experiment, nothing of it trained."""

    def make(folder="out", seed=0, **given):
        return dtl.Run(tmp_path / folder, dtl.Config(**TINY | given), seed, tmp_path / "data")

    return make


@pytest.fixture
def npz(tmp_path):
    """npz(**changes) -> Path of a user's data set: 3 classes, 10 training and 4 test images each,
    8x8, every image constant, its number from 0 (training first). A change of None leaves that
    array out."""

    def write(name="own.npz", **changes):
        y, y_test = np.repeat(np.arange(3), 10), np.repeat(np.arange(3), 4)
        images = np.arange(42, dtype=np.uint8)[:, None, None, None] * np.ones(
            (1, 8, 8, 3), np.uint8
        )
        arrays = dict(x_train=images[:30], y_train=y, x_test=images[30:], y_test=y_test) | changes
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:  # whatever its name ends in
            np.savez(file, **{k: v for k, v in arrays.items() if v is not None})
        return path

    dtl.load_set.cache_clear()
    yield write
    dtl.load_set.cache_clear()


@pytest.fixture(scope="session")
def root():
    return Path(dtl.__file__).resolve().parent
