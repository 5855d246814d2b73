"""Never lose work: the same seed gives the same results, however often the run was cut short, whatever ran before."""

import contextlib
import errno
import io
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dtl
import dtl_data
import dtl_store

CPU = torch.device("cpu")


# --------------------------------------------------------------------------------------------------------- same results


def test_same_seed_gives_the_same_results(finished, arguments, dtl_command, records, tmp_path):
    dtl_command(*arguments("all", tmp_path))
    assert records(tmp_path) == records(finished.out)
    log = (tmp_path / "log.jsonl").read_bytes()
    dtl_command(*arguments("all", tmp_path))  # once more in the same folder: nothing is done again
    assert records(tmp_path) == records(finished.out) and (tmp_path / "log.jsonl").read_bytes() == log


def test_results_do_not_depend_on_what_ran_before(finished, arguments, dtl_command, records, tmp_path):
    """Other methods first, other stages first, other seeds first: the same numbers."""
    dtl_command(*arguments("all", tmp_path / "a", methods=("neggrad", "gc"), seeds="1,0"))
    dtl_command(*arguments("dispose", tmp_path / "b", methods=("gc-fresh",)))
    dtl_command(*arguments("piggyback", tmp_path / "b", methods=("gc",)))
    for out, models in (("a", (*dtl.REFERENCES, "disposed:gc")), ("b", ("transferred", "disposed:gc"))):
        for model in models:
            found = records(tmp_path / out, seed=0, model=model)
            assert found and found == records(finished.out, model=model), model
    assert records(tmp_path / "b", model="disposed:gc-fresh") == [
        r for r in records(finished.out, model="disposed:gc-fresh") if '"pl_accuracy"' not in r and '"step"' not in r]
    assert records(tmp_path / "a", seed=1, model="disposed:gc") != records(tmp_path / "a", seed=0, model="disposed:gc")


def test_changed_data_is_measured_again(npz, arguments, dtl_command, records, tmp_path):
    """The same file name, other images: no checkpoint and no result of the old ones is given out as theirs."""
    rng = np.random.default_rng(0)
    for _ in range(2):
        path = npz(x_train=rng.integers(0, 256, (30, 8, 8, 3), np.uint8))
        dtl_data.load_set.cache_clear()
        result = dtl_command(*arguments("pretrain", tmp_path / "out", source=f"{path}[0:3]"))
        assert result.code == 0 and "seed 0 pretrained " in result.output  # trained
    dtl_command(*arguments("pretrain", tmp_path / "new", source=f"{path}[0:3]"))
    assert records(tmp_path / "new")[0] in records(tmp_path / "out")


# --------------------------------------------------------------------------------------------------------------- killed


def work(arguments):
    """A run in a process of its own; its exit code tells the outcome."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        dtl.main(arguments)


@pytest.mark.slow
def test_twenty_kills(arguments, records, tmp_path, monkeypatch, root):
    """kill -9 at random moments, each time the same command again; whenever a run gets through, its results are those
    of an undisturbed one, and a new run is begun in a new folder, until there have been twenty kills."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), str(Path(__file__).parent)]))
    context = multiprocessing.get_context("forkserver")  # a clean process that has imported dtl, forked for each run
    context.set_forkserver_preload(["dtl"])

    def start(out):
        flags = arguments("all", out, methods=("gc", "gc-fresh"), pretrain_steps=20, save_every=0)
        process = context.Process(target=work, args=(flags,))
        process.start()
        return process

    first = start(tmp_path / "whole")
    first.join()
    assert first.exitcode == 0
    began = time.monotonic()
    second = start(tmp_path / "again")
    second.join()
    whole, seconds = records(tmp_path / "whole"), time.monotonic() - began
    assert whole == records(tmp_path / "again")

    kills, runs, moments = 0, 0, random.Random(0)
    while kills < 20 or runs == 0:
        out = tmp_path / f"killed-{runs}"
        process = start(out)
        process.join(moments.uniform(0, 0.6) * seconds if kills < 20 else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0
            assert records(out, once=True) == whole
            report = [(o / "report.md").read_text().split("`python dtl.py")[0] for o in (out, tmp_path / "whole")]
            assert report[0] == report[1]
            runs += 1


# -------------------------------------------------------------------------------------------------- damaged checkpoints


@pytest.fixture
def pretrained(tiny, tmp_path):
    """pretrained(stop=None) -> the state that stage `pretrained` ends with, and its checkpoint; stopped after that many
    steps if told so, None and what was saved on the way."""

    def run(folder, stop=None, log=None):
        def interrupt(row):
            if log is not None:
                log.append(row["step"])
            if row["step"] == stop:
                raise KeyboardInterrupt

        experiment = dtl.Experiment(dtl.Config(**tiny), 0, CPU, tmp_path / folder, Path("data"), save_every=0)
        experiment.log = interrupt
        if stop is None:
            state = experiment.stage("pretrained")
        else:
            state = None
            with pytest.raises(KeyboardInterrupt, match=f"at step {stop} of 6, saved up to step {stop - 1}"):
                experiment.stage("pretrained")
        (path,) = (tmp_path / folder / "checkpoints").iterdir()
        return state, path

    return run


def flip_a_bit(data):
    """Of a weight: elsewhere it may be padding, and harmless."""
    state = torch.load(io.BytesIO(data), weights_only=True)["state"]
    weight = (state.get("model") or state["backbone"]).popitem()[1]
    changed = bytearray(data)
    changed[data.index(weight.numpy().tobytes())] ^= 16
    return bytes(changed)


DAMAGE = {
    "nothing left": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "a bit flipped": flip_a_bit,
    "text": lambda data: b"<html>quota exceeded</html>",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("stop", [None, 4], ids=["final", "part"])
def test_damaged_checkpoint_is_named_and_made_anew(pretrained, capsys, damage, stop):
    expected, _ = pretrained("whole")
    _, path = pretrained("damaged", stop)
    path.write_bytes(damage(path.read_bytes()))
    log = []
    state, final = pretrained("damaged", log=log)
    assert capsys.readouterr().err.count(f"warning: checkpoint {path} is damaged") == 1
    assert dtl.digest(state) == dtl.digest(expected) == dtl.digest(dtl.load(final, CPU))
    assert log[0] == 1


def test_stopped_stage_goes_on(pretrained, capsys):
    expected, _ = pretrained("whole")
    _, part = pretrained("stopped", 4)
    log = []
    state, final = pretrained("stopped", log=log)
    assert log == [4, 5, 6] and not part.exists() and final.exists() and not capsys.readouterr().err
    assert dtl.digest(state) == dtl.digest(expected)
    pretrained("stopped", log=log)
    assert log == [4, 5, 6]  # from the checkpoint


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7))
@settings(max_examples=60)
def test_a_flipped_bit_never_changes_what_is_loaded(tmp_path_factory, place, bit):
    """Where it hits padding, what is loaded is what was saved."""
    path = tmp_path_factory.mktemp("bit") / "x.pt"
    saved = {"weight": torch.linspace(0, 1, 40), "step": 3, "notes": [{"mean_cosine": 0.25}]}
    dtl.save(path, saved)
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    found = dtl.load(path, CPU)
    assert found is None or dtl.digest(found) == dtl.digest(saved)


def test_what_is_saved_is_loaded(tmp_path):
    saved = {"weight": torch.randn(3, 4, dtype=torch.float64), "step": 3, "notes": [{"mean_cosine": float("nan")}]}
    dtl.save(tmp_path / "x.pt", saved)
    assert dtl.digest(dtl.load(tmp_path / "x.pt", CPU)) == dtl.digest(saved)
    assert dtl.load(tmp_path / "absent.pt", CPU) is None


def test_altered_state_is_noticed(tmp_path, capsys):
    """By its checksum: the file is whole."""
    saved = {"weight": torch.zeros(3)}
    dtl.save(tmp_path / "x.pt", saved)
    file = torch.load(tmp_path / "x.pt", weights_only=True)
    file["state"]["weight"][1] = 1e-30
    torch.save(file, tmp_path / "x.pt")
    assert dtl.load(tmp_path / "x.pt", CPU) is None
    assert f"{tmp_path / 'x.pt'} is damaged (its checksum" in capsys.readouterr().err


def test_checkpoint_with_code_in_it_does_not_run_it(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state": Evil(), "sha256": ""}, tmp_path / "x.pt")
    assert dtl.load(tmp_path / "x.pt", CPU) is None and not (tmp_path / "ran").exists()
    assert f"{tmp_path / 'x.pt'} is damaged" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- atomic writing


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_content(function, tmp_path, monkeypatch):
    path = tmp_path / "new folder" / "file"
    dtl_store.write_atomically(path, b"old")

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, full)
    with pytest.raises(dtl.DTLError, match=f"cannot write {path}: {os.strerror(errno.ENOSPC)}"):
        dtl_store.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]
    monkeypatch.undo()
    dtl_store.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_line_cut_short_is_passed_over(finished, tmp_path, records):
    """And the next line does not stick to it."""
    out = shutil.copytree(finished.out, tmp_path / "out")
    lines = (out / "results.jsonl").read_bytes().splitlines(keepends=True)
    for cut in (1, len(lines[-1]) // 2, len(lines[-1]) - 2):
        (out / "results.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:cut])
        assert len(dtl.Results(out).read()) == len(lines) - 1
        dtl.Results(out).append([dict(config="c", seed=0, model="m", metric="x", task=None, value=1)])
        assert len(dtl.Results(out).read()) == len(lines)


def test_a_damaged_line_is_passed_over(finished, tmp_path, dtl_command):
    out = shutil.copytree(finished.out, tmp_path / "out")
    before = dtl.Results(out).read()
    with (out / "results.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n[1]\n7\n{"config": "' + before[0]["config"].encode() + b'"}\n')
    assert dtl.Results(out).read() == before
    assert dtl_command("report", "--out", out).code == 0


def test_only_our_own_unfinished_writes_are_swept(finished, tmp_path, arguments, dtl_command):
    out = shutil.copytree(finished.out, tmp_path / "out")
    (out / "thesis").mkdir()
    ours, young = out / "checkpoints" / "x.pt.123.tmp", out / "report.md.99.tmp"
    theirs = [out / "thesis" / "draft.tmp", out / "notes.tmp", out / "thesis" / "x.pt.123.tmp"]
    for path in (ours, young, *theirs):
        path.write_text("half")
        os.utime(path, None if path == young else (1e9, 1e9))
    assert dtl_command(*arguments("pretrain", out)).code == 0
    assert not ours.exists() and young.exists() and all(path.exists() for path in theirs)
