"""The stages, the rivals and the attack: what they learn, use, change, keep and never touch."""

import copy
import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dtl

CPU = torch.device("cpu")


def tensors(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def unseen(task):
    """Without its test images: whoever looks at them fails."""
    return replace(task, x_test=None, y_test=None)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Source and target task, a transferred model and the source head, all tiny and untrained."""
    source, target = (
        dtl.load_task(name, 0, tmp_path_factory.mktemp("data"), CPU, image_size=8)
        for name in ("shapes[0:5]@8", "shapes[16:20]@6")
    )
    heads = [dtl.new_head(64, classes, torch.Generator().manual_seed(classes), CPU) for classes in (5, 4)]
    return source, target, dtl.Model(dtl.new_backbone("resnet8", 1, CPU), heads[1]).eval(), heads[0]


def schedule(steps=3, lr=0.02, **more):
    return dtl.Schedule(steps, lr, batch_size=8, **more)


def dispose(world, method, steps=3, lr=0.02, seed=7, **options):
    source, target, transferred, head = world
    options = dict(network="resnet8", weight=1.0, chunks=2, chunk_size=8) | options
    method = dtl.METHODS[method] if isinstance(method, str) else method
    return dtl.dispose(
        transferred, head, source, target, method, schedule(steps, lr), seed, dtl.Progress(), **options
    )


def spy(monkeypatch, name, note):
    """Before every call of dtl.NAME, note(*args, **kwargs) is kept; returns the list of what was."""
    seen, original = [], getattr(dtl, name)

    @functools.wraps(original)
    def call(*args, **kwargs):
        seen.append(note(*args, **kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(dtl, name, call)
    return seen


def share(model, task):
    """Test accuracy, 0..1."""
    return dtl.hits(model, task).double().mean().item()


def everything(*args, **kwargs):
    return args, kwargs


# ---------------------------------------- every stage learns


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Source, target, pretrained and transferred, small and really trained: colours against grey outlines."""
    data = tmp_path_factory.mktemp("data")
    source, target = (
        dtl.load_task(name, 0, data, CPU, image_size=8) for name in ("shapes[0,16]@100", "shapes[1,17]@16")
    )
    torch.set_num_threads(1)
    pretrained = dtl.pretrain(source, "resnet8", learning(40, 0.1), 1, dtl.Progress())
    transferred = dtl.transfer(pretrained, target, learning(20, 0.05), 2, dtl.Progress())
    return source, target, pretrained, transferred


def learning(steps, lr):
    return dtl.Schedule(steps, lr, 16, "crop")


def test_pretraining_and_transfer_learn(learned):
    source, target, pretrained, transferred = learned
    assert share(pretrained, source) > 0.8  # of two classes
    assert share(transferred, target) > 0.8
    assert not pretrained.training and not transferred.training


@pytest.mark.parametrize("method", ["finetune", "gc", "distill-fresh"])
def test_disposal_keeps_the_target_task(learned, method):
    """The fresh backbone learns it, from the transferred model's answers alone."""
    source, target, pretrained, transferred = learned
    plan = learning(30, 0.1) if method == "distill-fresh" else learning(6, 0.02)
    scrubbed = dtl.dispose(
        transferred,
        pretrained.head,
        source,
        target,
        dtl.METHODS[method],
        plan,
        3,
        dtl.Progress(),
        network="resnet8",
        weight=1.0,
        chunks=2,
        chunk_size=16,
    )
    assert share(scrubbed, target) > 0.8


def test_an_attack_gets_the_source_back_from_what_was_not_disposed_of(learned):
    source, _, _, transferred = learned
    few = [torch.nonzero(source.y == c).flatten()[:8] for c in range(2)]
    subset = replace(source, x=source.x[torch.cat(few)], y=source.y[torch.cat(few)])
    stranger = dtl.new_backbone("resnet8", 3, CPU)
    reached = [
        dtl.piggyback(b, subset, dtl.Attacker(), learning(10, 0.05), 4, dtl.Progress())[0].double().mean()
        for b in (transferred.backbone, stranger)
    ]
    assert reached[0] > 0.8 and reached[0] > reached[1] + 0.1


def test_hits_are_the_test_images_that_are_right():
    x_test = torch.arange(7, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2).repeat(100, 1, 1, 1)
    y_test = torch.tensor([0, 1, 2, 3, 4, 5, 5]).repeat(100)
    task = dtl.Task(x=None, y=None, x_test=x_test, y_test=y_test, classes=7, fingerprint="")

    class Reader(nn.Module):  # its answer is what the pixels say; wrong in training mode
        def forward(self, x):
            number = (x[:, 0, 0, 0] * 63.75 + 127.5).round().long()
            return F.one_hot(number, 8)[:, :7].float() if not self.training else torch.zeros(len(x), 7)

    found = dtl.hits(Reader().train(), task)
    assert found.dtype == torch.bool
    assert found.tolist() == [*[True] * 6, False] * 100


# ---------------------------------------- the one loop


def test_learning_rate_rises_then_falls_to_nearly_zero():
    rates = [schedule(100, 0.1).lr_at(step) for step in range(100)]
    assert (
        max(rates) <= 0.1
        and rates.index(max(rates)) in range(23, 27)
        and rates[0] < 0.01
        and rates[-1] < 1e-4
    )
    assert rates[:24] == pytest.approx([0.1 * 4 * k / 101 for k in range(1, 25)])  # in a straight line
    falling = [0.05 + 0.05 * math.cos(math.pi * (k / 101 - 0.25) / 0.75) for k in range(27, 101)]
    assert rates[26:] == pytest.approx(falling)


def loop(optimizer, steps, losses, lr=0.1, **more):
    """A weight of three numbers trained by the loop on losses(weight, step)."""
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0, 3.0]]))

    def step_loss(generator, step):
        loss = losses(model.weight, step.item())
        loss.backward()
        return {"loss": loss}

    how = schedule(steps, lr, optimizer=optimizer, **more)
    dtl.train(model, lambda step: (torch.tensor(step),), step_loss, how, 0, dtl.Progress())
    return model.weight.detach()


def steep(weight, step):
    """Some gradients are above the clip, some far below."""
    return (weight * torch.tensor([[1.0, 2.0, 3.0]]) * (100.0 if step % 3 else 0.01)).square().sum()


def by_hand(kind, steps, lr=0.1):
    weight = torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64)
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    scale = torch.tensor([[1.0, 2.0, 3.0]]).double()
    for step in range(steps):
        rate = schedule(steps, lr).lr_at(step)
        gradient = 2 * weight * (scale * (100.0 if step % 3 else 0.01)) ** 2
        gradient = gradient * min(1.0, 5.0 / gradient.norm().item())  # clipped at a norm of 5
        if kind == "sgd":
            gradient = gradient + 5e-4 * weight
            first = 0.9 * first + gradient if step else gradient
            weight = weight - rate * (gradient + 0.9 * first)
        else:
            weight = weight * (1 - rate * 5e-4)
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            corrected = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
            weight = weight - rate * corrected[0] / (corrected[1].sqrt() + 1e-8)
    return weight.float()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_optimisers_against_their_formulas(kind):
    """Clipping, weight decay, Nesterov momentum, the learning rate of every step."""
    assert torch.allclose(loop(kind, 12, steep), by_hand(kind, 12), rtol=1e-4, atol=1e-6)


def test_what_is_frozen_stays_and_the_rest_learns():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    before = copy.deepcopy(model)

    def step_loss(generator):
        loss = model(torch.ones(2, 3)).sum()
        loss.backward()
        return {"loss": loss}

    dtl.train(model, lambda step: (), step_loss, schedule(2), 0, dtl.Progress())
    assert same_weights(model[0], before[0]) and not same_weights(model[1], before[1]) and not model.training


@pytest.mark.parametrize("fetch", [1, 4, 50])
def test_the_step_whose_loss_is_not_finite_is_named(monkeypatch, fetch):
    monkeypatch.setattr(dtl, "FETCH", fetch)
    with pytest.raises(dtl.DTLError, match="step 6 of 9: not finite: loss nan"):
        loop("sgd", 9, lambda weight, step: weight.sum() * (math.nan if step == 6 else 1.0))


def test_every_step_has_random_numbers_of_its_own_by_seed(world):
    def numbers(seed):
        drawn, model = [], nn.Linear(1, 1)

        def step_loss(generator):
            drawn.append(torch.rand((), generator=generator).item())
            (loss := model.weight.sum()).backward()
            return {"loss": loss}

        dtl.train(model, lambda step: (), step_loss, schedule(4), seed, dtl.Progress())
        return drawn

    assert numbers(1) == numbers(1) and len(set(numbers(1) + numbers(2))) == 8


def test_fit_uses_its_schedule_and_never_sees_test_images(world, monkeypatch):
    indices = spy(monkeypatch, "batch_index", lambda *given: given)
    batches = spy(monkeypatch, "batch", lambda task, index, augment, generator: (
        task, index.tolist(), augment, generator.initial_seed()))  # fmt: skip
    rates = []
    model, task = copy.deepcopy(world[2]), unseen(world[1])
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD,
        "step",
        lambda self, *a: (rates.append(self.param_groups[0]["lr"]), step(self, *a))[1],
    )
    plan = dtl.Schedule(5, 0.03, 6, "crop")
    dtl.fit(model, task, plan, 11, dtl.Progress())
    assert indices == [(task, 6, k, 11) for k in range(5)]
    assert [b[:3] for b in batches] == [(task, dtl.batch_index(*i).tolist(), "crop") for i in indices[:5]]
    assert len({b[3] for b in batches}) == 5
    assert rates == [plan.lr_at(k) for k in range(5)]


# ---------------------------------------- pretrain and transfer


def test_pretraining_is_by_seed(world):
    task = unseen(world[0])
    first, again, other = (
        dtl.pretrain(task, "resnet8", schedule(), seed, dtl.Progress()) for seed in (1, 1, 2)
    )
    assert same(tensors(first), tensors(again)) and not same(tensors(first), tensors(other))
    assert first.head.out_features == 5
    random = [dtl.pretrain(task, "resnet8", schedule(1, 0.0), seed, dtl.Progress()) for seed in (1, 2)]
    assert not torch.equal(random[0].backbone.stem[0].weight, random[1].backbone.stem[0].weight)
    assert not torch.equal(random[0].head.weight, random[1].head.weight)
    moved = [dtl.transfer(random[0], task, schedule(1, 0.0), seed, dtl.Progress()) for seed in (1, 2)]
    assert not torch.equal(moved[0].head.weight, moved[1].head.weight)


def test_transfer_starts_from_the_pretrained_backbone(world):
    """At a learning rate of zero its weights stay, and the head is a new one; the pretrained model is left
    alone."""
    pretrained = dtl.Model(dtl.new_backbone("resnet8", 5, CPU), world[3])
    before = tensors(pretrained)
    still = dtl.transfer(pretrained, unseen(world[1]), schedule(lr=0.0), 3, dtl.Progress())
    assert same_weights(still.backbone, pretrained.backbone) and still.head.out_features == 4
    moved = dtl.transfer(pretrained, unseen(world[1]), schedule(lr=0.02), 3, dtl.Progress())
    assert not any(
        torch.equal(p, q) for p, q in zip(moved.backbone.parameters(), pretrained.backbone.parameters())
    )
    assert same(before, tensors(pretrained))


# ---------------------------------------- dispose


@pytest.mark.parametrize("method", dtl.METHODS)
def test_disposal_leaves_its_arguments_alone_and_is_reproducible(world, method):
    world = (unseen(world[0]), unseen(world[1]), *world[2:])
    before = [tensors(world[2]), tensors(world[3])]
    first, second = dispose(world, method, 2), dispose(world, method, 2)
    assert same(before[0], tensors(world[2])) and same(before[1], tensors(world[3]))
    assert same(tensors(first), tensors(second)) and not same(tensors(first), before[0])
    assert not first.training and all(p.requires_grad for p in world[2].parameters())


def test_a_fresh_backbone_is_by_seed(world):
    made = [dispose(world, "distill-fresh", 1, 0.0, seed) for seed in (1, 2)]
    for name in ("backbone.stem.0.weight", "head.weight"):
        assert not torch.equal(*(model.get_parameter(name) for model in made))


@pytest.mark.parametrize("method", dtl.METHODS)
def test_batchnorm_statistics_come_from_target_images_alone(world, method, monkeypatch):
    """The running statistics are those of a model that sees each target batch once, source images or not."""
    updates = []
    original = F.batch_norm

    def watched(x, mean, var, *args, **kwargs):
        if mean is not None and (args[2] if len(args) > 2 else kwargs["training"]):
            updates.append(len(x))
        return original(x, mean, var, *args, **kwargs)

    monkeypatch.setattr(F, "batch_norm", watched)
    student = dispose(world, method, chunk_size=7)  # source batches of 14, target batches of 8
    assert set(updates) == {8}
    assert student.backbone.stem[1].num_batches_tracked == 3 + (
        0 if dtl.METHODS[method].fresh else world[2].backbone.stem[1].num_batches_tracked
    )


@pytest.mark.parametrize("method", dtl.METHODS)
def test_disposal_starts_where_its_method_says(world, method):
    still = dispose(world, method, 1, lr=0.0)
    if dtl.METHODS[method].fresh:
        strangers = (world[2].backbone, dispose(world, "finetune", 1, lr=0.0).backbone)
        assert not any(
            torch.equal(still.backbone.stem[0].weight, other.stem[0].weight) for other in strangers
        )
        assert not torch.equal(still.head.weight, world[2].head.weight)
    else:
        assert same_weights(still, world[2])


@pytest.mark.parametrize("method", [m for m, entry in dtl.METHODS.items() if entry.forget is not None])
def test_the_forget_weight_matters(world, method):
    assert not same(tensors(dispose(world, method, 2)), tensors(dispose(world, method, 2, weight=0.0)))


@pytest.mark.parametrize("option", (dict(similarity="cos"), dict(gc_head="source"), dict(chunks=4)))
def test_every_reading_matters(world, option):
    assert not same(tensors(dispose(world, "gc", 2)), tensors(dispose(world, "gc", 2, **option)))


def test_batches_of_a_disposal(world, monkeypatch):
    """Target and source images by the same step number, of different draws, as many as chunks times chunk
    size."""
    calls = spy(monkeypatch, "batch_index", lambda *given: given)
    batches = spy(monkeypatch, "batch", lambda task, index, augment, _: (task, index.tolist(), augment))
    dispose(world, "gc", 3, chunks=2, chunk_size=9)
    of_target = [c for c in calls if c[0] is world[1]]
    of_source = [c for c in calls if c[0] is world[0]]
    assert [(size, step) for _, size, step, *_ in of_target] == [(8, 0), (8, 1), (8, 2)]
    assert {(18, 0), (18, 1), (18, 2)} == {(size, step) for _, size, step, *_ in of_source}
    assert (
        len({c[3] for c in of_target}) == len({c[3] for c in of_source}) == 1
        and of_target[0][3] != of_source[0][3]
    )
    assert {b[2] for b in batches} == {"crop,flip"}
    trained = [b for b in batches if b[0] is world[1] or len(b[1]) == 18][:6]
    assert [b[1] for b in trained] == [dtl.batch_index(*c).tolist() for c in calls[:6]]


def collisions(monkeypatch):
    """Of every call of the GC loss: chunks, parameters at that time, similarity, weight, and which chunk
    losses touch all of the parameters."""

    def note(chunk_losses, params, *, similarity, weight, preserve_rng_state):
        touched = [
            all(g is not None for g in torch.autograd.grad(chunk(), params, allow_unused=True))
            for chunk in chunk_losses
        ]
        return dict(
            chunks=len(chunk_losses),
            params=[p.detach().clone() for p in params],
            similarity=similarity,
            weight=weight.item(),
            touched=touched,
        )

    return spy(monkeypatch, "gradient_collision_backward", note)


@pytest.mark.parametrize("method", ["gc", "gc-fresh"])
def test_gc_goes_through_a_new_random_head_at_every_step(world, monkeypatch, method):
    """Over the backbone's parameters and the head's, in as many chunks as configured."""
    calls = collisions(monkeypatch)
    dispose(world, method, 4, chunks=3, chunk_size=4, similarity="cos")
    shapes = [p.shape for p in world[2].backbone.parameters()]
    heads = [world[3].weight]
    for call in calls:
        assert call["chunks"] == 3 and call["similarity"] == "cos" and call["touched"] == [True] * 3
        assert [p.shape for p in call["params"]] == [*shapes, (5, 64), (5,)]
        heads.append(call["params"][-2])
    assert len(calls) == 4
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(heads, 2))
    assert all(
        0.9 / 8 < head.abs().max() <= 1 / 8 for head in heads
    )  # nn.Linear's own initialisation of 64 features


def test_gc_through_the_source_head_on_request(world, monkeypatch):
    calls = collisions(monkeypatch)
    dispose(world, "gc", 3, gc_head="source")
    assert all(torch.equal(c["params"][-2], world[3].weight) for c in calls)
    assert all(torch.equal(c["params"][-1], world[3].bias) for c in calls)


def test_the_weight_of_gc_rises_in_a_fresh_backbone_alone(world, monkeypatch):
    calls = collisions(monkeypatch)
    for method in ("gc-fresh", "gc"):
        dispose(world, method, weight=8.0, steps=4)
    assert [c["weight"] for c in calls] == [4.0, 8.0, 8.0, 8.0] + [8.0] * 4


def test_the_chunks_are_the_images_of_the_source_batch(world, monkeypatch):
    """Each once, with its label: the mean of the chunk losses is the loss of the whole batch, but for
    BatchNorm."""
    seen = []
    monkeypatch.setattr(
        dtl.ResNet, "forward", lambda self, x: x.mean((2, 3)).repeat(1, 22)[:, :64]
    )  # no BatchNorm
    monkeypatch.setattr(dtl, "chunk_statistics", lambda *a: {})
    monkeypatch.setattr(dtl, "distillation", lambda student, *_: student.sum() * 0)
    monkeypatch.setattr(
        dtl,
        "gradient_collision_backward",
        lambda chunks, params, **_: (
            seen.append(
                (
                    sum(c().item() for c in chunks) / len(chunks),
                    params[-2].detach().clone(),
                    params[-1].detach().clone(),
                )
            )
            or torch.zeros(())
        ),
    )
    batches, batch = [], dtl.batch
    monkeypatch.setattr(dtl, "batch", lambda *a: batches.append(batch(*a)) or batches[-1])
    dispose(world, "gc", 2)
    of_source = [b for b in batches if len(b[1]) == 16]
    for (loss, weight, bias), (x, y) in zip(seen, of_source):
        expected = F.cross_entropy(x.mean((2, 3)).repeat(1, 22)[:, :64] @ weight.T + bias, y)
        assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert len(seen) == 2


def test_gc_disposal_makes_gradients_collide(world, monkeypatch):
    """With GC alone (no retain loss), the mean inner product of the source gradients falls."""
    monkeypatch.setattr(dtl, "distillation", lambda student, *_: student.sum() * 0)
    student = dispose(world, "gc", 15, 0.05, weight=10.0, chunks=2, chunk_size=20)
    x, y = dtl.normalise(world[0].x), world[0].y
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))

    def mean_dot(backbone, head):
        model = dtl.Model(copy.deepcopy(backbone), head).train()
        return dtl.gradient_stats(
            [
                torch.autograd.grad(F.cross_entropy(model(x[part]), y[part]), [*model.parameters()])
                for part in order.chunk(2)
            ]
        ).mean_dot

    heads = [dtl.new_head(64, 5, torch.Generator().manual_seed(i), CPU) for i in range(5)]
    before, after = (sum(mean_dot(m.backbone, h) for h in heads) for m in (world[2], student))
    assert after < 0.5 * before


def test_source_images_are_distilled_in_fresh_methods_alone(world, monkeypatch):
    """And it does something there."""
    calls = spy(monkeypatch, "distillation", lambda student, teacher, *_: (len(student), student.shape[1]))
    for method, expected in (
        ("finetune", [(8, 4)]),
        ("gc", [(8, 4)]),
        ("distill-fresh", [(8, 4), (16, 4)]),
        ("gc-fresh", [(8, 4), (16, 4)]),
    ):
        calls.clear()
        whole = dispose(world, method, 2)
        assert calls == expected * 2, method
    whole, distillation = dispose(world, "distill-fresh", 2), dtl.distillation
    monkeypatch.setattr(
        dtl, "distillation", lambda student, *a: distillation(student, *a) * (len(student) == 8)
    )
    assert not same(tensors(whole), tensors(dispose(world, "distill-fresh", 2)))


def test_retaining_is_distillation_from_the_transferred_model(world, monkeypatch):
    """On target images, at a temperature above one; the teacher is in evaluation mode and stays as it was."""
    seen = spy(monkeypatch, "distillation", everything)
    batches, batch = [], dtl.batch
    monkeypatch.setattr(dtl, "batch", lambda *a: batches.append(batch(*a)) or batches[-1])
    dispose(world, "finetune", 1)
    ((args, kwargs),) = seen
    assert torch.equal(args[1], copy.deepcopy(world[2]).eval()(batches[0][0]))
    temperature = args[2] if len(args) > 2 else kwargs["temperature"]
    assert temperature > 1


def test_source_head_and_stranger_of_the_rivals(world):
    """A rival's logits are those of the source head; `transferred` gives the transferred model's, `stranger`
    not."""
    seen = []

    def forget(logits, labels, transferred, stranger, generator):
        seen.append((logits.detach(), labels, transferred(), stranger()))
        return logits.sum() * 0

    still = dispose(world, dtl.Method(forget), 1, lr=0.0)
    ((logits, labels, before, other),) = seen
    assert logits.shape == before.shape == other.shape == (16, 5) and len(labels) == 16
    assert not torch.allclose(before, other) and not before.requires_grad and not other.requires_grad
    assert same_weights(still, world[2])


# ---------------------------------------- the rivals

LOGITS = torch.tensor([[8.0, 0, 0], [0, 8, 0], [0, 0, 0]])
LABELS = torch.tensor([0, 0, 1])


def forget(method, logits=LOGITS, other=None, labels=LABELS):
    logits = logits.clone().requires_grad_()
    other = torch.zeros_like(logits) if other is None else other
    loss = dtl.METHODS[method].forget(
        logits, labels, lambda: other, lambda: other, torch.Generator().manual_seed(0)
    )
    return loss, torch.autograd.grad(loss, logits)[0]


def test_negative_gradient_is_bounded():
    loss, gradient = forget("neggrad")
    assert loss.item() >= -math.log(3) - 1e-6
    assert gradient[0, 0] > 0  # still right about this image
    assert gradient[1].abs().max() == 0  # wrong beyond guessing already: no push


def test_scrub_is_bounded_and_pushes_away_from_the_transferred_model():
    loss, gradient = forget("scrub", other=torch.tensor([[9.0, 0, 0], [0, 0, 80.0], [0, 0, 0]]))
    assert loss.item() >= -math.log(3)
    assert gradient[0, 0] > 0 and gradient[1].abs().max() == 0


def test_uniform_labels_is_least_at_uniform():
    loss, gradient = forget("uniform", torch.zeros(3, 3))
    assert loss.item() == pytest.approx(0, abs=1e-6) and gradient.abs().max() < 1e-6
    assert forget("uniform")[0] > 1


def test_bad_teacher_is_least_at_the_stranger():
    assert forget("bad-teacher", other=LOGITS)[0].item() == pytest.approx(0, abs=1e-6)
    other = LOGITS.roll(1, 1) / 3  # KL(stranger || student), the mean over images
    expected = F.kl_div(LOGITS.log_softmax(1), other.softmax(1), reduction="batchmean")
    assert forget("bad-teacher", other=other)[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_random_labels_ignores_the_labels():
    assert forget("random-labels")[0].item() == forget("random-labels", labels=2 - LABELS)[0].item()


def test_distillation_is_kl_times_temperature_squared():
    student, teacher = (
        torch.randn(4, 5, generator=torch.Generator().manual_seed(1)),
        torch.arange(20.0).view(4, 5),
    )
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    assert dtl.distillation(student, teacher, 3.0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_published_methods():
    """What a name means does not change unnoticed: which forget loss, long, fresh, with source answers."""
    plain, fresh = (False, False, False), (True, True, True)
    assert {n: (m.forget and m.forget.__name__, m.long, m.fresh, m.distill) for n, m in dtl.METHODS.items()} == {
        "finetune": (None, *plain), "neggrad": ("negative_gradient", *plain),
        "random-labels": ("random_labels", *plain), "uniform": ("uniform_labels", *plain),
        "bad-teacher": ("bad_teacher", *plain), "scrub": ("scrub", *plain),
        "gc": ("gradient_collision", *plain), "finetune-long": (None, True, False, False),
        "gc-long": ("gradient_collision", True, False, True), "distill-target": (None, True, True, False),
        "distill-fresh": (None, *fresh), "random-labels-fresh": ("random_labels", *fresh),
        "uniform-fresh": ("uniform_labels", *fresh), "gradient-norm-fresh": ("gradient_norm", *fresh),
        "gc-fresh": ("gradient_collision", *fresh)}  # fmt: skip
    assert {name for name, m in dtl.METHODS.items() if m.weight_decay != 5e-4} == {"finetune-long"}
    assert {name for pair in dtl.PAIRS for name in pair} <= {*dtl.METHODS}


def test_gradient_norm_is_the_squared_norm_of_the_whole_batchs_gradient(world):
    """And adds weight times its gradient, through the backbone and the head in use."""
    backbone, head = (copy.deepcopy(m).double() for m in (world[2].backbone, world[3]))
    x, y = dtl.batch(world[0], dtl.batch_index(world[0], 6, 0, 7), "none", torch.Generator())
    params = [*backbone.parameters(), *head.parameters()]
    grads = torch.autograd.grad(F.cross_entropy(head(backbone(x.double())), y), params, create_graph=True)
    norm = sum((g * g).sum() for g in grads)
    expected = torch.autograd.grad(norm, params)
    value = dtl.gradient_norm(backbone, head, x.double(), y, "cos", 4, 0.5)
    assert value.item() == pytest.approx(norm.item(), rel=1e-9)
    for p, e in zip(params, expected):
        assert torch.allclose(p.grad, 0.5 * e, rtol=1e-6, atol=1e-9 * norm.item())


@pytest.mark.parametrize("n", [2, 3])
def test_the_gradient_norm_is_gc_and_the_chunks_own_norms(world, n):
    """|mean g|^2 = (1 - 1/n) GC + mean |g_i|^2 / n: what GC by inner products leaves out is the noise alone.
    With BatchNorm's running statistics, since chunks by themselves have other means than their batch."""
    backbone, head = (copy.deepcopy(m).double().eval() for m in (world[2].backbone, world[3]))
    x, y = dtl.batch(world[0], dtl.batch_index(world[0], 6, 0, 7), "none", torch.Generator())
    params, x = [*backbone.parameters(), *head.parameters()], x.double()
    chunks = zip(x.chunk(n), y.chunk(n))
    grads = [torch.autograd.grad(F.cross_entropy(head(backbone(x)), y), params) for x, y in chunks]
    noise = sum((g * g).sum() for chunk in grads for g in chunk) / n
    gc = dtl.gradient_collision(backbone, head, x, y, "dot", n, 0.0)
    norm = dtl.gradient_norm(backbone, head, x, y, "dot", n, 0.0)
    assert norm.item() == pytest.approx(((1 - 1 / n) * gc + noise / n).item(), rel=1e-9)
    assert abs(gc) > 1e-3 * norm and noise > 1e-3 * norm


@pytest.mark.parametrize("method", ["uniform", "uniform-fresh", "gc", "gc-long"])
def test_the_weight_rises_over_half_of_a_long_disposal(world, monkeypatch, method):
    """And is there from the beginning of a short one."""
    seen = []
    if method.startswith("gc"):
        original = dtl.gradient_collision
        fake = lambda *a: seen.append(a[-1]) or original(*a)  # noqa: E731
        monkeypatch.setattr(dtl, "gradient_collision", fake)
        entry = replace(dtl.METHODS[method], forget=fake)
    else:

        def counted(logits, *rest):
            value = logits.square().sum()
            value.register_hook(lambda g: seen.append(g.item()))
            return value

        entry = replace(dtl.METHODS[method], forget=counted)
    monkeypatch.setitem(dtl.METHODS, "tried", entry)
    dispose(world, "tried", 4, weight=1.0)
    assert seen == pytest.approx([0.5, 1, 1, 1] if entry.long else [1, 1, 1, 1])


@pytest.mark.parametrize("method", ["uniform", "gc-long", "distill-target", "distill-fresh", "gc-fresh"])
def test_source_answers_are_retained_where_the_method_says_so(world, monkeypatch, method):
    """The transferred model's, on source images: 16 of them a step, beside 8 target images."""
    sizes = spy(monkeypatch, "distillation", lambda student, teacher, t=1.0: (len(student), t))
    dispose(world, method, 2)
    of_source = [size for size in sizes if size != sizes[0]]
    assert len(of_source) == (2 if dtl.METHODS[method].distill else 0)
    assert {t for _, t in sizes} == {dtl.TEMPERATURE}


# ---------------------------------------- the attackers


def attacked(monkeypatch, backbone, task, attacker, seed=7, plan=None):
    """What an attack trained: the model before and after, on what data, how; and what it returned."""
    phases, fit = [], dtl.fit

    def watched(model, data, schedule, seed, progress):
        before = copy.deepcopy(model)
        fit(model, data, schedule, seed, progress)
        phases.append((before, copy.deepcopy(model), data, schedule, seed))
        return model

    with monkeypatch.context() as patch:
        patch.setattr(dtl, "fit", watched)
        result = dtl.piggyback(backbone, task, attacker, plan or schedule(4, 0.05), seed, dtl.Progress())
    assert len(phases) == (not attacker.ridge)
    return phases[0] if phases else None, result


@pytest.mark.parametrize("attacker", dtl.ATTACKERS.values(), ids=dtl.ATTACKERS)
def test_an_attack_leaves_its_victim_alone_and_is_reproducible(world, monkeypatch, attacker):
    backbone, before = world[2].backbone, tensors(world[2].backbone)
    phase, (right, cosine) = attacked(monkeypatch, backbone, world[0], attacker)
    assert same(before, tensors(backbone)) and all(p.requires_grad for p in backbone.parameters())
    again = attacked(monkeypatch, backbone, world[0], attacker)[1]
    assert torch.equal(right, again[0]) and cosine == again[1] and -1 <= cosine <= 1
    assert right.dtype == torch.bool and right.shape == world[0].y_test.shape
    if phase:
        assert torch.equal(right, dtl.hits(phase[1], world[0]))  # of what it ended with


def test_an_attacker_trains_on_all_the_data_it_is_given(world, monkeypatch):
    """No part is held out: every image, on the schedule and seed that was given."""
    plan = dtl.Schedule(5, 0.03, 8, "crop")
    (_, _, data, used, seed), _ = attacked(monkeypatch, world[2].backbone, world[0], dtl.Attacker(), 9, plan)
    assert torch.equal(data.x, world[0].x) and torch.equal(data.y, world[0].y) and used is plan and seed == 9
    monkeypatch.setattr(dtl, "augmented", lambda images, how, generator: images)
    steps = [dtl.batch(data, dtl.batch_index(data, 8, k, seed), "none", torch.Generator())[0] for k in range(5)]
    assert len({i.numpy().tobytes() for x in steps for i in x}) == 40  # an epoch of 5 steps has all 40 images


def test_few_images_a_class(world, monkeypatch):
    (_, _, data, _, _), _ = attacked(monkeypatch, world[2].backbone, world[0], dtl.Attacker(per_class=3))
    assert data.y.bincount().tolist() == [3] * 5
    for x, y in zip(data.x, data.y):
        assert any(torch.equal(x, other) for other in world[0].x[world[0].y == y])
    assert torch.equal(data.x_test, world[0].x_test)
    (_, _, data, _, _), _ = attacked(monkeypatch, world[2].backbone, world[0], dtl.Attacker(per_class=99))
    assert len(data.y) == 40


def test_filters_are_rescaled_before_training(world, monkeypatch):
    """Each to the standard deviation of a new one; one of zeros stays, and so does BatchNorm."""
    backbone = copy.deepcopy(world[2].backbone)
    with torch.no_grad():
        backbone.blocks[2].conv2.weight[3] = 0
        backbone.blocks[1].conv1.weight.mul_(1e-4)
    (plain, *_), _ = attacked(monkeypatch, backbone, world[0], dtl.Attacker())
    (rescaled, *_), _ = attacked(monkeypatch, backbone, world[0], dtl.Attacker(rescaled=True))
    assert same_weights(plain.backbone, backbone)
    for old, new in zip(backbone.parameters(), rescaled.backbone.parameters()):
        if old.dim() == 4:
            spread, live = new.std((1, 2, 3)), old.std((1, 2, 3)) > 0
            assert torch.allclose(spread[live], torch.tensor((2 / old[0].numel()) ** 0.5), rtol=1e-4)
            assert torch.equal(new[~live], old[~live])
            assert torch.allclose(F.cosine_similarity(old.flatten(1), new.flatten(1))[live], torch.ones(1))
        else:
            assert torch.equal(old, new)


def test_a_gentle_attack_mixes_images_and_their_labels_alike(world, monkeypatch):
    """Each image with the one at the other end of the batch, and the loss in the same proportion."""
    task, inputs, seen = world[0], [], spy(monkeypatch, "batch", everything)
    model = copy.deepcopy(world[2])
    model.head = dtl.new_head(64, 5, 1, CPU)
    model.register_forward_pre_hook(lambda m, args: inputs.append(args[0].detach().clone()))
    losses = []
    original = torch.lerp
    monkeypatch.setattr(torch, "lerp", lambda *a: losses.append(a) or original(*a))
    plan = dtl.Schedule(1, 0.05, 8, "none", gentle=True)
    dtl.fit(model, task, plan, 7, dtl.Progress())
    x, y = dtl.batch(task, dtl.batch_index(task, 8, 0, 7), "none", torch.Generator())
    (other, own, share_of_own), (mixed,) = losses[0], inputs
    assert seen and torch.allclose(
        mixed, share_of_own[:, None, None, None] * x + (1 - share_of_own)[:, None, None, None] * x.flip(0)
    )
    assert 0 < share_of_own.min() < 0.5 < share_of_own.max() < 1
    fresh = copy.deepcopy(world[2])
    fresh.head = dtl.new_head(64, 5, 1, CPU)
    logits = fresh.train()(mixed)
    for found, labels in ((own, y), (other, y.flip(0))):
        p = F.one_hot(labels, 5) * 0.9 + 0.1 / 5
        assert torch.allclose(found, -(p * logits.log_softmax(1)).sum(1), atol=1e-5)


def test_a_gentle_attacks_learning_rate_falls_towards_the_input(world):
    """In one step with plain SGD's momentum at rest, each weight moves by its share of the rate."""
    rates = []
    original = torch.optim.SGD.step

    def step(optimizer, *args, **kwargs):
        rates.append([group["lr"] for group in optimizer.param_groups for _ in group["params"]])
        return original(optimizer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", step)
        for gentle in (True, False):
            model = copy.deepcopy(world[2])
            dtl.fit(model, world[1], dtl.Schedule(1, 0.05, 8, gentle=gentle), 7, dtl.Progress())
    falling, flat = rates
    peak = dtl.Schedule(1, 0.05, 8).lr_at(0)
    assert falling == sorted(falling) and falling[-1] == flat[0] == peak and len({*flat}) == 1
    assert falling[0] == pytest.approx(peak / len(falling))


@pytest.mark.parametrize("decay", [5e-4, 0.25])
def test_weight_decay_is_the_schedules(world, decay):
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        original = torch.optim.SGD.__init__
        patch.setattr(torch.optim.SGD, "__init__", lambda self, *a, **k: seen.append(k) or original(self, *a, **k))
        plan = dtl.Schedule(1, 0.05, 8, weight_decay=decay)
        dtl.fit(copy.deepcopy(world[2]), world[1], plan, 7, dtl.Progress())
    assert seen[0]["weight_decay"] == decay


def test_ridge_reads_what_a_frozen_backbone_knows(learned, monkeypatch):
    """Nothing is trained; what separates the classes is found; and running statistics that would ruin it do
    not: they are those of the attacker's images."""
    source, _, pretrained, _ = learned
    ruined = copy.deepcopy(pretrained.backbone)
    for norm in (m for m in ruined.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean += 1e4
    before = tensors(ruined)
    right, _ = attacked(monkeypatch, ruined, source, dtl.Attacker(ridge=True))[1]
    assert right.double().mean() > 0.9 and same(before, tensors(ruined))
    shuffled = replace(source, y=source.y[torch.randperm(len(source.y))])
    assert dtl.ridge_regression(copy.deepcopy(ruined), shuffled).double().mean() < 0.75


def test_ridge_regression_is_that_of_its_best_penalty(world):
    """By a least-squares solver, on features standardised by the attacker's images."""
    task, backbone = world[0], copy.deepcopy(world[2].backbone)
    for norm in (m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = None  # of one batch: its own statistics
        norm.reset_running_stats()
    with torch.no_grad():
        backbone.train()(dtl.normalise(task.x))
        known, seen = (backbone.eval().every_layer(dtl.normalise(x)).double() for x in (task.x, task.x_test))
    seen, known = ((x - known.mean(0)) / (known.std(0) + 1e-6) for x in (seen, known))
    y, answers = F.one_hot(task.y, 5).double(), []
    for penalty in (0.01, 0.1, 1.0, 10.0):
        shrink = (penalty * len(known)) ** 0.5 * torch.eye(known.shape[1], dtype=torch.float64)
        system, wanted = torch.cat([known, shrink]), torch.cat([y - y.mean(0), torch.zeros(len(shrink), 5)])
        answers.append((seen @ torch.linalg.lstsq(system, wanted).solution + y.mean(0)).argmax(1))
    assert len({tuple(a.tolist()) for a in answers}) == 4
    for answer in answers:  # were this one right about every image, it would be the best
        assert dtl.ridge_regression(copy.deepcopy(world[2].backbone), replace(task, y_test=answer)).all()


@pytest.mark.parametrize("network, sides, weights", [  # stem and blocks; ResNet-18 as published, without head
    ("resnet8", [16, 16, 8, 4], 77392), ("resnet8-wide", [16, 16, 8, 4], 307360),
    ("resnet18", [16, 16, 16, 8, 8, 4, 4, 2, 2], 11168832),
])  # fmt: skip
def test_networks_are_residual_and_halve_the_image_at_each_stage(network, sides, weights):
    backbone = dtl.new_backbone(network, 3, CPU).eval()
    assert sum(p.numel() for p in backbone.parameters()) == weights
    x, seen = torch.randn(2, 3, 16, 16), []
    for norm in (m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
    maps = backbone.stem(x)
    assert torch.equal(maps, F.relu(backbone.stem[1](backbone.stem[0](x))))
    for block in backbone.blocks:
        seen.append(maps.shape[-1])
        inner = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(maps)))))
        maps, before = block(maps), maps
        assert torch.equal(maps, F.relu(inner + block.shortcut(before)))
        assert isinstance(block.shortcut, nn.Identity) == (before.shape == maps.shape)
    assert [*seen, maps.shape[-1]] == sides
    assert torch.equal(backbone(x), maps.mean((2, 3))) and backbone(x).shape == (2, backbone.features)


def test_every_layer_is_read(world):
    x = torch.randn(3, 3, 16, 16)
    found = world[2].backbone.eval().every_layer(x)
    assert found.shape == (3, 4 * (16 + 16 + 32 + 64))
    last = found[:, -4 * 64 :].reshape(3, 64, 4).mean(2)
    assert torch.allclose(last, world[2].backbone(x), atol=1e-5)


def test_the_head_of_an_attack_is_new_by_seed_and_the_same_for_every_model(world, monkeypatch):
    backbones = world[2].backbone, dtl.new_backbone("resnet8", 8, CPU)
    (a, b), other = (
        [attacked(monkeypatch, m, world[0], dtl.Attacker(), seed)[0][0].head.weight for m in backbones]
        for seed in (7, 8)
    )
    assert torch.equal(a, b) and not torch.equal(a, other[0]) and a.shape == (5, 64)


def test_mean_cosine_is_that_of_the_first_step(world, monkeypatch):
    """Of chunk gradients of the attacker's first batch, through the victim's backbone and the attacker's new
    head."""
    x, y = dtl.batch(world[0], dtl.batch_index(world[0], 8, 0, 7), "none", torch.Generator())
    (before, *_), (_, cosine) = attacked(
        monkeypatch, world[2].backbone, world[0], dtl.Attacker(), plan=dtl.Schedule(2, 0.05, 8, "none")
    )
    expected = dtl.chunk_statistics(before.train(), x, y)
    assert cosine == pytest.approx(expected["mean_cosine"], abs=1e-6)


def test_chunk_statistics_are_those_of_the_chunks(world):
    model = dtl.Model(world[2].backbone, world[3]).train()
    x, y = dtl.batch(world[0], dtl.batch_index(world[0], 12, 0, 7), "none", torch.Generator())
    before = tensors(model)
    found = dtl.chunk_statistics(model, x, y, 3)
    assert same(before, tensors(model))
    flat = [
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(
                    F.cross_entropy(model(x[i : i + 4]), y[i : i + 4]), [*model.parameters()]
                )
            ]
        )
        for i in (0, 4, 8)
    ]
    cosines = [
        F.cosine_similarity(a.double(), b.double(), 0).item() for a, b in itertools.combinations(flat, 2)
    ]
    assert found["mean_cosine"] == pytest.approx(sum(cosines) / 3, abs=1e-5)
    assert found["collision_rate"] == pytest.approx(sum(c < 0 for c in cosines) / 3)


def test_the_published_attackers():
    """The fixed one comes first, no two are the same, and the small set is a part of the whole."""
    names = [*dtl.ATTACKERS]
    assert names[0] == "fixed" and len(set(dtl.ATTACKERS.values())) == len(names)
    assert (
        dtl.ATTACKERS["fixed"] == dtl.Attacker() and set(dtl.SMALL) < set(names) and dtl.SMALL[0] == "fixed"
    )
    assert len(names) == 10 and len(dtl.SMALL) == 5
    assert {n: a.times for n, a in dtl.ATTACKERS.items() if a.times != 5} == dict(
        fixed=1, longer=20, gentle=20, ridge=0
    )
    assert {n for n, a in dtl.ATTACKERS.items() if a.gentle or a.rescaled or a.ridge} == {"gentle", "rescaled", "ridge"}
    assert {n: a.per_class for n, a in dtl.ATTACKERS.items() if a.per_class} == dict(few=10)
    assert dtl.ATTACKERS["adamw"].optimizer == "adamw"
    rates = [dtl.ATTACKERS[name].lr for name in ("low", "long", "high")]
    assert sorted(set(rates)) == rates


# ---------------------------------------- what a run passes on to its stages


STAGE_OF = dict(
    pretrained="pretrain",
    scratch="pretrain",
    oracle="pretrain",
    transferred="transfer",
    **{f"disposed:{m}": "dispose" for m in dtl.METHODS},
)


class Passed(Exception):
    pass


@pytest.fixture
def passed(monkeypatch, new_run):
    """passed(name, seed, **settings) -> what the stage that makes that model is called with, by argument
    name."""
    import inspect

    def call(name, seed=0, **given):
        run, stage = new_run(seed=seed, **given), STAGE_OF[name]
        seen = {}

        def catch(*args, **kwargs):
            seen.update(inspect.signature(original).bind(*args, **kwargs).arguments)
            raise Passed

        original = getattr(dtl, stage)
        with monkeypatch.context() as patch:
            if stage != "pretrain":
                head = dtl.new_head(64, 3, 0, CPU)
                made = {
                    m: dtl.Model(dtl.new_backbone("resnet8", k, CPU), head)
                    for k, m in enumerate(("pretrained", "transferred"))
                }
                real = run.model
                patch.setattr(run, "model", lambda m: real(m) if m == name else made[m], raising=False)
                seen["made"] = made
            patch.setattr(dtl, stage, catch)
            with pytest.raises(Passed):
                run.model(name)
        return run, seen

    return call


def test_every_stage_gets_its_own_settings(passed):
    given = dict(
        pretrain_steps=11,
        pretrain_lr=0.11,
        transfer_steps=12,
        transfer_lr=0.12,
        dispose_steps=13,
        dispose_lr=0.13,
        fresh_steps=14,
        fresh_lr=0.14,
        batch_size=6,
        augment="crop",
    )
    for name, (steps, lr) in {
        "pretrained": (11, 0.11), "transferred": (12, 0.12), "disposed:uniform": (13, 0.13),
        "disposed:gc": (13, 0.13),
        "scratch": (14, 0.14), "oracle": (14, 0.14), "disposed:gc-fresh": (14, 0.14),
        "disposed:distill-fresh": (14, 0.14), "disposed:gc-long": (14, 0.13), "disposed:finetune-long": (14, 0.13),
    }.items():  # fmt: skip
        _, seen = passed(name, **given)
        decay = {"weight_decay": 5e-3} if name == "disposed:finetune-long" else {}
        assert seen["schedule"] == dtl.Schedule(steps, lr, 6, "crop", **decay), name


def test_every_stage_gets_its_tasks_and_models(passed):
    for name, task in (("pretrained", "source"), ("scratch", "target"), ("oracle", "oracle")):
        run, seen = passed(name)
        assert seen["source"] is run.task(task) and seen["network"] == "resnet8"
    assert run.task("oracle").y.bincount().tolist() == [6, 6] and run.task(
        "target"
    ).y.bincount().tolist() == [4, 4]
    run, seen = passed("transferred")
    assert seen["pretrained"] is seen["made"]["pretrained"] and seen["target"] is run.task("target")
    run, seen = passed(
        "disposed:gc", weights="gc=17", similarity="cos", gc_head="source", chunks=3, chunk_size=5
    )
    assert seen["transferred"] is seen["made"]["transferred"]
    assert seen["source_head"] is seen["made"]["pretrained"].head
    assert seen["source"] is run.task("source") and seen["target"] is run.task("target")
    assert seen["method"] is dtl.METHODS["gc"] and seen["weight"] == 17
    assert (seen["similarity"], seen["gc_head"], seen["chunks"], seen["chunk_size"]) == (
        "cos",
        "source",
        3,
        5,
    )
    for method in ("uniform", "gc-fresh"):
        _, seen = passed(f"disposed:{method}", weights="gc=17")
        assert seen["method"] is dtl.METHODS[method] and seen["weight"] == dtl.METHODS[method].weight


def test_two_stages_do_not_share_a_seed_nor_two_seeds_a_stage(passed):
    seeds = {
        (name, seed): passed(name, seed)[1]["seed"]
        for seed in (0, 1)
        for name in ("pretrained", "scratch", "transferred", "disposed:gc")
    }
    assert len(set(seeds.values())) == 8
    assert (
        passed("disposed:uniform")[1]["seed"] == seeds["disposed:gc", 0]
    )  # what is compared has the same batches
    assert passed("oracle")[1]["seed"] == seeds["scratch", 0]


def attack_passed(monkeypatch, run, attacker, attacker_seed=0, task="downstream", model="random"):
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(
            dtl,
            "piggyback",
            lambda backbone, task, how, plan, seed, progress: (
                seen.append((backbone, task, how, plan, seed)) or (torch.arange(4) % 2 == 0, 0.0)
            ),
        )
        record = run.measure(model, "pl_accuracy", task, attacker, attacker_seed)
    assert (
        record["attacker"] == attacker and record["attacker_seed"] == attacker_seed and record["value"] == 0.5
    )
    return seen[0]


@pytest.mark.parametrize("attacker", dtl.ATTACKERS)
def test_every_attacker_gets_what_its_fields_say(monkeypatch, new_run, attacker):
    run, how = new_run(attack_steps=3, batch_size=6, augment="crop"), dtl.ATTACKERS[attacker]
    backbone, task, passed_on, plan, _ = attack_passed(monkeypatch, run, attacker)
    assert passed_on is how and task is run.task("downstream") and backbone is run.model("random").backbone
    assert plan == dtl.Schedule(3 * how.times, how.lr, 6, "crop", optimizer=how.optimizer, gentle=how.gentle)


def test_attack_seeds(monkeypatch, new_run):
    """By seed, task and attacker seed; the same for every attacker and model."""
    runs = [new_run(seed=0), new_run("other", seed=1)]
    seeds = {
        (r.seed, task, s): attack_passed(monkeypatch, r, "fixed", s, task)[-1]
        for r in runs
        for task in dtl.PIGGYBACK_TASKS
        for s in (0, 1)
    }
    assert len(set(seeds.values())) == 8
    assert attack_passed(monkeypatch, runs[0], "long")[-1] == seeds[0, "downstream", 0]
    monkeypatch.setattr(
        dtl,
        "pretrain",
        lambda *a: dtl.Model(dtl.new_backbone("resnet8", 3, CPU), dtl.new_head(64, 2, 0, CPU)),
    )
    found = attack_passed(monkeypatch, runs[0], "fixed", model="scratch")
    assert found[-1] == seeds[0, "downstream", 0] and found[0] is runs[0].model("scratch").backbone


def test_accuracies_are_measured_through_the_models_own_head(monkeypatch, new_run):
    """The pretrained model's on the source task, the others' on the target task."""
    run = new_run(pretrain_steps=1, transfer_steps=1)
    seen = spy(monkeypatch, "hits", lambda model, task: (model, task))
    run.measure("pretrained", "source_accuracy")
    run.measure("transferred", "target_accuracy")
    (first, source), (second, target) = seen
    assert first is run.model("pretrained") and source is run.task("source") and first.head.out_features == 3
    assert (
        second is run.model("transferred") and target is run.task("target") and second.head.out_features == 2
    )


# ---------------------------------------- BatchNorm's own statistics


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
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    with dtl.running_statistics_kept(model):
        with dtl.running_statistics_kept(model):
            pass
        model(torch.randn(4, 3) + 5)
    assert not model[0].running_mean.any() and [m.track_running_stats for m in model] == [True, False]
    model(torch.randn(4, 3) + 5)
    assert model[0].running_mean.all()
