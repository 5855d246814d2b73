"""Damaged and hostile input to everything that parses: python tests/fuzz.py [COUNT] [SEED]

Each parser gets COUNT inputs (100,000 by default: ten minutes), whole ones with bytes changed, cut,
doubled and mixed. It must answer with a result or with DTLError. Anything else is printed and
counted. Not part of the test suite.
"""

import contextlib
import io
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import dtl

HOSTILE = (b"9", b"-", b"[", b"]", b"@", b":", b",", b"\n", b'"', b"{", b"\xff")


def damaged(whole, rng):
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, length = rng.randrange(len(data) + 1), rng.randrange(1, 40)
        start, end, new = rng.choice(
            [
                (at, at + 1, bytes([rng.randrange(256)])),
                (at, at + length, b""),
                (at, at, rng.randbytes(length % 9)),
                (at, len(data), b""),
                (at, at, data[:length]),
                (at, at + 1, rng.choice(HOSTILE)),
            ]
        )
        data[start:end] = new
    return bytes(data)


def parsers(folder):
    """name -> (whole inputs, what reads one of them)."""
    x, y = np.zeros((4, 8, 8, 3), np.uint8), np.arange(4)
    np.savez(folder / "whole.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    dtl.save(folder / "whole.pt", {"backbone": {"w": torch.ones(3)}, "step": 3})
    line = dict(zip(dtl.RESULT, (0, "gc", "pl_accuracy", "downstream", "fixed")), value=0.5)
    lines = b"".join(json.dumps(line | {"seed": k}).encode() + b"\n" for k in range(3))
    described = dict(settings={"source": "a", "chunks": 4}, code={"dtl.py": "5f"})

    def text(read):
        return lambda data: read(data.decode("utf-8", "replace"))

    def file(name, read):
        def run(data):
            (folder / name).write_bytes(data)
            return read(folder / name)

        return run

    def task(name):
        return dtl.load_task(name, 0, folder / "none", "cpu", "test", 16)

    def checkpoint(path):
        state = dtl.load(path, "cpu")
        assert state["backbone"]["w"].tolist() == [1, 1, 1] and state["step"] == 3

    def results(path):
        assert all(isinstance(v, float) for v in dtl.read_results(path.parent).values())

    def config(path):
        dtl.check_folder(path.parent, described)

    tasks = [b"shapes[0:8]@50", b"shapes[0:16]@250", b"a.npz", b"shapes[:7]@3"]
    return {
        "task name": (tasks, text(task)),
        "method": ([b"gc@0.5", b"uniform", b"gc-fresh@1"], text(dtl.split_method)),
        "setting": ([b"4", b"0.5"], text(lambda t: dtl.Config(chunks=t))),
        "list option": ([b"gc,uniform"], text(lambda t: dtl.names_in("--x", t, dtl.METHODS))),
        "npz file": ([(folder / "whole.npz").read_bytes()], file("x.npz", dtl.read_npz)),
        "checkpoint": ([(folder / "whole.pt").read_bytes()], file("x.pt", checkpoint)),
        "results.jsonl": ([lines], file("results.jsonl", results)),
        "config.json": ([json.dumps(described).encode()], file("config.json", config)),
    }


def main(count=100_000, seed=0):
    bad = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as at:
        for name, (wholes, read) in parsers(Path(at)).items():
            rng, began = random.Random(seed), time.monotonic()
            outcomes = {"read": 0, "refused": 0, "OTHER": 0}
            for _ in range(count):
                data = damaged(rng.choice(wholes), rng)
                try:
                    with contextlib.redirect_stderr(io.StringIO()):
                        read(data)
                    outcomes["read"] += 1
                except dtl.click.ClickException:  # DTLError, and click's own for a setting
                    outcomes["refused"] += 1
                except BaseException as error:  # noqa: BLE001 - that is what is looked for
                    outcomes["OTHER"] += 1
                    if outcomes["OTHER"] <= 3:
                        told = f"{type(error).__name__}: {str(error)[:100]}"
                        print(f"  {name}: {told} from {data[:80]!r}")
            bad += outcomes["OTHER"]
            took = f"{time.monotonic() - began:.0f} s"
            print(f"{name:<14} {count} inputs, seed {seed}: {outcomes}, {took}", flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(1 if main(*map(int, sys.argv[1:3])) else 0)
