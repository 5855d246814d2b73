"""The balance of retaining and forgetting: against plain arithmetic, at its edges, in training."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_gc_loss import SYNCHRONISING, Counting, distance
from torch import nn

import dtl

SIZE = st.floats(-3, 3).map(lambda exponent: 10**exponent)


class Plain:
    """The formulas of Balance's docstring in Python's floats."""

    def __init__(self, allowance, strength=1.0, limits=(0.25, 4.0)):
        self.allowance, self.strength, self.limits = allowance, strength, limits
        self.mean = self.forget_norm = None

    def scale(self, theta, a, b, measured):
        """What the forget gradient is multiplied by, from three norms and a loss."""
        if self.mean is None:
            self.mean, self.forget_norm = measured, b
        else:
            self.mean = 0.9 * self.mean + 0.1 * measured
            self.forget_norm = 0.95 * self.forget_norm + 0.05 * b
        if self.allowance is not None:
            room = min(1.0, max(-1.0, 1 - self.mean / self.allowance))
            strength = self.strength * math.exp(0.02 * room)
            self.strength = min(self.limits[1], max(self.limits[0], strength))
            a = max(a, self.allowance / theta)
        return self.strength * a / max(b, self.forget_norm) if b else 0.0

    def assert_equals(self, balance):
        seen = [balance.strength.item(), balance.mean.item(), balance.forget_norm.item()]
        assert seen == pytest.approx([self.strength, self.mean, self.forget_norm], rel=1e-5)


def leaves(*values, dtype=torch.float64):
    return [torch.tensor(v, dtype=dtype, requires_grad=True) for v in values]


def value_of(value, *terms):
    """A loss of this value, whose gradient by p is g for each (p, g) of terms."""
    return value + sum(((p - p.detach()) * g).sum() for p, g in terms)


def same_bits(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k], equal_nan=True) for k in a)


# ---- Against plain arithmetic ----


@given(
    allowance=SIZE,
    strength=st.floats(0.3, 3),
    limits=st.sampled_from([(0.25, 4.0), (0.98, 1.01)]),
    steps=st.lists(st.tuples(st.integers(0, 2**31), SIZE, SIZE, SIZE), min_size=1, max_size=6),
    apart=st.booleans(),
)
def test_steps_are_those_of_plain_arithmetic(allowance, strength, limits, steps, apart):
    """Of a tensor that both losses reach, one for the retain loss, and one for the forget loss.
    apart: the measured loss is not the retain loss."""
    plain = Plain(allowance, strength, limits)
    balance = dtl.Balance(allowance, strength=strength, limits=limits)
    both, kept, gone = leaves([1.0, -2.0, 2.0], [5.0, 7.0], [9.0])
    for seed, size_a, size_b, measured in steps:
        random = torch.Generator().manual_seed(seed)
        a, b, c, d = torch.randn(4, 3, generator=random).double()
        a, b, c, d = a * size_a, b * size_b, c[:2] * size_a, d[:1] * size_b
        retain = value_of(8.0 if apart else measured, (both, a), (kept, c))
        both.grad, kept.grad, gone.grad = torch.ones(3).double(), None, None
        more = dict(measured=torch.tensor(measured)) if apart else {}
        forget = value_of(-3.0, (both, b), (gone, d))
        balance.backward(retain, forget, iter([both, kept, gone, both]), **more)
        scale = plain.scale(3.0, a.norm().item(), b.norm().item(), measured)
        tolerance = dict(rtol=1e-5, atol=1e-5 * (size_a + scale * size_b))
        assert torch.allclose(both.grad, 1 + a + scale * b, **tolerance)
        assert torch.equal(kept.grad, c) and torch.allclose(gone.grad, scale * d, **tolerance)
        plain.assert_equals(balance)


@pytest.mark.parametrize("measured, limit", [(100.0, 0.25), (0.0, 4.0)])
def test_strength_ends_at_its_limits(measured, limit):
    balance, (p,), seen = dtl.Balance(1.0), leaves([1.0, 2.0]), []
    for _ in range(100):
        balance.backward(value_of(measured, (p, p.detach())), p.sum(), [p])
        seen.append(balance.strength.item())
    assert seen[0] == pytest.approx(math.exp(math.copysign(0.02, limit - 1))) and seen[-1] == limit


def test_equal_limits_hold_the_strength():
    balance, shift = dtl.Balance(1e-9, strength=7.0, limits=(7.0, 7.0)), 7 / 2**0.5
    (p,) = leaves([3.0, 4.0])
    for measured, a in ((0.0, 1.0), (1e6, 1.0), (0.0, 0.0)):
        p.grad = None
        balance.backward(value_of(measured, (p, torch.tensor([a, 0.0]))), p.sum(), [p])
        assert balance.strength == 7 and p.grad.tolist() == pytest.approx(
            [a + a * shift, a * shift], abs=1e-8
        )


def test_a_forget_gradient_of_zero_leaves_the_retain_gradient_alone():
    balance, (p,) = dtl.Balance(1.0), leaves([3.0, 4.0])
    for size in (0.0, 1.0, 0.0):
        p.grad = None
        balance.backward(p.square().sum(), size * p.sum(), [p])
        assert torch.equal(p.grad, 2 * p.detach()) == (size == 0)


# ---- What is not finite, what is refused ----


@pytest.mark.parametrize("earlier", [0, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "spoilt", ["retain", "forget", "measured", "gradient of retain", "gradient of forget"]
)
def test_what_is_not_finite_spoils_the_step_and_not_the_state(spoilt, value, earlier):
    balance, (p, q) = dtl.Balance(1.0), leaves([3.0, 4.0], [5.0])

    def finite_step(spoilt=None):
        losses = dict(retain=(p * q).square().sum(), forget=p.sum(), measured=torch.tensor(0.5))
        if spoilt:
            name, more = spoilt.split()[-1], p * 1.0
            more.register_hook(lambda gradient: gradient * value)  # the loss itself is finite
            losses[name] = losses[name] + (value if spoilt == name else more.sum())
        p.grad = q.grad = None
        balance.backward(losses["retain"], losses["forget"], [p, q], losses["measured"])
        return torch.cat([p.grad, q.grad]).isfinite().all()

    assert all(finite_step() for _ in range(earlier))
    before = copy.deepcopy(balance.state_dict())
    assert not finite_step(spoilt) and same_bits(before, balance.state_dict())
    assert finite_step() and not same_bits(before, balance.state_dict())


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["allowance", "strength", "low", "high"])
def test_numbers_that_are_not_positive_are_refused(name, bad):
    given = dict(allowance=1.0, strength=1.0, low=0.25, high=4.0) | {name: bad}
    limits = given.pop("low"), given.pop("high")
    with pytest.raises(ValueError, match="positive numbers"):
        dtl.Balance(**given, limits=limits)


def test_limits_the_wrong_way_round_and_wrong_parameters_are_refused():
    with pytest.raises(ValueError, match="limits.* 2.0, 1.0"):
        dtl.Balance(1.0, limits=(2.0, 1.0))
    balance, (p, q) = dtl.Balance(1.0), leaves([3.0], [4.0])
    before = copy.deepcopy(balance.state_dict())
    for params, told in (
        ([p * 1], "is no leaf"),
        ([p.detach()], "does not require grad"),
        ([], "0 params"),
        ([p, q], "no parameter is reached by both losses"),
    ):
        with pytest.raises(ValueError, match=told):
            balance.backward(p.square().sum(), q.square().sum(), params)
        assert p.grad is None and q.grad is None and same_bits(before, balance.state_dict())


# ---- As part of a training loop ----


def test_losses_that_share_a_forward():
    body, x, found = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), torch.randn(5, 3), []
    head, other = nn.Linear(4, 2), nn.Linear(4, 3)
    params = [*body.parameters(), *head.parameters()]
    for shared in (True, False):
        hidden = body(x)
        forget = other(hidden if shared else body(x)).square().sum()
        for p in params:
            p.grad = None
        dtl.Balance(1.0).backward(head(hidden).square().sum(), forget, params)
        found.append([p.grad for p in params])
    assert distance(*found) <= 1e-6 and other.weight.grad is None


def test_nothing_waits():
    p = torch.randn(3, requires_grad=True)
    losses = [(p * row).exp().sum() for row in torch.randn(2, 3)]
    forget = dtl.gradient_collision_loss(losses, [p])
    with Counting() as count:
        dtl.Balance(1.0).backward(p.square().sum(), forget, [p])
    assert count.seen["linalg_vector_norm"] == 3 and not SYNCHRONISING & set(count.seen)


def test_state_dict_resumes_exactly(tmp_path):
    def steps(balance, numbers):
        for number in numbers:
            (p,) = leaves([number, 1.0], dtype=torch.float32)
            balance.backward(p.square().sum(), p.pow(3).sum(), [p])
            yield p.grad.tolist()

    balance, resumed = dtl.Balance(2.0), dtl.Balance(2.0)
    assert len(list(steps(balance, [0.1, 0.7, 1.9]))) == 3
    torch.save(balance.state_dict(), tmp_path / "saved")
    resumed.load_state_dict(torch.load(tmp_path / "saved"))
    after = list(steps(balance, [0.3, 2.3]))
    assert after == list(steps(resumed, [0.3, 2.3])) != list(steps(dtl.Balance(2.0), [0.3, 2.3]))
    assert same_bits(balance.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_within_a_module_moved_to_another_precision(dtype):
    model = nn.Module()
    model.p, model.balance = nn.Parameter(torch.tensor([3.0, 4.0])), dtl.Balance(5.0, strength=1.3)
    p, balance = model.to(dtype).p, model.balance
    plain = Plain(5.0, balance.strength.item())
    for measured in (3.0, 3.1, 2.7):
        p.grad = None
        forget = value_of(0.0, (p, torch.tensor([1.0, -1.0], dtype=dtype)))
        balance.backward(value_of(8.0, (p, p.detach())), forget, [p], torch.tensor(measured))
        scale, limit = plain.scale(5.0, 5.0, 2**0.5, measured), 4 * torch.finfo(dtype).eps
        plain.assert_equals(balance)
        assert p.grad.tolist() == pytest.approx([3 + scale, 4 - scale], abs=max(4 * limit, 1e-5))
        assert p.grad.dtype == dtype and all(b.dtype == torch.float32 for b in balance.buffers())


def test_gradients_that_autograd_returns_as_one_tensor_do_not_alias():
    p, q = leaves([1.0, 2.0], [3.0, 4.0])
    one, same = torch.autograd.grad((p + q).sum(), [p, q])
    assert one.data_ptr() == same.data_ptr()  # it does return them so
    dtl.Balance(1.0).backward((p + q).square().sum(), (p + q).sum(), [p, q])
    p.grad.zero_()
    assert q.grad.abs().min() > 0


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_fused_optimiser_steps_rightly_after_channels_last_gradients(channels_last):
    """It takes a gradient to lie in memory as its parameter does."""
    formats, weights = (torch.contiguous_format, torch.channels_last), []
    conv = nn.Conv2d(3, 5, 3).to(memory_format=formats[channels_last])
    x = torch.randn(2, 3, 8, 8).to(memory_format=formats[not channels_last])
    for fused in (True, False):
        model = copy.deepcopy(conv)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
        g = torch.arange(135.0).view(5, 3, 3, 3).to(memory_format=formats[not channels_last])
        retain = model(x).square().mean() + value_of(0.0, (model.weight, g))
        dtl.Balance(1.0).backward(retain, model(x).exp().mean(), model.parameters())
        assert model.weight.grad.stride() == model.weight.stride()
        optimizer.step()
        weights.append(model.weight.detach())
    assert torch.allclose(*weights, rtol=1e-5)


def network_with_layer_norm():
    tokens = nn.Conv2d(3, 16, 4, 4), nn.Flatten(2), nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU()
    return nn.Sequential(*tokens, nn.Flatten(), nn.Linear(512, 64), nn.LayerNorm(64), nn.GELU())


def forget_in_training(backbone, balance, steps, lr, distil=False):
    """Retain losses by step; GC before and after, the mean over four heads; the relative change
    of the weights. The source has ten classes of noise about an image each."""
    t, y, source_y = nn.Linear(64, 5), torch.arange(32) % 5, torch.arange(128) % 10
    x = torch.randn(32, 3, 16, 16)
    source_x = torch.randn(10, 3, 16, 16)[source_y] + torch.randn(128, 3, 16, 16)
    params, retained = [*backbone.parameters(), *t.parameters()], []
    start, teacher = [p.detach().clone() for p in params], t(backbone(x)).detach().log_softmax(1)
    optimizer = torch.optim.SGD(params, lr, momentum=0.9)
    heads = [nn.Linear(64, 10) for _ in range(4)]

    def collision(head):
        chunks = zip(source_x.chunk(4), source_y.chunk(4))
        losses = [F.cross_entropy(head(backbone(a)), b) for a, b in chunks]
        return dtl.gradient_collision_loss(losses, backbone.parameters())

    before = [collision(head).item() for head in heads]
    for _ in range(steps):
        optimizer.zero_grad()
        answers = t(backbone(x))
        kept = F.kl_div(answers.log_softmax(1), teacher, log_target=True, reduction="batchmean")
        retain = kept if distil else F.cross_entropy(answers, y)
        balance.backward(retain, collision(nn.Linear(64, 10)), params)
        optimizer.step()
        retained.append(retain.item())
    after = [collision(head).item() for head in heads]
    return retained, np.mean(before), np.mean(after), distance(params, start)


@pytest.mark.parametrize("strength, limits", [(1, (1, 1)), (2, (2, 2)), (1, (0.25, 4))])
def test_a_residual_network_learns_and_forgets(strength, limits):
    balance = dtl.Balance(1.0, strength=strength, limits=limits)
    network = dtl.new_backbone("resnet8", 0, "cpu")
    retained, before, after, change = forget_in_training(network, balance, 30, 0.03)
    assert retained[-1] < 0.1 * retained[0] and max(retained) < 1.2 * retained[0]
    assert before > 0 and after < 0.7 * before and change < 0.5


def test_forgetting_starts_from_a_retain_loss_of_zero():
    network, balance = network_with_layer_norm(), dtl.Balance(1.0)
    retained, before, after, change = forget_in_training(network, balance, 60, 0.05, distil=True)
    assert retained[0] == 0 and max(retained) < 0.1
    assert before > 0 and after < 0.4 * before and 0.01 < change < 0.5
