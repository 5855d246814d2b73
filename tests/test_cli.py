"""The command line: what it writes, and that whatever is wrong is one line and a non-zero exit."""

import errno
import functools
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODELS

import dtl

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def assert_one_error(result, *named):
    """Exit code, one `Error:` line with all that is named in it, no traceback."""
    assert result.code not in (0, 130), result.output
    errors = [line for line in result.output.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1 and result.output.count("Error:") == 1, result.output
    assert "Traceback" not in result.output and len(errors[0]) < 1000
    for text in named:
        assert text in errors[0], errors[0]


# ---------------------------------------- bad input


@pytest.mark.parametrize(("given", "named"), [
    pytest.param(dict(gpu=0), "--gpu 0: this PyTorch", marks=no_cuda),
    (dict(gpu=777), "--gpu 777"),
    (dict(gpu=-1), "--gpu -1"),
    (dict(gpu="a"), "--gpu"),
    (dict(seeds="a"), "'a'"),
    (dict(seeds="0,0"), "'0,0'"),
    (dict(seeds="-1"), "'-1'"),
    (dict(seeds=""), "--seeds"),
    (dict(seeds="1" * 5000), "--seeds"),
    (dict(methods=["gc", "nosuch"]), "nosuch"),
    (dict(methods=["gc", "gc"]), "gc,gc"),
    (dict(attackers="nosuch"), "nosuch"),
    (dict(attackers="fixed,fixed"), "fixed,fixed"),
    (dict(attackers="huge"), "--attackers"),
    (dict(attacker_seeds=0), "--attacker-seeds"),
    (dict(attacker_seeds="x"), "--attacker-seeds"),
    (dict(weights="gc=nan"), "gc=nan"),
    (dict(weights="gc=inf"), "gc=inf"),
    (dict(weights="gc=-1"), "gc=-1"),
    (dict(weights="gc=1e308"), "gc=1e308"),
    (dict(weights="gc"), "'gc="),
    (dict(weights="nosuch=1"), "nosuch"),
    (dict(weights="finetune=1"), "finetune"),
    (dict(pretrain_steps=-1), "--pretrain-steps: -1"),
    (dict(pretrain_lr="1e308"), "--pretrain-lr"),
    (dict(transfer_lr="nan"), "--transfer-lr: nan"),
    (dict(fresh_lr="inf"), "--fresh-lr: inf"),
    (dict(batch_size="x"), "--batch-size"),
    (dict(batch_size=1), "--batch-size: 1"),
    (dict(chunks=1), "--chunks: 1"),
    (dict(chunks=1000000000000), "--chunks"),
    (dict(chunk_size=1), "--chunk-size: 1"),  # BatchNorm needs two images
    (dict(chunks=5, chunk_size=5), "--chunks 5"),  # 24 source images
    (dict(similarity="l2"), "--similarity"),
    (dict(network="vgg"), "--network"),
    (dict(augment="flip"), "--augment"),
    (dict(preset="nosuch"), "--preset"),
    (dict(source="shapes[0:99]"), "[0:99]"),
    (dict(source="shapes[0:99999999999]"), "--source"),
    (dict(target="nosuch.npz"), "nosuch.npz: no such file"),
    (dict(target="\udcff.npz"), "--target"),  # a path that is not UTF-8
    (dict(image_size=17), "--image-size 17"),
    (dict(subset_per_class=390), "--subset-per-class"),
    (dict(subset_per_class=9), "--subset-per-class"),  # of 8 in the source task
    (dict(oracle_per_class=999), "--oracle-per-class"),
    (dict(source="shapes[0:4:0]"), "[0:4:0]"),
    (dict(preset="own", source="a.npz"), "a.npz"),
])  # fmt: skip
def test_bad_option_is_one_line(given, named, arguments, dtl_command, tmp_path):
    assert_one_error(dtl_command(*arguments("all", tmp_path / "out", **given)), named)
    assert not (tmp_path / "out").exists()  # nothing is begun


def test_own_data_needs_all_three_tasks(npz, dtl_command, tmp_path):
    assert_one_error(dtl_command("all", "--source", npz(), "--out", tmp_path / "out"), "--target", "missing")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", dtl.STAGES)
def test_unwritable_out(stage, arguments, dtl_command, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert_one_error(
        dtl_command(*arguments(stage, tmp_path / "file" / "out")), "cannot write", str(tmp_path / "file")
    )


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_full_disk(function, arguments, dtl_command, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, full)
    result = dtl_command(*arguments("pretrain", tmp_path / "out", pretrain_steps=2))
    assert_one_error(result, "cannot write", os.strerror(errno.ENOSPC))
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".jsonl"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_full_disk_of_the_log(arguments, dtl_command, tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")  # which can be read from without an end, too
    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (1 << 30), before[1]))
    try:
        result = dtl_command(*arguments("pretrain", tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert_one_error(result, f"cannot write {tmp_path / 'log.jsonl'}", os.strerror(errno.ENOSPC))


def test_what_is_in_the_way_of_a_file_is_named(arguments, dtl_command, tmp_path):
    for name in ("results.jsonl", "log.jsonl", "checkpoints"):
        out = tmp_path / f"out-{name}"
        out.mkdir()
        (out / name).mkdir() if "json" in name else (out / name).write_bytes(b"")
        assert_one_error(dtl_command(*arguments("pretrain", out, pretrain_steps=1)), name)


# ---------------------------------------- losses that are NaN


def test_pretraining_that_diverges_stops(arguments, dtl_command, tmp_path, monkeypatch):
    monkeypatch.setattr(dtl, "normalise", lambda images: images.float() * torch.nan)
    assert_one_error(dtl_command(*arguments("pretrain", tmp_path)), "timing a step: step 0", "finite", "loss nan")
    monkeypatch.setattr(dtl.Run, "seconds_a_step", lambda run: 0.0)
    result = dtl_command(*arguments("pretrain", tmp_path))
    assert_one_error(result, "pretrained: step 0 of 6", "finite", "loss nan")
    assert not list(tmp_path.glob("checkpoints/*")) and not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize("method", ["uniform", "gc"])
def test_forget_loss_that_is_nan_stops_and_is_named(
    method, arguments, dtl_command, tmp_path, finished, monkeypatch
):
    """While the retain loss is still finite."""
    out = shutil.copytree(finished.out, tmp_path / "out")
    if method == "gc":
        monkeypatch.setattr(dtl, "gradient_collision_backward", lambda *a, **k: torch.tensor(torch.nan))
    else:
        nan = dtl.Method(lambda logits, *others: logits.sum() * torch.nan)
        monkeypatch.setitem(dtl.METHODS, method, nan)
    result = dtl_command(*arguments("dispose", out, methods=[method], dispose_steps=3))
    assert_one_error(result, f"disposed:{method}: step 0 of 3", "forget nan", "retain 0")
    assert len(list(out.glob("checkpoints/*"))) == len(list(finished.out.glob("checkpoints/*")))


def test_an_attack_that_diverges_stops_and_is_named(arguments, dtl_command, tmp_path, finished, monkeypatch):
    """It is not reported as a weak one."""
    out = shutil.copytree(finished.out, tmp_path / "out")
    monkeypatch.setattr(dtl, "augmented", lambda *a: torch.full((8, 3, 8, 8), torch.nan))
    monkeypatch.setattr(dtl.Run, "seconds_a_step", lambda run: 0.0)
    monkeypatch.setitem(dtl.ATTACKERS, "few", dtl.Attacker(lr=0.07))
    result = dtl_command(*arguments("all", out, attackers="few"))
    assert_one_error(result, "scratch", "few", "step 0 of 1", "finite")
    assert (out / "results.jsonl").read_bytes() == (finished.out / "results.jsonl").read_bytes()


# ---------------------------------------- the help


@pytest.mark.parametrize("stage", dtl.STAGES)
def test_help_lists_every_option_with_a_text(stage, dtl_command):
    """With the default of a bare run, in less than 60 lines of 110 columns."""
    text = dtl_command(stage, "--help", terminal_width=110).output
    assert len(text.splitlines()) < 60 and max(map(len, text.splitlines())) <= 110
    for f in fields(dtl.Config):
        line = re.search(rf"^  --{f.name.replace('_', '-')} +(\S.{{4}}.*(?:\n    +.*)*)$", text, re.M)
        default = str(dtl.PRESETS["demo"].get(f.name, f.default))
        assert line and f"[{default}]" in re.sub(r"\s+", "", line[1]), f.name
    for option in ("preset", "gpu", "seeds", "methods", "attackers", "attacker-seeds", "out", "data-dir"):
        assert re.search(rf"^  --{option} +\S.{{4}}", text, re.M), option
    for name in (*dtl.METHODS, *dtl.ATTACKERS):
        assert name in re.sub(r"\n +", "", text), name


def test_every_command_exists(dtl_command):
    text = dtl_command("--help").output
    assert [*dtl.STAGES] == ["all", "audit", "pretrain", "transfer", "dispose", "piggyback"]
    assert all(re.search(rf"^  {command} +\S", text, re.M) for command in (*dtl.STAGES, "data"))
    assert dtl.__version__ in dtl_command("--version").output


def test_the_data_command_says_what_it_found(dtl_command, tmp_path, monkeypatch):
    asked = []

    def read(name, folder):
        asked.append((name, folder))
        return np.zeros((5, 3, 2, 2), np.uint8), np.zeros(5), np.zeros((2, 3, 2, 2), np.uint8), np.zeros(2)

    monkeypatch.setattr(dtl, "read_archive", read)
    result = dtl_command("data", "--data-dir", tmp_path)
    assert result.code == 0 and asked == [(name, tmp_path) for name in ("cifar10", "cifar100")]
    for name in ("cifar10", "cifar100"):
        assert re.search(rf"^{name}: 5 .*2 test images in {tmp_path}", result.output, re.M)

    monkeypatch.setattr(dtl, "read_archive", lambda *a: (_ for _ in ()).throw(dtl.DTLError("no\nsuch thing")))
    assert_one_error(dtl_command("data", "--data-dir", tmp_path), "no such thing")


# ---------------------------------------- what is written

def test_results_have_the_promised_fields(finished):
    found = [json.loads(line) for line in (finished.out / "results.jsonl").read_text().splitlines()]
    assert len({r["config"] for r in found}) == 1 and f"config {found[0]['config']}" in finished.output
    for record in found:
        assert {"seed", "model", "metric", "task", "value", "config", "key", "digest", "revision"} <= set(
            record
        )
        assert record["seed"] == 0 and 0 <= record["value"] <= 1
        images = 300 if "source" in f"{record['metric']} {record['task']}" else 200
        assert round(record["value"] * images, 6) % 1 == 0  # a share of so many test images
    attacks = [r for r in found if r["metric"] == "pl_accuracy"]
    assert {(r["model"], r["task"], r["attacker"], r["attacker_seed"]) for r in attacks} == {
        (m, t, a, s)
        for m in MODELS
        for t in ("source-subset", "downstream")
        for a in ("fixed", "long")
        for s in (0, 1)
    }
    assert all(-1 <= r["mean_cosine"] <= 1 for r in attacks) and len({r["mean_cosine"] for r in attacks}) > 20
    others = {(r["model"], r["metric"]) for r in found if r["metric"] != "pl_accuracy"}
    assert others >= {(m, "target_accuracy") for m in set(MODELS) - {"random"}} | {
        ("pretrained", "source_accuracy")
    }
    assert len(found) == len({r["key"] for r in found}) == len(attacks) + len(others)


def test_log_and_header(finished, tiny):
    """Everything configured, the versions, the sizes of the data; then a line of the log a stage and look."""
    log = [json.loads(line) for line in (finished.out / "log.jsonl").read_text().splitlines()]
    (settings,) = [row["settings"] for row in log if "settings" in row]
    assert tiny.items() <= settings.items() and set(settings) == {f.name for f in fields(dtl.Config)}
    header = finished.output[: finished.output.index("seed 0 pretrained")]
    for text in (
        "python dtl.py ",
        torch.__version__,
        np.__version__,
        "CPU, 1 threads",
        "native routine: ",
        "seeds",
        "shapes[16:18]@4",
        "8 training, 200 test images, 2 classes, 8x8",
        "oracle",
        "crop,flip",
        "revision ",
    ):
        assert text in header, text
    stages, minutes = re.search(r"\n(\d+) stages to come, about (\d+) min\n", header).groups()
    assert int(stages) == len({row["stage"] for row in log if row.get("steps")}) and int(minutes) < 5
    stages = {row["stage"]: row for row in log if "stage" in row}
    assert {"step", "steps", "seconds", "loss", "gradient"} <= stages["seed 0 pretrained"].keys()
    assert {"retain", "forget", "mean_cosine", "collision_rate"} <= stages["seed 0 disposed:gc"].keys()
    assert {"distill", "retain", "forget"} <= stages["seed 0 disposed:gc-fresh"].keys()
    assert len([name for name in stages if "fixed" in name and "downstream" in name]) >= len(MODELS)


def test_report_is_the_table_that_was_printed(finished):
    text = (finished.out / "report.md").read_text()
    assert text.strip() in finished.output
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    for model in MODELS:
        assert rows.count(model.removeprefix("disposed:")) == 4, model  # two tables a task, of two attackers
    assert "In words: gc " in text and "source-subset" in text and "downstream" in text


def test_settings_in_one_folder_never_mix(arguments, dtl_command, records, tmp_path):
    """The report has what its command asked for."""
    for rate in (0.1, 0.2):
        assert dtl_command(*arguments("all", tmp_path, methods=["finetune"], fresh_lr=rate)).code == 0
    first, second = (
        records(tmp_path, config=dtl.Config(**settings(arguments, fresh_lr=rate)).digest())
        for rate in (0.1, 0.2)
    )
    assert {r["model"] for r in second} == {"scratch", "oracle"}  # the rest was there
    assert {r["model"] for r in first} == {
        "pretrained",
        "transferred",
        "scratch",
        "random",
        "oracle",
        "disposed:finetune",
    }
    value = next(r["value"] for r in second if r["model"] == "scratch" and r["metric"] == "target_accuracy")
    assert re.search(rf"^\| scratch +\| {100 * value:.1f}", (tmp_path / "report.md").read_text(), re.M)


def settings(arguments, **given):
    """The Config of a tiny experiment on the demo's preset."""
    flags = dict(zip(arguments("all", "x")[1::2], arguments("all", "x")[2::2]))
    known = {f.name: f.type for f in fields(dtl.Config)}
    named = {k.strip("-").replace("-", "_"): v for k, v in flags.items()}
    return dtl.PRESETS["demo"] | {k: known[k](v) for k, v in named.items() if k in known} | given


def test_audit_is_all_with_the_small_set_of_attackers(arguments, dtl_command, records, trained, tmp_path):
    given = dict(methods=["finetune"], attack_steps=1)
    audit = dtl_command(*arguments("audit", tmp_path, **given))
    assert audit.code == 0, audit.output
    before, stages = (tmp_path / "results.jsonl").read_bytes(), trained(tmp_path)
    report = (tmp_path / "report.md").read_text().split("\n`python")[0]
    assert {r["attacker"] for r in records(tmp_path, metric="pl_accuracy")} == {*dtl.SMALL}
    again = dtl_command(*arguments("all", tmp_path, attackers="small", **given))
    assert (
        again.code == 0
        and (tmp_path / "results.jsonl").read_bytes() == before
        and trained(tmp_path) == stages
    )
    assert (tmp_path / "report.md").read_text().split("\n`python")[0] == report
    assert len(report.splitlines()) > 30 and "worst PL" in report


def test_a_stage_makes_what_it_needs_and_no_more(arguments, dtl_command, trained, records, tmp_path):
    short = dict(pretrain_steps=2, transfer_steps=2, dispose_steps=2, attack_steps=1, methods=["finetune"])
    made = []
    for stage in ("pretrain", "transfer", "dispose", "piggyback"):
        assert dtl_command(*arguments(stage, tmp_path, **short)).code == 0
        made.append([name.removeprefix("seed 0 ") for name in trained(tmp_path)][len(sum(made, [])) :])
    assert made[:3] == [["pretrained"], ["transferred"], ["disposed:finetune"]]
    assert len(made[3]) == 4 and all(
        name.split()[0] in ("transferred", "disposed:finetune") for name in made[3]
    )
    assert {r["metric"] for r in records(tmp_path)} == {"source_accuracy", "target_accuracy", "pl_accuracy"}


def test_piggyback_alone_does_not_blame_the_target_images_for_a_missing_oracle(
    arguments, dtl_command, tmp_path
):
    """There is none since that command makes no references."""
    short = dict(pretrain_steps=1, transfer_steps=1, dispose_steps=1, attack_steps=1, methods=["finetune"])
    text = dtl_command(*arguments("piggyback", tmp_path, **short)).output
    assert "no leak" in text and "all target images are in use" not in text


# ---------------------------------------- one's own data


@pytest.fixture
def own(npz):
    """The three options of a user's own tasks."""
    return [part for task in ("source", "target", "downstream") for part in (f"--{task}", npz(f"{task}.npz"))]


SHORT = (
    "--transfer-steps 1 --dispose-steps 1 --fresh-steps 1 --attack-steps 1 --methods finetune "
    "--subset-per-class 5 --chunk-size 8 --chunks 2 --pretrain-steps 2"
).split()


def test_own_data_chooses_its_preset_and_its_steps(own, dtl_command, tmp_path, monkeypatch):
    """Nothing is flipped or cropped unasked; steps are epochs of the data, with a floor."""
    seen = []
    monkeypatch.setattr(dtl, "augmented", lambda images, how, generator: (seen.append(how), images)[1])
    result = dtl_command("all", *own, "--out", tmp_path / "out", *SHORT)
    assert result.code == 0, result.output
    header = result.output[: result.output.index("seed 0 pretrained")]
    assert "preset own" in header and re.search(r"^  augment +none$", header, re.M) and set(seen) == {"none"}
    assert "30 training, 12 test images, 3 classes, 8x8" in header
    assert "no leak" in result.output and "no oracle" in result.output and "b.npz@20" in result.output
    assert result.output.count("there is no oracle") == 1  # not for each task


def test_own_data_leaves_an_oracle_where_the_target_is_a_part(npz, own, dtl_command, tmp_path):
    own[3] = f"{own[3]}@6"
    result = dtl_command("all", *own, "--out", tmp_path / "out", *SHORT)
    assert result.code == 0, result.output
    assert re.search(r"^\| oracle +\|", result.output, re.M) and "there is no oracle" not in result.output


@pytest.mark.parametrize("images", [40, 4000])
def test_steps_of_zero_follow_the_data(new_run, npz, images):
    y = np.repeat(np.arange(4), images // 4)
    x = np.random.default_rng(0).integers(0, 256, (images, 8, 8, 3), dtype=np.uint8)
    path = npz(x_train=x, y_train=y, x_test=x[:4], y_test=np.arange(4))
    zero = dict.fromkeys(
        ("pretrain_steps", "transfer_steps", "dispose_steps", "fresh_steps", "attack_steps"), 0
    )
    tasks = dict(source=str(path), target=str(path), downstream=str(path), subset_per_class=images // 4)
    found = new_run(**zero, **tasks, batch_size=10, oracle_per_class=0).config
    least = new_run(**zero, batch_size=8, subset_per_class=4).config
    for name in zero:
        floor, steps = getattr(least, name), getattr(found, name)
        assert floor >= 100 and (steps == floor if images == 40 else steps > floor), name
        assert images == 40 or steps % (images // 10) == 0  # whole epochs
    kept = new_run(**zero | dict(pretrain_steps=7)).config
    assert kept.pretrain_steps == 7 and kept.transfer_steps == least.transfer_steps


# ---------------------------------------- the bare program


def test_ctrl_c_says_what_was_saved(arguments, root, tmp_path):
    command = arguments("pretrain", tmp_path, pretrain_steps=1_000_000)
    program = f"import dtl; dtl.SAVE_EVERY, dtl.FETCH = 0.1, 1; dtl.main({command!r})"
    process = subprocess.Popen(  # SIG_DFL: a test run in the background of a shell would have it ignored
        [sys.executable, "-c", program], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root,
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        end = time.monotonic() + 60
        while (
            not list(tmp_path.glob("checkpoints/*.part.pt"))
            and process.poll() is None
            and time.monotonic() < end
        ):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    said = re.search(
        r"interrupted: seed 0 pretrained was at step (\d+) of 1000000, saved up\s+to step (\d+)", errors
    )
    (part,) = tmp_path.glob("checkpoints/*.part.pt")
    assert said and "Traceback" not in errors
    key = part.name.split("-")[-1].split(".")[0]
    assert int(said[1]) >= int(said[2]) == dtl.load(part, key, torch.device("cpu"))["step"]


@pytest.mark.slow
def test_the_file_alone_runs_on_a_bare_machine(root, tmp_path):
    """dtl.py copied into an empty folder; no git, no compiler, no cffi, no matplotlib."""
    alone, site = tmp_path / "alone", tmp_path / "site"
    alone.mkdir()
    site.mkdir()
    shutil.copy(root / "dtl.py", alone)
    (site / "sitecustomize.py").write_text(
        "import sys\nfor name in ('cffi', '_cffi_backend', 'matplotlib', '_gc_native_ext'):\n"
        "    sys.modules[name] = None\n"
    )
    short = "--pretrain-steps 3 --transfer-steps 2 --dispose-steps 2 --fresh-steps 2 --attack-steps 1"
    environment = {"PATH": str(tmp_path / "nothing"), "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1",
                   "HOME": str(tmp_path)}  # fmt: skip
    small = ["--source", "shapes[0:4]@16", "--target", "shapes[16:18]@4", "--downstream", "shapes[24:26]@4",
             "--oracle-per-class", "6", "--subset-per-class", "6", "--chunk-size", "16"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "dtl.py", "all", *short.split(), "--image-size", "8", *small],
        cwd=alone,
        text=True,
        capture_output=True,
        env=environment,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "native routine: not built" in done.stdout and "revision unknown" in done.stdout
    for row in (*dtl.REFERENCES, *dtl.TOY_METHODS):
        assert len(re.findall(rf"^\| {row} +\|", done.stdout, re.M)) == 2, row
    assert "In words: gc " in done.stdout and "wrote runs/report.md" in done.stdout
    found = sorted(p.name for p in (alone / "runs").iterdir())
    assert found == ["checkpoints", "log.jsonl", "report.md", "results.jsonl"]
    assert {p.name for p in alone.iterdir()} <= {"dtl.py", "runs", "__pycache__"}


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_a_line_of_progress_fits_a_terminal_and_is_cleared_before_another(terminal, monkeypatch, capsys):
    """80 columns; where there is no terminal, whole lines among the others."""
    monkeypatch.setattr("sys.stderr", stream := Stream(terminal))
    progress = dtl.Progress(quiet=False)
    progress.costs = [10.0, 30.0]
    progress.begin("seed 0 disposed:gradient-norm-fresh pl_accuracy source-subset rescaled", 10.0)
    progress.began, progress.printed = progress.began - 60, float("-inf")
    progress.at(5, 10)
    progress.say("told")
    line = "stage 1 of 2, about 7 min left: seed 0 disposed:gradient-norm-fresh pl_accuracy source-subset rescaled"
    out, err = capsys.readouterr().out, stream.getvalue()
    if terminal:
        assert out == "told\n" and err == f"\r{line[:78]}\033[K\r\033[K"
    else:
        assert out == f"{line}, step 5 of 10\ntold\n" and not err
