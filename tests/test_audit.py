"""The audit: its attackers do what their fields say, it is kept, resumed, and summarised honestly."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dtl
import dtl_report

CPU = torch.device("cpu")
TINY = ("--pretrain-steps 4 --transfer-steps 3 --dispose-steps 2 --fresh-steps 2 --attack-steps 2 --batch-size 16 "
        "--methods uniform,gc-fresh --source shapes[0:4]@8 --target shapes[16:20]@5 --downstream shapes[24:28]@6 "
        "--subset-per-class 5").split()


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return dtl.load_task("shapes[0:4]@10", 0, tmp_path_factory.mktemp("data"), CPU)


@pytest.fixture
def backbone():
    return dtl.new_backbone("resnet8", 1, CPU)


SCHEDULE = dtl.Schedule(4, 0.05, 8, 5e-4, 5.0)


def attacked(monkeypatch, backbone, task, attacker):
    """What each phase of the attack trained on, and the backbone before and after it."""
    phases, fit = [], dtl.fit

    def spy(model, data, schedule, *args):
        before = copy.deepcopy(model.backbone)
        fit(model, data, schedule, *args)
        phases.append((before, copy.deepcopy(model.backbone), data, schedule))

    monkeypatch.setattr(dtl, "fit", spy)
    untouched = {k: v.clone() for k, v in backbone.state_dict().items()}
    result = dtl.attack(backbone, task, attacker, SCHEDULE, 7, dtl.Watch("test"))
    assert all(torch.equal(v, untouched[k]) for k, v in backbone.state_dict().items())  # the victim stays as it was
    assert all(0 <= a <= 1 for a in result)
    return phases


def changed(before, after):
    return any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))


def test_held_out_images_are_never_trained_on(monkeypatch, backbone, task):
    known, judged = dtl.hold_out(task, 1.0)
    assert len(known.y) == 32 and len(judged.y_test) == 8 and judged.y_test.bincount().tolist() == [2] * 4
    rows = {bytes(x.numpy()) for x in known.x}
    assert not rows & {bytes(x.numpy()) for x in judged.x_test}
    (_, _, data, _), = attacked(monkeypatch, backbone, task, dtl.Attacker())
    assert {bytes(x.numpy()) for x in data.x} == rows
    assert len(dtl.hold_out(task, 0.5)[0].y) == 16


def test_one_image_a_class_cannot_be_audited(task):
    first = torch.tensor([0, 10, 20, 30])
    with pytest.raises(dtl.DTLError, match="a fifth of each class"):
        dtl.hold_out(replace(task, x=task.x[first], y=task.y[first]), 1.0)


def test_scopes(monkeypatch, backbone, task):
    (before, after, _, _), = attacked(monkeypatch, backbone, task, dtl.Attacker(scope="head"))
    assert not changed(before, after)
    statistics = [n for n, b in after.named_buffers() if "running_mean" in n]
    assert all(not torch.equal(dict(before.named_buffers())[n], dict(after.named_buffers())[n]) for n in statistics)
    head, whole = attacked(monkeypatch, backbone, task, dtl.Attacker(scope="head-then-all"))
    assert not changed(*head[:2]) and changed(*whole[:2]) and head[3].steps == whole[3].steps == 2


def test_noise_is_added_before_training(monkeypatch, backbone, task):
    (plain, *_), = attacked(monkeypatch, backbone, task, dtl.Attacker())
    (noisy, *_), = attacked(monkeypatch, backbone, task, dtl.Attacker(noise=0.2))
    assert not changed(plain, backbone) and changed(noisy, backbone)
    a, b = (m.blocks[2].conv2.weight.detach() for m in (backbone, noisy))
    assert (b - a).std() / a.std() == pytest.approx(0.2, rel=0.05)


def test_other_half_is_probed_on_classes_it_was_not_trained_on(monkeypatch, backbone, task):
    whole, probe = attacked(monkeypatch, backbone, task, dtl.Attacker(other_half=True))
    assert set(whole[2].y.tolist()) == {0, 2} and set(probe[2].y.tolist()) == {1, 3}
    assert changed(*whole[:2]) and not changed(*probe[:2])


@pytest.mark.parametrize("attacker, optimizer, first", [
    (dtl.Attacker(), torch.optim.SGD, SCHEDULE.lr_at(0)),
    (dtl.Attacker("adamw"), torch.optim.AdamW, SCHEDULE.lr_at(0)),
    (dtl.Attacker(first_step=10.0), torch.optim.SGD, 10 * SCHEDULE.lr),
])
def test_optimiser_and_first_step(monkeypatch, backbone, task, attacker, optimizer, first):
    seen, step = [], optimizer.step
    monkeypatch.setattr(optimizer, "step", lambda self, *a: (seen.append(self.param_groups[0]["lr"]), step(self, *a))[1])
    attacked(monkeypatch, backbone, task, attacker)
    assert seen == pytest.approx([first, *(SCHEDULE.lr_at(s) for s in (1, 2, 3))])


def test_grids_have_no_attacker_twice_and_names_tell_them_apart():
    for grid, _ in dtl.AUDITS.values():
        assert len(set(grid)) == len(set(map(str, grid))) == len(grid)
        assert grid[0] == dtl.Attacker() and str(grid[0]) == "fixed"
    assert set(dtl.AUDITS["small"][0]) < set(dtl.AUDITS["full"][0])


def lines(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_audit_is_kept_and_resumed(dtl_command, tmp_path):
    arguments = ("audit", "--out", tmp_path, "--attacker-seeds", 2, *TINY)
    result = dtl_command(*arguments)
    assert result.code == 0, result.output
    records = [r for r in lines(tmp_path) if r["metric"] == "audit_pl_accuracy"]
    grid = dtl.AUDITS["small"][0]
    models = {"scratch", "random", "transferred", "disposed:uniform", "disposed:gc-fresh"}
    tried = {(r["model"], r["task"], r["attacker"]) for r in records if not r["attacker_seed"] and r["model"] != "oracle"}
    assert tried == {(m, t, str(a)) for m in models for t in dtl.PIGGYBACK_TASKS for a in grid}
    again = [r for r in records if r["attacker_seed"] == 1]
    assert len(again) == len({(r["model"], r["task"]) for r in records})  # the strongest alone has a second seed
    assert "PL worst" in result.output and result.output.index("PL worst") < result.output.index("PL fixed")

    kept = (tmp_path / "results.jsonl").read_text().splitlines()
    torn = kept[: len(kept) - 20]
    (tmp_path / "results.jsonl").write_text("\n".join(torn) + "\n" + kept[-20][:40])
    assert dtl_command(*arguments).code == 0
    strip = [{k: v for k, v in r.items() if k != "seconds"} for r in records]
    resumed = [{k: v for k, v in r.items() if k != "seconds"} for r in dtl.Results(tmp_path).read()
               if r["metric"] == "audit_pl_accuracy"]
    assert sorted(map(str, strip)) == sorted(map(str, resumed))


def test_another_config_takes_over_what_is_the_same(dtl_command, tmp_path):
    assert dtl_command("audit", "--out", tmp_path, *TINY).code == 0
    before = lines(tmp_path)
    assert dtl_command("audit", "--out", tmp_path, *TINY, "--forget-weights", "uniform=7").code == 0
    new = lines(tmp_path)[len(before):]
    measured = {str({k: v for k, v in r.items() if k != "config"}) for r in before}
    fresh = [r for r in new if str({k: v for k, v in r.items() if k != "config"}) not in measured]
    assert {r["model"] for r in fresh} == {"disposed:uniform"}
    assert {(r["model"], r["metric"]) for r in new} >= {("transferred", "audit_pl_accuracy"), ("transferred", "mean_cosine")}


def test_an_attempt_that_fails_is_kept_as_failed(dtl_command, tmp_path, monkeypatch):
    real = dtl.attack

    def sometimes(backbone, task, attacker, *args):
        if attacker.optimizer == "adamw":
            raise dtl.DTLError("step 3 is not finite")
        return real(backbone, task, attacker, *args)

    monkeypatch.setattr(dtl, "attack", sometimes)
    result = dtl_command("audit", "--out", tmp_path, *TINY)
    assert result.code == 0, result.output
    failed = [r for r in lines(tmp_path) if r.get("failed")]
    assert failed and all(r["value"] is None and r["attacker"].startswith("adamw") for r in failed)
    assert f"{len(failed)} attempts failed" in result.output


def test_a_mistake_outside_the_attack_is_no_failed_attempt(dtl_command, tmp_path, monkeypatch):
    """It stops the run and is not kept: the same command goes on from there."""
    attempted = dtl.Experiment.attempt

    def disk_full(self, *args):
        self.model = lambda name: (_ for _ in ()).throw(dtl.DTLError("cannot write: no space left"))
        return attempted(self, *args)

    monkeypatch.setattr(dtl.Experiment, "attempt", disk_full)
    result = dtl_command("audit", "--out", tmp_path, *TINY)
    assert result.code == 1 and "no space left" in result.output
    assert not [r for r in lines(tmp_path) if r["metric"] == "audit_pl_accuracy"]


@pytest.mark.parametrize("attacker", [dtl.Attacker(other_half=True), dtl.Attacker(scope="head-then-all")])
def test_what_was_noted_outlives_the_phases(backbone, task, attacker):
    watch = dtl.Watch("test")
    dtl.attack(backbone, task, attacker, SCHEDULE, 7, watch, trace=(0, 1))
    assert [note["step"] for note in watch.notes] == [0, 1] and all(0 <= note["accuracy"] <= 1 for note in watch.notes)


def attempt(model, value, valid, attacker="fixed", attacker_seed=0, seed=0, other_half=False, task="downstream"):
    return dict(seed=seed, model=model, metric="audit_pl_accuracy", task=task, value=value, valid=valid, config="x",
                attacker=attacker, attacker_seed=attacker_seed, fields={"other_half": other_half})


def test_the_strongest_is_chosen_on_held_out_images_not_on_test_images():
    records = [attempt("scratch", 0.9, 0.2), attempt("scratch", 0.3, 0.6, "long"), attempt("scratch", 0.5, 0.1, "long", 1),
               attempt("scratch", 0.99, 0.99, "probe", other_half=True), attempt("scratch", None, None, "broken")]
    assert dtl_report.worst_cases(records) == {(0, "scratch", "downstream"): (pytest.approx(0.4), "long")}


def test_the_choice_is_by_all_seeds_together():
    records = [attempt("scratch", 0.3, valid, name, seed=seed) for name, valids in (("a", (0.5, 0.1)), ("b", (0.4, 0.4)))
               for seed, valid in enumerate(valids)]
    assert {name for _, name in dtl_report.worst_cases(records).values()} == {"b"}


def test_a_tie_is_broken_alike_whatever_the_order():
    tied = [attempt("scratch", 0.3, 0.6, name) for name in ("fixed", "long")]
    assert dtl_report.worst_cases(tied) == dtl_report.worst_cases(tied[::-1])


def test_too_small_a_task_is_one_line(dtl_command, tmp_path):
    result = dtl_command("audit", "--out", tmp_path, *TINY, "--subset-per-class", 1)
    assert result.code == 1 and "a fifth of each class" in result.output and "Traceback" not in result.output


def test_an_unfinished_grid_is_told():
    fixed = [dict(seed=0, model=m, metric="pl_accuracy", task="downstream", value=0.5, config="x")
             for m in ("scratch", "transferred")]
    both = [attempt(m, 0.5, 0.5, a, task=t) for m in ("scratch", "transferred") for a in ("fixed", "long")
            for t in dtl.PIGGYBACK_TASKS]
    assert not any("NOT FINISHED" in line for line in dtl_report.audit_notes(fixed + both))
    assert any("NOT FINISHED" in line and "transferred" in line for line in dtl_report.audit_notes(fixed + both[:-1]))
    again = attempt("scratch", 0.5, 0.5, "long", 1)  # a second seed of the strongest for one model and task alone
    assert any("NOT FINISHED" in line and "scratch" in line for line in dtl_report.audit_notes([*fixed, *both, again]))


@pytest.mark.parametrize("given, message", [
    (["--budget", "huge"], "huge"),
    (["--attacker-seeds", "0"], "attacker-seeds"),
])
def test_bad_input(dtl_command, given, message):
    result = dtl_command("audit", *given)
    assert result.code == 2 and message in result.output and "Traceback" not in result.output


def test_figures_in_two_formats(dtl_command, tmp_path):
    pytest.importorskip("matplotlib")
    assert dtl_command("audit", "--out", tmp_path, *TINY).code == 0
    for name in ("front.png", "front.svg", "attack.png", "attack.svg"):
        assert (tmp_path / name).stat().st_size > 5000
    assert Path(tmp_path / "front.svg").read_text().startswith("<?xml")


def test_audit_of_a_users_own_data(dtl_command, npz, tmp_path):
    tasks = [f"--{task}={npz(f'{task}.npz')}" for task in ("source", "target", "downstream")]
    result = dtl_command("audit", "--out", tmp_path / "out", *TINY, *tasks)
    assert result.code == 0, result.output
    assert {r["task"] for r in lines(tmp_path / "out") if r["metric"] == "audit_pl_accuracy"} == set(dtl.PIGGYBACK_TASKS)
