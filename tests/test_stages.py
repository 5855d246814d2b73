"""Networks, settings, the training loop, the stages, methods and attackers: what they learn, use,
change, keep and never touch. And a run: which stage gets what, and what lies in its folder."""

import copy
import itertools
import math
import re
from dataclasses import fields, replace
from types import SimpleNamespace

import click
import pytest
import torch
import torch.nn.functional as F
from conftest import TASKS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dtl

STEPS = dict(pretrain_steps=3, transfer_steps=3, dispose_steps=3, fresh_steps=3, attack_steps=3)
CONFIG = dtl.Config(network="resnet8", batch_size=8, chunks=2, chunk_size=8, **STEPS)
FORGET = [name for name, forget in dtl.METHODS.items() if forget]


def filters(module):
    return [p for p in module.parameters() if p.dim() == 4]


def tensors(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a, b):
    a, b = (m if isinstance(m, dict) else m.state_dict() for m in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def striped(angles, count, seed):
    """A task that is easy to learn: each class has stripes of an angle, images have noise."""
    generator, at = torch.Generator().manual_seed(seed), torch.arange(8) / 8 * 2 * math.pi

    def images(count):
        y = torch.arange(len(angles)).repeat_interleave(count)
        angle, phase = torch.tensor(angles)[y], torch.rand(len(y), generator=generator)
        across, down = angle.sin()[:, None, None] * at, angle.cos()[:, None, None] * at[:, None]
        stripes = torch.sin((across + down) * 1.5 + phase[:, None, None] * 2 * math.pi)
        noise = torch.randn(len(y), 3, 8, 8, generator=generator)
        return (127 + 80 * stripes[:, None] + 30 * noise).clamp(0, 255).byte(), y

    return dtl.Task(*images(count), *images(50), len(angles))


@pytest.fixture(scope="module")
def world():
    """Source, target, pretrained and transferred, all tiny and untrained. The tasks have no test
    images: whoever looks at them fails."""

    def model(seed, classes):
        head = dtl.new_head(64, classes, torch.Generator().manual_seed(seed))
        return dtl.Model(dtl.new_backbone("resnet8", seed, "cpu"), head).eval()

    tasks = striped(range(5), 8, 1), striped([0.5, 1.5, 2.5, 3.5], 6, 2)
    source, target = (replace(task, x_test=None, y_test=None) for task in tasks)
    models = dict(pretrained=model(1, 5), transferred=model(2, 4))
    return SimpleNamespace(source=source, target=target, config=CONFIG, **models)


@pytest.fixture(scope="module")
def learned():
    """The same, of fewer classes, really trained."""
    source, target = striped([0.0, 0.8, 1.6, 2.4], 60, 1), striped([0.4, 1.2], 16, 2)
    steps = dict(pretrain_steps=40, transfer_steps=20, dispose_steps=25, fresh_steps=40)
    more = dict(transfer_lr=0.05, attack_steps=10, batch_size=16, chunk_size=16, augment="crop")
    config = replace(CONFIG, **steps, **more)
    models = dict(pretrained=dtl.pretrain(source, config, 1))
    models["transferred"] = dtl.transfer(models["pretrained"], target, config, 2)
    return SimpleNamespace(source=source, target=target, config=config, **models)


def dispose(world, method, seed=7, **settings):
    of = (world.pretrained, world.transferred, world.source, world.target)
    return dtl.dispose(*of, method, replace(world.config, **settings), seed)


def spy(monkeypatch, owner, name, note=lambda *args, **how: args):
    """Before every call of owner.NAME, note(*args, **how) is kept; returns the list of what was."""
    seen, original = [], getattr(owner, name)

    def call(*args, **how):
        seen.append(note(*args, **how))
        return original(*args, **how)

    monkeypatch.setattr(owner, name, call)
    return seen


@pytest.fixture
def untrained(monkeypatch):
    """Nothing is trained: a stage gives what it starts from. Keeps what train is called with."""
    seen = []
    monkeypatch.setattr(dtl, "train", lambda *args: seen.append(args))
    return seen


@pytest.fixture
def logged(caplog):
    """logged(name) -> the values of that name, in order."""
    return lambda name: [r.msg[name] for r in caplog.records if r.name == "dtl" and name in r.msg]


# ---------------------------------------- networks


def foreign():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


NETWORKS = [  # the side of what the stem and each block give; weights, of ResNet-18 as published
    ("resnet8", [16, 16, 8, 4], 77392),
    ("resnet18", [16, 16, 16, 8, 8, 4, 4, 2, 2], 11168832),
]


@pytest.mark.parametrize(("network", "sides", "weights"), NETWORKS)
def test_networks_are_residual_and_halve_the_image_at_each_stage(network, sides, weights):
    before, found = torch.get_rng_state(), []
    backbone, again, other = (dtl.new_backbone(network, seed, "cpu").eval() for seed in (3, 3, 4))
    assert same(backbone, again) and torch.equal(before, torch.get_rng_state())
    assert not any(torch.equal(p, q) for p, q in zip(filters(backbone), filters(other)))
    assert sum(p.numel() for p in backbone.parameters()) == weights
    norm = next(m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d))
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):  # what is left is the stem, then plain shortcuts
            nn.init.constant_(module.weight, float(module is norm))
        if isinstance(module, dtl.Block):
            module.register_forward_hook(lambda block, given, maps: found.append((*given, maps)))
    answers = backbone(torch.rand(2, 3, 16, 16))
    assert [found[0][0].shape[-1], *(after.shape[-1] for _, after in found)] == sides
    assert answers.shape == found[-1][1].shape[:2]
    for before, after in found:
        assert after.equal(before) if after.shape == before.shape else not after.any()


def test_a_head_is_drawn_as_that_of_nn_linear():
    news = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    made, again, other = (dtl.new_head(400, 500, generator) for generator in news)
    assert same(made, again) and not same(made, other)
    levels = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
    for mine, theirs in zip(made.parameters(), nn.Linear(400, 500).parameters()):
        assert mine.requires_grad and mine.shape == theirs.shape and mine.abs().max() <= 0.05
        mine, theirs = (p.detach().flatten()[:10000].quantile(levels) for p in (mine, theirs))
        assert torch.allclose(mine, theirs, atol=0.01)


def test_a_backbone_that_a_script_adds_is_one_of_the_networks(world, monkeypatch):
    with pytest.raises(dtl.DTLError, match="'small'.*resnet18"):
        dtl.new_backbone("small", 0, "cpu")
    monkeypatch.setitem(dtl.BACKBONES, "small", foreign)
    config = replace(CONFIG, network="small")
    assert dtl.pretrain(world.source, config, 1).head.weight.shape == (5, 6)
    monkeypatch.setitem(dtl.BACKBONES, "small", lambda: nn.Conv2d(3, 6, 3))
    with pytest.raises(dtl.DTLError, match=r"\(B, features\), not \(2, 6, 6, 6\)"):
        dtl.pretrain(world.source, config, 1)


def test_accuracy_is_the_share_of_test_images_that_are_right():
    """Of as many images at a time as have half a million pixels, or one."""
    x_test = torch.arange(7, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    y_test = torch.tensor([0, 1, 2, 3, 4, 5, 5]).repeat(100)
    task, sizes = dtl.Task(None, None, x_test.repeat(100, 1, 1, 1), y_test, 7), []

    class Reader(nn.Module):  # its answer is what the pixels say
        def forward(self, x):
            assert not self.training and not torch.is_grad_enabled()
            sizes.append(len(x))
            return F.one_hot((x[:, 0, 0, 0] * 63.75 + 127.5).round().long(), 7).float()

    for side, size in ((2, 700), (64, 128), (1000, 1)):
        sizes.clear()
        images = task.x_test[:, :, :1, :1].expand(-1, -1, side, side)
        images = images if side < 1000 else images[:7]
        answers = replace(task, x_test=images, y_test=y_test[: len(images)])
        assert dtl.accuracy(Reader(), answers) == pytest.approx(6 / 7)
        assert sizes[0] == max(sizes) == size and sum(sizes) == len(images)


# ---------------------------------------- settings

WRONG = """batch_size=1 batch_size=many chunks=1 chunk_size=0 network=x pretrain_steps=-1
    split=train attack_steps=9999999999 image_size=-1 dispose_lr=0 fresh_lr=-1 allowance=0
    allowance=inf allowance=nan similarity=DOT augment=flip subset_per_class=0"""


@pytest.mark.parametrize("pair", WRONG.split())
def test_a_script_is_told_what_is_wrong_with_a_setting(pair):
    name, value = pair.split("=")
    for given in (value, float(value)) if re.fullmatch(r"-?\d+|inf|nan", value) else (value,):
        with pytest.raises(click.ClickException) as error:
            dtl.Config(**{name: given})
        assert len(error.value.format_message().splitlines()) == 1


@pytest.mark.parametrize("name", dtl.PRESETS)
def test_presets_set_sizes_and_nothing_of_the_method(name):
    settings, kinds = dtl.PRESETS[name], {o.name: o.type for o in dtl.config_options()}
    assert settings.keys() <= {f.name for f in fields(dtl.Config)}
    assert not settings.keys() & {"allowance", "similarity", "gc_head", "split"}
    dtl.Config(**{name: kinds[name].convert(v, None, None) for name, v in settings.items()})


# ---------------------------------------- the one loop


def test_the_learning_rate_rises_in_a_line_and_falls_in_a_cosine():
    rates = dtl.one_cycle(100, 0.1)
    assert rates[:25] == pytest.approx([0.1 * 4 * k / 101 for k in range(1, 26)])
    falling = [0.05 + 0.05 * math.cos(math.pi * (k / 101 - 0.25) / 0.75) for k in range(26, 101)]
    assert rates[25:] == pytest.approx(falling) and 0 < rates[-1] < 1e-4
    with pytest.raises(dtl.DTLError, match="^0 steps.*$"):
        dtl.one_cycle(0, 0.1)


def loop(losses, schedule, seed=0, **how):
    """A weight of three numbers trained on losses(weight, step, generator)."""
    model, steps = nn.Linear(3, 1, bias=False).eval(), itertools.count()
    model.weight.data = torch.tensor([[1.0, -2.0, 3.0]])

    def step_loss(generator):
        assert model.training
        loss = losses(model.weight, next(steps), generator)
        loss.backward()
        return {"loss": loss}

    dtl.train(model, step_loss, schedule, seed, **how)
    assert not model.training
    return model.weight.detach()


def test_a_step_is_that_of_sgd_with_nesterov_momentum():
    """By its formula: clipping, weight decay, momentum, the learning rate of every step. Some
    gradients are above the clip, some far below."""
    scale, rates = torch.tensor([[1.0, 2.0, 3.0]]), dtl.one_cycle(12, 0.1)
    weight, moved = torch.tensor([[1.0, -2.0, 3.0]]).double(), 0
    for step, rate in enumerate(rates):
        gradient = 2 * weight * (scale.double() * (100.0 if step % 3 else 0.01)) ** 2
        gradient = gradient * min(1.0, 5.0 / gradient.norm().item()) + 5e-4 * weight
        moved = 0.9 * moved + gradient
        weight = weight - rate * (gradient + 0.9 * moved)

    def steep(weight, step, _):
        return (weight * scale * (100.0 if step % 3 else 0.01)).square().sum()

    assert torch.allclose(loop(steep, rates), weight.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("every", "named"), [(1, "7 to 7"), (4, "5 to 8"), (50, "1 to 9")])
def test_the_steps_whose_loss_is_not_finite_are_named(monkeypatch, every, named):
    monkeypatch.setattr(dtl, "LOOK_EVERY", every)
    with pytest.raises(dtl.DTLError, match=f"^not finite in steps {named}: .*'loss': nan.*$"):
        loop(lambda w, step, _: w.sum() * (math.nan if step == 6 else 1.0), [0.1] * 9)


def test_terms_are_logged_as_means_between_looks(monkeypatch, logged):
    monkeypatch.setattr(dtl, "LOOK_EVERY", 4)
    loop(lambda w, step, _: 0 * w.sum() + step, [0.1] * 10, inspect=lambda generator: {"seen": 5})
    assert logged("step") == [0, 4, 8, 10] and logged("loss") == [1.5, 5.5, 8.5]
    assert {*logged("steps")} == {10} and {*logged("gradient")} == {0} and {*logged("seen")} == {5}


def test_every_step_has_random_numbers_of_its_own_by_seed(monkeypatch):
    """However many an earlier step or a look has used."""
    monkeypatch.setattr(dtl, "LOOK_EVERY", 1)

    def drawn(seed, used):
        found = []

        def losses(weight, step, generator):
            found.append(torch.rand(1 + used, generator=generator)[0].item())
            return weight.sum()

        loop(
            losses,
            [0.1] * 4,
            seed,
            inspect=lambda g: {"drawn": torch.rand(used, generator=g).sum()},
        )
        return found

    assert drawn(1, 0) == drawn(1, 5) and len(set(drawn(1, 0) + drawn(2, 0))) == 8


# ---------------------------------------- pretrain and transfer


def test_pretraining_and_transfer_learn(learned):
    assert dtl.accuracy(learned.pretrained, learned.source) > 0.9  # of four classes
    assert dtl.accuracy(learned.transferred, learned.target) > 0.9


def test_stages_are_by_seed_and_leave_the_pretrained_model_alone(world):
    before = tensors(world.pretrained)
    for first, again, other in (
        [dtl.pretrain(world.source, CONFIG, seed) for seed in (1, 1, 2)],
        [dtl.transfer(world.pretrained, world.target, CONFIG, seed) for seed in (1, 1, 2)],
    ):
        assert same(first, again) and not same(first, other)
    assert same(world.pretrained, before)


def test_where_pretraining_and_transfer_start_and_how_long_they_take(world, untrained):
    """Backbone and head by seed; the pretrained backbone, and a new head."""
    rates = dict(pretrain_steps=5, pretrain_lr=0.3, transfer_steps=6, transfer_lr=0.4)
    config = replace(CONFIG, **rates)
    one, two = (dtl.pretrain(world.source, config, seed) for seed in (1, 2))
    three, four = (dtl.transfer(one, world.target, config, seed) for seed in (1, 2))
    assert not torch.equal(filters(one)[0], filters(two)[0])
    assert same(three.backbone, one.backbone) and same(four.backbone, one.backbone)
    for a, b, classes in ((one, two, 5), (three, four, 4)):
        assert a.head.out_features == classes and not torch.equal(a.head.weight, b.head.weight)
    plans = [dtl.one_cycle(5, 0.3)] * 2 + [dtl.one_cycle(6, 0.4)] * 2
    assert [args[2:4] for args in untrained] == list(zip(plans, [1, 2] * 2))


# ---------------------------------------- dispose


@pytest.mark.parametrize("method", dtl.METHODS)
def test_disposal_leaves_its_arguments_alone_and_is_by_seed_and_method(world, method):
    models = (world.pretrained, world.transferred)
    before = [tensors(m) for m in models]
    first, second, other = (dispose(world, method, seed) for seed in (7, 7, 8))
    assert same(first, second) and not same(first, other) and not same(first, before[1])
    plain = "distill-fresh" if method.endswith("-fresh") else "finetune"
    assert same(first, dispose(world, plain)) == (method not in FORGET)
    assert all(same(*pair) for pair in zip(models, before)) and not first.training
    assert all(p.requires_grad for m in models for p in m.parameters())


@pytest.mark.parametrize("method", dtl.METHODS)
def test_source_images_leave_no_trace_in_running_statistics(world, method, monkeypatch):
    """Those are of a model that sees each target batch once, also where gradients are looked at."""
    sizes = []

    def watched(norm, x, before=dtl.BatchNorm2d.forward):
        mean = norm.running_mean.clone()
        y = before(norm, x)
        sizes.extend([len(x)] * (not mean.equal(norm.running_mean)))
        return y

    monkeypatch.setattr(dtl.BatchNorm2d, "forward", watched)
    student = dispose(world, method, chunk_size=7)  # source batches of 14 in two, target of 8
    norms = [m for m in student.modules() if isinstance(m, nn.BatchNorm2d)]
    assert sizes == [8] * 3 * len(norms)
    assert {int(m.num_batches_tracked) for m in norms} == {3}


@pytest.mark.parametrize("method", dtl.METHODS)
def test_where_disposal_starts_and_how_long_it_takes(world, method, untrained):
    rates = dict(dispose_steps=5, dispose_lr=0.3, fresh_steps=6, fresh_lr=0.4)
    one, two = (dispose(world, method, seed, **rates) for seed in (1, 2))
    schedule = dtl.one_cycle(5, 0.3)
    if method.endswith("-fresh"):
        schedule, models = dtl.one_cycle(6, 0.4), (one, two, world.transferred)
        for a, b in itertools.combinations(models, 2):
            assert not torch.equal(filters(a)[0], filters(b)[0])
            assert not torch.equal(a.head.weight, b.head.weight)
    else:
        known = dispose(world, method, 1, **rates, perturb=0)
        new = dispose(world, method, 1, **rates, perturb=1)
        fresh = dispose(world, "distill-fresh", 1, **rates)
        assert same(known, world.transferred)
        for a, b in zip(new.parameters(), fresh.parameters()):
            assert torch.equal(a, b)  # with perturb=1 they start where -fresh does
        for a, b, half in zip(new.parameters(), known.parameters(), one.parameters()):
            assert torch.allclose(half, (a + b) / 2, atol=1e-7)
        assert not same(one, two)  # the fresh model is another one by seed
    assert [args[2:4] for args in untrained[:2]] == [(schedule, 1), (schedule, 2)]


@pytest.mark.parametrize("method", dtl.METHODS)
def test_what_a_method_minimises(world, method, monkeypatch):
    """Distillation on target images, in fresh methods on source images, too; beside a forget loss
    through the balance, which measures distillation on target images alone."""
    batches, steps, balanced, collided = [], [], [], spy(monkeypatch, dtl, "chunk_losses")
    batch, distillation, backward = dtl.batch, dtl.distillation, dtl.Balance.backward
    monkeypatch.setattr(dtl, "batch", lambda *a: batches.append((a, batch(*a))) or batches[-1][1])

    def distilled(student, teacher):
        steps.append((teacher, distillation(student, teacher)))
        return steps[-1][1]

    def balance(*given, measured):
        balanced.append((given[1], measured))
        backward(*given, measured)

    monkeypatch.setattr(dtl, "distillation", distilled)
    monkeypatch.setattr(dtl.Balance, "backward", balance)
    dispose(world, method, chunks=3, chunk_size=4)
    sizes = [8, 12] * 3 + [12]  # a batch of each task in a step, then one to look at
    assert [args[1:3] for args, _ in batches] == [(size, "crop,flip") for size in sizes]
    assert all(args[0] is (world.target if args[1] == 8 else world.source) for args, _ in batches)
    fresh = method.endswith("-fresh")
    assert len(collided) == (4 if method.startswith("gc") else 1)  # a look is one
    assert len(steps) == (6 if fresh else 3) and len(balanced) == (3 if method in FORGET else 0)
    for (answers, _), (_, (x, _)) in zip(steps, batches if fresh else batches[::2]):
        assert torch.equal(answers, world.transferred(x)) and not answers.requires_grad
    of_target, of_source = ([value for _, value in steps[k :: 1 + fresh]] for k in (0, 1))
    for k, (retain, measured) in enumerate(balanced):
        assert measured is of_target[k]
        assert torch.equal(retain, of_target[k] + of_source[k] if fresh else of_target[k])


@pytest.mark.parametrize("method", dtl.METHODS)
def test_disposal_keeps_the_target_and_forgets_the_source(learned, method):
    """A fresh backbone learns the target from the transferred model's answers alone. After uniform
    the source head knows less; after gc the gradients of chunks through other heads agree less."""
    scrubbed = dispose(learned, method)
    assert dtl.accuracy(scrubbed, learned.target) > 0.9
    x, y = dtl.normalise(learned.source.x), learned.source.y

    def surprise(model):
        head = learned.pretrained.head
        return -dtl.Model(model.backbone.eval(), head)(x).log_softmax(1).mean().item()

    def agreement(model):
        backbone, found = copy.deepcopy(model.backbone).train(), 0
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            head, order = dtl.new_head(64, 4, generator), torch.randperm(240, generator=generator)
            losses = dtl.chunk_losses(backbone, head, x[order], y[order], 4)
            found += dtl.gradient_collision_loss(losses, backbone.parameters()).item()
        return found

    if method in ("uniform", "gc"):
        measure = surprise if method == "uniform" else agreement
        assert measure(scrubbed) < 0.9 * measure(dispose(learned, "finetune"))


@pytest.mark.parametrize("stage", ["pretrain", *dtl.METHODS])
def test_a_step_waits_for_nothing(world, monkeypatch, stage):
    """More steps read no more values back from the device."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    def waits(steps):
        seen.clear()
        given = dict.fromkeys(STEPS, steps)
        with Watch():
            if stage == "pretrain":
                dtl.pretrain(world.source, replace(CONFIG, **given), 1)
            else:
                dispose(world, stage, **given)
        assert seen.count("convolution_backward") >= 7 * steps
        return [name for name in seen if name in ("_local_scalar_dense", "nonzero", "equal")]

    seen = []
    assert waits(5) == waits(2)


# ---------------------------------------- forget losses


def context(world, **settings):
    """As disposal makes one, but for BatchNorm, which is not in training mode."""
    config, generator = replace(CONFIG, **settings), torch.Generator().manual_seed(3)
    x, y = dtl.batch(world.source, config.chunks * config.chunk_size, "none", generator)
    head = copy.deepcopy(world.pretrained.head).requires_grad_(False)
    head.weight *= 20
    student = copy.deepcopy(world.transferred)
    return dtl.Context(student, world.transferred, head, x, y, generator, config)


@pytest.mark.parametrize("similarity", ["dot", "cos"])
def test_gc_by_plain_autograd(world, similarity):
    """Of every pair of chunks, through a new head, over the backbone alone."""
    seen, grads = context(world, chunks=3, chunk_size=5, similarity=similarity), []
    head = dtl.new_head(64, 5, seen.generator.clone_state())
    params = list(seen.student.backbone.parameters())
    for k in range(0, 15, 5):
        logits = head(seen.student.backbone(seen.x[k : k + 5]))
        loss = F.cross_entropy(logits, seen.y[k : k + 5])
        g = torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]).double()
        grads.append(g / g.norm() if similarity == "cos" else g)
    expected = sum((a @ b).item() for a, b in itertools.combinations(grads, 2)) / 3
    assert dtl.gradient_collision(seen).item() == pytest.approx(expected, rel=1e-4)


def test_uniform_labels_is_kl_from_uniform_through_the_source_head(world):
    seen = context(world)
    q = seen.source_head(seen.student.backbone(seen.x)).softmax(1)
    expected = (0.2 * (0.2 / q).log()).sum(1).mean()
    assert 0.01 < expected.item() == pytest.approx(dtl.uniform_labels(seen).item(), rel=1e-4)


def test_distillation_is_kl_times_temperature_squared():
    student, teacher = torch.randn(4, 5), torch.arange(20.0).view(4, 5)
    p, q = (teacher / 4).softmax(1), (student / 4).softmax(1)
    expected = 16 * (p * (p / q).log()).sum(1).mean()
    assert torch.allclose(dtl.distillation(student, teacher), expected, rtol=1e-5)


@pytest.mark.parametrize("method", ["added", "added-fresh"])
def test_a_forget_loss_that_a_script_adds_sees_its_context_and_falls(world, monkeypatch, method):
    seen = []

    def forget(context):
        loss = context.student.backbone(context.x).square().mean()
        seen.append((context, loss.item(), torch.rand((), generator=context.generator).item()))
        return loss

    monkeypatch.setitem(dtl.METHODS, method, forget)
    steps = dict(dispose_steps=20, fresh_steps=20, chunks=3, chunk_size=4, augment="none")
    scrubbed = dispose(world, method, **steps)
    assert len({number for *_, number in seen}) == 20 and seen[-1][1] < seen[0][1]
    for found, *_ in seen:
        assert found.x.shape == (12, 3, 8, 8) and found.x.dtype == torch.float32
        assert found.y.shape == (12,) and found.y.dtype == torch.int64 and found.y.max() < 5
        assert found.student is scrubbed and found.config == replace(CONFIG, **steps)
        assert same(found.source_head, world.pretrained.head)
        assert same(found.teacher, world.transferred)
        frozen = (*found.source_head.parameters(), *found.teacher.parameters())
        assert not any(p.requires_grad for p in frozen)


@pytest.mark.parametrize(("method", "allowance"), [("gc", 1.5), ("gc@0.5", 0.5), ("uniform@2", 2)])
def test_the_allowance_is_the_methods_own_or_the_settings(world, monkeypatch, method, allowance):
    built = spy(monkeypatch, dtl.Balance, "__init__", lambda _, allowance: allowance)
    made = dispose(world, method, allowance=1.5)
    assert same(made, dispose(world, method.split("@")[0], allowance=allowance))
    assert built == [allowance] * 2


def test_the_strength_is_regulated_and_the_mechanism_is_logged(world, monkeypatch, logged):
    """What the chunks' gradients have in common, every LOOK_EVERY steps, by any backend."""
    monkeypatch.setattr(dtl, "LOOK_EVERY", 4)
    stats, given = dtl.gradient_stats, spy(monkeypatch, dtl, "gradient_stats")
    monkeypatch.setitem(dtl.METHODS, "added", lambda context: context.student.head.bias.sum())
    for method, steps in (("gc@900", 8), ("uniform@0.01", 8), ("added@900", 80)):
        dispose(world, method, dispose_steps=steps)
    strengths = logged("strength")
    assert 1 < strengths[0] < strengths[1] and strengths[2] > strengths[3] > 0.25
    assert len(strengths) == len(given) == 24 and strengths[-1] == 4  # the limit
    for name in ("gc_dot", "gc_cos", "squared_norm"):
        for backend in ("torch", "native") if dtl.native_routine()[0] else ("torch",):
            expected = [stats(gradients, backend)[name] for (gradients,) in given]
            assert logged(name) == pytest.approx(expected, rel=1e-9)


# ---------------------------------------- piggyback


@pytest.mark.parametrize("attacker", [*dtl.ATTACKERS, "added"])
@pytest.mark.parametrize("kind", ["own", "foreign", "frozen"])
def test_an_attack_trains_all_of_a_copy(learned, monkeypatch, attacker, kind):
    monkeypatch.setitem(dtl.ATTACKERS, "added", dtl.ATTACKERS["fixed"])
    backbone = foreign() if kind == "foreign" else copy.deepcopy(learned.transferred.backbone)
    backbone.requires_grad_(kind != "frozen")
    before, trained = tensors(backbone), spy(monkeypatch, dtl, "accuracy", lambda m, _: m)
    config = replace(learned.config, attack_steps=2)
    one, two = (dtl.piggyback(backbone, learned.source, attacker, config, 4) for _ in range(2))
    assert isinstance(one, float) and one == two == dtl.accuracy(trained[0], learned.source)
    assert same(backbone, before)
    for given, copied in zip(backbone.parameters(), trained[0].backbone.parameters(), strict=True):
        assert given.requires_grad == (kind != "frozen") and not torch.equal(given, copied)


def test_an_attack_gets_back_what_was_not_disposed_of(learned):
    kept = torch.cat(
        [torch.nonzero(learned.source.y == c)[:6, 0] for c in range(learned.source.classes)]
    )
    few = replace(learned.source, x=learned.source.x[kept], y=learned.source.y[kept])
    backbones = (learned.transferred.backbone, dtl.new_backbone("resnet8", 9, "cpu"))
    known, unknown = (dtl.piggyback(b, few, "fixed", learned.config, 4) for b in backbones)
    assert known > 0.9 and known > unknown + 0.1


def test_every_model_meets_the_same_head_schedule_and_batches(learned, monkeypatch):
    """By seed. The long attackers take five times the steps at twice the rate."""
    plans = spy(monkeypatch, dtl, "train", lambda m, loss, plan, *_: (tensors(m.head), plan))
    drawn = spy(monkeypatch, dtl, "batch", lambda *a: (*a[1:3], a[3].get_state().tolist()))
    config = replace(learned.config, attack_steps=3)

    def attack(model, attacker, seed):
        drawn.clear()
        dtl.piggyback(model.backbone, learned.source, attacker, config, seed)
        return *plans.pop(), drawn.copy()

    head, plan, batches = attack(learned.transferred, "fixed", 1)
    assert plan == dtl.one_cycle(3, 0.05) and [b[:2] for b in batches] == [(16, "crop")] * 3
    other_head, *other = attack(learned.pretrained, "fixed", 1)
    assert same(head, other_head) and other == [plan, batches]
    other_head, other_plan, others = attack(learned.transferred, "fixed", 2)
    assert not same(head, other_head) and other_plan == plan and others != batches
    for attacker in ("long", "rescaled"):
        other_head, other_plan, others = attack(learned.transferred, attacker, 1)
        assert same(head, other_head) and other_plan == dtl.one_cycle(15, 0.1)
        assert others[:3] == batches and len(others) == 15


def test_filters_are_rescaled_before_training(learned, untrained, monkeypatch):
    """Each to the standard deviation of a new one; one of zeros stays, and so does BatchNorm."""
    backbone = copy.deepcopy(learned.transferred.backbone)
    with torch.no_grad():
        filters(backbone)[2][3] = 0
        filters(backbone)[1].mul_(1e-4)
    started = spy(monkeypatch, dtl, "accuracy", lambda model, _: model.backbone)
    for attacker in ("long", "rescaled"):
        dtl.piggyback(backbone, learned.source, attacker, learned.config, 4)
    assert same(started[0], backbone)
    for old, new in zip(backbone.parameters(), started[1].parameters()):
        if old.dim() < 4:
            assert torch.equal(old, new)
            continue
        spread, live = new.std((1, 2, 3)), old.std((1, 2, 3)) > 0
        assert torch.allclose(spread[live], torch.tensor((3 * old[0].numel()) ** -0.5), rtol=1e-4)
        turned = F.cosine_similarity(old.flatten(1), new.flatten(1))[live]
        assert torch.equal(new[~live], old[~live]) and torch.allclose(turned, torch.ones(1))


# ---------------------------------------- a run


def test_every_model_is_made_by_its_stage_from_its_tasks(new_run, monkeypatch):
    """By a seed that no other stage or run has; but what is compared has the same batches."""
    called, seeds, models = [], {}, ["the pretrained", "the transferred"]
    for stage in ("pretrain", "transfer", "dispose"):
        monkeypatch.setattr(dtl, stage, lambda *args, s=stage: called.append((s, *args)))
    names = ("pretrained", "scratch", "transferred", "gc", "oracle", "gc-fresh@2")
    for name, seed in itertools.product(names, (0, 1)):
        run = new_run(seed=seed, fresh_steps=12, fresh_lr=0.12)
        source, target, oracle = (run.tasks[task] for task in ("source", "target", "oracle"))
        expected = {
            "pretrained": ["pretrain", source],
            "scratch": ["pretrain", target],
            "oracle": ["pretrain", oracle],
            "transferred": ["transfer", models[0], target],
        }.get(name, ["dispose", *models, source, target, name])
        run.make(name, models[: len(expected) - 2][:2])
        *given, config, seeds[name, seed] = called.pop()
        assert all(a is b or a == b for a, b in zip(given, expected, strict=True))
        never_saw = replace(run.config, pretrain_steps=12, pretrain_lr=0.12)
        assert config == (never_saw if name in ("scratch", "oracle") else run.config)
    assert len({seeds[name, seed] for name in names[:4] for seed in (0, 1)}) == 8
    assert seeds["oracle", 0] == seeds["scratch", 0] and seeds["gc-fresh@2", 0] == seeds["gc", 0]


def test_a_run_makes_a_model_from_earlier_ones_and_keeps_it(new_run, monkeypatch):
    run, made = new_run(), spy(monkeypatch, dtl.Run, "make", lambda run, name, *_: name)
    scrubbed, folder = run.model("gc"), run.out / "seed0"
    assert made == ["pretrained", "transferred", "gc"]
    assert {p.name for p in folder.iterdir()} == {"gc.pt", "pretrained.pt", "transferred.pt"}
    again, x = dtl.load_model(folder / "gc.pt"), dtl.normalise(run.tasks["target"].x_test)
    assert not again.training and torch.equal(again(x), scrubbed(x))
    assert same(new_run().model("gc"), scrubbed) and len(made) == 3
    earlier = [dtl.load_model(str(folder / f"{name}.pt")) for name in made[:2]]
    tasks, seed = (run.tasks["source"], run.tasks["target"]), dtl.stream(0, "dispose")
    assert same(dtl.dispose(*earlier, *tasks, "gc", run.config, seed), scrubbed)
    new_run(seed=1).model("scratch")
    assert made[3:] == ["scratch"] and (run.out / "seed1" / "scratch.pt").exists()


def test_a_run_measures_once(new_run, monkeypatch, records):
    """Through a model's own head, on the task of its own; attacks by a seed of run and task."""
    run, attacks = new_run(), spy(monkeypatch, dtl, "piggyback")
    for _ in range(2):
        run.measure("pretrained")
        run.measure("transferred")
        for task in TASKS:
            run.measure("scratch", task, "fixed")
    found = {(r["model"], r["task"]): r["value"] for r in records(run.out)}
    assert len(found) == 4 and len(attacks) == 2
    assert found["pretrained", None] == dtl.accuracy(run.model("pretrained"), run.tasks["source"])
    assert found["transferred", None] == dtl.accuracy(run.model("transferred"), run.tasks["target"])
    for name, (backbone, task, *given) in zip(TASKS, attacks):
        assert same(backbone, run.model("scratch").backbone) and task is run.tasks[name]
        assert given == ["fixed", run.config, dtl.stream(0, "piggyback", name)]


def test_steps_of_zero_are_by_the_size_of_the_data(new_run, monkeypatch):
    """24 images of the source, 8 of the target, 12 of the subset: 20 to 24 passes, or 5 steps."""
    steps, of = dict.fromkeys(dtl.PASSES, 0), [task for task, *_ in dtl.PASSES.values()]
    assert of == ["source", "target", "target", "target", "source-subset"]
    passes = {name: (task, 20 + k, 5) for k, (name, task) in enumerate(zip(steps, of))}
    monkeypatch.setattr(dtl, "PASSES", passes)
    for given, expected in (
        (dict(batch_size=3), [160, 42, 44, 46, 96]),
        (dict(batch_size=3, transfer_steps=7), [160, 7, 44, 46, 96]),
        (dict(batch_size=30), [5] * 5),
    ):
        config = new_run(**steps | given).config
        assert [getattr(config, name) for name in steps] == expected
