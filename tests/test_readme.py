"""What the README says is so: its commands are understood, its Python runs, its figures are those a run wrote."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import dtl

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.S | re.M)
TINY = "--pretrain-steps 2 --transfer-steps 2 --dispose-steps 1 --fresh-steps 1 --attack-steps 1".split()
COMMANDS = sorted(set(re.findall(r"python dtl\.py [^`\n]*", README)))


def python_blocks():
    return [text for language, text in BLOCKS if language == "python"]


@pytest.mark.parametrize("text", python_blocks())
def test_python_blocks_run(text):
    exec(compile(text, "README.md", "exec"), {})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, tmp_path):
    """Each with tiny steps; a GPU's where there is none, and CIFAR's without its files, up to their one line."""
    arguments = shlex.split(command)[2:]
    name = arguments[0] if arguments else "--help"
    if name == "bench":
        arguments.append("--help")  # takes a minute; tests/test_cli.py runs it small
    if name == "audit" or name in dtl.STAGES:
        arguments += [*TINY, "--out", str(tmp_path / "runs"), "--data-dir", str(tmp_path / "none")]
        arguments += [] if "--methods" in arguments else ["--methods", "gc"]
    elif name == "data":
        arguments += ["--data-dir", str(tmp_path / "none")]
    elif name == "report":
        arguments += ["--out", str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    environment |= {"https_proxy": "http://127.0.0.1:9"}  # no network: the download ends in its one line
    done = subprocess.run([sys.executable, ROOT / "dtl.py", *arguments], text=True, capture_output=True, env=environment)
    assert "Traceback" not in done.stderr
    refused = "--gpu" in command or "cifar" in command or name == "data"
    if not refused:
        assert done.returncode == 0, done.stderr
    elif done.returncode:
        assert len(re.findall("^Error: ", done.stderr, re.M)) == 1


def test_help_of_every_option_named():
    known = {"--" + f.replace("_", "-") for f in dtl.Config.__dataclass_fields__}
    known |= {"--gpu", "--seeds", "--preset", "--methods", "--out", "--data-dir", "--native", "--save-every",
              "--budget", "--attacker-seeds"}
    text = re.sub(r"^```.*?^```", "", README, flags=re.S | re.M)
    assert set(re.findall(r"`(--[a-z-]+)", text)) - known - {"--extra-index-url", "--build-arg", "--user"} == set()


def test_ci_runs_the_readmes_test_command():
    command = next(text.strip() for _, text in BLOCKS if "-m pytest" in text)
    assert command in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("kind, name", re.findall(r"<!-- (table|text) (\S+) -->", README))
def test_figures_are_those_a_run_wrote(kind, name):
    shown = re.search(rf"<!-- {kind} {re.escape(name)} -->\n(.*?)<!-- end -->", README, re.S)[1].strip()
    written = (ROOT / name).read_text().strip()
    if name.endswith(".txt"):
        written = f"```\n{written}\n```"
    assert shown == written


@pytest.mark.parametrize("folder", sorted(p.parent.name for p in (ROOT / "experiments").glob("*/report.md")))
def test_reports_come_from_their_results(folder, tmp_path):
    """The committed table is what `dtl.py report` makes of the committed measurements."""
    for path in (ROOT / "experiments" / folder).iterdir():
        if path.suffix in (".json", ".jsonl"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert dtl.report(tmp_path, None, dtl.REPORTED) == (ROOT / "experiments" / folder / "report.md").read_text()


def test_the_evidence_in_the_docstring_is_that_of_the_report():
    found = re.findall(r"^    ([a-z-]+)((?: +[+-]?[\d.]+ \+- [\d.]+(?: %)?){5})$", dtl.__doc__, re.M)
    assert len(found) == len(dtl.METHODS) - 1  # all but finetune
    report = (ROOT / "experiments" / "cifar-small" / "report.md").read_text()
    for method, numbers in found:
        cells = re.search(rf"^\| disposed:{method} +\|(.*)\|$", report, re.M)[1].split("|")
        written = [cells[i].strip().replace("±", "+-") for i in (1, 3, 5, 7, 9)]  # change, then the leaks
        assert re.findall(r"[+-]?[\d.]+ \+- [\d.]+", numbers) == written, method


def test_dependencies_stand_in_two_places_alike():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    script = re.search(r"^# /// script\n(.*?)^# ///", (ROOT / "dtl.py").read_text(), re.S | re.M)[1]
    metadata = tomllib.loads(re.sub(r"^# ?", "", script, flags=re.M))
    assert metadata["dependencies"] == project["dependencies"]
    assert metadata["requires-python"] == project["requires-python"]
