"""A picture of a run: target accuracy across, what an attacker gets out of a model up.

    python experiments/picture.py OUT [PNG]

OUT is the folder of `python dtl.py all`; the picture becomes PNG, or else OUT/picture.png. A row of
panels is by the first attacker, as `fixed`, one by the strongest of those that attacked every
model. A line joins the points of one method under several allowances, as of @0.5, gc and @2. The
model `scratch`, far to the left of all others, is left out.
"""

import json
import sys
from pathlib import Path

import numpy as np

try:
    import matplotlib
except ImportError:
    sys.exit("no picture: it takes matplotlib (pip install matplotlib)")
matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.transforms import Bbox  # noqa: E402

LEVELS = {"transferred": ("no disposal", "-"), "oracle": ("never saw the source", "--")}
PLACES = [(7, 0), (-7, 0), (0, 7), (0, -7), (6, 8), (-6, 8), (6, -8), (-6, -8), (9, 18), (9, -18)]


def read(path):
    """{(task, first attacker or "strongest"): {model: (mean target, mean PL accuracy)}}, in %."""
    by_seed, values, points = {}, {}, {}
    for line in path.read_text().splitlines():
        r = json.loads(line)
        if r["metric"] != "source_accuracy" and r["model"] != "scratch":
            by_seed[r["model"], r["task"], r["attacker"], r["seed"]] = 100 * r["value"]
    for key, value in by_seed.items():
        values.setdefault(key[:3], []).append(value)
    mean = {key: np.mean(v) for key, v in values.items()}
    models, tasks, attackers = (dict.fromkeys(key[k] for key in mean) for k in range(3))
    common = [
        a for a in attackers if a and all((m, t, a) in mean for m in models for t in tasks if t)
    ]
    rows = [common[0], "strongest"] if len(common) > 1 else common
    for which in rows:
        for task in sorted(filter(None, tasks), reverse=True):  # source-subset, downstream
            for m in models:
                by = [mean[m, task, a] for a in common if which == "strongest" or a == which]
                points.setdefault((task, which), {})[m] = mean[m, None, None], max(by)
    return points


def write_names(panel, points, colours, taken):
    """Each name where it covers least of the lines, points and other words, which are `taken`."""
    for line in panel.lines:
        for x, y in line.get_transform().transform(line.get_path().interpolated(20).vertices):
            taken.append(Bbox([(x - 4, y - 4), (x + 4, y + 4)]))
    for name, point in sorted(points.items(), key=lambda item: item[1]):
        texts, method = [], name.split("@")[0]
        shown = name.removeprefix(method) if name != method and method in points else name
        for x, y in PLACES:
            ha = {-1: "right", 0: "center", 1: "left"}[np.sign(x)]
            va = {-1: "top", 0: "center", 1: "bottom"}[np.sign(y)]
            how = dict(textcoords="offset points", ha=ha, va=va, fontsize=8, color=colours[method])
            texts.append(panel.annotate(shown, point, (x, y), **how))
        boxes = [text.get_window_extent() for text in texts]
        covered = [sum(box.overlaps(other) for other in taken) for box in boxes]
        for k, box in enumerate(boxes):
            if box.x0 < panel.bbox.x0 or box.x1 > panel.bbox.x1:  # outside
                covered[k] += 99
        best = covered.index(min(covered))
        taken.append(boxes[best])
        for text in texts[:best] + texts[best + 1 :]:
            text.remove()


def draw(panel, points, default):
    """One panel; default: the allowance of a method that is named without one."""
    lines, levels, colours = {}, [], {}
    for name, point in points.items():
        method, _, allowance = name.partition("@")
        lines.setdefault(method, []).append((float(allowance or default), *point))
    for method, line in lines.items():
        _, across, up = zip(*sorted(line))
        colours[method] = f"C{len(colours)}" if len(line) > 1 else "black"
        panel.plot(across, up, "o-", color=colours[method], ms=5, lw=0.8)
    panel.margins(0.15)
    panel.autoscale_view()  # now, before names are placed
    panel.set_autoscale_on(False)
    for model, (words, style) in LEVELS.items():
        if model in points:
            level = points[model][1]
            panel.axhline(level, color="0.6", lw=1, ls=style, zorder=0)
            where = (panel.get_xlim()[0], level), (3, 2)
            how = dict(textcoords="offset points", fontsize=7, color="0.4")
            levels.append(panel.annotate(words, *where, **how).get_window_extent())
    write_names(panel, points, colours, levels)


def main(out, png=None):
    out, settings, png = Path(out), Path(out, "config.json"), png or Path(out, "picture.png")
    default = json.loads(settings.read_text())["settings"]["allowance"] if settings.exists() else 1
    points = read(out / "results.jsonl")
    columns = len({task for task, _ in points})
    rows = len(points) // columns
    size = dict(figsize=(5 * columns, 4 * rows), dpi=100, squeeze=False)
    chart, panels = pyplot.subplots(rows, columns, **size)
    chart.subplots_adjust(0.12 / columns, 0.12 / rows, 0.99, 1 - 0.06 / rows, 0.14, 0.22)
    for panel, ((task, which), of_models) in zip(panels.flat, points.items()):
        draw(panel, of_models, default)
        panel.set_title(f"{task}: PL accuracy of the {which} attacker, %", fontsize=9, loc="left")
        panel.set_xlabel("target accuracy, %", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    chart.savefig(png)
    print(f"wrote {png}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
