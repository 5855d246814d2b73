"""Ablation of the GC loss from the transferred weights: inner products or cosines, a fresh head or that of
stage 1, few large chunks or many small ones. Validation images, one seed, two attackers.

    python experiments/ablation.py --data-dir data"""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import protocol  # noqa: E402

import dtl  # noqa: E402

SEED, METHOD = 100, "disposed:gc"
VARIANTS = {f"{similarity} {head} {chunks} x {32 // chunks}, {weight}": dict(
    similarity=similarity, gc_head=head, chunks=chunks, chunk_size=32 // chunks, weights=f"gc={weight}")
    for similarity, head, chunks, weight in (
        ("dot", "fresh", 2, 10), ("dot", "fresh", 4, 10), ("dot", "fresh", 8, 10), ("dot", "source", 2, 10),
        ("cos", "fresh", 2, 10), ("cos", "fresh", 4, 10), ("cos", "fresh", 2, 30), ("cos", "source", 2, 10))}
WHAT = [("target_accuracy",), *(("pl_accuracy", task, attacker, 0) for task in dtl.PIGGYBACK_TASKS
                                for attacker in ("fixed", "long"))]


@click.command()
@click.option("--preset", default="cifar-cpu")
@click.option("--data-dir", type=Path, required=True)
@click.option("--out", type=Path, default="runs")
@click.option("--only", default="", help="NAME/NAME/...: these, and no table")
def main(preset, data_dir, out, only):
    torch.set_num_threads(1)
    config = dtl.Config(**dtl.PRESETS[preset] | dict(split="validation"))
    run = dtl.Run(config, SEED, data_dir, dtl.Progress(out), dtl.Results(out))
    found, chosen = [], only.split("/") if only else ["oracle", "transferred", *VARIANTS]
    for name in chosen:
        (of := copy.copy(run)).task = run.task
        of.config = replace(run.config, **VARIANTS.get(name, {}))
        model = METHOD if name in VARIANTS else name
        found += [of.measure(model, *which) | dict(model=name) for which in WHAT]
        click.echo(f"{name}: {100 * found[-len(WHAT)]['value']:.1f} % on the target")
    if not only:
        (out / "trials.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))
        (out / "trials.md").write_text(protocol.table(found))
        click.echo(protocol.table(found))


if __name__ == "__main__":
    main()
