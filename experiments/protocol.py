"""Weights by one rule on validation images of three seeds, then, once, test images of five seeds that nobody
has looked at. Any number of these, side by side, share the work; a killed one's is done by another.

    python experiments/protocol.py --data-dir data --gpu 0        # takes what is ready, till all is done
    python experiments/protocol.py --data-dir data --gpu 0 --report

The rule, for every method: of its trials the largest weight that costs, in the mean over the validation
seeds, at most MOST of the target accuracy of `transferred`; if none does, the smallest."""

import contextlib
import copy
import fcntl
import functools
import json
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import durable  # noqa: E402
import sceptic  # noqa: E402

import dtl  # noqa: E402

VALIDATION, TEST, MOST = (100, 101, 102), (5, 6, 7, 8, 9), 0.010
TRIALS = {  # those that take longest first
    "gc-fresh": (10, 20, 30), "gradient-norm-fresh": (10, 20, 30), "gc": (3, 10, 30),
    "uniform-fresh": (100, 300, 1000), "random-labels-fresh": (30, 100, 300), "uniform": (30, 100, 300)}
FRONT = ("gc-fresh", "gradient-norm-fresh", "uniform-fresh")  # every trial of these is attacked
ATTACKS = ("fixed", "few", "ridge", "long", "high", "low", "adamw", "rescaled", "longer", "gentle")
OTHERS = ("oracle", "scratch", "transferred", "disposed:distill-fresh")
DURABLE = [f"disposed:{name}" for name in ("top1", "top1-gc", "several-teachers", "second-generation",
                                           "gc-and-uniform", "few-images", "temperature-1")]


class Study:
    def __init__(self, preset, out, data_dir, device, made_with):
        self.preset = dtl.PRESETS[preset] | dict(precision="float32")
        self.data_dir, self.made_with = data_dir, made_with
        self.progress = dtl.Progress(out, device, graphs=device.type == "cuda")
        self.results, self.choice = dtl.Results(out), {}

    @functools.cache
    def run(self, seed, weights=""):
        """That seed's Run, with other weights than the preset's: they share their tasks."""
        if weights:
            other = copy.copy(before := self.run(seed))
            other.config, other.task = replace(before.config, weights=weights), before.task
            return other
        config = dtl.Config(**self.preset | dict(split="validation" if seed in VALIDATION else "test"))
        run = durable.Trials(config, seed, self.data_dir, self.progress, self.results)
        run.made_with = self.made_with or run.made_with
        return run

    def known(self, run, *which):
        return self.results.get(run.number(*which)[0]["key"])

    def costs(self, method, weight):
        """What the target loses by it, for each validation seed; None as long as one is missing."""
        pairs = [(self.known(self.run(s), "transferred", "target_accuracy"),
                  self.known(self.run(s, f"{method}={weight}"), f"disposed:{method}", "target_accuracy"))
                 for s in VALIDATION]
        return [one["value"] - other["value"] for one, other in pairs] if all(
            one and other for one, other in pairs) else None

    def chosen(self, method):
        """The weight, once all trials are there; None before."""
        if method not in self.choice:
            costs = {weight: self.costs(method, weight) for weight in TRIALS[method]}
            if None not in costs.values():
                passed = [weight for weight, cost in costs.items() if np.mean(cost) <= MOST]
                self.choice[method] = max(passed, default=min(costs))
        return self.choice.get(method)

    def jobs(self):
        """(run, model, what to measure) in the order of their worth; ("sceptic", TASK) is his attack."""
        seeds, target = (*VALIDATION, *TEST), ("target_accuracy",)
        for s in seeds:
            yield self.run(s), "pretrained", ("source_accuracy",)
        for s in seeds:
            yield self.run(s), "transferred", target
        for method, weights in TRIALS.items():
            for weight in weights:
                for s in VALIDATION:
                    yield self.run(s, f"{method}={weight}"), f"disposed:{method}", target
        for s in seeds:
            yield self.run(s), "oracle", target
        tested = [(self.run(s), m) for s in TEST for m in OTHERS]
        for method in filter(self.chosen, TRIALS):
            tested += [(self.run(s, f"{method}={self.chosen(method)}"), f"disposed:{method}") for s in TEST]
        yield from ((*pair, target) for pair in tested)
        for task in dtl.PIGGYBACK_TASKS:
            yield from ((*pair, ("sceptic", task)) for pair in tested)
        for attacker in ATTACKS[:5]:
            for task in dtl.PIGGYBACK_TASKS:
                yield from ((*pair, ("pl_accuracy", task, attacker, 0)) for pair in tested)
        first = self.run(VALIDATION[0])
        for m in ("transferred-2", "transferred-3", "disposed:gc-fresh", *DURABLE):
            yield first, m, target
        trials = [(self.run(s, f"{method}={weight}"), f"disposed:{method}")
                  for s in VALIDATION for method in FRONT for weight in TRIALS[method]]
        trials += [(self.run(s), m) for s in VALIDATION for m in ("oracle", "transferred")]
        for task in dtl.PIGGYBACK_TASKS:
            yield from ((*pair, ("sceptic", task)) for pair in [*((first, m) for m in DURABLE), *trials])
        for attacker in ATTACKS[5:]:
            for task in dtl.PIGGYBACK_TASKS:
                yield from ((*pair, ("pl_accuracy", task, attacker, 0)) for pair in tested)

    def state(self, run, model, which):
        """done, ready or waiting"""
        key = sceptic.key(run, model, which[1]) if which[0] == "sceptic" else run.number(
            model, *which)[0]["key"]
        if key in self.results:
            return "done"
        trial = durable.TRIALS.get(model.removeprefix("disposed:"))
        before = [model] if len(which) > 1 else [*dtl.needs(model), *(trial.teachers if trial else ())]
        before += ["pretrained"] * model.startswith("transferred-")
        return "ready" if all(run.path(m).exists() for m in before) else "waiting"

    def work(self):
        locks, over = self.results.path.parent / "locks", set()
        locks.mkdir(parents=True, exist_ok=True)
        while True:
            self.results.__init__(self.results.path.parent)  # with what the others have added
            left = False
            for job in self.jobs():
                if job in over or (state := self.state(*job)) == "done":
                    over.add(job)
                    continue
                left, (run, model, which) = True, job
                if state == "waiting":
                    continue
                lock = locks / dtl.digest([run.key(model), *which])
                with lock.open("w") as file, contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
                    self.results.__init__(self.results.path.parent)
                    if self.state(*job) == "ready":
                        try:
                            if which[0] == "sceptic":
                                sceptic.attack(run, model, which[1])
                            else:
                                run.measure(model, *which)
                        except Exception:  # the others go on
                            over.add(job)
                            traceback.print_exc()
                        break
            else:
                if not left:
                    return
                time.sleep(0.5)

    def trials(self):
        """What was measured of each trial; `model` is its method and weight."""
        models = [(s, "", m, m) for s in VALIDATION for m in ("oracle", "transferred")]
        models += [(s, f"{method}={weight}", f"disposed:{method}", f"{method} {weight}")
                   for s in VALIDATION for method, weights in TRIALS.items() for weight in weights]
        for s, weights, model, name in models:
            run = self.run(s, weights)
            found = [self.known(run, model, "target_accuracy")]
            found += [self.results.get(sceptic.key(run, model, task)) for task in dtl.PIGGYBACK_TASKS]
            yield from (record | dict(model=name) for record in found if record)

    def report(self):
        dtl.ATTACKERS["sceptic"] = None
        folder, trials = self.results.path.parent / "sceptic", [*self.trials()]
        folder.mkdir(exist_ok=True)
        (folder / "trials.md").write_text(table(trials))
        (folder / "trials.jsonl").write_text("".join(json.dumps(record) + "\n" for record in trials))
        click.echo(table(trials))
        weights = ",".join(f"{method}={self.chosen(method)}" for method in TRIALS)
        models = [f"disposed:{method}" for method in dtl.METHODS if method in ("distill-fresh", *TRIALS)]
        sceptic.report({s: self.run(s, weights) for s in TEST}, [*dtl.REFERENCES, *models])


def table(trials):
    """What each trial costs, in the mean and by validation seed, and what the strongest attacker, and the
    fixed one if it is among them, get out of it."""
    names = list(dict.fromkeys(record["model"] for record in trials))
    rows, target = dtl.Rows(trials, names), {}
    for record in trials:
        if record["metric"] == "target_accuracy":
            target.setdefault(record["model"], {})[record["seed"]] = 100 * record["value"]
    kinds = [(task, kind) for task in dtl.PIGGYBACK_TASKS for kind in ("worst", "fixed")
             if kind == "worst" or kind in rows.attackers]
    lines = [["trial", "target %", "change", "by seed", *(f"{t}: {kind} PL %, leak" for t, kind in kinds)]]
    lines.append(["---"] * len(lines[0]))
    for name in names:
        changes = (target[name][s] - target["transferred"][s] for s in target[name])
        lines.append([name, dtl.cell(rows.get("target", name), interval=False),
                      dtl.cell(rows.get("change", name), "+.1f"), ", ".join(f"{c:+.1f}" for c in changes)])
        for of_task in kinds:
            pl, leak = (rows.get(what, name, *of_task) for what in ("pl", "leak"))
            lines[-1].append(f"{dtl.cell(pl, interval=False)}, {dtl.cell(leak, '.2f', 1)}" if pl else "-")
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@click.command()
@click.option("--preset", default="cifar-cpu")
@click.option("--gpu", type=int)
@click.option("--data-dir", type=Path, required=True)
@click.option("--out", type=Path, default="runs")
@click.option("--made-with", default="", help="of models made elsewhere, as in 2.11.0+cu130,cuda")
@click.option("--report", is_flag=True)
def main(preset, gpu, data_dir, out, made_with, report):
    torch.set_num_threads(1)
    made_with = tuple(made_with.split(",")) if made_with else ()
    study = Study(preset, out, data_dir, dtl.find_device(gpu, "float32"), made_with)
    study.report() if report else study.work()


if __name__ == "__main__":
    main()
