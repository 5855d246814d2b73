"""The report: worst cases, leaks and their intervals, the tables, the words, the picture, on made-up records
and on a run."""

import base64
import json
import re

import numpy as np
import pytest
from conftest import MODELS

import dtl

TASKS = dtl.PIGGYBACK_TASKS
IMAGES = 10000


def bits(value):
    """So many of 10,000 test images right, to the nearest, spread evenly: of two models the better one gets
    right what the other does, and hits differ by image where values do."""
    right = (np.arange(IMAGES) * 7919 % IMAGES) < round(value * IMAGES)
    return dict(value=right.mean(), images=IMAGES, hits=base64.b64encode(np.packbits(right)).decode())


def pl(model, value, task="downstream", attacker="fixed", attacker_seed=0, seed=0, mean_cosine=0.25):
    return dict(seed=seed, model=model, metric="pl_accuracy", task=task, attacker=attacker,
                attacker_seed=attacker_seed, mean_cosine=mean_cosine, **bits(value))  # fmt: skip


def target(model, value, seed=0):
    return dict(seed=seed, model=model, metric="target_accuracy", task=None, attacker=None,
                attacker_seed=None, **bits(value))  # fmt: skip


PL = dict(zip(MODELS, (0.40, 0.30, 0.42, 0.62, 0.60, 0.47, 0.40)))


def made_up(seeds=1, attackers=("fixed", "long"), models=MODELS, noise=0.01, gap=0.0):
    """Records of a whole experiment: `long` reaches 4 points more than `fixed`, but for gc-fresh. With `gap`,
    transferred stands so far above oracle."""
    rng, records = np.random.default_rng(0), []
    for seed in range(seeds):
        for model in models:
            if model != "random":
                records.append(target(model, 0.5 + 0.1 * PL[model] + noise * rng.normal(), seed))
            for task in TASKS:
                for k, attacker in enumerate(attackers):
                    value = PL[model] + (-0.02 if model == "disposed:gc-fresh" else 0.04) * k
                    value = PL["oracle"] + gap + 0.04 * k if gap and model == "transferred" else value
                    records.append(pl(model, value + noise * rng.normal(), task, attacker, 0, seed))
    return records


def rows(records, models=MODELS):
    return dtl.Rows(records, models)


# ---------------------------------------- worst cases


def test_the_worst_case_is_the_attacker_that_reaches_most():
    """For each model and task by itself, on test accuracy."""
    values = {
        ("disposed:gc", "source-subset"): (0.3, 0.5, 0.4),
        ("disposed:gc", "downstream"): (0.7, 0.5, 0.6),
        ("transferred", "source-subset"): (0.8, 0.9, 0.95),
        ("transferred", "downstream"): (0.2, 0.1, 0.15),
    }
    found = rows(
        [pl(m, v, t, a) for (m, t), vs in values.items() for a, v in zip(("fixed", "long", "few"), vs)]
    )
    for (model, task), tried in values.items():
        assert found.get("pl", model, task, "worst")[0] == pytest.approx(max(tried))
        assert found.get("pl", model, task, "few")[0] == pytest.approx(tried[2])


def test_the_worst_case_is_by_the_mean_over_attacker_seeds():
    """One lucky seed of an attacker does not make it the strongest; its value is that of the mean."""
    lucky = [
        pl("transferred", v, t, a, s)
        for t in TASKS
        for a, vs in (("fixed", (0.60, 0.60)), ("long", (0.90, 0.10)), ("few", (0.2, 0.3)))
        for s, v in enumerate(vs)
    ]
    for records in (lucky, lucky[::-1]):
        found = rows(records)
        assert found.get("pl", "transferred", "downstream", "worst")[0] == pytest.approx(0.6)
        assert found.get("pl", "transferred", "downstream", "long")[0] == pytest.approx(0.5)


def test_the_worst_case_is_one_attacker_for_all_seeds():
    """Not each seed's own: that would choose on noise."""
    records = [
        pl("transferred", v, t, a, 0, s)
        for t in TASKS
        for a, vs in (("fixed", (0.5, 0.3, 0.4)), ("long", (0.3, 0.4, 0.41)))
        for s, v in enumerate(vs)
    ]
    assert rows(records).get("pl", "transferred", "downstream", "worst")[0] == pytest.approx(0.4)


def test_attackers_are_listed_in_the_order_of_their_table():
    records = made_up(attackers=("few", "fixed", "long"))
    assert rows(records).attackers == [a for a in dtl.ATTACKERS if a in ("few", "fixed", "long")]


# ---------------------------------------- the leak and its interval


def test_leak_is_a_ratio_of_means_and_its_interval_a_bootstrap_over_whole_seeds():
    """By hand: the seeds are drawn with replacement, the three models' values staying together."""
    top, zero, mine = (
        np.array(v) for v in ([0.50, 0.70, 0.66, 0.58], [0.40, 0.45, 0.42, 0.44], [0.42, 0.60, 0.50, 0.47])
    )
    records = [
        pl(m, v, t, "fixed", 0, s)
        for t in TASKS
        for m, vs in (("transferred", top), ("oracle", zero), ("disposed:gc", mine))
        for s, v in enumerate(vs)
    ]
    value, low, high = rows(records[::-1]).get("leak", "disposed:gc", "downstream", "fixed")
    assert value == pytest.approx((mine.mean() - zero.mean()) / (top.mean() - zero.mean()))
    assert value != pytest.approx(((mine - zero) / (top - zero)).mean(), abs=0.01)  # never a mean of ratios
    rng, ratios = np.random.default_rng(99), []
    for _ in range(20000):  # 10,000 images add next to nothing to what four seeds differ by
        k = rng.integers(0, 4, 4)
        ratios.append((mine[k].mean() - zero[k].mean()) / (top[k].mean() - zero[k].mean()))
    assert (low, high) == pytest.approx(np.percentile(ratios, (2.5, 97.5)), abs=0.02)
    assert low < value < high


def test_other_intervals_are_bootstraps_too():
    values, zero = np.array([0.42, 0.60, 0.50]), np.array([0.40, 0.45, 0.30])
    records = [
        pl(m, v, t, "fixed", 0, s)
        for t in TASKS
        for m, vs in (("disposed:gc", values), ("oracle", zero))
        for s, v in enumerate(vs)
    ]
    found = rows(records)
    draws = np.random.default_rng(5).integers(0, 3, (20000, 3))
    for what, sample in (("pl", values), ("points", values - zero)):
        expected = (sample.mean(), *np.percentile(sample[draws].mean(1), (2.5, 97.5)))
        assert found.get(what, "disposed:gc", "downstream", "fixed") == pytest.approx(expected, abs=0.01), (
            what
        )


def test_the_leak_of_one_seed_has_the_width_of_its_images_and_its_ends_are_zero_and_one():
    found = rows(made_up())
    for task in TASKS:
        for attacker in ("worst", "fixed", "long"):
            assert found.get("leak", "oracle", task, attacker) == pytest.approx((0, 0, 0))
            assert found.get("leak", "transferred", task, attacker) == pytest.approx((1, 1, 1))
            value, low, high = found.get("leak", "disposed:gc", task, attacker)
            assert 0 < low < value < high < 1
    assert found.get("leak", "random", "downstream", "fixed")[0] < 0


def test_the_interval_of_one_seed_is_that_of_a_share_of_its_images():
    """Two standard errors of a binomial share; attacker seeds are averaged image by image first."""
    value, low, high = rows([pl("oracle", 0.3, t) for t in TASKS]).get("pl", "oracle", "downstream", "fixed")
    error = (0.3 * 0.7 / IMAGES) ** 0.5
    assert value == pytest.approx(0.3) and (low, high) == pytest.approx(
        (0.3 - 1.96 * error, 0.3 + 1.96 * error), abs=0.2 * error
    )
    twice = rows([pl("oracle", 0.3, t, attacker_seed=s) for t in TASKS for s in (0, 1)])
    assert twice.get("pl", "oracle", "downstream", "fixed") == (value, low, high)


def test_models_are_compared_on_the_same_seeds_and_images():
    """Of hits that are the same the difference is exactly none; a model that gets 100 more images right in
    every seed is better by the share of them alone, though accuracies differ by 40 points between seeds."""
    records = [
        pl(m, v + more, t, "fixed", 0, s)
        for t in TASKS
        for s, v in enumerate((0.2, 0.4, 0.6))
        for m, more in (("disposed:gc", 0.0), ("disposed:uniform", 0.0), ("oracle", 0.01))
    ]
    found = rows(records)
    where = ("disposed:gc", "downstream", "fixed")
    assert found.get("minus", *where, "disposed:uniform") == (0, 0, 0)
    value, low, high = found.get("minus", *where, "oracle")
    assert value == pytest.approx(-0.01) and high - low < 0.006
    low, high = found.get("pl", *where)[1:]
    assert high - low > 0.2
    assert found.get("minus", *where, "scratch") is None


@pytest.mark.parametrize("images", [False, True])
def test_drawings_are_with_replacement_and_the_first_row_is_all_alike(images):
    weights = dtl.draws(50, images)
    assert weights.shape == (1 + dtl.DRAWS, 50) and np.allclose(weights.sum(1), 1)
    assert (weights[0] == 1 / 50).all() and np.allclose(weights * 50, np.rint(weights * 50))
    assert (weights[1:] == 0).mean() == pytest.approx((1 - 1 / 50) ** 50, abs=0.02)
    assert not np.array_equal(dtl.draws(50, True), dtl.draws(50, False))


def test_the_paired_table_has_the_pairs_that_were_measured():
    models = (*MODELS, "disposed:distill-fresh")
    for attackers, columns in (
        (("fixed",), ["target", "PL"]),
        (("fixed", "few", "long"), ["target", "worst PL", "fixed PL", "few PL"]),
    ):
        found = rows(made_up(attackers=attackers, models=[m for m in models if m in PL]))
        table = parsed(dtl.tables(found))["paired, downstream"]
        assert [*table] == ["gc - uniform"] and [*table["gc - uniform"]] == columns
        expected = found.get("minus", "disposed:gc", "downstream", "fixed", "disposed:uniform")
        shown = table["gc - uniform"][columns[-1] if len(columns) == 2 else "fixed PL"]
        assert shown == dtl.cell(expected, "+.1f") and "(" in shown
    assert "paired" not in "\n".join(dtl.tables(rows(made_up(models=MODELS[:5]))))


def test_change_is_against_transferred_and_points_against_oracle():
    records = [
        target("transferred", 0.60),
        target("disposed:gc", 0.55),
        *(
            pl(m, v, t)
            for t in TASKS
            for m, v in (("transferred", 0.7), ("oracle", 0.4), ("disposed:gc", 0.45))
        ),
    ]
    found = rows(records)
    assert found.get("target", "disposed:gc")[0] == pytest.approx(0.55)
    assert found.get("change", "disposed:gc")[0] == pytest.approx(-0.05)
    assert found.get("points", "disposed:gc", "downstream", "fixed")[0] == pytest.approx(0.05)
    assert found.get("change", "oracle") is None and found.get("target", "oracle") is None


@pytest.mark.parametrize(("gaps", "printed"), [
    ([0.05], True), ([0.031], True), ([0.029], False), ([0.0], False), ([-0.2], False),  # 3 points
    ([0.04, 0.05, 0.06], True),
    ([0.0, 0.03, 0.07], False),  # twice the error of 1.65 points, but none in one seed: a ratio would burst
    ([0.0, 0.09, 0.24], False), ([0.06, 0.12, 0.18], True),  # 11 and 12 points against 11.5 and 5.7
    ([0.05, 0.05, 0.05], True), ([0.02, 0.02, 0.02], False),
])  # fmt: skip
def test_no_leak_where_transferred_hardly_stands_above_oracle(gaps, printed):
    """By 3 points, and by twice the bootstrapped error; then one line says why."""
    records = [
        pl(m, v, t, "fixed", 0, s)
        for t in TASKS
        for s, gap in enumerate(gaps)
        for m, v in (
            ("oracle", 0.4),
            ("transferred", 0.4 + (gap if t == "downstream" else 0.3)),
            ("disposed:gc", 0.42),
        )
    ]
    found = rows(records)
    leak, why = found.get("leak", "disposed:gc", "downstream", "fixed"), dtl.in_words(found)
    assert (leak is not None) == printed and found.get(
        "leak", "disposed:gc", "source-subset", "fixed"
    ) is not None
    said = [line for line in why if line.startswith("no leak")]
    assert len(said) == (not printed)
    if not printed:
        assert "downstream" in said[0] and f"{100 * np.mean(gaps):.1f} points above oracle" in said[0]
        cells = [line.split("|")[-3] for line in dtl.tables(found) if re.match(r"\| gc ", line)]
        assert re.match(r" \d", cells[0]) and re.match(r" -+ ", cells[1])  # source-subset, downstream


def test_no_leak_without_an_oracle_and_one_line_for_both_tasks():
    found = rows(made_up(models=[m for m in MODELS if m != "oracle"]))
    assert all(
        found.get(what, "disposed:gc", t, "worst") is None for what in ("leak", "points") for t in TASKS
    )
    said = [line for line in dtl.in_words(found) if "no leak" in line]
    assert len(said) == 1 and "oracle" in said[0] and "b.npz@20" in said[0]  # why, and what to do
    assert "| oracle" not in "\n".join(dtl.tables(found))


# ---------------------------------------- the tables, the words


def parsed(lines):
    """The tables, each as {first cell: {column: cell}} under its first column's name."""
    tables, head = {}, None
    for line in lines:
        cells = [c.strip() for c in line.strip("|").split("|")] if line.startswith("|") else None
        if cells is None:
            head = None
        elif head is None:
            head = cells
            tables[head[0]] = {}
        elif not set("".join(cells)) <= set("-:"):
            tables[head[0]][cells[0]] = dict(zip(head[1:], cells[1:]))
    return tables


def by_attacker(tables, task):
    (name,) = (n for n in tables if n == f"PL, {task}")
    return tables[name]


@pytest.mark.parametrize("attackers", [("fixed",), ("fixed", "long"), dtl.SMALL, tuple(dtl.ATTACKERS)])
def test_tables_are_at_most_100_columns_wide_and_116_with_several_attackers(attackers):
    """With every method there is."""
    models = (*dtl.REFERENCES, *(f"disposed:{m}" for m in dtl.METHODS))
    records = [
        pl(m, 0.987654 - 0.3 * (m == "oracle"), t, a) for m in models for t in TASKS for a in attackers
    ]
    records += [target(m, 0.98765 - 0.3 * (m == "disposed:scrub")) for m in models]
    lines = dtl.tables(dtl.Rows(records, models))
    assert max(map(len, lines)) <= (100 if len(attackers) == 1 else 116)
    tables = [line for line in lines if line.startswith("|")]
    height, several = 2 + len(models), len(attackers) > 1
    assert len(tables) == 2 * (height * (1 + several) + 2 + len(dtl.PAIRS))


def test_what_stands_in_the_tables():
    records = [target("transferred", 0.601), target("oracle", 0.59), target("disposed:gc", 0.552)]
    for t, extra in zip(TASKS, (0.0, 0.1)):
        records += [
            pl("transferred", 0.6 + extra, t, "fixed", mean_cosine=0.5),
            pl("oracle", 0.4, t, "fixed", mean_cosine=0.1),
            pl("disposed:gc", 0.45, t, "fixed", mean_cosine=-0.02),
        ]
        records += [
            pl("transferred", 0.7 + extra, t, "long"),
            pl("oracle", 0.5, t, "long"),
            pl("disposed:gc", 0.44, t, "long"),
        ]
    found = parsed(dtl.tables(rows(records)))
    for t, extra in zip(TASKS, (0, 10)):
        assert [*found[t]] == ["oracle", "transferred", "gc"]
        gc = found[t]["gc"]
        assert gc["target %"] == "55.2" and gc["change"] == "-4.9" and gc["cosine"] == "-0.02"
        assert gc["fixed PL %"] == "45.0 +5.0" and float(gc["fixed leak"]) == pytest.approx(
            5 / (20 + extra), abs=0.006
        )
        assert gc["worst PL %"] == "45.0 -5.0" and float(gc["worst leak"].split()[0]) == pytest.approx(
            -5 / (20 + extra), abs=0.006
        )
        assert found[t]["transferred"]["worst PL %"] == f"{70 + extra}.0 +{20 + extra}.0"
        others = by_attacker(found, t)
        assert others["gc"] == {"fixed": "45.0", "long": "44.0"} and others["oracle"]["long"] == "50.0"


def test_of_one_attacker_nothing_is_called_worst():
    found = parsed(dtl.tables(rows(made_up(attackers=("fixed",)))))
    assert [n for n in found if "paired" not in n] == [*TASKS] and [*found["downstream"]["gc"]] == [
        "target %",
        "change",
        "PL %",
        "leak",
        "cosine",
    ]


def test_the_leak_of_the_worst_case_has_its_interval():
    found = parsed(dtl.tables(rows(made_up(seeds=3))))
    assert "(" not in found["downstream"]["gc"]["fixed leak"]
    value, low, high = map(
        float, re.fullmatch(r"(\S+) \((\S+), (\S+)\)", found["downstream"]["gc"]["worst leak"]).groups()
    )
    assert low <= value <= high and low < high


def test_attackers_without_the_fixed_one():
    found = parsed(dtl.tables(rows(made_up(attackers=("long", "few")))))
    assert [*found["downstream"]["gc"]] == ["target %", "change", "worst PL %", "worst leak", "cosine"]


def test_the_words_have_the_numbers_of_the_table():
    found = rows(made_up(noise=0))
    gc, fresh = [line for line in dtl.in_words(found) if line.startswith("In words")]
    assert gc.startswith("In words: gc ") and fresh.startswith("In words: gc-fresh ")
    for number in (
        "keeps 54.7 (",
        "-1.5 (",
        "reaches 51.0 (",
        "66.0 (",
        "46.0 (",
        "a leak of 0.25 (",
    ):  # target, change; gc, transferred, oracle
        assert number in gc, number
    for number in ("40.0 (", "-0.30 ("):
        assert number in fresh, number
    assert "erased" not in gc and "\n" not in gc


def test_words_of_no_gc_method_are_none():
    assert not [
        line for line in dtl.in_words(rows(made_up(models=MODELS[:5]))) if line.startswith("In words")
    ]


def test_the_picture_is_drawn_whole_or_not_at_all(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path = tmp_path / "report.png"
    for records in (
        made_up(),
        made_up(attackers=("fixed",)),
        made_up(seeds=3, attackers=("long", "few"), models=MODELS[3:]),
    ):
        path.unlink(missing_ok=True)
        dtl.picture(path, rows(records))
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 8000
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(dtl.DTLError, match="cannot write .*report.png"):
        dtl.picture(path, rows(made_up()))
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


def test_no_picture_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    dtl.picture(tmp_path / "report.png", rows(made_up()))
    assert not [*tmp_path.iterdir()]


# ---------------------------------------- of a run, as written


def test_the_report_of_a_run_is_that_of_its_results(finished):
    """Every number of the tables can be had from results.jsonl."""
    records = [json.loads(line) for line in (finished.out / "results.jsonl").read_text().splitlines()]
    text = (finished.out / "report.md").read_text()
    found = parsed(text.splitlines())
    of = {}
    for r in records:
        of.setdefault((r["model"], r["metric"], r["task"], r["attacker"]), []).append(r["value"])
    assert {len(values) for k, values in of.items() if k[1] == "pl_accuracy"} == {2}  # attacker seeds
    for task in TASKS:
        for name, cells in found[task].items():
            model = next(m for m in MODELS if m.removeprefix("disposed:") == name)
            reached = {a: np.mean(of[model, "pl_accuracy", task, a]) for a in ("fixed", "long")}
            assert float(cells["fixed PL %"].split()[0]) == pytest.approx(100 * reached["fixed"], abs=0.051)
            assert float(cells["worst PL %"].split()[0]) == pytest.approx(
                100 * max(reached.values()), abs=0.051
            )
            assert float(by_attacker(found, task)[name]["long"]) == pytest.approx(
                100 * reached["long"], abs=0.051
            )
            if model != "random":
                (value,) = of[model, "target_accuracy", None, None]
                assert float(cells["target %"]) == pytest.approx(100 * value, abs=0.051)
            cosines = [
                r["mean_cosine"]
                for r in records
                if (r["model"], r["task"], r["attacker"]) == (model, task, "fixed")
            ]
            assert float(cells["cosine"]) == pytest.approx(np.mean(cosines), abs=0.0051)
    (source,) = of["pretrained", "source_accuracy", None, None]
    assert f"{100 * source:.1f}%" in text.split("| source-subset")[0]
    assert "fixed, long" in text and "`python dtl.py " in text


def test_the_picture_of_a_run(finished):
    pytest.importorskip("matplotlib")
    assert (finished.out / "report.png").read_bytes().startswith(b"\x89PNG")
