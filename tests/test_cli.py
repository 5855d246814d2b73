"""The command line: what it writes, and that whatever is wrong is one line and a non-zero exit."""

import errno
import itertools
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from conftest import MODELS, TINY, TINY_METHODS

import dtl

STAGES = ("all", "pretrain", "transfer", "dispose", "piggyback")


def assert_one_error(result, *named):
    """Exit code, one `Error:` line with all that is named in it, no traceback."""
    assert result.code in (1, 2), result.output
    errors = [line for line in result.output.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1, result.output
    assert "Traceback" not in result.output and len(errors[0]) < 1000
    for text in named:
        assert text in errors[0], errors[0]


# ---- Bad input ----


@pytest.fixture
def run(arguments, dtl_command):
    """run(STAGE, OUT, **settings): a tiny experiment's command, here."""
    return lambda *where, **given: dtl_command(*arguments(*where, **given))


BAD = {  # what is told names the option, or the value
    "gpu": [777, -1, *([] if torch.cuda.is_available() else [0])],
    "seeds": ["a", "0,", "0 1", "-1", "", "1" * 5000],
    "methods": ["gc,nosuch", "", "finetune@1", "gc@", "gc@-1", "gc@nan"]
    + ["gc@0", "gc@0.00000001", "gc@1000000", "gc@1@2", "@1", "distill-fresh@1", "gc@" + "9" * 400],
    "attackers": ["nosuch", "fixed,", ""],
    "preset": ["nosuch"],
    "source": ["", "shapes[0:99]", "shapes[0:4:0]", "shapes[0:99999999999]", "nosuch"],
    "target": ["nosuch.npz", "\udcff.npz"],  # one whose name is no text
    "oracle-per-class": [999],
    "subset-per-class": [0],
    "image-size": [17],
    "network": ["vgg"],
    "augment": ["flip"],
    "similarity": ["l2"],
    "batch-size": [1, "x"],  # BatchNorm needs two images
    "chunks": [1, 10**12],
    "chunk-size": [1],
    "pretrain-steps": [-1],
    "pretrain-lr": ["1e308"],
    "transfer-lr": ["nan"],
    "fresh-lr": ["inf"],
    "allowance": [0],
}


@pytest.mark.parametrize(("option", "value"), [(o, v) for o, vs in BAD.items() for v in vs])
def test_a_bad_option_is_one_line(option, value, tmp_path, run):
    given = {option.replace("-", "_"): value.split(",") if option == "methods" else value}
    result = run("all", tmp_path / "out", **given)
    named = [f"--{option}", repr(value), f"Error: {value}:", f"@{value}:"]
    assert_one_error(result)
    assert any(text in result.output for text in named) or value == "\udcff.npz"
    assert not (tmp_path / "out").exists()  # nothing is begun


def test_own_data_needs_two_tasks(npz, dtl_command, tmp_path):
    result = dtl_command("all", "--source", npz(), "--out", tmp_path / "out")
    assert_one_error(result, "own data needs two tasks")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_unwritable_out(stage, tmp_path, run):
    (tmp_path / "file").write_bytes(b"")
    result = run(stage, tmp_path / "file" / "out")
    assert_one_error(result, str(tmp_path / "file"), os.strerror(errno.ENOTDIR))


@pytest.mark.parametrize("at", ["write", "replace"])
def test_a_full_disk(at, tmp_path, monkeypatch, run):
    """In the midst of the model's file, by a limit on the size of files, and at its end: nothing
    half-written is left."""

    def full(old, new):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    if at == "replace":
        monkeypatch.setattr(os, "replace", full)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if at == "write" else 10**9, before[1]))
    try:
        result = run("pretrain", tmp_path / "out", pretrain_steps=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_one_error(result, os.strerror(errno.EFBIG))
    left = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert left <= {"log.jsonl", "config.json"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_of_the_log(tmp_path, run):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    result = run("pretrain", tmp_path)
    assert_one_error(result, "seed 0 pretrained", os.strerror(errno.ENOSPC))
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize(
    "name", ["config.json", "results.jsonl", "log.jsonl", "seed0", "seed0/pretrained.pt"]
)
def test_what_is_in_the_way_of_a_file_is_named(name, tmp_path, run):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"") if name == "seed0" else path.mkdir()
    assert_one_error(run("pretrain", tmp_path), str(path))


# ---- Losses that are not finite ----


def test_pretraining_that_diverges_stops(arguments, dtl_command, tmp_path, monkeypatch):
    monkeypatch.setitem(dtl.BACKBONES, "plain", lambda: torch.nn.Flatten())  # nothing bounds it
    plain = arguments("pretrain", tmp_path, network="plain", pretrain_lr=1000, pretrain_steps=2000)
    monkeypatch.setattr(dtl, "CLIP", 1e30)
    monkeypatch.setattr(dtl, "WEIGHT_DECAY", 1.0)
    assert_one_error(dtl_command(*plain), "seed 0 pretrained: ", "not finite", "loss")
    assert not list(tmp_path.glob("seed0/*")) and not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize("method", ["uniform", "gc"])
def test_a_forget_loss_that_is_nan_is_named(method, tmp_path, finished, monkeypatch, run):
    """While the retain loss is still finite."""
    out = shutil.copytree(finished.out, tmp_path / "out")
    (out / f"seed0/{method}.pt").unlink()
    monkeypatch.setattr(dtl, "LOOK_EVERY", 1)
    monkeypatch.setitem(dtl.METHODS, method, lambda c: c.student.backbone(c.x).sum() * torch.nan)
    result = run("dispose", out, methods=[method])
    assert_one_error(result, f"seed 0 {method}: ", "not finite", "retain': 0.", "forget': nan")
    assert not list(out.glob(f"seed0/{method}.*"))


def test_an_attack_that_diverges_is_named(tmp_path, finished, monkeypatch, run):
    """It is not reported as a weak one."""
    out = shutil.copytree(finished.out, tmp_path / "out")
    monkeypatch.setattr(dtl, "augmented", lambda *a: torch.full((8, 3, 8, 8), torch.nan))
    result = run("all", out, attackers="rescaled")
    assert_one_error(result, "seed 0 scratch, rescaled attacker on source-subset", "not finite")
    assert (out / "results.jsonl").read_bytes() == (finished.out / "results.jsonl").read_bytes()


# ---- The help, and which preset ----


@pytest.mark.parametrize("preset", [None, *dtl.PRESETS])
def test_the_help_has_each_option_and_the_presets_values(preset, dtl_command):
    """In the order of Config. Without --preset, a bare run's."""
    given = ["--preset", preset] if preset else []
    text = dtl_command("all", *given, "--help", terminal_width=200).output
    found = re.findall(r"^  --([a-z-]+) *((?:.|\n {10,})*)$", text, re.M)
    others = ["preset", "gpu", "seeds", "methods", "attackers", "out", "data-dir"]
    settings = [f.name.replace("_", "-") for f in fields(dtl.Config)]
    assert [name for name, _ in found] == [*others, *settings, "version", "help"]
    for f in fields(dtl.Config):
        told = dict(found)[f.name.replace("_", "-")]
        value = dtl.PRESETS[preset or "demo"].get(f.name, f.default)
        shown = re.search(r"\[default: (.*?)(; .*)?\]$", told)
        assert f.metadata["doc"] in told, f.name
        if value not in ("", False):
            assert shown and shown[1] == str(value), f.name
    for name in (*dtl.METHODS, *dtl.ATTACKERS):
        assert name in text, name


def test_every_command_exists(dtl_command):
    text = dtl_command("--help").output
    assert all(command in text for command in (*STAGES, "data"))
    assert dtl.__version__ in dtl_command("--version").output


@pytest.mark.parametrize(
    ("given", "preset"),
    [
        ([], "demo"),
        (["--gpu", "0"], "cifar"),
        (["--gpu=0", "--seeds", "0,1"], "cifar"),
        (["--source", "my.npz[0:5]"], "own"),
        (["--gpu", "0", "--target", "my.npz"], "own"),
        (["--gpu", "0", "--preset", "demo"], "demo"),
        (["--preset=cifar"], "cifar"),
    ],
)
def test_the_preset_follows_the_arguments(given, preset, dtl_command):
    text = " ".join(dtl_command("all", *given, "--help").output.split())
    assert all(name in text for name in dtl.PRESETS)
    steps = dtl.PRESETS[preset].get("fresh_steps", 5000)
    assert re.search(rf"METHOD-fresh \[default: {steps};", text)


def test_the_folder_is_the_presets_by_default(arguments, dtl_command, tmp_path, monkeypatch):
    bare = arguments("pretrain", "OUT", pretrain_steps=1)
    del bare[bare.index("--out") : bare.index("--out") + 2]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DTL_OUT", raising=False)
    assert dtl_command(*bare).code == 0 and (tmp_path / "runs/demo/seed0/pretrained.pt").exists()
    monkeypatch.setenv("DTL_OUT", str(tmp_path / "elsewhere"))
    assert dtl_command(*bare, "--preset", "cifar").code == 0
    assert (tmp_path / "elsewhere/cifar/seed0/pretrained.pt").exists()


def test_the_data_command_reads_both_sets(dtl_command, tmp_path, monkeypatch):
    asked = []

    def read(name, data_dir):
        asked.append((name, data_dir))
        return np.zeros((5, 3, 2, 2)), np.zeros(5), np.zeros((2, 3, 2, 2)), np.zeros(2)

    monkeypatch.setattr(dtl, "read_cifar", read)
    result = dtl_command("data", "--data-dir", tmp_path)
    assert result.code == 0 and asked == [(name, tmp_path) for name in ("cifar-10", "cifar-100")]
    assert f"{tmp_path}: cifar-10, cifar-100" in result.output


# ---- What is written ----


def test_a_folder_is_what_is_promised(finished, records):
    found = records(finished.out)
    keys = {(r["model"], r["metric"], r["task"], r["attacker"]) for r in found}
    accuracies = {("pretrained", "source_accuracy", None, None)}
    accuracies |= {(m, "target_accuracy", None, None) for m in MODELS}
    places = [(t, a) for t in ("source-subset", "downstream") for a in ("fixed", "long")]
    assert keys == accuracies | {(m, "pl_accuracy", *place) for m in MODELS for place in places}
    assert len(found) == len(keys) and {r["seed"] for r in found} == {0}
    for record in found:
        assert set(record) == {*dtl.RESULT, "value"} and 0 <= record["value"] <= 1
        images = 300 if "source" in f"{record['metric']} {record['task']}" else 200
        assert round(record["value"] * images, 6) % 1 == 0
    files = {str(path.relative_to(finished.out)) for path in finished.out.rglob("*.*")}
    assert files == {
        *("config.json", "results.jsonl", "log.jsonl", "report.md", "seed0/pretrained.pt"),
        *(f"seed0/{model}.pt" for model in MODELS),
    }
    settings = json.loads((finished.out / "config.json").read_text())["settings"]
    assert settings.items() >= TINY.items()


def test_the_head_and_the_log(finished):
    """Everything about the run, then a line of the log a stage and look."""
    head = finished.output[: finished.output.index("seed 0 pretrained")]
    texts = ["python ", f"dtl.py {dtl.__version__}", torch.__version__, np.__version__]
    for text in (*texts, "1 threads", "C routine ", "nothing is there yet"):
        assert text in head, text
    log = [json.loads(line) for line in (finished.out / "log.jsonl").read_text().splitlines()]
    stages = {row["stage"]: row for row in log if row.get("step")}
    assert len(stages) == 1 + len(MODELS) * 5
    assert stages["seed 0 pretrained"].keys() >= {"step", "steps", "seconds", "loss", "gradient"}
    for method in TINY_METHODS:
        terms = {"retain", "forget", "strength", "gc_dot", "gc_cos", "squared_norm"}
        assert stages[f"seed 0 {method}"].keys() >= terms
        assert re.search(rf"^seed 0 {method}: .*gc_cos -?0\.\d", finished.output, re.M)
    assert re.search(r"^seed 0 gc, long attacker on downstream: pl_accuracy", finished.output, re.M)


def test_a_stage_makes_what_it_needs_and_no_more(trained, records, tmp_path, run):
    made, before = [], 0
    for stage in ("pretrain", "transfer", "dispose", "piggyback"):
        result = run(stage, tmp_path, methods=["finetune"])
        assert result.code == 0 and ("report.md" in result.output) == (stage == "piggyback")
        names = [name.removeprefix("seed 0 ") for name in trained(tmp_path)]
        made, before = [*made, names[before:]], len(names)
    assert made[:3] == [["pretrained"], ["transferred"], ["finetune"]]
    attacked = [f"{m}, fixed attacker on" for m in ("transferred", "finetune") for _ in range(2)]
    assert [name.rpartition(" ")[0] for name in made[3]] == attacked
    assert len(records(tmp_path, metric="target_accuracy")) == 2
    assert "oracle" not in (tmp_path / "report.md").read_text().split("points;")[1]


# ---- One's own data ----

ZERO = [f"--{stage}-steps" for stage in ("transfer", "dispose", "fresh", "attack", "pretrain")]


@pytest.fixture
def own(npz):
    """The options of a user's own tasks, of different images, few steps each."""
    given, images = (
        [],
        np.arange(126, dtype=np.uint8)[:, None, None, None] + np.zeros((8, 8, 3), int),
    )
    for task, x in zip(
        ("source", "target", "downstream"), images.astype(np.uint8).reshape(3, 42, 8, 8, 3)
    ):
        given += [f"--{task}", npz(f"{task}.npz", x_train=x[:30], x_test=x[30:])]
    given += [part for steps in ZERO for part in (steps, 1)]
    return [*given, "--methods", "finetune", "--chunk-size", 8, "--subset-per-class", 5]


@pytest.mark.parametrize("per_class", ["", "@6"])
def test_own_data_is_not_mirrored_unasked(per_class, own, dtl_command, tmp_path, monkeypatch):
    """And leaves images for an oracle where the target is a part of them. Two tasks are enough."""
    seen = []
    monkeypatch.setattr(dtl, "augmented", lambda images, how, _: (seen.append(how), images)[1])
    own[3] = f"{own[3]}{per_class}"
    del own[4 : 6 if per_class else 4]  # --downstream
    result = dtl_command("all", *own, "--out", tmp_path / "out")
    assert result.code == 0 and seen and not any("flip" in how for how in seen), result.output
    assert ("| oracle " in result.output) == bool(per_class)
    assert ("| downstream, fixed %" in result.output) != bool(per_class)
    assert (tmp_path / "out/seed0/oracle.pt").exists() == bool(per_class)


# ---- The bare program ----


def alone(folder, *command, **environment):
    """Runs a script in `folder`, which has a copy of dtl.py."""
    if not (folder / "dtl.py").exists():
        shutil.copy(dtl.__file__, folder)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "DTL"))}
    how = dict(cwd=folder, text=True, capture_output=True, encoding="latin-1")
    environment = kept | dict(OMP_NUM_THREADS="1") | environment
    return subprocess.run([sys.executable, *map(str, command)], env=environment, **how)


def test_importing_it_does_nothing(tmp_path):
    program = """
import sys, torch
before = torch.get_rng_state(), torch.get_num_threads()
torch.cuda.init = torch.cuda._lazy_init = None
sys.argv = ["x", "--nonsense"]
import dtl
assert torch.equal(before[0], torch.get_rng_state()) and before[1] == torch.get_num_threads()
assert not dtl.LOG.handlers and "matplotlib" not in sys.modules
assert not torch.backends.cudnn.deterministic and torch.is_grad_enabled()
"""
    done = alone(tmp_path, "-B", "-c", program)
    assert done.returncode == 0 and not done.stdout + done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["dtl.py"]


def test_the_file_alone_runs_on_a_bare_machine(arguments, tmp_path):
    """dtl.py copied into an empty folder; no git, no compiler, no cffi, a terminal without ±."""
    site, folder = tmp_path / "site", tmp_path / "alone"
    site.mkdir()
    folder.mkdir()
    names = ("cffi", "_cffi_backend", "matplotlib", "_gc_native_ext")
    (site / "sitecustomize.py").write_text(f"import sys\nsys.modules |= dict.fromkeys({names})\n")
    command = arguments("all", "OUT", seeds="0,1")
    for option in ("--out", "--methods"):
        del command[command.index(option) : command.index(option) + 2]
    bare = dict(PATH=str(tmp_path / "nothing"), PYTHONPATH=str(site), HOME=str(tmp_path))
    done = alone(folder, "dtl.py", *command, PYTHONIOENCODING="koi8-r", **bare)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "C routine not built" in done.stdout
    for row in (*dtl.REFERENCES, "finetune", "uniform", "gc", "gc-fresh"):
        found = re.findall(rf"^\| {row} +\| \d+\.\d \? \d+\.\d", done.stdout, re.M)
        assert len(found) == 1, row
    assert "- gc changes target accuracy" in done.stdout
    assert "wrote runs/demo/report.md" in done.stdout
    files = {path.name for path in (folder / "runs/demo").iterdir()}
    assert files == {"config.json", "seed0", "seed1", "log.jsonl", "report.md", "results.jsonl"}
    assert {path.name for path in folder.iterdir()} <= {"dtl.py", "runs", "__pycache__"}


def test_a_folder_whose_name_is_no_text(own, tmp_path):
    out = tmp_path / os.fsdecode(b"\xff\xfe")
    command = [sys.executable, dtl.__file__, *map(str, ["all", *own, "--out", out])]
    done = subprocess.run(command, capture_output=True, check=True)
    table = [line for line in (out / "report.md").read_bytes().splitlines() if line[:1] == b"|"]
    assert len(table) == 5 and table[2] in done.stdout and b"/report.md, " in done.stdout


HARMLESS = ("2>/dev/full >/dev/null", "2>&- >/dev/null", ">&-")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("redirection", [">/dev/full", "| head -1", *HARMLESS])
def test_streams_that_take_nothing(redirection, own, tmp_path):
    """A non-zero code and one line where what is printed is lost; no half-written measurement."""
    command = shlex.join(map(str, [sys.executable, dtl.__file__, "pretrain", *own]))
    command, kept = f"{command} --out {tmp_path / 'out'} {redirection}", os.environ.copy()
    kept.pop("PYTHONUNBUFFERED", None)
    done = subprocess.run(["sh", "-c", command], env=kept, capture_output=True, text=True)
    said, results = done.stdout + done.stderr, tmp_path / "out" / "results.jsonl"
    assert "Traceback" not in said and said.count("Error: output:") <= 1, said
    if redirection in HARMLESS:
        assert done.returncode == 0 and "Error" not in said and results.exists(), said
    if redirection == ">/dev/full":
        assert done.returncode and "Error: output: No space left on device" in said
    assert not results.exists() or results.read_bytes().endswith(b"\n")


OWN = """
import numpy as np, torch, dtl
from torch import nn

def noise(data_dir):
    rng = np.random.default_rng(0)
    sets = (rng.integers(0, 256, (n, 3, 8, 8), dtype=np.uint8) for n in (60, 20))
    return [part for x in sets for part in (x, np.arange(len(x)) % 6)]

def probe(backbone, task, config, seed):
    model = dtl.with_new_head(backbone.requires_grad_(False), task, config, seed)
    return dtl.fit(model, task, [0.1] * 2, config, seed)

dtl.DATASETS["noise"] = noise
dtl.BACKBONES["linear"] = lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
dtl.METHODS["shrink"] = lambda context: context.student.backbone(context.x).square().mean()
dtl.ATTACKERS["probe"] = probe
dtl.main()
"""


def test_a_script_adds_its_own_to_every_table(arguments, tmp_path, trained):
    """From the command line; of a later change of it, or of dtl.py, one line warns."""
    (tmp_path / "own.py").write_text(OWN)
    tasks = dict(source="noise[0:2]", target="noise[2:4]@4", downstream="noise[4:6]@4")
    own = dict(methods=["shrink", "shrink@2", "gc"], network="linear", attackers="fixed,probe")
    command = arguments("all", "out", seeds="0,1", **tasks, **own)
    done = alone(tmp_path, "own.py", *command, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and not done.stderr, done.stderr
    text = (tmp_path / "out/report.md").read_text()
    number = r"\d+\.\d ± \d+\.\d"
    for row in ("transferred", "shrink", "shrink@2", "gc"):
        assert re.search(rf"^\| {row} +(\| {number} +){{7}}\|$", text, re.M), row
    assert "downstream, probe %" in text and "- shrink@2 changes" in text
    before = trained(tmp_path / "out")
    for name in ("own.py", "dtl.py"):
        with (tmp_path / name).open("a") as file:
            file.write("# a comment\n")
    done = alone(tmp_path, "own.py", *command)
    assert done.returncode == 0 and trained(tmp_path / "out") == before
    assert re.fullmatch(r"warning: .*(own\.py.*dtl|dtl\.py.*own)\.py.*\n", done.stderr), done.stderr


def test_ctrl_c_loses_no_more_than_its_stage(run, trained, tmp_path, monkeypatch):
    calls, batch = itertools.count(), dtl.batch

    def interrupted(*args):
        if next(calls) == 8:  # pretraining takes six
            raise KeyboardInterrupt
        return batch(*args)

    monkeypatch.setattr(dtl, "batch", interrupted)
    result = run("transfer", tmp_path)
    assert result.code == 1 and result.output.endswith("Aborted!\n")
    assert [path.name for path in (tmp_path / "seed0").iterdir()] == ["pretrained.pt"]
    assert run("transfer", tmp_path).code == 0
    assert trained(tmp_path) == ["seed 0 pretrained", "seed 0 transferred"]
