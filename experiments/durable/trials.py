"""Trials of disposal into a fresh backbone, on held-out training images: how the default of `gc-fresh` was found.

    OMP_NUM_THREADS=1 python experiments/durable/trials.py runs trials.jsonl transferred oracle fresh:lam=30,ramp=.5

Each trial appends one line: target accuracy, and PL accuracy of the fixed attacker and of a long one (SGD, learning rate
0.1, 1000 steps, on all the piggyback data; the mean of ATTACKS seeds of its own, 2 by default) for both tasks. One seed (the
environment variable SEED, 0 by default), preset cifar-small. What won is in dtl.py; what did not is only here.
"""

import copy
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import dtl

SEED, ATTACKS, CPU = int(os.environ.get("SEED", "0")), int(os.environ.get("ATTACKS", "2")), torch.device("cpu")
out, results, specs = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
config = dtl.Config(**(dtl.PRESETS["cifar-small"] | {"split": "validation"}))
experiment = dtl.Experiment(config, SEED, CPU, out, Path("data"))


def mixup(x, generator):
    share = torch.rand(len(x), 1, 1, 1, generator=generator)
    return share * x + (1 - share) * x[torch.randperm(len(x), generator=generator)]


def fresh(steps=1000, lam=10.0, ramp=0.0, mix=0, src=1, srcmix=0, chunks=2, init="fresh", traj=0, gap=1):
    """lam: weight of GC; ramp: share of the steps over which it rises; mix, srcmix: mixup among target, among source images;
    src=0: no distillation on source images; init=top: stem and first block from the transferred model; traj: GC at weights
    that a simulated attacker has trained for 0..traj steps; gap: GC only every so many steps."""
    source, target, teacher = experiment.task("source"), experiment.task("target"), dtl.frozen(experiment.model("transferred"))
    backbone = dtl.new_backbone(config.network, dtl.stream(SEED, "student"), CPU)
    generator = torch.Generator().manual_seed(dtl.stream(SEED, "student head"))
    student = dtl.Model(backbone, dtl.new_head(backbone.features, 10, generator))
    if init == "top":
        backbone.stem.load_state_dict(teacher.backbone.stem.state_dict())
        backbone.blocks[0].load_state_dict(teacher.backbone.blocks[0].state_dict())

    def distil(x):
        loss = dtl.distillation(student(x), teacher(x), 4.0)
        loss.backward()
        return loss.item()

    def collide(x, y, weight, step, generator):
        head = dtl.new_head(backbone.features, source.classes, generator)
        if not traj:
            dtl.gradient_collision(backbone, head, x, y, "dot", int(chunks), weight)
            return
        k = int(torch.randint(0, int(traj) + 1, (1,), generator=generator))
        attacked = copy.deepcopy(backbone)
        parameters = [*attacked.parameters(), *head.parameters()]
        optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9)
        for j in range(k):
            x_inner, y_inner = dtl.batch(source, 64, step * 8 + j, dtl.stream(SEED, "inner"), generator)
            optimizer.zero_grad()
            F.cross_entropy(head(attacked(x_inner)), y_inner).backward()
            optimizer.step()
        optimizer.zero_grad()
        dtl.gradient_collision(attacked, head, x, y, "dot", int(chunks), weight)
        for ours, theirs in zip(backbone.parameters(), attacked.parameters()):
            ours.grad.add_(theirs.grad)  # first order: as if the attacker's steps had not moved with the weights

    def loss_terms(step, generator):
        x, _ = dtl.batch(target, 64, step, SEED, generator)
        terms = {"retain": distil(mixup(x, generator) if mix else x)}
        x, y = dtl.batch(source, int(chunks) * 32, step, dtl.stream(SEED, "source"), generator)
        with dtl.running_statistics_kept(student):
            if src:
                distil(mixup(x, generator) if srcmix else x)
            weight = lam * min(1.0, (step + 1) / (ramp * steps)) if ramp else lam
            if weight and step % int(gap) == 0:
                collide(x, y, weight, step, generator)
        return terms

    schedule = dtl.Schedule(int(steps), 0.1, 64, 5e-4, 5.0)
    dtl.optimise(student, loss_terms, schedule, dtl.stream(SEED, "dispose"), dtl.Watch("trial"))
    return student


def pl(model, task, lr, steps, attacks=1):
    task_, schedule = experiment.task(task), dtl.Schedule(steps, lr, 64, 5e-4, 5.0)
    return statistics.mean(attacked(model, task_, schedule, dtl.stream(SEED, "piggyback", task, *([k] if k else [])))
                           for k in range(attacks))


def attacked(model, task_, schedule, seed):
    return dtl.accuracy(dtl.learn(copy.deepcopy(model.backbone), task_, schedule, seed, dtl.Watch("attack")), task_)


lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
done = {row["trial"] for row in lines if row.get("attacks", 1) == ATTACKS}
for spec in specs:
    trial = f"{spec} seed {SEED}"
    if trial in done:
        continue
    name, _, options = spec.partition(":")
    began = time.time()
    if name == "fresh":
        pairs = (option.split("=") for option in options.split(",") if option)
        model = fresh(**{k: v if k == "init" else float(v) for k, v in pairs})
    else:
        model = experiment.model(experiment.oracle() if name == "oracle" else name)
    row = {"trial": trial, "seconds": round(time.time() - began), "attacks": ATTACKS}
    if name != "random":
        row["target"] = round(dtl.accuracy(model, experiment.task("target")), 4)
    for task in dtl.PIGGYBACK_TASKS:
        row[f"{task} fixed"] = round(pl(model, task, 0.05, 200), 4)
        row[f"{task} long"] = round(pl(model, task, 0.1, 1000, ATTACKS), 4)
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row, flush=True)
