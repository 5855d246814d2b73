"""Counts a run's results again, with none of the program's code: its table, and how methods differ.

    python experiments/recount.py OUT [ATTACKER,...]

Reads OUT/results.jsonl, all attackers or those named. Differences are paired by seed; ± is half of
a 95% t-interval.
"""

import json
import math
import sys
from itertools import combinations
from pathlib import Path

import numpy as np

REFERENCES = ("scratch", "oracle", "transferred")


def t_quantile(degrees):
    """The 97.5% point of Student's t, as tables print it: bisection on Simpson's integral."""
    gammas = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    peak = math.exp(gammas) / math.sqrt(degrees * math.pi)
    low, high = 0.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        density = (1 + np.linspace(0, middle, 2001) ** 2 / degrees) ** (-(degrees + 1) / 2)
        weights = np.r_[1, np.tile([4, 2], 1000)[:-1], 1] * middle / 6000
        inside = peak * (density @ weights)
        low, high = (middle, high) if inside < 0.475 else (low, middle)
    return round(low, 2)


def cell(values, form=".1f"):
    n, text = len(values), format(round(np.mean(values), 9), form)
    if n == 1:
        return text
    half = t_quantile(n - 1) * np.std(values, ddof=1) / n**0.5
    return f"{text} ± {round(half, 9):.1f}"


def markdown(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def main(out, named=""):
    found, seeds, models, tasks, attackers = {}, {}, {}, {}, {}  # dicts as ordered sets
    for line in Path(out, "results.jsonl").read_text().splitlines():
        r = json.loads(line)
        if named and r["attacker"] and r["attacker"] not in named.split(","):
            continue
        if r["metric"] != "source_accuracy":
            found[r["seed"], r["model"], r["task"], r["attacker"]] = 100 * r["value"]
            seeds[r["seed"]] = models[r["model"]] = True
        if r["attacker"]:
            tasks[r["task"]] = attackers[r["attacker"]] = True
    wanted = [(None, None), *((task, a) for task in tasks for a in attackers)]
    whole = [m for m in models if all((s, m, *w) in found for s in seeds for w in wanted)]
    rows, compared = [["model", "target %"]], {}
    shown = [*attackers, "strongest"] if len(attackers) > 1 else [*attackers]
    rows[0] += [f"{task}, {a} %" for task in tasks for a in shown]
    ends = (None, shown[0], shown[-1])
    for m in whole:
        by_seed = {w: np.array([found[(s, m, *w)] for s in seeds]) for w in wanted}
        for task in tasks:
            best = max((by_seed[task, a] for a in attackers), key=np.mean)
            by_seed.setdefault((task, "strongest"), best)
        columns = [(None, None), *((task, a) for task in tasks for a in shown)]
        rows.append([m, *(cell(by_seed[column]) for column in columns)])
        compared[m] = {column: by_seed[column] for column in columns if column[1] in ends}
    print(markdown(rows))
    if left := [m for m in models if m not in whole]:
        print(f"\nnot measured for every seed and attacker, and left out: {', '.join(left)}")
    rows = []
    for a, b in combinations([m for m in whole if m not in REFERENCES], 2):
        differences = {column: compared[a][column] - compared[b][column] for column in compared[a]}
        rows.append([f"{a} - {b}", *(cell(values, "+.1f") for values in differences.values())])
    if rows:
        names = [f"{task}, {attacker}" if task else "target" for task, attacker in differences]
        rows.insert(0, ["difference, points", *names])
        print(f"\n{markdown(rows)}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
