"""The audit's strongest attacker, four times as long: does what resists 1000 steps resist 4000?

    OMP_NUM_THREADS=1 python experiments/longer/longer.py runs attempts.jsonl 0,1,2 > experiments/longer/table.md

`runs` holds the checkpoints of `python dtl.py audit --preset cifar-small` (missing ones are made). Attempts are appended to
the second argument, one line each, and those that are there are not made again; nothing is written to runs/results.jsonl's
audit, where these attackers would meet models that were not given them.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import dtl
from dtl_report import interval

MODELS = ("oracle", "transferred", "disposed:gc-fresh")
TIMES = (5, 20)  # times 200 steps
out, path, seeds = Path(sys.argv[1]), Path(sys.argv[2]), [int(s) for s in sys.argv[3].split(",")]
config, cpu = dtl.Config(**dtl.PRESETS["cifar-small"]), torch.device("cpu")
found = {}
for line in path.read_text().splitlines() if path.exists() else ():
    row = json.loads(line)
    found[row["seed"], row["model"], row["task"], row["times"]] = row["value"]
for seed in seeds:
    experiment = dtl.Experiment(config, seed, cpu, out, Path("data"))
    for model in MODELS:
        for task in dtl.PIGGYBACK_TASKS:
            for times in TIMES:
                if (seed, model, task, times) in found:
                    continue
                attacker = dtl.Attacker(lr=0.1, times=times)
                schedule = experiment.schedule(times * config.attack_steps, attacker.lr)
                backbone = experiment.model(experiment.oracle() if model == "oracle" else model).backbone
                valid, value = dtl.attack(backbone, experiment.task(task), attacker, schedule,
                                          dtl.stream(seed, "audit", task, 0), dtl.Watch("longer"))
                found[seed, model, task, times] = value
                row = dict(seed=seed, model=model, task=task, times=times, valid=valid, value=value)
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")

print("| model | steps | source-subset % | leak | downstream % | leak |\n|---|---|---|---|---|---|")
for times in TIMES:
    for model in MODELS:
        cells = []
        for task in dtl.PIGGYBACK_TASKS:
            pl, zero, top = ([found[s, m, task, times] for s in seeds] for m in (model, "oracle", "transferred"))
            for values, scale, digits in ((pl, 100, 1), ([(p - z) / (t - z) for p, z, t in zip(pl, zero, top)], 1, 2)):
                mean, half = interval(values)
                cells.append(f"{scale * mean:.{digits}f} ± {scale * half:.{digits}f}")
        print(f"| {model} | {times * config.attack_steps} | " + " | ".join(cells) + " |")
print(f"\nSeeds {', '.join(map(str, seeds))}, mean ± 95% t-interval; preset cifar-small, SGD at 0.1 on four fifths of the "
      f"piggyback images, test images; torch {torch.__version__}, CPU, {torch.get_num_threads()} thread.")
