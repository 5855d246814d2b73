"""The scripts in experiments/: each runs, adds what it says it adds, and counts right."""

import contextlib
import itertools
import json
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
from conftest import TASKS

import dtl

RIVALS = "neggrad random-labels bad-teacher scrub gradient-norm gc-head gc-source-head".split()
RIVALS += ["random-labels-fresh", "gradient-norm-fresh"]
ATTACKERS = "low high longer adamw gentle few ridge sceptic".split()


@pytest.fixture
def script(root, monkeypatch, capsys):
    """script(name, *arguments) -> what it prints, run here, with tables of its own to add to."""

    def run(name, *arguments):
        for table in ("METHODS", "ATTACKERS"):
            monkeypatch.setattr(dtl, table, dict(getattr(dtl, table)))
        for module in ("attackers", "sceptic"):
            sys.modules.pop(module, None)
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with contextlib.suppress(SystemExit):
            runpy.run_path(str(root / "experiments" / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_rivals(script, arguments, tmp_path):
    """Every method ends with weights of its own: none does nothing, or what another does."""
    models = ["transferred", "gc", "gc-fresh", *RIVALS]
    steps = dict(dispose_steps=2, fresh_steps=2)
    printed = script("rivals.py", *arguments("dispose", tmp_path, methods=models[1:], **steps))
    made = [tmp_path / "seed0" / f"{model}.pt" for model in models]
    assert all(path.exists() for path in made), printed
    states = [dtl.load_model(path).state_dict()["backbone.2.first.0.weight"] for path in made]
    assert len({tuple(state.flatten().tolist()) for state in states}) == len(models)
    assert all(state.isfinite().all() for state in states)


def test_attackers(script, arguments, records, tmp_path):
    flags = dict(methods=["finetune"], attackers=",".join(["long", *ATTACKERS]), dispose_steps=1)
    printed = script("sceptic.py", *arguments("piggyback", tmp_path, **flags))
    for model in ("transferred", "finetune"):
        found = records(tmp_path, model=model, task="downstream")
        found = {r["attacker"]: r["value"] for r in found}
        assert set(found) == {"long", *ATTACKERS}, printed
        assert found["few"] == found["long"]  # of four images a class, the same


def test_they_find_the_program_and_one_another(root, tmp_path):
    command = [sys.executable, root / "experiments" / "rivals.py", "--help"]
    quick = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH="")
    run = subprocess.run(command, cwd=tmp_path, env=quick, capture_output=True, text=True)
    shown = "".join(run.stdout.split())
    assert all(f",{name}," in shown or f",{name}[" in shown for name in RIVALS + ATTACKERS), run


def test_recount_and_picture(script, tmp_path):
    """The table is the report's; differences are of pairs, ± 3.18 standard errors of four seeds."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    rng, seeds, models = np.random.default_rng(0), range(4), [*dtl.REFERENCES, "gc", "gc-fresh@0.5"]
    what = [("pl_accuracy", task, a) for task in TASKS for a in ("fixed", "long")]
    what.append(("target_accuracy", None, None))
    keys = [(seed, model, *w) for seed in seeds for model in models for w in what]
    results = {key: rng.integers(800) / 800 for key in keys}
    lines = [json.dumps(dict(zip(dtl.RESULT, key), value=v)) for key, v in results.items()]
    (tmp_path / "results.jsonl").write_text("\n".join(lines))
    numbers = dtl.collect(results, seeds, models, TASKS, ["fixed", "long"])
    printed = script("recount.py", tmp_path).splitlines()
    assert printed[: len(models) + 2] == dtl.table(numbers)
    alone = script("recount.py", tmp_path, "long").splitlines()
    assert alone[: len(models) + 2] == dtl.table(
        dtl.collect(results, seeds, models, TASKS, ["long"])
    )
    change = np.subtract(numbers["gc", "target"], numbers["gc-fresh@0.5", "target"])
    half = 3.182 * change.std(ddof=1) / 2
    assert f"| gc - gc-fresh@0.5  | {change.mean():+.1f} ± {half:.1f} " in printed[-1]
    (folder := tmp_path / "alone").mkdir()
    text = "\n".join(line for line in lines if '"fixed"' not in line)
    (folder / "results.jsonl").write_text(text)
    script("picture.py", folder)  # one attacker, another one: one row
    assert len(pyplot.gcf().axes) == len(TASKS) and (folder / "picture.png").exists()
    script("picture.py", tmp_path, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    panels = itertools.product(("fixed", "strongest"), TASKS)
    for panel, (by, task) in zip(pyplot.gcf().axes, panels, strict=True):
        assert set(models[1:]) < {text.get_text() for text in panel.texts}
        for m in models[1:]:  # all but scratch
            point = np.mean(numbers[m, "target"]), np.mean(numbers[m, task, by])
            assert any(np.allclose(point, xy) for line in panel.lines for xy in line.get_xydata())
            assert panel.bbox.contains(*panel.transData.transform(point))
