"""The Gradient Collision loss: against brute force, between its two forms, and what must hold of it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import dtl

SIMILARITIES = ("dot", "cos")


def brute_force(losses, params, similarity):
    """The definition, a double loop over pairs of flat gradients."""
    flat = []
    for loss in losses:
        grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        flat.append(torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(grads, params)]))
    values = []
    for a, b in itertools.combinations(flat, 2):
        values.append(a @ b if similarity == "dot" else (a @ b) / (a.norm() * b.norm()))
    return sum(values) / len(values)


def problem(n, seed, dtype=torch.float64, scale=1.0):
    """n chunk losses, as callables, of a small smooth network with a parameter none of them touches."""
    g = torch.Generator().manual_seed(seed)
    params = [(torch.randn(s, generator=g, dtype=dtype) * 0.7).requires_grad_() for s in ((5, 4), (5,), (3, 5), (2,))]
    data = [(torch.randn(6, 4, generator=g, dtype=dtype), torch.randint(0, 3, (6,), generator=g)) for _ in range(n)]

    def loss(x, y):
        return scale * F.cross_entropy(torch.tanh(x @ params[0].T + params[1]) @ params[2].T, y)

    return [lambda x=x, y=y: loss(x, y) for x, y in data], params


def gradient(value, params):
    return [torch.zeros_like(p) if g is None else g
            for g, p in zip(torch.autograd.grad(value, params, allow_unused=True), params)]


def distance(a, b):
    """Relative distance of two lists of tensors."""
    difference = sum((x - y).square().sum() for x, y in zip(a, b)).sqrt()
    return (difference / sum(y.square().sum() for y in b).sqrt()).item()


def streamed(losses, params, similarity, weight=1.0):
    for p in params:
        p.grad = None
    value = dtl.gradient_collision_backward(losses, params, similarity, weight)
    return value, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]


@pytest.mark.parametrize("similarity", SIMILARITIES)
@given(n=st.integers(2, 7), seed=st.integers(0, 2**31))
def test_loss_is_the_double_loop(similarity, n, seed):
    losses, params = problem(n, seed)
    ours = dtl.gradient_collision_loss([f() for f in losses], params, similarity)
    theirs = brute_force([f() for f in losses], params, similarity)
    scale = max(abs(theirs.item()), 1e-3)
    assert ours.shape == () and ours.dtype == torch.float64
    assert abs(ours.item() - theirs.item()) <= 1e-10 * scale
    assert distance(gradient(ours, params), gradient(theirs, params)) <= 1e-10


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_gradcheck(similarity):
    losses, params = problem(3, 0)
    checked = [p for p in params[:3]]

    def value(*_):
        return dtl.gradient_collision_loss([f() for f in losses], params, similarity)

    assert torch.autograd.gradcheck(value, checked)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@given(n=st.integers(2, 7), seed=st.integers(0, 2**31), weight=st.floats(-50, 50).filter(lambda w: abs(w) > 1e-3))
def test_streaming_is_the_loss_in_float64(similarity, n, seed, weight):
    losses, params = problem(n, seed)
    reference = dtl.gradient_collision_loss([f() for f in losses], params, similarity)
    value, grads = streamed(losses, params, similarity, weight)
    assert abs(value - reference.item()) <= 1e-9 * max(abs(reference.item()), 1e-3)
    assert distance(grads, gradient(weight * reference, params)) <= 1e-9


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("seed", range(3))
def test_streaming_is_the_loss_on_the_small_resnet_in_float32(similarity, seed):
    backbone = dtl.new_backbone("resnet8", seed, torch.device("cpu"))
    model = dtl.Model(backbone, nn.Linear(backbone.features, 10)).train()
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(64, 3, 16, 16, generator=g), torch.randint(0, 10, (64,), generator=g)
    losses = [lambda x=x, y=y: F.cross_entropy(model(x), y) for x, y in zip(x.chunk(4), y.chunk(4))]
    params = list(model.parameters())
    with dtl.running_statistics_kept(model):
        reference = dtl.gradient_collision_loss([f() for f in losses], params, similarity)
        value, grads = streamed(losses, params, similarity)
    assert value == pytest.approx(reference.item(), rel=1e-4)
    assert distance(grads, gradient(reference, params)) <= 1e-4


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_streaming_adds_to_grad_and_leaves_other_tensors_alone(similarity):
    losses, params = problem(3, 5)
    _, alone = streamed(losses, params, similarity)
    for p in params:
        p.grad = torch.ones_like(p)
    dtl.gradient_collision_backward(losses, params[:2], similarity)
    assert torch.equal(params[2].grad, torch.ones_like(params[2]))  # not among params: nothing added
    for p in params:
        p.grad = torch.ones_like(p)
    dtl.gradient_collision_backward(losses, params, similarity)
    assert distance([p.grad - 1 for p in params], alone) <= 1e-12


@given(n=st.integers(2, 8), seed=st.integers(0, 2**31))
def test_cos_is_in_its_range(n, seed):
    losses, params = problem(n, seed)
    value = dtl.gradient_collision_loss([f() for f in losses], params, "cos").item()
    assert -1 / (n - 1) - 1e-12 <= value <= 1 + 1e-12


def test_cos_reaches_both_ends():
    p = torch.ones(2, requires_grad=True)
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([-6.0, -8.0])
    assert dtl.gradient_collision_loss([p @ a, p @ a * 2], [p], "cos").item() == pytest.approx(1)
    assert dtl.gradient_collision_loss([p @ a, p @ b], [p], "cos").item() == pytest.approx(-1)
    assert dtl.gradient_collision_loss([p @ a, p @ b], [p], "dot").item() == pytest.approx(-50)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@given(n=st.integers(2, 6), seed=st.integers(0, 2**31), order=st.randoms(use_true_random=False))
def test_order_of_chunks_does_not_matter(similarity, n, seed, order):
    losses, params = problem(n, seed)
    shuffled = order.sample(losses, n)
    (value, grads), (value2, grads2) = streamed(losses, params, similarity), streamed(shuffled, params, similarity)
    assert value == pytest.approx(value2, rel=1e-9, abs=1e-12)
    assert distance(grads, grads2) <= 1e-9


@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3))
def test_scaling_the_losses(seed, scale):
    (losses, params), (scaled, scaled_params) = problem(3, seed), problem(3, seed, scale=scale)
    for similarity, factor in (("cos", 1.0), ("dot", scale**2)):
        value = dtl.gradient_collision_loss([f() for f in losses], params, similarity)
        other = dtl.gradient_collision_loss([f() for f in scaled], scaled_params, similarity)
        assert other.item() == pytest.approx(factor * value.item(), rel=1e-8, abs=1e-10 * factor)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@given(n=st.integers(2, 5), seed=st.integers(0, 2**31), scale=st.sampled_from((1e-12, 1e-6, 1.0, 1e6)))
def test_finite_everywhere(similarity, dtype, n, seed, scale):
    losses, params = problem(n, seed, dtype, scale)
    losses[0] = lambda: (params[0] * 0).sum()  # touches one parameter, with gradient zero
    losses[-1] = lambda: torch.zeros((), dtype=dtype) if n > 2 else params[1].square().sum()  # touches none
    value = dtl.gradient_collision_loss([f() for f in losses], params, similarity)
    assert value.isfinite() and value.dtype == dtype
    if value.requires_grad:
        assert all(g.isfinite().all() for g in gradient(value, params))
    value, grads = streamed(losses, params, similarity)
    assert torch.isfinite(torch.tensor(value)) and all(g.isfinite().all() for g in grads)


def test_a_zero_chunk_under_cos_counts_as_cosine_zero():
    losses, params = problem(2, 3)
    pair = dtl.gradient_collision_loss([f() for f in losses], params, "cos").item()
    losses.append(lambda: (params[0] * 0).sum())
    three = dtl.gradient_collision_loss([f() for f in losses], params, "cos").item()
    assert three == pytest.approx(pair / 3, rel=1e-12)  # one pair of three is left
    value, grads = streamed(losses, params, "cos")
    assert value == pytest.approx(three, rel=1e-12) and max(g.abs().max() for g in grads) > 0


PARAM = torch.ones(3, requires_grad=True)
BAD = {
    "one chunk": ([PARAM.sum()], [PARAM], "dot", "at least 2 chunks are needed, not 1"),
    "no chunk": ([], [PARAM], "dot", "not 0"),
    "non-scalar": ([PARAM.sum(), PARAM * 2], [PARAM], "dot", r"chunk 1's loss must be .*\(3,\)"),
    "no tensor": ([PARAM.sum(), 1.0], [PARAM], "dot", "not float"),
    "no parameters": ([PARAM.sum(), PARAM.sum()], [], "dot", "params is empty"),
    "one tensor": ([PARAM.sum(), PARAM.sum()], PARAM, "dot", "not one tensor"),
    "frozen": ([PARAM.sum(), PARAM.sum()], [PARAM, torch.ones(4, 2)], "dot", r"params\[1\].*\(4, 2\).*require grad"),
    "similarity": ([PARAM.sum(), PARAM.sum()], [PARAM], "cosine", "'cosine'"),
    "nan": ([PARAM.sum(), PARAM.sum() * float("nan")], [PARAM], "dot", "chunk 1's loss is nan"),
    "inf": ([PARAM.sum() * float("inf"), PARAM.sum()], [PARAM], "dot", "chunk 0's loss is inf"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told(name):
    losses, params, similarity, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        dtl.gradient_collision_loss(losses, params, similarity)
    with pytest.raises(ValueError, match=message):
        dtl.gradient_collision_backward([lambda loss=loss: loss for loss in losses], params, similarity)


def test_a_chunk_that_changes_between_the_passes_is_told():
    p, calls = torch.ones(2, requires_grad=True), itertools.count()
    with pytest.raises(ValueError, match="must not change"):
        dtl.gradient_collision_backward([lambda: p.square().sum(), lambda: (p * next(calls)).square().sum()], [p])


def test_loss_leaves_inputs_alone():
    losses, params = problem(3, 1)
    before = [p.detach().clone() for p in params]
    dtl.gradient_collision_loss([f() for f in losses], iter(params)).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, params))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_cuda_gives_the_cpu_values(similarity):
    losses, params = problem(3, 2)
    value, grads = streamed(losses, params, similarity)
    on_gpu = [p.detach().cuda().requires_grad_() for p in params]
    g = torch.Generator().manual_seed(2)
    [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in params]
    data = [(torch.randn(6, 4, generator=g, dtype=torch.float64).cuda(), torch.randint(0, 3, (6,), generator=g).cuda())
            for _ in range(3)]

    def loss(x, y):
        return F.cross_entropy(torch.tanh(x @ on_gpu[0].T + on_gpu[1]) @ on_gpu[2].T, y)

    value_gpu, grads_gpu = streamed([lambda x=x, y=y: loss(x, y) for x, y in data], on_gpu, similarity)
    assert value_gpu == pytest.approx(value, rel=1e-9)
    assert distance([g.cpu() for g in grads_gpu], grads) <= 1e-9
