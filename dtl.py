#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "numpy>=1.26", "cffi>=1.16", "click>=8.1"]
# ///
"""Disposable Transfer Learning (DTL): pretrain, transfer, dispose, piggyback, audit.

Koh, Shon, Lee, Hong, Kim: "Disposable Transfer Learning for Selective Source Task Unlearning", ICCV 2023,
arXiv 2308.09971. A network is pretrained on a source task and transferred to a target task; then the source knowledge
is disposed of with the Gradient Collision (GC) loss, and the target task kept. Whether that worked is measured by
piggyback learning (PL): an attacker retrains the scrubbed model on a subset of the source data, or on new downstream
data, and the accuracy reached is the PL accuracy. Lower is better.

    python dtl.py all                       # no GPU, no download: minutes on a laptop
    python dtl.py all --gpu 0               # CIFAR-100 -> CIFAR-10, ResNet-18
    python dtl.py audit --gpu 0             # the same under a grid of attackers, the worst case first
    python dtl.py --help

The method is all here, in the order of the paper: loss, networks, stages, attackers, rivals, experiment, command line. Beside
it, dtl_data.py reads the data sets, dtl_stats.py (and _gc_native.c) computes statistics of gradients, dtl_store.py keeps
checkpoints and results, dtl_report.py makes tables and figures.

EVIDENCE (python dtl.py audit --preset cifar-small --seeds 0,1,2,3,4 --attacker-seeds 3; experiments/cifar-small)

CIFAR-100 classes 0..79 -> 500 images of CIFAR-10, 16x16 pixels, 8-layer ResNet, CPU, torch 2.13.0; five seeds, mean and 95%
t-interval; about 3.6 core-hours of attacks after two of training. Leak: 0 is a model as good on the target that never saw
the source, 1 the transferred model; worst case: each model's strongest of 5 attackers; fixed: one attacker.

                   target acc.   worst-case leak,                  fixed attacker's leak,
                   change        source subset    downstream       source subset    downstream
    gc-fresh       -0.4 +- 1.0 %     0.03 +- 0.17     0.28 +- 0.25    -0.33 +- 0.08    -0.46 +- 0.16
    gc             -1.3 +- 0.7 %     0.77 +- 0.02     0.79 +- 0.12    -0.22 +- 0.11    -0.11 +- 0.16
    distill-fresh  +0.2 +- 0.9 %     0.40 +- 0.13     0.69 +- 0.22     0.27 +- 0.07     0.22 +- 0.23
    random-labels  +0.3 +- 0.5 %     0.75 +- 0.07     0.85 +- 0.18     0.03 +- 0.04     0.31 +- 0.18
    uniform        -0.2 +- 0.6 %     0.70 +- 0.05     0.86 +- 0.22    -0.23 +- 0.05     0.29 +- 0.15
    bad-teacher    +0.5 +- 0.4 %     0.76 +- 0.03     0.85 +- 0.10     0.14 +- 0.14     0.46 +- 0.14
    neggrad        -0.5 +- 0.5 %     0.76 +- 0.04     0.78 +- 0.08     0.60 +- 0.04     0.77 +- 0.10
    scrub          +0.5 +- 0.7 %     0.83 +- 0.07     0.46 +- 0.22     0.71 +- 0.09     0.79 +- 0.15

"Resists these 5 attackers up to this budget", never "erased". Methods that keep the transferred weights give the knowledge
back; so does gc-fresh in part to four times the steps, 0.46 +- 0.27 on the source subset (experiments/longer, three seeds).

No official code is public and this file was written from the paper's abstract. What the abstract leaves open is marked
OUR READING where it is decided, and listed in the README. No number here is the paper's.
"""

import contextlib
import copy
import functools
import hashlib
import math
import re
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import click
import torch.nn.functional as F
from torch import Tensor, nn

from dtl_data import ARCHIVES, Task, batch, hold_out, load_task, normalise, of_classes, parse_task, read_archive
from dtl_report import PIGGYBACK_TASKS, report, strongest
from dtl_stats import GradientStats, gradient_stats, native_routine  # noqa: F401 (a reader of dtl finds them here)
from dtl_store import DTLError, Log, Results, Watch, begin_run, digest, find_device, load, progress, save, stream, terse_errors

__version__ = "0.1.0"


# ----------------------------------------------------------------------------------------------------------------------
# Configuration: one default per field. The command line is derived from it.


def setting(default: Any, doc: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"doc": doc, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Everything a result depends on besides the seed. The defaults are the preset `cifar`."""

    source: str = setting("cifar100[0:80]", "source task: pretrained on, then to be forgotten")
    target: str = setting("cifar10@50", "target task: transferred to, and to be kept")
    downstream: str = setting("cifar100[80:100]@50", "new downstream data of the attacker's")
    subset_per_class: int = setting(50, "source images a class that the attacker has")
    split: str = setting("test", "measure on test images, or a tenth of the training images", ("test", "validation"))
    image_size: int = setting(0, "pixels a side after area averaging; 0: as stored")
    network: str = setting("resnet18", "backbone", ("resnet18", "resnet8"))

    batch_size: int = setting(128, "images a step, in every stage")
    weight_decay: float = setting(5e-4, "L2 penalty of SGD, in every stage")
    clip: float = setting(5.0, "largest norm of a step's gradient, in every stage")
    pretrain_steps: int = setting(15000, "steps of pretraining")
    pretrain_lr: float = setting(0.1, "its peak learning rate")
    transfer_steps: int = setting(1500, "steps of transfer")
    transfer_lr: float = setting(0.02, "its peak learning rate")

    # OUR READING: the abstract gives neither retain loss, similarity, chunks, head nor weights.
    retain: str = setting("distill", "what keeps the target (a fresh backbone: distill alone)", ("distill", "ce"))
    temperature: float = setting(4.0, "temperature of the distillation")
    retain_weight: float = setting(1.0, "weight of the retain loss")
    similarity: str = setting("dot", "what gradients collide in: inner product or cosine", ("dot", "cos"))
    gc_head: str = setting("fresh", "head of the GC loss: a random one each step, or the stored one", ("fresh", "source"))
    gc_ramp: float = setting(0.5, "share of a disposal into a fresh backbone over which the weight of GC rises from zero")
    chunks: int = setting(4, "chunks of a source batch whose gradients collide")
    chunk_size: int = setting(32, "images a chunk; the rivals get chunks * chunk_size source images a step")
    forget_weights: str = setting(
        "neggrad=1,random-labels=3,uniform=10,bad-teacher=3,scrub=3,gc=30,gc-fresh=30",
        "weight of each method's forget loss, METHOD=NUMBER,...; those not named keep the preset's",
    )
    dispose_steps: int = setting(1500, "steps of a disposal that starts from the transferred weights")
    dispose_lr: float = setting(0.02, "its peak learning rate")
    fresh_steps: int = setting(5000, "steps of a disposal into a fresh backbone, and of `scratch` and `oracle`")
    fresh_lr: float = setting(0.1, "its peak learning rate")

    attack_steps: int = setting(500, "steps of piggyback learning")
    attack_lr: float = setting(0.05, "its peak learning rate")

    def __post_init__(self) -> None:
        for f in fields(self):
            value, option = getattr(self, f.name), "--" + f.name.replace("_", "-")
            if f.metadata["choices"] and value not in f.metadata["choices"]:
                raise DTLError(f"{option}: {value!r} is none of {', '.join(f.metadata['choices'])}")
            if f.type is int and value < (0 if f.name == "image_size" else 2 if f.name == "chunks" else 1):
                raise DTLError(f"{option}: {value} is too small")
            if f.type is float and not (math.isfinite(value) and value >= 0):
                raise DTLError(f"{option}: {value} is not a finite number of at least 0")
            if f.name in ("clip", "temperature") and value == 0 or f.name == "gc_ramp" and value > 1:
                raise DTLError(f"{option}: {value} must be {'at most 1' if value else 'above 0'}")
        weights = parse_weights(Config.forget_weights) | parse_weights(self.forget_weights)
        object.__setattr__(self, "forget_weights", ",".join(f"{m}={w:.12g}" for m, w in sorted(weights.items())))


def parse_weights(text: str) -> dict[str, float]:
    """'gc=30,uniform=1' -> {'gc': 30.0, 'uniform': 1.0}."""
    weights = {}
    for part in filter(None, text.split(",")):
        method, _, number = part.partition("=")
        if method not in METHODS or METHODS[method].forget is None:
            known = ", ".join(m for m in METHODS if METHODS[m].forget is not None)
            raise DTLError(f"--forget-weights: {method!r} is no method with a forget loss; known: {known}")
        try:
            weights[method] = float(number)
        except ValueError:
            weights[method] = math.nan
        if not (math.isfinite(weights[method]) and weights[method] >= 0):
            raise DTLError(f"--forget-weights: {part!r}: the weight must be a finite number of at least 0")
    return weights


PRESETS: dict[str, dict[str, Any]] = {
    "demo": dict(
        source="shapes[0:16]@250", target="shapes[16:24]@30", downstream="shapes[24:32]@30", subset_per_class=30,
        network="resnet8", batch_size=64, pretrain_steps=600, transfer_steps=300, transfer_lr=0.05, dispose_steps=300,
        fresh_steps=600, attack_steps=100, chunks=2, forget_weights="gc=10,gc-fresh=10",
    ),
    "cifar": {},
    "cifar-small": dict(
        image_size=16, network="resnet8", batch_size=64, pretrain_steps=3000, transfer_steps=600, dispose_steps=600,
        fresh_steps=1000, attack_steps=200, chunks=2, forget_weights="gc=60",
    ),
}


# ----------------------------------------------------------------------------------------------------------------------
# The Gradient Collision loss. This block is for copying into other projects: it needs torch and nothing else of
# this file.

# --- copy from here ---
import torch  # noqa: E402 (this block stands alone)


def gradient_collision_loss(losses, params, similarity="dot"):
    """Gradient Collision (GC) loss: how far the gradients of chunks of a source batch point the same way.

        g_i = d losses[i] / d params                                               i = 1..n
        dot:  GC = 2/(n(n-1)) * sum_{i<j} <g_i, g_j>
        cos:  GC = 2/(n(n-1)) * sum_{i<j} <g_i, g_j> / (|g_i| |g_j|)               in [-1/(n-1), 1]

    Minimise it (with a loss that keeps the target task): positive is agreement, negative is collision.

    losses: n >= 2 tensors of shape (), one a chunk, each with its graph. params: the tensors to differentiate by
    (float32 or float64, any shapes). A parameter that a loss does not touch counts as zero gradient; a chunk whose
    gradient is zero has cosine 0 with every other. Returns a tensor of shape (), differentiable by params, of the
    params' dtype. Time about that of `gradient_collision_backward`; memory grows with n, since every chunk's
    second-order graph is alive at once. Sums are float64, which the device must have (CPU, CUDA). Raises ValueError for
    fewer than two losses, a loss that is no finite scalar, no params, params that do not require grad, an unknown
    similarity. Source: Koh et al., arXiv 2308.09971 (ICCV 2023); cosine or inner product is this project's reading.
    BatchNorm and dropout mode are the caller's.

        head = nn.Linear(features, classes)  # random anew at every step: through the trained head it does not unlearn
        losses = [F.cross_entropy(head(backbone(x)), y) for x, y in zip(source_x.chunk(4), source_y.chunk(4))]
        forget = gradient_collision_loss(losses, [*backbone.parameters(), *head.parameters()])
        (retain_loss + 30.0 * forget).backward()
        optimizer.step()
    """
    losses, params = _gc_arguments(losses, params, similarity)
    total, value = [torch.zeros_like(p) for p in params], 0.0
    for i, loss in enumerate(losses):
        grads = _gc_gradient(loss, params, i, create_graph=True)
        if similarity == "cos":
            scale = _gc_inverse_norm(grads)
            grads = [g * scale.to(g.dtype) for g in grads]
        value = value + _gc_inner(grads, total)  # <g_i, g_1 + ... + g_{i-1}>: every pair once, nothing cancels
        total = [t + g for t, g in zip(total, grads)]
    return (value * (2 / (len(losses) * (len(losses) - 1)))).to(params[0].dtype)


def gradient_collision_backward(chunk_losses, params, similarity="dot", weight=1.0):
    """The same loss with the memory of one chunk: adds weight * dGC/dparams to each `.grad` and returns GC.

    chunk_losses: n >= 2 callables without arguments, each computing its chunk's loss, shape (), and giving the same
    value when called again (same augmentation, same dropout mask; BatchNorm in training mode advances its running
    statistics at each call: see `running_statistics_kept`). They are called twice, one after the other; nothing but S
    outlives a chunk. Per chunk a gradient, then a gradient with a Hessian-vector product:

        dGC = sum_i H_i v_i,    dot:  v_i = 2/(n(n-1)) (S - g_i),                        S = sum_i g_i
                                cos:  v_i = 2/(n(n-1)) (S - <u_i, S> u_i) / |g_i|,       S = sum_i u_i,  u_i = g_i/|g_i|

    Over several processes S is the one thing to exchange. Returns a float; errors as `gradient_collision_loss`, and
    ValueError if a chunk's loss changed between the calls. If it raises, `.grad` may hold a part of the sum.

        head = nn.Linear(features, classes)  # random anew at every step
        chunks = [lambda x=x, y=y: F.cross_entropy(head(backbone(x)), y) for x, y in zip(source_x.chunk(8), source_y.chunk(8))]
        retain_loss.backward()
        gradient_collision_backward(chunks, [*backbone.parameters(), *head.parameters()], weight=30.0)
        optimizer.step()
    """
    chunk_losses, params = _gc_arguments(chunk_losses, params, similarity)
    total, value, seen = [torch.zeros_like(p) for p in params], 0.0, []
    for i, chunk_loss in enumerate(chunk_losses):
        loss = chunk_loss()
        grads = _gc_gradient(loss, params, i)
        scale = _gc_inverse_norm(grads) if similarity == "cos" else torch.ones((), dtype=torch.float64)
        value = value + scale * _gc_inner(grads, total)
        for t, g in zip(total, grads):
            t.add_(g * scale.to(g))
        seen.append(loss.item())
        del loss, grads  # or this chunk's graph would live beside the next one's
    pairs = len(chunk_losses) * (len(chunk_losses) - 1) / 2
    for i, chunk_loss in enumerate(chunk_losses):
        loss = chunk_loss()
        if not abs(loss.item() - seen[i]) <= 1e-3 * abs(seen[i]) + 1e-6:
            raise ValueError(f"chunk {i}'s loss was {seen[i]:g}, then {loss.item():g}: it must not change between calls")
        grads = _gc_gradient(loss, params, i, create_graph=True)
        with torch.no_grad():
            if similarity == "cos":
                scale = _gc_inverse_norm(grads)  # 0 for a zero gradient, which so adds nothing
                along = scale * scale * _gc_inner(grads, total)
                vectors = [(t - g * along.to(g)) * (scale * weight / pairs).to(g) for t, g in zip(total, grads)]
            else:
                vectors = [(t - g) * (weight / pairs) for t, g in zip(total, grads)]
        curved = [(g, v) for g, v in zip(grads, vectors) if g.requires_grad]  # the rest has no second derivative
        if curved:
            torch.autograd.backward(*map(list, zip(*curved)), inputs=params)
        del loss, grads, vectors, curved
    return float(value / pairs)


def _gc_arguments(chunks, params, similarity):
    """chunks and params as lists, checked."""
    if similarity not in ("dot", "cos"):
        raise ValueError(f"similarity must be 'dot' or 'cos', not {similarity!r}")
    if isinstance(params, torch.Tensor):
        raise ValueError("params must be a sequence of tensors, not one tensor")
    chunks, params = list(chunks), list(params)
    if len(chunks) < 2:
        raise ValueError(f"gradients collide in pairs: at least 2 chunks are needed, not {len(chunks)}")
    if not params:
        raise ValueError("params is empty: nothing to differentiate by")
    for k, p in enumerate(params):
        if not p.requires_grad:
            raise ValueError(f"params[{k}] of shape {tuple(p.shape)} does not require grad")
    return chunks, params


def _gc_gradient(loss, params, i, create_graph=False):
    """Chunk i's gradient by each of params, zeros where the loss does not touch one."""
    if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
        seen = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise ValueError(f"chunk {i}'s loss must be a tensor of shape (), not {seen}")
    if not torch.isfinite(loss):
        raise ValueError(f"chunk {i}'s loss is {loss.item()}, not a finite number")
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in params]
    grads = torch.autograd.grad(loss, params, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params)]


def _gc_inner(a, b):
    """<a, b> over lists of tensors, added up in float64."""
    return sum(torch.sum(x * y, dtype=torch.float64) for x, y in zip(a, b))


def _gc_inverse_norm(grads):
    """1/|g| in float64, and 0, with a derivative of 0, where g is zero."""
    square = _gc_inner(grads, grads)
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).rsqrt(), 0.0)


# --- to here ---

# ----------------------------------------------------------------------------------------------------------------------
# Networks


class Block(nn.Module):
    """He et al.'s basic residual block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if (inputs, stride) == (outputs, 1) else nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Backbone with the 3x3 stem for small images: (B, 3, H, W) float -> (B, features)."""

    def __init__(self, blocks: Sequence[int], width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        layers, inputs = [], width
        for stage, count in enumerate(blocks):
            outputs = width << stage
            for k in range(count):
                layers.append(Block(inputs, outputs, 2 if stage and not k else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*layers)
        self.features = inputs

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x)).mean((2, 3))


NETWORKS = {"resnet18": ((2, 2, 2, 2), 64), "resnet8": ((1, 1, 1), 16)}


class Model(nn.Module):
    """A backbone and a linear head."""

    def __init__(self, backbone: ResNet, head: nn.Linear) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def new_backbone(network: str, seed: int, device: torch.device) -> ResNet:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return ResNet(*NETWORKS[network]).to(device)


def new_head(features: int, classes: int, generator: torch.Generator) -> nn.Linear:
    """nn.Linear's own initialisation, from `generator`, on its device."""
    head, bound = nn.utils.skip_init(nn.Linear, features, classes, device=generator.device), features**-0.5
    with torch.no_grad():
        head.weight.uniform_(-bound, bound, generator=generator)
        head.bias.uniform_(-bound, bound, generator=generator)
    return head


@contextlib.contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm in training mode normalises by the batch and leaves its running statistics alone. OUR READING:
    source images pass only so, and the scrubbed model's statistics come from target data."""
    norms = [(m, m.track_running_stats) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    try:
        for m, _ in norms:
            m.track_running_stats = False
        yield
    finally:
        for m, tracked in norms:
            m.track_running_stats = tracked


@torch.no_grad()
def accuracy(model: Model, task: Task) -> float:
    """Test accuracy, 0..1."""
    model.eval()
    hits = [model(normalise(x)).argmax(1) == y for x, y in zip(task.x_test.split(500), task.y_test.split(500))]
    return torch.cat(hits).double().mean().item()


# ----------------------------------------------------------------------------------------------------------------------
# The stages, in the paper's order


INSPECT_EVERY = 100  # steps of disposal between two looks at how the source gradients collide
INSPECT_ATTACK_AT = (0, 1, 10, 100)  # and the attacker's steps at which its own are looked at


@dataclass(frozen=True)
class Schedule:
    """SGD with Nesterov momentum 0.9 under a one-cycle learning rate."""

    steps: int
    lr: float  # peak: reached after a quarter of the steps
    batch_size: int
    weight_decay: float
    clip: float  # largest gradient norm

    def lr_at(self, step: int) -> float:
        done = (step + 1) / (self.steps + 1)
        return self.lr * (4 * done if done < 0.25 else 0.5 * (1 + math.cos(math.pi * (done - 0.25) / 0.75)))


def optimise(
    model: nn.Module, loss_terms: Callable[[int, torch.Generator], dict[str, float]], schedule: Schedule, seed: int,
    watch: Watch, attacker: "Attacker | None" = None,
) -> None:
    """Run a stage. `loss_terms(step, generator)` backpropagates and returns the loss's terms for the log. The
    generator is seeded anew by (seed, step): a stage resumes from its step number, parameters and momentum alone.
    An attacker of the audit may bring another optimiser and a larger first step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if attacker and attacker.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, schedule.lr, weight_decay=schedule.weight_decay)
    else:
        optimizer = torch.optim.SGD(parameters, schedule.lr, momentum=0.9, nesterov=True,
                                    weight_decay=schedule.weight_decay)
    generator = torch.Generator(parameters[0].device)
    first = 0
    if saved := watch.resume():
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    model.train()
    with watch.bar(first, schedule.steps) as advance:
        for step in range(first, schedule.steps):
            jump = attacker is not None and step == 0 and attacker.first_step
            optimizer.param_groups[0]["lr"] = jump * schedule.lr if jump else schedule.lr_at(step)
            optimizer.zero_grad()
            try:
                terms = loss_terms(step, generator.manual_seed(stream(seed, step)))
            except ValueError as error:  # the GC loss looks for itself whether it is finite
                raise watch.error(step, schedule.steps, str(error)) from error
            terms["gradient"] = nn.utils.clip_grad_norm_(parameters, schedule.clip).item()
            if not all(map(math.isfinite, terms.values())):
                raise watch.error(step, schedule.steps, terms)
            optimizer.step()
            advance(1)
            watch.step(step + 1, schedule.steps, terms,
                       lambda: dict(model=model.state_dict(), optimizer=optimizer.state_dict()))
    model.eval()


def fit(model: "Model", task: Task, schedule: Schedule, seed: int, watch: Watch, inspect_at: Sequence[int] = (),
        attacker: "Attacker | None" = None) -> None:
    """Cross entropy over all that is not frozen. The statistics of chunk gradients are noted at the steps `inspect_at`, in
    an audit with the test accuracy so far."""

    def loss_terms(step: int, generator: torch.Generator) -> dict[str, float]:
        x, y = batch(task, schedule.batch_size, step, seed, generator)
        if step in inspect_at:
            reached = {"accuracy": accuracy(model, task)} if attacker else {}
            watch.note(step, reached | chunk_statistics(model.train(), x, y))
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return {"loss": loss.item()}

    optimise(model, loss_terms, schedule, seed, watch, attacker)


def chunk_statistics(model: "Model", x: Tensor, y: Tensor, chunks: int = 4) -> dict[str, float]:
    """What the log keeps of the gradients of cross entropy on `chunks` parts of a batch: x (B, 3, H, W), y (B,)."""
    with running_statistics_kept(model):
        gradients = [torch.autograd.grad(F.cross_entropy(model(part), labels), list(model.parameters()))
                     for part, labels in zip(*(t.tensor_split(min(chunks, len(x))) for t in (x, y)))]
    stats = gradient_stats(gradients)
    return {name: getattr(stats, name) for name in ("mean_cosine", "mean_dot", "collision_rate")}


def learn(backbone: ResNet, task: Task, schedule: Schedule, seed: int, watch: Watch,
          inspect_at: Sequence[int] = ()) -> Model:
    """A new head on the backbone, then the whole network trained (the backbone is changed in place)."""
    head = new_head(backbone.features, task.classes, torch.Generator(task.x.device).manual_seed(stream(seed, "head")))
    model = Model(backbone, head)
    fit(model, task, schedule, seed, watch, inspect_at)
    return model


def pretrain(source: Task, network: str, schedule: Schedule, seed: int, watch: Watch) -> Model:
    """Stage 1: random backbone, source task. (On the target task it makes the references scratch and oracle.)"""
    return learn(new_backbone(network, stream(seed, "backbone"), source.x.device), source, schedule, seed, watch)


def transfer(pretrained: Model, target: Task, schedule: Schedule, seed: int, watch: Watch) -> Model:
    """Stage 2: the pretrained backbone, a new head, the whole network on the target task."""
    return learn(copy.deepcopy(pretrained.backbone), target, schedule, seed, watch)


def dispose(
    transferred: Model, source_head: nn.Linear, source: Task, target: Task, method: str, schedule: Schedule, seed: int,
    watch: Watch, *, network: str, retain: str = "distill", temperature: float = 4.0, retain_weight: float = 1.0,
    forget_weight: float = 30.0, similarity: str = "dot", gc_head: str = "fresh", chunks: int = 4, chunk_size: int = 32,
    gc_ramp: float = 0.0,
) -> Model:
    """Stage 3: minimise retain_weight * L_retain(target) + forget_weight * L_forget(source) from the transferred
    model, or from a fresh backbone if the method says so. Returns the scrubbed model; its arguments stay as they are.
    """
    forget, fresh = METHODS[method].forget, METHODS[method].fresh
    device = target.x.device
    teacher, original_head = frozen(transferred), frozen(source_head)
    stranger = frozen(Model(new_backbone(network, stream(seed, "stranger"), device), copy.deepcopy(source_head)))
    student = copy.deepcopy(transferred)
    if fresh:
        generator = torch.Generator(device).manual_seed(stream(seed, "student head"))
        student = Model(new_backbone(network, stream(seed, "student"), device),
                        new_head(transferred.backbone.features, target.classes, generator))

    def loss_terms(step: int, generator: torch.Generator) -> dict[str, float]:
        x, y = batch(target, schedule.batch_size, step, seed, generator)
        labels = retain == "ce" and not fresh
        loss = F.cross_entropy(student(x), y) if labels else distillation(student(x), teacher(x), temperature)
        (retain_weight * loss).backward()
        terms = {"retain": loss.item()}
        if (forget is None and not fresh) or not math.isfinite(terms["retain"]):  # the latter stops the stage
            return terms
        x, y = batch(source, chunks * chunk_size, step, stream(seed, "source"), generator)
        with running_statistics_kept(student):
            if fresh:  # source images as unlabelled ones: more of them than there are target images
                loss = distillation(student(x), teacher(x), temperature)
                (retain_weight * loss).backward()
                terms["distill"] = loss.item()
            if forget is gradient_collision:
                head = new_head(student.backbone.features, source.classes, generator)
                head = head if gc_head == "fresh" else copy.deepcopy(source_head)
                weight = forget_weight * min(1.0, (step + 1) / (gc_ramp * schedule.steps) if gc_ramp else 1.0)
                terms["forget"] = gradient_collision(student.backbone, head, x, y, similarity, chunks, weight)
            elif forget is not None:
                logits = original_head(student.backbone(x))
                transferred_logits = functools.partial(Model(teacher.backbone, original_head), x)
                loss = forget(logits, y, transferred_logits, functools.partial(stranger, x), generator)
                (forget_weight * loss).backward()
                terms["forget"] = loss.item()
            if step % INSPECT_EVERY == 0:
                head = new_head(student.backbone.features, source.classes, generator)
                watch.note(step, chunk_statistics(Model(student.backbone, head), x, y))
        return terms

    optimise(student, loss_terms, schedule, seed, watch)
    return student


def piggyback(backbone: ResNet, task: Task, schedule: Schedule, seed: int, watch: Watch) -> float:
    """Stage 4, the attacker's: a new head, the whole network on a piggyback task. Returns the PL accuracy, 0..1. The
    attacker is fixed: of one seed, every model gets the same head, batches and schedule."""
    return accuracy(learn(copy.deepcopy(backbone), task, schedule, seed, watch, INSPECT_ATTACK_AT), task)


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Hinton et al.: T^2 * KL(teacher || student) of logits (B, classes) at temperature T; the mean over the batch."""
    teacher, student = (F.log_softmax(logits / temperature, 1) for logits in (teacher, student))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def frozen(module: nn.Module) -> nn.Module:
    """A copy for reading: evaluation mode, no gradients to its parameters."""
    return copy.deepcopy(module).eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# The audit: attackers that try to get the source knowledge back. BatchNorm is in training mode in all of them, so its
# statistics are re-estimated on the attacker's images, also where the head alone is trained.


@dataclass(frozen=True)
class Attacker:
    """One way of piggyback learning; as it stands, the fixed attacker's."""

    optimizer: str = "sgd"  # or adamw
    lr: float = 0.0  # peak learning rate; 0: --attack-lr
    times: int = 1  # as many steps as --attack-steps
    fraction: float = 1.0  # of the piggyback training images
    scope: str = "all"  # what is trained: all, head, or head-then-all, half the steps each
    batch: int = 1  # times --batch-size
    first_step: float = 0.0  # the first step at this times the peak learning rate; 0: as the schedule says
    noise: float = 0.0  # first added to the backbone's weights, in standard deviations of each tensor
    other_half: bool = False  # trained on half of the classes, then probed: a head on the frozen backbone for the others

    def __str__(self) -> str:
        given = [f"{f.name.replace('_', ' ')} {getattr(self, f.name)}" for f in fields(self)[1:]
                 if getattr(self, f.name) != f.default]
        return ", ".join([self.optimizer, *given]) if given or self.optimizer != "sgd" else "fixed"


SMALL_AUDIT = (
    Attacker(),
    Attacker(lr=0.1, times=5),
    Attacker("adamw", 0.002),
    Attacker(lr=0.1, scope="head"),
    Attacker(lr=0.1, noise=0.2, first_step=5.0),
)
AUDITS = {  # budget: (grid, seeds of the strongest attacker)
    "small": (SMALL_AUDIT, 1),
    "full": ((
        *SMALL_AUDIT,
        *(Attacker("sgd", lr, times) for lr in (0.01, 0.03, 0.1, 0.3) for times in (1, 5, 20) if (lr, times) != (0.1, 5)),
        *(Attacker("adamw", lr, times) for lr in (0.0003, 0.001, 0.003) for times in (1, 5, 20)),
        Attacker(lr=0.1, times=5, fraction=0.5),
        Attacker(lr=0.1, times=5, scope="head"),
        Attacker(lr=0.1, times=5, scope="head-then-all"),
        Attacker(lr=0.1, times=5, batch=8),
        Attacker(lr=0.1, times=5, first_step=10.0),
        Attacker(lr=0.1, times=5, noise=0.5),
        Attacker(lr=0.1, times=5, other_half=True),
    ), 3),
}


def attack(backbone: ResNet, task: Task, attacker: Attacker, schedule: Schedule, seed: int, watch: Watch,
           trace: Sequence[int] = ()) -> tuple[float, float]:
    """An audit's piggyback learning. Returns the accuracy on a fifth of the training images, which is held out of the
    training, and the test accuracy, both 0..1; with `other_half`, on the classes not trained on. Test accuracy and the
    statistics of chunk gradients are noted at the steps `trace`."""
    generator = torch.Generator(task.x.device).manual_seed(stream(seed, "attack"))
    model = Model(copy.deepcopy(backbone), new_head(backbone.features, task.classes, generator))
    if attacker.noise:
        with torch.no_grad():
            for p in model.backbone.parameters():
                if p.dim() > 1:
                    p.add_(torch.randn(p.shape, generator=generator, device=p.device) * p.std() * attacker.noise)
    known, judged = hold_out(task, attacker.fraction)
    phases = [(attacker.scope, known, schedule)]
    if attacker.scope == "head-then-all":
        half = replace(schedule, steps=max(1, schedule.steps // 2))
        phases = [("head", known, half), ("all", known, half)]
    if attacker.other_half:
        phases = [("all", of_classes(known, range(0, task.classes, 2)), schedule),
                  ("head", of_classes(known, range(1, task.classes, 2)), schedule)]
        judged, task = (of_classes(t, range(1, task.classes, 2)) for t in (judged, task))
    for k, (scope, data, phase) in enumerate(phases):
        model.backbone.requires_grad_(scope == "all")
        fit(model, data, phase, stream(seed, "attack", k), watch, trace if scope == "all" else (), attacker)
    return accuracy(model, judged), accuracy(model, task)


# ----------------------------------------------------------------------------------------------------------------------
# Disposal methods. A forget loss sees the student's logits (B, source classes) on source images through the stored
# source head (frozen: a head that could be trained would do the forgetting itself), their labels (B,), and how to get
# the logits of the transferred model and of a random one. OUR READING of each rival is this table; the GC loss goes
# through a head of its own.


def gradient_collision(backbone, head, x, y, similarity, chunks, weight) -> float:
    """GC over the backbone and the head in use: adds weight * dGC to the backbone's gradients, returns GC."""
    losses = [functools.partial(lambda x, y: F.cross_entropy(head(backbone(x)), y), *part)
              for part in zip(x.tensor_split(chunks), y.tensor_split(chunks))]
    return gradient_collision_backward(losses, [*backbone.parameters(), *head.parameters()], similarity, weight)


def negative_gradient(logits, labels, transferred, stranger, generator) -> Tensor:
    """Gradient ascent; an image whose loss has reached that of guessing counts no more, or it would run away."""
    return -F.cross_entropy(logits, labels, reduction="none").clamp(max=math.log(logits.shape[1])).mean()


def random_labels(logits, labels, transferred, stranger, generator) -> Tensor:
    return F.cross_entropy(logits, torch.randint(0, logits.shape[1], labels.shape, generator=generator,
                                                 device=labels.device))


def uniform_labels(logits, labels, transferred, stranger, generator) -> Tensor:
    """KL(uniform || student)."""
    return -F.log_softmax(logits, 1).mean() - math.log(logits.shape[1])


def bad_teacher(logits, labels, transferred, stranger, generator) -> Tensor:
    """Chundawat et al. 2023: KL to a randomly initialised teacher."""
    return distillation(logits, stranger(), 1.0)


def scrub(logits, labels, transferred, stranger, generator) -> Tensor:
    """Kurmanji et al. 2023: away from the transferred model's answers, bounded like the negative gradient."""
    kl = F.kl_div(F.log_softmax(logits, 1), F.log_softmax(transferred(), 1), reduction="none", log_target=True).sum(1)
    return -kl.clamp(max=math.log(logits.shape[1])).mean()


@dataclass(frozen=True)
class Method:
    forget: Callable | None  # None: the retain loss alone
    fresh: bool = False  # into a fresh backbone, by distillation on target and source images


METHODS = {
    "finetune": Method(None),
    "neggrad": Method(negative_gradient),
    "random-labels": Method(random_labels),
    "uniform": Method(uniform_labels),
    "bad-teacher": Method(bad_teacher),
    "scrub": Method(scrub),
    "gc": Method(gradient_collision),
    "distill-fresh": Method(None, fresh=True),
    "gc-fresh": Method(gradient_collision, fresh=True),
}
REFERENCES = ("scratch", "random", "oracle", "pretrained", "transferred")
REPORTED = (*REFERENCES, *(f"disposed:{m}" for m in METHODS))  # the rows of every table, in order


# ----------------------------------------------------------------------------------------------------------------------
# The experiment: every model by name, made once, kept under everything it depends on


RECIPE = 1  # raised when a change of the code changes what a stage computes: older checkpoints then no longer fit


class Experiment:
    """One seed of one config."""

    def __init__(self, config: Config, seed: int, device: torch.device, out: Path, data_dir: Path,
                 save_every: float = 30.0) -> None:
        self.config, self.seed, self.device, self.out, self.data_dir = config, seed, device, out, data_dir
        self.save_every, self.results = save_every, Results(out)
        own = {Path(parse_task(task)["set"]) for task in (config.source, config.target, config.downstream)}
        files = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(own) if path.is_file()]  # a user's .npz
        self.environment = [RECIPE, torch.__version__, device.type]
        self.config_hash = digest([asdict(config), *self.environment, *files])[:10]
        self.log, self.models = Log(out, self.config_hash), {}  # models by name

    @functools.cache
    def task(self, name: str) -> Task:
        """`source`, `target`, `source-subset`, `downstream`, or `target@N` with N images a class."""
        c = self.config
        spec = {"source": c.source, "target": c.target, "downstream": c.downstream}.get(name)
        if name == "source-subset":
            spec = f"{c.source.split('@')[0]}@{c.subset_per_class}"
        elif name.startswith("target@"):
            spec = f"{c.target.split('@')[0]}@{name.split('@')[1]}"
        return load_task(spec, self.seed, self.data_dir, self.device, c.split, c.image_size)

    def check_tasks(self) -> dict[str, Task]:
        tasks = {name: self.task(name) for name in ("source", "target", "source-subset", "downstream")}
        if len(tasks["source-subset"].y) > len(tasks["source"].y):
            raise DTLError(f"--subset-per-class: {self.config.subset_per_class} is more than {self.config.source} has")
        sizes = {name: tuple(task.x.shape[2:]) for name, task in tasks.items()}
        if len(set(sizes.values())) > 1:
            raise DTLError(f"the tasks' images differ in size ({sizes}): give --image-size N to bring them to one")
        return tasks

    def schedule(self, steps: int, lr: float, batch_size: int | None = None) -> Schedule:
        return Schedule(steps, lr, batch_size or self.config.batch_size, self.config.weight_decay, self.config.clip)

    def recipe(self, name: str) -> tuple[list, Callable[[Watch], Model | float]]:
        """(what the stage's result depends on, how to make it). Nothing is loaded or trained until it is called."""
        c, seed = self.config, self.seed
        if name == "random":
            return [], lambda watch: Model(new_backbone(c.network, stream(seed, "random"), self.device),
                                           new_head(1, 2, torch.Generator(self.device)))
        if name == "pretrained":
            task, schedule = self.task("source"), self.schedule(c.pretrain_steps, c.pretrain_lr)
            return [task.fingerprint, schedule], functools.partial(
                pretrain, task, c.network, schedule, stream(seed, "pretrain"))
        if name == "scratch" or name.startswith("target@"):
            task, schedule = self.task(name.replace("scratch", "target")), self.schedule(c.fresh_steps, c.fresh_lr)
            return [task.fingerprint, schedule], functools.partial(
                pretrain, task, c.network, schedule, stream(seed, "scratch"))
        if name == "transferred":
            task, schedule = self.task("target"), self.schedule(c.transfer_steps, c.transfer_lr)
            return [self.key("pretrained"), task.fingerprint, schedule], lambda watch: transfer(
                self.model("pretrained"), task, schedule, stream(seed, "transfer"), watch)
        if name.startswith("disposed:"):
            method = name.removeprefix("disposed:")
            forget, fresh = METHODS[method].forget, METHODS[method].fresh
            schedule = self.schedule(*((c.fresh_steps, c.fresh_lr) if fresh else (c.dispose_steps, c.dispose_lr)))
            options = dict(network=c.network, temperature=c.temperature, retain_weight=c.retain_weight)
            options |= {} if fresh else dict(retain=c.retain)
            options |= dict(chunks=c.chunks, chunk_size=c.chunk_size) if forget or fresh else {}
            options |= dict(forget_weight=parse_weights(c.forget_weights)[method]) if forget else {}
            options |= dict(similarity=c.similarity, gc_head=c.gc_head) if forget is gradient_collision else {}
            options |= dict(gc_ramp=c.gc_ramp) if forget is gradient_collision and fresh else {}
            return [self.key("transferred"), schedule, options], lambda watch: dispose(
                self.model("transferred"), self.model("pretrained").head, self.task("source"), self.task("target"), method,
                schedule, stream(seed, "dispose"), watch, **options)
        victim, task = name.removeprefix("piggyback ").rsplit(" ", 1)
        schedule = self.schedule(c.attack_steps, c.attack_lr)
        return [self.key(victim), self.task(task).fingerprint, schedule], lambda watch: piggyback(
            self.model(victim).backbone, self.task(task), schedule, stream(seed, "piggyback", task), watch)

    @functools.cache
    def key(self, name: str) -> str:
        depends = [asdict(d) if isinstance(d, Schedule) else d for d in self.recipe(name)[0]]
        return digest([*self.environment, name, self.seed, self.config.network, depends])

    def stage(self, name: str) -> Any:
        """The result of a stage: from its checkpoint, or made now and kept."""
        path = self.out / "checkpoints" / f"{re.sub('[^a-z0-9@-]+', '-', name)}-seed{self.seed}-{self.key(name)[:12]}.pt"
        state = load(path, self.device)
        make = self.recipe(name)[1]
        if state is None:
            watch = Watch(f"seed {self.seed} {name}", path, self.device, self.save_every, self.log)
            result = make(watch)
            if isinstance(result, Model):
                state = {"backbone": result.backbone.state_dict(), "head": result.head.state_dict()}
            else:
                state = {"value": result}
            state["notes"] = watch.notes
            save(path, state)
            watch.path.unlink(missing_ok=True)
        return state

    def model(self, name: str) -> Model:
        """`random`, `pretrained`, `scratch`, `target@N`, `transferred`, `disposed:METHOD`."""
        if name not in self.models:
            state = self.stage(name)
            classes, features = state["head"]["weight"].shape
            model = Model(new_backbone(self.config.network, 0, self.device), nn.Linear(features, classes, device=self.device))
            model.backbone.load_state_dict(state["backbone"])
            model.head.load_state_dict(state["head"])
            self.models[name] = model.eval()
        return self.models[name]

    def oracle(self) -> str | None:
        """The model `target@N` of least N (growing by quarters) that reaches the target accuracy of `transferred` from
        target data alone; None if the set has too few images. Zero of the normalised leak."""
        aim = self.measure("transferred", "target_accuracy")
        if self.measure("scratch", "target_accuracy") >= aim:
            return "scratch"
        n = int(parse_task(self.config.target)["per_class"] or 0)
        while n:
            n = math.ceil(n * 1.25)
            try:
                self.task(f"target@{n}")
            except DTLError:  # the set has no more
                return None
            if self.measure(f"target@{n}", "target_accuracy") >= aim:
                return f"target@{n}"

    def measure(self, model: str, metric: str, task: str | None = None) -> float | None:
        """A measurement, from results.jsonl if it is there."""
        name = self.oracle() if model == "oracle" else model
        if name is None:
            return None
        if metric == "pl_accuracy":
            depends = [self.key(f"piggyback {name} {task}")]
        else:
            depends = [self.key(name), self.task(metric.split("_")[0]).fingerprint]
            depends += [self.key("pretrained")] if metric == "source_accuracy" else []
        record = self.record(model, metric, task, depends)
        if known := self.results.known(record):
            return known["value"]
        notes = []
        if metric == "pl_accuracy":
            state = self.stage(f"piggyback {name} {task}")
            value, notes = state["value"], state["notes"]
        elif metric == "target_accuracy":
            value = accuracy(self.model(name), self.task("target"))
        else:  # source_accuracy, with the stored source head
            value = accuracy(Model(self.model(name).backbone, self.model("pretrained").head), self.task("source"))
        self.results.add(notes, record | {"value": value} | ({"is": name} if model == "oracle" else {}))
        return value

    def attempt(self, model: str, task: str, attacker: Attacker, attacker_seed: int) -> dict:
        """One attacker's try, from results.jsonl if it is there; one that failed is kept with `value` null."""
        name = self.oracle() if model == "oracle" else model
        schedule = self.schedule(attacker.times * self.config.attack_steps, attacker.lr or self.config.attack_lr,
                                 attacker.batch * self.config.batch_size)
        depends = [self.key(name), self.task(task).fingerprint, asdict(attacker), asdict(schedule), attacker_seed]
        record = self.record(model, "audit_pl_accuracy", task, depends)
        record |= dict(attacker=str(attacker), attacker_seed=attacker_seed)
        known = self.results.known(record)
        if known is None:
            watch, began = Watch(f"seed {self.seed} audit {model} {task}", device=self.device), time.monotonic()
            trace = (0, 1, 10, 30, 100, 300, 1000, 3000) if attacker.times > 1 and not attacker_seed else ()
            known, backbone = record | {"value": None, "valid": None, "fields": asdict(attacker)}, self.model(name).backbone
            try:
                known["valid"], known["value"] = attack(backbone, self.task(task), attacker, schedule,
                                                        stream(self.seed, "audit", task, attacker_seed), watch, trace)
            except DTLError as error:
                known["failed"] = str(error)
            known["seconds"] = round(time.monotonic() - began, 1)
            self.results.add(watch.notes, known)
        return known

    def record(self, model: str, metric: str, task: str | None, depends: list) -> dict:
        """A line of results.jsonl, but for its value. The key is that of the very weights and images measured, should a
        file of that name have changed."""
        return dict(seed=self.seed, model=model, metric=metric, task=task, config=self.config_hash, key=digest(depends)[:12])


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def parse_list(context: click.Context, option: click.Parameter, text: str) -> list:
    """--methods gc,uniform and --seeds 0,1,2."""
    items = [t.strip() for t in text.split(",")]
    if option.name == "methods":
        if unknown := [m for m in items if m not in METHODS]:
            raise click.BadParameter(f"no method {', '.join(map(repr, unknown))}; known: {', '.join(METHODS)}")
        return items
    if not all(t.isdecimal() for t in items) or len(set(map(int, items))) < len(items):
        raise click.BadParameter(f"{text!r}: seeds are whole numbers of at least 0, each once, as in 0,1,2")
    return [int(t) for t in items]


out_option = click.option("--out", type=click.Path(path_type=Path), default="runs", envvar="DTL_OUT")
data_dir_option = click.option("--data-dir", type=click.Path(path_type=Path), default="data", envvar="DTL_DATA_DIR")


def experiment_options(command: Callable) -> Callable:
    for f in reversed(fields(Config)):
        kind = click.Choice(f.metadata["choices"]) if f.metadata["choices"] else f.type
        doc = f"{f.metadata['doc']} [{f.default}]."
        command = click.option("--" + f.name.replace("_", "-"), f.name, type=kind, help=doc)(command)
    for option in (
        click.option("--save-every", default=30.0, help="Seconds between saves within a stage."),
        data_dir_option, out_option,
        click.option("--methods", default=",".join(METHODS), callback=parse_list, help="Disposal methods."),
        click.option("--seeds", default="0", callback=parse_list, help="Seeds, as in 0,1,2."),
        click.option("--gpu", type=int, help="CUDA device; the CPU if left out."),
        click.option("--preset", type=click.Choice(list(PRESETS)),
                     help="Default: demo, or cifar with --gpu. In brackets: cifar's settings."),
    ):
        command = option(command)
    return command


@click.group(context_settings={"show_default": True, "max_content_width": 120})
@click.version_option(__version__)
def main() -> None:
    """Disposable Transfer Learning: pretrain, transfer, dispose, piggyback."""


STAGES = {
    "pretrain": "Stage 1: train a network on the source task.",
    "transfer": "Stage 2: train its backbone, with a new head, on the target task.",
    "dispose": "Stage 3: unlearn the source knowledge, keep the target task.",
    "piggyback": "Stage 4: attack the scrubbed models; their PL accuracy.",
    "all": "All four stages, the references, the report.",
}


def run(stage: str, preset: str | None, gpu: int | None, seeds: list[int], methods: list[str], out: Path, data_dir: Path,
        save_every: float, budget: str = "small", attacker_seeds: int | None = None, **given: Any) -> None:
    preset = preset or ("demo" if gpu is None else "cifar")
    settings = PRESETS[preset] | {k: v for k, v in given.items() if v is not None}
    if given["forget_weights"]:
        settings["forget_weights"] = PRESETS[preset].get("forget_weights", "") + "," + given["forget_weights"]
    config, device = Config(**settings), find_device(gpu)
    experiments = [Experiment(config, seed, device, out, data_dir, save_every) for seed in seeds]
    models = {"pretrain": ["pretrained"], "transfer": ["transferred"]}.get(stage, [f"disposed:{m}" for m in methods])
    if stage == "piggyback":
        models = ["transferred", *models]
    elif stage in ("all", "audit"):
        models = [*REFERENCES, *models]

    tasks = {experiment.seed: experiment.check_tasks() for experiment in experiments}
    name = experiments[0].config_hash
    path = begin_run(out, name, preset, seeds, methods, asdict(config), device, native_routine()[1], tasks)
    for experiment in experiments:
        for model in models:
            if model not in ("random", "pretrained"):
                experiment.measure(model, "target_accuracy")
            if model in ("pretrained", "transferred") or model.startswith("disposed:"):
                experiment.measure(model, "source_accuracy")
            for task in PIGGYBACK_TASKS if stage in ("piggyback", "all", "audit") else ():
                experiment.measure(model, "pl_accuracy", task)
        experiment.models.clear()
    if stage == "audit":  # after all models are there: what is left to do is known, and a first report stands
        grid, seeds_of_strongest = AUDITS[budget]
        audit(experiments, [m for m in models if m != "pretrained"], grid, attacker_seeds or seeds_of_strongest)
    click.echo("\n" + report(out, name, REPORTED))
    click.echo(f"wrote {out / 'report.md'}, {out / 'results.jsonl'}, {path}")


def audit(experiments: list[Experiment], models: list[str], grid: Sequence[Attacker], attacker_seeds: int) -> None:
    """Every attacker of the grid on every model, then further seeds of the one that is strongest on it."""
    names = [(e, m, t) for e in experiments for m in models for t in PIGGYBACK_TASKS if m != "oracle" or e.oracle()]
    attempts = len(names) * (len(grid) + attacker_seeds - 1)
    click.echo(f"\naudit: {len(grid)} attackers, then {attacker_seeds - 1} more seeds of the strongest, on {len(models)} "
               f"models and both piggyback tasks: {attempts} attempts")
    for e, _, task in names:
        hold_out(e.task(task), 1.0)  # too small a task is the user's mistake, not a failed attempt
    with progress("audit", attempts) as advance:
        for experiment, model, task in names:
            for attacker in grid:
                advance(f"seed {experiment.seed} {model} {task}, {attacker}")
                experiment.attempt(model, task, attacker, 0)
        chosen = strongest(Results(experiments[0].out).read(experiments[0].config_hash))
        for experiment, model, task in names:
            for seed in range(1, attacker_seeds):
                attacker = Attacker(**chosen[model, task]["fields"])
                advance(f"seed {experiment.seed} {model} {task}, {attacker}, its seed {seed}")
                experiment.attempt(model, task, attacker, seed)


for _stage, _help in STAGES.items():
    main.command(_stage, help=_help)(experiment_options(terse_errors(functools.partial(run, _stage))))

main.command("audit", help="All models under a grid of attackers: the worst case of piggyback learning.")(
    click.option("--budget", type=click.Choice(list(AUDITS)), default="small", help="Which grid of attackers.")(
        click.option("--attacker-seeds", type=click.IntRange(1), help="Seeds of the strongest; 1 if small, 3 if full.")(
            experiment_options(terse_errors(functools.partial(run, "audit"))))))


@main.command("report", help="The tables again, from what is in --out.")
@out_option
@click.option("--config", help="Hash of the run to report; the last one if left out.")
@terse_errors
def report_command(out: Path, config: str | None) -> None:
    click.echo(report(out, config, REPORTED))


@main.command("data", help="Fetch and verify CIFAR-10 and CIFAR-100.")
@data_dir_option
@terse_errors
def data_command(data_dir: Path) -> None:
    for name in ARCHIVES:
        x, y, x_test, y_test = read_archive(name, data_dir)
        click.echo(f"{name}: {len(y)} training and {len(y_test)} test images in {data_dir / ARCHIVES[name][2]}")


@main.command(help="Time and memory of the GC loss beside a plain SGD step (or --native: of the C routine beside torch).")
@click.option("--gpu", type=int, help="CUDA device; the CPU if left out.")
@click.option("--network", type=click.Choice(list(NETWORKS)), default="resnet8")
@click.option("--native", is_flag=True, help="The statistics of chunk gradients instead.")
@terse_errors
def bench(gpu: int | None, network: str, native: bool) -> None:
    import dtl_bench

    if native and (gpu is not None or native_routine()[0] is None):
        raise DTLError(f"--native runs on the CPU and needs the C routine; here: --gpu {gpu}, {native_routine()[1]}")
    dtl_bench.native() if native else dtl_bench.loss(network, find_device(gpu))


if __name__ == "__main__":
    main(prog_name="dtl.py")
