"""A sceptic's attacker, outside the audits' grid, written without reading how disposal works.

It gets a backbone and a piggyback task, and chooses among three ways by accuracy on a held-out fifth of the training
images (never on test images), then follows the chosen one on all of them:

probe    frozen backbone, BatchNorm statistics taken anew from the task, ridge regression on pooled maps of every layer
tuned    head from ridge regression first, then the whole net: gentle early layers, Nesterov, cosine, label smoothing
revived  the same after each convolution's filters are rescaled to He's norm and BatchNorm's scale and shift are reset

Predictions average an image and its mirror image.
"""

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtl
from dtl_data import Task
from dtl_store import stream

TASKS = ("source-subset", "downstream")
TRIAL_STEPS, STEPS = 800, 2000  # on four fifths of the images, to choose; then on all of them
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # times the number of images


def pooled(backbone: dtl.ResNet, images: Tensor, every: bool) -> Tensor:
    """The backbone's features, or pooled maps of its every layer."""
    if not every:
        return backbone(dtl.normalise(images))
    maps = [backbone.stem(dtl.normalise(images))]
    for block in backbone.blocks:
        maps.append(block(maps[-1]))
    return torch.cat([F.adaptive_avg_pool2d(m, size).flatten(1) for m in maps for size in (1, 2)], 1)


@torch.no_grad()
def in_parts(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([function(part) for part in images.split(500)])


@torch.no_grad()
def restate(backbone: dtl.ResNet, images: Tensor) -> None:
    """BatchNorm's running statistics, from these images alone."""
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # a plain mean
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    backbone.train()
    in_parts(lambda part: backbone(dtl.normalise(part)), images[order])
    backbone.eval()
    for m in norms:
        m.momentum = 0.1


def ridge(backbone: dtl.ResNet, task: Task, strength: float, every: bool) -> nn.Linear:
    """A linear head by ridge regression to one-hot labels, on features of the images and their mirror images."""
    x = in_parts(lambda part: pooled(backbone, part, every), torch.cat([task.x, task.x.flip(3)])).double()
    y = F.one_hot(task.y.repeat(2), task.classes).double()
    mean, std = x.mean(0), x.std(0) + 1e-8
    x, centre = (x - mean) / std, y.mean(0)
    weight = torch.linalg.solve(x.T @ x + strength * len(x) * torch.eye(x.shape[1]), x.T @ (y - centre)) / std[:, None]
    head = nn.Linear(len(weight), task.classes)
    with torch.no_grad():
        head.weight.copy_(weight.T)
        head.bias.copy_(centre - mean @ weight)
    return head


@torch.no_grad()
def score(logits: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    out = in_parts(logits, images) + in_parts(logits, images.flip(3))
    return (out.argmax(1) == labels).double().mean().item()


def probe(backbone: dtl.ResNet, task: Task, steps: int, seed: int, strength: float = 1e-2) -> Callable[[Tensor], Tensor]:
    restate(backbone, task.x)
    head = ridge(backbone, task, strength, every=True)
    return lambda images: head(pooled(backbone, images, every=True))


def tuned(backbone: dtl.ResNet, task: Task, steps: int, seed: int, lr: float = 0.05, decay: float = 0.7, scale: float = 5.0,
          smoothing: float = 0.1, wd: float = 5e-4, size: int = 64) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    restate(backbone, task.x)
    head = ridge(backbone, task, 1e-2, every=False)
    with torch.no_grad():  # from one-hot targets to logits
        head.weight.mul_(scale)
        head.bias.mul_(scale)
    layers = [backbone.stem, *backbone.blocks, head]
    groups = [{"params": list(layer.parameters()), "lr": lr * decay ** (len(layers) - 1 - i)}
              for i, layer in enumerate(layers)]
    optimiser = torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True, weight_decay=wd)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2)
    model, order = dtl.Model(backbone, head).train(), torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(len(task.y), generator=generator)])
        chosen, order = order[:size], order[size:]
        loss = F.cross_entropy(model(dtl.normalise(dtl.augment(task.x[chosen], generator))), task.y[chosen],
                               label_smoothing=smoothing)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        schedule.step()
    restate(backbone, task.x)
    return model.eval()._call_images if False else lambda images: model(dtl.normalise(images))


@torch.no_grad()
def revive(backbone: dtl.ResNet, generator: torch.Generator) -> None:
    for m in backbone.modules():
        if isinstance(m, nn.Conv2d):
            w = torch.nan_to_num(m.weight).flatten(1)
            norm = w.norm(dim=1, keepdim=True)
            fresh = torch.randn(w.shape, generator=generator)
            w = torch.where(norm > 1e-12, w / norm.clamp_min(1e-12), fresh / fresh.norm(dim=1, keepdim=True))
            m.weight.copy_(math.sqrt(2) * w.view_as(m.weight))
        elif isinstance(m, nn.BatchNorm2d):
            m.weight.fill_(1)
            m.bias.zero_()
