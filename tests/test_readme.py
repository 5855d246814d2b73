"""What the README says is so: its commands are understood, its Python runs, its figures are those
that a run wrote."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest

import dtl

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.S | re.M)
PYTHON = [text for language, text in BLOCKS if language == "python"]
BASH = "".join(text for language, text in BLOCKS if language == "bash")
COMMANDS = list(dict.fromkeys(re.findall(r"python (?:dtl|mine)\.py [^`\n&|#)]*", README)))
FENCE = r"# --- copy from here ---\n(.*?)# --- to here ---"
TINY = "--pretrain-steps 1 --transfer-steps 1 --dispose-steps 1 --fresh-steps 1 --attack-steps 1 "
TINY = (TINY + "--image-size 8 --chunks 2 --chunk-size 2 --batch-size 16").split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the README's reader works: its own data are there, made by its own lines."""
    image = pytest.importorskip("PIL.Image")  # it comes with matplotlib
    folder, rng = tmp_path_factory.mktemp("reader"), np.random.default_rng(0)
    for label in "abcd":
        (folder / "pictures" / label).mkdir(parents=True)
        for k in range(30):
            pixels = rng.integers(0, 255, (20, 24, 3), np.uint8)
            image.fromarray(pixels).save(folder / "pictures" / label / f"{k}.png")
    run_alone(next(text for text in PYTHON if "savez" in text), folder)
    for name in ("target", "downstream"):
        shutil.copy(folder / "source.npz", folder / f"{name}.npz")
    return folder


def run_alone(text, folder):
    """text as a script beside a copy of dtl.py; what it prints."""
    (folder / "alone.py").write_text(text)
    (folder / "dtl.py").write_bytes((ROOT / "dtl.py").read_bytes())
    ran = subprocess.run([sys.executable, "alone.py"], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_loop_trains_under_the_copied_block(tmp_path):
    """In an empty file: torch alone, no `import dtl`; the retain loss falls, and GC too."""
    (loop,) = (text for text in PYTHON if "Balance(" in text)
    block = re.search(FENCE, (ROOT / "dtl.py").read_text(), re.S)[1]
    assert "dtl" not in loop and "import dtl" not in block
    lines = run_alone(block + loop, tmp_path).splitlines()
    numbers = np.array([re.findall(r"-?\d+\.\d+", line) for line in lines], float)
    assert numbers.shape == (60, 3)
    assert numbers[-5:, 0].mean() < 0.9 * numbers[:5, 0].mean()
    assert numbers[-5:, 1].mean() < 0.7 * numbers[:5, 1].mean()


def test_auditing_a_foreign_model_runs(tmp_path):
    text = next(text for text in PYTHON if "dtl.piggyback" in text)
    text = text.replace("attack_steps=60", "attack_steps=2")
    printed = re.findall(r"^(\w+): ([\d.]+)%$", run_alone(text, tmp_path), re.M)
    assert [name for name, _ in printed] == list(dtl.ATTACKERS)
    assert all(0 <= float(value) <= 100 for _, value in printed)


def test_a_script_adds_a_backbone_and_a_forget_loss(tmp_path):
    text = next(text for text in PYTHON if "dtl.METHODS" in text)
    command = next(c for c in COMMANDS if "mine.py" in c)
    argv = [*shlex.split(command)[2:], *TINY, "--out", str(tmp_path / "out")]
    run_alone(f"import sys\nsys.argv[1:] = {argv!r}\n" + text, tmp_path)
    assert "| features" in (tmp_path / "out" / "report.md").read_text()


def arguments_of(command, folder):
    arguments = shlex.split(command)[2:]
    if arguments[0] == "data":
        return [*arguments, "--data-dir", folder / "none"]
    if "--help" in arguments:
        return arguments
    few = [] if "--methods" in arguments else ["--methods", "finetune"]
    return [*arguments, *TINY, *few, "--out", folder / "runs" / str(hash(command))]


@pytest.mark.parametrize("command", [c for c in COMMANDS if "mine.py" not in c])
def test_commands_are_understood(command, dtl_command, folder, monkeypatch):
    """Each with tiny steps; a GPU's where there is none, and CIFAR's without its files, up to their
    one line."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network
    monkeypatch.setattr(dtl, "accuracy", lambda model, task: 0.5)  # in place of thousands of images
    monkeypatch.setattr(dtl, "piggyback", lambda *a: 0.5)
    result = dtl_command(*arguments_of(command, folder))
    if result.code:
        expected = r"^Error: (--gpu \d|cannot download).*$"
        assert len(re.findall(expected, result.output, re.M)) == 1, result.output
        assert "--gpu" in command or "cifar" in command or "data" in command


def test_every_option_named_exists(monkeypatch):
    kept = []
    monkeypatch.setattr(dtl.Command, "main", lambda self, *args, **extra: kept.append(self))
    dtl.main([])
    known = {option for p in kept[0].params for option in p.opts if isinstance(p, click.Option)}
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.S | re.M))
    ours = [text for text in inline if text.startswith("--") or "dtl.py" in text] + COMMANDS
    ours = [text.split(".py")[-1] for text in ours]
    named = {option for text in ours for option in re.findall(r"(?:^|\s)(--[a-z-]+)", text)}
    assert named and named - known <= {"--help", "--version"}


def test_names_of_the_program_exist():
    """In capitals, or a function or class of dtl.py."""
    pattern = r"`([A-Z][A-Z_]{3,}|[a-z]+_[a-z_]+|Balance|Context)(?:\([^`]*\))?`"
    named = set(re.findall(pattern, README)) - {"SET"}
    assert named and not [name for name in named if not hasattr(dtl, name)]


def test_ci_runs_the_readmes_test_command():
    (command,) = (line for line in BASH.splitlines() if "-m pytest" in line)
    assert command in (ROOT / ".ci" / "run").read_text()


def cells(line):
    return [c.strip() for c in line.strip().strip("|").split("|")]


def rows_of(text):
    return [cells(line) for line in text.splitlines() if line.startswith("|") and "--" not in line]


@pytest.mark.parametrize("name", re.findall(r"<!-- rows (\S+) -->", README))
def test_figures_are_those_a_run_wrote(name):
    """The README's table is the target accuracy and two columns of the report's."""
    shown = rows_of(
        re.search(rf"<!-- rows {re.escape(name)} -->\n(.*?)<!-- end -->", README, re.S)[1]
    )
    report = rows_of((ROOT / name).read_text())
    wanted = ["model", "target %", "source-subset, fixed %", "source-subset, strongest %"]
    columns = [report[0].index(column) for column in wanted]
    written = [[row[k] for k in columns] for row in report]
    assert len(shown) > 5 and all(row in written for row in shown[1:])


@pytest.mark.parametrize("text", [README, dtl.__doc__], ids=["README", "docstring"])
def test_the_first_paragraphs_figures_are_those_a_run_wrote(text):
    paragraph = re.search(r"^(\*\*Does it work\?|From CIFAR).*?\n\n", text, re.S | re.M)[0]
    report = (ROOT / "experiments/front/report.md").read_text()
    means = {cell.split(" ")[0] for row in rows_of(report) for cell in row}
    figures = re.findall(r"\d+\.\d(?=%)", paragraph)
    assert len(figures) > 4 and set(figures) <= means


@pytest.mark.parametrize("folder", ["demo", "front"])
def test_a_published_table_is_that_of_its_records(folder):
    """Of the attackers that attacked every model."""
    folder = ROOT / "experiments" / folder
    shown, results = rows_of((folder / "report.md").read_text()), dtl.read_results(folder)
    models = [row[0] for row in shown[1:]]
    attackers = dict.fromkeys(re.findall(r"source-subset, (\w+) %", " ".join(shown[0])))
    attackers.pop("strongest")
    seeds, tasks = dict.fromkeys(key[0] for key in results), ["source-subset", "downstream"]
    numbers = dtl.collect(results, [*seeds], models, tasks, [*attackers])
    assert len(seeds) == 5 and rows_of("\n".join(dtl.table(numbers))) == shown
