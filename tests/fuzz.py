"""Damaged and hostile input to everything that parses: python tests/fuzz.py [COUNT] [SEED]

Each parser gets COUNT inputs (100,000 by default: ten minutes), whole ones with bytes changed, cut, doubled and mixed.
It must answer with a result or with its one error: DTLError, or for files of its own a warning and nothing. Anything
else is printed and counted. Not part of the test suite.
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

CPU = torch.device("cpu")


def damaged(whole: bytes, rng: random.Random) -> bytes:
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(6)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del data[at : at + rng.randrange(1, 40)]
        elif kind == 2:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
        elif kind == 3:
            data = data[:at] or bytearray(b"\0")
        elif kind == 4:
            data[at:at] = data[: rng.randrange(40)]
        else:
            data[at : at + 1] = rng.choice((b"9", b"-", b"[", b"]", b"@", b":", b",", b"\n", b'"', b"{", b"\xff"))
    return bytes(data)


def parsers(folder: Path) -> dict:
    """name -> (whole inputs, what reads one of them)."""
    x = np.zeros((4, 8, 8, 3), np.uint8)
    np.savez(folder / "whole.npz", x_train=x, y_train=np.arange(4), x_test=x, y_test=np.arange(4))
    dtl.save(folder / "whole.pt", "key", {"backbone": {"w": torch.ones(3)}, "step": 3})
    results = dtl.Results(folder / "whole")
    for k in range(3):
        results.add(dict(key=f"k{k}", seed=0, model="gc", metric="pl_accuracy", value=0.5))

    def text(read):
        return lambda data: read(data.decode("utf-8", "replace"))

    def file(name, read):
        def run(data):
            (folder / name).write_bytes(data)
            return read(folder / name)

        return run

    def checkpoint(path):
        state = dtl.load(path, "key", CPU)
        assert state is None or state["backbone"]["w"].tolist() == [1, 1, 1] and state["step"] == 3

    def lines(path):
        found = dtl.Results(path.parent)
        assert all(json.loads(json.dumps(record))["key"] == key for key, record in found.items())

    (folder / "r").mkdir()
    return {
        "task name": ([b"shapes[0:8]@50", b"shapes[0:16]@250", b"a.npz", b"shapes[1,5,7]@3"], text(
            lambda name: dtl.load_task(name, 0, folder / "none", CPU, image_size=16))),
        "classes": ([b"0:80", b"1,5,7", b"0:80:2", b":"], text(lambda t: dtl.select_classes(t, 100))),
        "--weights": ([b"gc=30,uniform=1.5", b"gc=0"], text(lambda t: dtl.Config(weights=t))),
        "list option": ([b"gc,uniform", b"all"], text(
            lambda t: dtl.names_in("--methods", t, list(dtl.METHODS), all=list(dtl.METHODS)))),
        "npz file": ([(folder / "whole.npz").read_bytes()], file("x.npz", dtl.read_npz)),
        "checkpoint": ([(folder / "whole.pt").read_bytes()], file("x.pt", checkpoint)),
        "results.jsonl": ([results.path.read_bytes()], file("r/results.jsonl", lines)),
    }


def main(count: int, seed: int) -> int:
    bad = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        for name, (wholes, read) in parsers(Path(folder)).items():
            rng, outcomes, began = random.Random(seed), {"read": 0, "refused": 0, "OTHER": 0}, time.monotonic()
            for _ in range(count):
                data = damaged(rng.choice(wholes), rng)
                try:
                    with contextlib.redirect_stderr(io.StringIO()):
                        read(data)
                    outcomes["read"] += 1
                except dtl.DTLError:
                    outcomes["refused"] += 1
                except BaseException as error:  # noqa: BLE001 - that is what is looked for
                    outcomes["OTHER"] += 1
                    if outcomes["OTHER"] <= 3:
                        print(f"  {name}: {type(error).__name__}: {str(error)[:100]} from {data[:80]!r}")
            bad += outcomes["OTHER"]
            print(f"{name:<14} {count} inputs, seed {seed}: {outcomes}, {time.monotonic() - began:.0f} s", flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(1 if main(int((sys.argv + ["100000"])[1]), int((sys.argv + ["", "0"])[2] or 0)) else 0)
