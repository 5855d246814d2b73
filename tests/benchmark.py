#!/usr/bin/env python3
"""python tests/benchmark.py loss: the GC loss beside a plain SGD step; native: the C routine beside torch;
steps: the steps of the stages themselves, on CUDA with and without graphs.

Every ratio comes from one run; what is compared takes turns, so that a busy moment of the machine meets all
(but torch in float64 and TorchJD, which take much longer and go last). `loss cuda` is on a GPU, `loss cpu
resnet18` another network; `steps cuda cifar` is preset `cifar` on a GPU. Outputs: experiments/bench.txt and
bench-native.txt.
"""

import functools
import multiprocessing
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dtl  # noqa: E402

FORMS = ("SGD step", "gradient_collision_loss", "gradient_collision_backward")


def machine(device):
    if device.type == "cuda":
        return f"GPU {torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"


def medians(*work, times):
    """Of each, the median milliseconds, in turns; without the first, which wakes threads and maps memory."""
    took = [[] for _ in work]
    for _ in range(times):
        for mine, call in zip(took, work):
            began = time.perf_counter()
            call()
            mine.append(1e3 * (time.perf_counter() - began))
    return [statistics.median(mine[1:]) for mine in took]


def prepare_step(form, chunks, chunk_size, network, device):
    """A training step on chunks * chunk_size random 16x16 images: plain SGD, or with GC in either form."""
    backbone = dtl.new_backbone(network, 0, device)
    model = dtl.Model(backbone, nn.Linear(backbone.features, 80, device=device))
    optimizer, images = torch.optim.SGD(model.parameters(), 1e-6), chunks * chunk_size
    x, y = torch.randn(images, 3, 16, 16, device=device), torch.arange(images, device=device) % 80
    parts = [functools.partial(lambda x, y: F.cross_entropy(model(x), y), *part)
             for part in zip(x.chunk(chunks), y.chunk(chunks))]

    def step():
        optimizer.zero_grad()
        if form == "SGD step":
            F.cross_entropy(model(x), y).backward()
        elif form == "gradient_collision_loss":
            dtl.gradient_collision_loss([part() for part in parts], model.parameters()).backward()
        else:
            dtl.gradient_collision_backward(parts, model.parameters())
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def peak_memory(form, chunks, chunk_size, network, device):
    """Peak MB of two steps above that of a step on four images. Ask once a process: a peak never falls."""
    import resource

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
    """Time and peak memory of both forms of the GC loss beside those of an SGD step on the same images."""
    device = torch.device(device)
    # in children, before anything is done here: a child's peak starts at its parent's
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = {(form, n, size): pool.apply(peak_memory, (form, n, size, network, device))
                  for form in FORMS for n, size in ((4, 16), (32, 16), (8, 64))}
    took = medians(*(prepare_step(form, 8, 64, network, device) for form in FORMS), times=repeats + 1)
    print(f"{network}, 16x16 images, torch {torch.__version__}, {machine(device)}; median of {repeats}\n")
    print(f"{'chunks x images':<30}{'8 x 64':>10}{'':>8}{'8 x 64':>8}{'4 x 16':>8}{'32 x 16':>9}")
    print(f"{'':<30}{'ms a step':>10}{'ratio':>8}{'peak MB':>8}{'peak MB':>8}{'peak MB':>9}{'ratio':>8}")
    for form, ms in zip(FORMS, took):
        big, few, many = (memory[form, n, size] for n, size in ((8, 64), (4, 16), (32, 16)))
        print(f"{form:<30}{ms:>10.1f}{ms / took[0]:>8.2f}"
              f"{big:>8.0f}{few:>8.0f}{many:>9.0f}{many / few:>8.2f}")


class Clock(dtl.Progress):
    """Milliseconds a step, over the last half of a stage."""

    def at(self, step, steps):
        if step == steps // 2:
            self.began = self.now()

    def fetched(self, step, steps, terms, state):
        if step == steps:
            self.ms = 1e3 * (self.now() - self.began) / (steps - steps // 2)

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def steps(device="cpu", preset="demo", count=40):
    """What a step of each stage takes in a preset, on random images: its share of the matrix rate, where the
    operations of a forward and a backward pass are counted, is of the plain step, stage 1's."""
    device, config = torch.device(device), dtl.Config(**dtl.PRESETS[preset])
    size, plain = config.image_size or (16 if preset == "demo" else 32), {}
    source, target = (dtl.Task(
        torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, device=device),
        torch.arange(n, device=device) % classes, torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device),
        torch.zeros(1, dtype=torch.int64, device=device), classes, "") for n, classes in ((4096, 80), (512, 10)))
    options = dict(network=config.network, weight=1e-3, chunks=config.chunks, chunk_size=config.chunk_size)
    large = options | dict(chunk_size=128)
    print(f"preset {preset}: {config.network}, {size}x{size}, batches of {config.batch_size}, {config.chunks} chunks of "
          f"{config.chunk_size}; torch {torch.__version__}, {machine(device)}; mean of {count // 2} steps")
    print(f"{'ms a step':<34}{'graph':>9}{'/plain':>8}{'launches':>10}{'/plain':>8}")
    dtl.find_device(device.index or 0 if device.type == "cuda" else None, "auto")
    dtl.chunk_statistics = lambda *given: {}  # what a stage logs now and then is no part of a step
    for mixed in (True, False) if device.type == "cuda" else (False,):
        how = dtl.Schedule(count, 1e-3, config.batch_size, mixed=mixed)
        backbone = dtl.new_backbone(config.network, 0, device)
        model = dtl.Model(backbone, dtl.new_head(backbone.features, 10, 0, device), mixed)
        head = dtl.new_head(backbone.features, 80, 0, device)
        pretrain = functools.partial(dtl.pretrain, source, config.network, seed=0)
        dispose = functools.partial(dtl.dispose, model, head, source, target, schedule=how, seed=0)
        work = {"pretrain": functools.partial(pretrain, schedule=how),
                f"pretrain, {4 * 128} images": functools.partial(pretrain, schedule=dtl.replace(how, batch_size=512)),
                "gc, 4 x 128": functools.partial(dispose, method=dtl.METHODS["gc"], **large)}
        for name in ("finetune", "uniform", "distill-fresh", "gc", "gc-fresh", "gradient-norm-fresh"):
            work[name] = functools.partial(dispose, method=dtl.METHODS[name], **options)
        for name, call in work.items():
            line = f"{name + ', bfloat16' * mixed:<34}"
            for graphs in (True, False) if device.type == "cuda" else (False,):
                call(progress=(clock := Clock(device=device, graphs=graphs)))
                plain.setdefault((mixed, graphs), clock.ms)
                line += f"{clock.ms:9.2f}{clock.ms / plain[mixed, graphs]:8.2f} "
            print(line, flush=True)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(torch.randn(config.batch_size, 3, size, size, device=device)),
                        torch.zeros(config.batch_size, dtype=torch.int64, device=device)).backward()
    operations = counter.get_total_flops()
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    clock, began = Clock(device=device), None
    for k in range(13):
        began = clock.now() if k == 3 else began
        a @ b
    rate = 10 * 2 * side**3 / (clock.now() - began)
    for (mixed, graphs), ms in plain.items():
        print(f"plain step, {'bfloat16' if mixed else 'float32'}, {'graph' if graphs else 'launches'}: "
              f"{1e3 * config.batch_size / ms:,.0f} images a second, {operations / 1e9:.0f} GFLOP a step, "
              f"{operations / ms / 1e9:.1f} TFLOP/s; bfloat16 product {rate / 1e12:.1f} TFLOP/s")


def native(repeats=7):
    """Median milliseconds of a Gram matrix of n gradients as large as ResNet-18's, in float32.

    list: native, from 62 separate tensors a chunk, as autograd leaves them; all else: from one (n, p) matrix.
    read: torch.dot of all values with themselves, which takes them through the cores once and keeps nothing.
    torch f64: with the copy to float64. At n = 32 it all needs 6 GB of memory.
    """
    network = dtl.Model(dtl.new_backbone("resnet18", 0, torch.device("cpu")), nn.Linear(512, 10))
    sizes = [p.numel() for p in network.parameters()]
    try:
        from torchjd._linalg import compute_gramian  # a peer, for comparison alone
    except ImportError:
        compute_gramian = None

    def in_float64(flat):
        wide = flat.double()
        return wide @ wide.T

    def row(n):
        flat = torch.randn(n, sum(sizes), generator=torch.Generator().manual_seed(n))
        rows = [[whole] for whole in flat]
        chunks = [[part.clone() for part in whole.split(sizes)] for whole in flat]
        read, routine, listed, single = medians(
            lambda: torch.dot(flat.view(-1), flat.view(-1)), lambda: dtl.gradient_stats(rows, "native"),
            lambda: dtl.gradient_stats(chunks, "native"), lambda: flat @ flat.T, times=repeats)
        peer = f"{medians(lambda: compute_gramian(flat), times=repeats)[0]:.1f}" if compute_gramian else "-"
        double = medians(lambda: in_float64(flat), times=3)[0]
        print(f"{n:2} {read:7.1f} {routine:7.1f} {routine / read:6.2f} {listed:7.1f} {listed / routine:8.2f} "
              f"{single:10.1f} {single / routine:8.1f} {double:10.1f} {double / routine:8.1f} {peer:>8}")

    versions = f"torch {torch.__version__}, {machine(torch.device('cpu'))}"
    print(f"native routine: {dtl.native_routine()[1]}; {versions}")
    if dtl.native_routine()[0] is None:
        sys.exit("python build_native.py builds it")
    print(f"Gram matrix of n x {sum(sizes):,} float32 in {len(sizes)} tensors, median ms of {repeats - 1}")
    print(" n    read  native  /read    list  /native  torch f32  /native  torch f64  /native  TorchJD")
    for n in (4, 8, 16, 32):
        row(n)


if __name__ == "__main__":
    known = {"loss": loss, "native": native, "steps": steps}
    if not set(sys.argv[1:2]) & {*known} or len(sys.argv) > (2 if sys.argv[1] == "native" else 4):
        sys.exit("python tests/benchmark.py loss [cpu | cuda [resnet8 | resnet18]], or: ... steps "
                 f"[cpu | cuda [{' | '.join(dtl.PRESETS)}]], or: ... native")
    known[sys.argv[1]](*sys.argv[2:])
