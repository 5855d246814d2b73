"""The Gradient Collision loss: against brute force; its properties, what it refuses."""

import itertools
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dtl

SIMILARITIES = ("dot", "cos")
SYNCHRONISING = set(
    "_local_scalar_dense item is_nonzero equal allclose nonzero nonzero_numpy masked_select "
    "_unique _unique2 unique_dim unique_consecutive bincount repeat_interleave".split()
)


def collision(losses, params, **how):
    """Of callables, each of which computes a chunk's loss."""
    return dtl.gradient_collision_loss([f() for f in losses], params, **how)


each_similarity = pytest.mark.parametrize("similarity", SIMILARITIES)
seeds, few = st.integers(0, 2**31), st.integers(2, 7)


def evaluate(losses, params, similarity="dot"):
    """The value of the loss, and its gradient."""
    value = collision(losses, params, similarity=similarity)
    assert value.shape == () and value.requires_grad
    return value.detach(), gradient(value, params)


def brute_force(losses, params, similarity):
    """The definition, a double loop over pairs of flat gradients."""
    flat = []
    for loss in losses:
        flat.append(torch.cat([g.reshape(-1) for g in gradient(loss, params, create_graph=True)]))
    values = []
    for a, b in itertools.combinations(flat, 2):
        values.append(a @ b if similarity == "dot" else (a @ b) / (a.norm() * b.norm()))
    return sum(values) / len(values)


def double_loop(losses, params, similarity="dot"):
    value = brute_force([f() for f in losses], params, similarity)
    return value.detach(), gradient(value, params)


def gradient(value, params, create_graph=False):
    grads = torch.autograd.grad(value, params, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params)]


def distance(a, b):
    """Relative distance of two lists of tensors."""
    difference = sum((x - y).double().square().sum() for x, y in zip(a, b, strict=True)).sqrt()
    return (difference / sum(y.double().square().sum() for y in b).sqrt()).item()


def assert_close(found, expected, tolerance):
    """Two pairs of a value and its gradient."""
    scale = max(abs(expected[0].item()), 1e-3)
    assert abs(found[0].item() - expected[0].item()) <= tolerance * scale
    assert distance(found[1], expected[1]) <= tolerance


def problem(n, seed, dtype=torch.float64, scale=1.0, dropout=0.0, device="cpu"):
    """n chunk losses, as callables, of a small smooth network, and its parameters; none of the
    losses touches the last."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):  # the same numbers in every precision and on every device
        return torch.randn(shape, generator=g, dtype=torch.float64).to(device, dtype)

    params = [(normal(*shape) * 0.7).requires_grad_() for shape in ((5, 4), (5,), (3, 5), (2,))]
    data = [(normal(6, 4), torch.randint(0, 3, (6,), generator=g).to(device)) for _ in range(n)]

    def loss(x, y):
        hidden = F.dropout(torch.tanh(x @ params[0].T + params[1]), dropout)
        return scale * F.cross_entropy(hidden @ params[2].T, y)

    return [lambda x=x, y=y: loss(x, y) for x, y in data], params


def small_resnet(seed, dtype=torch.float32):
    """Four chunk losses of 16 images through the 8-layer ResNet with a head, and the model."""
    backbone = dtl.new_backbone("resnet8", seed, torch.device("cpu"))
    torch.manual_seed(seed)
    model = dtl.Model(backbone, nn.Linear(64, 10)).train().to(dtype)
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(64, 3, 16, 16, generator=g), torch.randint(0, 10, (64,), generator=g)
    parts = zip(x.to(dtype).chunk(4), y.chunk(4))
    logits = lambda x: model.head(model.backbone(x))  # noqa: E731 - model rounds to float32
    return [lambda x=x, y=y: F.cross_entropy(logits(x), y) for x, y in parts], model


# ---- What must be equal ----


@each_similarity
@given(n=few, seed=seeds, scale=st.floats(0.01, 100), order=st.randoms(use_true_random=False))
def test_is_the_double_loop_in_any_order(similarity, n, seed, scale, order):
    losses, params = problem(n, seed, scale=scale)
    value, grads = evaluate(order.sample(losses, n), params, similarity)
    assert value.dtype == torch.float64
    assert_close((value, grads), double_loop(losses, params, similarity), 1e-9)
    assert similarity == "dot" or -1 / (n - 1) - 1e-12 <= value.item() <= 1 + 1e-12


@each_similarity
def test_gradient_is_that_of_central_differences(similarity):
    losses, params = problem(3, 0)
    assert torch.autograd.gradcheck(
        lambda *_: collision(losses, params, similarity=similarity), params
    )


@each_similarity
def test_loss_can_be_differentiated_further(similarity):
    losses, params = problem(2, 0)
    value = lambda *_: collision(losses, params, similarity=similarity)  # noqa: E731
    assert torch.autograd.gradgradcheck(value, params[:3])


class Counting(TorchDispatchMode):
    """Counts the operations that reach a device, by name."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


@each_similarity
def test_the_host_never_waits_for_a_number(similarity):
    losses, model = small_resnet(0)
    with Counting() as count:
        collision(losses, model.parameters(), similarity=similarity).backward()
    with Counting() as probe:
        torch.ones(2).sum().item(), torch.ones(2).nonzero()
    assert SYNCHRONISING & set(probe.seen)  # the mode does see them
    waits = {name: count.seen[name] for name in SYNCHRONISING & set(count.seen)}
    assert count.seen["convolution_backward"] > 0 and not waits
    assert sum(count.seen.values()) < 7500 and count.seen["_to_copy"] <= 20, count.seen


# ---- Properties ----


@pytest.mark.filterwarnings("ignore:some parameters' gradients have no graph")  # they are linear
def test_cos_reaches_both_ends():
    p = torch.ones(2, requires_grad=True)
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([-6.0, -8.0])
    for similarity, other, value in (("cos", a, 1), ("cos", b, -1), ("dot", b, -50)):
        losses = [lambda: p @ a, lambda other=other: p @ other]
        assert collision(losses, [p], similarity=similarity).item() == pytest.approx(value)
    assert collision([lambda: p[0] * 2, lambda: p[1] * 2], [p]).item() == 0


@pytest.mark.parametrize("scale", (1e19, 1e-24))  # whose squares float32 cannot hold
def test_cos_of_huge_and_tiny_float32_gradients(scale):
    expected = double_loop(*problem(3, 11), "cos")
    assert_close(evaluate(*problem(3, 11, torch.float32, scale), "cos"), expected, 1e-4)


@each_similarity
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@given(n=st.integers(2, 5), seed=seeds, scale=st.sampled_from((1e-12, 1e-6, 1.0, 1e6)))
def test_finite_everywhere(similarity, dtype, n, seed, scale):
    losses, params = problem(n, seed, dtype, scale)
    losses[0] = lambda: (params[0].square() * 0).sum()  # touches one parameter, with gradient zero
    value, grads = evaluate(losses, params, similarity)
    assert value.isfinite() and value.dtype == dtype and all(g.isfinite().all() for g in grads)


@each_similarity
@pytest.mark.parametrize("factor", (math.nan, math.inf))
def test_what_is_not_finite_gives_a_value_that_is_not(similarity, factor):
    losses, params = problem(3, 2)
    spoilt = [losses[0], lambda: losses[1]() * factor, losses[2]]
    value, grads = evaluate(spoilt, params, similarity)
    assert not value.isfinite() and not all(g.isfinite().all() for g in grads)


def test_a_zero_chunk_under_cos_counts_as_cosine_zero():
    losses, params = problem(2, 3)
    pair = collision(losses, params, similarity="cos").item()
    losses.append(lambda: (params[0].square() * 0).sum())
    value, grads = evaluate(losses, params, "cos")
    assert value.item() == pytest.approx(pair / 3, rel=1e-12)  # one pair of three is left
    assert max(g.abs().max() for g in grads) > 0


@each_similarity
def test_a_parameter_given_twice_counts_once_and_iterators_do(similarity):
    losses, params = problem(3, 4)
    before, more = [p.detach().clone() for p in params], iter([params[2], *params])
    twice = collision(iter(losses), more, similarity=similarity)
    found = twice.detach(), gradient(twice, params)
    assert_close(found, double_loop(losses, params, similarity), 1e-12)
    assert all(map(torch.equal, before, params))


def test_parameters_of_two_precisions():
    a = torch.tensor([1.0, 2.0], requires_grad=True)
    b = torch.tensor([0.5, 3.0], dtype=torch.float64, requires_grad=True)
    losses = [lambda: (a.double() * b).sum().square(), lambda: (a.double() + b).square().sum()]
    value, grads = evaluate(losses, [a, b], "cos")
    assert [g.dtype for g in grads] == [torch.float32, torch.float64]
    assert_close((value, grads), double_loop(losses, [a, b], "cos"), 1e-6)


def test_a_tensor_that_is_no_leaf():
    """As functional models have them."""
    base, delta = torch.ones(3), torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    weight = base * delta.exp()
    value = collision([lambda: weight.pow(3).sum(), lambda: weight.square().sum()], [weight])
    expected = (6 * delta.exp().pow(3)).sum()  # <3 w^2, 2 w>
    assert value.item() == pytest.approx(expected.item())
    assert torch.allclose(*torch.autograd.grad(value, delta), *torch.autograd.grad(expected, delta))


def test_running_statistics_are_kept_and_the_flag_comes_back():
    untracked = nn.BatchNorm1d(3, track_running_stats=False)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), untracked)
    with pytest.raises(KeyError), dtl.running_statistics_kept(model):
        model(torch.randn(8, 3) + 5)
        raise KeyError
    assert model[1].running_mean.abs().max() == 0 and model[1].num_batches_tracked == 0
    assert model[1].track_running_stats and not model[2].track_running_stats
    model(torch.randn(8, 3) + 5)
    assert model[1].num_batches_tracked == 1


# ---- What is refused ----

P = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
NET, TWIN = nn.Linear(3, 2), nn.Linear(3, 2)
HALF, COMPLEX = (torch.ones(3, dtype=d).requires_grad_() for d in (torch.float16, torch.complex64))
FROZEN = torch.ones(4, 2)


def good():
    return P.square().sum()


def without_graph():
    with torch.no_grad():
        return good()


def inference():
    with torch.inference_mode():
        return good()


KIND = "is not bfloat16, float32 or float64"
TOLD = {
    "one chunk": ([good], [P], "^1 chunks.* 2 "),
    "no chunk": ([], [P], "^0 chunks.* 2 "),
    "no parameters": ([good] * 2, [], r"^0 params: give model.parameters\(\)"),
    "not a scalar": ([good, lambda: P * 2], [P], r"chunk 1's loss must be .*\(\), not \(3,\)"),
    "a number": ([good, lambda: 1.0], [P], "chunk 1's loss must be .* not float"),
    "frozen": (
        [good] * 2,
        [P, FROZEN],
        r"params\[1\] of shape \(4, 2\).* not require grad: .*for p",
    ),
    "float16": ([good] * 2, [P, HALF], rf"params\[1\] of shape \(3,\), torch.float16.* {KIND}"),
    "complex": ([good] * 2, [COMPLEX], rf"params\[0\] .*torch.complex64.* {KIND}"),
    "one tensor": ([good] * 2, P, "touches none of params"),
    "a state dict": ([good] * 2, dict(NET.named_parameters()), r"params\[0\] is a str"),
    "a name": ([good] * 2, "weight", r"params\[0\] is a str"),
    "named parameters": ([good] * 2, [*NET.named_parameters()], r"params\[0\] is a tuple"),
    "another model": (
        [good, lambda: good()],
        [*TWIN.parameters()],
        "chunk 0's loss touches none of params",
    ),
    "no_grad": ([good, without_graph], [P], "chunk 1's loss has no graph: .*no_grad"),
    "inference_mode": ([inference, good], [P], "chunk 0's loss has no graph"),
    "detached": ([good, lambda: good().detach()], [P], "chunk 1's loss has no graph: .*detached"),
}


@pytest.mark.parametrize("name", TOLD)
def test_bad_input_is_told(name):
    losses, params, message = TOLD[name]
    with pytest.raises(ValueError, match=message):
        collision(losses, params)


def test_bad_similarity_is_told_and_options_have_names():
    for similarity in ("cosine", None, 1):
        with pytest.raises(ValueError, match=f"must be 'dot' or 'cos', not {similarity!r}"):
            collision([good, good], [P], similarity=similarity)
    with pytest.raises(TypeError, match="positional"):
        collision([good, good], [P], "cos")


def test_called_under_no_grad_is_told():
    """The losses have graphs, but GC would have none: added to a loss, it would do nothing."""

    def chunk():
        with torch.enable_grad():
            return good()

    with torch.no_grad(), pytest.raises(ValueError, match="no_grad"):
        collision([chunk, chunk], [P])
