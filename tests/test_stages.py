"""The stages, the rivals and the references: what they change, keep and never touch."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import dtl
import dtl_report

CPU = torch.device("cpu")


def tensors(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Source and target task, a transferred model and the source head, all tiny and untrained."""
    source, target = (dtl.load_task(name, 0, tmp_path_factory.mktemp("data"), CPU)
                      for name in ("shapes[0:5]@8", "shapes[16:20]@6"))
    heads = [dtl.new_head(64, classes, torch.Generator().manual_seed(classes)) for classes in (5, 4)]
    return source, target, dtl.Model(dtl.new_backbone("resnet8", 1, CPU), heads[1]).eval(), heads[0]


def schedule(steps=3, lr=0.02):
    return dtl.Schedule(steps, lr, batch_size=8, weight_decay=5e-4, clip=5.0)


def dispose(world, method, steps=3, **options):
    source, target, transferred, head = world
    options = dict(network="resnet8", forget_weight=1.0, chunks=2, chunk_size=8) | options
    return dtl.dispose(transferred, head, source, target, method, schedule(steps), 7, dtl.Watch("test"), **options)


@pytest.mark.parametrize("method", dtl.METHODS)
def test_disposal_leaves_its_arguments_alone_and_is_reproducible(world, method):
    before = [tensors(world[2]), tensors(world[3])]
    first, second = dispose(world, method), dispose(world, method)
    assert same(before[0], tensors(world[2])) and same(before[1], tensors(world[3]))
    assert same(tensors(first), tensors(second)) and not same(tensors(first), before[0])
    assert not first.training


@pytest.mark.parametrize("method", dtl.METHODS)
def test_batchnorm_statistics_come_from_target_images_alone(world, method, monkeypatch):
    """The running statistics are those of a model that sees each target batch once, source images or not."""
    updates = []
    original = F.batch_norm

    def spy(x, mean, var, *args, **kwargs):
        if mean is not None and (args[2] if len(args) > 2 else kwargs["training"]):
            updates.append(len(x))
        return original(x, mean, var, *args, **kwargs)

    monkeypatch.setattr(F, "batch_norm", spy)
    student = dispose(world, method, chunk_size=7)  # source batches of 14, target batches of 8
    assert set(updates) == {8}
    assert student.backbone.stem[1].num_batches_tracked == 3 + (
        0 if dtl.METHODS[method].fresh else world[2].backbone.stem[1].num_batches_tracked)


def test_fresh_methods_do_not_start_from_the_transferred_weights(world):
    source, target, transferred, head = world
    options = dict(network="resnet8", forget_weight=1.0, chunks=2, chunk_size=8)
    near, far = (dtl.dispose(transferred, head, source, target, m, schedule(1, 0.0), 7, dtl.Watch("t"), **options)
                 for m in ("gc", "gc-fresh"))
    assert torch.equal(near.backbone.stem[0].weight, transferred.backbone.stem[0].weight)
    assert not torch.equal(far.backbone.stem[0].weight, transferred.backbone.stem[0].weight)


@pytest.mark.parametrize("method", [m for m, entry in dtl.METHODS.items() if entry.forget is not None])
def test_the_forget_weight_matters(world, method):
    assert not same(tensors(dispose(world, method)), tensors(dispose(world, method, forget_weight=0.0)))


@pytest.mark.parametrize("option", (dict(similarity="cos"), dict(gc_head="source"), dict(chunks=4), dict(retain="ce")))
def test_every_reading_matters(world, option):
    assert not same(tensors(dispose(world, "gc")), tensors(dispose(world, "gc", **option)))


def test_gc_disposal_makes_gradients_collide(world):
    """With GC alone (no retain loss), the mean inner product of the source gradients falls."""
    source, target, transferred, head = world
    watch = dtl.Watch("test")
    student = dtl.dispose(transferred, head, source, target, "gc", schedule(25, 0.05), 3, watch, network="resnet8",
                          retain_weight=0.0, forget_weight=10.0, chunks=2, chunk_size=20)
    x, y = dtl.normalise(source.x), source.y
    heads = [dtl.new_head(64, 5, torch.Generator().manual_seed(i)) for i in range(5)]
    values = [sum(dtl.chunk_statistics(dtl.Model(m.backbone, h).train(), x, y, 2)["mean_dot"] for h in heads)
              for m in (transferred, student)]
    assert values[1] < 0.5 * values[0]


LOGITS = torch.tensor([[8.0, 0, 0], [0, 8, 0], [0, 0, 0]])
LABELS = torch.tensor([0, 0, 1])


def forget(function, logits=LOGITS, other=None):
    logits = logits.clone().requires_grad_()
    other = torch.zeros_like(logits) if other is None else other
    loss = function(logits, LABELS, lambda: other, lambda: other, torch.Generator().manual_seed(0))
    return loss, torch.autograd.grad(loss, logits)[0]


def test_negative_gradient_is_bounded():
    loss, gradient = forget(dtl.negative_gradient)
    assert loss.item() >= -math.log(3) - 1e-6
    assert gradient[0].abs().max() > 0  # still right about this image
    assert gradient[1].abs().max() == 0  # wrong beyond guessing already: no push


def test_scrub_is_bounded_and_pushes_away_from_the_transferred_model():
    loss, gradient = forget(dtl.scrub, other=torch.tensor([[9.0, 0, 0], [0, 0, 80.0], [0, 0, 0]]))
    assert loss.item() >= -math.log(3)
    assert gradient[0, 0] > 0 and gradient[1].abs().max() == 0


def test_uniform_labels_is_least_at_uniform():
    loss, gradient = forget(dtl.uniform_labels, torch.zeros(3, 3))
    assert loss.item() == pytest.approx(0, abs=1e-6) and gradient.abs().max() < 1e-6
    assert forget(dtl.uniform_labels)[0] > 1


def test_bad_teacher_is_least_at_the_teacher():
    assert forget(dtl.bad_teacher, other=LOGITS)[0].item() == pytest.approx(0, abs=1e-6)
    assert forget(dtl.bad_teacher)[0] > 0.1


def test_random_labels_ignores_the_labels():
    loss = forget(dtl.random_labels)[0]
    other = dtl.random_labels(LOGITS, 2 - LABELS, None, None, torch.Generator().manual_seed(0))
    assert loss.item() == other.item()


def test_distillation_is_kl_times_temperature_squared():
    student, teacher = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)), torch.arange(20.0).view(4, 5)
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    assert dtl.distillation(student, teacher, 3.0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_piggyback_leaves_the_victim_alone_and_attacks_all_alike(world):
    source, _, transferred, _ = world
    before = tensors(transferred)
    values = [dtl.piggyback(transferred.backbone, source, schedule(), 5, dtl.Watch("test")) for _ in range(2)]
    assert same(before, tensors(transferred)) and values[0] == values[1] and 0 <= values[0] <= 1


def test_running_statistics_kept_restores_itself_after_an_error(world):
    model = copy.deepcopy(world[2]).train()
    before = tensors(model)
    with pytest.raises(ZeroDivisionError), dtl.running_statistics_kept(model):
        model(torch.randn(4, 3, 16, 16))
        raise ZeroDivisionError
    assert same(before, tensors(model))
    model(torch.randn(4, 3, 16, 16))
    assert not same(before, tensors(model))


def test_running_statistics_kept_twice_over_and_for_any_batchnorm():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3, track_running_stats=False))
    with dtl.running_statistics_kept(model):
        with dtl.running_statistics_kept(model):
            pass
        model(torch.randn(4, 3) + 5)
    assert not model[0].running_mean.any() and [m.track_running_stats for m in model] == [True, False]
    model(torch.randn(4, 3) + 5)
    assert model[0].running_mean.all()


def test_learning_rate_rises_then_falls_to_nearly_zero():
    rates = [dtl.Schedule(100, 0.1, 8, 0.0, 5.0).lr_at(step) for step in range(100)]
    assert max(rates) <= 0.1 and rates.index(max(rates)) in range(23, 27) and rates[0] < 0.01 and rates[-1] < 1e-4


def test_interval_is_student_t():
    mean, half = dtl_report.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(dtl_report.interval([5.0])[1])


def record(seed, model, metric, value, task=None):
    return dict(seed=seed, model=model, metric=metric, task=task, value=value, config="x")


def test_normalised_leak_and_its_zero():
    records = [record(s, "transferred", "target_accuracy", 0.5) for s in (0, 1)]
    records += [record(s, m, "pl_accuracy", v, t) for s in (0, 1) for t in dtl.PIGGYBACK_TASKS
                for m, v in (("transferred", 0.5), ("scratch", 0.1), ("disposed:gc", 0.2))]
    records += [record(s, "disposed:gc", "target_accuracy", 0.48) for s in (0, 1)]
    rows = dtl_report.summarise(records, dtl.REPORTED)
    assert rows["disposed:gc"]["fixed leak downstream"] == pytest.approx([0.25, 0.25])  # zero: scratch
    assert rows["disposed:gc"]["change"] == pytest.approx([-0.02, -0.02])
    oracle = [record(s, "oracle", "pl_accuracy", 0.2, t) for s in (0, 1) for t in dtl.PIGGYBACK_TASKS]
    rows = dtl_report.summarise(records + oracle, dtl.REPORTED)
    assert rows["disposed:gc"]["fixed leak downstream"] == pytest.approx([0, 0], abs=1e-12)
    assert dtl_report.zero_of(records + oracle) == "oracle" and dtl_report.zero_of(records + oracle[:2]) == "scratch"


def test_weight_of_gc_rises(world, monkeypatch):
    weights, collide = [], dtl.gradient_collision
    monkeypatch.setattr(dtl, "gradient_collision", lambda *a: (weights.append(a[-1]), collide(*a))[1])
    monkeypatch.setitem(dtl.METHODS, "gc-fresh", dtl.Method(dtl.gradient_collision, fresh=True))
    dispose(world, "gc-fresh", forget_weight=8.0, gc_ramp=0.5, steps=4)
    assert weights == [4.0, 8.0, 8.0, 8.0]
