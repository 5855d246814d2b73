"""The command line: what it writes, and that whatever is wrong is one line and a non-zero exit."""

import errno
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest
import torch

import dtl

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def assert_one_error(result, *named):
    """Exit code, one `Error:` line with all that is named in it, no traceback."""
    assert result.code not in (0, 130), result.output
    errors = [line for line in result.output.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1 and result.output.count("Error:") == 1, result.output
    assert "Traceback" not in result.output
    for text in named:
        assert text in errors[0], errors[0]


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(("given", "named"), [
    pytest.param(dict(gpu=0), "--gpu 0: this PyTorch", marks=no_cuda),
    (dict(gpu=7), "--gpu 7"),
    (dict(gpu="a"), "--gpu"),
    (dict(seeds="a"), "'a'"),
    (dict(seeds="0,0"), "'0,0'"),
    (dict(seeds="-1"), "'-1'"),
    (dict(seeds=""), "--seeds"),
    (dict(methods=["gc", "nosuch"]), "'nosuch'"),
    (dict(forget_weights="gc=nan"), "'gc=nan'"),
    (dict(forget_weights="gc=inf"), "'gc=inf'"),
    (dict(forget_weights="gc=-1"), "'gc=-1'"),
    (dict(forget_weights="gc"), "'gc'"),
    (dict(forget_weights="nosuch=1"), "'nosuch'"),
    (dict(forget_weights="finetune=1"), "'finetune'"),
    (dict(pretrain_steps=-1), "--pretrain-steps: -1"),
    (dict(attack_steps=0), "--attack-steps: 0"),
    (dict(batch_size="x"), "--batch-size"),
    (dict(chunks=1), "--chunks: 1"),
    (dict(clip="nan"), "--clip: nan"),
    (dict(temperature="inf"), "--temperature: inf"),
    (dict(similarity="l2"), "--similarity"),
    (dict(network="vgg"), "--network"),
    (dict(preset="nosuch"), "--preset"),
    (dict(source="shapes[0:99]"), "shapes[0:99]"),
    (dict(target="nosuch.npz"), "nosuch.npz: no such file"),
    (dict(image_size=17), "--image-size 17"),
    (dict(clip=0), "--clip: 0.0 must be above 0"),
    (dict(temperature=0), "--temperature: 0.0 must be above 0"),
    (dict(gc_ramp=1.5), "--gc-ramp: 1.5 must be at most 1"),
    (dict(subset_per_class=390), "--subset-per-class: 390"),
    (dict(source="shapes[0:4:0]"), "neither a slice"),
])  # fmt: skip
def test_bad_option_is_one_line(given, named, arguments, dtl_command, tmp_path):
    assert_one_error(dtl_command(*arguments("all", tmp_path / "out", **given)), named)
    assert not (tmp_path / "out").exists()  # nothing is begun


@pytest.mark.parametrize("stage", dtl.STAGES)
def test_unwritable_out(stage, arguments, dtl_command, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert_one_error(dtl_command(*arguments(stage, tmp_path / "file" / "out")), "cannot write", str(tmp_path / "file"))


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_full_disk(function, arguments, dtl_command, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, full)
    result = dtl_command(*arguments("pretrain", tmp_path / "out"))
    assert_one_error(result, "cannot write", os.strerror(errno.ENOSPC))
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".jsonl"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_full_disk_of_the_log(arguments, dtl_command, tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    result = dtl_command(*arguments("pretrain", tmp_path))
    assert_one_error(result, f"cannot write {tmp_path / 'log.jsonl'}", os.strerror(errno.ENOSPC))


def test_report_of_nothing(dtl_command, tmp_path):
    for out in (tmp_path, tmp_path / "absent"):
        assert_one_error(dtl_command("report", "--out", out), f"--out {out}: no run")


# -------------------------------------------------------------------------------------------------- losses that are NaN


def test_pretraining_that_diverges_stops(arguments, dtl_command, tmp_path):
    result = dtl_command(*arguments("pretrain", tmp_path, pretrain_lr=1e38))
    assert_one_error(result, "pretrained: step 1 of 6", "finite", "loss nan")
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.parametrize("method", dtl.METHODS)
def test_disposal_that_diverges_stops(method, arguments, dtl_command, tmp_path, finished):
    out = shutil.copytree(finished.out, tmp_path / "out")
    given = dict(dispose_lr=1e38, fresh_lr=1e38, methods=[method])
    result = dtl_command(*arguments("dispose", out, **given))
    assert_one_error(result, f"disposed:{method}: step 1 of 4", "finite", "retain nan")


@pytest.mark.parametrize("method", ["uniform", "gc"])
def test_forget_loss_that_is_nan_stops_and_is_named(method, arguments, dtl_command, tmp_path, finished, monkeypatch):
    """While the retain loss is still finite."""
    out = shutil.copytree(finished.out, tmp_path / "out")
    if method == "gc":
        monkeypatch.setattr(dtl, "gradient_collision_backward", lambda *a, **k: float("nan"))
    else:
        nan = dtl.Method(lambda logits, *others: logits.sum() * torch.nan)
        monkeypatch.setitem(dtl.METHODS, method, nan)
    result = dtl_command(*arguments("dispose", out, methods=[method], dispose_steps=3))
    assert_one_error(result, f"disposed:{method}: step 0 of 3", "forget nan", "retain 0")


# ------------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("stage", dtl.STAGES)
def test_help_lists_every_field(stage, dtl_command):
    text = dtl_command(stage, "--help").output
    for f in fields(dtl.Config):
        assert re.search(rf"^  --{f.name.replace('_', '-')} ", text, re.M), f.name
    for option in ("preset", "gpu", "seeds", "methods", "out", "data-dir"):
        assert re.search(rf"^  --{option} ", text, re.M), option


def test_help_of_the_program(dtl_command):
    text = dtl_command("--help").output
    assert all(re.search(rf"^  {command} ", text, re.M) for command in (*dtl.STAGES, "report", "data", "bench"))


def test_results_have_the_promised_fields(finished, records):
    found = [json.loads(r) for r in records(finished.out)]
    (run,) = [json.loads(p.read_text()) for p in finished.out.glob("run-*.json")]
    models = {"scratch", "random", "oracle", "pretrained", "transferred", "disposed:uniform", "disposed:gc",
              "disposed:gc-fresh"}  # fmt: skip
    accuracies = [r for r in found if r["metric"].endswith("_accuracy")]
    for record in found:
        assert {"seed", "model", "metric", "task", "value", "config"} <= set(record)
        assert record["seed"] == 0 and record["config"] == run["config_hash"]
    for record in accuracies:
        assert record["model"] in models and 0 <= record["value"] <= 1
        assert round(record["value"] * 400, 6) % 1 == 0  # a share of 400 test images
    measured = {(r["model"], r["metric"], r["task"]) for r in accuracies}
    assert len(measured) == len(accuracies)
    attacked = {(m, "pl_accuracy", t) for m in models for t in ("source-subset", "downstream")}
    targeted = {(m, "target_accuracy", None) for m in models - {"random", "pretrained"}}
    with_head = {(m, "source_accuracy", None) for m in models if m.startswith("disposed") or m in
                 ("pretrained", "transferred")}  # fmt: skip
    assert measured >= attacked | targeted | with_head


def test_run_record_and_header(finished, tiny):
    (run,) = [json.loads(p.read_text()) for p in finished.out.glob("run-*.json")]
    assert tiny.items() <= run["settings"].items() and set(run["settings"]) == {f.name for f in fields(dtl.Config)}
    assert {"python", "torch", "numpy", "device"} <= set(run["versions"]) and run["revision"]
    assert {len(v) for v in run["data"]["0"].values()} == {64} and set(run["data"]["0"]) >= {"source", "target"}
    header = finished.output[: finished.output.index("pretrained ")]
    for text in (run["config_hash"], run["revision"], run["versions"]["torch"], "CPU", "native routine: ", "seeds [0]",
                 "shapes[16:20]@4", "16 training, 400 test images, 4 classes, 8x8"):  # fmt: skip
        assert text in header, text


def test_report_is_the_table_that_was_printed(finished, dtl_command, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "out")
    (out / "report.md").unlink()
    text = dtl_command("report", "--out", out).output
    assert (out / "report.md").read_text().strip() == text.strip()
    assert text.strip() in finished.output
    rows = {line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")}
    assert rows >= {*dtl.REFERENCES, "disposed:uniform", "disposed:gc", "disposed:gc-fresh"}


def test_configs_in_one_folder_never_mix(arguments, dtl_command, tmp_path):
    for seed, rate in ((3, 0.1), (5, 0.2)):
        assert dtl_command(*arguments("pretrain", tmp_path, seeds=seed, pretrain_lr=rate)).code == 0
    runs = sorted((json.loads(p.read_text()) for p in tmp_path.glob("run-*.json")), key=lambda r: r["started"])
    first, second = (r["config_hash"] for r in runs)
    last, chosen, other = (dtl_command("report", "--out", tmp_path, *config).output
                           for config in ((), ("--config", first), ("--config", second)))  # fmt: skip
    assert last == other and second in last and first not in last and "Seeds 5;" in last
    assert first in chosen and second not in chosen and "Seeds 3;" in chosen
    assert_one_error(dtl_command("report", "--out", tmp_path, "--config", "nosuch"), "nosuch", first, second)


def test_corrupt_checkpoint_is_named_and_made_anew(finished, arguments, dtl_command, records, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "out")
    (out / "results.jsonl").unlink()
    (damaged,) = (out / "checkpoints").glob("transferred-seed0-*.pt")
    before = damaged.read_bytes()
    damaged.write_bytes(before[:-100])
    result = dtl_command(*arguments("all", out))
    assert result.code == 0 and f"warning: checkpoint {damaged} is damaged" in result.output
    assert result.output.count("warning:") == 1
    assert records(out) == records(finished.out) and damaged.read_bytes() == before


def test_ctrl_c_says_what_was_saved(arguments, root, tmp_path):
    command = arguments("pretrain", tmp_path, pretrain_steps=1_000_000, save_every=0.1)
    process = subprocess.Popen(  # SIG_DFL: a test run in the background of a shell would have it ignored
        [sys.executable, str(root / "dtl.py"), *command], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        end = time.monotonic() + 60
        while not list(tmp_path.glob("checkpoints/*.part.pt")) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    said = re.search(r"interrupted: seed 0 pretrained was at step (\d+) of 1000000, saved up to step (\d+)", errors)
    (part,) = tmp_path.glob("checkpoints/*.part.pt")
    assert said and "Traceback" not in errors
    assert int(said[1]) >= int(said[2]) == dtl.load(part, torch.device("cpu"))["step"]
