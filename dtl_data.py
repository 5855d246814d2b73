"""Data of dtl.py. Tasks are named SET[CLASSES]@PER_CLASS; their images live as uint8 tensors on the device."""

import functools
import hashlib
import http.client
import os
import re
import shutil
import socket
import sys
import tarfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Sequence

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dtl_store import DTLError, stream

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
    fingerprint: str  # sha256 of the four tensors


def load_task(name: str, seed: int, data_dir: Path, device: torch.device, split: str = "test", image_size: int = 0) -> Task:
    """The task `SET[CLASSES]@PER_CLASS`: labels renumbered from 0, PER_CLASS training images a class drawn by `seed`
    (a smaller draw is part of a larger one), test images all kept. DTLError if there is no such task."""
    match = parse_task(name)
    x, y, x_test, y_test = load_set(match["set"], data_dir, split)
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
        sets += [shrink(images, image_size, name), torch.arange(len(indices)).repeat_interleave(
            torch.tensor([len(i) for i in indices]))]
    fingerprint = hashlib.sha256(b"".join(t.numpy().tobytes() for t in sets)).hexdigest()
    return Task(name, *(t.to(device) for t in sets), classes=len(chosen), fingerprint=fingerprint)


def hold_out(task: Task, fraction: float) -> tuple[Task, Task]:
    """(`fraction` of four fifths of each class's training images, the task with the last fifth as its test images)."""
    known, held = [], []
    for c in range(task.classes):
        of_class = torch.nonzero(task.y == c).flatten()
        cut = max(1, len(of_class) * 4 // 5)
        known.append(of_class[: max(1, round(cut * fraction))])
        held.append(of_class[cut:])
    known, held = torch.cat(known), torch.cat(held)
    if not len(held):
        raise DTLError(f"task {task.name}: an audit holds a fifth of each class out, and every class has one image")
    return replace(task, x=task.x[known], y=task.y[known]), replace(task, x_test=task.x[held], y_test=task.y[held])


def of_classes(task: Task, classes: Sequence[int]) -> Task:
    """The images of these classes, labels as they were."""
    classes = torch.tensor(list(classes), device=task.y.device)
    train, test = torch.isin(task.y, classes), torch.isin(task.y_test, classes)
    return replace(task, x=task.x[train], y=task.y[train], x_test=task.x_test[test], y_test=task.y_test[test])


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


def batch(task: Task, size: int, step: int, seed: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Step `step`'s images (B, 3, H, W), augmented and normalised, and labels (B,): every epoch in a new order."""
    size = min(size, len(task.y))
    epoch, k = divmod(step, len(task.y) // size)
    index = epoch_order(len(task.y), stream(seed, "epoch", epoch))[k * size : (k + 1) * size].to(task.y.device)
    return normalise(augment(task.x[index], generator)), task.y[index]


@functools.lru_cache(maxsize=4)
def epoch_order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


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
            chosen = list(range(start or 0, count if stop is None else stop, *(1 if s is None else s for s in step)))
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
            if time.time() - stale.stat().st_mtime > 3600:
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
    try:
        os.replace(unpacked, destination)
    except OSError:
        if not destination.is_dir():  # or another run was faster
            raise
        shutil.rmtree(unpacked)
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
