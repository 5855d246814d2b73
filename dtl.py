#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0", "click==8.5.1",
#     "numpy==2.4.6; python_version >= '3.11'", "numpy==2.2.6; python_version < '3.11'",
# ]
# ///
"""Disposable Transfer Learning (DTL) in one file: pretrain, transfer, dispose, piggyback.

Koh, Shon, Lee, Hong, Kim: "Disposable Transfer Learning for Selective Source Task Unlearning", ICCV 2023,
arXiv 2308.09971. A network is pretrained on a source task and transferred to a target task; then the source
knowledge is disposed of with the Gradient Collision (GC) loss, and the target task kept. Whether that worked
is measured by piggyback learning (PL): an attacker retrains the scrubbed model on a subset of the source
data, or on new downstream data, and the accuracy reached is the PL accuracy. Lower is better.

    python dtl.py all              # no GPU, no download: a minute or two on a laptop
    python dtl.py all --gpu 0      # CIFAR-100 -> CIFAR-10, ResNet-18
    python dtl.py audit            # five attackers instead of one, the strongest on each model counts

In the order of the paper: the loss, statistics of gradients, configuration, data, networks, the one loop that
trains, the stages, disposal methods and attackers, models by name, the report, the command line.

EVIDENCE (CIFAR-100 classes 0..79 -> 500 images of CIFAR-10, 16x16 pixels, 8-layer ResNet of width 32; preset
cifar-cpu, float32, on a GPU, torch 2.11.0; weights by one rule on validation images of seeds 100 to 102, then
test images of seeds 5 to 9; 95% bootstrap). PL: accuracy of the strongest of six attackers, a sceptic's among
them. Leak: 0 as a model as good on the target that never saw the source, 1 as `transferred`.

                         target %  source subset: PL %, leak    downstream: PL %, leak
    oracle               56.3      36.1    0.00                 58.7    0.00
    transferred          58.6      49.2    1.00                 66.1    1.00
    uniform              58.8      44.8    0.66 (0.61, 0.71)    63.1    0.59 (0.46, 0.73)
    gc                   59.6      47.6    0.88 (0.84, 0.91)    65.6    0.94 (0.81, 1.07)
    distill-fresh        58.1      42.2    0.47 (0.43, 0.50)    63.4    0.64 (0.48, 0.83)
    random-labels-fresh  55.2      37.7    0.12 (0.04, 0.20)    60.8    0.28 (0.09, 0.47)
    uniform-fresh        57.8      41.3    0.40 (0.33, 0.48)    62.3    0.48 (0.34, 0.64)
    gradient-norm-fresh  57.7      41.0    0.37 (0.31, 0.42)    62.6    0.52 (0.34, 0.73)
    gc-fresh             57.8      41.4    0.41 (0.36, 0.45)    62.3    0.48 (0.33, 0.66)

So from the transferred weights nothing is erased, and GC gives away more than uniform labels. Into a fresh
backbone GC takes 0.8 (0.1, 1.4) points from the attacker on the source subset beside the same distillation
without it, and 1.2 (0.2, 2.2) on new data; at the same target accuracy uniform labels and a plain penalty on
the norm of the source gradient do as well. In the mean over batches GC by inner products is the square of
that norm: it asks for a small source gradient, and nothing shows that collision adds to it.
"Resists these attackers up to this budget", never "erased": one that trains for longer, or is stronger still,
gets more out of it. Everything measured, and what it took: experiments/README.md. No official code is public;
what the abstract leaves open is marked OUR READING below, and no number here is the paper's.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while torch is being imported is one line, too
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"\ninterrupted\n"), os._exit(130)))

import base64
import copy
import functools
import hashlib
import http.client
import io
import json
import pickle
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import click
import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

__version__ = "0.2.0"


# ------------------------------- The Gradient Collision loss -------------------------------
# For copying into other projects: it needs torch and nothing else of this file.

# --- copy from here ---
import contextlib
import math
import warnings

import torch
from torch.utils.checkpoint import get_device_states, set_device_states


def gradient_collision_loss(losses, params, *, similarity="dot"):
    """Gradient Collision (GC) loss: how far the gradients of chunks of a source batch point the same way.

        g_i = d losses[i] / d params, one vector;  u_i = g_i (dot) or g_i/|g_i| (cos);        i = 1..n
        GC  = 2/(n(n-1)) * sum_{i<j} <u_i, u_j>                      cos: in [-1/(n-1), 1]

    Minimise it together with a loss that keeps the target task: positive is agreement, negative collision.
    dot: |mean g_i|^2 = (1 - 1/n) GC + mean |g_i|^2 / n, and the mean of GC over independent chunks is the
    squared norm of the source loss's own gradient; cos looks at directions alone.
    losses: n >= 2 tensors (), each with its graph. params: bfloat16, float32 or float64 tensors on one
    device; one given twice (tied weights) counts once, one that a loss does not touch is a zero gradient, a
    zero gradient has cosine 0. Returns a tensor (), differentiable by params, without host synchronisation;
    not finite where gradients are not. Sums are float64 where the device has it. Takes about three plain
    steps, and memory that grows with n. BatchNorm and dropout mode are the caller's. ValueError, with what
    was seen, for all else. Source: Koh et al., ICCV 2023, arXiv 2308.09971; cosine or dot, and the example's
    fresh head, are this project's reading.

        head = nn.Linear(features, classes)  # random anew at every step: a trained head does not unlearn
        losses = [F.cross_entropy(head(backbone(x)), y) for x, y in zip(source_x.chunk(4), source_y.chunk(4))]
        forget = gradient_collision_loss(losses, [*backbone.parameters(), *head.parameters()])
        (retain_loss + 30.0 * forget).backward()
        optimizer.step()
    """
    losses, params = _gc_arguments(losses, params, similarity, 2)
    value = total = 0  # total: S so far, (p,): every pair is counted once, and nothing cancels
    for i, loss in enumerate(losses):
        u = _gc_vector(loss, params, similarity, i, create_graph=True)
        value, total = value + _gc_inner(u, total), total + u
    return (value * (2 / (len(losses) * (len(losses) - 1)))).to(total.dtype)


def gradient_collision_backward(chunk_losses, params, *, similarity="dot", weight=1.0, group=None,
                                preserve_rng_state=True):
    """The same loss in the memory of one chunk: adds weight * dGC/dparams to each `.grad` and returns GC.

        dGC = 2/(n(n-1)) * sum_i (du_i/dparams)^T (S - u_i),      S = sum_i u_i;   S and u_i held constant

    chunk_losses: n >= 2 callables without arguments, each computing its chunk's loss and all of its graph.
    Each is called twice, the second time under torch's random state of the first, so that dropout masks
    agree; draw from a generator of your own outside: with another draw S - u_i holds the difference of the
    two, a bias. params are leaves; weight is a finite number, or a tensor () that is not looked at. Takes
    about four plain steps; if it raises, `.grad` may hold part of the sum. preserve_rng_state: False leaves
    the device's random state alone, which cannot be read under CUDA graph capture: then nothing random may
    be inside. group: a torch.distributed group over whose ranks the chunks are spread (one all_reduce of S).
    GC is of all chunks then, and the MEAN over ranks of what is added to `.grad` is weight * dGC: what
    DistributedDataParallel takes. Call this before the retain loss's forward and backward through the DDP
    module; after that forward its hooks would reduce GC's gradients early, without a word.

    Does not work with, and the way out:
      scaled_dot_product_attention    sdpa_kernel(SDPBackend.MATH) around it, or attn_implementation="eager"
      torch.compile                   pass the uncompiled model, or torch.compiler.set_stance("force_eager")
      reentrant checkpointing         checkpoint(..., use_reentrant=False)
      LSTM and GRU on CUDA            torch.backends.cudnn.flags(enabled=False) around it
      FSDP                            unsharded parameters, and `group`
      DistributedDataParallel         its inner module, ddp.module, and `group`
      hooks that step the optimiser   step it yourself: gradients arrive chunk by chunk
      BatchNorm's running statistics  running_statistics_kept(model) around the call: two calls update twice

        head = nn.Linear(features, classes)  # random anew at every step
        data = zip(source_x.chunk(8), source_y.chunk(8))
        chunks = [lambda x=x, y=y: F.cross_entropy(head(backbone(x)), y) for x, y in data]
        gradient_collision_backward(chunks, [*backbone.parameters(), *head.parameters()], weight=30.0)
        retain_loss.backward(), optimizer.step()
    """
    ranks = 1 if group is None else torch.distributed.get_world_size(group)
    chunk_losses, params = _gc_arguments(chunk_losses, params, similarity, 2 if ranks == 1 else 1, weight)
    value, total, random_states, n = 0, 0, [], len(chunk_losses)
    for i, chunk_loss in enumerate(chunk_losses):
        of_device = get_device_states(params[0]) if preserve_rng_state else ([], [])
        random_states.append((torch.get_rng_state(), *of_device))
        u = _gc_vector(chunk_loss(), params, similarity, i)
        value, total = value + _gc_inner(u, total), total + u
    if group is not None:  # the pairs of all of S, but those within a rank, which are in `value`
        numbers = value - _gc_inner(total, total) / 2
        numbers = torch.stack([numbers, torch.full_like(numbers, n)])
        for tensor in (total, numbers):
            torch.distributed.all_reduce(tensor, group=group)
        value, n = numbers[0] + _gc_inner(total, total) / 2, numbers[1]
    scale, device_type = 2 / (n * (n - 1)), params[0].device.type.replace("cpu", "cuda")
    for i, (chunk_loss, (cpu_state, devices, states)) in enumerate(zip(chunk_losses, random_states)):
        with torch.random.fork_rng(devices, device_type=device_type):
            torch.set_rng_state(cpu_state)
            set_device_states(devices, states, device_type=device_type)
            u = _gc_vector(chunk_loss(), params, similarity, i, create_graph=True)
        if u.requires_grad:  # it does not where the loss is linear in params
            pull = (total - u.detach()) * (weight * ranks * scale)
            torch.autograd.backward(u, pull.to(u.dtype), inputs=params)
    return (value * scale).to(total.dtype)


@contextlib.contextmanager
def running_statistics_kept(model):
    """Inside, BatchNorm in training mode normalises by the batch and leaves its running statistics alone."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    tracked = [m.track_running_stats for m in norms]
    try:
        for m in norms:
            m.track_running_stats = False
        yield
    finally:
        for m, before in zip(norms, tracked):
            m.track_running_stats = before


def _gc_arguments(chunks, params, similarity, least, weight=None):
    """chunks and params as checked lists; with a weight, those of the streamed form."""
    if not torch.is_grad_enabled():
        raise ValueError("called under no_grad or inference_mode: the GC loss would have no gradient")
    if similarity not in ("dot", "cos"):
        raise ValueError(f"similarity must be 'dot' or 'cos', not {similarity!r}")
    for name, given in (("chunks", chunks), ("params", params)):
        if isinstance(given, (torch.Tensor, dict, str)) or not hasattr(given, "__iter__"):
            raise ValueError(f"{name} must be a sequence, not one {type(given).__name__}")
    chunks, params = list(chunks), list(params)
    for k, p in enumerate(params):
        if not isinstance(p, torch.Tensor):
            raise ValueError(f"params[{k}] is a {type(p).__name__}, not a tensor: give model.parameters()")
        if p.dtype not in (torch.bfloat16, torch.float32, torch.float64) or p.device != params[0].device:
            raise ValueError(f"params[{k}] is {p.dtype} on {p.device}, not bfloat16, float32/64 on 1 device")
        if not p.requires_grad:
            raise ValueError(f"params[{k}] of shape {tuple(p.shape)} does not require grad: give "
                             "[p for p in model.parameters() if p.requires_grad]")
        if weight is not None and not p.is_leaf:
            raise ValueError(f"params[{k}] of shape {tuple(p.shape)} is no leaf: it has no .grad to add to")
    if not params or len(chunks) < least:
        raise ValueError(f"{len(params)} params, {len(chunks)} chunks: gradients collide in pairs, {least}+")
    if not (weight is None or isinstance(weight, torch.Tensor) and not weight.dim()
            or isinstance(weight, (int, float)) and math.isfinite(weight)):
        raise ValueError(f"weight must be a finite number or a tensor of shape (), not {weight!r}")
    for i, chunk in enumerate(chunks):
        if callable(chunk) != (weight is not None):
            raise ValueError(f"chunk {i} is a {type(chunk).__name__}: gradient_collision_loss takes tensors, "
                             "gradient_collision_backward callables that compute them")
    return chunks, list({id(p): p for p in params}.values())


def _gc_vector(loss, params, similarity, i, create_graph=False):
    """u_i: chunk i's gradient as one vector (p,), zeros where the loss does not touch a parameter."""
    if not isinstance(loss, torch.Tensor) or loss.dim():
        seen = f"of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise ValueError(f"chunk {i}'s loss must be a tensor of shape (), not {seen}")
    grads = [None]
    if loss.requires_grad:
        try:
            grads = torch.autograd.grad(loss, params, create_graph=create_graph, allow_unused=True)
        except RuntimeError as error:
            for sign, told in (("second time", "part of its graph was built outside the callable, and used "
                                "up by the first call: compute everything inside"),
                               ("donated buffers", "its graph is compiled: give the uncompiled model")):
                if sign in str(error):
                    raise ValueError(f"chunk {i}: {told}") from error
            raise
    if all(g is None for g in grads):
        seen = "touches none of params" if loss.requires_grad else "has no graph"
        raise ValueError(f"chunk {i}'s loss {seen}: was it computed under no_grad or inference_mode, "
                         "detached or of another model?")
    if create_graph and i == 0:
        _gc_check_second_derivative([g for g in grads if g is not None])
    u = torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(grads, params)])
    u = u.to(torch.promote_types(u.dtype, torch.float32))
    if similarity == "cos":
        norm = torch.linalg.vector_norm(u, dtype=_gc_wide(u))
        u = u / torch.where(norm > 0, norm, 1.0).to(u.dtype) * (norm > 0)
    return u


def _gc_check_second_derivative(grads):
    """Nodes that refuse one raise when reached, but autograd, asked for some inputs alone, passes them by."""
    nodes, seen = [g.grad_fn for g in grads if g.grad_fn], set()
    if len(nodes) < len(grads):
        warnings.warn("some parameters' gradients have no graph, and so no second derivative: is the loss "
                      "linear in them, or a fused kernel in the way?", stacklevel=4)
    while nodes:
        node = nodes.pop()
        if node.name() == "torch::autograd::Error" or "CompiledFunction" in node.name():
            raise ValueError(f"the gradient has no second derivative ({node.name()} in its graph): give the "
                             "uncompiled model, and no once_differentiable function")
        seen.add(node)
        nodes.extend(n for n, _ in node.next_functions if n and n not in seen)


def _gc_wide(vector):
    return torch.float32 if vector.device.type == "mps" else torch.float64


def _gc_inner(a, b):
    return (a * b).sum(dtype=_gc_wide(a))


# --- to here ---


# ------------------------------- Statistics of chunk gradients -------------------------------


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
    """(cffi module or None, a word for the header) of the C routine that build_native.py builds."""
    try:
        import _gc_native_ext as module
    except Exception as error:  # noqa: BLE001 - a half-built or foreign library raises anything
        return None, f"not built ({'' if isinstance(error, ModuleNotFoundError) else f'{error}; '}optional)"
    return module, {1: "generic", 2: "fma", 3: "avx512"}.get(module.lib.gc_best_path(), "yes")


def gradient_stats(gradients: Sequence[Sequence[Tensor | None]], backend: str = "auto") -> GradientStats:
    """Pairwise statistics of chunk gradients, read where they lie: nothing is flattened.

    gradients[i][k]: chunk i's gradient for parameter k, n chunks in all; any shape, the same for every i;
    float32 or float64, strided as it likes; None is a zero gradient. Products and sums are float64; NaN and
    infinity spread. backend: "native" (the C routine, CPU only), "torch" (any device), "auto" (native where
    it can). ValueError: what does not match, or cannot be read; RuntimeError: "native", and it is not built.
    """
    if backend not in ("auto", "native", "torch"):
        raise ValueError(f"backend {backend!r}: choose auto, native or torch")
    n = len(gradients)
    if n == 0 or len({len(chunk) for chunk in gradients}) != 1:
        raise ValueError(f"one or more chunks of as many gradients each, not {[len(c) for c in gradients]}")
    columns, devices = [], set()  # columns: one entry a parameter, the n chunks' gradients for it
    for k, column in enumerate(zip(*gradients)):
        kinds = {(g.shape, g.dtype, g.device, g.layout) for g in column if g is not None}
        if len(kinds) > 1:
            raise ValueError(f"parameter {k}: its gradients differ in shape, dtype or device: {kinds}")
        for _, dtype, device, layout in kinds:  # one, or none where no chunk has a gradient for the parameter
            if dtype not in (torch.float32, torch.float64) or layout != torch.strided:
                raise ValueError(f"parameter {k}: {dtype}, {layout}; pass dense float32 or float64 gradients")
            columns.append([g if g is None else g.resolve_neg() for g in column])
            devices.add(device)
    module, reason = native_routine()
    if backend == "native" and module is None:
        raise RuntimeError(f"backend 'native': {reason}; python build_native.py builds it")
    readable = n <= 1024 and all(device.type == "cpu" for device in devices)
    if len(devices) > 1 or backend == "native" and not readable:
        raise ValueError(f"{n} chunks on {devices}: one device is needed, for 'native' the CPU and n <= 1024")
    native = backend != "torch" and module is not None and readable
    with torch.no_grad():
        gram = torch.zeros(n, n, dtype=torch.float64, device="cpu" if native else next(iter(devices), "cpu"))
        for rows in columns:
            some = next(g for g in rows if g is not None)
            if native:  # it adds into gram, and reads each gradient where it lies; 0 is NULL, zeros
                rows = [g if g is None else g.contiguous() for g in rows]
                at = module.ffi.new("uintptr_t[]", [0 if g is None else g.data_ptr() for g in rows])
                code = (module.lib.gc_gram_f32 if some.dtype == torch.float32 else module.lib.gc_gram_f64)(
                    module.ffi.cast("const void *const *", at), n, some.numel(), torch.get_num_threads(), 0,
                    module.ffi.cast("double *", gram.data_ptr()))
                if code:
                    raise RuntimeError(f"_gc_native.c: error {code} for {n} rows of {some.numel()}")
            else:  # float64 copies of a block at a time, not of everything
                rows = [(torch.zeros_like(some) if g is None else g).reshape(-1).split(1 << 18) for g in rows]
                for block in zip(*rows):
                    part = torch.stack(block).double()  # (n, block)
                    gram += part @ part.T
        gram = (gram + gram.T).cpu() / 2  # BLAS may round the two triangles differently
        norms = gram.diagonal().sqrt()
        scale = torch.where(norms == 0, 1.0, norms)
        cosine = (gram / scale[:, None] / scale).clamp(-1, 1)  # clamp: squares below 1e-308 lose their digits
        i, j = torch.triu_indices(n, n, 1)
        dots, cosines = (gram[i, j], cosine[i, j]) if n > 1 else (torch.zeros(1), torch.zeros(1))
        scalars = (dots.mean(), cosines.mean(), cosines.min(), cosines.max(), (dots < 0).double().mean())
    return GradientStats(gram, cosine, norms, *(s.item() for s in scalars), "native" if native else "torch")


# ---------------------------------------- Configuration ----------------------------------------
# One default per field; the command line and its help are derived from it.


class DTLError(ValueError):
    """A mistake of the user's, or something missing on the machine, told in one line."""


def setting(group: str, default: Any, doc: str, *choices: str, low: float = 0, high: float = 1e9) -> Any:
    return field(default=default, metadata=dict(group=group, doc=doc, choices=choices, low=low, high=high))


TASKS, TRAINING, STAGE1, STAGE2, STAGE3, FRESH, STAGE4 = (
    "Tasks", "Training, in every stage", "Stage 1, pretrain", "Stage 2, transfer", "Stage 3, dispose",
    "Fresh backbones: scratch, oracle, METHOD-fresh", "Stage 4, piggyback")
STEPS, PEAK = "steps; 0: by the size of the data", "peak learning rate"


@dataclass(frozen=True)
class Config:
    """Everything a result depends on besides seed and attacker. The defaults are the preset `cifar`."""

    source: str = setting(TASKS, "cifar100[0:80]", "pretrained on, then to be forgotten")
    target: str = setting(TASKS, "cifar10@50", "transferred to, and to be kept")
    downstream: str = setting(TASKS, "cifar100[80:100]@50", "new data of the attacker's")
    subset_per_class: int = setting(TASKS, 50, "source images a class that the attacker has", low=1)
    oracle_per_class: int = setting(TASKS, 150, "target images a class of oracle; 0: all")
    split: str = setting(TASKS, "test", "images measured on", "test", "validation")
    image_size: int = setting(TASKS, 0, "pixels a side, by area averaging; 0: as stored", high=4096)
    network: str = setting(TRAINING, "resnet18", "backbone", "resnet18", "resnet8", "resnet8-wide")
    augment: str = setting(TRAINING, "crop,flip", "of training images", "crop,flip", "crop", "none")
    batch_size: int = setting(TRAINING, 128, "images a step", low=2, high=1e6)
    precision: str = setting(TRAINING, "auto", "bfloat16 on CUDA, but for GC", "auto", "float32")
    pretrain_steps: int = setting(STAGE1, 15000, STEPS)
    pretrain_lr: float = setting(STAGE1, 0.1, PEAK, high=1e3)
    transfer_steps: int = setting(STAGE2, 1500, STEPS)
    transfer_lr: float = setting(STAGE2, 0.02, PEAK, high=1e3)
    # OUR READING: the abstract gives neither similarity, chunks, head nor weights.
    dispose_steps: int = setting(STAGE3, 1500, STEPS)
    dispose_lr: float = setting(STAGE3, 0.02, PEAK, high=1e3)
    similarity: str = setting(STAGE3, "dot", "of gradients", "dot", "cos")
    gc_head: str = setting(STAGE3, "fresh", "of GC: random, or stage 1's", "fresh", "source")
    chunks: int = setting(STAGE3, 4, "of a source batch, whose gradients collide", low=2, high=1e4)
    chunk_size: int = setting(STAGE3, 32, "images a chunk; rivals get as many in all", low=2, high=1e6)
    weights: str = setting(STAGE3, "", "of the methods' forget losses, METHOD=NUMBER,...")
    fresh_steps: int = setting(FRESH, 5000, STEPS)
    fresh_lr: float = setting(FRESH, 0.1, PEAK, high=1e3)
    attack_steps: int = setting(STAGE4, 500, STEPS + "; of the fixed attacker")

    def __post_init__(self) -> None:
        for f in fields(self):
            value, option, m = getattr(self, f.name), "--" + f.name.replace("_", "-"), f.metadata
            if m["choices"] and value not in m["choices"]:
                raise DTLError(f"{option}: {value!r} is none of {', '.join(m['choices'])}")
            if f.type in (int, float) and not m["low"] <= value <= m["high"]:  # false for nan, too
                raise DTLError(f"{option}: {value} is not a number from {m['low']:g} to {m['high']:g}")
            if value == "" and f.name != "weights":
                raise DTLError(f"{option} is missing: own data needs all three tasks, as in --source a.npz")
        self.weight_of()

    def digest(self) -> str:
        return digest(asdict(self))[:10]

    def weight_of(self) -> dict[str, float]:
        """'gc=30,uniform=1' -> {'gc': 30.0, 'uniform': 1.0}; of a method named twice the later."""
        parts = dict(part.partition("=")[::2] for part in self.weights.split(",") if part)
        known = [m for m in METHODS if METHODS[m].forget]
        for name, number in parts.items():
            if name not in known or not re.fullmatch(r"\d{1,9}(\.\d{1,12})?", number):
                raise DTLError(f"--weights: '{name[:40]}={number[:40]}' is not METHOD=NUMBER with a "
                               f"method of {', '.join(known)}")
        return {name: float(number) for name, number in parts.items()}


PRESETS: dict[str, dict[str, Any]] = {
    "demo": dict(
        source="shapes[0:16]@250", target="shapes[16:24]@30", downstream="shapes[24:32]@30",
        subset_per_class=30, oracle_per_class=240, network="resnet8", batch_size=64, pretrain_steps=600,
        transfer_steps=200, transfer_lr=0.05, dispose_steps=200, chunks=2, chunk_size=16,
        weights="gc=3,gc-fresh=2,uniform=3", fresh_steps=400, attack_steps=60),
    "cifar": {},
    "cifar-cpu": dict(
        image_size=16, network="resnet8-wide", batch_size=64, pretrain_steps=12000, transfer_steps=1000,
        dispose_steps=1000, chunks=2, chunk_size=16,
        weights="gc=3,uniform=30,random-labels-fresh=30,uniform-fresh=100,gradient-norm-fresh=10,gc-fresh=10",
        fresh_steps=3000, attack_steps=200),
    "own": dict(
        source="", target="", downstream="", oracle_per_class=0, network="resnet8", augment="none",
        batch_size=64, pretrain_steps=0, transfer_steps=0, transfer_lr=0.05, dispose_steps=0, fresh_steps=0,
        attack_steps=0),
}
EPOCHS = {  # steps of 0: so many passes over the task's images, and at least so many steps
    "pretrain_steps": ("source", 30, 1000), "transfer_steps": ("target", 60, 300),
    "dispose_steps": ("target", 60, 300), "fresh_steps": ("target", 120, 600),
    "attack_steps": ("source-subset", 20, 100),
}


# ---------------------------------------- Data ----------------------------------------
# A task is named SET[CLASSES]@PER_CLASS; its images live as uint8 tensors on the device.

ARCHIVES = {  # set: (address, sha256, folder, {file: records}, the test file last, label bytes, the one used)
    "cifar10": ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd", "cifar-10-batches-bin",
                {f"data_batch_{i}.bin": 10000 for i in range(1, 6)} | {"test_batch.bin": 10000}, 1, 0),
    "cifar100": ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
                 "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec", "cifar-100-binary",
                 {"train.bin": 50000, "test.bin": 10000}, 2, 1),
}
MOST_BYTES, MOST_CLASSES = 1 << 34, 1 << 20  # of a user's file: more is taken for a mistake
Arrays = tuple[np.ndarray, ...]  # x (N, 3, H, W) uint8, y (N,) int64 for training; x, y for measuring


@dataclass(frozen=True)
class Task:
    """One classification task, on the device."""

    x: Tensor  # (N, 3, H, W) uint8, training images, class by class
    y: Tensor  # (N,) int64, 0 .. classes-1
    x_test: Tensor  # (M, 3, H, W) uint8
    y_test: Tensor  # (M,) int64
    classes: int
    fingerprint: str  # sha256 of the four tensors


def load_task(name: str, seed: int, data_dir: Path, device: torch.device, split: str = "test",
              image_size: int = 0) -> Task:
    """The task SET[CLASSES]@PER_CLASS: CLASSES a slice or a list, labels renumbered from 0; PER_CLASS
    training images a class, drawn by `seed` (a smaller draw is part of a larger one); test images all kept.
    Or DTLError."""
    match = re.fullmatch(r"([^\[\]@]+)(?:\[([^\[\]@]*)\])?(?:@(\d{1,9}))?", name)
    if not match:
        raise DTLError(f"{name[:99]!r} is not of the form SET[CLASSES]@PER_CLASS, as in cifar100[0:80]@50")
    x, y, x_test, y_test = load_set(match[1], data_dir, split)
    order = np.random.default_rng(stream(seed, "draw", match[1])).permutation(len(y))
    kept, kept_test = [], []
    for c in select_classes(match[2], int(max(y.max(), y_test.max())) + 1):
        of_class, of_class_test = order[y[order] == c], np.flatnonzero(y_test == c)
        wanted = int(match[3] or len(of_class))
        if not 0 < wanted <= len(of_class) or not len(of_class_test):
            raise DTLError(f"{name[:99]}: class {c} has {len(of_class)} training and {len(of_class_test)} "
                           f"test images; {wanted} are to be trained on (labels count from 0)")
        kept.append(of_class[:wanted])
        kept_test.append(of_class_test)
    tensors = []
    for pixels, indices in ((x, kept), (x_test, kept_test)):
        images = torch.from_numpy(pixels[np.concatenate(indices)])
        if image_size > min(images.shape[2:]):
            raise DTLError(f"{name}: images of {images.shape[2:]} are smaller than --image-size {image_size}")
        if image_size and images.shape[2:] != (image_size, image_size):  # area averaging
            smaller = functools.partial(F.interpolate, size=(image_size, image_size), mode="area")
            images = torch.cat([smaller(part.float()).round().byte() for part in images.split(4096)])
        tensors += [images, torch.arange(len(indices)).repeat_interleave(torch.tensor([*map(len, indices)]))]
    fingerprint = hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()
    return Task(*(t.to(device) for t in tensors), classes=len(kept), fingerprint=fingerprint)


def select_classes(text: str | None, count: int) -> list[int]:
    """'0:80', '1,5,7' or None (all) -> class numbers."""
    sliced = re.fullmatch(r"(\d{0,9}):(\d{0,9})(?::(\d{1,9}))?", ":" if text is None else text)
    listed = re.fullmatch(r"\d{1,9}(,\d{1,9})+", text or "")
    chosen = [int(t) for t in text.split(",")] if listed else []
    if sliced and int(sliced[3] or 1):
        chosen = range(int(sliced[1] or 0), min(int(sliced[2] or count), count + 1), int(sliced[3] or 1))
    if len(set(chosen)) < max(2, len(chosen)) or max(chosen) >= count:
        raise DTLError(f"classes [{(text or '')[:50]}]: not a slice like 0:80 or a list like 1,5,7 of two or "
                       f"more, each once, of 0..{count - 1}")
    return list(chosen)


@functools.lru_cache(maxsize=4)
def load_set(name: str, data_dir: Path, split: str) -> Arrays:
    """Training images and labels, then those to measure on. With split 'validation' the latter are the last
    tenth of each class's training images, which are taken out of the former; the test images stay unseen."""
    if name == "shapes":
        arrays = draw_shapes(400, seed=1) + draw_shapes(100, seed=2)
    elif name in ARCHIVES:
        arrays = read_archive(name, data_dir)
    elif name.endswith(".npz"):
        arrays = read_npz(Path(name))
    else:
        raise DTLError(f"no data set {name[:99]!r}: there are shapes, {', '.join(ARCHIVES)}, and .npz files")
    if split == "validation":
        x, y = arrays[:2]
        of_class = [np.flatnonzero(y == c) for c in np.unique(y)]
        last = [indices[-max(1, len(indices) // 10) :] for indices in of_class]
        held = np.isin(np.arange(len(y)), np.concatenate(last))
        arrays = x[~held], y[~held], x[held], y[held]
    return arrays


def read_npz(path: Path) -> Arrays:
    """A user's own data: x_train, x_test (N, H, W, 3) uint8; y_train, y_test (N,) integers from 0."""
    if not path.is_file():
        raise DTLError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())  # before anything is unpacked
        with np.load(path, allow_pickle=False) as file:
            found = {k: np.asarray(v) for k, v in file.items()} if size <= MOST_BYTES else {}
    except Exception as error:  # zipfile and numpy raise a dozen kinds for a damaged file
        raise DTLError(f"{path}: not a readable .npz file ({type(error).__name__}: {error})") from None
    if size > MOST_BYTES or not {"x_train", "y_train", "x_test", "y_test"} <= found.keys():
        raise DTLError(f"{path}: needed are x_train, y_train, x_test, y_test, <= {MOST_BYTES >> 30} GiB; "
                       f"found {', '.join(found) or 'none'}, {size / 2**30:.3g} GiB")
    for part in ("train", "test"):
        x, y, shape = found[f"x_{part}"], found[f"y_{part}"], found["x_test"].shape[1:]
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or 0 in x.shape or x.shape[1:] != shape:
            raise DTLError(f"{path}: x_{part} must be uint8 of shape (N, H, W, 3), H and W as in x_test, not "
                           f"{x.dtype} {x.shape}")
        if y.dtype.kind not in "iu" or y.shape != x.shape[:1] or y.min() < 0 or y.max() >= MOST_CLASSES:
            span = f", {y.min()} to {y.max()}" if y.dtype.kind in "iu" and y.size else ""
            raise DTLError(f"{path}: y_{part} must be integers of shape ({len(x)},), one an image, counting "
                           f"from 0 to at most {MOST_CLASSES - 1}, not {y.dtype} {y.shape}{span}")
    x, x_test = (np.ascontiguousarray(found[name].transpose(0, 3, 1, 2)) for name in ("x_train", "x_test"))
    return x, found["y_train"].astype(np.int64), x_test, found["y_test"].astype(np.int64)


def read_archive(name: str, data_dir: Path) -> Arrays:
    """CIFAR's official binary files: records of 1 or 2 label bytes and 3072 pixel bytes, planes R, G, B."""
    address, sha256, folder, files, label_bytes, label_at = ARCHIVES[name]
    folder, archive = data_dir / folder, data_dir / address.rsplit("/", 1)[1]
    if not folder.is_dir():
        fetch(address, sha256, archive)
        unpacked = data_dir / f"{folder.name}.{os.getpid()}.partial"
        try:
            shutil.unpack_archive(archive, unpacked)  # it has its sha256: nothing can land elsewhere
            with contextlib.suppress(OSError):  # another run was faster
                os.replace(unpacked / folder.name, folder)
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)
    records = []
    for file, count in files.items():
        path, length = folder / file, label_bytes + 3072
        data = np.fromfile(path, np.uint8) if path.is_file() else np.zeros(0, np.uint8)
        if len(data) != count * length:
            raise DTLError(f"{path}: {len(data)} bytes, not {count * length}: missing, truncated or other; "
                           f"delete the folder {folder} and run `python dtl.py data`")
        records.append(data.reshape(-1, length))
    parts = np.concatenate(records[:-1]), records[-1]
    return tuple(array for r in parts for array in (
        r[:, label_bytes:].reshape(-1, 3, 32, 32), r[:, label_at].astype(np.int64)))


def fetch(address: str, sha256: str, archive: Path) -> None:
    """Download, if it is not there, and verify."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    if not archive.exists():
        click.echo(f"downloading {address} to {archive}", err=True)
        socket.setdefaulttimeout(60)
        try:
            torch.hub.download_url_to_file(address, str(archive), progress=on_terminal())
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise DTLError(f"cannot download {address} ({error}); try again, or put its unpacked folder into "
                           f"{archive.parent}") from None
    if (found := hashlib.sha256(archive.read_bytes()).hexdigest()) != sha256:
        raise DTLError(f"{archive}: sha256 {found}, not {sha256}: truncated or altered; delete it and run "
                       "`python dtl.py data`")


def draw_shapes(per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`shapes`: eight contours (class % 8) in four textures (class // 8: filled, striped, grey outlines,
    chequers); position, angle, size, colours, clutter and noise vary. x (32 * per_class, 3, 16, 16) uint8 and
    y int64. Drawn in float64: in float32 some pixels would differ from one kind of CPU to another."""
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(32), per_class)
    n, size = len(y), 16

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, (n, *shape))

    along = ((np.arange(size) + 0.5) * (2 / size) - 1)[None]  # (1, 16)
    down = along.T
    angle, radius, shift = uniform(0, 2 * np.pi, 1, 1), uniform(0.55, 0.85, 1, 1), uniform(-0.2, 0.2, 2, 1, 1)
    dx, dy = (along - shift[:, 0]) / radius, (down - shift[:, 1]) / radius
    u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    contours = [  # negative inside
        lambda u, v, r, t: r - 0.9,  # disc
        lambda u, v, r, t: np.maximum(abs(u), 2.2 * abs(v)) - 1,  # bar
        lambda u, v, r, t: r * np.cos((t + np.pi) % (2 * np.pi / 3) - np.pi / 3) - 0.55,  # triangle
        lambda u, v, r, t: np.maximum(abs(u), abs(v)) - 0.8,  # square
        lambda u, v, r, t: r - 0.7 - 0.3 * np.cos(5 * t),  # star
        lambda u, v, r, t: np.minimum(np.maximum(abs(u), 3 * abs(v)), np.maximum(abs(v), 3 * abs(u))) - 1,
        lambda u, v, r, t: np.maximum(r - 1, 0.75 - np.hypot(u - 0.6, v)),  # crescent
        lambda u, v, r, t: r - 0.65 - 0.35 * np.cos(3 * t),  # trefoil
    ]
    textures = [  # negative where painted, f being the contour
        lambda f, u, v: f,
        lambda f, u, v: np.maximum(f, np.sin(9 * u)),  # stripes
        lambda f, u, v: np.maximum(f, -f - 0.35),  # outline
        lambda f, u, v: np.maximum(f, np.sin(7 * u) * np.sin(7 * v)),  # chequers
    ]
    mask = np.empty((n, size, size))
    for c in range(32):
        a, b = u[y == c], v[y == c]
        mask[y == c] = textures[c // 8](contours[c % 8](a, b, np.hypot(a, b), np.arctan2(b, a)), a, b)
    mask = np.clip(0.5 - mask * radius * (size / 4), 0, 1)[:, None]  # soft edges
    ground, paint = uniform(0, 1, 3, 1, 1), uniform(0, 1, 3, 1, 1)
    paint = np.where(np.abs(paint - ground) < 0.25, (ground + 0.5) % 1, paint)
    sketch, grey = (y // 8 == 2)[:, None, None, None], uniform(0, 1, 1, 1, 1)
    ground = np.where(sketch, grey, ground)
    paint = np.where(sketch, (grey + uniform(0.35, 0.65, 1, 1, 1)) % 1, paint)
    x = ground + uniform(-0.3, 0.3, 3, 1, 1) * along + uniform(-0.3, 0.3, 3, 1, 1) * down
    for _ in range(3):  # clutter: small discs under the shape
        cx, cy, cr = uniform(-1, 1, 1, 1, 1), uniform(-1, 1, 1, 1, 1), uniform(0.1, 0.3, 1, 1, 1)
        x = np.where(np.hypot(along - cx, down - cy) < cr, uniform(0, 1, 3, 1, 1), x)
    x = x * (1 - mask) + paint * mask
    x = np.where(sketch, x.mean(1, keepdims=True), x) + rng.normal(0, 0.08, x.shape)
    return (np.clip(x, 0, 1) * 255).astype(np.uint8), y


def batch_index(task: Task, size: int, step: int, seed: int) -> Tensor:
    """Which images step `step` takes, (B,) int64: every epoch in a new order, drawn on the device. B is the
    same at every step; what an epoch would leave over is not used in it."""
    size = min(size, len(task.y))
    epoch, k = divmod(step, len(task.y) // size)
    return epoch_order(len(task.y), stream(seed, "epoch", epoch), task.y.device)[k * size : (k + 1) * size]


def batch(task: Task, index: Tensor, augment: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """These images, augmented and normalised, (B, 3, H, W) float32, and their labels (B,)."""
    return normalise(augmented(task.x[index], augment, generator)), task.y[index]


@functools.lru_cache(maxsize=4)
def epoch_order(count: int, seed: int, device: torch.device) -> Tensor:
    return torch.randperm(count, generator=torch.Generator(device).manual_seed(seed), device=device)


def augmented(images: Tensor, how: str, generator: torch.Generator) -> Tensor:
    """Each image cropped (an eighth of the side as padding) and flipped by itself: (B, 3, H, W) uint8."""
    if how == "none":
        return images
    b, _, height, width = images.shape
    pad, device = max(1, height // 8), images.device
    padded = F.pad(images, (pad, pad, pad, pad))
    top, left, flip = (torch.randint(0, high, (b, 1), generator=generator, device=device)
                       for high in (2 * pad + 1, 2 * pad + 1, 2 if "flip" in how else 1))
    rows = top + torch.arange(height, device=device)  # (B, H)
    columns = torch.arange(width, device=device).expand(b, -1)
    columns = left + torch.where(flip == 1, width - 1 - columns, columns)  # (B, W)
    index = torch.arange(b, device=device)[:, None, None]
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def normalise(images: Tensor) -> Tensor:
    """uint8 -> float32 about [-2, 2]. Constants: no task's statistics reach a model that never saw it."""
    return (images.float() - 127.5) / 63.75


# ---------------------------------------- Networks ----------------------------------------


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
        stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU())
        self.features, layers = width, []
        for stage, count in enumerate(blocks):
            for k in range(count):
                layers.append(Block(self.features, width << stage, 2 if stage and not k else 1))
                self.features = width << stage
        self.blocks = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x)).mean((2, 3))

    def every_layer(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, F): what the stem and each block give, as means over four quarters."""
        maps = [self.stem(x)]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        return torch.cat([F.adaptive_avg_pool2d(m, 2).flatten(1) for m in maps], 1)


class Model(nn.Module):
    """A backbone and a linear head: (B, 3, H, W) float -> (B, classes) float32. `mixed`: bfloat16 inside."""

    def __init__(self, backbone: ResNet, head: nn.Linear, mixed: bool = False) -> None:
        super().__init__()
        self.backbone, self.head, self.mixed = backbone, head, mixed

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.mixed):
            return self.head(self.backbone(x)).float()


NETWORKS = {"resnet18": ((2, 2, 2, 2), 64), "resnet8": ((1, 1, 1), 16), "resnet8-wide": ((1, 1, 1), 32)}


def new_backbone(network: str, seed: int, device: torch.device) -> ResNet:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        backbone = ResNet(*NETWORKS[network]).to(device)
    return backbone.to(memory_format=torch.channels_last) if device.type == "cuda" else backbone


def new_head(features: int, classes: int, seed: int | torch.Generator, device: torch.device) -> nn.Linear:
    """nn.Linear's own initialisation, drawn on the device."""
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator(device).manual_seed(seed)
    head, bound = nn.utils.skip_init(nn.Linear, features, classes, device=device), features**-0.5
    for p in (head.weight, head.bias):
        nn.init.uniform_(p, -bound, bound, generator)
    return head


@torch.no_grad()
def hits(model: Model, task: Task) -> Tensor:
    """Which test images the model gets right: (M,) bool. Their mean is the test accuracy."""
    model.eval()
    return torch.cat([model(normalise(x)).argmax(1) for x in task.x_test.split(500)]) == task.y_test


def frozen(module: nn.Module) -> nn.Module:
    """A copy for reading: evaluation mode, no gradients to its parameters."""
    return copy.deepcopy(module).eval().requires_grad_(False)


# ---------------------------------------- The one loop ----------------------------------------
# It trains every stage and every attack.

CLIP = 5.0  # largest norm of a step's gradient
FETCH = 50  # steps between two looks at the loss terms, which stay on the device till then


@dataclass(frozen=True)
class Schedule:
    """How a stage trains: SGD with Nesterov momentum 0.9, or AdamW, under a one-cycle learning rate."""

    steps: int
    lr: float  # peak, reached after a quarter of the steps
    batch_size: int
    augment: str = "crop,flip"
    mixed: bool = False  # bfloat16 where no second derivative is needed
    optimizer: str = "sgd"
    weight_decay: float = 5e-4  # L2 penalty
    gentle: bool = False  # mixup, label smoothing, and a learning rate that falls towards the input

    def lr_at(self, step: int) -> float:
        done = (step + 1) / (self.steps + 1)
        return self.lr * (4 * done if done < 0.25 else 0.5 * (1 + math.cos(math.pi * (done - 0.25) / 0.75)))


class Graph:
    """A function of tensors, which returns one, as a CUDA graph. The first calls run it, while libraries
    choose their algorithms; then its operations are recorded, and from there on launched as one."""

    def __init__(self, function: Callable[..., Tensor], generator: torch.Generator) -> None:
        self.function, self.generator, self.calls = function, generator, 0

    def __call__(self, *given: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= 3:
            return self.function(*given)
        if self.calls == 4:
            self.graph, self.given = torch.cuda.CUDAGraph(), [tensor.clone() for tensor in given]
            self.graph.register_generator_state(self.generator)
            with torch.cuda.graph(self.graph):
                self.result = self.function(*self.given)
        for own, new in zip(self.given, given):
            own.copy_(new)
        self.graph.replay()
        return self.result.clone()


def train(model: nn.Module, inputs: Callable, step_loss: Callable, schedule: Schedule, seed: int,
          progress: "Progress", inspect: Callable[[int], dict[str, float]] = lambda step: {}) -> None:
    """Train what of `model` requires grad. `inputs(step)` gives the tensors that differ from step to step, of
    one shape each; `step_loss(generator, *inputs)` backpropagates and returns its terms by name, tensors ()
    that stay on the device: no step waits, and each is the same sequence of operations. The generator is
    seeded anew by (seed, step): a stage goes on from its step number, parameters and optimiser state alone.
    `inspect(step)` adds to the log."""
    params, groups = [p for p in model.parameters() if p.requires_grad], []
    for k, p in enumerate(params if schedule.gentle else ()):
        groups.append(dict(params=[p], share=(k + 1) / len(params)))
    groups, sgd = groups or [dict(params=params, share=1.0)], dict(momentum=0.9, nesterov=True)
    how = dict(lr=schedule.lr, weight_decay=schedule.weight_decay, fused=True)
    adamw = schedule.optimizer == "adamw"
    optimizer = torch.optim.AdamW(groups, **how) if adamw else torch.optim.SGD(groups, **how, **sgd)
    generator, terms, names, first = torch.Generator(params[0].device), [], [], 0
    if saved := progress.path and load(progress.path, progress.key, progress.device):
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = progress.saved_step = saved["step"]

    def gradients(*given: Tensor) -> Tensor:
        optimizer.zero_grad()
        row = step_loss(generator, *given)
        row["gradient"] = nn.utils.clip_grad_norm_(params, CLIP)
        names[:] = row
        return torch.stack([term.detach().float() for term in row.values()])

    gradients = Graph(gradients, generator) if progress.graphs else gradients
    model.train()
    for step in range(first, schedule.steps):
        progress.at(step, schedule.steps)
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * schedule.lr_at(step)
        generator.manual_seed(stream(seed, step))
        terms.append(gradients(*inputs(step)))
        optimizer.step()
        if (step + 1) % FETCH == 0 or step + 1 == schedule.steps:
            values = torch.stack(terms).tolist()
            for k, row in enumerate(values):
                if not all(map(math.isfinite, row)):
                    at, seen = step + 1 - len(terms) + k, show(dict(zip(names, row)))
                    raise DTLError(f"step {at} of {schedule.steps}: not finite: {seen}; a "
                                   "smaller weight or learning rate may help")
            means = {name: sum(column) / len(column) for name, column in zip(names, zip(*values))}
            progress.fetched(step + 1, schedule.steps, means | inspect(step),
                             lambda: dict(model=model.state_dict(), optimizer=optimizer.state_dict()))
            terms = []
    model.eval()


def fit(model: Model, task: Task, schedule: Schedule, seed: int, progress: "Progress") -> Model:
    """Cross entropy on a task, over all that is not frozen."""

    def inputs(step: int) -> tuple[Tensor, ...]:
        return (batch_index(task, schedule.batch_size, step, seed),)

    def step_loss(generator: torch.Generator, index: Tensor) -> dict[str, Tensor]:
        x, y = batch(task, index, schedule.augment, generator)
        if schedule.gentle:  # mixup: each image with the one at the other end of the batch
            share = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)
            logits = model(share * x + (1 - share) * x.flip(0))
            loss, other = (F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none")
                           for labels in (y, y.flip(0)))
            loss = torch.lerp(other, loss, share.flatten()).mean()
        else:
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        return {"loss": loss}

    train(model, inputs, step_loss, schedule, seed, progress)
    return model


# ---------------------------------------- The stages ----------------------------------------
# In the paper's order: explicit arguments in, a result out.

TEMPERATURE = 4.0  # of the distillation from the transferred model, which keeps the target
RAMP = 0.5  # share of a long disposal over which the weight of its forget loss rises from zero


def pretrain(source: Task, network: str, schedule: Schedule, seed: int, progress: "Progress") -> Model:
    """Stage 1: random backbone, source task. (On the target task: the references scratch and oracle.)"""
    backbone = new_backbone(network, stream(seed, "backbone"), source.x.device)
    head = new_head(backbone.features, source.classes, stream(seed, "head"), source.x.device)
    return fit(Model(backbone, head, schedule.mixed), source, schedule, seed, progress)


def transfer(pretrained: Model, target: Task, schedule: Schedule, seed: int, progress: "Progress") -> Model:
    """Stage 2: the pretrained backbone, a new head, the whole network on the target task."""
    backbone = copy.deepcopy(pretrained.backbone)
    head = new_head(backbone.features, target.classes, stream(seed, "head"), target.x.device)
    return fit(Model(backbone, head, schedule.mixed), target, schedule, seed, progress)


def dispose(transferred: Model, source_head: nn.Linear, source: Task, target: Task, method: "Method",
            schedule: Schedule, seed: int, progress: "Progress", *, network: str, weight: float,
            similarity: str = "dot", gc_head: str = "fresh", chunks: int = 4, chunk_size: int = 32) -> Model:
    """Stage 3: minimise L_retain(target) + weight * L_forget(source) from the transferred model, or from a
    fresh backbone if the method says so. Returns the scrubbed model; its arguments stay as they are. Source
    images pass through BatchNorm without leaving a trace in its running statistics."""
    device, features, mixed = target.x.device, transferred.backbone.features, schedule.mixed
    teacher, original_head = frozen(transferred), frozen(source_head)
    stranger = frozen(Model(new_backbone(network, stream(seed, "stranger"), device), source_head))
    student = copy.deepcopy(transferred) if not method.fresh else Model(
        new_backbone(network, stream(seed, "student"), device),
        new_head(features, target.classes, stream(seed, "student head"), device), mixed)

    def source_index(step: int) -> Tensor:
        return batch_index(source, chunks * chunk_size, step, stream(seed, "source"))

    def inputs(step: int) -> tuple[Tensor, ...]:
        """Which target images, which source images, the weight of the forget loss."""
        ramp = min(1.0, (step + 1) / (RAMP * schedule.steps)) if method.long else 1.0
        return (batch_index(target, schedule.batch_size, step, seed), source_index(step),
                torch.full((), weight * ramp, dtype=torch.float64, device=device))

    def step_loss(generator: torch.Generator, of_target: Tensor, of_source: Tensor,
                  now: Tensor) -> dict[str, Tensor]:
        x, _ = batch(target, of_target, schedule.augment, generator)
        terms = {"retain": distillation(student(x), teacher(x), TEMPERATURE)}
        terms["retain"].backward()
        if not (method.forget or method.distill):
            return terms
        x, y = batch(source, of_source, schedule.augment, generator)
        with running_statistics_kept(student):
            if method.distill:  # source images as unlabelled ones: more of them than there are target images
                terms["distill"] = distillation(student(x), teacher(x), TEMPERATURE)
                terms["distill"].backward()
            if method.forget in (gradient_collision, gradient_norm):
                head = copy.deepcopy(source_head) if gc_head == "source" else new_head(
                    features, source.classes, generator, device)
                terms["forget"] = method.forget(student.backbone, head, x, y, similarity, chunks, now)
            elif method.forget:
                logits = Model(student.backbone, original_head, mixed)(x)
                before = functools.partial(Model(teacher.backbone, original_head, mixed), x)
                terms["forget"] = method.forget(logits, y, before, functools.partial(stranger, x), generator)
                (now.float() * terms["forget"]).backward()
        return terms

    def inspect(step: int) -> dict[str, float]:
        generator = torch.Generator(device).manual_seed(stream(seed, "inspect", step))
        model = Model(student.backbone, new_head(features, source.classes, generator, device))
        x, y = batch(source, source_index(step), schedule.augment, generator)
        return chunk_statistics(model, x, y, chunks)

    train(student, inputs, step_loss, schedule, seed, progress, inspect)
    return student


def piggyback(backbone: ResNet, task: Task, attacker: "Attacker", schedule: Schedule, seed: int,
              progress: "Progress") -> tuple[Tensor, float]:
    """Stage 4: a new head on the scrubbed backbone, trained on a piggyback task as the attacker does it.
    Returns which test images it gets right, (M,) bool, whose mean is the PL accuracy, and the mean cosine of
    the attacker's chunk gradients at its step 0. Of one seed every model gets the same head, batches and
    schedule."""
    generator = torch.Generator(task.x.device).manual_seed(stream(seed, "attack"))
    head, data = new_head(backbone.features, task.classes, generator, task.x.device), task
    model = Model(copy.deepcopy(backbone), head, schedule.mixed)
    if attacker.per_class:
        kept = [torch.nonzero(task.y == c).flatten()[: attacker.per_class] for c in range(task.classes)]
        kept = torch.cat(kept)
        data = replace(task, x=task.x[kept], y=task.y[kept])
    if attacker.rescaled:
        with torch.no_grad():
            for filters in (p for p in model.backbone.parameters() if p.dim() == 4):  # (out, in, h, w)
                size = (2 / filters[0].numel()) ** 0.5 / filters.std((1, 2, 3), keepdim=True)
                filters.mul_(torch.where(size.isfinite(), size, 1.0))
    index = batch_index(data, schedule.batch_size, 0, seed)
    first = batch(data, index, schedule.augment, generator)
    cosine = chunk_statistics(model.train(), *first)["mean_cosine"]
    if attacker.ridge:
        return ridge_regression(model.backbone, data), cosine
    return hits(fit(model, data, schedule, seed, progress), task), cosine


@torch.no_grad()
def ridge_regression(backbone: ResNet, task: Task) -> Tensor:
    """Which test images, (M,) bool, ridge regression of the labels on the frozen features of all layers gets
    right, by that of its penalties which gets most."""
    for norm in (m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 1.0  # running statistics become those of the one batch of all the attacker's images
    backbone.train().every_layer(normalise(task.x))
    backbone.eval()
    known, seen = (torch.cat([backbone.every_layer(normalise(x)) for x in images.split(500)]).cpu().double()
                   for images in (task.x, task.x_test))  # (N, F), (M, F)
    centre, spread = known.mean(0), known.std(0) + 1e-6
    known, seen = (known - centre) / spread, (seen - centre) / spread
    y, products = F.one_hot(task.y.cpu(), task.classes).double(), known.T @ known
    found = []
    for penalty in (0.01, 0.1, 1.0, 10.0):
        shrunk = products + penalty * len(known) * torch.eye(len(products), dtype=torch.float64)
        weights = torch.linalg.solve(shrunk, known.T @ (y - y.mean(0)))
        found.append((seen @ weights + y.mean(0)).argmax(1) == task.y_test.cpu())
    return max(found, key=torch.sum)


def chunk_statistics(model: Model, x: Tensor, y: Tensor, chunks: int = 4) -> dict[str, float]:
    """Of the gradients of cross entropy on `chunks` parts of a batch: x (B, 3, H, W), y (B,)."""
    chunks, params = max(1, min(chunks, len(x) // 2)), list(model.parameters())
    with running_statistics_kept(model):
        stats = gradient_stats([torch.autograd.grad(F.cross_entropy(model(part), labels), params)
                                for part, labels in zip(x.tensor_split(chunks), y.tensor_split(chunks))])
    return {"mean_cosine": stats.mean_cosine, "collision_rate": stats.collision_rate}


# ------------------------------- Disposal methods and attackers -------------------------------
# A forget loss sees the student's logits (B, source classes) on source images through the pretrained source
# head (frozen: a head that could be trained would do the forgetting itself), their labels (B,), and how to
# get the logits of the transferred model and of a random one. OUR READING of each rival is its function here;
# the GC loss goes through a head of its own.


def gradient_collision(backbone: ResNet, head: nn.Linear, x: Tensor, y: Tensor, similarity: str, chunks: int,
                       weight: Tensor) -> Tensor:
    """GC over the backbone and the head in use: adds weight * dGC to the backbone's gradients, returns GC."""
    losses = [lambda x=x, y=y: F.cross_entropy(head(backbone(x)), y)
              for x, y in zip(x.tensor_split(chunks), y.tensor_split(chunks))]
    params = [*backbone.parameters(), *head.parameters()]
    return gradient_collision_backward(losses, params, similarity=similarity, weight=weight,
                                       preserve_rng_state=False)


def gradient_norm(backbone: ResNet, head: nn.Linear, x: Tensor, y: Tensor, similarity: str, chunks: int,
                  weight: Tensor) -> Tensor:
    """A penalty on the squared norm of the whole batch's gradient. GC's mean is that of the source task's own
    gradient; this has the noise of one batch in it, too, which is many times as much."""
    loss = F.cross_entropy(head(backbone(x)), y)
    gradient = _gc_vector(loss, [*backbone.parameters(), *head.parameters()], "dot", 0, create_graph=True)
    norm = _gc_inner(gradient, gradient)
    (weight * norm).backward()
    return norm


def distillation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Hinton et al.: T^2 * KL(teacher || student) of logits (B, classes) at temperature T, mean over B."""
    teacher, student = (F.log_softmax(logits / temperature, 1) for logits in (teacher, student))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def negative_gradient(logits, labels, transferred, stranger, generator) -> Tensor:
    """Ascent; an image whose loss has reached that of guessing counts no more, or it would run away."""
    return -F.cross_entropy(logits, labels, reduction="none").clamp(max=math.log(logits.shape[1])).mean()


def random_labels(logits, labels, transferred, stranger, generator) -> Tensor:
    drawn = torch.randint(0, logits.shape[1], labels.shape, generator=generator, device=labels.device)
    return F.cross_entropy(logits, drawn)


def uniform_labels(logits, labels, transferred, stranger, generator) -> Tensor:
    """KL(uniform || student)."""
    return -F.log_softmax(logits, 1).mean() - math.log(logits.shape[1])


def bad_teacher(logits, labels, transferred, stranger, generator) -> Tensor:
    """Chundawat et al. 2023: KL to a randomly initialised teacher."""
    return distillation(logits, stranger())


def scrub(logits, labels, transferred, stranger, generator) -> Tensor:
    """Kurmanji et al. 2023: away from the transferred model's answers, bounded like the negative gradient."""
    before, now = F.log_softmax(transferred(), 1), F.log_softmax(logits, 1)
    divergence = F.kl_div(now, before, reduction="none", log_target=True).sum(1)
    return -divergence.clamp(max=math.log(logits.shape[1])).mean()


@dataclass(frozen=True)
class Method:
    forget: Callable | None = None  # None: the retain loss alone
    weight: float = 0.0  # of the forget loss, unless --weights says otherwise
    long: bool = False  # with the steps and learning rate of a fresh backbone
    fresh: bool = False  # into a fresh backbone
    distill: bool = False  # retain the transferred model's answers on source images, too
    weight_decay: float = Schedule.weight_decay


LONG, FRESH_START = dict(long=True, distill=True), dict(long=True, fresh=True, distill=True)
METHODS = {
    "finetune": Method(),
    "neggrad": Method(negative_gradient, 1.0),
    "random-labels": Method(random_labels, 3.0),
    "uniform": Method(uniform_labels, 10.0),
    "bad-teacher": Method(bad_teacher, 3.0),
    "scrub": Method(scrub, 3.0),
    "gc": Method(gradient_collision, 30.0),
    "finetune-long": Method(long=True, weight_decay=5e-3),
    "gc-long": Method(gradient_collision, 30.0, **LONG),
    "distill-target": Method(long=True, fresh=True),
    "distill-fresh": Method(**FRESH_START),
    "random-labels-fresh": Method(random_labels, 3.0, **FRESH_START),
    "uniform-fresh": Method(uniform_labels, 10.0, **FRESH_START),
    "gradient-norm-fresh": Method(gradient_norm, 30.0, **FRESH_START),
    "gc-fresh": Method(gradient_collision, 30.0, **FRESH_START),
}
TOY_METHODS = ("finetune", "uniform", "gc", "gc-fresh")  # of the presets demo and own, unless --methods all
PAIRS = (("gc", "uniform"), ("gc-long", "gc"), ("gc-fresh", "distill-fresh"), ("gc-fresh", "uniform-fresh"),
         ("gc-fresh", "gradient-norm-fresh"), ("uniform-fresh", "distill-fresh"))  # compared image by image


@dataclass(frozen=True)
class Attacker:
    """One way of piggyback learning. BatchNorm is in training mode in all of them, so that its statistics are
    re-estimated on the attacker's images, also where the backbone is frozen."""

    lr: float = 0.05  # peak learning rate
    times: int = 1  # as many steps as --attack-steps
    per_class: int = 0  # images a class; 0: all of the piggyback data
    optimizer: str = "sgd"  # or adamw
    gentle: bool = False  # as in Schedule
    rescaled: bool = False  # each filter first brought to the size that a new one has
    ridge: bool = False  # nothing trained: ridge regression on the features of all layers


ATTACKERS = {
    "fixed": Attacker(),
    "low": Attacker(0.03, times=5),
    "long": Attacker(0.1, times=5),
    "high": Attacker(0.3, times=5),
    "longer": Attacker(0.1, times=20),
    "adamw": Attacker(0.002, times=5, optimizer="adamw"),
    "gentle": Attacker(0.1, times=20, gentle=True),
    "rescaled": Attacker(0.1, times=5, rescaled=True),
    "few": Attacker(0.1, times=5, per_class=10),
    "ridge": Attacker(times=0, ridge=True),
}
SMALL = ("fixed", "long", "adamw", "few", "ridge")


# ---------------------------------------- Files and progress ----------------------------------------
# What is on disk is whole, and checked when it is read.

SAVE_EVERY = 30.0  # seconds between saves within a stage


def digest(value: Any) -> str:
    """sha256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def stream(*names: object) -> int:
    """A seed of 63 bits for what `names` name: independent of whatever ran before."""
    return int(digest(repr(names))[:16], 16) >> 1


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full disk or a missing permission is one line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise DTLError(f"cannot write {path}: {error.strerror}; then run the same command again") from None


def write_atomically(path: Path, data: bytes) -> None:
    """All of `data` at `path`, or what was there before."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def append(path: Path, record: dict) -> None:
    """One JSON line, written in one piece; after a line that a crash cut short, on a line of its own."""
    with writing(path), path.open("ab+", buffering=0) as file:
        file.seek(-min(1, file.seek(0, os.SEEK_END)), os.SEEK_END)
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + json.dumps(record).encode() + b"\n")


def save(path: Path, key: str, state: dict) -> None:
    """A file for torch.load, which is a zip file; its comment is the sha256 of all before it."""
    buffer = io.BytesIO()
    torch.save({"key": key, **state}, buffer)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = bytes(64)
    whole = buffer.getvalue()[:-64]
    write_atomically(path, whole + hashlib.sha256(whole).hexdigest().encode())


def load(path: Path, key: str, device: torch.device) -> dict | None:
    """The state saved at `path` under `key`; None if there is none, or, with a warning, if it is damaged."""
    if not path.exists():
        return None
    data, reason = path.read_bytes(), "its checksum does not match"
    if hashlib.sha256(data[:-64]).hexdigest().encode() == data[-64:]:
        try:
            state = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
            if state["key"] == key:
                return state
            reason = "it is another stage's"
        except (pickle.UnpicklingError, RuntimeError, LookupError, TypeError) as error:
            reason = f"it holds no model: {type(error).__name__}"
    click.echo(f"warning: checkpoint {path} is damaged ({reason}); making it anew", err=True)
    return None


class Results(dict):
    """OUT/results.jsonl, a line a measurement, by its `key`, the digest of all that it depends on. Each has a
    digest of its own; one that does not fit is passed over, told of, and measured anew."""

    def __init__(self, out: Path) -> None:
        self.path, unfit = out / "results.jsonl", 0
        for line in self.path.read_bytes().splitlines() if self.path.exists() else ():
            try:
                record = json.loads(line)
                fits = record.pop("digest") == digest(record)[:8]
                self |= {record["key"]: record} if fits else {}
            except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
                fits = False
            unfit += not fits
        if unfit:
            click.echo(f"warning: {self.path}: passed over {unfit} damaged or foreign lines", err=True)

    def add(self, record: dict) -> None:
        append(self.path, record | {"digest": digest(record)[:8]})
        self[record["key"]] = record


def on_terminal() -> bool:
    """Whether somebody watches stderr; it is None where it was closed."""
    return bool(sys.stderr) and sys.stderr.isatty()


class Progress:
    """How a run goes, and where it is: on a terminal a line that is drawn over, else one every 20 seconds;
    the log; saves. graphs: on CUDA, steps as graphs."""

    def __init__(self, out: Path | None = None, device: str | torch.device = "cpu", quiet: bool = True,
                 graphs: bool = False):
        self.out, self.device, self.quiet, self.graphs = out, torch.device(device), quiet, graphs
        self.terminal, self.began = not quiet and on_terminal(), time.monotonic()
        self.costs: list[float] = []  # of the stages to come, in plain steps, about
        self.number, self.done, self.cost, self.printed = 0, 0.0, 0.0, self.began
        self.begin("stage")

    def begin(self, name: str, cost: float = 0.0, path: Path | None = None, key: str = "") -> None:
        """The next stage, and where its saves go."""
        self.number, self.done = self.number + (cost > 0), self.done + self.cost
        self.name, self.cost, self.path, self.key = name, cost, path, key
        self.stage_began = self.saved = time.monotonic()
        self.step = self.steps = self.saved_step = 0

    def say(self, text: str) -> None:
        if not self.quiet:
            click.echo("\r\033[K" * self.terminal, err=True, nl=False)
            click.echo(text)

    def at(self, step: int, steps: int) -> None:
        self.step, self.steps, now = step, steps, time.monotonic()
        if now - self.printed > (0.5 if self.terminal else 20):
            self.printed, done = now, self.done + self.cost * step / steps
            left = (now - self.began) * (sum(self.costs) / done - 1) / 60 if done else math.inf
            where = f"{self.name}, step {step} of {steps}"
            line = f"stage {self.number} of {len(self.costs)}, about {left:.0f} min left: {where}"
            click.echo(f"\r{line:.78}\033[K", err=True, nl=False) if self.terminal else self.say(line)

    def fetched(self, step: int, steps: int, terms: dict[str, float], state: Callable[[], dict]) -> None:
        """All up to this step is finite: log it, and save what there is now and then."""
        seconds = round(time.monotonic() - self.stage_began, 2)
        if self.out:
            row = dict(stage=self.name, step=step, steps=steps, seconds=seconds)
            append(self.out / "log.jsonl", row | terms)
        if self.path and step < steps and time.monotonic() - self.saved >= SAVE_EVERY:
            save(self.path, self.key, state() | {"step": step})
            self.saved, self.saved_step = time.monotonic(), step
        if step == steps:
            self.say(f"{self.name}: {steps} steps in {seconds:.1f} s, {show(terms)}")


def show(terms: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in terms.items())


# ------------------------------- Models by name, numbers by key -------------------------------

RECIPE = 2  # raised when a change of the code changes what a stage computes: older files then no longer fit
PIGGYBACK_TASKS, REFERENCES = ("source-subset", "downstream"), ("scratch", "random", "oracle", "transferred")


def needs(model: str) -> Sequence[str]:
    """The models that one is made from, in the order of the stages."""
    return ("pretrained", "transferred")[: 2 if model.startswith("disposed:") else model == "transferred"]


class Run:
    """One seed of one config: every model by its name, every number by its key, made once and kept."""

    def __init__(self, config: Config, seed: int, data_dir: Path, progress: Progress, results: Results):
        self.config, self.seed, self.data_dir, self.results = config, seed, data_dir, results
        self.progress, self.device = progress, progress.device
        self.mixed = config.precision == "auto" and self.device.type == "cuda"
        self.made_with = torch.__version__, self.device.type  # in every key: others make other models
        self.tasks = {name: self.task(name) for name in ("source", "target", *PIGGYBACK_TASKS, "oracle")}
        count = {name: len(task.y) for name, task in self.tasks.items()}
        self.has_oracle = count["oracle"] > count["target"]
        if len(sizes := {tuple(task.x.shape[2:]) for task in self.tasks.values()}) > 1:
            raise DTLError(f"the tasks' images differ in size, {sizes}: --image-size N brings them to one")
        if max(count["source-subset"], config.chunks * config.chunk_size) > count["source"]:
            raise DTLError(f"the source task's {count['source']} images are fewer than --subset-per-class "
                           f"{config.subset_per_class}, or --chunks {config.chunks} of --chunk-size "
                           f"{config.chunk_size}, ask for")
        by_size = {name: max(least, epochs * (count[task] // config.batch_size))
                   for name, (task, epochs, least) in EPOCHS.items() if getattr(config, name) == 0}
        self.config = replace(config, **by_size)

    @functools.cache
    def task(self, name: str) -> Task:
        """`source`, `target`, `source-subset`, `downstream`, or `oracle`: more images of the target."""
        c, more = self.config, self.config.oracle_per_class
        derived = {
            "source-subset": ("subset-per-class", f"{c.source.split('@')[0]}@{c.subset_per_class}"),
            "oracle": ("oracle-per-class", c.target.split("@")[0] + f"@{more}" * bool(more)),
        }
        option, spec = derived[name] if name in derived else (name, getattr(c, name))
        try:
            return load_task(spec, self.seed, self.data_dir, self.device, c.split, c.image_size)
        except DTLError as error:
            raise DTLError(f"--{option}: {error}") from None

    def schedule(self, steps: int, lr: float, **more: Any) -> Schedule:
        return Schedule(steps, lr, self.config.batch_size, self.config.augment, self.mixed, **more)

    def recipe(self, name: str) -> tuple[list, float, Callable[[], Model]]:
        """(what a model depends on, about how many plain steps it takes, how to make it)."""
        c, progress, task = self.config, self.progress, self.task
        plain = {"random": ("source", FRESH, 0, 0.0),
                 "pretrained": ("source", STAGE1, c.pretrain_steps, c.pretrain_lr),
                 "scratch": ("target", FRESH, c.fresh_steps, c.fresh_lr),
                 "oracle": ("oracle", FRESH, c.fresh_steps, c.fresh_lr),
                 "transferred": ("target", STAGE2, c.transfer_steps, c.transfer_lr)}
        if name in plain:
            data, part, *how = plain[name]
            how, seed, moved = self.schedule(*how), stream(self.seed, part, how[0]), name == "transferred"
            before = self.key("pretrained") if moved else c.network
            return [before, asdict(how), task(data).fingerprint], how.steps, lambda: (
                transfer(self.model("pretrained"), task(data), how, seed, progress) if moved else
                pretrain(task(data), c.network, how, seed, progress))
        method = METHODS[short := name.removeprefix("disposed:")]
        how = (c.fresh_steps, c.fresh_lr if method.fresh else c.dispose_lr) if method.long else (
            c.dispose_steps, c.dispose_lr)
        how = self.schedule(*how, weight_decay=method.weight_decay)
        weight = c.weight_of().get(short, method.weight)
        options = dict(similarity=c.similarity, gc_head=c.gc_head, chunks=c.chunks, chunk_size=c.chunk_size)
        cost = {None: 0.0, gradient_collision: 5.0, gradient_norm: 4.0}.get(method.forget, 1.5)
        cost += 1.5 * method.distill
        cost = how.steps * (1.3 + cost * c.chunks * c.chunk_size / c.batch_size)
        return [self.key("transferred"), asdict(how), weight, options], cost, lambda: dispose(
            self.model("transferred"), self.model("pretrained").head, task("source"), task("target"), method,
            how, stream(self.seed, STAGE3), progress, network=c.network, weight=weight, **options)

    def seconds_a_step(self) -> float:
        """What a plain step takes on this machine."""
        how = self.schedule(10, 0.0)
        for _ in range(2):  # the first steps are slower
            began = time.monotonic()
            pretrain(self.task("source"), self.config.network, how, 0,
                     Progress(device=self.device, graphs=self.progress.graphs))
        return (time.monotonic() - began) / how.steps

    @functools.cache
    def key(self, *names: Any) -> str:
        """The digest of everything configured up to a model, or to a number."""
        depends = self.recipe(*names)[0] if len(names) == 1 else []
        return digest([RECIPE, *self.made_with, self.seed, *names, *depends])[:16]

    def path(self, name: str) -> Path:
        file = f"{name.replace(':', '-')}-seed{self.seed}-{self.key(name)}.pt"
        return self.results.path.parent / "checkpoints" / file

    @functools.lru_cache(maxsize=16)
    def model(self, name: str) -> Model:
        """`random`, `pretrained`, `scratch`, `oracle`, `transferred`, `disposed:METHOD`: loaded or made."""
        path, (_, cost, make) = self.path(name), self.recipe(name)
        part, state = path.with_suffix(".part.pt"), load(path, self.key(name), self.device)
        if state is None:
            for earlier in needs(name):
                self.model(earlier)  # where it is missing or damaged: a stage of its own, not within this one
            self.progress.begin(f"seed {self.seed} {name}", cost, part, self.key(name))
            made = make()
            state = {"backbone": made.backbone.state_dict(), "head": made.head.state_dict()}
            save(path, self.key(name), state)
            part.unlink(missing_ok=True)
        head = new_head(*state["head"]["weight"].shape[::-1], 0, self.device)
        model = Model(new_backbone(self.config.network, 0, self.device), head, self.mixed)
        model.backbone.load_state_dict(state["backbone"])
        model.head.load_state_dict(state["head"])
        return model.eval()

    def number(self, model: str, metric: str, task: str | None = None, attacker: str | None = None,
               attacker_seed: int | None = None) -> tuple[dict, Task, Schedule | None]:
        """(the line of results.jsonl but for its value, the task measured on, how the attacker trains)."""
        data, how = self.task(task or metric.split("_")[0]), ATTACKERS.get(attacker)
        schedule = how and self.schedule(how.times * self.config.attack_steps, how.lr,
                                         optimizer=how.optimizer, gentle=how.gentle)
        key = self.key(metric, self.key(model), data.fingerprint, str(how), str(schedule), attacker_seed)
        return dict(seed=self.seed, model=model, metric=metric, task=task, attacker=attacker,
                    attacker_seed=attacker_seed, key=key), data, schedule

    def measure(self, *which: Any) -> dict:
        """A line of results.jsonl, found by its key or made now. which: as in `number`."""
        record, data, schedule = self.number(*which)
        if record["key"] not in self.results:
            model, began = self.model(record["model"]), time.monotonic()
            name = f"seed {self.seed} {' '.join(str(w) for w in which if w)}"
            if schedule is None:
                right = hits(model, data)
            else:
                self.progress.begin(name, schedule.steps)
                seed = stream(self.seed, "piggyback", record["task"], record["attacker_seed"])
                right, record["mean_cosine"] = piggyback(
                    model.backbone, data, ATTACKERS[record["attacker"]], schedule, seed, self.progress)
            bits = base64.b64encode(np.packbits(right.cpu().numpy()).tobytes()).decode()
            record |= dict(value=right.double().mean().item(), images=len(right), hits=bits,
                           config=self.config.digest(), revision=git_revision(),
                           seconds=round(time.monotonic() - began, 1))
            self.results.add(record)
            self.progress.say(f"{name}: {100 * record['value']:.1f} %")
        return self.results[record["key"]]


# ---------------------------------------- The report ----------------------------------------
# Rows are models, columns what was measured; report.md, its closing words and the picture come from them.

DRAWS = 1000  # of the bootstrap
Interval = tuple[float, float, float]  # value, and its 95% bootstrap interval over seeds and test images


@functools.cache
def draws(count: int, images: bool) -> np.ndarray:
    """(1 + DRAWS, count) float64, weights that sum to 1: all alike, then of DRAWS drawings with replacement.
    The same for every model: what is compared is compared on the same seeds and images."""
    drawn = np.random.default_rng(images).multinomial(count, np.full(count, 1 / count), DRAWS)
    return np.concatenate([np.ones((1, count)), drawn]) / count


class Rows:
    """What was measured. means: (model, metric, task, attacker or "worst") -> (1 + DRAWS,): the mean over
    seeds, attacker seeds and test images, then that of every drawing; cosines: the mean over seeds of the
    attacker's chunk gradients' at its step 0."""

    def __init__(self, records: Sequence[dict], models: Sequence[str]) -> None:
        found: dict[tuple, dict[int, list[np.ndarray]]] = {}
        cosines: dict[tuple, list[float]] = {}
        for r in records:
            key = r["model"], r["metric"], r["task"], r["attacker"]
            bits = np.unpackbits(np.frombuffer(base64.b64decode(r["hits"]), np.uint8), count=r["images"])
            found.setdefault(key, {}).setdefault(r["seed"], []).append(bits)
            cosines.setdefault(key, []).append(r.get("mean_cosine", 0.0))
        self.means, self.cosines = {}, {key: np.mean(values) for key, values in cosines.items()}
        for key, seeds in found.items():
            right = np.array([np.mean(bits, 0) for _, bits in sorted(seeds.items())])  # (seeds, images)
            of_seed = right @ draws(right.shape[1], True).T  # (seeds, 1 + DRAWS)
            self.means[key] = (draws(len(right), False).T * of_seed).sum(0)
        self.attackers = [a for a in ATTACKERS if any(k[3] == a for k in found)]
        seeds, ways = {r["seed"] for r in records}, [*product(PIGGYBACK_TASKS, self.attackers)]
        self.models = [m for m in models if ways and all(  # those that every attacker was tried on
            found.get((m, "pl_accuracy", *way), {}).keys() == seeds for way in ways)]
        for m, task in product(self.models, PIGGYBACK_TASKS):
            tried = [self.means[m, "pl_accuracy", task, attacker] for attacker in self.attackers]
            self.means[m, "pl_accuracy", task, "worst"] = max(tried, key=lambda mean: mean[0])

    def get(self, what: str, model: str, task: str | None = None, attacker: str = "",
            other: str = "") -> Interval | None:
        """`target` accuracy, its `change` by disposal; `pl` accuracy, its `points` above oracle, and `leak`:
        0 as oracle, which never saw the source, 1 as transferred; a ratio of means. `minus`: either accuracy
        minus that of the model `other`."""
        against = {"change": ["transferred"], "points": ["oracle"], "leak": ["transferred", "oracle"],
                   "minus": [other]}
        where = ("pl_accuracy", task, attacker) if task else ("target_accuracy", None, None)
        columns = [self.means.get((m, *where)) for m in (model, *against.get(what, []))]
        if any(c is None for c in columns) or what == "leak" and self.why_no_leak(task, attacker):
            return None
        ratio = lambda pl, top, zero: (pl - zero) / (top - zero)  # noqa: E731
        value, *drawn = (lambda a: a, np.subtract, ratio)[len(columns) - 1](*columns)
        return value, *np.percentile(drawn, (2.5, 97.5))

    def why_no_leak(self, task: str, attacker: str = "worst") -> str:
        """Nothing, or why the ratio would say nothing."""
        top, zero = (self.means.get((m, "pl_accuracy", task, attacker)) for m in ("transferred", "oracle"))
        if top is None or zero is None:
            return ("no leak: there is no oracle; `all` makes one where the target task leaves it images, as "
                    "b.npz@20 does")
        gap, *drawn = 100 * (top - zero)
        least = max(3.0, 2 * np.std(drawn))
        return "" if gap >= least and min(drawn) > 0 else (
            f"no leak on {task}: transferred is {gap:.1f} points above oracle, where {least:.1f}, and some "
            "in every drawing of the bootstrap, are needed; more source data, steps or seeds may help")


def cell(found: Interval | None, style: str = ".1f", scale: float = 100, interval: bool = True) -> str:
    """48.5, or with an interval 48.5 (46.1, 50.9). Rounded twice: what is a tie on one machine is on all."""
    value, low, high = (f"{round(scale * f, 9):{style}}" for f in found) if found else "---"
    return value if low == high or not interval else f"{value} ({low}, {high})"


def tables(rows: Rows) -> list[str]:
    """Markdown: one table a piggyback task; of several attackers, their PL accuracies, too."""
    short, several = functools.partial(cell, interval=False), len(rows.attackers) > 1
    kinds = {"worst": "worst " * several} | (
        {"fixed": "fixed "} if several and "fixed" in rows.attackers else {})
    lines = []
    for task in PIGGYBACK_TASKS:
        head = [name + column for name in kinds.values() for column in ("PL %", "leak")]
        table = [[task, "target %", "change", *head, "cosine"]]
        others = [[f"PL, {task}", *rows.attackers]]
        for m in rows.models:
            target, change = rows.get("target", m), rows.get("change", m)
            row = [m.removeprefix("disposed:"), short(target), short(change, "+.1f")]
            others.append([row[0], *(short(rows.get("pl", m, task, a)) for a in rows.attackers)])
            for kind in kinds:
                pl, points, leak = (rows.get(what, m, task, kind) for what in ("pl", "points", "leak"))
                row += [f"{short(pl)} {short(points, '+.1f')}", cell(leak, ".2f", 1, kind == "worst")]
            table.append([*row, f"{rows.cosines[m, 'pl_accuracy', task, rows.attackers[0]]:+.2f}"])
        compared = kinds | ({"few": "few "} if several and "few" in rows.attackers else {})
        pairs = [[f"paired, {task}", "target", *(name + "PL" for name in compared.values())]]
        for names in PAIRS:
            one, other = (f"disposed:{m}" for m in names)
            if {one, other} <= {*rows.models}:
                found = [rows.get("minus", one, None, "", other),
                         *(rows.get("minus", one, task, kind, other) for kind in compared)]
                pairs.append([" - ".join(names), *(cell(f, "+.1f") for f in found)])
        for cells in [table] + [others] * several + [pairs] * (len(pairs) > 1):
            widths = [max(map(len, column)) for column in zip(*cells)]
            cells.insert(1, ["-" * width for width in widths])
            lines += ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells] + [""]
    return lines


def in_words(rows: Rows) -> list[str]:
    """What was seen, with its numbers: a paragraph each."""
    lines = list(dict.fromkeys(filter(None, map(rows.why_no_leak, PIGGYBACK_TASKS))))
    for m in (m for m in ("disposed:gc", "disposed:gc-fresh") if m in rows.models):
        target, change = cell(rows.get("target", m)), cell(rows.get("change", m), "+.1f")
        name = m.removeprefix("disposed:")
        lines.append(f"In words: {name} keeps {target}% on the target task ({change} points).")
        for task, data in zip(PIGGYBACK_TASKS, ("source data", "new data")):
            pl, top, zero = (cell(rows.get("pl", x, task, "worst")) for x in (m, "transferred", "oracle"))
            leak = cell(rows.get("leak", m, task, "worst"), ".2f", 1)
            lines[-1] += (f" On {data} an attacker reaches {pl}%, {top}% without disposal, {zero}% had the "
                          "source never been seen" + f": a leak of {leak}" * (leak != "-") + ".")
    return lines


def report(out: Path, config: Config, about: Sequence[str], records: Sequence[dict],
           models: Sequence[str]) -> str:
    """Writes OUT/report.md, whose text it returns, and OUT/report.png. about: the command and what ran it."""
    source = np.mean([r["value"] for r in records if r["metric"] == "source_accuracy"])
    rows = Rows(records, models)
    text = "\n".join([
        f"Source `{config.source}`, target `{config.target}`, piggyback `source-subset` (the source @"
        f"{config.subset_per_class}) and `downstream` (`{config.downstream}`); {config.network}; "
        f"{config.split} images; seeds {','.join(map(str, dict.fromkeys(r['seed'] for r in records)))}; "
        f"accuracy after stage 1 {100 * source:.1f}%.", "",
        "PL: accuracy that an attacker reaches, and points above `oracle`, which never saw the source; lower "
        "is better. Leak: 0 as `oracle`, 1 as `transferred`; below 0 is hard to train, not more forgotten. "
        "Cosine: of the attacker's chunk gradients at step 0. In brackets: 95% bootstrap over seeds and test "
        "images. Paired: PL of one model minus that of another on the same seeds and images. "
        f"Worst: the strongest on each model of {len(rows.attackers)} attackers "
        f"({', '.join(rows.attackers)}).", "",
        *tables(rows), "\n\n".join([*in_words(rows), f"`{about[0]}`, {', '.join(about[1:])}."]), ""])
    write_atomically(out / "report.md", text.encode(errors="backslashreplace"))
    picture(out / "report.png", rows)
    return text


def picture(path: Path, rows: Rows) -> None:
    """Target accuracy kept, and what the attacker gets, a line a model. Nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown, several = [m for m in rows.models if m not in ("random", "oracle")], len(rows.attackers) > 1
    size, kinds = (10, 1.5 + 0.32 * len(shown)), {"worst": ("k", "strongest"), "fixed": ("w", "fixed")}
    chart, panels = pyplot.subplots(1, 3, figsize=size, layout="constrained", sharey=True)
    titles = ("target accuracy kept, %", "attacker gets on source data, %", "attacker gets on new data, %")
    for panel, task, title in zip(panels, (None, *PIGGYBACK_TASKS), titles):
        what = "pl" if task else "target"
        for model, style, words, side in (("oracle", "--", "never seen", "right"),
                                          ("transferred", "-", "no disposal", "center")):
            if (level := rows.get(what, model, task, "worst")) and (task or model == "transferred"):
                panel.axvline(100 * level[0], color="0.6", lw=1, ls=style, zorder=0)
                panel.annotate(words, (100 * level[0], -0.6), ha=side, va="bottom", fontsize=7)
        for y, model in enumerate(shown):
            for kind, (fill, words) in kinds.items() if task and several else (("worst", ("k", "")),):
                if found := rows.get(what, model, task, kind):
                    value, *interval = (100 * f for f in found)
                    panel.plot(interval, [y, y], color="k", lw=1.2)
                    panel.plot(value, y, "o", color="k", mfc=fill, ms=6)
                    panel.annotate(words * (model == shown[-1]), (value, y + 0.7), ha="center", fontsize=7)
        panel.set_title(title, fontsize=9, pad=14)
        panel.set(ylim=(len(shown) - 0.2, -0.6))
        panel.set_yticks(range(len(shown)), [m.removeprefix("disposed:") for m in shown])
        panel.spines[["top", "right", "left"]].set_visible(False)
    buffer = io.BytesIO()
    chart.savefig(buffer, format="png", dpi=120)
    pyplot.close(chart)
    write_atomically(path, buffer.getvalue())


# ---------------------------------------- The command line ----------------------------------------

WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))  # torchrun's


@functools.cache
def git_revision() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(command, cwd=Path(__file__).parent, text=True, timeout=10,
                                       stderr=subprocess.DEVNULL).strip()
    return "unknown"


def find_device(gpu: int | None, precision: str) -> torch.device:
    if gpu is None:
        return torch.device("cpu")
    count, gpu = torch.cuda.device_count(), gpu + int(os.environ.get("LOCAL_RANK", 0))
    if not 0 <= gpu < count:
        raise DTLError(f"--gpu {gpu}: this PyTorch ({torch.__version__}) sees {count} CUDA devices, "
                       "numbered from 0; without --gpu it runs on the CPU")
    torch.backends.cudnn.allow_tf32 = precision == "auto"
    return torch.device("cuda", gpu)


def names_in(option: str, text: str, known: Sequence[str], **sets: Sequence[str]) -> list[str]:
    """NAME,NAME,... of what is known, or the name of a set of them."""
    names = list(sets.get(text, text.split(",")))
    if set(names) - set(known) or len(set(names)) < len(names):
        raise DTLError(f"{option} {text[:60]!r}: not a list of {', '.join([*sets, *known])}, each once")
    return names


def work_to_do(runs: Sequence[Run], models: Sequence[str], attacks: Sequence[tuple]) -> tuple[list, list]:
    """What is missing, in layers, each in need of those before (references, `transferred`, disposals,
    numbers), as (about how many plain steps, Run.model or Run.measure, what); and all that is to be reported,
    as (Run, what to measure)."""
    layers: list[list] = [[], [], [], []]
    numbers = []
    for r in runs:
        wanted = set() if attacks else {"pretrained", *models}  # models; with attacks, those not yet measured
        for m in ["pretrained", *(m for m in models if m != "oracle" or r.has_oracle)]:
            of_model = [(m, "source_accuracy" if m == "pretrained" else "target_accuracy")] * (m != "random")
            of_model += [(m, "pl_accuracy", *attack) for attack in attacks if m != "pretrained"]
            for which in of_model:
                record, _, schedule = r.number(*which)
                if record["key"] not in r.results:
                    layers[3].append((schedule.steps if schedule else 0, r.measure, *which))
                    wanted.add(m)
            numbers += [(r, *which) for which in of_model]
        wanted |= {earlier for m in wanted for earlier in needs(m)}
        for m in (m for m in ["pretrained", *models] if m in wanted and not r.path(m).exists()):
            k = 2 if m == "oracle" else len(needs(m))  # nothing but attacks needs oracle
            layers[k].append((r.recipe(m)[1], r.model, m))
    return layers, numbers


def run(stage: str, preset: str, gpu: int | None, seeds: str, methods: str, attackers: str,
        attacker_seeds: int, no_graphs: bool, out: Path, data_dir: Path, **given: Any) -> None:
    """What every command does: make the models it needs, layer by layer, measure them, report. Under torchrun
    every rank takes its share of each layer, and files are how results travel."""
    given = {name: value for name, value in given.items() if value is not None}
    own = ".npz" in "".join(given.get(task, "") for task in ("source", "target", "downstream"))
    preset = preset or ("own" if own else "demo" if gpu is None else "cifar")
    given["weights"] = f"{PRESETS[preset].get('weights', '')},{given.get('weights', '')}".strip(",")
    config = Config(**PRESETS[preset] | given)
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", seeds) or len(set(seeds.split(","))) < len(seeds.split(",")):
        raise DTLError(f"--seeds {seeds[:60]!r}: not a list of whole numbers like 0,1,2, each once")
    methods = methods or ("toy" if preset in ("demo", "own") else "all")
    methods = [f"disposed:{m}" for m in names_in("--methods", methods, METHODS, all=METHODS, toy=TOY_METHODS)]
    attackers = names_in("--attackers", attackers or ("small" if stage == "audit" else "fixed"), ATTACKERS,
                         small=SMALL, full=ATTACKERS)
    graphs, results = gpu is not None and not no_graphs, Results(out)
    progress = Progress(out, find_device(gpu, config.precision), quiet=RANK > 0, graphs=graphs)
    if WORLD > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    runs = [Run(config, int(seed), data_dir, progress, results) for seed in seeds.split(",")]
    config = runs[0].config  # with its steps, where they follow the data

    attacks = [(t, a, s) for t in PIGGYBACK_TASKS for a in attackers for s in range(attacker_seeds)]
    attacks = attacks if stage in ("piggyback", "all", "audit") else []
    models = {"pretrain": [], "transfer": ["transferred"], "dispose": ["transferred", *methods],
              "piggyback": ["transferred", *methods]}.get(stage, [*REFERENCES, *methods])
    layers, numbers = work_to_do(runs, models, attacks)
    for k, layer in enumerate(layers):  # the longest first, each to the rank that has least to do
        shares: list[list] = [[] for _ in range(WORLD)]
        for item in sorted(layer, key=lambda item: -item[0]) if WORLD > 1 else layer:
            min(shares, key=lambda share: sum(cost for cost, *_ in share)).append(item)
        layers[k] = shares[RANK]
    progress.costs = [cost for layer in layers for cost, *_ in layer if cost]

    machine = f"CPU, {torch.get_num_threads()} threads, {platform.machine()}" if gpu is None else (
        f"{torch.cuda.get_device_name(progress.device)}, CUDA {torch.version.cuda}")
    about = [f"python dtl.py {' '.join(sys.argv[1:])}",
             f"preset {preset}, config {config.digest()}, seeds {seeds}",
             f"revision {git_revision()}, Python {platform.python_version()}, torch {torch.__version__}, "
             f"numpy {np.__version__}, {machine}"]
    for line in (*about, f"native routine: {native_routine()[1]}",
                 *(f"  {name:<17} {value}" for name, value in asdict(config).items()),
                 *(f"  {name:<17} {len(t.y)} training, {len(t.y_test)} {config.split} images, {t.classes} "
                   f"classes, {t.x.shape[2]}x{t.x.shape[3]}" for name, t in runs[0].tasks.items())):
        progress.say(line)
    if RANK == 0:
        append(out / "log.jsonl", dict(about=about, settings=asdict(config)))
    try:
        progress.begin("timing a step")
        minutes = sum(progress.costs) * runs[0].seconds_a_step() / 60 if progress.costs else 0
        progress.say(f"{len(progress.costs)} stages to come, about {minutes:.0f} min")
        for layer in layers:
            for _, work, *which in layer:
                work(*which)
            if WORLD > 1:
                torch.distributed.barrier()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{progress.name} was at step {progress.step} of {progress.steps}, saved up "
                                f"to step {progress.saved_step}") from None
    except (DTLError, OSError, torch.OutOfMemoryError) as error:
        hint = "a smaller --batch-size may do: " * isinstance(error, torch.OutOfMemoryError)
        raise DTLError(f"{progress.name}: {hint}{error}") from None
    if RANK > 0 or not attacks:
        return
    if WORLD > 1:
        results.__init__(out)  # with what other ranks have added
    text = report(out, config, about, [r.measure(*which) for r, *which in numbers], [*REFERENCES, *methods])
    progress.say(f"\n{text}\nwrote {out / 'report.md'}, {results.path}")


def terse(command: Callable) -> Callable:
    """A command whose user's mistakes are told in one line, with a non-zero exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        rank = f"rank {RANK}: " * (WORLD > 1)
        try:
            command(*args, **kwargs)
        except (DTLError, OSError, torch.OutOfMemoryError) as error:
            raise click.ClickException(rank + " ".join(str(error).split())[:600]) from None
        except KeyboardInterrupt as interrupt:
            click.echo(f"\n{rank}interrupted: {interrupt or 'between stages'}; finished stages are saved, "
                       "the same command goes on from there", err=True)
            sys.exit(130)

    return wrapped


class Grouped(click.Command):
    """Help with the options in the groups of Config."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        groups = {f.name: f.metadata["group"] for f in fields(Config)}
        for group in ("", *dict.fromkeys(groups.values())):
            with formatter.section(group or "The run"):
                formatter.write_dl([option.get_help_record(context) for option in self.get_params(context)
                                    if groups.get(option.name, "") == group])


option, folder = functools.partial(click.Option, metavar=""), click.Path(path_type=Path)
OPTIONS = [
    option(["--preset"], type=click.Choice(list(PRESETS)), help="demo; cifar with --gpu; own for .npz files"),
    option(["--gpu"], type=int, help="number of the CUDA device; the CPU if left out"),
    option(["--no-graphs"], is_flag=True, help="with --gpu: every operation launched by itself"),
    option(["--seeds"], default="0", help="as in 0,1,2 [0]"),
    option(["--methods"], help=f"all, toy, or of {','.join(METHODS)}"),
    option(["--attackers"], help=f"small, full, or of {','.join(ATTACKERS)} [fixed]"),
    option(["--attacker-seeds"], type=click.IntRange(1, 100), default=1, help="seeds of each [1]"),
    option(["--out"], type=folder, default="runs", envvar="DTL_OUT", help="folder of results [runs]"),
    option(["--data-dir"], type=folder, default="data", envvar="DTL_DATA_DIR", help="of CIFAR [data]"),
    *(option(["--" + f.name.replace("_", "-"), f.name],
             help=": ".join(filter(None, (f.metadata["doc"], " or ".join(f.metadata["choices"]))))
             + f" [{PRESETS['demo'].get(f.name, f.default)}]",
             type=click.Choice(f.metadata["choices"]) if f.metadata["choices"] else f.type)
      for f in fields(Config)),
]
STAGES = {
    "all": "All stages, references, report; as in: python dtl.py all --seeds 0,1,2",
    "audit": "The same as all --attackers small: the worst case of five attackers.",
    "pretrain": "Stage 1: train a network on the source task.",
    "transfer": "Stage 2: train its backbone, with a new head, on the target task.",
    "dispose": "Stage 3: unlearn the source knowledge, keep the target task.",
    "piggyback": "Stage 4: attack the scrubbed models; their PL accuracy.",
}


@click.group(context_settings={"max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Disposable Transfer Learning: pretrain, transfer, dispose, piggyback."""


for _stage, _help in STAGES.items():
    _run = terse(functools.partial(run, _stage))
    main.add_command(Grouped(_stage, callback=_run, params=OPTIONS, help=_help))


@main.command("data", help="Fetch and verify CIFAR-10 and CIFAR-100.")
@click.option("--data-dir", type=folder, default="data", envvar="DTL_DATA_DIR")
@terse
def data_command(data_dir: Path) -> None:
    for name in ARCHIVES:
        _, y, _, y_test = read_archive(name, data_dir)
        click.echo(f"{name}: {len(y)} training, {len(y_test)} test images in {data_dir / ARCHIVES[name][2]}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(prog_name="dtl.py")
    finally:
        try:
            print(end="", flush=True)
        except OSError:  # told of already: Python need not try once more, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
