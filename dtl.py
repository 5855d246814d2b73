#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "numpy>=1.26", "click==8.5.1"]
# ///
"""Disposable Transfer Learning (DTL) in one file: pretrain, transfer, dispose, piggyback.

Koh, Shon, Lee, Hong, Kim: "Disposable Transfer Learning for Selective Source Task Unlearning",
ICCV 2023, arXiv 2308.09971. A network is pretrained on a source task and transferred to a target
task; then the source knowledge is disposed of with the Gradient Collision (GC) loss, and the target
task kept. Whether that worked is measured by piggyback learning (PL): an attacker retrains the
scrubbed model on part of the source data, or on new downstream data, and the test accuracy reached
is the PL accuracy. Lower is better.

    python dtl.py all                    # no GPU, no download: a minute or two
    python dtl.py all --attackers all    # three attackers, the strongest on each model counts
    python dtl.py all --gpu 0            # CIFAR-100 -> CIFAR-10, ResNet-18

From CIFAR-100 to CIFAR-10 at 16 pixels GC brings a short attack on the source from 42.8% to 20.4%,
and a stronger one to 39.1%; a model that never saw the source gives them 25.1% and 35.8% (five
seeds; experiments/README.md).

No official code is public. What the abstract leaves open is OUR READING; the README lists it.
"""

import copy
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import click
import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

__version__ = "0.4.0"


# ---- The Gradient Collision loss, to copy: it needs torch alone ----

# --- copy from here ---
import contextlib
import math
import warnings

import torch


def gradient_collision_loss(losses, params, *, similarity="dot"):
    """Gradient Collision (GC) loss: how far the gradients of chunks of a source batch agree.

        g_i = d losses[i] / d params, one vector;  u_i = g_i (dot) or g_i/|g_i| (cos);  i = 1..n
        GC  = 2/(n(n-1)) * sum_{i<j} <u_i, u_j>                    cos: in [-1/(n-1), 1]

    Positive is agreement, negative is collision. By dot, its mean over independent chunks is the
    squared norm of the source loss's own gradient; cos looks at directions alone.
    losses: n >= 2 tensors (), each with its graph. params: bfloat16, float32 or float64 tensors on
    one device; tied ones count once; one that a loss does not touch has a zero gradient, whose
    cosine is 0. Returns a tensor (), differentiable by params, not finite where losses or gradients
    are not. ValueError for all else, also for operations without a right second derivative. No host
    synchronisation. Three to five plain steps of a ResNet, and twice the memory of one on the same
    images. Source: arXiv 2308.09971; dot or cos, backbone alone and fresh head are our reading.

    What else it meets:
      reentrant checkpointing       checkpoint(..., use_reentrant=False)
      LSTM and GRU on CUDA          torch.backends.cudnn.flags(enabled=False) around it
      FSDP, DDP                     unsharded parameters, ddp.module.parameters()
      BatchNorm                     running_statistics_kept(model); two images a chunk (drop_last)

        head = nn.Linear(features, classes).to(device)  # random, drawn anew at every step
        chunks = zip(source_x.chunk(2), source_y.chunk(2))
        losses = [F.cross_entropy(head(backbone(x)), y) for x, y in chunks]
        forget = gradient_collision_loss(losses, backbone.parameters())
        balance.backward(retain_loss, forget, [*backbone.parameters(), *target_head.parameters()])
    """
    losses, params = list(losses), _gc_params(params)
    if not torch.is_grad_enabled():
        raise ValueError("called under no_grad or inference_mode: GC would have no gradient")
    if similarity not in ("dot", "cos"):
        raise ValueError(f"similarity must be 'dot' or 'cos', not {similarity!r}")
    if len(losses) < 2:
        raise ValueError(f"{len(losses)} chunks, 2 or more are needed: pairs collide")
    value = 0
    total = 0  # the sum of u so far, (p,): every pair counts once, and nothing cancels
    for i, loss in enumerate(losses):
        u = _gc_vector(i, loss, params, similarity)
        value = value + (u * total).sum(dtype=_gc_wide(u))
        value = value + 0 * loss.detach().to(u)  # not finite where the loss is not
        total = total + u
    return (value * (2 / (len(losses) * (len(losses) - 1)))).to(total.dtype)


class Balance(torch.nn.Module):
    """Forget as much as you can while the retain loss stays within its allowance.

        a = d retain, b = d forget       by the parameters theta that both losses reach
        m <- 0.9 m + 0.1 measured        B <- 0.95 B + 0.05 |b|      (their own values at first)
        strength <- clamp(strength * exp(0.02 * clip(1 - m / allowance, -1, 1)), *limits)
        step: a + strength * max(|a|, allowance / |theta|) / max(|b|, B) * b       (a, if |b| is 0)

    allowance: how large the retain loss may become, in its own unit. strength: how hard forgetting
    pulls; limits=(1.0, 1.0) hold it. allowance / |theta| starts what begins at a retain loss of
    zero; B keeps a satisfied forget loss's noise small.

    state_dict() resumes exactly, and nothing waits for the device. One call is one step: add
    micro-batches up. Under DistributedDataParallel average .grad afterwards; no GradScaler.
    Sources: GECO (arXiv 1810.00597), VQGAN's adaptive weight (2012.09841); the constants are ours.
    """

    def __init__(self, allowance, *, strength=1.0, limits=(0.25, 4.0)):
        super().__init__()
        numbers = [float(x) for x in (allowance, strength, *limits)]
        if not all(0 < x < math.inf for x in numbers) or numbers[2] > numbers[3]:
            raise ValueError(f"allowance, strength, limits must be positive numbers, not {numbers}")
        self.allowance, self.limits = numbers[0], numbers[2:]
        for name, start in (("strength", strength), ("mean", math.nan), ("forget_norm", math.nan)):
            self.register_buffer(name, torch.tensor(float(start)))  # nan: nothing was seen yet

    @torch.no_grad()
    def backward(self, retain_loss, forget_loss, params, measured=None):
        """Adds the step's gradient to .grad of params, which are leaves. Both losses are tensors ()
        with graphs, which may be shared; measured: the tensor () held against the allowance.
        Where one is not finite, neither is what forgets, and the state stays as it was."""
        params = _gc_params(params, leaves=True)
        measured = (retain_loss if measured is None else measured).detach()
        with torch.enable_grad():
            retain = torch.autograd.grad(retain_loss, params, retain_graph=True, allow_unused=True)
            forget = torch.autograd.grad(forget_loss, params, allow_unused=True)
        shared = [row for row in zip(params, retain, forget) if all(v is not None for v in row)]
        if not shared:
            raise ValueError("no parameter is reached by both losses: is one of another model?")
        columns = (torch.cat([v.flatten() for v in column]) for column in zip(*shared))
        theta_norm, a_norm, b_norm = map(_gc_norm, columns)
        self.to(b_norm.device, torch.float32)
        finite = torch.isfinite(measured + forget_loss + retain_loss + a_norm + b_norm)

        def update(buffer, new, at_first):
            new = torch.where(torch.isnan(buffer), at_first, new)
            buffer.copy_(torch.where(finite, new, buffer))

        update(self.mean, 0.9 * self.mean + 0.1 * measured, measured)
        update(self.forget_norm, 0.95 * self.forget_norm + 0.05 * b_norm, b_norm)
        room = (1 - self.mean / self.allowance).clamp(-1, 1)
        stronger = (self.strength * torch.exp(0.02 * room)).clamp(*self.limits)
        update(self.strength, stronger, stronger)
        start = torch.where(theta_norm > 0, self.allowance / theta_norm, 0.0)
        pull = self.strength * torch.maximum(a_norm, start)
        scale = pull / torch.maximum(b_norm, self.forget_norm)
        scale = torch.where(finite, torch.where(b_norm == 0, 0.0, scale), math.nan)
        for gradients, factor in ((retain, 1.0), (forget, scale)):
            for p, g in zip(params, gradients):
                if g is not None:
                    if p.grad is None:  # in p's strides, on which a fused optimiser relies
                        p.grad = torch.zeros_like(p)
                    p.grad += g * factor


@contextlib.contextmanager
def running_statistics_kept(model):
    """Inside, BatchNorm in training mode uses the batch and leaves its running statistics alone.
    InstanceNorm and spectral_norm go on as ever."""
    kind = torch.nn.modules.batchnorm._BatchNorm
    tracked = {m: m.track_running_stats for m in model.modules() if isinstance(m, kind)}
    try:
        for m in tracked:
            m.track_running_stats = False
        yield
    finally:
        for m, before in tracked.items():
            m.track_running_stats = before


def _gc_params(params, leaves=False):
    """params as a list of checked tensors, each once."""
    params = list(params)
    for k, p in enumerate(params):
        if not isinstance(p, torch.Tensor):
            raise ValueError(f"params[{k}] is a {type(p).__name__}, no tensor")
        told = ""
        if p.dtype not in (torch.bfloat16, torch.float32, torch.float64):
            told = "is not bfloat16, float32 or float64"
        elif p.device != params[0].device:
            told = f"is not on {params[0].device}, as params[0] is: one device is needed"
        elif not p.requires_grad:
            told = "does not require grad: [p for p in model.parameters() if p.requires_grad]"
        elif leaves and not p.is_leaf:
            told = "is no leaf: give model.parameters() themselves"
        if told:
            raise ValueError(f"params[{k}] of shape {tuple(p.shape)}, {p.dtype}, {p.device} {told}")
    if not params:
        raise ValueError("0 params: give model.parameters(), not an iterator that was used up")
    return list(dict.fromkeys(params))  # by identity


def _gc_vector(i, loss, params, similarity="dot", create_graph=True):
    """u_i: chunk i's gradient as one vector (p,), zeros where the loss touches no parameter."""
    if not isinstance(loss, torch.Tensor) or loss.dim():
        seen = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise ValueError(f"chunk {i}'s loss must be a tensor of shape (), not {seen}")
    grads = [None]
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, params, create_graph=create_graph, allow_unused=True)
    found = [g for g in grads if g is not None]
    if not found:
        seen = "touches none of params" if loss.requires_grad else "has no graph"
        raise ValueError(f"chunk {i}'s loss {seen}: no_grad, detached or of another model?")
    if any(g.layout != torch.strided for g in found):
        raise ValueError(f"chunk {i}: a gradient is sparse: make its layer with sparse=False")
    if create_graph and i == 0:
        _gc_check_second_derivative(found)
    pairs = zip(grads, params)
    u = torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs])
    u = u.to(torch.promote_types(u.dtype, torch.float32))
    if similarity == "cos":
        norm = _gc_norm(u)
        u = u / torch.where(norm > 0, norm, 1.0).to(u.dtype) * (norm > 0)
    return u


_GC_WAYS = {  # what has no second derivative, or a wrong one, by its node's name: the way out
    "CompiledFunction": 'the uncompiled model, or torch.compiler.set_stance("force_eager")',
    "attention": "sdpa_kernel(SDPBackend.MATH) around it",
    "hardsigmoid": "F.relu6(x + 3) / 6",
    "CdistBackwardBackward": "(a[:, None] - b).norm(dim=-1)",
    "EmbeddingBagBackwardBackward": "F.embedding(...).mean(1)",
    "WeightNormInterface": "remove_parametrizations, then v * (g / v.norm(...)) by yourself",
    "scale_grad_by_freq": "scale_grad_by_freq=False",
}


def _gc_check_second_derivative(grads):
    """Refuses nodes that have none, which autograd may pass by, or a wrong one."""
    nodes, seen = [g.grad_fn for g in grads if g.grad_fn], set()
    if len(nodes) < len(grads):
        told = "some gradients have no second derivative: linear, or a fused kernel?"
        warnings.warn(told, stacklevel=4)
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        nodes.extend(n for n, _ in node.next_functions if n)
        name = node.name()
        if name in ("torch::autograd::Error", "torch::autograd::NotImplemented"):
            try:
                node(*[torch.zeros(())] * len(node._input_metadata))
            except RuntimeError as error:  # it names the operation
                name = str(error)
        elif getattr(node, "_saved_scale_grad_by_freq", False):
            name = "scale_grad_by_freq"
        elif not name.startswith(tuple(_GC_WAYS)):
            continue
        way = next((way for part, way in _GC_WAYS.items() if part in name), "other operations")
        raise ValueError(f"a chunk's gradient has no right second derivative ({name}): use {way}")


def _gc_wide(vector):
    return torch.float32 if vector.device.type == "mps" else torch.float64


def _gc_norm(vector):
    return torch.linalg.vector_norm(vector, dtype=_gc_wide(vector))


# --- to here ---


@functools.cache
def native_routine():
    """The module with the C routine, and how fast it is here; or None, and why there is none."""
    try:
        import _gc_native_ext as module
    except Exception as error:  # a half-built or foreign library raises anything
        return None, f"not built ({error}; optional)"
    return module, {1: "generic", 2: "fma", 3: "avx512"}.get(module.lib.gc_best_path(), "yes")


def gradient_stats(gradients, backend="auto"):
    """Of n gradients, vectors (p,) float32 or float64 on one device: `gram` (n, n) float64, and the
    floats `gc_dot`, `gc_cos`, the GC loss (0 if n is 1), and `squared_norm`, the mean of |g_i|^2.
    backend: "native" (the C routine; on the CPU, n <= 1024), "torch" or "auto". Else ValueError."""
    rows, n = [g.detach().resolve_neg().contiguous() for g in gradients], len(gradients)
    kinds = {(*g.shape, g.dtype, g.device) for g in rows}
    module, why = native_routine()
    if len(kinds) != 1 or rows[0].dim() != 1 or rows[0].dtype not in (torch.float32, torch.float64):
        raise ValueError(f"vectors (p,) float32 or float64 of one kind are needed, not {kinds}")
    native = module is not None and rows[0].device.type == "cpu" and n <= 1024
    if backend not in ("auto", "torch", "native") or backend == "native" and not native:
        raise ValueError(f"no backend {backend!r} for {n} of {kinds}: the C routine is {why}")
    gram = torch.zeros(n, n, dtype=torch.float64, device=rows[0].device)
    if native and backend != "torch":
        ffi, lib = module.ffi, module.lib
        routine = lib.gc_gram_f32 if rows[0].dtype == torch.float32 else lib.gc_gram_f64
        at = ffi.new("uintptr_t[]", [g.data_ptr() for g in rows])
        pointers, into = ffi.cast("const void *const *", at), ffi.cast("double *", gram.data_ptr())
        if code := routine(pointers, n, len(rows[0]), torch.get_num_threads(), 0, into):
            raise RuntimeError(f"_gc_native.c: error {code} for {n} rows of {len(rows[0])}")
    else:
        vectors = torch.stack(rows).double()  # (n, p)
        gram = vectors @ vectors.T
    gram = ((gram + gram.T) / 2).cpu()  # BLAS may round the two triangles differently
    norms = gram.diagonal().sqrt().where(gram.diagonal() != 0, torch.tensor(1.0))
    cosines = (gram / norms[:, None] / norms).clamp(-1, 1)  # below 1e-308 squares lose digits
    i, j = torch.triu_indices(n, n, 1)
    dot, cos = (m[i, j].mean().item() if n > 1 else 0.0 for m in (gram, cosines))
    return dict(gram=gram, gc_dot=dot, gc_cos=cos, squared_norm=gram.diagonal().mean().item())


# ---- Configuration ----


class DTLError(click.ClickException):
    """A mistake, or something missing on the machine: told in one line, exit code 1."""

    def __init__(self, message):
        super().__init__(" ".join(message.split())[:600])


def warn(text):
    click.echo(f"warning: {text}", err=True)


POSITIVE = click.FloatRange(0, 1e3, min_open=True)


def whole(least):
    return click.IntRange(least, 10**9)


def setting(default, kind, doc):
    return field(default=default, metadata=dict(kind=kind, doc=doc))


@dataclass(frozen=True)
class Config:
    """What a model depends on besides its seed. Defaults: preset `cifar`. 0 steps: by the data."""

    source: str = setting("cifar100[0:80]", str, "task pretrained on, then to be forgotten")
    target: str = setting("cifar10@50", str, "task transferred to, and to be kept")
    downstream: str = setting("cifar100[80:100]@50", str, "new data of an attacker's")
    subset_per_class: int = setting(50, whole(1), "source images a class that an attacker has")
    oracle_per_class: int = setting(150, whole(0), "target images a class of oracle; 0: all")
    split: str = setting("test", click.Choice(["test", "validation"]), "images measured on")
    image_size: int = setting(0, whole(0), "pixels a side; 0: as stored")
    network: str = setting("resnet18", str, "backbone")
    augment: str = setting(
        "crop,flip", click.Choice(["crop,flip", "crop", "none"]), "of training images"
    )
    batch_size: int = setting(128, whole(2), "images a step")
    pretrain_steps: int = setting(15000, whole(0), "stage 1")
    pretrain_lr: float = setting(0.1, POSITIVE, "stage 1, peak rate")
    transfer_steps: int = setting(1500, whole(0), "stage 2")
    transfer_lr: float = setting(0.02, POSITIVE, "stage 2, peak rate")
    # OUR READING: the abstract gives neither similarity, chunks, head nor how losses are balanced.
    dispose_steps: int = setting(1500, whole(0), "stage 3")
    dispose_lr: float = setting(0.2, POSITIVE, "stage 3, peak rate")
    perturb: float = setting(0.5, click.FloatRange(0, 1), "how far to a fresh model stage 3 starts")
    allowance: float = setting(1.0, POSITIVE, "how large the retain loss, T^2 KL, may become")
    similarity: str = setting("dot", click.Choice(["dot", "cos"]), "of gradients, in GC")
    chunks: int = setting(2, whole(2), "of a source batch, whose gradients collide")
    chunk_size: int = setting(64, whole(2), "images a chunk")
    fresh_steps: int = setting(5000, whole(0), "scratch, oracle and METHOD-fresh")
    fresh_lr: float = setting(0.1, POSITIVE, "scratch, oracle and METHOD-fresh, peak rate")
    attack_steps: int = setting(500, whole(0), "stage 4, of the fixed attacker")

    def __post_init__(self):  # what a script gives is checked as the command line's is
        for option in config_options():
            value = option.type.convert(getattr(self, option.name), option, None)
            if value != value:
                raise DTLError(f"{option.opts[0]}: {value} is no number")
            object.__setattr__(self, option.name, value)

    @property
    def oracle(self):
        """The task with more images of the target, or where there are no more, the target."""
        asked, more = split_task(self.target)[3], self.oracle_per_class
        if not asked or 0 < more <= int(asked):
            return self.target
        return with_per_class(self.target, more)


def config_options():
    for f in fields(Config):
        kind = click.Choice(list(BACKBONES)) if f.name == "network" else f.metadata["kind"]
        how = dict(type=kind, default=f.default, show_default=True)
        yield click.Option(["--" + f.name.replace("_", "-")], help=f.metadata["doc"], **how)


PRESETS = {  # sizes, and nothing of the method
    "demo": "source=shapes[0:16]@250 target=shapes[16:24]@30 downstream=shapes[24:32]@30 "
    "subset_per_class=30 oracle_per_class=240 network=resnet8 batch_size=64 pretrain_steps=600 "
    "transfer_steps=200 transfer_lr=0.05 dispose_steps=200 chunk_size=16 fresh_steps=400 "
    "attack_steps=60",
    "cifar": "",
    "own": "source= target= downstream= oracle_per_class=0 network=resnet8 batch_size=64 "
    "augment=crop pretrain_steps=0 transfer_steps=0 transfer_lr=0.05 dispose_steps=0 "
    "chunk_size=32 fresh_steps=0 attack_steps=0",
}
PRESETS = {k: dict(pair.split("=") for pair in v.split()) for k, v in PRESETS.items()}
PASSES = {  # steps of 0: so many passes over the task's images, and at least so many steps
    "pretrain_steps": ("source", 15, 2000),
    "transfer_steps": ("target", 30, 1000),
    "dispose_steps": ("target", 30, 1500),
    "fresh_steps": ("target", 30, 3000),
    "attack_steps": ("source-subset", 5, 200),
}


# ---- Data: a task is SET[FROM:TO]@PER_CLASS, its images uint8 tensors on the device ----


@dataclass(frozen=True)
class Task:
    """One classification task, on the device."""

    x: Tensor  # (N, 3, H, W) uint8, training images, class by class
    y: Tensor  # (N,) int64, 0 .. classes-1
    x_test: Tensor  # (M, 3, H, W) uint8
    y_test: Tensor  # (M,) int64
    classes: int


def stream(*names):
    """A seed of 63 bits by names, independent of whatever ran before."""
    return int(hashlib.sha256(repr(names).encode()).hexdigest()[:16], 16) >> 1


def split_task(name):
    """'cifar100[0:80]@50' -> ('cifar100', '0', '80', '50'); what is not given is None or ''."""
    form = r"(.+\.npz|[^\[\]@]+)(?:\[(\d{0,9}):(\d{0,9})\])?(?:@([1-9]\d{0,8}))?"
    if not (match := re.fullmatch(form, name, re.IGNORECASE)):
        wanted = "SET[FROM:TO]@PER_CLASS, like 'cifar100[0:80]@50'; own data needs two tasks"
        raise DTLError(f"{name!r} is no task {wanted}: --source, --target (and --downstream)")
    return match.groups()


def with_per_class(name, count):
    """The task's name with `count` images a class, or with 0 all."""
    return re.sub(r"(@\d+)?$", f"@{count}" if count else "", name, count=1)


def load_task(name, seed, data_dir="data", device="cpu", split="test", image_size=0):
    """The Task SET[FROM:TO]@PER_CLASS: classes FROM to TO-1 of a set of DATASETS or an .npz file,
    renumbered from 0; PER_CLASS training images a class, drawn by `seed` (a smaller draw is part of
    a larger one). split "validation": in place of the test images the last tenth of each class's
    training images. image_size: pixels a side, by area averaging."""
    dataset, first, end, per_class = split_task(name)
    x, y, x_test, y_test = load_set(dataset, Path(data_dir))
    count = int(max(y.max(), y_test.max())) + 1
    first, end, kept, measured = int(first or 0), int(end or count), [], []
    if first + 2 > end or end > count:
        raise DTLError(f"{name}: [{first}:{end}] are not two or more of the classes [0:{count}]")
    for c in range(first, end):
        ours, test = np.flatnonzero(y == c), np.flatnonzero(y_test == c)
        if split == "validation":
            ours, test = np.split(ours, [-max(1, len(ours) // 10)])
        wanted = int(per_class or len(ours) or 1)
        if len(ours) < wanted or not len(test):
            seen = f"{len(ours)} images to train and {len(test)} to measure on"
            raise DTLError(f"{name}: class {c} has {seen}, not {wanted} and 1")
        kept.append(np.random.default_rng(stream(seed, "draw", c)).permutation(ours)[:wanted])
        measured.append(test)
    tensors, x_test = [], x if split == "validation" else x_test
    for images, indices in ((x, kept), (x_test, measured)):
        tensors.append(gather(images, np.concatenate(indices), image_size))
        labels = np.repeat(np.arange(end - first), list(map(len, indices)))
        tensors.append(torch.from_numpy(labels))
    return Task(*(t.to(device) for t in tensors), classes=end - first)


def gather(images, index, size):
    """Of (N, 1 or 3, H, W) uint8 those of `index`, as a tensor (n, 3, H, W) uint8, or with a size
    (n, 3, size, size) by area averaging."""
    height, width = images.shape[2:]
    if size > min(height, width):
        raise DTLError(f"images {(height, width)} are smaller than --image-size {size}")
    result = torch.empty(len(index), 3, size or height, size or width, dtype=torch.uint8)
    for place, i in zip(result.split(100), np.split(index, range(100, len(index), 100))):
        part = torch.from_numpy(images[i])
        if size:
            part = F.interpolate(part.float(), size=(size, size), mode="area").round()
        place.copy_(part)  # grey: the channel repeated
    return result


@functools.lru_cache(maxsize=4)
def load_set(name, data_dir):
    if name in DATASETS:
        return DATASETS[name](data_dir)
    if not name.lower().endswith(".npz"):
        raise DTLError(f"no data set {name!r}: there are {', '.join(DATASETS)}, and .npz files")
    return read_npz(name)


NPZ = dict(  # the arrays of an .npz file: our names and Keras', and MedMNIST's
    x_train="train_images", y_train="train_labels", x_test="test_images", y_test="test_labels"
)
FORM = (
    "images x (N, H, W, 3) or grey (N, H, W) uint8 of 0 to 255, and labels y (N,) integers from 0"
)


def read_npz(path):
    """Own data in that FORM, or with a last axis of 1: x, y to train on and x, y to test on, the
    images as views (N, 3 or 1, H, W)."""
    found = {}
    try:
        with np.load(path) as file:
            for name, also in NPZ.items():
                found[name] = file[name if name in file else also]
    except Exception as error:  # zipfile and numpy raise a dozen kinds for a damaged file
        told = f"an .npz file needs {', '.join(NPZ)}; {FORM}"
        raise DTLError(f"{path}: {told} ({type(error).__name__}: {error})") from None
    for name, array in found.items():
        if name.startswith("x"):
            fits = array.dtype == np.uint8 and array.shape[3:] in ((), (1,), (3,))
            fits = fits and array.ndim > 2 and array.size and array.max() > 1
        else:
            fits = array.dtype.kind in "iu" and array.size and array.shape[:1] == (array.size,)
        if not fits:
            numbers = array.size and array.dtype.kind in "iuf"
            values = f" of {array.min()} to {array.max()}" if numbers else ""
            raise DTLError(f"{path}: {name} is {array.dtype} {array.shape}{values}, not {FORM}")
    x, y, x_test, y_test = found.values()
    if len(x) != len(y) or len(x_test) != len(y_test) or x.shape[1:] != x_test.shape[1:]:
        seen = ", ".join(f"{name} {array.shape}" for name, array in found.items())
        raise DTLError(f"{path}: a label for each image, and one size, are needed, not {seen}")
    y, y_test = y.ravel().astype(np.int64), y_test.ravel().astype(np.int64)
    classes = np.unique(np.concatenate([y, y_test]))
    if classes[0] or classes[-1] >= len(classes):
        seen = f"{len(classes)} labels of {classes[0]} to {classes[-1]}"
        way = "np.unique(y, return_inverse=True)[1] numbers them without a gap"
        raise DTLError(f"{path}: {seen}, not 0 to {len(classes) - 1}: {way}")
    x, x_test = (part.reshape(*part.shape[:3], -1).transpose(0, 3, 1, 2) for part in (x, x_test))
    return x, y, x_test, y_test


CIFAR = {  # set: the folder in its archive, files to train, to test on, label bytes
    "cifar-10": ("cifar-10-batches-bin", "data_batch_?.bin", "test_batch.bin", 1),
    "cifar-100": ("cifar-100-binary", "train.bin", "test.bin", 2),
}
SHA256 = {  # of the archives
    "cifar-10": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "cifar-100": "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
}


def read_cifar(name, data_dir):
    """The official binary files: records of 1 or 2 label bytes, of which the last counts, and 3072
    pixel bytes, planes R, G, B."""
    folder, *files, labels = CIFAR[name]
    folder, size, arrays = data_dir / folder, labels + 3072, []
    if not folder.is_dir():
        download(f"https://www.cs.toronto.edu/~kriz/{name}-binary.tar.gz", SHA256[name], folder)
    for pattern, count in zip(files, (50000, 10000)):
        records = b"".join(path.read_bytes() for path in sorted(folder.glob(pattern)))
        if len(records) != count * size:
            told = f"{folder / pattern}: {len(records)} bytes, not {count * size}"
            raise DTLError(f"{told}: delete the folder, then `python dtl.py data`")
        records = np.frombuffer(records, np.uint8).reshape(count, size)
        arrays.append(records[:, labels:].reshape(count, 3, 32, 32))
        arrays.append(records[:, labels - 1].astype(np.int64))
    return tuple(arrays)


def download(address, sha256, folder):
    """`folder` out of an archive that is verified before it is opened; whole, or not at all."""
    click.echo(f"downloading {address} to {folder}", err=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        archive = os.path.join(scratch, "archive.tar.gz")
        try:
            torch.hub.download_url_to_file(address, archive, sha256, progress=on_terminal())
        except Exception as error:  # whatever a network can do
            way = f"try again, or put its folder (the binary version) at {folder}"
            raise DTLError(f"cannot download {address} ({error}): {way}") from None
        shutil.unpack_archive(archive, scratch)
        with contextlib.suppress(OSError):  # another process was faster; sizes are checked anyway
            os.replace(os.path.join(scratch, folder.name), folder)


def outline(c, u, v):
    """Negative inside class c's shape: one of eight contours in one of four textures."""
    r, t = np.hypot(u, v), np.arctan2(v, u)
    wide, narrow = np.maximum(abs(u), abs(v)), np.minimum(abs(u), abs(v))
    contours = [
        r - 0.9,  # disc
        np.maximum(abs(u), 2.2 * abs(v)) - 1,  # bar
        r * np.cos((t + np.pi) % (2 * np.pi / 3) - np.pi / 3) - 0.55,  # triangle
        wide - 0.8,  # square
        r - 0.7 - 0.3 * np.cos(5 * t),  # star
        np.maximum(wide, 3 * narrow) - 1,  # cross
        np.maximum(r - 1, 0.75 - np.hypot(u - 0.6, v)),  # crescent
        r - 0.65 - 0.35 * np.cos(3 * t),  # trefoil
    ]
    contour = contours[c % 8]  # then filled, striped, an outline, chequered
    cuts = [contour, np.sin(9 * u), -contour - 0.35, np.sin(7 * u) * np.sin(7 * v)]
    return np.maximum(contour, cuts[c // 8])


def draw_shapes(per_class, seed):
    """32 classes, in any place, angle, size and colours: x (32 * per_class, 3, 16, 16) uint8, y
    int64. Drawn in float64: float32 differs from one kind of CPU to another."""
    rng, y = np.random.default_rng(seed), np.repeat(np.arange(32), per_class)

    def uniform(low, high, channels=1):
        return rng.uniform(low, high, (len(y), channels, 1, 1))

    across = ((np.arange(16) + 0.5) * 0.125 - 1)[None]  # (1, 16)
    down, angle = across.T, uniform(0, 2 * np.pi)[:, 0]
    radius, shift = uniform(0.55, 0.85)[:, 0], uniform(-0.2, 0.2, 2)
    dx, dy = (across - shift[:, 0]) / radius, (down - shift[:, 1]) / radius  # (N, 16, 16)
    u = dx * np.cos(angle) + dy * np.sin(angle)
    v = dy * np.cos(angle) - dx * np.sin(angle)
    mask = np.empty((len(y), 16, 16))
    for c in range(32):
        mask[y == c] = outline(c, u[y == c], v[y == c])
    mask = np.clip(0.5 - mask * radius * 4, 0, 1)[:, None]  # soft edges
    ground, paint = uniform(0, 1, 3), uniform(0, 1, 3)
    paint = np.where(abs(paint - ground) < 0.25, (ground + 0.5) % 1, paint)
    sketch, grey = (y // 8 == 2)[:, None, None, None], uniform(0, 1)
    ground = np.where(sketch, grey, ground)
    paint = np.where(sketch, (grey + uniform(0.35, 0.65)) % 1, paint)
    x = ground + uniform(-0.3, 0.3, 3) * across + uniform(-0.3, 0.3, 3) * down
    for _ in range(3):  # clutter: small discs under the shape
        disc = np.hypot(across - uniform(-1, 1), down - uniform(-1, 1)) < uniform(0.1, 0.3)
        x = np.where(disc, uniform(0, 1, 3), x)
    x = x * (1 - mask) + paint * mask
    x = np.where(sketch, x.mean(1, keepdims=True), x) + rng.normal(0, 0.08, x.shape)
    return (np.clip(x, 0, 1) * 255).astype(np.uint8), y


DATASETS = {  # name -> function of data_dir that gives x, y to train on and x, y to test on
    "shapes": lambda data_dir: draw_shapes(400, seed=1) + draw_shapes(100, seed=2),
    "cifar10": functools.partial(read_cifar, "cifar-10"),
    "cifar100": functools.partial(read_cifar, "cifar-100"),
}


def batch(task, size, augment, generator):
    """`size` training images drawn with replacement, so that a step depends on nothing but its
    number; augmented and normalised, (size, 3, H, W) float32, and their labels (size,)."""
    index = torch.randint(len(task.y), (size,), generator=generator, device=task.y.device)
    return normalise(augmented(task.x[index], augment, generator)), task.y[index]


def augmented(images, how, generator):
    """Each image (B, 3, H, W) shifted by up to an eighth of its side, the gap mirrored, and with
    "flip" in `how` half of them flipped."""
    if how == "none":
        return images
    (b, _, height, width), device = images.shape, images.device
    draw = functools.partial(torch.randint, size=(b, 1), generator=generator, device=device)
    places = []
    for side in (height, width):
        reach = max(1, side // 8)
        at = draw(2 * reach + 1) - reach + torch.arange(side, device=device)  # (B, side)
        places.append(side - 1 - (side - 1 - at.abs()).abs())
    rows, columns = places
    if "flip" in how:
        columns = torch.where(draw(2) == 1, columns.flip(1), columns)
    index = torch.arange(b, device=device)[:, None, None]
    return images[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def normalise(images):
    """uint8 -> float32 in [-2, 2]. Constants: no task's statistics reach another's model."""
    return (images.float() - 127.5) / 63.75


# ---- Networks ----

# --- copy from here: fast second derivatives ---


class _Normalise(torch.autograd.Function):
    """x (B, C, ...) -> weight * (x - mean) / std + bias, by the batch's own mean and std."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        how = (running_mean, running_var, True, momentum, eps)
        y, mean, scale = torch.ops.aten.native_batch_norm(x, weight, bias, *how)
        ctx.save_for_backward(x, weight, mean, scale)
        return y

    @staticmethod
    def backward(ctx, dy):
        return *_NormaliseBackward.apply(dy, *ctx.saved_tensors), None, None, None, None


class _NormaliseBackward(torch.autograd.Function):
    @staticmethod
    def first(dy, x, weight, mean, scale, mask=(True, True, True)):
        args = (dy, x, weight, None, None, mean, scale, True, 0.0, mask)
        return torch.ops.aten.native_batch_norm_backward(*args)

    @staticmethod
    def forward(ctx, dy, x, weight, mean, scale):
        dx, dw, db = _NormaliseBackward.first(dy, x, weight, mean, scale)
        ctx.save_for_backward(dy, x, weight, mean, scale, dw, db)
        return dx, dw, db

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, v, a, c):
        """From the gradients v, a, c by dx, dw, db those by dy, x and weight: sums of dy, x and v
        with one coefficient a channel. The reductions are those of the first derivative."""
        dy, x, weight, mean, r, dw, db = ctx.saved_tensors  # r: 1 / standard deviation
        first, n, shape = _NormaliseBackward.first, x.numel() // x.shape[1], [1] * x.dim()
        shape[1] = -1
        by_dy, v_x, v_sum = first(v, x, weight, mean, r)
        # Means over a channel of dy * normalised x, dy, v * normalised x, and v.
        q, d, p, m = torch.stack([dw, db, v_x, v_sum]) / n
        v_dy = first(v, dy, weight, d, r, (False, True, False))[1]  # r * sum of v * (dy - d)
        wr, ar, rpq = weight * r, a * r, r * p * q
        kr = v_dy / n - rpq
        rs, rt = r * torch.addcmul(a, wr, p, value=-1), wr * r * q
        h = r * torch.addcmul(ar * q, wr, kr.sub(rpq, alpha=2))
        one = torch.addcmul(h * mean, rs, d, value=-1).addcmul_(rt, m)
        rows = (ar, torch.addcmul(c, ar, mean, value=-1), h, rs, rt, one)
        ar, c, h, rs, rt, one = (row.to(x.dtype).view(shape) for row in rows)
        by_dy = torch.addcmul(by_dy, x, ar).add_(c)
        by_x = torch.addcmul(one, x, h, value=-1).addcmul_(dy, rs).addcmul_(v, rt, value=-1)
        return by_dy, by_x, n * kr, None, None


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose second derivative in training moves a third of the memory."""

    def forward(self, x):
        ours = self.training and self.weight is not None and self.momentum is not None
        ours = ours and x.dim() == 4 and x.shape[1] == self.num_features < x.numel()
        if not ours:
            return super().forward(x)
        running = (None, None)
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            running = (self.running_mean, self.running_var)
        return _Normalise.apply(x, self.weight, self.bias, *running, self.momentum, self.eps)


# --- to here: fast second derivatives ---


def convolution(inputs, outputs, stride=1, size=3):
    layer = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(layer, BatchNorm2d(outputs))


class Block(nn.Module):
    """He et al.'s basic residual block."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.first = convolution(inputs, outputs, stride)
        self.second = convolution(outputs, outputs)
        same = (inputs, stride) == (outputs, 1)
        self.shortcut = nn.Identity() if same else convolution(inputs, outputs, stride, size=1)

    def forward(self, x):
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


def resnet(blocks, width):
    """Backbone with the 3x3 stem for small images: (B, 3, H, W) float -> (B, features)."""
    layers, inputs = [convolution(3, width), nn.ReLU()], width
    for stage, count in enumerate(blocks):
        for k in range(count):
            layers.append(Block(inputs, width << stage, 2 if stage and not k else 1))
            inputs = width << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


BACKBONES = {  # name -> function that gives a module, (B, 3, H, W) float -> (B, features)
    "resnet18": lambda: resnet((2, 2, 2, 2), 64),
    "resnet8": lambda: resnet((1, 1, 1), 16),
}


class Model(nn.Module):
    """A backbone and a linear head: (B, 3, H, W) float -> (B, classes)."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x):
        return self.head(self.backbone(x))


def new_backbone(network, seed, device):
    if network not in BACKBONES:
        raise DTLError(f"no backbone {network!r}: there are {', '.join(BACKBONES)}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return BACKBONES[network]().to(device, memory_format=torch.channels_last)


def new_head(features, classes, generator):
    """nn.Linear's own initialisation, drawn on the generator's device."""
    head = nn.utils.skip_init(nn.Linear, features, classes, device=generator.device)
    for p in (head.weight, head.bias):
        nn.init.uniform_(p, -(features**-0.5), features**-0.5, generator)
    return head


def with_new_head(backbone, task, config, seed):
    """A Model of the backbone, no copy, and a new head."""
    generator = torch.Generator(task.x.device).manual_seed(stream(seed, "head"))
    with torch.no_grad():
        features = backbone.eval().to(task.x.device)(normalise(task.x[:2]))
    if features.dim() != 2:
        raise DTLError(f"a backbone must give (B, features), not {tuple(features.shape)}")
    return Model(backbone, new_head(features.shape[1], task.classes, generator))


@torch.no_grad()
def accuracy(model, task):
    """The share of test images that the model gets right; half a million pixels at a time."""
    model.eval()
    size = max(1, 2**19 // task.x_test[0, 0].numel())
    answers = [model(normalise(x)).argmax(1) for x in task.x_test.split(size)]
    return (torch.cat(answers) == task.y_test).double().mean().item()


# ---- The one loop, which trains every stage and every attack ----

WEIGHT_DECAY, CLIP = 5e-4, 5.0  # CLIP: largest norm of a step's gradient
TEMPERATURE = 4.0  # of the distillation that keeps the target: OUR READING
LOOK_EVERY = 50  # steps; the loss terms stay on the device till then
LOG = logging.getLogger("dtl")  # its messages are dicts; any handler may watch
LOG.setLevel(logging.INFO)


def one_cycle(steps, peak):
    """A list of learning rates: up to the peak in a quarter of the steps, half a cosine down."""
    if steps < 1:
        raise DTLError("0 steps: only a run finds them by its data")
    rates = []
    for step in range(1, steps + 1):
        done = step / (steps + 1)
        falling = 0.5 * (1 + math.cos(math.pi * (done - 0.25) / 0.75))
        rates.append(peak * (4 * done if done < 0.25 else falling))
    return rates


def train(model, step_loss, schedule, seed, inspect=None):
    """Trains what of `model` requires grad, by SGD with Nesterov momentum and a list of learning
    rates, one a step. step_loss(generator) draws a batch, backpropagates, and returns its terms by
    name, tensors () that stay on the device. The generator is seeded anew by (seed, step).
    inspect(generator) gives more numbers to log."""
    params, steps = [p for p in model.parameters() if p.requires_grad], len(schedule)
    how = dict(momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY, fused=True)
    optimizer = torch.optim.SGD(params, schedule[0], **how)
    generator, terms = torch.Generator(params[0].device), []
    model.train()
    began = time.monotonic()
    LOG.info(dict(step=0, steps=steps))
    for step, rate in enumerate(schedule):
        optimizer.param_groups[0]["lr"] = rate
        generator.manual_seed(stream(seed, step))
        optimizer.zero_grad()
        row = step_loss(generator)
        row["gradient"] = nn.utils.clip_grad_norm_(params, CLIP)
        terms.append(torch.stack([term.detach().float() for term in row.values()]))
        optimizer.step()
        if (step + 1) % LOOK_EVERY and step + 1 < steps:
            continue
        means = dict(zip(row, torch.stack(terms).mean(0).tolist()))
        if not all(map(math.isfinite, means.values())):
            told = f"not finite in steps {step + 2 - len(terms)} to {step + 1}: {means}"
            raise DTLError(f"{told}; a smaller learning rate or allowance may help")
        means |= inspect(generator) if inspect else {}
        seconds = round(time.monotonic() - began, 2)
        LOG.info(dict(step=step + 1, steps=steps, seconds=seconds) | means)
        terms.clear()
    model.eval()


def fit(model, task, schedule, config, seed):
    """Trains a Model by cross entropy on a task, and returns it."""

    def step_loss(generator):
        x, y = batch(task, config.batch_size, config.augment, generator)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return {"loss": loss}

    train(model, step_loss, schedule, seed)
    return model


# ---- The stages, in the paper's order: Models, Tasks and a Config in, a result out ----


def pretrain(source, config, seed):
    """Stage 1: a Model with a random backbone, trained on the source task."""
    backbone = new_backbone(config.network, stream(seed, "backbone"), source.x.device)
    model = with_new_head(backbone, source, config, seed)
    return fit(model, source, one_cycle(config.pretrain_steps, config.pretrain_lr), config, seed)


def transfer(pretrained, target, config, seed):
    """Stage 2: a Model of the pretrained backbone and a new head, trained on the target task."""
    model = with_new_head(copy.deepcopy(pretrained.backbone), target, config, seed)
    return fit(model, target, one_cycle(config.transfer_steps, config.transfer_lr), config, seed)


def dispose(pretrained, transferred, source, target, method, config, seed):
    """Stage 3: the scrubbed Model. It starts part of the way from the transferred model to a fresh
    one (shrink and perturb, arXiv 1910.08475), or fresh if the method's name ends in -fresh. It
    minimises the retain loss, distillation of the transferred model's answers on target images, and
    the method's forget loss on source images, which leave BatchNorm's running statistics alone."""
    name, allowance = split_method(method)
    forget, fresh, c = METHODS[name], name.endswith("-fresh"), config
    balance = Balance(allowance or c.allowance)
    teacher = copy.deepcopy(transferred).eval().requires_grad_(False)
    source_head = copy.deepcopy(pretrained.head).requires_grad_(False)
    backbone = new_backbone(c.network, stream(seed, "student"), target.x.device)
    new = with_new_head(backbone, target, c, stream(seed, "student"))
    if fresh:
        student = new
        schedule = one_cycle(c.fresh_steps, c.fresh_lr)
    else:
        student = copy.deepcopy(transferred)
        schedule = one_cycle(c.dispose_steps, c.dispose_lr)
        with torch.no_grad():
            for known, drawn in zip(student.parameters(), new.parameters()):
                known.lerp_(drawn, c.perturb)

    def source_batch(generator):
        return batch(source, c.chunks * c.chunk_size, c.augment, generator)

    def step_loss(generator):
        x, _ = batch(target, c.batch_size, c.augment, generator)
        on_target = retain = distillation(student(x), teacher(x))
        x, y = source_batch(generator)
        with running_statistics_kept(student):
            if fresh:  # source images as unlabelled ones: more than there are target images
                retain = retain + distillation(student(x), teacher(x))
            if forget is None:
                retain.backward()
                return {"retain": on_target}
            loss = forget(Context(student, teacher, source_head, x, y, generator, c))
        balance.backward(retain, loss, student.parameters(), measured=on_target)
        return {"retain": on_target, "forget": loss, "strength": balance.strength}

    def inspect(generator):
        """The mechanism at work: what the chunks' gradients have in common."""
        head = new_head(source_head.in_features, source.classes, generator)
        with running_statistics_kept(student):
            losses = chunk_losses(student.backbone, head, *source_batch(generator), c.chunks)
            params = list(student.backbone.parameters())
            vectors = [_gc_vector(0, loss, params, create_graph=False) for loss in losses]
        stats = gradient_stats(vectors)
        del stats["gram"]
        return stats

    train(student, step_loss, schedule, seed, inspect)
    return student


def piggyback(backbone, task, attacker, config, seed):
    """Stage 4: the PL accuracy, a float, that an attacker of ATTACKERS reaches on a piggyback Task.
    backbone: any module that gives (B, features) for the (B, 3, H, W) floats of `normalise`; all of
    a copy is trained. The seed decides head and batches."""
    copied = copy.deepcopy(backbone).requires_grad_(True)
    return accuracy(ATTACKERS[attacker](copied, task, config, seed), task)


# ---- Disposal methods and attackers ----


@dataclass(frozen=True)
class Context:
    """What a forget loss may look at in a step; it returns a tensor (), to be minimised."""

    student: Model
    teacher: Model  # the transferred model, frozen
    source_head: nn.Linear  # the pretrained model's, frozen: a head that learns would forget for it
    x: Tensor  # (chunks * chunk_size, 3, H, W) float32, source images
    y: Tensor  # (chunks * chunk_size,) int64
    generator: torch.Generator
    config: Config


def chunk_losses(backbone, head, x, y, chunks):
    pairs = zip(x.chunk(chunks), y.chunk(chunks))
    return [F.cross_entropy(head(backbone(x)), y) for x, y in pairs]


def gradient_collision(context):
    """OUR READING: GC through a random head, over the backbone's gradients. A trained head would
    lead to the source optimum; gradients of the head, too, would ask for small features."""
    c, backbone, trained = context.config, context.student.backbone, context.source_head
    head = new_head(trained.in_features, trained.out_features, context.generator)
    losses = chunk_losses(backbone, head, context.x, context.y, c.chunks)
    return gradient_collision_loss(losses, backbone.parameters(), similarity=c.similarity)


def uniform_labels(context):
    """KL(uniform || student) through the pretrained source head."""
    logits = context.source_head(context.student.backbone(context.x))
    return -F.log_softmax(logits, 1).mean() - math.log(logits.shape[1])


def distillation(student, teacher):
    """Hinton et al.: T^2 * KL(teacher || student) of logits (B, classes), mean over B."""
    student, teacher = (F.log_softmax(logits / TEMPERATURE, 1) for logits in (student, teacher))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * TEMPERATURE**2


METHODS = {  # name -> forget loss, a function of a Context, or None: the retain loss alone
    "finetune": None,
    "uniform": uniform_labels,
    "gc": gradient_collision,
    # -fresh: into a fresh backbone, which also learns the transferred model's answers on the source
    "distill-fresh": None,
    "uniform-fresh": uniform_labels,
    "gc-fresh": gradient_collision,
}


def split_method(method):
    """'gc@0.5' -> ('gc', 0.5); 'gc' -> ('gc', None): the configured allowance."""
    name, at, number = method.partition("@")
    if name in METHODS and not at:
        return name, None
    if METHODS.get(name) and re.fullmatch(r"\d+(\.\d+)?", number) and 1e-4 <= float(number) <= 1e3:
        return name, float(number)
    told = f"{method!r} is not of {', '.join(METHODS)}, with @0.0001 to @1000 if it forgets"
    raise DTLError(f"--methods: {told}")


def attack(backbone, task, config, seed, times, lr):
    """A new head, then the whole network, `times` the configured steps."""
    model = with_new_head(backbone, task, config, seed)
    return fit(model, task, one_cycle(times * config.attack_steps, lr), config, seed)


def rescaled(backbone, task, config, seed):
    """Long, each filter first brought to the size of a new one: growing filters before BatchNorm
    slow an attacker down without any forgetting."""
    with torch.no_grad():
        for filters in (p for p in backbone.parameters() if p.dim() == 4):  # (out, in, h, w)
            size = (3 * filters[0].numel()) ** -0.5 / filters.std((1, 2, 3), keepdim=True)
            filters.mul_(torch.where(size.isfinite(), size, 1.0))
    return attack(backbone, task, config, seed, times=5, lr=0.1)


ATTACKERS = {  # name -> function of (backbone, its own to change; task; config; seed): a Model
    "fixed": functools.partial(attack, times=1, lr=0.05),
    "long": functools.partial(attack, times=5, lr=0.1),
    "rescaled": rescaled,
}


# ---- One run, one folder: what is there is used, what is missing is made ----
# OUT: config.json, results.jsonl, log.jsonl, report.md, seed0/gc.pt

REFERENCES = ("scratch", "oracle", "transferred")
MADE_FROM = {"pretrained": [], "scratch": [], "oracle": [], "transferred": ["pretrained"]}
RESULT = ("seed", "model", "metric", "task", "attacker")  # of a value in results.jsonl


def write(path, data):
    """All of `data` at `path`, or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append(path, line):
    with path.open("ab", buffering=0) as file:  # in one piece
        file.write(line)


def save(path, state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    write(path, data + hashlib.sha256(data).digest())  # torch.load passes over what follows


def load(path):
    """The state saved at `path`, on the CPU, or DTLError."""
    data = Path(path).read_bytes()
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise DTLError(f"{path} is damaged: delete it, and it is made anew")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def load_model(path, device="cpu", **expected):
    """A Model that a run saved, as in "runs/demo/seed0/gc.pt", in evaluation mode."""
    saved = load(path)
    for name, value in expected.items():
        if saved.get(name) != value:
            raise DTLError(f"{path}: {name} {saved.get(name)}, not {value}: give another --out")
    classes, features = saved["state"]["head.weight"].shape
    head = nn.Linear(features, classes, device=device)
    model = Model(new_backbone(saved["network"], 0, device), head)
    model.load_state_dict(saved["state"])
    return model.eval()


def describe(config):
    """What config.json holds: settings, and the digests of own data and of the code that runs."""

    def digest(file):
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()

    settings = asdict(config)
    for task in filter(None, (config.source, config.target, config.downstream)):
        name = split_task(task)[0]
        if name.lower().endswith(".npz"):
            settings[name] = digest(name)
    main = getattr(sys.modules["__main__"], "__file__", None) or __file__
    files = [Path(file) for file in (__file__, main) if Path(file).is_file()]
    return dict(settings=settings, code={file.name: digest(file) for file in files})


def check_folder(out, now):
    """Refuses a folder made with other settings or data; warns of one made by other code."""
    path, differ = out / "config.json", {}
    if not path.exists() or not any(out.glob("seed*/*.pt")):  # what made nothing blocks nothing
        return path.unlink(missing_ok=True)
    text = path.read_bytes()
    try:
        before = json.loads(text)
        for part, new in now.items():
            old = before[part]
            pairs = {k: (old.get(k), new.get(k)) for k in old | new}
            differ[part] = "; ".join(f"{k} {a}, not {b}" for k, (a, b) in pairs.items() if a != b)
    except Exception:  # whatever a foreign file raises
        raise DTLError(f"{path} is damaged, or not ours: give another --out") from None
    if differ["settings"]:
        way = "give another --out (a copy of its seed*/pretrained.pt there is a start)"
        raise DTLError(f"{out}: {way}: it was made with {differ['settings']}")
    if differ["code"]:
        warn(f"{out} was made by another version: {differ['code']}")


def result_line(key, value):
    return json.dumps(dict(zip(RESULT, key), value=value)).encode() + b"\n"


def read_results(out):
    """{(seed, model, metric, task, attacker): value}; what is no line of results is passed over."""
    path, found = Path(out, "results.jsonl"), {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(Exception):  # whatever a foreign line raises
            record = json.loads(line)
            found[tuple(record[name] for name in RESULT)] = float(record["value"])
    return found


def tidy(out):
    """Before anything is made: lines of results go that are damaged or of a missing model."""
    path, found = out / "results.jsonl", read_results(out)
    kept = [key for key in found if (out / f"seed{key[0]}/{key[1]}.pt").exists()]
    lines = b"".join(result_line(key, found[key]) for key in kept)
    if path.exists() and path.read_bytes() != lines:
        warn(f"{path}: dropped lines damaged, double or of a missing model")
        write(path, lines)


def on_terminal():
    """Whether somebody watches stderr; it is None where it was closed."""
    return bool(sys.stderr) and sys.stderr.isatty()


class Watch(logging.Handler):
    """Keeps what is logged in OUT/log.jsonl, and shows it: a progress bar, and a line a stage."""

    def __init__(self, out):
        super().__init__()
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.stage, self.bar = out / "log.jsonl", "", None

    def emit(self, record):
        row = record.msg
        self.stage = row.get("stage", self.stage)
        append(self.path, json.dumps({"stage": self.stage} | row).encode() + b"\n")
        if on_terminal() and "step" in row:
            how = dict(length=row["steps"], label=self.stage, file=sys.stderr)
            self.bar = self.bar or click.progressbar(**how)
            self.bar.update(row["step"] - self.bar.pos)
        if "stage" in row or row.get("step") != row.get("steps"):
            return  # but at the end of a stage, and for a measurement, which has no steps
        if self.bar:
            self.bar.render_finish()
            self.bar = None
        terms = [f"{k} {v:.4g}" for k, v in row.items() if k not in ("step", "steps")]
        click.echo(f"{self.stage}: {', '.join(terms)}")


class Run:
    """One seed of a folder: every model by its name, every measurement, made once and kept."""

    def __init__(self, out, config, seed, data_dir="data", device="cpu", described=None):
        self.out, self.seed, self.device, c = Path(out), seed, device, config
        self.described, self.results = described or describe(config), read_results(out)
        names = dict(source=c.source, target=c.target, oracle=c.oracle)
        if c.downstream:
            names["downstream"] = c.downstream
        where = (seed, data_dir, device, c.split, c.image_size)
        self.tasks = {task: load_task(name, *where) for task, name in names.items()}
        there = int(torch.bincount(self.tasks["source"].y).min())
        by_size = dict(subset_per_class=min(there, c.subset_per_class))
        subset = with_per_class(c.source, by_size["subset_per_class"])
        self.tasks["source-subset"] = load_task(subset, *where)
        for name, (task, passes, least) in PASSES.items():
            if getattr(c, name) == 0:
                by_size[name] = max(least, passes * (len(self.tasks[task].y) // c.batch_size))
        self.config = replace(c, **by_size)

    def model(self, name):
        """`pretrained`, `transferred`, `scratch`, `oracle` or a method's: loaded, or made."""
        path, c = self.out / f"seed{self.seed}/{name}.pt", self.config
        kind = dict(network=c.network, source=c.source)  # a copied pretrained.pt must fit
        if not path.exists():
            earlier = [self.model(m) for m in MADE_FROM.get(name, ["pretrained", "transferred"])]
            if not (settings := self.out / "config.json").exists():
                write(settings, json.dumps(self.described, indent=1).encode())
            save(path, kind | dict(state=self.make(name, earlier).state_dict()))
        return load_model(path, self.device, **kind)

    def make(self, name, earlier):
        LOG.info(dict(stage=f"seed {self.seed} {name}"))
        c, source, target = self.config, self.tasks["source"], self.tasks["target"]
        if name == "pretrained":
            return pretrain(source, c, stream(self.seed, "pretrain"))
        if name == "transferred":
            return transfer(*earlier, target, c, stream(self.seed, "transfer"))
        if name in ("scratch", "oracle"):  # references that never see the source
            c = replace(c, pretrain_steps=c.fresh_steps, pretrain_lr=c.fresh_lr)
            task = self.tasks["oracle"] if name == "oracle" else target
            return pretrain(task, c, stream(self.seed, "fresh"))
        return dispose(*earlier, source, target, name, c, stream(self.seed, "dispose"))

    def measure(self, model, task=None, attacker=None):
        """Adds a line to results.jsonl, unless it is there: a model's accuracy on the task that it
        was trained for, or the PL accuracy by an attacker on a piggyback task."""
        trained_for = "source" if model == "pretrained" else "target"
        metric = "pl_accuracy" if attacker else f"{trained_for}_accuracy"
        key = (self.seed, model, metric, task, attacker)
        if key in self.results:
            return
        made = self.model(model)
        what = f", {attacker} attacker on {task}" if attacker else ""
        LOG.info(dict(stage=f"seed {self.seed} {model}{what}"))
        if attacker:
            seed = stream(self.seed, "piggyback", task)
            value = piggyback(made.backbone, self.tasks[task], attacker, self.config, seed)
        else:
            value = accuracy(made, self.tasks[trained_for])
        append(self.out / "results.jsonl", result_line(key, value))
        self.results[key] = value
        LOG.info({metric: value})


# ---- The report: rows are models, columns what was measured ----

T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # of 1 .. 9 degrees of freedom


def collect(results, seeds, models, tasks, attackers):
    """{(model, "target") or (model, task, attacker): per cent, one a seed}. "strongest" is the
    attacker of the highest mean."""
    found = {}
    for m in models:
        found[m, "target"] = [100 * results[s, m, "target_accuracy", None, None] for s in seeds]
        for task in tasks:
            for a in attackers:
                found[m, task, a] = [100 * results[s, m, "pl_accuracy", task, a] for s in seeds]
            if len(attackers) > 1:
                by_attacker = (found[m, task, a] for a in attackers)
                found[m, task, "strongest"] = max(by_attacker, key=np.mean)
    return found


def cell(values):
    """48.5, or of several seeds 48.5 ± 1.2, half of a 95% t-interval. Rounded to 9 places first,
    that a tie be one on every machine."""
    text, n = f"{round(np.mean(values), 9):.1f}", len(values)
    if n == 1:
        return text
    return f"{text} ± {round(T95[min(n, 10) - 2] * np.std(values, ddof=1) / n**0.5, 9):.1f}"


def table(numbers):
    """Lines of markdown: target accuracy, and PL accuracy by task and attacker."""
    columns = list(dict.fromkeys(key[1:] for key in numbers))
    rows = [["model", *(", ".join(column) + " %" for column in columns)]]
    for m in dict.fromkeys(key[0] for key in numbers):
        rows.append([m, *(cell(numbers[(m, *column)]) for column in columns)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]


def in_words(numbers):
    """A sentence a method, and one for whatever makes a comparison unfair."""
    lines, mean = [], {key: round(np.mean(values), 9) for key, values in numbers.items()}
    before = mean["transferred", "target"]
    apart = mean.get(("oracle", "target"), before) - before
    if abs(apart) > 3:
        told = f"oracle stands {apart:+.1f} points from transferred on the target task"
        lines.append(f"- {told}, too far to compare: --oracle-per-class sets its images.")
    for m in dict.fromkeys(key[0] for key in mean if key[0] not in REFERENCES):
        gets = {}
        for (model, task, *attacker), value in mean.items():
            if model != m or not attacker:
                continue
            gets[task] = f"{value:.1f}% on {task}"
            by = attacker[0]  # the last one: the only attacker, or "strongest"
            if value < mean.get(("oracle", task, *attacker), 0) - 3 and attacker != ["strongest"]:
                told = f"- {m}, {attacker[0]} on {task}: over 3 points less than from oracle"
                lines.append(f"{told}, a broken starting point, not forgetting.")
        told = f"- {m} changes target accuracy by {mean[m, 'target'] - before:+.1f} points"
        lines.append(f"{told}; the {by} attacker gets {' and '.join(gets.values())}.")
    return lines


def report(out, config, about, seeds, models, tasks, attackers):
    """Writes OUT/report.md, and returns its text."""
    numbers = collect(read_results(out), seeds, models, tasks, attackers)
    c, seeds = config, ",".join(map(str, seeds))
    lines = [
        f"Source {c.source}, target {c.target}, downstream {c.downstream or '-'}; "
        f"{c.network}; {c.split} images; seeds {seeds}.",
        f"PL accuracy: what an attacker gets by retraining, source-subset: {c.subset_per_class} "
        "images a class. ±: half of a 95% t-interval over seeds.",
    ]
    lines += ["", *table(numbers), "", *in_words(numbers), "", *(f"    {line}" for line in about)]
    text = "\n".join([*lines, ""])
    write(out / "report.md", text.encode(errors="backslashreplace"))
    return text


# ---- The command line ----


def find_device(gpu):
    count = torch.cuda.device_count()
    if gpu is not None and gpu >= count:
        seen = f"torch {torch.__version__} sees {count} CUDA devices, numbered from 0"
        raise DTLError(f"--gpu {gpu}: {seen}; leave it out for the CPU")
    return torch.device("cpu" if gpu is None else f"cuda:{gpu}")


def names_in(option, text, known):
    """NAME,NAME,... of what is known, or all; method 'gc@1.0' is written gc@1."""
    names = list(known) if text == "all" else text.split(",")
    if known is METHODS:
        pairs = [split_method(name) for name in names]
        names = [f"{name}@{a:g}" if a else name for name, a in pairs]
    elif set(names) - set(known):
        raise DTLError(f"{option} {text!r}: not a list of {', '.join(known)}, or all")
    return list(dict.fromkeys(names))


def run(stage, preset, gpu, seeds, methods, attackers, out, data_dir, **settings):
    """Make the models that a stage needs, measure them, report."""
    if stage == "data":
        for name in CIFAR:
            read_cifar(name, data_dir)
        return click.echo(f"{data_dir}: {', '.join(CIFAR)}")
    config, device = Config(**settings), find_device(gpu)
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", seeds):
        raise DTLError(f"--seeds {seeds!r}: not a list of whole numbers like 0,1,2")
    seeds = list(dict.fromkeys(int(seed) for seed in seeds.split(",")))
    methods = names_in("--methods", methods, METHODS)
    attackers = names_in("--attackers", attackers, ATTACKERS)
    models = [m for m in REFERENCES if m != "oracle" or config.oracle != config.target]
    if stage != "all":
        models = [] if stage == "pretrain" else ["transferred"]
    if stage in ("all", "dispose", "piggyback"):
        models += methods
    out = out or Path(os.environ.get("DTL_OUT", "runs"), preset)
    about = about_this(device)
    described = describe(config)
    check_folder(out, described)
    tidy(out)
    there = [str(path.relative_to(out)) for path in sorted(out.glob("seed*/*.pt"))]
    click.echo("\n".join([*about, f"{out}: {', '.join(there) or 'nothing is there yet'}"]))
    runs = [Run(out, config, seed, data_dir, device, described) for seed in seeds]
    load_set.cache_clear()
    tasks = []
    if stage in ("all", "piggyback"):
        tasks = [task for task in ("source-subset", "downstream") if task in runs[0].tasks]
    LOG.addHandler(Watch(out))
    for one, model in itertools.product(runs, ["pretrained", *models]):
        one.measure(model)
        for task, attacker in itertools.product(tasks, attackers if model in models else ()):
            one.measure(model, task, attacker)
    if tasks:
        click.echo(report(out, runs[0].config, about, seeds, models, tasks, attackers))
        click.echo(f"wrote {out / 'report.md'}, {out / 'results.jsonl'}")


def about_this(device):
    """The command, and what runs it."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    parts = [
        f"dtl.py {__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        f"numpy {np.__version__}; {machine}, {torch.get_num_threads()} threads",
        f"C routine {native_routine()[1]}",
    ]
    script = Path(sys.argv[0])
    name = script.name if script.is_absolute() else str(script)
    command = ["python"] * name.endswith(".py") + [name, *sys.argv[1:]]
    return [shlex.join(command), ", ".join(parts)]


class Command(click.Command):
    """With the defaults of the preset that the arguments name or ask for; errors are one line."""

    def parse_args(self, context, args):
        text = " ".join(map(str, args))
        preset = "own" if ".npz" in text.lower() else "cifar" if "--gpu" in text else "demo"
        named = re.search(r"--preset[ =](\S+)", text)
        context.default_map = PRESETS.get(named[1] if named else preset, {}) | {"preset": preset}
        return super().parse_args(context, args)

    def invoke(self, context):
        try:
            return super().invoke(context)
        except OSError as error:
            told = f"{error.filename or 'output'}: {error.strerror or error}"
        except torch.OutOfMemoryError as error:
            told = f"a smaller --batch-size or --chunk-size may do: {error}"
        except DTLError as error:
            told = error.message
        finally:
            watches = [handler for handler in LOG.handlers if isinstance(handler, Watch)]
            LOG.handlers[:] = [handler for handler in LOG.handlers if handler not in watches]
        stages = [f"{watch.stage}: " for watch in watches if watch.stage]
        raise DTLError("".join(stages) + told)


def main(args=None, **extra):
    """The command line, with what a script has added to the tables; both as for click."""
    folder, option = click.Path(path_type=Path), functools.partial(click.Option, show_default=True)
    stages = ["all", "pretrain", "transfer", "dispose", "piggyback", "data"]
    methods, Choice = f"all, or of {', '.join(METHODS)}, also as gc@0.5", click.Choice
    options = [
        click.Argument(["stage"], type=Choice(stages)),
        option(["--preset"], type=Choice(list(PRESETS)), help="cifar with --gpu, own with .npz"),
        option(["--gpu"], type=click.IntRange(0), help="number of the CUDA device"),
        option(["--seeds"], default="0", help="as in 0,1,2"),
        option(["--methods"], default="finetune,uniform,gc,gc-fresh", help=methods),
        option(["--attackers"], default="fixed", help=f"all, or of {', '.join(ATTACKERS)}"),
        option(["--out"], type=folder, help="folder of results; else PRESET in $DTL_OUT or runs"),
        option(["--data-dir"], type=folder, default="data", envvar="DTL_DATA_DIR"),
        *config_options(),
    ]
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):
            output.reconfigure(errors="replace")  # a code page that has no ±
    text = "Pretrain, transfer, dispose, piggyback: all stages, or up to one. data: fetch CIFAR."
    command = Command("dtl.py", callback=run, params=options, help=text)
    return click.version_option(__version__)(command).main(args, **extra)


if __name__ == "__main__":
    main(prog_name="dtl.py")
