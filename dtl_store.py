"""Seeds, device, checkpoints, log, results and errors of dtl.py: what is on disk is whole, and is checked when read."""

import contextlib
import functools
import hashlib
import io
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import click
import numpy as np
import torch
from torch import Tensor


class DTLError(ValueError):
    """A mistake of the user's, or something missing on the machine, told in one line."""


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
        if saved:
            self.saved_step, self.notes = saved["step"], saved["notes"]
        return saved

    @contextlib.contextmanager
    def bar(self, first: int, steps: int) -> Iterator[Callable[[int], None]]:
        self.at = first
        try:
            if sys.stderr.isatty() and self.path:
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

    def error(self, step: int, steps: int, what: str | dict[str, float]) -> DTLError:
        """Why the stage stops: in words, or the terms that are not finite."""
        what = what if isinstance(what, str) else f"not finite: {show(what)}; a smaller weight or learning rate may help"
        return DTLError(f"{self.name}: step {step} of {steps}: {what}")

    def note(self, step: int, statistics: dict[str, float]) -> None:
        self.notes.append({"step": step} | statistics)
        self.log({"stage": self.name, "noted": step} | statistics)


class Log:
    """OUT/log.jsonl, a line a row; on the screen too, a stage's end and else a row every 20 seconds."""

    printed = 0.0

    def __init__(self, out: Path, config: str) -> None:
        self.path, self.config = out / "log.jsonl", config

    def __call__(self, row: dict) -> None:
        append(self.path, json.dumps({"config": self.config} | row) + "\n")
        if "step" in row and (row["step"] == row["steps"] or time.monotonic() - Log.printed > 20):
            Log.printed = time.monotonic()
            terms = {k: v for k, v in row.items() if isinstance(v, float) and k != "seconds"}
            click.echo(f"{row['stage']:<46} {row['step']:>6}/{row['steps']:<6} {row['seconds']:>7.1f} s  {show(terms)}")


@contextlib.contextmanager
def progress(label: str, length: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, else a line every 20 seconds, with the time left. What it yields is called before each piece of
    work, with words for it."""
    printed, last, done, spent = 0.0, time.monotonic(), -1, []
    with click.progressbar(length=length, label=label, file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:

        def advance(work: str) -> None:
            nonlocal printed, last, done
            now, last, done = time.monotonic() - last, time.monotonic(), done + 1
            spent.extend([now] if now > 0.1 else [])  # or what an earlier run has done would count as fast
            bar.update(min(done, 1))
            if not sys.stderr.isatty() and last - printed > 20:
                printed = last
                left = f"about {sum(spent) / len(spent) * (length - done) / 60:.0f} min left: " if spent else ""
                click.echo(f"{label} {done}/{length}, {left}{work}")

        yield advance
        bar.update(1)


def show(terms: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in terms.items())


class Results:
    """OUT/results.jsonl: one line a measurement. A line cut short by a crash is passed over and measured again."""

    IDENTITY = ("config", "seed", "model", "metric", "task", "step", "attacker", "attacker_seed")

    def __init__(self, out: Path) -> None:
        self.path = out / "results.jsonl"

    def read(self, config: str | None = None) -> list[dict]:
        """The records of one config, or all; of two of one identity the later."""
        records = {}
        for line in self.path.read_text(errors="replace").splitlines() if self.path.exists() else ():
            with contextlib.suppress(json.JSONDecodeError, TypeError):
                record = json.loads(line)
                whole = isinstance(record, dict) and {"config", "seed", "model", "metric", "task", "value"} <= record.keys()
                if whole and config in (None, record["config"]):
                    records[tuple(record.get(k) for k in self.IDENTITY)] = record
        return list(records.values())

    @functools.cached_property
    def by_key(self) -> dict[str, list[dict]]:
        """Records by `key`: what they were measured of, to the very weights and images."""
        found = {}
        for record in self.read():
            found.setdefault(record.get("key"), []).append(record)
        return found

    def known(self, wanted: dict) -> dict | None:
        """The record of the same key, model and metric: of this config, or copied to it from another with all that was
        noted on its way."""
        of_key = [r for r in self.by_key.get(wanted["key"], ()) if r.get("model") == wanted["model"]]
        for config in (wanted["config"], *dict.fromkeys(r["config"] for r in of_key)):
            same = [r | {"config": wanted["config"]} for r in of_key if r["config"] == config]
            for record in same:
                if record.get("metric") == wanted["metric"]:
                    if config != wanted["config"]:
                        self.append(same)
                    return record
        return None

    def add(self, notes: list[dict], record: dict) -> None:
        """A measurement, after a record for each thing that was noted on its way."""
        record = record | {"revision": git_revision()}
        same = {k: v for k, v in record.items() if k in (*self.IDENTITY, "key", "revision")}
        self.append([*(same | {"metric": metric, "step": note["step"], "value": value} for note in notes
                       for metric, value in note.items() if metric != "step"), record])

    def append(self, records: list[dict]) -> None:
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        append(self.path, ("\n" if torn else "") + "".join(json.dumps(record) + "\n" for record in records))
        for record in records:
            self.by_key.setdefault(record.get("key"), []).append(record)


def append(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(text)
    except OSError as error:
        raise DTLError(f"cannot write {path}: {error.strerror}; mend that and run the same command again") from None


def find_device(gpu: int | None) -> torch.device:
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
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "device": name}


def begin_run(out: Path, config_hash: str, preset: str, seeds: list[int], methods: list[str], settings: dict,
              device: torch.device, native: str, tasks: dict[int, dict[str, Any]]) -> Path:
    """Print what is about to run and on what; write the same, for the report, to OUT/run-HASH.json. tasks: by seed and name."""
    command, revision, versions = "python dtl.py " + " ".join(sys.argv[1:]), git_revision(), versions_of(device)
    click.echo(f"{command}\nrevision {revision}, Python {versions['python']}, torch {versions['torch']}, {versions['device']}\n"
               f"preset {preset}, seeds {seeds}, config {config_hash}\nnative routine: {native}")
    for name, value in settings.items():
        click.echo(f"  {name:<18} {value}")
    for name, task in tasks[seeds[0]].items():
        click.echo(f"  {name:<18} {len(task.y)} training, {len(task.y_test)} {settings['split']} images, "
                   f"{task.classes} classes, {task.x.shape[2]}x{task.x.shape[3]}")
    data = {seed: {name: task.fingerprint for name, task in of_seed.items()} for seed, of_seed in tasks.items()}
    path = out / f"run-{config_hash}.json"
    for stale in (*out.glob("*.tmp"), *(out / "checkpoints").glob("*.tmp")):  # of our own writes that were killed
        with contextlib.suppress(OSError):  # another run may be faster
            if re.search(r"\.(pt|json|md|png|svg)\.\d+\.tmp$", stale.name) and time.time() - stale.stat().st_mtime > 3600:
                stale.unlink()
    write_atomically(path, json.dumps(dict(
        command=command, started=time.time(), config_hash=config_hash, preset=preset, seeds=seeds, methods=methods,
        settings=settings, versions=versions, revision=revision, data=data), indent=1).encode())
    return path


@functools.cache
def git_revision() -> str:
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, text=True, timeout=10,
                              capture_output=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def terse_errors(command: Callable) -> Callable:
    """A click command whose user's mistakes are told in one line, with a non-zero exit code."""

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
