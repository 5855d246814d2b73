"""Never lose work: the same seed gives the same results, however often the run was cut short, whatever ran
before."""

import contextlib
import errno
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dtl

CPU = torch.device("cpu")


def same(a, b):
    """Of nested dicts of tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ---------------------------------------- same results


def test_the_same_command_again_does_nothing_again(
    finished, arguments, dtl_command, records, trained, tmp_path
):
    out = shutil.copytree(finished.out, tmp_path / "out")
    before, report = (out / "results.jsonl").read_bytes(), (out / "report.md").read_text()
    result = dtl_command(*arguments("all", out, attackers="fixed,long", attacker_seeds=2))
    assert result.code == 0 and "warning" not in result.output
    assert (out / "results.jsonl").read_bytes() == before and trained(out) == trained(finished.out)
    assert (out / "report.md").read_text().split("\n`python")[0] == report.split("\n`python")[0]


def test_tables_come_from_published_numbers_without_models(
    finished, arguments, dtl_command, records, trained, tmp_path
):
    """results.jsonl alone is enough: no model is made whose numbers are all there; with one line gone, only
    what that line needs."""
    out = tmp_path / "published"
    out.mkdir()
    shutil.copy(finished.out / "results.jsonl", out)
    command = arguments("all", out, attackers="fixed,long", attacker_seeds=2)
    assert dtl_command(*command).code == 0
    assert not trained(out) and not (out / "checkpoints").exists()
    tables = [[line for line in (folder / "report.md").read_text().splitlines() if line.startswith("|")]
              for folder in (out, finished.out)]  # fmt: skip
    assert tables[0] == tables[1]
    lines = (out / "results.jsonl").read_text().splitlines()
    gone = next(k for k, line in enumerate(lines) if '"disposed:gc"' in line and '"pl_accuracy"' in line)
    (out / "results.jsonl").write_text("\n".join([*lines[:gone], *lines[gone + 1 :]]) + "\n")
    assert dtl_command(*command).code == 0
    assert records(out) == records(finished.out)
    assert [name.split()[2] for name in trained(out)[:3]] == ["pretrained", "transferred", "disposed:gc"]
    assert len(trained(out)) == 4


def test_results_do_not_depend_on_what_ran_before(finished, arguments, dtl_command, records, tmp_path):
    """Other methods, other stages, other seeds, other attackers first: the same keys, and the same
    numbers."""
    expected = {r["key"]: r for r in records(finished.out)}
    other = dict(methods=("neggrad", "gc"), seeds="1,0", attackers="few,fixed")
    assert dtl_command(*arguments("all", tmp_path / "a", **other)).code == 0
    for stage, methods in (("dispose", ("gc-fresh",)), ("piggyback", ("gc",))):
        assert dtl_command(*arguments(stage, tmp_path / "b", methods=methods)).code == 0
    for out, models in (
        ("a", {*dtl.REFERENCES, "pretrained", "disposed:gc"}),
        ("b", {"pretrained", "transferred", "disposed:gc", "disposed:gc-fresh"}),
    ):
        shared = [r for r in records(tmp_path / out) if r["key"] in expected]
        assert {r["model"] for r in shared} == models
        for r in shared:
            assert {**r, "config": 0} == {**expected[r["key"]], "config": 0}
    assert {r["attacker"] for r in records(tmp_path / "a", metric="pl_accuracy")} == {"few", "fixed"}
    by_seed = [
        [{**r, "seed": 0, "key": 0} for r in records(tmp_path / "a", seed=s, model="disposed:gc")]
        for s in (0, 1)
    ]
    assert by_seed[0] and by_seed[0] != by_seed[1]


def test_changed_data_is_measured_again(npz, arguments, dtl_command, records, tmp_path):
    """The same file name, other images: no checkpoint and no result of the old ones is given out as
    theirs."""
    rng = np.random.default_rng(0)
    for _ in range(2):
        path = npz(x_train=rng.integers(0, 256, (30, 8, 8, 3), np.uint8))
        dtl.load_set.cache_clear()
        result = dtl_command(*arguments("pretrain", tmp_path / "out", source=f"{path}[0:3]"))
        assert result.code == 0 and "seed 0 pretrained: 6 steps" in result.output  # trained
    dtl_command(*arguments("pretrain", tmp_path / "new", source=f"{path}[0:3]"))
    assert len(records(tmp_path / "out")) == 2
    assert records(tmp_path / "new")[0] in records(tmp_path / "out")


# ---------------------------------------- what depends on which setting

MODELS = (
    "pretrained",
    "scratch",
    "oracle",
    "transferred",
    "disposed:uniform",
    "disposed:gc",
    "disposed:gc-fresh",
)
DISPOSED = {m for m in MODELS if m.startswith("disposed")}
FROM_SOURCE = {"pretrained", "transferred", *DISPOSED}


@pytest.mark.parametrize(("changed", "remade"), [
    (dict(pretrain_steps=7), FROM_SOURCE),
    (dict(pretrain_lr=0.2), FROM_SOURCE),
    (dict(source="shapes[0:3]@9"), FROM_SOURCE),
    (dict(transfer_steps=5), {"transferred", *DISPOSED}),
    (dict(transfer_lr=0.2), {"transferred", *DISPOSED}),
    (dict(target="shapes[16:18]@5"), {"scratch", "transferred", *DISPOSED}),
    (dict(oracle_per_class=7), {"oracle"}),
    (dict(dispose_steps=5), {"disposed:uniform", "disposed:gc"}),
    (dict(dispose_lr=0.2), {"disposed:uniform", "disposed:gc"}),
    (dict(similarity="cos"), DISPOSED), (dict(gc_head="source"), DISPOSED),
    (dict(chunks=3), DISPOSED), (dict(chunk_size=3), DISPOSED),
    (dict(weights="gc=7"), {"disposed:gc"}),
    (dict(weights="uniform=10"), set()),  # its default
    (dict(fresh_steps=5), {"scratch", "oracle", "disposed:gc-fresh"}),
    (dict(fresh_lr=0.2), {"scratch", "oracle", "disposed:gc-fresh"}),
    (dict(attack_steps=3), set()), (dict(downstream="shapes[24:26]@5"), set()),
    (dict(subset_per_class=5), set()),
    (dict(batch_size=7), {*MODELS}), (dict(augment="crop"), {*MODELS}),
    (dict(network="resnet18"), {*MODELS}), (dict(seed=1), {*MODELS}),
])  # fmt: skip
def test_a_setting_changes_its_own_stage_and_those_after(new_run, changed, remade):
    """By key: what has the same one is found again, what has another is made anew."""
    before, after = new_run(), new_run(**changed)
    assert before.key("random") == after.key("random") or remade  # attacks do not concern it
    assert {m for m in MODELS if before.key(m) != after.key(m)} == remade
    assert len({before.key(m) for m in MODELS}) == len(MODELS)


@pytest.mark.parametrize(("changed", "again"), [
    (dict(attack_steps=3), {"pl_accuracy source-subset", "pl_accuracy downstream"}),
    (dict(downstream="shapes[24:26]@5"), {"pl_accuracy downstream"}),
    (dict(subset_per_class=5), {"pl_accuracy source-subset"}),
    (dict(split="validation"), {"target_accuracy None", *(f"pl_accuracy {t}" for t in dtl.PIGGYBACK_TASKS)}),
    (dict(pretrain_steps=6), set()),
])  # fmt: skip
def test_a_setting_changes_the_numbers_it_concerns(new_run, changed, again):
    def keys(run):
        numbers = [("target_accuracy", None)] + [
            ("pl_accuracy", task, "fixed", 0) for task in dtl.PIGGYBACK_TASKS
        ]
        return {
            f"{metric} {task}": run.number("scratch", metric, task, *more)[0]["key"]
            for metric, task, *more in numbers
        }

    before, after = keys(new_run()), keys(new_run(**changed))
    assert {k for k in before if before[k] != after[k]} == again


def test_keys_of_attacks_differ(new_run):
    run = new_run()
    keys = [
        run.number(m, "pl_accuracy", t, a, s)[0]["key"]
        for m in ("scratch", "random")
        for t in dtl.PIGGYBACK_TASKS
        for a in dtl.ATTACKERS
        for s in (0, 1)
    ]
    assert len(set(keys)) == len(keys)


def test_only_what_a_changed_setting_concerns_is_trained_again(
    finished, arguments, dtl_command, trained, tmp_path
):
    out, before = shutil.copytree(finished.out, tmp_path / "out"), len(trained(finished.out))
    new = []
    for changed in (dict(attack_steps=3), dict(transfer_steps=5)):
        assert dtl_command(*arguments("all", out, methods=["uniform"], **changed)).code == 0
        new.append(trained(out)[before:])
        before += len(new[-1])
    attack = r"seed 0 (\S+) .*(source-subset|downstream) fixed.*"
    assert len(new[0]) == 2 * 5 and all(re.fullmatch(attack, name) for name in new[0])
    assert new[1][:2] == ["seed 0 transferred", "seed 0 disposed:uniform"]
    assert [re.fullmatch(attack, name).groups() for name in new[1][2:]] == [
        (m, t) for m in ("transferred", "disposed:uniform") for t in dtl.PIGGYBACK_TASKS
    ]


# ---------------------------------------- killed


def work(arguments):
    """A run in a process of its own, saving at every step; its exit code tells the outcome."""
    torch.set_num_threads(1)
    sys.modules["matplotlib"] = None  # no picture
    dtl.SAVE_EVERY, dtl.FETCH = 0, 1
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        dtl.main(arguments)


def measured(out):
    with contextlib.redirect_stderr(io.StringIO()):  # a line that a kill cut short
        return {key: (r["value"], r.get("mean_cosine")) for key, r in dtl.Results(out).items()}


@pytest.mark.slow
def test_twenty_kills(arguments, tmp_path, monkeypatch, root):
    """kill -9 at random moments, each time the same command again; whenever a run gets through, its results
    are those of an undisturbed one, and a new run is begun in a new folder, until there have been twenty
    kills."""
    (tmp_path / "warm.py").write_text(
        "import functools, pathlib, dtl, torch._dynamo\n"
        "dtl.draw_shapes = functools.cache(dtl.draw_shapes)\n"
        "dtl.load_set('shapes', pathlib.Path('none'), 'test')\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), str(Path(__file__).parent), str(tmp_path)]))
    context = multiprocessing.get_context(
        "forkserver"
    )  # a clean process that has imported dtl, forked for each run
    context.set_forkserver_preload(["warm"])

    def start(out):
        process = context.Process(
            target=work,
            args=(
                arguments(
                    "all", out, methods=("gc",), attackers="fixed,few", subset_per_class=6, pretrain_steps=12
                ),
            ),
        )
        process.start()
        return process

    first = start(tmp_path / "warm")  # of the fork server
    first.join()
    began = time.monotonic()
    second = start(tmp_path / "whole")
    second.join()
    whole, seconds = measured(tmp_path / "whole"), time.monotonic() - began
    assert first.exitcode == second.exitcode == 0
    assert len(whole) == 25 and whole == measured(
        tmp_path / "warm"
    )  # 5 models, 2 tasks, 2 attackers, 5 accuracies

    kills, runs, moments = 0, 0, random.Random(0)
    while kills < 20 or runs == 0:
        out = tmp_path / f"killed-{runs}"
        process = start(out)
        process.join(moments.uniform(0, 0.2) * seconds if kills < 20 else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0
            assert measured(out) == whole
            report = [(o / "report.md").read_text().split("\n`python")[0] for o in (out, tmp_path / "whole")]
            assert report[0] == report[1]
            runs += 1


# ---------------------------------------- damaged checkpoints


class Watched(dtl.Progress):
    """Notes the steps that are begun, and interrupts one."""

    stop, log = None, ()

    def at(self, step, steps):
        super().at(step, steps)
        self.log.append((self.name, step))
        if step == self.stop:
            raise KeyboardInterrupt


def state_of(model):
    return {"backbone": model.backbone.state_dict(), "head": model.head.state_dict()}


@pytest.fixture
def pretrained(new_run, monkeypatch):
    """pretrained(folder, stop=None) -> the pretrained model, and its checkpoint; stopped at that step if told
    so, None and what was saved on the way."""
    monkeypatch.setattr(dtl, "SAVE_EVERY", 0)
    monkeypatch.setattr(dtl, "FETCH", 1)

    def run(folder, stop=None, log=None):
        monkeypatch.setattr(Watched, "stop", stop)
        monkeypatch.setattr(Watched, "log", [] if log is None else log)
        made, model = new_run(folder, progress=Watched), None
        with contextlib.nullcontext() if stop is None else pytest.raises(KeyboardInterrupt):
            model = made.model("pretrained")
        (path,) = made.path("pretrained").parent.iterdir()
        assert (path == made.path("pretrained")) == (stop is None)
        return model, path

    return run


def flip_a_bit(data):
    """Of a weight: elsewhere it may be padding, and harmless."""
    state = torch.load(io.BytesIO(data), weights_only=True)
    weight = (state.get("model") or state["backbone"]).popitem()[1]
    changed = bytearray(data)
    changed[data.index(weight.numpy().tobytes())] ^= 16
    return bytes(changed)


def of_another_stage(data):
    """Whole, but saved under another key."""
    state, buffer = torch.load(io.BytesIO(data), weights_only=True), io.BytesIO()
    torch.save(state | {"key": "0123456789abcdef"}, buffer)
    return buffer.getvalue()


def without_a_key(data):
    buffer = io.BytesIO()
    torch.save(
        {k: v for k, v in torch.load(io.BytesIO(data), weights_only=True).items() if k != "key"}, buffer
    )
    return buffer.getvalue()


def only_a_tensor(data):
    buffer = io.BytesIO()
    torch.save(torch.zeros(3), buffer)
    return buffer.getvalue()


DAMAGE = {
    "nothing left": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "a bit flipped": flip_a_bit,
    "text": lambda data: b"<html>quota exceeded</html>",
    "another stage's": of_another_stage,
    "without a key": without_a_key,
    "a tensor": only_a_tensor,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("stop", [None, 4], ids=["final", "part"])
def test_damaged_checkpoint_is_named_and_made_anew(pretrained, capsys, damage, stop):
    expected, _ = pretrained("whole")
    _, path = pretrained("damaged", stop)
    path.write_bytes(damage(path.read_bytes()))
    log = []
    model, final = pretrained("damaged", log=log)
    assert capsys.readouterr().err.count(f"warning: checkpoint {path} is damaged") == 1
    assert same(state_of(model), state_of(expected)) and final.exists()
    assert [step for _, step in log] == [0, 1, 2, 3, 4, 5]
    again, _ = pretrained("damaged", log=log)
    assert same(state_of(again), state_of(expected)) and len(log) == 6  # from the new file


def test_another_models_file_under_this_ones_name_is_refused(new_run, capsys):
    """As after a mistake with `cp`: scratch's weights would fit the oracle's network."""
    run = new_run()
    run.model("scratch"), run.model("oracle")
    shutil.copy(run.path("scratch"), run.path("oracle"))
    again = new_run()
    assert same(state_of(again.model("oracle")), state_of(run.model("oracle")))
    assert f"{run.path('oracle')} is damaged (it is another stage's)" in capsys.readouterr().err


def test_stopped_stage_goes_on(pretrained, capsys):
    expected, _ = pretrained("whole")
    _, part = pretrained("stopped", 4)
    log = []
    model, final = pretrained("stopped", log=log)
    assert [step for _, step in log] == [4, 5] and not part.exists() and final.exists()
    assert same(state_of(model), state_of(expected)) and not capsys.readouterr().err
    pretrained("stopped", log=log)
    assert len(log) == 2  # from the checkpoint


def test_a_stage_saves_after_a_while_not_at_every_look(new_run, monkeypatch):
    monkeypatch.setattr(dtl, "FETCH", 1)
    saved, save = [], dtl.save
    monkeypatch.setattr(dtl, "save", lambda path, *a: (saved.append(path), save(path, *a)))
    run = new_run()
    run.model("scratch")
    assert saved == [run.path("scratch")]  # in less than half a minute


@pytest.mark.parametrize("name", ["transferred", "disposed:uniform"])
def test_a_damaged_checkpoint_is_made_anew_before_the_stage_that_needs_it(new_run, monkeypatch, capsys, name):
    """And not in the midst of it: what this stage saves on its way is its own, and under its own name."""
    monkeypatch.setattr(dtl, "SAVE_EVERY", 0)
    monkeypatch.setattr(dtl, "FETCH", 1)
    run = new_run()
    expected = run.model(name)
    run.path("pretrained").write_bytes(b"damaged")
    run.path(name).unlink()
    monkeypatch.setattr(Watched, "stop", None)
    monkeypatch.setattr(Watched, "log", [])
    saved, save = [], dtl.save
    monkeypatch.setattr(
        dtl, "save", lambda path, key, state: (saved.append((path, key)), save(path, key, state))
    )
    again = new_run(progress=Watched)
    model = again.model(name)
    assert same(state_of(model), state_of(expected)) and capsys.readouterr().err.count("is damaged") == 1
    assert [step for stage, step in Watched.log if stage == "seed 0 pretrained"] == [0, 1, 2, 3, 4, 5]
    assert [step for stage, step in Watched.log if stage == f"seed 0 {name}"] == [0, 1, 2, 3]
    assert {p.name.split("-seed")[0] for p, _ in saved} == {"pretrained", name.replace(":", "-")}
    assert all(key in path.name for path, key in saved)
    assert not list(run.path(name).parent.glob("*.part.pt"))


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7))
@settings(max_examples=60)
def test_a_flipped_bit_never_changes_what_is_loaded(tmp_path_factory, place, bit):
    """Where it hits padding, what is loaded is what was saved."""
    path = tmp_path_factory.mktemp("bit") / "x.pt"
    saved = {"weight": torch.linspace(0, 1, 40), "step": 3}
    dtl.save(path, "key", saved)
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    found = dtl.load(path, "key", CPU)
    assert found is None or same(found, saved | {"key": "key"})


def test_what_is_saved_is_loaded(tmp_path, capsys):
    saved = {"weight": torch.randn(3, 4, dtype=torch.float64), "step": 3}
    dtl.save(tmp_path / "x.pt", "key", saved)
    found = dtl.load(tmp_path / "x.pt", "key", CPU)
    assert same({k: found[k] for k in saved}, saved)
    assert dtl.load(tmp_path / "absent.pt", "key", CPU) is None and not capsys.readouterr().err
    assert dtl.load(tmp_path / "x.pt", "other", CPU) is None
    assert capsys.readouterr().err.count("warning:") == 1


@pytest.mark.parametrize("save", [lambda *saved: torch.save({"key": saved[1], **saved[2]}, saved[0]), dtl.save],
                         ids=["no checksum", "the right checksum"])  # fmt: skip
def test_checkpoint_with_code_in_it_does_not_run_it(tmp_path, capsys, save):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    save(tmp_path / "x.pt", "key", {"state": Evil()})
    assert dtl.load(tmp_path / "x.pt", "key", CPU) is None and not (tmp_path / "ran").exists()
    assert f"{tmp_path / 'x.pt'} is damaged" in capsys.readouterr().err


# ---------------------------------------- atomic writing


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_content(function, tmp_path, monkeypatch):
    path = tmp_path / "new folder" / "file"
    dtl.write_atomically(path, b"old")

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, full)
    with pytest.raises(dtl.DTLError, match=f"cannot write {path}: {os.strerror(errno.ENOSPC)}"):
        dtl.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]
    monkeypatch.undo()
    dtl.write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and list(path.parent.iterdir()) == [path]


def test_a_line_is_added_whole(tmp_path, monkeypatch):
    path = tmp_path / "new folder" / "log.jsonl"
    for record in ({"a": 1}, {"b": "é\n"}):
        dtl.append(path, record)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": 1}, {"b": "é\n"}]
    path.write_bytes(path.read_bytes()[:-3])  # cut short
    dtl.append(path, {"c": 2})
    lines = path.read_bytes().split(b"\n")
    assert len(lines) == 4 and json.loads(lines[0]) == {"a": 1} and json.loads(lines[2]) == {"c": 2}


# ---------------------------------------- damaged measurements


def results(out, capsys):
    """What is read of the measurements, and how many lines the one warning counts."""
    capsys.readouterr()
    found = dict(dtl.Results(out))
    said = capsys.readouterr().err
    assert said.count("warning:") <= 1 and said.count("\n") <= 1
    return found, int(re.search(r"warning: .*results.jsonl: \D*(\d+)", said)[1]) if said else 0


def damaged(lines, damage):
    """The lines of results.jsonl, the last of some damaged; how many of them are lost; how many are
    unreadable."""
    last = lines[-1].rstrip(b"\n")
    return {
        "a digit": lambda: (
            [
                *lines[:-1],
                re.sub(rb'"value": 0\.(\d)', lambda m: b'"value": 0.%d' % ((int(m[1]) + 1) % 10), last)
                + b"\n",
            ],
            1,
            1,
        ),
        "a cosine": lambda: (
            [*lines[:-1], last.replace(b'"mean_cosine": ', b'"mean_cosine": 1') + b"\n"],
            1,
            1,
        ),
        "another model": lambda: ([*lines[:-1], last.replace(b"disposed:", b"Disposed:") + b"\n"], 1, 1),
        "no digest": lambda: ([*lines[:-1], re.sub(rb', "digest": "\w+"', b"", last) + b"\n"], 1, 1),
        "garbage": lambda: (
            [
                *lines,
                b"\xff\xfe\n",
                b"[1]\n",
                b"7\n",
                b"null\n",
                b'{"key": "x"}\n',
                b'"text"\n',
                b"{}\n",
                b"[" * 9999 + b"\n",
            ],
            0,
            8,
        ),
        "cut after a letter": lambda: ([*lines[:-1], last[:1]], 1, 1),
        "cut in the middle": lambda: ([*lines[:-1], last[: len(last) // 2]], 1, 1),
        "cut by a letter": lambda: ([*lines[:-1], last[:-1]], 1, 1),
        "no newline": lambda: ([*lines[:-1], last], 0, 0),
        "three digits": lambda: (
            [line.replace(b'"seed": 0', b'"seed": 3') for line in lines[:3]] + lines[3:],
            3,
            3,
        ),
    }[damage]()


@pytest.mark.parametrize(
    "damage",
    [
        "a digit",
        "a cosine",
        "another model",
        "no digest",
        "garbage",
        "cut after a letter",
        "cut in the middle",
        "cut by a letter",
        "no newline",
        "three digits",
    ],
)
def test_damaged_measurements_are_passed_over_with_one_warning(finished, tmp_path, capsys, damage):
    """And the next line does not stick to one that was cut short."""
    lines = (finished.out / "results.jsonl").read_bytes().splitlines(keepends=True)
    whole, count = results(finished.out, capsys)
    assert count == 0 and len(whole) == len(lines)
    changed, lost, unreadable = damaged(lines, damage)
    (tmp_path / "results.jsonl").write_bytes(b"".join(changed))
    found, count = results(tmp_path, capsys)
    assert (len(found), count) == (len(lines) - lost, unreadable) and found.items() <= whole.items()
    dtl.Results(tmp_path).add({"key": "new", "value": 0.5})
    assert {"new", *found} == results(tmp_path, capsys)[0].keys()


def test_damaged_measurements_are_made_anew(finished, arguments, dtl_command, records, trained, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "out")
    lines = (out / "results.jsonl").read_bytes().splitlines(keepends=True)
    changed = [
        line.replace(b'"value": 0', b'"value": 1') if k in (20, 30) else line for k, line in enumerate(lines)
    ]
    (out / "results.jsonl").write_bytes(b"".join(changed) + b"garbage\n")
    result = dtl_command(*arguments("all", out, attackers="fixed,long", attacker_seeds=2))
    assert result.code == 0 and result.output.count("warning:") == 1
    assert re.search(r"warning: .*results.jsonl: \D*3 ", result.output)
    with contextlib.redirect_stderr(io.StringIO()):
        found, whole = dtl.Results(out), dtl.Results(finished.out)
    assert {k: r["value"] for k, r in found.items()} == {k: r["value"] for k, r in whole.items()}
    assert len((out / "results.jsonl").read_bytes().splitlines()) == len(lines) + 3
    attacks = sum(b"pl_accuracy" in lines[k] for k in (20, 30))
    assert len(trained(out)) == len(trained(finished.out)) + attacks


def test_corrupt_checkpoint_is_named_and_made_anew(finished, arguments, dtl_command, tmp_path, capsys):
    """By the whole program, with its results gone as well."""
    out = shutil.copytree(finished.out, tmp_path / "out")
    (out / "results.jsonl").unlink()
    (checkpoint,) = (out / "checkpoints").glob("transferred-seed0-*.pt")
    before = checkpoint.read_bytes()
    checkpoint.write_bytes(before[:-100])
    result = dtl_command(*arguments("all", out, methods=["gc"]))
    assert result.code == 0 and f"warning: checkpoint {checkpoint} is damaged" in result.output
    assert result.output.count("warning:") == 1 and checkpoint.read_bytes() == before
    whole = measured(finished.out)
    assert measured(out).items() <= whole.items() and len(measured(out)) == 15
