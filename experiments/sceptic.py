"""A sceptic's attacker, outside the audits' grid, written without reading how disposal works (of `dispose` and the forget
losses nothing; a listing did show the few lines of the helper `gradient_collision`, and nothing here rests on it).

It gets a backbone and a piggyback task, tries three ways on four fifths of the training images, chooses by accuracy on the
held-out fifth (never on test images), then follows the chosen one on all of them. All see pooled maps of every layer:

probe    frozen backbone, BatchNorm statistics taken anew from the task, ridge regression
tuned    head from that ridge regression, then the whole net: early layers gently, Nesterov, cosine, mixup, smoothed labels
revived  the same after each filter is rescaled to He's norm (dead ones drawn anew) and BatchNorm's affine part is reset

Predictions average an image and its mirror image. Models that --out lacks are made there, as by `dtl.py dispose`.
"""

import copy
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dtl
from dtl_data import Task, augment
from dtl_store import stream

TASKS = ("source-subset", "downstream")
TRIAL_STEPS, STEPS = 700, 1800  # to choose; then on all the images
Logits = Callable[[Tensor], Tensor]  # of uint8 images


def pooled(backbone: dtl.ResNet, images: Tensor) -> Tensor:
    """Every layer's map, pooled to 1x1 and to 2x2."""
    maps = [backbone.stem(dtl.normalise(images))]
    for block in backbone.blocks:
        maps.append(block(maps[-1]))
    return torch.nan_to_num(torch.cat([F.adaptive_avg_pool2d(m, size).flatten(1) for m in maps for size in (1, 2)], 1))


@torch.no_grad()
def in_parts(function: Logits, images: Tensor) -> Tensor:
    return torch.cat([function(part) for part in images.split(500)])


def score(logits: Logits, images: Tensor, labels: Tensor) -> float:
    return ((in_parts(logits, images) + in_parts(logits, images.flip(3))).argmax(1) == labels).double().mean().item()


def restate(backbone: dtl.ResNet, images: Tensor) -> None:
    """BatchNorm's running statistics, from these images alone."""
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # a plain mean
    backbone.train()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    in_parts(lambda part: pooled(backbone, part), images[order])
    backbone.eval()
    for m in norms:
        m.momentum = 0.1


def ridge(backbone: dtl.ResNet, task: Task, strength: float, floor: float) -> nn.Linear:
    """A head by ridge regression to one-hot labels, images and mirror images; `floor`: least relative spread of a feature."""
    x = in_parts(lambda part: pooled(backbone, part), torch.cat([task.x, task.x.flip(3)])).double()
    y = F.one_hot(task.y.repeat(2), task.classes).double()
    mean, std, centre = x.mean(0), x.std(0), y.mean(0)
    std = std.clamp_min(floor * std.mean() + 1e-12)
    x = (x - mean) / std
    weight = torch.linalg.solve(x.T @ x + strength * len(x) * torch.eye(x.shape[1]), x.T @ (y - centre)) / std[:, None]
    head = nn.Linear(*weight.shape)
    with torch.no_grad():
        head.weight.copy_(weight.T)
        head.bias.copy_(centre - mean @ weight)
    return head


def probe(backbone: dtl.ResNet, task: Task, steps: int, seed: int) -> Logits:
    restate(backbone, task.x)
    head = ridge(backbone, task, strength=1e-2, floor=1e-6)
    return lambda images: head(pooled(backbone, images))


def tuned(backbone: dtl.ResNet, task: Task, steps: int, seed: int) -> Logits:
    generator = torch.Generator().manual_seed(seed)
    restate(backbone, task.x)
    head = ridge(backbone, task, strength=0.1, floor=1e-2)
    with torch.no_grad():  # from one-hot targets to logits
        head.weight.mul_(8)
        head.bias.mul_(8)
    layers = [backbone.stem, *backbone.blocks, head]
    parameters = [p.requires_grad_() for layer in layers for p in layer.parameters()]
    groups = [{"params": list(m.parameters()), "lr": 0.05 * 0.8 ** (len(layers) - 1 - i)} for i, m in enumerate(layers)]
    optimiser = torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2)
    order = torch.empty(0, dtype=torch.int64)
    backbone.train()
    for _ in range(steps):
        if len(order) < 64:
            order = torch.cat([order, torch.randperm(len(task.y), generator=generator)])
        chosen, order = order[:64], order[64:]
        x, y = augment(task.x[chosen], generator).float(), task.y[chosen]
        share = 1 - torch.rand((), generator=generator).item() / 2
        logits = head(pooled(backbone, share * x + (1 - share) * x.flip(0)))
        loss = share * F.cross_entropy(logits, y, label_smoothing=0.1)
        loss = loss + (1 - share) * F.cross_entropy(logits, y.flip(0), label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimiser.step()
        schedule.step()
    restate(backbone, task.x)
    return lambda images: head(pooled(backbone, images))


def revived(backbone: dtl.ResNet, task: Task, steps: int, seed: int) -> Logits:
    generator = torch.Generator().manual_seed(stream(seed, "revive"))
    with torch.no_grad():
        for m in backbone.modules():
            if isinstance(m, nn.Conv2d):
                w = torch.nan_to_num(m.weight.flatten(1))
                w = torch.where(w.norm(dim=1, keepdim=True) > 1e-12, w, torch.randn(w.shape, generator=generator))
                m.weight.copy_(math.sqrt(2) * (w / w.norm(dim=1, keepdim=True)).view_as(m.weight))
            elif isinstance(m, nn.BatchNorm2d):
                m.weight.fill_(1)
                m.bias.zero_()
    return tuned(backbone, task, steps, seed)


def attack(backbone: dtl.ResNet, task: Task, seed: int) -> dict:
    """The best variant on held-out training images, and what it reaches on the test images from all of them."""
    held = torch.zeros(len(task.y), dtype=torch.bool)
    for c in range(task.classes):
        of_class = torch.nonzero(task.y == c).flatten()
        held[of_class[len(of_class) * 4 // 5:]] = True
    known = replace(task, x=task.x[~held], y=task.y[~held])
    variants = {"probe": probe, "tuned": tuned, "revived": revived}
    tried = {name: score(variant(copy.deepcopy(backbone), known, TRIAL_STEPS, seed), task.x[held], task.y[held])
             for name, variant in variants.items()}
    chosen = max(tried, key=tried.__getitem__)
    logits = variants[chosen](copy.deepcopy(backbone), task, STEPS, seed)
    return {"valid": tried[chosen], "test": score(logits, task.x_test, task.y_test), "chosen": chosen, "tried": tried}


def print_table(rows: list[dict], models: list[str]) -> None:
    """Means over the seeds that have all the models; the leak is a ratio of these means."""
    print("| model | seeds | " + " | ".join(f"{t} | leak" for t in TASKS) + " | chosen |")
    print("|---" * (3 + 2 * len(TASKS)) + "|")
    value = {(r["model"], r["task"], r["seed"]): r["test"] for r in rows}
    seeds = [s for s in sorted({r["seed"] for r in rows}) if all((m, t, s) in value for m in models for t in TASKS)]
    for model in models if seeds else []:
        cells = []
        for task in TASKS:
            mean = {m: sum(value[m, task, s] for s in seeds) / len(seeds) for m in models}
            span = mean["transferred"] - mean["oracle"] if {"transferred", "oracle"} <= mean.keys() else 0
            cells += [f"{mean[model]:.3f}", f"{(mean[model] - mean['oracle']) / span:.2f}" if span else "-"]
        chosen = [r["chosen"] for r in rows if r["model"] == model and r["seed"] in seeds]
        counts = ", ".join(f"{name} {chosen.count(name)}" for name in sorted(set(chosen)))
        print(f"| {model} | {len(seeds)} | " + " | ".join(cells) + f" | {counts} |")


@click.command()
@click.option("--out", type=Path, default="runs", show_default=True, help="the runs' folder, with their checkpoints")
@click.option("--data-dir", type=Path, default="data", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--models", default="scratch,oracle,transferred,disposed:gc,disposed:gc-fresh", show_default=True)
@click.option("--preset", default="cifar-small", show_default=True)
@click.option("--split", default="test", show_default=True)
@click.option("--forget-weights", default="", help="METHOD=WEIGHT,... over those of the preset")
@click.option("--write", type=Path, default="experiments/sceptic.jsonl", show_default=True, help="what is in it is not redone")
def main(out: Path, data_dir: Path, seeds: str, models: str, preset: str, split: str, forget_weights: str, write: Path) -> None:
    torch.set_num_threads(1)
    options = dtl.PRESETS[preset] | {"split": split}
    options["forget_weights"] = ",".join(filter(None, [options.get("forget_weights", ""), forget_weights]))
    done = [json.loads(line) for line in write.read_text().splitlines()] if write.exists() else []
    rows = []
    for seed in map(int, seeds.split(",")):
        experiment = dtl.Experiment(dtl.Config(**options), seed, torch.device("cpu"), out, data_dir)
        for model in models.split(","):
            name = experiment.oracle() if model == "oracle" else model
            if name is None:
                print(f"seed {seed}: no oracle", file=sys.stderr)
                continue
            for task_name in TASKS:
                task, began = experiment.task(task_name), time.monotonic()
                this = {"seed": seed, "model": model, "is": name, "task": task_name, "split": split,
                        "key": experiment.key(name)[:12], "images": task.fingerprint[:12], "torch": torch.__version__}
                row = next((r for r in done if this.items() <= r.items()), None)
                if row is None:
                    row = this | attack(experiment.model(name).backbone, task, stream(seed, "sceptic", task_name))
                    row["seconds"] = round(time.monotonic() - began, 1)
                    with write.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(*(f"{k}={row[k]}" for k in ("seed", "model", "task", "valid", "test", "chosen", "seconds")),
                          file=sys.stderr, flush=True)
                rows.append(row)
    print_table(rows, models.split(","))


if __name__ == "__main__":
    main()
