"""Seeds, checkpoints, log and results of dtl.py: what is on disk is whole or not there, and is checked when read."""

import contextlib
import functools
import hashlib
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import click
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
        self.saved_step, self.notes = (saved["step"], saved["notes"]) if saved else (0, [])
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

    def note(self, step: int, statistics: dict[str, float]) -> None:
        self.notes.append({"step": step} | statistics)
        self.log({"stage": self.name, "noted": step} | statistics)


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
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
                record = json.loads(line)
                if config in (None, record["config"]):
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
