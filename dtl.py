#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "numpy>=1.26", "cffi>=1.16", "click>=8.1"]
# ///
"""Disposable Transfer Learning (DTL) in one file: pretrain, transfer, dispose, piggyback.

Koh, Shon, Lee, Hong, Kim: "Disposable Transfer Learning for Selective Source Task Unlearning", ICCV 2023,
arXiv 2308.09971. A network is pretrained on a source task and transferred to a target task; then the source knowledge
is disposed of with the Gradient Collision (GC) loss, and the target task kept. Whether that worked is measured by
piggyback learning (PL): an attacker retrains the scrubbed model on a subset of the source data, or on new downstream
data, and the accuracy reached is the PL accuracy. Lower is better.

    python dtl.py all                       # no GPU, no download: minutes on a laptop
    python dtl.py all --gpu 0               # CIFAR-100 -> CIFAR-10, ResNet-18
    python dtl.py --help

EVIDENCE (python dtl.py all --preset cifar-small --seeds 0,1,2; experiments/cifar-small)

CIFAR-100 classes 0..79 -> 500 images of CIFAR-10, 16x16 pixels, 8-layer ResNet, CPU, one thread a run, torch 2.13.0; three
seeds, mean and 95% t-interval, in about one core-hour. Leak: 0 is a model that never saw the source, 1 the transferred one.

    target accuracy, change   leak, source subset   leak, new downstream data
    gc        -1.4 +- 1.0 %      -0.24 +- 0.23          0.02 +- 0.20
    gc-fresh  -1.1 +- 2.8 %      -0.15 +- 0.06         -0.05 +- 0.54
    best rival by mean leak (random-labels)
              +0.3 +- 1.5 %       0.04 +- 0.16          0.44 +- 0.22

Against one fixed attacker: "resists this attacker", never "erased".

No official code is public and this file was written from the paper's abstract. What the abstract leaves open is marked
`# OUR READING` where it is decided, and listed in the README. No number here is the paper's.
"""

import contextlib
import copy
import functools
import hashlib
import http.client
import io
import json
import math
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import click
import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

__version__ = "0.1.0"


class DTLError(ValueError):
    """A mistake of the user's, or something missing on the machine, told in one line."""


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
    split: str = setting("test", "measure on the test images, or on a tenth of the training images held out",
                         ("test", "validation"))
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
    retain: str = setting("distill", "what keeps the target: distillation from the transferred model, or labels",
                          ("distill", "ce"))
    temperature: float = setting(4.0, "temperature of the distillation")
    retain_weight: float = setting(1.0, "weight of the retain loss")
    similarity: str = setting("dot", "what gradients collide in: inner product or cosine", ("dot", "cos"))
    gc_head: str = setting("fresh", "head the GC loss goes through: a random one each step, or the stored one",
                           ("fresh", "source"))
    chunks: int = setting(4, "chunks of a source batch whose gradients collide")
    chunk_size: int = setting(32, "images a chunk; the rivals get chunks * chunk_size source images a step")
    forget_weights: str = setting(
        "neggrad=1,random-labels=3,uniform=3,bad-teacher=3,scrub=3,gc=30,gc-fresh=10",
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
        fresh_steps=400, attack_steps=100, chunks=2, forget_weights="gc=10",
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
    second-order graph is alive at once. Raises ValueError for fewer than two losses, a loss that is no finite scalar,
    no params, params that do not require grad, an unknown similarity. Source: Koh et al., arXiv 2308.09971 (ICCV
    2023); cosine or inner product is this project's reading. BatchNorm and dropout mode are the caller's.

        chunks = zip(source_x.chunk(4), source_y.chunk(4))
        losses = [F.cross_entropy(model(x), y) for x, y in chunks]
        forget = gradient_collision_loss(losses, model.parameters())
        (retain_loss + 30.0 * forget).backward()
        optimizer.step()
    """
    losses, params = list(losses), _gc_params(params, similarity)
    _gc_check_count(losses)
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
    value when called again (same augmentation, same dropout mask, BatchNorm not reading its running statistics).
    They are called twice, one after the other; nothing but S outlives a chunk. Per chunk a gradient, then a gradient
    with a Hessian-vector product:

        dGC = sum_i H_i v_i,    dot:  v_i = 2/(n(n-1)) (S - g_i),                        S = sum_i g_i
                                cos:  v_i = 2/(n(n-1)) (S - <u_i, S> u_i) / |g_i|,       S = sum_i u_i,  u_i = g_i/|g_i|

    Over several processes S is the one thing to exchange. Returns a float; errors as `gradient_collision_loss`, and
    ValueError if a chunk's loss changed between the calls. If it raises, `.grad` may hold a part of the sum.

        chunks = [lambda x=x, y=y: F.cross_entropy(model(x), y) for x, y in zip(source_x.chunk(8), source_y.chunk(8))]
        retain_loss.backward()
        gradient_collision_backward(chunks, model.parameters(), weight=30.0)
        optimizer.step()
    """
    chunk_losses, params = list(chunk_losses), _gc_params(params, similarity)
    _gc_check_count(chunk_losses)
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


def _gc_params(params, similarity):
    """params as a list, checked."""
    if similarity not in ("dot", "cos"):
        raise ValueError(f"similarity must be 'dot' or 'cos', not {similarity!r}")
    if isinstance(params, torch.Tensor):
        raise ValueError("params must be a sequence of tensors, not one tensor")
    params = list(params)
    if not params:
        raise ValueError("params is empty: nothing to differentiate by")
    for k, p in enumerate(params):
        if not p.requires_grad:
            raise ValueError(f"params[{k}] of shape {tuple(p.shape)} does not require grad")
    return params


def _gc_check_count(chunks):
    if len(chunks) < 2:
        raise ValueError(f"gradients collide in pairs: at least 2 chunks are needed, not {len(chunks)}")


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
# Gradient statistics


@dataclass(frozen=True)
class GradientStats:
    """What the gradients of n chunks have in common. Over no pairs at all (n = 1) the five scalars are 0."""

    gram: Tensor  # (n, n) float64 on the CPU, <g_i, g_j>
    cosine: Tensor  # (n, n) float64, 0 where a gradient is zero
    norms: Tensor  # (n,) float64
    mean_dot: float  # over the pairs i < j: GC with similarity="dot"
    mean_cosine: float  # GC with similarity="cos"
    min_cosine: float
    max_cosine: float
    collision_rate: float  # share of the pairs with <g_i, g_j> < 0
    backend: str  # which computed it: "native" or "torch"


@functools.cache
def native_routine() -> tuple[Any, str]:
    """(cffi module or None, one line for the header) of the optional C routine; python build_native.py builds it."""
    try:
        import _gc_native_ext as module
    except Exception as error:  # noqa: BLE001 - a half-built or foreign library raises anything; never a reason to fail
        return None, f"no ({error}); gradient statistics run in torch, slower: python build_native.py"
    path = {1: "generic", 2: "fma", 3: "avx512"}.get(module.lib.gc_best_path(), "?")
    return module, f"yes ({path}, {Path(module.__file__).name})"


def gradient_stats(gradients: Sequence[Sequence[Tensor | None]], backend: str = "auto") -> GradientStats:
    """Pairwise statistics of chunk gradients, read where they lie: nothing is flattened.

    gradients[i][k]: chunk i's gradient for parameter k, n chunks in all; any shape, the same for every i; float32 or
    float64, strided as it likes; None is a zero gradient. Products and sums are float64 whatever the input.
    backend: "native" (the C routine, CPU only), "torch" (any device), "auto" (native where it can).
    NaN and infinity spread to the entries they touch. ValueError: chunks, shapes, dtypes or devices do not match, or
    "native" was asked for and the gradients are not on the CPU; RuntimeError: "native", and it is not built.
    """
    if backend not in ("auto", "native", "torch"):
        raise ValueError(f"backend {backend!r}: choose auto, native or torch")
    n = len(gradients)
    if n == 0 or len({len(chunk) for chunk in gradients}) != 1:
        raise ValueError(f"one or more chunks of as many gradients each, not {[len(chunk) for chunk in gradients]}")
    columns, devices = [], set()  # columns: one entry a parameter, the n chunks' gradients for it
    for k, column in enumerate(zip(*gradients, strict=True)):
        kinds = {(g.shape, g.dtype, g.device, g.layout) for g in column if g is not None}
        if len(kinds) > 1:
            raise ValueError(f"parameter {k}: the chunks' gradients differ in shape, dtype or device: {kinds}")
        for _, dtype, device, layout in kinds:  # one, or none where no chunk has a gradient for the parameter
            if dtype not in (torch.float32, torch.float64) or layout != torch.strided:
                raise ValueError(f"parameter {k}: {dtype}, {layout} gradients; pass dense float32 or float64")
            columns.append(column)
            devices.add(device)
    on_cpu = all(device.type == "cpu" for device in devices)
    module, reason = native_routine()
    if backend == "native" and module is None:
        raise RuntimeError(f"backend 'native': {reason}")
    if backend == "native" and not on_cpu:
        raise ValueError(f"backend 'native' reads CPU memory, and these gradients are on {devices}: use 'torch'")
    if len(devices) > 1:
        raise ValueError(f"gradients on several devices: {devices}")
    native = backend != "torch" and on_cpu and module is not None and n <= 1024
    if backend == "native" and not native:
        raise ValueError(f"backend 'native' takes up to 1024 chunks, not {n}: use 'torch'")

    with torch.no_grad():
        gram = torch.zeros(n, n, dtype=torch.float64, device="cpu" if native else next(iter(devices), "cpu"))
        for column in columns:
            if native:
                _add_gram_native(module, column, gram)
            else:
                _add_gram_torch(column, gram)
        gram = (gram + gram.T).cpu() / 2  # BLAS may round the two triangles differently
        norms = gram.diagonal().sqrt()
        scale = torch.where(norms == 0, 1.0, norms)
        cosine = (gram / scale[:, None] / scale[None, :]).clamp(-1, 1)  # clamp: squares below 1e-308 lose their digits
        i, j = torch.triu_indices(n, n, 1)
        dots, cosines = (gram[i, j], cosine[i, j]) if n > 1 else (torch.zeros(1), torch.zeros(1))
        means = [t.mean().item() for t in (dots, cosines, (dots < 0).double())]
        return GradientStats(gram, cosine, norms, means[0], means[1], cosines.min().item(), cosines.max().item(), means[2],
                             "native" if native else "torch")


def _add_gram_native(module: Any, column: Sequence[Tensor | None], gram: Tensor) -> None:
    rows = [g if g is None or g.is_contiguous() else g.contiguous() for g in column]  # kept alive through the call
    some = next(g for g in rows if g is not None)
    pointers = module.ffi.new("uintptr_t[]", [0 if g is None else g.data_ptr() for g in rows])  # 0, NULL: zeros
    function = module.lib.gc_gram_f32 if some.dtype == torch.float32 else module.lib.gc_gram_f64
    pointers_c = module.ffi.cast("const void *const *", pointers)
    gram_c = module.ffi.cast("double *", gram.data_ptr())
    code = function(pointers_c, len(rows), some.numel(), torch.get_num_threads(), 0, gram_c)
    if code:
        raise RuntimeError(f"_gc_native.c: error {code} (see its header) for {len(rows)} rows of {some.numel()}")


def _add_gram_torch(column: Sequence[Tensor | None], gram: Tensor, block: int = 1 << 18) -> None:
    some = next(g for g in column if g is not None)
    rows = [(torch.zeros_like(some) if g is None else g).reshape(-1) for g in column]
    for start in range(0, some.numel(), block):  # float64 copies of a block at a time, not of everything
        part = torch.stack([row[start : start + block] for row in rows]).double()  # (n, block)
        gram += part @ part.T


def chunk_statistics(model: "Model", x: Tensor, y: Tensor, chunks: int = 4) -> dict[str, float]:
    """What the log keeps of the gradients of cross entropy on `chunks` parts of a batch: x (B, 3, H, W), y (B,)."""
    with running_statistics_kept(model):
        gradients = [torch.autograd.grad(F.cross_entropy(model(part), labels), list(model.parameters()))
                     for part, labels in zip(x.chunk(chunks), y.chunk(chunks))]
    stats = gradient_stats(gradients)
    return {name: getattr(stats, name) for name in ("mean_cosine", "mean_dot", "collision_rate")}


# ----------------------------------------------------------------------------------------------------------------------
# Data: tasks are named SET[CLASSES]@PER_CLASS; their images live as uint8 tensors on the device.

ARCHIVES = {  # set: (address, sha256, folder, training files, test file, label bytes a record, which is the label)
    "cifar10": (
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        "cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin", 1, 0,
    ),
    "cifar100": (
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        "cifar-100-binary", ["train.bin"], "test.bin", 2, 1,
    ),
}
ARCHIVE_RECORDS = 10000  # records in every file of both archives but cifar100's train.bin, which has 50000


@dataclass(frozen=True)
class Task:
    """One classification task, on the device."""

    name: str
    x: Tensor  # (N, 3, H, W) uint8, training images
    y: Tensor  # (N,) int64, 0 .. classes-1
    x_test: Tensor  # (M, 3, H, W) uint8
    y_test: Tensor  # (M,) int64
    classes: int
    fingerprint: str  # sha256 of all of the above


def load_task(name: str, config: Config, seed: int, data_dir: Path, device: torch.device) -> Task:
    """The task `SET[CLASSES]@PER_CLASS`: labels renumbered from 0, PER_CLASS training images a class drawn by `seed`
    (a smaller draw is part of a larger one), test images all kept. DTLError if there is no such task."""
    match = parse_task(name)
    x, y, x_test, y_test = load_set(match["set"], data_dir, config.split)
    chosen = select_classes(name, match["classes"], int(max(y.max(), y_test.max())) + 1)
    order = np.random.default_rng(stream(seed, "draw", match["set"])).permutation(len(y))
    kept, kept_test = [], []
    for c in chosen:
        of_class, of_class_test = order[y[order] == c], np.flatnonzero(y_test == c)
        wanted = int(match["per_class"] or len(of_class))
        if not (len(of_class) and len(of_class_test) and wanted):
            raise DTLError(f"task {name}: class {c} is empty (training images {len(of_class)}, kept {wanted}, "
                           f"test images {len(of_class_test)})")
        if wanted > len(of_class):
            raise DTLError(f"task {name}: class {c} has {len(of_class)} training images, not {wanted}")
        kept.append(of_class[:wanted])
        kept_test.append(of_class_test)
    sets = []
    for pixels, indices in ((x, kept), (x_test, kept_test)):
        images = torch.from_numpy(pixels[np.concatenate(indices)])
        sets += [shrink(images, config.image_size, name), torch.arange(len(indices)).repeat_interleave(
            torch.tensor([len(i) for i in indices]))]
    fingerprint = hashlib.sha256(b"".join(t.numpy().tobytes() for t in sets)).hexdigest()
    return Task(name, *(t.to(device) for t in sets), classes=len(chosen), fingerprint=fingerprint)


def parse_task(name: str) -> re.Match:
    """SET[CLASSES]@PER_CLASS as the groups `set`, `classes`, `per_class`; the latter two None where left out."""
    match = re.fullmatch(r"(?P<set>[^\[\]@]+)(\[(?P<classes>[^\[\]@]*)\])?(@(?P<per_class>\d+))?", name)
    if not match:
        raise DTLError(f"task {name!r}: not of the form SET[CLASSES]@PER_CLASS, as in cifar100[0:80]@50")
    return match


def select_classes(task: str, text: str | None, count: int) -> list[int]:
    """'0:80', '1,5,7' or None (all) -> class numbers."""
    try:
        if text is None:
            chosen = list(range(count))
        elif ":" in text:
            start, stop, *step = (int(t) if t.strip() else None for t in text.split(":"))
            chosen = list(range(start or 0, count if stop is None else stop, *(s or 1 for s in step)))
        else:
            chosen = [int(t) for t in text.split(",")]
    except (ValueError, TypeError):
        raise DTLError(f"task {task}: classes [{text}] are neither a slice like 0:80 nor a list like 1,5,7") from None
    if len(chosen) < 2 or len(set(chosen)) < len(chosen) or min(chosen) < 0 or max(chosen) >= count:
        raise DTLError(f"task {task}: classes [{text}] must be at least two, each once, of 0..{count - 1}")
    return chosen


def shrink(images: Tensor, size: int, task: str) -> Tensor:
    """(N, 3, H, W) uint8 -> (N, 3, size, size) uint8 by area averaging; size 0 leaves them as they are."""
    height, width = images.shape[2:]
    if size in (0, height) and (size == 0 or size == width):
        return images
    if size > min(height, width):
        raise DTLError(f"task {task}: its images are {height}x{width}, smaller than --image-size {size}")
    parts = [F.interpolate(part.float(), (size, size), mode="area").round().byte() for part in images.split(4096)]
    return torch.cat(parts)


@functools.lru_cache(maxsize=4)
def load_set(name: str, data_dir: Path, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x (N, 3, H, W) uint8, y (N,) int64 for training, then for measuring. With split 'validation' the latter are
    the last tenth of each class's training images, which are taken out of the former; the test images stay unseen."""
    if name == "shapes":
        arrays = draw_shapes(SHAPES_TRAIN, seed=1) + draw_shapes(SHAPES_TEST, seed=2)
    elif name in ARCHIVES:
        arrays = read_archive(name, data_dir)
    elif name.endswith(".npz"):
        arrays = read_npz(Path(name))
    else:
        raise DTLError(f"no data set {name!r}: known are shapes, {', '.join(ARCHIVES)}, and a file ending in .npz")
    if split == "validation":
        x, y = arrays[:2]
        held = np.zeros(len(y), bool)
        for c in np.unique(y):
            of_class = np.flatnonzero(y == c)
            held[of_class[len(of_class) - max(1, len(of_class) // 10):]] = True
        arrays = x[~held], y[~held], x[held], y[held]
    return arrays


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A user's own data: x_train, x_test (N, H, W, 3) uint8; y_train, y_test (N,) integers from 0."""
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [k for k in ("x_train", "y_train", "x_test", "y_test") if k not in file]
            if missing:
                raise DTLError(f"{path}: it has no {', '.join(missing)} (found: {', '.join(file) or 'nothing'})")
            x, y, x_test, y_test = (file[k] for k in ("x_train", "y_train", "x_test", "y_test"))
    except FileNotFoundError:
        raise DTLError(f"{path}: no such file") from None
    except DTLError:
        raise
    except Exception as error:  # numpy raises a dozen kinds for a damaged file
        raise DTLError(f"{path}: not a readable .npz file ({type(error).__name__}: {error})") from None
    for part, images, labels in (("train", x, y), ("test", x_test, y_test)):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
            raise DTLError(f"{path}: x_{part} must be uint8 of shape (N, H, W, 3), not {images.dtype} {images.shape}")
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            raise DTLError(f"{path}: y_{part} must be integers of shape ({len(images)},), one an image, "
                           f"not {labels.dtype} {labels.shape}")
        if labels.min() < 0 or labels.max() >= 1 << 20:
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise DTLError(f"{path}: y_{part} holds the label {wrong}; labels count from 0, to at most {(1 << 20) - 1}")
    if x.shape[1:] != x_test.shape[1:]:
        raise DTLError(f"{path}: x_train holds {x.shape[1:]} images, x_test {x_test.shape[1:]}")
    nchw = (np.ascontiguousarray(images.transpose(0, 3, 1, 2)) for images in (x, x_test))
    return next(nchw), y.astype(np.int64), next(nchw), y_test.astype(np.int64)


def read_archive(name: str, data_dir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """CIFAR from its official binary files: records of 1 or 2 label bytes and 3072 pixel bytes, planes R, G, B."""
    _, _, folder, train, test, label_bytes, label_at = ARCHIVES[name]
    fetch(name, data_dir)
    arrays = []
    for files in (train, [test]):
        records = []
        for file in files:
            path, length = data_dir / folder / file, label_bytes + 3072
            data = np.fromfile(path, np.uint8)
            expected = ARCHIVE_RECORDS * (5 if file == "train.bin" else 1) * length
            if len(data) != expected:
                raise DTLError(f"{path}: {len(data)} bytes, not {expected}: truncated or another file; delete the folder "
                               f"{data_dir / folder} and run `python dtl.py data`")
            records.append(data.reshape(-1, length))
        records = np.concatenate(records)
        arrays += [records[:, label_bytes:].reshape(-1, 3, 32, 32), records[:, label_at].astype(np.int64)]
    return tuple(arrays)


def fetch(name: str, data_dir: Path) -> Path:
    """The unpacked folder of a CIFAR set: used as it is if there, else downloaded, verified and unpacked."""
    address, sha256, folder, train, test, *_ = ARCHIVES[name]
    destination, archive = data_dir / folder, data_dir / address.rsplit("/", 1)[1]
    if destination.is_dir():
        absent = [f for f in (*train, test) if not (destination / f).is_file()]
        if absent:
            raise DTLError(f"{destination}: {', '.join(absent)} missing; delete the folder and run `python dtl.py data`")
        return destination
    data_dir.mkdir(parents=True, exist_ok=True)
    if not archive.exists():
        click.echo(f"downloading {address} to {archive}", err=True)
        for stale in data_dir.glob(f"{archive.name}.*.partial"):
            stale.unlink()  # of a download that was killed: it is begun again
        socket.setdefaulttimeout(60)
        try:
            torch.hub.download_url_to_file(address, str(archive), hash_prefix=sha256, progress=sys.stderr.isatty())
        except (OSError, RuntimeError, http.client.HTTPException) as error:  # RuntimeError: a wrong checksum
            raise DTLError(f"cannot download {address} ({error}); try again, or put the unpacked folder {folder} into "
                           f"{data_dir}") from None
    with archive.open("rb") as file:
        found = hashlib.sha256()
        while block := file.read(1 << 20):
            found.update(block)
    if found.hexdigest() != sha256:
        raise DTLError(f"{archive}: sha256 {found.hexdigest()}, not {sha256}: truncated or altered; delete it and run "
                       "`python dtl.py data`")
    unpacked = data_dir / f"{folder}.{os.getpid()}.partial"
    unpacked.mkdir(exist_ok=True)
    with tarfile.open(archive) as tar:
        for member in tar:  # only the names we want, as plain files: nothing can land elsewhere
            if member.isfile() and Path(member.name).name in (*train, test):
                (unpacked / Path(member.name).name).write_bytes(tar.extractfile(member).read())
    os.replace(unpacked, destination)
    return destination


# `shapes`: eight contours (class % 8) in four textures (class // 8: filled, striped, grey outlines, chequered);
# position, angle, size, colours, clutter and noise vary. So `demo` goes from pictures to sketches.
SHAPES_SIZE, SHAPES_TRAIN, SHAPES_TEST = 16, 400, 100  # pixels a side, images a class


def draw_shapes(per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """x (32 * per_class, 3, 16, 16) uint8 and y int64."""
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(32), per_class)
    n, size = len(y), SHAPES_SIZE

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, (n, *shape)).astype(np.float32)

    grid = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    angle, radius, shift = uniform(0, 2 * np.pi, 1, 1), uniform(0.55, 0.85, 1, 1), uniform(-0.2, 0.2, 2, 1, 1)
    dx, dy = (grid[None, None, :] - shift[:, 0]) / radius, (grid[None, :, None] - shift[:, 1]) / radius
    u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    r, theta = np.hypot(u, v), np.arctan2(v, u)
    au, av = np.abs(u), np.abs(v)
    contours = [  # negative inside
        lambda i: r[i] - 0.9,  # disc
        lambda i: np.maximum(au[i], 2.2 * av[i]) - 1,  # bar
        lambda i: r[i] * np.cos((theta[i] + np.pi) % (2 * np.pi / 3) - np.pi / 3) - 0.55,  # triangle
        lambda i: np.maximum(au[i], av[i]) - 0.8,  # square
        lambda i: r[i] - 0.7 - 0.3 * np.cos(5 * theta[i]),  # star
        lambda i: np.minimum(np.maximum(au[i], 3 * av[i]), np.maximum(av[i], 3 * au[i])) - 1,  # cross
        lambda i: np.maximum(r[i] - 1, 0.75 - np.hypot(u[i] - 0.6, v[i])),  # crescent
        lambda i: r[i] - 0.65 - 0.35 * np.cos(3 * theta[i]),  # trefoil
    ]
    textures = [  # negative where painted
        lambda i, f: f,
        lambda i, f: np.maximum(f, np.sin(9 * u[i])),  # stripes
        lambda i, f: np.maximum(f, -f - 0.35),  # outline
        lambda i, f: np.maximum(f, np.sin(7 * u[i]) * np.sin(7 * v[i])),  # chequers
    ]
    mask = np.empty((n, size, size), np.float32)
    for c in range(32):
        i = y == c
        mask[i] = textures[c // 8](i, contours[c % 8](i))
    mask = np.clip(0.5 - mask * radius * (size / 4), 0, 1)[:, None]  # soft edges
    ground, paint = uniform(0, 1, 3, 1, 1), uniform(0, 1, 3, 1, 1)
    paint = np.where(np.abs(paint - ground) < 0.25, (ground + 0.5) % 1, paint)
    sketch, grey = (y // 8 == 2)[:, None, None, None], uniform(0, 1, 1, 1, 1)
    ground = np.where(sketch, grey, ground)
    paint = np.where(sketch, (grey + uniform(0.35, 0.65, 1, 1, 1)) % 1, paint)
    x = ground + uniform(-0.3, 0.3, 3, 1, 1) * grid[None, None, None, :] + uniform(-0.3, 0.3, 3, 1, 1) * grid[:, None]
    for _ in range(3):  # clutter: small discs under the shape
        cx, cy, cr = uniform(-1, 1, 1, 1, 1), uniform(-1, 1, 1, 1, 1), uniform(0.1, 0.3, 1, 1, 1)
        disc = np.hypot(grid[None, None, None, :] - cx, grid[:, None] - cy) < cr
        x = np.where(disc, uniform(0, 1, 3, 1, 1), x)
    x = x * (1 - mask) + paint * mask
    x = np.where(sketch, x.mean(1, keepdims=True), x)
    x = x + rng.normal(0, 0.08, x.shape).astype(np.float32)
    return (np.clip(x, 0, 1) * 255).astype(np.uint8), y


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Crop (an eighth of the side as padding) and flip each image by itself. (B, 3, H, W) uint8 -> the same."""
    b, _, height, width = images.shape
    pad, device = max(1, height // 8), images.device
    padded = F.pad(images, (pad, pad, pad, pad))
    top, left, flip = (torch.randint(0, high, (b, 1), generator=generator, device=device)
                       for high in (2 * pad + 1, 2 * pad + 1, 2))
    rows = top + torch.arange(height, device=device)  # (B, H)
    columns = torch.arange(width, device=device).expand(b, -1)
    columns = left + torch.where(flip == 1, width - 1 - columns, columns)  # (B, W)
    index = torch.arange(b, device=device)[:, None, None]
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def normalise(images: Tensor) -> Tensor:
    """uint8 -> float32 about [-2, 2]. Constants, so that no task's statistics reach a model that never saw it."""
    return (images.float() - 127.5) / 63.75


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
        torch.manual_seed(seed)
        return ResNet(*NETWORKS[network]).to(device)


def new_head(features: int, classes: int, generator: torch.Generator) -> nn.Linear:
    """nn.Linear's own initialisation, from `generator`, on its device."""
    head, bound = nn.Linear(features, classes, device=generator.device), features**-0.5
    with torch.no_grad():
        head.weight.uniform_(-bound, bound, generator=generator)
        head.bias.uniform_(-bound, bound, generator=generator)
    return head


@contextlib.contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm in training mode normalises by the batch and leaves its running statistics alone. Source
    images pass only so: the scrubbed model's statistics come from target data."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    try:
        for m in norms:
            m.track_running_stats = False
        yield
    finally:
        for m in norms:
            m.track_running_stats = True


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
    watch: "Watch",
) -> None:
    """Run a stage. `loss_terms(step, generator)` backpropagates and returns the loss's terms for the log. The
    generator is seeded anew by (seed, step): a stage resumes from its step number, parameters and momentum alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
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
            optimizer.param_groups[0]["lr"] = schedule.lr_at(step)
            optimizer.zero_grad()
            try:
                terms = loss_terms(step, generator.manual_seed(stream(seed, step)))
            except ValueError as error:  # the GC loss looks for itself whether it is finite
                raise DTLError(f"{watch.name}: step {step} of {schedule.steps}: {error}") from error
            terms["gradient"] = nn.utils.clip_grad_norm_(parameters, schedule.clip).item()
            if not all(map(math.isfinite, terms.values())):
                raise DTLError(f"{watch.name}: step {step} of {schedule.steps} is not finite: {show(terms)}; a smaller "
                               "weight or learning rate may help")
            optimizer.step()
            advance(1)
            watch.step(step + 1, schedule.steps, terms,
                       lambda: dict(model=model.state_dict(), optimizer=optimizer.state_dict()))
    model.eval()


def batch(task: Task, size: int, step: int, seed: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Step `step`'s images (B, 3, H, W), augmented and normalised, and labels (B,): every epoch in a new order."""
    size = min(size, len(task.y))
    epoch, k = divmod(step, len(task.y) // size)
    index = epoch_order(len(task.y), stream(seed, "epoch", epoch))[k * size : (k + 1) * size].to(task.y.device)
    return normalise(augment(task.x[index], generator)), task.y[index]


@functools.lru_cache(maxsize=4)
def epoch_order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def learn(backbone: ResNet, task: Task, schedule: Schedule, seed: int, watch: "Watch",
          inspect_at: Sequence[int] = ()) -> Model:
    """A new head on the backbone, then cross entropy over the whole network (the backbone is changed in place). The
    statistics of chunk gradients are noted at the steps `inspect_at`."""
    head = new_head(backbone.features, task.classes, torch.Generator(task.x.device).manual_seed(stream(seed, "head")))
    model = Model(backbone, head)

    def loss_terms(step: int, generator: torch.Generator) -> dict[str, float]:
        x, y = batch(task, schedule.batch_size, step, seed, generator)
        if step in inspect_at:
            watch.note(step, chunk_statistics(model, x, y))
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return {"loss": loss.item()}

    optimise(model, loss_terms, schedule, seed, watch)
    return model


def pretrain(source: Task, network: str, schedule: Schedule, seed: int, watch: "Watch") -> Model:
    """Stage 1: random backbone, source task. (On the target task it makes the references scratch and oracle.)"""
    return learn(new_backbone(network, stream(seed, "backbone"), source.x.device), source, schedule, seed, watch)


def transfer(pretrained: Model, target: Task, schedule: Schedule, seed: int, watch: "Watch") -> Model:
    """Stage 2: the pretrained backbone, a new head, the whole network on the target task."""
    return learn(copy.deepcopy(pretrained.backbone), target, schedule, seed, watch)


def dispose(
    transferred: Model, source_head: nn.Linear, source: Task, target: Task, method: str, schedule: Schedule, seed: int,
    watch: "Watch", *, network: str, retain: str = "distill", temperature: float = 4.0, retain_weight: float = 1.0,
    forget_weight: float = 30.0, similarity: str = "dot", gc_head: str = "fresh", chunks: int = 4, chunk_size: int = 32,
) -> Model:
    """Stage 3: minimise retain_weight * L_retain(target) + forget_weight * L_forget(source) from the transferred
    model, or from a fresh backbone if the method says so. Returns the scrubbed model; its arguments stay as they are.
    """
    forget, fresh = METHODS[method].forget, METHODS[method].fresh
    device = target.x.device
    teacher, original_head = frozen(transferred), frozen(source_head)
    stranger = frozen(Model(new_backbone(network, stream(seed, "stranger"), device), copy.deepcopy(source_head)))
    if fresh:
        backbone = new_backbone(network, stream(seed, "student"), device)
        generator = torch.Generator(device).manual_seed(stream(seed, "student head"))
        student = Model(backbone, new_head(backbone.features, target.classes, generator))
    else:
        student = copy.deepcopy(transferred)

    def loss_terms(step: int, generator: torch.Generator) -> dict[str, float]:
        x, y = batch(target, schedule.batch_size, step, seed, generator)
        if retain == "ce" and not fresh:
            loss = F.cross_entropy(student(x), y)
        else:
            loss = distillation(student(x), teacher(x), temperature)
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
                terms["forget"] = gradient_collision(student.backbone, head, x, y, similarity, chunks, forget_weight)
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


def piggyback(backbone: ResNet, task: Task, schedule: Schedule, seed: int, watch: "Watch") -> float:
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
# Disposal methods. A forget loss sees the student's logits (B, source classes) on source images through the stored
# source head (frozen: a head that could be trained would do the forgetting itself), their labels (B,), and how to get
# the logits of the transferred model and of a random one. OUR READING of each rival is this table; the GC loss goes
# through a head of its own.


def gradient_collision(backbone, head, x, y, similarity, chunks, weight) -> float:
    """GC over the backbone and the head in use: adds weight * dGC to the backbone's gradients, returns GC."""
    losses = [functools.partial(lambda x, y: F.cross_entropy(head(backbone(x)), y), *part)
              for part in zip(x.chunk(chunks), y.chunk(chunks))]
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
# Seeds, checkpoints, log


def stream(*names: object) -> int:
    """A seed of 63 bits for what `names` name: independent of whatever ran before."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:8], "big") >> 1


def digest(value: Any) -> str:
    """sha256 of nested dicts and lists of tensors, numbers and strings."""
    found = hashlib.sha256()

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            array = value.detach().cpu().contiguous().numpy()
            found.update(f"tensor {array.dtype} {array.shape}".encode())
            found.update(array.tobytes())
        elif isinstance(value, dict):
            found.update(f"dict {len(value)}".encode())
            for key, item in value.items():
                visit(key), visit(item)
        elif isinstance(value, (list, tuple)):
            found.update(f"list {len(value)}".encode())
            for item in value:
                visit(item)
        else:
            found.update(f"{type(value).__name__} {value!r};".encode())

    visit(value)
    return found.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """All of `data` at `path`, or what was there before."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise DTLError(f"cannot write {path}: {error.strerror}; what was saved before stands: mend that and run the same "
                       "command again") from None


def save(path: Path, state: dict) -> None:
    buffer = io.BytesIO()
    torch.save({"state": state, "sha256": digest(state)}, buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path, device: torch.device) -> dict | None:
    """The state saved at `path`; None if there is none, or, with a warning, if it is damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        file = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
        if digest(file["state"]) == file["sha256"]:
            return file["state"]
        reason = "its checksum does not match"
    except Exception as error:  # whatever a damaged archive makes the reader raise
        reason = f"unreadable, {type(error).__name__}"
    click.echo(f"warning: checkpoint {path} is damaged ({reason}); making it anew", err=True)
    return None


class Watch:
    """What a stage tells the world: its progress bar, its log rows, its saves."""

    def __init__(self, name: str, path: Path | None = None, device: torch.device = torch.device("cpu"),
                 save_every: float = 30.0, log: Callable[[dict], None] = lambda row: None) -> None:
        self.name, self.device, self.save_every, self.log = name, device, save_every, log
        self.path = path and path.with_suffix(".part.pt")
        self.began = self.saved = time.monotonic()
        self.saved_step = self.at = 0
        self.notes: list[dict[str, float]] = []  # kept with the stage's result

    def resume(self) -> dict | None:
        self.began = self.saved = time.monotonic()  # now, after whatever the stage had to wait for
        saved = self.path and load(self.path, self.device)
        self.saved_step, self.notes = (saved["step"], saved["notes"]) if saved else (0, [])
        return saved

    @contextlib.contextmanager
    def bar(self, first: int, steps: int) -> Iterator[Callable[[int], None]]:
        self.at = first
        try:
            if sys.stderr.isatty():
                with click.progressbar(length=steps, label=f"{self.name:<42}", file=sys.stderr, update_min_steps=5) as bar:
                    bar.update(first)
                    yield bar.update
            else:
                yield lambda steps: None
        except KeyboardInterrupt:
            kept = f"saved up to step {self.saved_step}" if self.saved_step else "nothing of this stage saved yet"
            raise KeyboardInterrupt(f"{self.name} was at step {self.at} of {steps}, {kept}") from None

    def step(self, done: int, steps: int, terms: dict[str, float], state: Callable[[], dict]) -> None:
        self.at = done
        if done == steps or done % max(1, steps // 10) == 0:
            self.log(dict(stage=self.name, step=done, steps=steps, seconds=round(time.monotonic() - self.began, 2), **terms))
        if self.path and done < steps and time.monotonic() - self.saved >= self.save_every:
            save(self.path, state() | {"step": done, "notes": self.notes})
            self.saved, self.saved_step = time.monotonic(), done

    def note(self, step: int, statistics: dict[str, float]) -> None:
        self.notes.append({"step": step} | statistics)
        self.log({"stage": self.name, "noted": step} | statistics)


def show(terms: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in terms.items())


class Results:
    """OUT/results.jsonl: one line a measurement. A line cut short by a crash is passed over and measured again."""

    def __init__(self, out: Path) -> None:
        self.path = out / "results.jsonl"

    def read(self, config: str | None = None) -> list[dict]:
        if not self.path.exists():
            return []
        records = {}
        for line in self.path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
                record = json.loads(line)
                if config in (None, record["config"]):
                    records[self.identity(record)] = record
        return list(records.values())

    @staticmethod
    def identity(record: dict) -> tuple:
        return tuple(record.get(k) for k in ("config", "seed", "model", "metric", "task", "step"))

    def append(self, records: list[dict]) -> None:
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        append(self.path, ("\n" if torn else "") + "".join(json.dumps(record) + "\n" for record in records))


def append(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(text)
    except OSError as error:
        raise DTLError(f"cannot write {path}: {error.strerror}; mend that and run the same command again") from None


# ----------------------------------------------------------------------------------------------------------------------
# The experiment: every model by name, made once, kept under everything it depends on


RECIPE = 1  # raised when a change of this file changes what a stage computes: older checkpoints then no longer fit


class Experiment:
    """One seed of one config."""

    def __init__(self, config: Config, seed: int, device: torch.device, out: Path, data_dir: Path,
                 save_every: float = 30.0) -> None:
        self.config, self.seed, self.device, self.out, self.data_dir = config, seed, device, out, data_dir
        self.save_every, self.results = save_every, Results(out)
        own = {Path(parse_task(task)["set"]) for task in (config.source, config.target, config.downstream)}
        files = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(own) if path.is_file()]  # a user's .npz
        self.config_hash = digest([asdict(config), *self.environment(), *files])[:10]
        self.models: dict[str, Model] = {}
        self.printed = 0.0

    def environment(self) -> list:
        return [RECIPE, torch.__version__, self.device.type]

    @functools.cache
    def task(self, name: str) -> Task:
        """`source`, `target`, `source-subset`, `downstream`, or `target@N` with N images a class."""
        c = self.config
        spec = {"source": c.source, "target": c.target, "downstream": c.downstream}.get(name)
        if name == "source-subset":
            spec = f"{c.source.split('@')[0]}@{c.subset_per_class}"
        elif name.startswith("target@"):
            spec = f"{c.target.split('@')[0]}@{name.split('@')[1]}"
        return load_task(spec, c, self.seed, self.data_dir, self.device)

    def check_tasks(self) -> dict[str, Task]:
        tasks = {name: self.task(name) for name in ("source", "target", "source-subset", "downstream")}
        sizes = {name: tuple(task.x.shape[2:]) for name, task in tasks.items()}
        if len(set(sizes.values())) > 1:
            raise DTLError(f"the tasks' images differ in size ({sizes}): give --image-size N to bring them to one")
        return tasks

    def schedule(self, steps: int, lr: float) -> Schedule:
        return Schedule(steps, lr, self.config.batch_size, self.config.weight_decay, self.config.clip)

    def recipe(self, name: str) -> tuple[list, Callable[[Watch], Model | float]]:
        """(what the stage's result depends on, how to make it). Nothing is loaded or trained until it is called."""
        c, seed = self.config, self.seed
        if name == "random":
            return [], lambda watch: Model(new_backbone(c.network, stream(seed, "random"), self.device),
                                           new_head(1, 2, torch.Generator(self.device)))
        if name == "pretrained":
            task, schedule = self.task("source"), self.schedule(c.pretrain_steps, c.pretrain_lr)
            return [task.fingerprint, schedule], lambda watch: pretrain(
                task, c.network, schedule, stream(seed, "pretrain"), watch)
        if name == "scratch" or name.startswith("target@"):
            task = self.task("target" if name == "scratch" else name)
            schedule = self.schedule(c.fresh_steps, c.fresh_lr)
            return [task.fingerprint, schedule], lambda watch: pretrain(
                task, c.network, schedule, stream(seed, "scratch"), watch)
        if name == "transferred":
            task, schedule = self.task("target"), self.schedule(c.transfer_steps, c.transfer_lr)
            return [self.key("pretrained"), task.fingerprint, schedule], lambda watch: transfer(
                self.model("pretrained"), task, schedule, stream(seed, "transfer"), watch)
        if name.startswith("disposed:"):
            method = METHODS[name.removeprefix("disposed:")]
            if method.fresh:
                schedule = self.schedule(c.fresh_steps, c.fresh_lr)
            else:
                schedule = self.schedule(c.dispose_steps, c.dispose_lr)
            options = dict(network=c.network, temperature=c.temperature, retain_weight=c.retain_weight)
            options |= {} if method.fresh else {"retain": c.retain}
            if method.forget is not None or method.fresh:
                options |= dict(chunks=c.chunks, chunk_size=c.chunk_size)
            if method.forget is not None:
                options |= dict(forget_weight=parse_weights(c.forget_weights)[name.removeprefix("disposed:")])
            if method.forget is gradient_collision:
                options |= dict(similarity=c.similarity, gc_head=c.gc_head)
            return [self.key("transferred"), schedule, options], lambda watch: dispose(
                self.model("transferred"), self.model("pretrained").head, self.task("source"), self.task("target"),
                name.removeprefix("disposed:"), schedule, stream(seed, "dispose"), watch, **options)
        victim, task = name.removeprefix("piggyback ").rsplit(" ", 1)
        schedule = self.schedule(c.attack_steps, c.attack_lr)
        return [self.key(victim), self.task(task).fingerprint, schedule], lambda watch: piggyback(
            self.model(victim).backbone, self.task(task), schedule, stream(seed, "piggyback", task), watch)

    @functools.cache
    def key(self, name: str) -> str:
        depends = [asdict(d) if isinstance(d, Schedule) else d for d in self.recipe(name)[0]]
        return digest([*self.environment(), name, self.seed, self.config.network, depends])

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
        """`random`, `pretrained`, `scratch`, `target@N`, `transferred`, `oracle`, `disposed:METHOD`."""
        if name not in self.models:
            state = self.stage(name)
            backbone = new_backbone(self.config.network, 0, self.device)
            classes, features = state["head"]["weight"].shape
            model = Model(backbone, nn.Linear(features, classes, device=self.device)).eval()
            backbone.load_state_dict(state["backbone"])
            model.head.load_state_dict(state["head"])
            self.models[name] = model
        return self.models[name]

    def oracle(self) -> str | None:
        """The model `target@N` of least N (growing by halves) that reaches the target accuracy of `transferred` from
        target data alone; None if the set has too few images. Zero of the normalised leak."""
        aim = self.measure("transferred", "target_accuracy")
        if self.measure("scratch", "target_accuracy") >= aim:
            return "scratch"
        n = int(parse_task(self.config.target)["per_class"] or 0)
        while n:
            n = math.ceil(n * 1.5)
            try:
                self.task(f"target@{n}")
            except DTLError:  # the set has no more
                return None
            if self.measure(f"target@{n}", "target_accuracy") >= aim:
                return f"target@{n}"

    def measure(self, model: str, metric: str, task: str | None = None) -> float | None:
        """A measurement, from results.jsonl if it is there."""
        record = dict(seed=self.seed, model=model, metric=metric, task=task, config=self.config_hash)
        name = self.oracle() if model == "oracle" else model
        if name is None:
            return None
        if metric == "pl_accuracy":
            depends = [self.key(f"piggyback {name} {task}")]
        else:
            depends = [self.key(name), self.task(metric.split("_")[0]).fingerprint]
            depends += [self.key("pretrained")] if metric == "source_accuracy" else []
        record["key"] = digest(depends)[:12]  # of the very weights and images, should a file of that name have changed
        for known in self.results.read(self.config_hash):
            if Results.identity(known) == Results.identity(record) and known.get("key") == record["key"]:
                return known["value"]
        noted = []
        if metric == "pl_accuracy":
            state = self.stage(f"piggyback {name} {task}")
            value = state["value"]
            noted = [record | {"metric": statistic, "step": note["step"], "value": note[statistic]} for note in state["notes"]
                     for statistic in ("mean_cosine", "mean_dot", "collision_rate")]
        elif metric == "target_accuracy":
            value = accuracy(self.model(name), self.task("target"))
        else:  # source_accuracy, with the stored source head
            value = accuracy(Model(self.model(name).backbone, self.model("pretrained").head), self.task("source"))
        self.results.append([*noted, record | {"value": value} | ({"is": name} if model == "oracle" else {})])
        return value

    def log(self, row: dict) -> None:
        append(self.out / "log.jsonl", json.dumps({"config": self.config_hash} | row) + "\n")
        if "step" in row and (row["step"] == row["steps"] or time.monotonic() - self.printed > 20):
            self.printed = time.monotonic()
            terms = {k: v for k, v in row.items() if isinstance(v, float) and k != "seconds"}
            click.echo(f"{row['stage']:<46} {row['step']:>6}/{row['steps']:<6} {row['seconds']:>7.1f} s  {show(terms)}")


# ----------------------------------------------------------------------------------------------------------------------
# The report

PIGGYBACK_TASKS = ("source-subset", "downstream")
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% t-interval (nan for one value)."""
    n = len(values)
    if n < 2:
        return values[0], math.nan
    t = T_975[n - 2] if n - 2 < len(T_975) else 1.96 + 2.5 / (n - 1)  # within 0.003 of the quantile
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(n)


def summarise(records: list[dict]) -> dict[str, dict[str, list[float]]]:
    """model -> column -> one value a seed. Columns: target_accuracy, change, source_accuracy, and for each piggyback
    task `pl TASK` and `leak TASK` = (PL - zero) / (PL of transferred - zero), zero being oracle, or scratch."""
    value = {(r["seed"], r["model"], r["metric"], r["task"]): r["value"] for r in records}
    seeds = sorted({r["seed"] for r in records})
    zero_model = zero_of(records)
    rows: dict[str, dict[str, list[float]]] = {}

    def put(model: str, column: str, number: float | None) -> None:
        if number is not None:
            rows.setdefault(model, {}).setdefault(column, []).append(number)

    for model in REPORTED:
        for seed in seeds:
            for metric in ("target_accuracy", "source_accuracy"):
                put(model, metric, value.get((seed, model, metric, None)))
            before = value.get((seed, "transferred", "target_accuracy", None))
            after = value.get((seed, model, "target_accuracy", None))
            put(model, "change", None if before is None or after is None else after - before)
            for task in PIGGYBACK_TASKS:
                pl = value.get((seed, model, "pl_accuracy", task))
                put(model, f"pl {task}", pl)
                top = value.get((seed, "transferred", "pl_accuracy", task))
                zero = value.get((seed, zero_model, "pl_accuracy", task))
                if None not in (pl, top, zero) and top > zero:
                    put(model, f"leak {task}", (pl - zero) / (top - zero))
    return rows


def zero_of(records: list[dict]) -> str:
    """`oracle` if every seed has one, else `scratch`: a mean must not mix two zeros."""
    seeds = {model: {r["seed"] for r in records if r["model"] == model and r["metric"] == "pl_accuracy"}
             for model in ("oracle", "transferred")}
    return "oracle" if seeds["oracle"] >= seeds["transferred"] else "scratch"


def report(out: Path, config: str | None) -> str:
    """Write report.md (and report.png if matplotlib is there) of one config, the last run's by default."""
    runs = {}
    for path in out.glob("run-*.json"):
        try:
            run = json.loads(path.read_text())
            runs[run["config_hash"]] = run
        except (ValueError, KeyError, TypeError):
            click.echo(f"warning: {path} is damaged; passed over", err=True)
    if not runs:
        raise DTLError(f"--out {out}: no run to report; `python dtl.py all --out {out}` makes one")
    if config and config not in runs:
        raise DTLError(f"--config {config}: no such run in {out}; there are {', '.join(runs)}")
    run = runs[config] if config else max(runs.values(), key=lambda r: r["started"])
    records = Results(out).read(run["config_hash"])
    if not records:
        raise DTLError(f"--out {out}: nothing measured yet for config {run['config_hash']}")
    rows, seeds = summarise(records), sorted({r["seed"] for r in records})

    def cell(row: dict, column: str, percent: bool, sign: str = "") -> str:
        if column not in row:
            return "-"
        mean, half = interval(row[column])
        scale, digits = (100, 1) if percent else (1, 2)
        return f"{mean * scale:{sign}.{digits}f}" + ("" if math.isnan(half) else f" ± {half * scale:.{digits}f}")

    table = [["model", "target acc. %", "change", "source acc. %"]]
    for task in PIGGYBACK_TASKS:
        table[0] += [f"PL {task} %", f"leak {task}"]
    for model, row in rows.items():
        table.append([model, cell(row, "target_accuracy", True), cell(row, "change", True, "+"),
                      cell(row, "source_accuracy", True)])
        for task in PIGGYBACK_TASKS:
            table[-1] += [cell(row, f"pl {task}", True), cell(row, f"leak {task}", False)]
    widths = [max(len(r[i]) for r in table) for i in range(len(table[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(r, widths)) + " |" for r in table]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    c, versions = run["settings"], run["versions"]
    oracle = sorted({str(r["is"]) for r in records if r["model"] == "oracle" and "is" in r})
    text = "\n".join([
        f"source `{c['source']}`, target `{c['target']}`, piggyback `source-subset` (the source @{c['subset_per_class']}) and "
        f"`downstream` (`{c['downstream']}`); {c['network']}, image size {c['image_size'] or 'as stored'}; measured on "
        f"{c['split']} images.", "",
        f"Seeds {', '.join(map(str, seeds))}; mean" + (" ± 95% t-interval over seeds" if len(seeds) > 1 else "") +
        f"; leak: (PL - zero) / (PL of transferred - zero), zero: {zero_of(records)}"
        + (f" ({', '.join(oracle)})" if oracle else "") + ".",
        "PL and leak: lower is better; below zero means hard to train, not more forgotten.", "",
        *lines, "", *collision_table(records),
        f"`{run['command']}`, config {run['config_hash']}, revision {run['revision']}, Python {versions['python']}, "
        f"torch {versions['torch']}, {versions['device']}.", "",
    ])
    write_atomically(out / "report.md", text.encode())
    figure(out / "report.png", rows)
    return text


def collision_table(records: list[dict]) -> list[str]:
    """Mean cosine of the attacker's chunk gradients by attack step: near 0 or below, the collision holds; as high as
    that of `transferred` or `random`, the attacker has walked out of it."""
    steps = sorted({r["step"] for r in records if r["metric"] == "mean_cosine"})
    lines = []
    for model in REPORTED:
        cells = []
        for task in PIGGYBACK_TASKS:
            for step in steps:
                values = [r["value"] for r in records if r["metric"] == "mean_cosine"
                          and (r["model"], r["task"], r["step"]) == (model, task, step)]
                cells.append(f"{statistics.mean(values):.3f}" if values else "-")
        if set(cells) - {"-"}:
            lines.append(f"| {model} | " + " | ".join(cells) + " |")
    if lines:
        head = " | ".join(f"{task} step {step}" for task in PIGGYBACK_TASKS for step in steps)
        lines = ["Mean cosine between the gradients of 4 chunks of the attacker's batch, before these attack steps:", "",
                 f"| model | {head} |", "|---" * (1 + len(PIGGYBACK_TASKS) * len(steps)) + "|", *lines, ""]
    return lines


def figure(path: Path, rows: dict) -> None:
    """Target accuracy against PL accuracy, one panel a piggyback task; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    chart, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for panel, task in zip(panels, PIGGYBACK_TASKS):
        for i, (model, row) in enumerate(rows.items()):
            if f"pl {task}" not in row:
                continue
            (y, dy) = interval([100 * v for v in row[f"pl {task}"]])
            if "target_accuracy" not in row:
                panel.axhline(y, color="0.7", lw=1, ls=":")
                panel.annotate(model, (0.01, y), xycoords=("axes fraction", "data"), fontsize=7, color="0.4")
                continue
            (x, dx) = interval([100 * v for v in row["target_accuracy"]])
            panel.errorbar(x, y, np.nan_to_num(dy), np.nan_to_num(dx), marker="os^Dv<>ph*Xd"[i % 12], capsize=2, lw=1,
                           color="k" if model in REFERENCES else f"C{i % 10}")
            panel.annotate(model.removeprefix("disposed:"), (x, y), (4, 4), textcoords="offset points", fontsize=8)
        panel.set(xlabel="target accuracy, % (right is better)", ylabel="PL accuracy, % (down is better)", title=task)
    chart.savefig(path, dpi=120)
    pyplot.close(chart)


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def resolve_device(gpu: int | None) -> torch.device:
    if gpu is None:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DTLError(f"--gpu {gpu}: this PyTorch ({torch.__version__}) sees no CUDA device; install a CUDA build and "
                       "driver, or leave --gpu out to run on the CPU")
    if not 0 <= gpu < torch.cuda.device_count():
        raise DTLError(f"--gpu {gpu}: the CUDA devices here are numbered 0..{torch.cuda.device_count() - 1}")
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda", gpu)


def versions_of(device: torch.device) -> dict[str, str]:
    name = f"GPU {torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}" if device.type == "cuda" else (
        f"CPU, {torch.get_num_threads()} threads, {platform.machine()}")
    return {"dtl": __version__, "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "device": name}


def git_revision() -> str:
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, text=True, timeout=10,
                              capture_output=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def one_line_errors(command: Callable) -> Callable:
    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (DTLError, OSError) as error:
            raise click.ClickException(" ".join(str(error).split())) from None
        except torch.OutOfMemoryError as error:
            raise click.ClickException(f"out of GPU memory, try a smaller --batch-size: {str(error).splitlines()[0]}") from None
        except KeyboardInterrupt as interrupt:
            click.echo(f"\ninterrupted: {interrupt or 'between stages'}; finished stages are saved; the same command goes on "
                       "from there", err=True)
            sys.exit(130)

    return run


def parse_seeds(context: click.Context, option: click.Parameter, text: str) -> list[int]:
    try:
        seeds = [int(t) for t in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of whole numbers like 0,1,2") from None
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise click.BadParameter(f"{text!r}: seeds are whole numbers of at least 0, each once")
    return seeds


def parse_methods(context: click.Context, option: click.Parameter, text: str) -> list[str]:
    methods = [t.strip() for t in text.split(",")]
    if unknown := [m for m in methods if m not in METHODS]:
        raise click.BadParameter(f"no method {', '.join(map(repr, unknown))}; known: {', '.join(METHODS)}")
    return methods


out_option = click.option("--out", type=click.Path(path_type=Path), default="runs", envvar="DTL_OUT")
data_dir_option = click.option("--data-dir", type=click.Path(path_type=Path), default="data", envvar="DTL_DATA_DIR")


def experiment_options(command: Callable) -> Callable:
    for f in reversed(fields(Config)):
        kind = click.Choice(f.metadata["choices"]) if f.metadata["choices"] else f.type
        command = click.option("--" + f.name.replace("_", "-"), f.name, type=kind, help=f.metadata["doc"] + ".")(command)
    for option in (
        click.option("--save-every", default=30.0, help="Seconds between saves within a stage.", show_default=True),
        data_dir_option,
        out_option,
        click.option("--methods", default=",".join(METHODS), callback=parse_methods, show_default=True,
                     help="Disposal methods."),
        click.option("--seeds", default="0", callback=parse_seeds, help="Seeds, as in 0,1,2.", show_default=True),
        click.option("--gpu", type=int, help="CUDA device; the CPU if left out."),
        click.option("--preset", type=click.Choice(list(PRESETS)), help="Default: demo, or cifar with --gpu."),
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
        save_every: float, **given: Any) -> None:
    preset = preset or ("demo" if gpu is None else "cifar")
    settings = PRESETS[preset] | {k: v for k, v in given.items() if v is not None}
    if given["forget_weights"]:
        settings["forget_weights"] = PRESETS[preset].get("forget_weights", "") + "," + given["forget_weights"]
    config, device = Config(**settings), resolve_device(gpu)
    experiments = [Experiment(config, seed, device, out, data_dir, save_every) for seed in seeds]
    models = {"pretrain": ["pretrained"], "transfer": ["transferred"]}.get(stage, [f"disposed:{m}" for m in methods])
    if stage == "piggyback":
        models = ["transferred", *models]
    elif stage == "all":
        models = [*REFERENCES, *models]

    versions, revision, tasks = versions_of(device), git_revision(), experiments[0].check_tasks()
    command = "python dtl.py " + " ".join(sys.argv[1:])
    click.echo(f"{command}\nrevision {revision}, Python {versions['python']}, torch {versions['torch']}, "
               f"{versions['device']}\npreset {preset}, seeds {seeds}, config {experiments[0].config_hash}\n"
               f"native routine: {native_routine()[1]}")
    for name, value in asdict(config).items():
        click.echo(f"  {name:<18} {value}")
    for name, task in tasks.items():
        click.echo(f"  {name:<18} {len(task.y)} training, {len(task.y_test)} {config.split} images, {task.classes} classes, "
                   f"{task.x.shape[2]}x{task.x.shape[3]}")
    run_record = dict(command=command, started=time.time(), config_hash=experiments[0].config_hash, preset=preset,
                      seeds=seeds, methods=methods, settings=asdict(config), versions=versions, revision=revision,
                      data={})
    for experiment in experiments:
        run_record["data"][experiment.seed] = {n: t.fingerprint for n, t in experiment.check_tasks().items()}
    path = out / f"run-{experiments[0].config_hash}.json"
    for stale in out.rglob("*.tmp"):  # of writes that were killed
        if time.time() - stale.stat().st_mtime > 3600:
            stale.unlink(missing_ok=True)
    write_atomically(path, json.dumps(run_record, indent=1).encode())
    for experiment in experiments:
        for model in models:
            if model not in ("random", "pretrained"):
                experiment.measure(model, "target_accuracy")
            if model in ("pretrained", "transferred") or model.startswith("disposed:"):
                experiment.measure(model, "source_accuracy")
            for task in PIGGYBACK_TASKS if stage in ("piggyback", "all") else ():
                experiment.measure(model, "pl_accuracy", task)
        experiment.models.clear()
        experiment.task.cache_clear()
    click.echo("\n" + report(out, experiments[0].config_hash))
    click.echo(f"wrote {out / 'report.md'}, {out / 'results.jsonl'}, {path}")


for _stage, _help in STAGES.items():
    main.command(_stage, help=_help)(experiment_options(one_line_errors(functools.partial(run, _stage))))


@main.command("report", help="The tables again, from what is in --out.")
@out_option
@click.option("--config", help="Hash of the run to report; the last one if left out.")
@one_line_errors
def report_command(out: Path, config: str | None) -> None:
    click.echo(report(out, config))


@main.command("data", help="Fetch and verify CIFAR-10 and CIFAR-100.")
@data_dir_option
@one_line_errors
def data_command(data_dir: Path) -> None:
    for name in ARCHIVES:
        x, y, x_test, y_test = read_archive(name, data_dir)
        click.echo(f"{name}: {len(y)} training and {len(y_test)} test images in {data_dir / ARCHIVES[name][2]}")


@main.command(help="Time and memory of the GC loss beside a plain SGD step (or --native: of the C routine beside torch).")
@click.option("--gpu", type=int, help="CUDA device; the CPU if left out.")
@click.option("--network", type=click.Choice(list(NETWORKS)), default="resnet8")
@click.option("--native", is_flag=True, help="The statistics of chunk gradients instead.")
@one_line_errors
def bench(gpu: int | None, network: str, native: bool) -> None:
    try:
        import dtl_bench
    except ImportError:
        raise DTLError("bench: dtl_bench.py is not beside dtl.py; it comes with the repository") from None
    dtl_bench.native() if native else dtl_bench.loss(network, resolve_device(gpu))


if __name__ == "__main__":
    main(prog_name="dtl.py")
