"""What `python dtl.py bench` runs: the GC loss beside a plain SGD step, and the native routine beside torch.

Every ratio comes from one run; what is compared takes turns, so that a busy moment of the machine meets all of it (but
torch in float64 and TorchJD, which take much longer and go last).
"""

import functools
import math
import multiprocessing
import statistics
import sys
import time
from typing import Any, Callable, Sequence

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtl import (
    Model,
    gradient_collision_backward,
    gradient_collision_loss,
    gradient_stats,
    native_routine,
    new_backbone,
)
from dtl_store import versions_of

FORMS = ("SGD step", "gradient_collision_loss", "gradient_collision_backward")


def prepare_step(form: str, chunks: int, chunk_size: int, network: str, device: torch.device) -> Callable[[], None]:
    """A training step on chunks * chunk_size random images of 16x16: plain SGD, or one with GC in either form."""
    backbone = new_backbone(network, 0, device)
    model = Model(backbone, nn.Linear(backbone.features, 80, device=device))
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    x, y = torch.randn(chunks * chunk_size, 3, 16, 16, device=device), torch.arange(chunks * chunk_size, device=device) % 80
    parts = [functools.partial(lambda x, y: F.cross_entropy(model(x), y), *p) for p in zip(x.chunk(chunks), y.chunk(chunks))]

    def step() -> None:
        optimizer.zero_grad()
        if form == "SGD step":
            F.cross_entropy(model(x), y).backward()
        elif form == "gradient_collision_loss":
            gradient_collision_loss([part() for part in parts], model.parameters()).backward()
        else:
            gradient_collision_backward(parts, model.parameters())
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def peak_memory(form: str, chunks: int, chunk_size: int, network: str, device: torch.device) -> float:
    """Peak MB of two steps above that of a step on four images. In a process of its own: a peak never falls."""
    import resource

    def peak() -> float:
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

    prepare_step(form, 2, 2, network, device)()  # libraries initialise themselves
    step = prepare_step(form, chunks, chunk_size, network, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = peak()
    step(), step()
    return peak() - before


def loss(network: str, device: torch.device, repeats: int = 7) -> None:
    """Print time and peak memory of both forms of the GC loss beside those of an SGD step on the same images."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # first: a child's peak starts at ours
        memory = {(form, n, size): pool.apply(peak_memory, (form, n, size, network, device))
                  for form in FORMS for n, size in ((4, 16), (32, 16), (8, 64))}
    steps, times = {form: prepare_step(form, 8, 64, network, device) for form in FORMS}, {form: [] for form in FORMS}
    for repeat in range(repeats + 1):  # in turn, so that a noisy moment hits all; the first is for warming up
        for form in FORMS:
            began = time.perf_counter()
            steps[form]()
            times[form] += [time.perf_counter() - began] if repeat else []
    medians = {form: statistics.median(times[form]) for form in FORMS}
    click.echo(f"{network}, 16x16 images, torch {torch.__version__}, {versions_of(device)['device']}; median of {repeats}\n")
    click.echo(f"{'chunks x images':<30}{'8 x 64':>10}{'':>8}{'8 x 64':>8}{'4 x 16':>8}{'32 x 16':>9}")
    click.echo(f"{'':<30}{'ms a step':>10}{'ratio':>8}{'peak MB':>8}{'peak MB':>8}{'peak MB':>9}{'ratio':>8}")
    for form in FORMS:
        big, few, many = (memory[form, n, size] for n, size in ((8, 64), (4, 16), (32, 16)))
        click.echo(f"{form:<30}{medians[form] * 1e3:>10.1f}{medians[form] / medians['SGD step']:>8.2f}{big:>8.0f}{few:>8.0f}"
                   f"{many:>9.0f}{many / few:>8.2f}")


def native(counts: Sequence[int] = (4, 8, 16, 32), repeats: int = 7) -> None:
    """Print the median milliseconds of a Gram matrix of n gradients as large as ResNet-18's, in float32.

    list: native, from 62 separate tensors a chunk, as autograd leaves them; the other columns: from one (n, p) matrix.
    read: torch.dot of all the values with themselves, which takes them through the cores once and keeps nothing.
    torch f64: of float32 gradients, so with the copy to float64. At n = 32 it all needs 6 GB of memory.
    """
    shapes = [(64, 3, 3, 3), (64,), (64,)]
    for wide_in, wide in ((64, 64), (64, 128), (128, 256), (256, 512)):
        shapes += [(wide, wide_in, 3, 3), (wide,), (wide,)] + [(wide, wide, 3, 3), (wide,), (wide,)] * 3
        shapes += [(wide, wide_in, 1, 1), (wide,), (wide,)] if wide_in < wide else []
    sizes = [math.prod(shape) for shape in (*shapes, (10, 512), (10,))]
    try:
        from torchjd._linalg import compute_gramian  # a peer, for comparison alone
    except ImportError:
        compute_gramian = None

    def medians(*work: Callable[[], Any], times: int = repeats) -> list[float]:
        took: list[list[float]] = [[] for _ in work]
        for _ in range(times):  # in turn, so that a busy moment of the machine meets all of them
            for mine, call in zip(took, work, strict=True):
                start = time.perf_counter()
                call()
                mine.append(1e3 * (time.perf_counter() - start))
        return [statistics.median(mine[1:]) for mine in took]  # the first also wakes threads and maps memory

    def in_float64(flat: Tensor) -> Tensor:
        wide = flat.double()
        return wide @ wide.T

    click.echo(f"native routine: {native_routine()[1]}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    click.echo(f"Gram matrix of n x {sum(sizes):,} float32 in {len(sizes)} tensors, median ms of {repeats - 1}")
    click.echo(" n    read  native  /read    list  /native  torch f32  /native  torch f64  /native  TorchJD")
    for n in counts:
        flat = torch.randn(n, sum(sizes), generator=torch.Generator().manual_seed(n))
        rows, chunks = [[row] for row in flat], [[part.clone() for part in row.split(sizes)] for row in flat]
        read, routine, listed, single = medians(
            functools.partial(torch.dot, flat.view(-1), flat.view(-1)),
            functools.partial(gradient_stats, rows, "native"),
            functools.partial(gradient_stats, chunks, "native"),
            functools.partial(torch.matmul, flat, flat.T),
        )
        peer = f"{medians(functools.partial(compute_gramian, flat))[0]:.1f}" if compute_gramian else "-"
        double = medians(functools.partial(in_float64, flat), times=3)[0]
        click.echo(
            f"{n:2} {read:7.1f} {routine:7.1f} {routine / read:6.2f} {listed:7.1f} {listed / routine:8.2f} {single:10.1f}"
            f" {single / routine:8.1f} {double:10.1f} {double / routine:8.1f} {peer:>8}"
        )
