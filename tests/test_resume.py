"""Never lose work, never mix it up: the same seed gives the same results, however often the run
was cut short, whatever ran before, and a folder holds one experiment."""

import contextlib
import errno
import io
import multiprocessing
import os
import random
import re
import shutil
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_METHODS
from hypothesis import example, given, settings
from hypothesis import strategies as st

import dtl


@pytest.fixture
def run(arguments, dtl_command):
    """run(STAGE, OUT, **settings): a tiny experiment's command, here."""
    return lambda *where, **given: dtl_command(*arguments(*where, **given))


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished.out, tmp_path / "copied")


def same(a, b):
    """Of nested dicts of tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def models(out):
    """Every model file, and what the file system says of its last change."""
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in out.glob("seed*/*.pt")}


def weights(out):
    return {name: dtl.load(out / name) for name in models(out)}


def tables(out):
    return [line for line in (out / "report.md").read_text().splitlines() if line[:1] in "|-"]


# ---- The same results, and nothing made twice ----


def test_the_same_command_again_does_nothing_again(finished, copied, trained, tmp_path, run):
    """Also where the folder was moved to another place."""
    before = models(copied), (copied / "results.jsonl").read_bytes()
    moved = shutil.move(copied, tmp_path / "elsewhere")
    result = run("all", moved, attackers="fixed,long")
    assert result.code == 0 and "warning" not in result.output
    assert (models(moved), (moved / "results.jsonl").read_bytes()) == before
    assert trained(moved) == trained(finished.out) and tables(moved) == tables(finished.out)


def test_a_folder_grows_by_seeds_methods_and_attackers(finished, records, trained, tmp_path, run):
    """And what it holds does not depend on the order."""
    grown = dict(methods=["gc"], attackers="long"), dict(methods=("gc-fresh", "gc"), seeds="1,0")
    for more in (*grown, dict(methods=("finetune", *TINY_METHODS), attackers="all")):
        before = models(tmp_path)
        assert run("all", tmp_path, **more).code == 0
        assert before.items() <= models(tmp_path).items()
    assert len(set(trained(tmp_path))) == len(trained(tmp_path))
    found = records(tmp_path, seed=0)
    assert all(record in found for record in records(finished.out))
    ours, theirs = weights(tmp_path), weights(finished.out)
    assert all(same(ours[name], state) for name, state in theirs.items())
    assert not same(ours["seed1/gc.pt"], ours["seed0/gc.pt"])
    files = {f"seed1/{m}.pt" for m in ("pretrained", *dtl.REFERENCES, "gc", "gc-fresh")}
    assert {name for name in ours if "seed1" in name} == files


def test_a_copied_model_starts_another_folder(finished, records, trained, tmp_path, run):
    (tmp_path / "seed0").mkdir()
    shutil.copy(finished.out / "seed0/pretrained.pt", tmp_path / "seed0")
    for other in (dict(source="shapes[1:4]@8"), dict(network="resnet18")):  # it must fit
        result = run("dispose", tmp_path, **other)
        assert result.code == 1 and re.search(r"^Error: .*pretrained.pt", result.output, re.M)
    result = run("dispose", tmp_path, methods=["uniform"], dispose_lr=0.1)
    assert result.code == 0 and "warning" not in result.output
    assert trained(tmp_path) == ["seed 0 transferred", "seed 0 uniform"]
    for kept in (dict(model="pretrained"), dict(model="transferred", attacker=None)):
        assert records(tmp_path, **kept) == records(finished.out, **kept)
    mine, theirs = weights(tmp_path)["seed0/uniform.pt"], weights(finished.out)["seed0/uniform.pt"]
    assert not same(mine, theirs)


# ---- One folder, one experiment ----


CHANGES = [dict(pretrain_lr=0.2), dict(attack_steps=2), dict(source="shapes[0:3]@9")]
CHANGES += [dict(split="validation", chunks=3), dict(preset="cifar", transfer_lr=0.3)]


@pytest.mark.parametrize("changed", CHANGES)
def test_other_settings_are_refused_by_name(changed, copied, finished, run):
    result = run("all", copied, **changed)
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error:")]
    assert result.code == 1 and f"{copied}" in line and "another --out" in line
    named = {f.name for f in fields(dtl.Config) if re.search(rf"\b{f.name} ", line)}
    assert named == changed.keys() - {"preset"}
    assert all(str(value) in line for name, value in changed.items() if name != "preset")
    names = ("results.jsonl", "config.json", "log.jsonl", "report.md")
    assert all((copied / n).read_bytes() == (finished.out / n).read_bytes() for n in names)


def test_other_images_of_the_same_name_are_refused(npz, arguments, dtl_command, tmp_path):
    """Also where two files of one name lie in two folders."""
    own = dict(source=npz("a/own.npz"), target=npz("b/own.npz"), downstream=npz("b/own.npz"))
    command = arguments("pretrain", tmp_path / "out", **own)
    assert dtl_command(*command).code == 0
    for name in ("a/own.npz", "b/own.npz"):
        kept = (tmp_path / name).read_bytes()
        npz(name, x_train=np.full((30, 8, 8, 3), 7, np.uint8))
        dtl.load_set.cache_clear()
        result = dtl_command(*command)
        assert result.code == 1 and re.search(r"^Error: .*own\.npz", result.output, re.M), name
        (tmp_path / name).write_bytes(kept)
        dtl.load_set.cache_clear()
        assert dtl_command(*command).code == 0


@pytest.mark.parametrize("text", ["", "{}", '{"settings": {', "\0\xff"])
def test_a_config_that_cannot_be_read_is_told(text, copied, run):
    (copied / "config.json").write_text(text)
    result = run("pretrain", copied)
    assert result.code == 1 and re.search(rf"^Error: {copied}.*another", result.output, re.M)


def test_a_mistyped_run_leaves_nothing_that_blocks(tmp_path, monkeypatch, run):
    with monkeypatch.context() as broken:
        broken.setattr(dtl, "normalise", lambda images: images.float() * torch.nan)
        assert run("pretrain", tmp_path, pretrain_lr=9).code == 1
    result = run("pretrain", tmp_path)
    assert result.code == 0 and "warning" not in result.output
    assert run("pretrain", tmp_path, pretrain_lr=9).code == 1


# ---- Files that are gone or damaged ----


@pytest.mark.parametrize("gone", ["pretrained", "transferred", "gc"])
def test_a_missing_model_is_made_anew(gone, copied, finished, records, trained, run):
    """With its results; what was made from it stays."""
    before = models(copied)
    (copied / f"seed0/{gone}.pt").unlink()
    result = run("all", copied, attackers="fixed,long")
    assert result.code == 0 and result.output.count("warning:") == 1
    assert f"warning: {copied / 'results.jsonl'}: dropped lines" in result.output
    made = trained(copied)[len(trained(finished.out)) :]
    assert made[0] == f"seed 0 {gone}" and len(made) == (1 if gone == "pretrained" else 5)
    assert records(copied) == records(finished.out) and tables(copied) == tables(finished.out)
    after = models(copied)
    assert [name for name in before if before[name] != after[name]] == [f"seed0/{gone}.pt"]
    assert same(weights(copied), weights(finished.out))


def flipped(place, bit):
    def damage(data):
        changed = bytearray(data)
        changed[int(place * len(data))] ^= 1 << bit
        return bytes(changed)

    return damage


def marked_as_folders(data):
    """A zip file's directory does not cover its own fields: torch then reads no weight at all."""
    changed = bytearray(data)
    for entry in re.finditer(rb"PK\x01\x02", data):
        changed[entry.start() + 38] ^= 16
    return bytes(changed)


damages = st.one_of(
    st.builds(flipped, st.floats(0, 1, exclude_max=True), st.integers(0, 7)),
    st.builds(lambda share: lambda data: data[: int(share * len(data))], st.floats(0, 1)),
    st.binary(max_size=99).map(lambda text: lambda data: text),
)


@given(damages)
@example(marked_as_folders)
@example(lambda data: data[:-1])
@example(lambda data: b"")
@settings(max_examples=300)
def test_damage_is_told_or_does_no_harm(tmp_path_factory, damage):
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    saved = {"weight": torch.linspace(0, 1, 40), "step": 3}
    dtl.save(path, saved)
    path.write_bytes(damage(path.read_bytes()))
    with contextlib.suppress(dtl.DTLError):
        assert same(dtl.load(path), saved)


@pytest.mark.parametrize("name", ["uniform", "transferred"])
@pytest.mark.parametrize("damage", [flipped(0.7, 4), lambda data: data[:-100], lambda data: b""])
def test_a_damaged_model_is_told_and_once_deleted_made_anew(
    damage, name, copied, finished, records, run
):
    path = copied / f"seed0/{name}.pt"
    path.write_bytes(damage(path.read_bytes()))
    before = (copied / "results.jsonl").read_bytes()
    result = run("all", copied, methods=["uniform"], attackers="all")
    assert result.code == 1 and f"{path} is damaged: delete it" in result.output
    assert (copied / "results.jsonl").read_bytes().startswith(before)
    path.unlink()
    assert run("all", copied, methods=["uniform"]).code == 0
    assert same(weights(copied), weights(finished.out))
    fixed = dict(model=name, attacker="fixed")
    assert records(copied, **fixed) == records(finished.out, **fixed)


def test_a_file_with_code_in_it_does_not_run_it(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    dtl.save(tmp_path / "x.pt", {"state": Evil()})
    with pytest.raises(Exception, match="damaged|[Ww]eights.only"):
        dtl.load(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


TORN = {
    "after a letter": lambda last: last[:1],
    "in the middle": lambda last: last[: len(last) // 2],
    "before the end": lambda last: last[:-2],
    "not at all": lambda last: last[:-1],  # only its newline is missing
    "another name": lambda last: last.replace(b'"gc-fresh"', b'"gc-frosh"'),
    "no number": lambda last: re.sub(rb'"value": .*', b'"value": "x"}\n', last),
    "garbage": lambda last: b"\xff\n[1]\nnull\n{}\n" + b"[" * 9999 + b'\n{"seed": []}\n',
}


@pytest.mark.parametrize("damage", TORN)
def test_damaged_lines_are_told_and_made_anew(damage, copied, finished, records, trained, run):
    path = copied / "results.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + TORN[damage](lines[-1]))
    result = run("all", copied, attackers="fixed,long")
    assert result.code == 0 and result.output.count("warning:") == 1
    assert f"warning: {path}" in result.output
    assert records(copied) == records(finished.out)
    made = trained(copied)[len(trained(finished.out)) :]
    again = ["seed 0 gc-fresh, long attacker on downstream"]
    assert made == ([] if damage == "not at all" else again)


# ---- In the midst of a write ----


@pytest.mark.parametrize("owner", [os, Path])
def test_a_failed_write_leaves_the_old_content(owner, tmp_path, monkeypatch):
    path = tmp_path / "new folder" / "file"
    dtl.write(path, b"old")

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "replace") if owner is os else (Path, "write_bytes")), full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        dtl.write(path, b"new")
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]
    monkeypatch.undo()
    dtl.write(path, b"new")
    assert path.read_bytes() == b"new" and list(path.parent.iterdir()) == [path]


# ---- Killed ----


def work(command):
    """A run in a process of its own; its exit code tells the outcome."""
    torch.set_num_threads(1)
    dtl.LOOK_EVERY = 1  # more of what a kill may interrupt
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        dtl.main(command)


@pytest.mark.slow
def test_twenty_kills(arguments, records, tmp_path, monkeypatch, root):
    """kill -9 at random moments, each time the same command again; whenever a run gets through, its
    results are those of an undisturbed one, and another folder is begun, till twenty kills."""
    (tmp_path / "warm.py").write_text(
        "import functools, pathlib, dtl, torch._dynamo\n"
        "dtl.draw_shapes = functools.cache(dtl.draw_shapes)\n"
        "dtl.load_set('shapes', pathlib.Path('none'))\n"
    )
    path = [str(root), str(Path(__file__).parent), str(tmp_path)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    context = multiprocessing.get_context("forkserver")  # has imported dtl, forks for each run
    context.set_forkserver_preload(["warm"])

    def start(out):
        given = dict(methods=("gc",), attackers="fixed,long", pretrain_steps=12)
        process = context.Process(target=work, args=(arguments("all", out, **given),))
        process.start()
        return process

    (first := start(tmp_path / "warm")).join()  # starts the fork server
    began = time.monotonic()
    (second := start(tmp_path / "whole")).join()
    seconds, whole = time.monotonic() - began, records(tmp_path / "whole")
    assert first.exitcode == second.exitcode == 0
    assert len(whole) == 21 and whole == records(tmp_path / "warm")

    kills, runs, moments = 0, 0, random.Random(0)
    while kills < 20 or runs == 0:
        out = tmp_path / f"killed-{runs}"
        kept, process = models(out), start(out)
        process.join(moments.uniform(0, 0.4) * seconds if kills < 20 else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            assert kept.items() <= models(out).items()  # what was made once stays
            kills += 1
        else:
            assert process.exitcode == 0 and records(out) == whole
            assert tables(out) == tables(tmp_path / "whole")
            assert same(weights(out), weights(tmp_path / "whole"))
            runs += 1
    assert models(tmp_path / "whole").keys() == {
        f"seed0/{model}.pt" for model in ("pretrained", *dtl.REFERENCES, "gc")
    }
