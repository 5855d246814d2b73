"""Tables and figures of dtl.py, from what runs wrote to results.jsonl."""

import collections
import json
import math
import statistics
from pathlib import Path
from typing import Any, Sequence

import click

from dtl_store import DTLError, Results, write_atomically

PIGGYBACK_TASKS = ("source-subset", "downstream")
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% t-interval (nan for one value)."""
    n = len(values)
    if n < 2:
        return values[0], math.nan
    t = T_975[n - 2] if n - 2 < len(T_975) else 1.96 + 2.5 / (n - 1)  # within 0.004 of the quantile
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(n)


def strongest(records: list[dict]) -> dict[tuple[str, str], dict]:
    """(model, task) -> an attempt of the attacker that is strongest on it: by accuracy on the held-out piggyback data, the
    mean over the seeds of the model (a failed attempt counts as 0), by each attacker's first seed."""
    tried = collections.defaultdict(list)
    for r in records:
        if r["metric"] == "audit_pl_accuracy" and r["attacker_seed"] == 0 and not r["fields"]["other_half"]:
            tried[r["model"], r["task"], r["attacker"]].append(r)
    best: dict[tuple[str, str], tuple] = {}
    for (model, task, name), attempts in tried.items():
        seeds = {r["seed"] for r in attempts}
        rank = (len(seeds), sum(r["valid"] or 0 for r in attempts), name)
        best[model, task] = max(best.get((model, task), (rank, attempts[0])), (rank, attempts[0]), key=lambda pair: pair[0])
    return {which: attempt for which, (_, attempt) in best.items()}


def worst_cases(records: list[dict]) -> dict[tuple, tuple[float, str]]:
    """(seed, model, task) -> (PL accuracy of the strongest attacker, the mean over the attacker's seeds, and its name)."""
    chosen, values = strongest(records), collections.defaultdict(list)
    for r in records:
        if r["metric"] == "audit_pl_accuracy" and r["value"] is not None and (r["model"], r["task"]) in chosen:
            if r["attacker"] == chosen[r["model"], r["task"]]["attacker"]:
                values[r["seed"], r["model"], r["task"]].append(r["value"])
    return {(seed, model, task): (statistics.mean(found), chosen[model, task]["attacker"])
            for (seed, model, task), found in values.items()}


def summarise(records: list[dict], models: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """model -> column -> one value a seed. Columns: target_accuracy, change, source_accuracy, and for each piggyback task
    and kind of attack (`worst`: the audit's strongest attacker, `fixed`, `probe`: other half of the classes) `KIND pl
    TASK` and `KIND leak TASK` = (PL - zero) / (PL of transferred - zero), zero being oracle, or scratch."""
    value = {("accuracy", r["seed"], r["model"], r["metric"]): r["value"] for r in records if r["task"] is None}
    for r in records:
        if r["metric"] == "pl_accuracy":
            value["fixed", r["seed"], r["model"], r["task"]] = r["value"]
        elif r["metric"] == "audit_pl_accuracy" and r["fields"]["other_half"]:
            value["probe", r["seed"], r["model"], r["task"]] = r["value"]
    value |= {("worst", *which): pl for which, (pl, _) in worst_cases(records).items()}
    zero_model, rows = zero_of(records), {}

    def put(model: str, column: str, number: float | None) -> None:
        if number is not None:
            rows.setdefault(model, {}).setdefault(column, []).append(number)

    for model in models:
        for seed in sorted({r["seed"] for r in records}):
            for metric in ("target_accuracy", "source_accuracy"):
                put(model, metric, value.get(("accuracy", seed, model, metric)))
            before, after = (value.get(("accuracy", seed, m, "target_accuracy")) for m in ("transferred", model))
            put(model, "change", None if before is None or after is None else after - before)
            for task in PIGGYBACK_TASKS:
                for kind in ("worst", "fixed", "probe"):
                    pl, top, zero = (value.get((kind, seed, m, task)) for m in (model, "transferred", zero_model))
                    put(model, f"{kind} pl {task}", pl)
                    if None not in (pl, top, zero) and top > zero:
                        put(model, f"{kind} leak {task}", (pl - zero) / (top - zero))
    return rows


def zero_of(records: list[dict]) -> str:
    """`oracle` if every seed has one, else `scratch`: a mean must not mix two zeros."""
    seeds = {model: {r["seed"] for r in records if r["model"] == model and r["metric"] == "pl_accuracy"}
             for model in ("oracle", "transferred")}
    return "oracle" if seeds["oracle"] >= seeds["transferred"] else "scratch"


def markdown(table: list[list[str]]) -> list[str]:
    """Lines of an aligned table; the first row is its head."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in table]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def report(out: Path, config: str | None, models: Sequence[str]) -> str:
    """Write report.md (and figures if matplotlib is there) of one config, the last run's by default. Rows as `models`."""
    runs = {}
    for path in out.glob("run-*.json"):
        try:
            run = json.loads(path.read_text())
            runs[run["config_hash"]] = run
        except (ValueError, KeyError, TypeError):
            click.echo(f"warning: {path} is damaged; passed over", err=True)
    if not runs:
        raise DTLError(f"--out {out}: no run to report; `python dtl.py all --out {out}` makes one")
    if config and config not in runs:
        raise DTLError(f"--config {config}: no such run in {out}; there are {', '.join(runs)}")
    run = runs[config] if config else max(runs.values(), key=lambda r: r["started"])
    records = Results(out).read(run["config_hash"])
    if not records:
        raise DTLError(f"--out {out}: nothing measured yet for config {run['config_hash']}")
    rows, seeds = summarise(records, models), sorted({r["seed"] for r in records})
    audited = any(r["metric"] == "audit_pl_accuracy" for r in records)

    def cell(row: dict, column: str) -> str:
        if column not in row:
            return "-"
        mean, half = interval(row[column])
        scale, digits = (1, 2) if "leak" in column else (100, 1)
        sign = "+" if column == "change" else ""
        some = f" ({len(row[column])} of {len(seeds)})" if len(row[column]) < len(seeds) else ""  # where no leak is defined
        return f"{mean * scale:{sign}.{digits}f}" + ("" if math.isnan(half) else f" ± {half * scale:.{digits}f}") + some

    columns = {"target acc. %": "target_accuracy", "change": "change"}
    for kind in ("worst", "fixed") if audited else ("fixed",):  # the worst case first, wherever both are shown
        for task in PIGGYBACK_TASKS:
            name = f"{kind} {task}" if audited else task
            columns |= {f"PL {name} %": f"{kind} pl {task}", f"leak {name}": f"{kind} leak {task}"}
    columns["source acc. %"] = "source_accuracy"
    table = [["model", *columns], *([model, *(cell(row, c) for c in columns.values())] for model, row in rows.items())]
    c, versions = run["settings"], run["versions"]
    revisions = sorted({r["revision"] for r in records if "revision" in r} - {run["revision"]})
    oracle = sorted({str(r["is"]) for r in records if r["model"] == "oracle" and "is" in r})
    text = "\n".join([
        f"source `{c['source']}`, target `{c['target']}`, piggyback `source-subset` (the source @{c['subset_per_class']}) and "
        f"`downstream` (`{c['downstream']}`); {c['network']}, image size {c['image_size'] or 'as stored'}; measured on "
        f"{c['split']} images.", "",
        f"Seeds {', '.join(map(str, seeds))}; mean" + (" ± 95% t-interval over seeds" if len(seeds) > 1 else "") +
        f"; leak: (PL - zero) / (PL of transferred - zero), zero: {zero_of(records)}"
        + (f" ({', '.join(oracle)})" if oracle else "") + ".",
        "PL and leak: lower is better; below zero means hard to train, not more forgotten.", "",
        *(audit_notes(records) if audited else []), *markdown(table), "",
        *(audit_tables(records, rows, models, cell) if audited else []), *collision_table(records, models),
        f"`{run['command']}`, config {run['config_hash']}, revision {run['revision']}"
        + (f" (figures also of {', '.join(revisions)})" if revisions else "") + f", Python {versions['python']}, "
        f"torch {versions['torch']}, {versions['device']}.", "",
    ])
    write_atomically(out / "report.md", text.encode())
    figures(out, run, runs.values(), rows, records, models)
    return text


def audit_notes(records: list[dict]) -> list[str]:
    """What the audit was, and whether every model has had all of it."""
    attempts = [r for r in records if r["metric"] == "audit_pl_accuracy"]
    seeds, attacker_seeds = len({r["seed"] for r in attempts}), max(r["attacker_seed"] for r in attempts) + 1
    grids, repeats, chosen = collections.defaultdict(set), collections.Counter(), strongest(records)
    for r in attempts:
        grids[r["seed"], r["model"], r["task"]].add(r["attacker"])
        if r["attacker"] == chosen.get((r["model"], r["task"]), {}).get("attacker"):
            repeats[r["seed"], r["model"], r["task"]] += 1
    every = set.union(*grids.values())
    wanted = {(r["seed"], r["model"], task) for r in records if r["metric"] == "pl_accuracy" and r["model"] != "pretrained"
              for task in PIGGYBACK_TASKS}
    short = sorted({f"{which[1]} (seed {which[0]})" for which in wanted
                    if grids[which] != every or repeats[which] < attacker_seeds})
    compared, failed = sum("other half" not in name for name in every), sum(r["value"] is None for r in attempts)
    lines = [f"worst: the strongest of {compared} attackers, each model's own, chosen on a fifth of the piggyback data that is "
             f"held out{', over all seeds' if seeds > 1 else ''}; mean of its {attacker_seeds} seeds. A leak of 0 reads "
             f'"resists these {compared} attackers up to this budget". The audit trains on the other four fifths, the fixed '
             "attacker on all of the data, and so may get more than the worst case."
             + (f" {failed} attempts failed to train." if failed else ""), ""]
    return [*lines, *([f"NOT FINISHED, the audit is incomplete for: {', '.join(short)}.", ""] if short else [])]


def audit_tables(records: list[dict], rows: dict, models: Sequence[str], cell: Any) -> list[str]:
    """Which attackers were the strongest, and the probe of the other half of the classes."""
    chosen = collections.Counter((task, r["attacker"]) for (_, task), r in strongest(records).items())
    lines = ["The strongest attacker, on how many models: " + "; ".join(
        f"{task}: " + ", ".join(f"{name} ({n})" for (t, name), n in chosen.most_common() if t == task)
        for task in PIGGYBACK_TASKS) + ".", ""]
    if any("probe pl" in column for row in rows.values() for column in row):
        columns = [f"probe {what} {task}" for task in PIGGYBACK_TASKS for what in ("pl", "leak")]
        table = [["model", *columns], *([m, *(cell(rows[m], c) for c in columns)] for m in models if m in rows)]
        lines += ["Trained on half of the classes, a linear probe of the other half (a task of its own):", "",
                  *markdown([r for r in table if set(r[1:]) != {"-"}]), ""]
    return lines


def collision_table(records: list[dict], models: Sequence[str]) -> list[str]:
    """Mean cosine of the fixed attacker's chunk gradients by attack step: near 0 or below, the collision holds; as high
    as that of `transferred` or `random`, the attacker has walked out of it."""
    cosines = collections.defaultdict(list)
    for r in records:
        if r["metric"] == "mean_cosine" and r.get("attacker") is None:
            cosines[r["model"], r["task"], r["step"]].append(r["value"])
    columns = [(task, step) for task in PIGGYBACK_TASKS for step in sorted({step for _, _, step in cosines})]
    table = [["model", *(f"{task} step {step}" for task, step in columns)]]
    for model in models:
        cells = [cosines.get((model, *column)) for column in columns]
        if any(cells):
            table.append([model, *(f"{statistics.mean(c):.3f}" if c else "-" for c in cells)])
    if len(table) == 1:
        return []
    return ["Mean cosine between the gradients of 4 chunks of the fixed attacker's batch, before these attack steps:", "",
            *markdown(table), ""]


# ----------------------------------------------------------------------------------------------------------------------
# Figures, each as PNG and SVG; nothing without matplotlib


def figures(out: Path, run: dict, runs: Sequence[dict], rows: dict, records: list[dict], models: Sequence[str]) -> None:
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "dtl"
    from matplotlib import pyplot

    def keep(chart: Any, name: str) -> None:
        chart.savefig(out / f"{name}.png", dpi=110)
        chart.savefig(out / f"{name}.svg", metadata={"Date": None})
        pyplot.close(chart)

    kind = "worst" if any(r["metric"] == "audit_pl_accuracy" for r in records) else "fixed"
    fronts = front(out, run, runs, models, kind)
    if fronts:
        chart, panels = pyplot.subplots(1, 2, figsize=(11, 4.8), layout="constrained", sharey=True)
        for panel, task in zip(panels, PIGGYBACK_TASKS):
            for i, (model, points) in enumerate(fronts.items()):
                line = sorted((weight, *xy) for weight, t, *xy in points if t == task)
                if line:
                    weights, xs, ys = zip(*line)
                    panel.plot(xs, ys, marker="os^Dv<>ph*Xd"[i % 12], ls=("-", "--", ":", "-.")[i % 4], lw=1, ms=6,
                               color="k" if not model.startswith("disposed:") else f"C{i % 10}",
                               mfc="w" if i % 2 else None, label=model.removeprefix("disposed:"))
                    for weight, x, y in line if len(line) > 1 else ():
                        panel.annotate(f"{weight:g}", (x, y), (4, 3), textcoords="offset points", fontsize=7)
            panel.axhline(0, color="0.6", lw=0.8)
            panel.set(xlabel="target accuracy, change in points (right is better)", title=task)
        panels[0].set_ylabel(f"{'worst-case' if kind == 'worst' else 'fixed attacker'} leak (down is better)")
        panels[1].legend(*panels[0].get_legend_handles_labels(), fontsize=7)
        keep(chart, "front")

    curves = collections.defaultdict(list)
    for r in records:
        if r.get("attacker") and r["metric"] in ("accuracy", "mean_cosine"):
            curves[r["attacker"], r["task"], r["metric"], r["model"], r["step"]].append(r["value"])
        elif r["metric"] == "audit_pl_accuracy" and r["value"] and r["fields"]["times"] > 1 and not r["attacker_seed"]:
            end = r["fields"]["times"] * run["settings"]["attack_steps"]
            curves[r["attacker"], r["task"], "accuracy", r["model"], end].append(r["value"])
    if curves:
        attacker = max({c[0] for c in curves}, key=lambda name: (max(c[4] for c in curves if c[0] == name), name))
        chart, panels = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained", sharex=True)
        for column, task in enumerate(PIGGYBACK_TASKS):
            for row, metric in enumerate(("accuracy", "mean_cosine")):
                for i, model in enumerate(models):
                    points = sorted((c[4], statistics.mean(v)) for c, v in curves.items()
                                    if c[:4] == (attacker, task, metric, model))
                    if points:
                        panels[row, column].plot(
                            [x for x, _ in points], [y * (100 if row == 0 else 1) for _, y in points], lw=1, ms=4,
                            marker="os^Dv<>ph*Xd"[i % 12], ls=("-", "--", ":", "-.")[i % 4], mfc="w" if i % 2 else None,
                            color="k" if not model.startswith("disposed:") else f"C{i % 10}",
                            label=model.removeprefix("disposed:"))
            panels[0, column].set(title=f"{task}, {attacker}")
            panels[1, column].set(xlabel="attack steps", xscale=("symlog"))
        panels[0, 0].set_ylabel("PL accuracy so far, % (down is better)")
        panels[1, 0].set_ylabel("mean cosine of the attacker's chunk gradients")
        panels[0, 1].legend(fontsize=7)
        keep(chart, "attack")


def front(out: Path, run: dict, runs: Sequence[dict], models: Sequence[str], kind: str) -> dict[str, list[tuple]]:
    """model -> (weight, task, change of target accuracy in points, leak), one point a weight: from all runs in `out` that
    differ from `run` in the weights alone. A model without weight has one point."""
    def base(r: dict) -> dict:
        return {k: v for k, v in r["settings"].items() if k != "forget_weights"} | {"seeds": r["seeds"]}

    points: dict[str, dict] = {}
    for other in sorted(runs, key=lambda r: r["started"]):
        if base(other) != base(run):
            continue
        weights = dict(part.split("=") for part in other["settings"]["forget_weights"].split(","))
        rows = summarise(Results(out).read(other["config_hash"]), models)
        for model, row in rows.items():
            weight = float(weights.get(model.removeprefix("disposed:"), 0))
            for task in PIGGYBACK_TASKS:
                if "change" in row and f"{kind} leak {task}" in row:
                    points.setdefault(model, {})[weight, task] = (100 * statistics.mean(row["change"]),
                                                                  statistics.mean(row[f"{kind} leak {task}"]))
    return {model: [(*key, *xy) for key, xy in points[model].items()] for model in models if model in points}
