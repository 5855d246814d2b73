"""What the README says is so: its commands are understood, its Python runs, its figures are those a run
wrote."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from test_report import parsed
from torch import nn

import dtl

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.S | re.M)
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = list(dict.fromkeys(re.findall(r"python dtl\.py [^`\n&|]*", README)))
TINY = (
    "--pretrain-steps 1 --transfer-steps 1 --dispose-steps 1 --fresh-steps 1 --attack-steps 1 --image-size 8 "
    "--chunks 2 --chunk-size 2 --batch-size 16"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the README's reader works: what its Python blocks write is there for its commands."""
    return tmp_path_factory.mktemp("reader")


def a_project():
    """What the README's example of the loss takes for granted: a project of the reader's own, and the copied
    block."""
    block = re.search(
        r"# --- copy from here ---\n(.*?)# --- to here ---", (ROOT / "dtl.py").read_text(), re.S
    )[1]
    names = {}
    exec(compile(block, "copied", "exec"), names)
    backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    optimizer = torch.optim.SGD(backbone.parameters(), 0.1)
    source = dict(source_x=torch.randn(32, 6), source_y=torch.randint(0, 3, (32,)))
    return (
        names
        | source
        | dict(
            F=F,
            nn=nn,
            torch=torch,
            backbone=backbone,
            features=5,
            classes=3,
            optimizer=optimizer,
            retain_loss=backbone(torch.randn(4, 6)).square().mean(),
        )
    )


@pytest.mark.parametrize("text", PYTHON)
def test_python_blocks_run(text, folder, monkeypatch):
    """And one with the loss trains the backbone."""
    monkeypatch.chdir(folder)
    names = a_project()
    before = [p.detach().clone() for p in names["backbone"].parameters()]
    exec(compile(text, "README.md", "exec"), names)
    if "gradient_collision" in text:
        assert not any(torch.equal(a, b) for a, b in zip(before, names["backbone"].parameters()))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, dtl_command, folder, monkeypatch):
    """Each with tiny steps; a GPU's where there is none, and CIFAR's without its files, up to their one
    line."""
    arguments = [a for a in shlex.split(command, comments=True)[2:] if a not in ("...", "…")]
    arguments = arguments if arguments and not arguments[0].startswith("-") else ["all", *arguments]
    if arguments[0] in dtl.STAGES and "--help" not in arguments:
        arguments += [*TINY, "--out", folder / "runs", "--data-dir", folder / "none"]
        arguments += [] if "--methods" in arguments else ["--methods", "finetune"]
    elif arguments[0] == "data":
        arguments += ["--data-dir", folder / "none"]
    for text in PYTHON:
        if "savez" in text and not list(folder.glob("*.npz")):
            monkeypatch.chdir(folder)
            exec(compile(text, "README.md", "exec"), {})
    monkeypatch.chdir(folder)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network: the download ends in its one line
    right = torch.arange(10) % 2 == 0  # in place of thousands of images each
    monkeypatch.setattr(dtl, "hits", lambda model, task: right)
    monkeypatch.setattr(dtl, "piggyback", lambda *a: (right, 0.0))
    monkeypatch.setattr(dtl, "picture", lambda *a: None)
    result = dtl_command(*arguments)
    if result.code:
        assert "--gpu" in command or "cifar" in command or arguments[0] == "data", result.output
        assert (
            len(
                re.findall("^Error: (?:--gpu|cannot download|--source: cannot download)", result.output, re.M)
            )
            == 1
        ), result.output


def test_every_option_named_exists():
    known = {option for command in dtl.main.commands.values() for p in command.params for option in p.opts}
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.S | re.M))
    ours = [text for text in inline if text.startswith("--") or "dtl.py" in text.split(" --")[0]] + COMMANDS
    named = {
        option for text in ours for option in re.findall(r"(?:^|\s)(--[a-z-]+)", text.split("dtl.py")[-1])
    }
    assert named and named - known <= {"--help", "--version"}


def test_names_of_the_program_exist():
    """In capitals, or a function or class of dtl.py."""
    named = set(re.findall(r"`([A-Z][A-Z_]{3,}|gradient_[a-z_]+|running_[a-z_]+)(?:\([^`]*\))?`", README))
    assert {name for name in named if not hasattr(dtl, name)} <= {"SET"}


def test_ci_runs_the_readmes_test_command():
    (command,) = (text.strip() for _, text in BLOCKS if "-m pytest" in text)
    assert command in (ROOT / ".ci" / "run").read_text()


def cells(line):
    return [c.strip() for c in line.strip().strip("|").split("|")]


def test_the_loss_in_seven_lines_is_the_loss():
    names = a_project()
    exec(next(text for text in PYTHON if "def collision" in text), names)
    params = [*names["backbone"].parameters()]
    losses = [names["backbone"](x).square().mean() for x in names["source_x"].chunk(4)]
    short, full = names["collision"](losses, params), names["gradient_collision_loss"](losses, params)
    assert short.item() == pytest.approx(full.item(), rel=1e-5)
    for a, b in zip(torch.autograd.grad(short, params, retain_graph=True), torch.autograd.grad(full, params)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind, name", re.findall(r"<!-- (table|text|rows) (\S+) -->", README))
def test_figures_are_those_a_run_wrote(kind, name):
    """The whole file, or for `rows` some lines of one table in it; leaving out spaces."""
    shown = re.search(rf"<!-- {kind} {re.escape(name)} -->\n(.*?)<!-- end -->", README, re.S)[1].strip()
    written = (ROOT / name).read_text().strip()
    if kind == "rows":
        known = [cells(line) for line in written.splitlines() if line.startswith("|")]
        rows = [cells(line) for line in shown.splitlines() if not set(line) <= set("|-: ")]
        assert len(rows) > 2 and all(row in known for row in rows), [row for row in rows if row not in known]
        at = [known.index(row) for row in rows]
        assert not any(set("".join(known[k])) <= {"-"} for k in range(at[0] + 2, max(at) + 1))  # one table's
    else:
        assert shown == (f"```\n{written}\n```" if name.endswith(".txt") else written)


@pytest.mark.parametrize(
    "folder",
    sorted(
        p.parent.name
        for p in (ROOT / "experiments").glob("*/results.jsonl")
        if '"digest"' in p.read_text().split("\n")[0]
    ),
)
def test_published_tables_come_from_their_results(folder, capsys, monkeypatch):
    """Of what the program as it is now has measured, and experiments/sceptic.py and durable.py."""
    monkeypatch.setitem(dtl.ATTACKERS, "sceptic", None)
    monkeypatch.syspath_prepend(ROOT / "experiments")
    trials = importlib.import_module("durable").TRIALS
    out = ROOT / "experiments" / folder
    results = dtl.Results(out)
    assert results and not capsys.readouterr().err
    if (out / "report.md").exists():
        models = [*dtl.REFERENCES, *(f"disposed:{m}" for m in (*dtl.METHODS, *trials))]
        found = [line for line in dtl.tables(dtl.Rows([*results.values()], models)) if line]
        assert found == [
            line for line in (out / "report.md").read_text().splitlines() if line.startswith("|")
        ]


def test_the_sceptic_goes_on_from_a_run_and_stands_in_its_report(tiny, dtl_command, tmp_path, monkeypatch):
    monkeypatch.setitem(dtl.ATTACKERS, "sceptic", None)
    monkeypatch.setitem(dtl.PRESETS, "demo", tiny)
    monkeypatch.syspath_prepend(ROOT / "experiments")
    sceptic = importlib.import_module("sceptic")
    run = dtl_command("all", "--methods", "uniform", "--out", tmp_path)
    assert run.code == 0, run.output
    options = ["--preset", "demo", "--models", "oracle,transferred,disposed:uniform", "--data-dir", str(tmp_path)]
    options += ["--smoke", "--out", str(tmp_path)]
    for again in (False, True):
        done = CliRunner().invoke(sceptic.main, options)
        assert done.exit_code == 0, done.output
        assert ("seed 0 oracle downstream" in done.output) != again
    assert "there is no" in CliRunner().invoke(sceptic.main, [*options, "--made-with", "9.9,cuda"]).output
    report = (tmp_path / "sceptic" / "report.md").read_text()
    assert "2 attackers (fixed, sceptic)" in report and "| scratch" not in report
    assert re.search(r"^\| uniform +\| [\d.]+ +\| [\d.]+ +\|$", report, re.M)


def test_short_tables_say_what_their_reports_say():
    """experiments/README.md: target accuracy, and for both tasks the worst PL and its leak, model by model."""
    text = (ROOT / "experiments" / "README.md").read_text()
    pattern = r"^\| (?:five seeds|validation seed 100) \|.*\n\|[-|]+\n((?:\|.*\n)+)(?:.*\n)*?.*\[report.md\]\((.*?)\)"
    found = re.findall(pattern, text, re.M)
    assert [folder.split("/")[0] for _, folder in found] == ["protocol", "cifar-cpu-gpu", "durable-2", "durable-3", "durable-4"]
    for rows, report in found:
        tables = parsed((ROOT / "experiments" / report).read_text().splitlines())
        tables = [tables[task] for task in dtl.PIGGYBACK_TASKS]
        rows = [cells(row) for row in rows.splitlines()]
        assert len(rows) >= 5 and all({row[0] for row in rows} == table.keys() for table in tables)
        for name, target, *by_task in rows:
            full = [{column.removeprefix("worst "): f for column, f in table[name].items()} for table in tables]
            assert by_task == [f"{f['PL %'].split()[0]}, {f['leak']}" for f in full], name
            assert target in (full[0]["target %"], f"{full[0]['target %']} ({full[0]['change']})"), name


def test_a_trial_of_durable_disposal_that_changes_nothing_is_the_method(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(dtl.ATTACKERS, "sceptic", None)
    monkeypatch.setitem(dtl.PRESETS, "demo", tiny)
    monkeypatch.syspath_prepend(ROOT / "experiments")
    durable = importlib.import_module("durable")
    same = {"gc-fresh": durable.Trial(gc=30), "uniform-fresh": durable.Trial(uniform=10), "distill-fresh": durable.Trial()}
    for method, trial in same.items():
        monkeypatch.setitem(durable.TRIALS, f"as-{method}", trial)
    models = ["oracle", "transferred", *(f"disposed:{m}" for m in (*same, *(f"as-{m}" for m in same)))]
    models += [f"disposed:{m}" for m in ("few-images", "several-teachers-gc", "top1-gc")]
    options = ["--preset", "demo", "--seed", "0", "--data-dir", str(tmp_path), "--out", str(tmp_path), "--smoke"]
    done = CliRunner().invoke(durable.main, [*options, "--models", ",".join(models)])
    assert done.exit_code == 0, (done.output, done.exception)
    target = dict(re.findall(r"^\| ([a-z0-9-]+) +\| ([\d.]+) ", done.output, re.M))
    models = {p.name.split("-seed")[0]: torch.load(p)["backbone"] for p in (tmp_path / "checkpoints").glob("*.pt")}
    for method in same:
        one, other = (models[f"disposed-{name}"] for name in (method, f"as-{method}"))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one), method
        assert target[method] == target[f"as-{method}"]
    assert {"few-images", "several-teachers-gc", "top1-gc"} <= target.keys()


def test_the_protocol_chooses_on_validation_seeds_and_then_tests(tiny, tmp_path, monkeypatch):
    """From nothing to its tables; what several share is done once; the published table is that of its trials,
    and the preset has the weights."""
    monkeypatch.setitem(dtl.ATTACKERS, "sceptic", None)
    monkeypatch.setitem(dtl.PRESETS, "demo", tiny)
    monkeypatch.syspath_prepend(ROOT / "experiments")
    protocol = importlib.import_module("protocol")
    for module, name, value in (
        (protocol, "VALIDATION", (100, 101)), (protocol, "TEST", (5,)), (protocol, "DURABLE", []),
        (protocol, "FRONT", ("gc-fresh",)),
        (protocol, "ATTACKS", ("fixed", "few")), (protocol, "TRIALS", {"gc-fresh": (1, 2), "uniform": (3, 4)}),
        (protocol.sceptic, "SCOUT", 1), (protocol.sceptic, "MORE", 3)):
        monkeypatch.setattr(module, name, value)
    options = ["--preset", "demo", "--data-dir", str(tmp_path), "--out", str(tmp_path)]
    done = [CliRunner().invoke(protocol.main, [*options, *more]) for more in ((), (), ("--report",))]
    assert all(d.exit_code == 0 for d in done), [(d.output, d.exception) for d in done]
    assert "seed 5 disposed:gc-fresh downstream" in done[0].output and not done[1].output
    trials = [json.loads(line) for line in (tmp_path / "sceptic" / "trials.jsonl").read_text().splitlines()]
    value = {(r["seed"], r["model"]): r["value"] for r in trials if r["metric"] == "target_accuracy"}
    tested = {r["key"] for r in dtl.Results(tmp_path).values()}
    for method, weights in protocol.TRIALS.items():
        cost = {w: sum(value[s, "transferred"] - value[s, f"{method} {w}"] for s in (100, 101)) / 2 for w in weights}
        chosen = max((w for w in weights if cost[w] <= 0.01), default=min(weights))
        config = dtl.Config(**tiny | dict(weights=f"{method}={chosen}"))
        run = dtl.Run(config, 5, tmp_path, dtl.Progress(), dtl.Results(tmp_path))
        assert run.number(f"disposed:{method}", "pl_accuracy", "downstream", "few", 0)[0]["key"] in tested
    report = (tmp_path / "sceptic" / "report.md").read_text()
    assert "3 attackers (fixed, few, sceptic)" in report and "seeds 5;" in report
    assert re.search(r"^\| gc-fresh +\| [\d.]+ +\| [+-]", report, re.M)


def test_trials_are_those_published_and_the_preset_has_the_weights(monkeypatch):
    monkeypatch.setitem(dtl.ATTACKERS, "sceptic", None)
    monkeypatch.syspath_prepend(ROOT / "experiments")
    protocol = importlib.import_module("protocol")
    for folder in ("ablation", "protocol"):
        at = ROOT / "experiments" / folder
        trials = [json.loads(line) for line in (at / "trials.jsonl").read_text().splitlines()]
        written = protocol.table(trials)
        assert written == (at / "trials.md").read_text()
        assert written in (ROOT / "experiments" / "README.md").read_text()
    mean = {}
    for r in trials:
        if r["metric"] == "target_accuracy":
            mean[r["model"]] = mean.get(r["model"], 0) + r["value"] / len(protocol.VALIDATION)
    chosen = dtl.Config(**dtl.PRESETS["cifar-cpu"]).weight_of()
    assert chosen.keys() == protocol.TRIALS.keys()
    for method, weights in protocol.TRIALS.items():
        passed = [w for w in weights if mean["transferred"] - mean[f"{method} {w}"] <= protocol.MOST]
        assert chosen[method] == max(passed, default=min(weights))


def test_the_ablation_measures_each_variant_as_a_model_of_its_own(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(dtl.PRESETS, "demo", tiny)
    monkeypatch.syspath_prepend(ROOT / "experiments")
    ablation = importlib.import_module("ablation")
    monkeypatch.setattr(ablation, "VARIANTS", dict([*ablation.VARIANTS.items()][i] for i in (0, 3, 4)))
    options = ["--preset", "demo", "--data-dir", str(tmp_path), "--out", str(tmp_path)]
    done = CliRunner().invoke(ablation.main, options)
    assert done.exit_code == 0, (done.output, done.exception)
    assert len(list((tmp_path / "checkpoints").glob("disposed-gc-*.pt"))) == 3
    assert re.search(r"^\| cos fresh 2 x 16, 10 \| [\d.]+ \|", done.output, re.M)


def test_evidence_in_the_docstring_is_the_reports():
    """Every figure of a model's line is one of its line in the report."""
    report = (ROOT / "experiments" / "protocol" / "report.md").read_text()
    lines = re.findall(r"^    (oracle|transferred|uniform|gc|[a-z-]+-fresh) {2,}(.*)", dtl.__doc__, re.M)
    assert len(lines) == 9
    for model, figures in lines:
        known = " ".join(re.findall(rf"^\| {model} .*", report, re.M))
        for figure in figures.split():
            assert re.search(rf"(?<![\d.]){re.escape(figure.strip('(,)'))}(?![\d.])", known), (model, figure)


def test_dependencies_stand_in_three_places_alike():
    """The script's own are those of the published figures, pinned; the package's are their lower bounds."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    script = re.search(r"^# /// script\n(.*?)^# ///", (ROOT / "dtl.py").read_text(), re.S | re.M)[1]
    metadata = tomllib.loads(re.sub(r"^# ?", "", script, flags=re.M))
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert {pin.replace("'", '"') for pin in metadata["dependencies"]} <= set(constraints)
    needed = {re.match(r"[\w-]+", d)[0] for d in project["dependencies"]}
    assert {re.match(r"[\w-]+", d)[0] for d in metadata["dependencies"]} == needed - {"cffi"}
    assert metadata["requires-python"] == project["requires-python"]
