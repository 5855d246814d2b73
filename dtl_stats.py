"""Pairwise statistics of chunk gradients: by the C routine of _gc_native.c where it is built, by torch everywhere."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

import torch
from torch import Tensor


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
    if len(devices) > 1:
        raise ValueError(f"gradients on several devices: {devices}")
    module, reason = native_routine()
    if backend == "native" and module is None:
        raise RuntimeError(f"backend 'native': {reason}")
    readable = n <= 1024 and all(device.type == "cpu" for device in devices)
    if backend == "native" and not readable:
        raise ValueError(f"backend 'native' takes up to 1024 chunks in CPU memory, not {n} on {devices}: use 'torch'")
    native = backend != "torch" and module is not None and readable

    with torch.no_grad():
        gram = torch.zeros(n, n, dtype=torch.float64, device="cpu" if native else next(iter(devices), "cpu"))
        for column in columns:
            _add_gram_native(module, column, gram) if native else _add_gram_torch(column, gram)
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
