#!/usr/bin/env python3
"""python experiments/benchmark.py loss: the GC loss beside a plain SGD step; native: the C routine
beside torch.

Every ratio comes from one run; what is compared takes turns, so that a busy moment of the machine
meets all (but torch in float64 and TorchJD, which take much longer and go last). `loss cuda` is on
a GPU, `loss cpu resnet18` another network.
"""

import multiprocessing
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dtl  # noqa: E402

try:
    from torchjd._linalg import compute_gramian  # a peer, for comparison alone
except ImportError:
    compute_gramian = None

FORMS = "SGD step", "gradient_collision_loss"


def machine(device):
    if device.type == "cuda":
        return f"GPU {torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"


def medians(*work, times):
    """Median milliseconds of each, in turns, without the first round, which wakes threads."""
    took = [[] for _ in work]
    for _ in range(times):
        for mine, call in zip(took, work):
            began = time.perf_counter()
            call()
            mine.append(1e3 * (time.perf_counter() - began))
    return [statistics.median(mine[1:]) for mine in took]


def prepare_step(form, chunks, chunk_size, network, device):
    """A step on chunks * chunk_size random 16x16 images: plain SGD, or GC."""
    backbone, images = dtl.new_backbone(network, 0, device), chunks * chunk_size
    x = torch.randn(images, 3, 16, 16, device=device)
    y = torch.arange(images, device=device) % 80
    model = nn.Sequential(backbone, nn.Linear(backbone(x[:2]).shape[1], 80, device=device))
    optimizer, params = torch.optim.SGD(model.parameters(), 1e-6), list(backbone.parameters())

    def part(x, y):
        return F.cross_entropy(model(x), y)

    parts = list(zip(x.chunk(chunks), y.chunk(chunks)))

    def forget():
        if form == "SGD step":
            return part(x, y)
        return dtl.gradient_collision_loss([part(*of) for of in parts], params)

    def step():
        optimizer.zero_grad()
        forget().backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def peak_memory(form, chunks, chunk_size, network, device):
    """Peak MB of two steps above that of a step on four images. Once a process: it never falls."""

    def peak():
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device) / 2**20
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

    prepare_step(form, 2, 2, network, device)()  # libraries initialise themselves
    step = prepare_step(form, chunks, chunk_size, network, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = peak()
    step(), step()
    return peak() - before


def loss(device="cpu", network="resnet8", repeats=7):
    """Time and peak memory of the GC loss beside an SGD step on the same images."""
    device, sizes = torch.device(device), ((8, 64), (4, 16), (32, 16))
    # In children, before anything is done here: a child's peak starts at its parent's.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = {
            form: [pool.apply(peak_memory, (form, *size, network, device)) for size in sizes]
            for form in FORMS
        }
    took = {}
    for size in ((8, 64), (2, 16)):
        steps = [prepare_step(form, *size, network, device) for form in FORMS]
        took[size] = medians(*steps, times=(repeats + 1) * 128 // size[0] // size[1] + repeats)
    versions = f"torch {torch.__version__}, {machine(device)}"
    print(f"{network}, 16x16 images, {versions}; medians\n")
    print(f"{'chunks x images':<34}{'8 x 64':>8}{'':>7}{'2 x 16':>8}{'':>7}", end="")
    print(f"{'8 x 64':>9}{'4 x 16':>9}{'32 x 16':>9}")
    print(f"{'':<34}{'ms':>8}{'ratio':>7}{'ms':>8}{'ratio':>7}{'peak MB':>9}{'peak MB':>9}", end="")
    print(f"{'peak MB':>9}{'ratio':>7}")
    for k, form in enumerate(FORMS):
        times = "".join(f"{ms[k]:>8.1f}{ms[k] / ms[0]:>7.2f}" for ms in took.values())
        memory = "".join(f"{peak:>9.0f}" for peak in peaks[form])
        ratio = peaks[form][2] / peaks[form][1]
        print(f"{form:<34}{times}{memory}{ratio:>7.2f}")


def in_float64(flat):
    wide = flat.double()
    return wide @ wide.T


def native_row(n, size, repeats):
    flat = torch.randn(n, size, generator=torch.Generator().manual_seed(n))
    rows = list(flat)
    read, routine, single = medians(
        lambda: torch.dot(flat.view(-1), flat.view(-1)),
        lambda: dtl.gradient_stats(rows, "native"),
        lambda: flat @ flat.T,
        times=repeats,
    )
    (double,) = medians(lambda: in_float64(flat), times=3)
    line = f"{n:2} {read:7.1f} {routine:7.1f} {routine / read:6.2f}"
    for other in (single, double):
        line += f" {other:10.1f} {other / routine:8.1f}"
    if compute_gramian:
        line += f" {medians(lambda: compute_gramian(flat), times=repeats)[0]:8.1f}"
    print(line, flush=True)


def native(repeats=7):
    """Median milliseconds of a Gram matrix of n gradients as large as ResNet-18's, in float32.

    read: torch.dot of all values with themselves, which takes them through the cores once and keeps
    nothing. torch f64: with the copy to float64. At n = 32 it all needs 6 GB of memory.
    """
    cpu, (module, path) = torch.device("cpu"), dtl.native_routine()
    size = sum(p.numel() for p in dtl.new_backbone("resnet18", 0, cpu).parameters())
    print(f"native routine: {path}; torch {torch.__version__}, {machine(cpu)}")
    if module is None:
        sys.exit("python build_native.py builds it")
    print(f"Gram matrix of n x {size:,} float32, median ms of {repeats - 1}")
    print(" n    read  native  /read  torch f32  /native  torch f64  /native  TorchJD")
    for n in (4, 8, 16, 32):
        native_row(n, size, repeats)


if __name__ == "__main__":
    known = {"loss": loss, "native": native}
    if not set(sys.argv[1:2]) & {*known}:
        sys.exit("python experiments/benchmark.py native | loss [cpu | cuda [resnet8 | resnet18]]")
    known[sys.argv[1]](*sys.argv[2:])
