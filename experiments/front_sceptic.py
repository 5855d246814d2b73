"""The sceptic's attack on the models of front.sh, on the source subset: what that script's third
part became for want of time, with the methods at twice the default allowance, too.

    python experiments/front_sceptic.py SEEDS OUT       # as 10,11; adds to OUT/results.jsonl
"""

import sys
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # this folder, and that of dtl.py
import pairs  # noqa: E402
import sceptic  # noqa: E402, F401

import dtl  # noqa: E402

MODELS = (
    "oracle transferred finetune uniform gc uniform@2 gc@2 distill-fresh uniform-fresh gc-fresh"
)


def main(seeds, out):
    there = dtl.read_results(out)
    settings = dtl.PRESETS["own"] | dict(attack_steps=200)  # those that the run found by its data
    config, source = dtl.Config(**settings), pairs.PAIRS["c100-c10"][0]
    for seed in map(int, seeds.split(",")):
        task = dtl.load_task(f"{pairs.FOLDER}/{source}@{config.subset_per_class}", seed)
        for m in MODELS.split():
            key = seed, m, "pl_accuracy", "source-subset", "sceptic"
            if key in there:
                continue
            model = dtl.load_model(f"runs/front/{seed}/seed{seed}/{m}.pt")
            at = dtl.stream(seed, "piggyback", "source-subset")
            value = dtl.piggyback(model.backbone, task, "sceptic", config, at)
            print(seed, m, value, flush=True)
            dtl.append(Path(out, "results.jsonl"), dtl.result_line(key, value))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
