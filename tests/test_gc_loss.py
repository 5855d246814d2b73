"""The Gradient Collision loss: against brute force, between its two forms, over processes; its properties."""

import itertools
import math
import multiprocessing
from collections import Counter

import pytest
import torch
import torch.distributed as distributed
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dtl

SIMILARITIES = ("dot", "cos")
SYNCHRONISING = {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy",
                 "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount",
                 "repeat_interleave"}


def brute_force(losses, params, similarity):
    """The definition, a double loop over pairs of flat gradients."""
    flat = []
    for loss in losses:
        flat.append(torch.cat([g.reshape(-1) for g in gradient(loss, params, create_graph=True)]))
    values = []
    for a, b in itertools.combinations(flat, 2):
        values.append(a @ b if similarity == "dot" else (a @ b) / (a.norm() * b.norm()))
    return sum(values) / len(values)


def problem(n, seed, dtype=torch.float64, scale=1.0, dropout=0.0, device="cpu"):
    """n chunk losses, as callables, of a small smooth network with a parameter none of them touches."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):  # the same numbers in every precision and on every device
        return torch.randn(shape, generator=g, dtype=torch.float64).to(device, dtype)

    params = [(normal(*shape) * 0.7).requires_grad_() for shape in ((5, 4), (5,), (3, 5), (2,))]
    data = [(normal(6, 4), torch.randint(0, 3, (6,), generator=g).to(device)) for _ in range(n)]

    def loss(x, y):
        hidden = F.dropout(torch.tanh(x @ params[0].T + params[1]), dropout)
        return scale * F.cross_entropy(hidden @ params[2].T, y)

    return [lambda x=x, y=y: loss(x, y) for x, y in data], params


def small_resnet(seed):
    """Four chunk losses of 16 images through the 8-layer ResNet with a head, and its parameters."""
    backbone = dtl.new_backbone("resnet8", seed, torch.device("cpu"))
    model = dtl.Model(backbone, nn.Linear(backbone.features, 10)).train()
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(64, 3, 16, 16, generator=g), torch.randint(0, 10, (64,), generator=g)
    return [lambda x=x, y=y: F.cross_entropy(model(x), y) for x, y in zip(x.chunk(4), y.chunk(4))], model


def gradient(value, params, create_graph=False):
    grads = torch.autograd.grad(value, params, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params)]


def distance(a, b):
    """Relative distance of two lists of tensors."""
    difference = sum((x - y).double().square().sum() for x, y in zip(a, b, strict=True)).sqrt()
    return (difference / sum(y.double().square().sum() for y in b).sqrt()).item()


def streamed(losses, params, similarity, weight=1.0, **how):
    """The streamed form's value, and what it leaves in `.grad` that was None."""
    for p in params:
        p.grad = None
    value = dtl.gradient_collision_backward(losses, params, similarity=similarity, weight=weight, **how)
    assert value.shape == () and not value.requires_grad
    return value, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]


@pytest.mark.parametrize("similarity", SIMILARITIES)
@given(n=st.integers(2, 7), seed=st.integers(0, 2**31))
def test_loss_is_the_double_loop(similarity, n, seed):
    losses, params = problem(n, seed)
    ours = dtl.gradient_collision_loss([f() for f in losses], params, similarity=similarity)
    theirs = brute_force([f() for f in losses], params, similarity)
    scale = max(abs(theirs.item()), 1e-3)
    assert ours.shape == () and ours.dtype == torch.float64
    assert abs(ours.item() - theirs.item()) <= 1e-10 * scale
    assert distance(gradient(ours, params), gradient(theirs, params)) <= 1e-10


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_gradcheck(similarity):
    losses, params = problem(3, 0)

    def value(*_):
        return dtl.gradient_collision_loss([f() for f in losses], params, similarity=similarity)

    assert torch.autograd.gradcheck(value, params[:3])


@pytest.mark.parametrize("similarity", SIMILARITIES)
@given(n=st.integers(2, 7), seed=st.integers(0, 2**31), weight=st.floats(1e-3, 50) | st.floats(-50, -1e-3))
def test_streaming_is_the_loss_in_float64(similarity, n, seed, weight):
    losses, params = problem(n, seed)
    reference = dtl.gradient_collision_loss([f() for f in losses], params, similarity=similarity)
    value, grads = streamed(losses, params, similarity, weight)
    assert value.dtype == torch.float64
    assert abs(value - reference).item() <= 1e-9 * max(abs(reference.item()), 1e-3)
    assert distance(grads, gradient(weight * reference, params)) <= 1e-9


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("seed", range(2))
def test_streaming_is_the_loss_on_the_small_resnet_in_float32(similarity, seed):
    losses, model = small_resnet(seed)
    params = list(model.parameters())
    with dtl.running_statistics_kept(model):
        reference = dtl.gradient_collision_loss([f() for f in losses], params, similarity=similarity)
        value, grads = streamed(losses, params, similarity)
    assert value.item() == pytest.approx(reference.item(), rel=1e-4)
    assert distance(grads, gradient(reference, params)) <= 1e-4


class Counting(TorchDispatchMode):
    """Counts the operations that reach a device, by name."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_the_host_never_waits_for_a_number(similarity):
    losses, model = small_resnet(0)
    params = list(model.parameters())
    with Counting() as first:
        dtl.gradient_collision_loss([f() for f in losses], params, similarity=similarity).backward()
    with Counting() as second:
        dtl.gradient_collision_backward(losses, params, similarity=similarity, weight=30.0)
    with Counting() as probe:
        torch.ones(2).sum().item(), torch.ones(2).nonzero()
    assert SYNCHRONISING & set(probe.seen)  # the mode does see them
    for count in (first.seen, second.seen):
        assert count["convolution_backward"] > 0 and not SYNCHRONISING & set(count)
        # measured: 5817 (dot) and 5917 (cos) in the first form, 6370 and 6502 in the streamed one
        assert sum(count.values()) < 7500 and count["_to_copy"] <= 20


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_both_calls_of_a_chunk_see_one_dropout_mask(similarity):
    losses, params = problem(4, 1, dropout=0.5)
    torch.manual_seed(7)
    reference = dtl.gradient_collision_loss([f() for f in losses], params, similarity=similarity)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    value, grads = streamed(losses, params, similarity)
    assert torch.equal(torch.get_rng_state(), after)  # that of one call of each chunk
    assert value.item() == pytest.approx(reference.item(), rel=1e-12)
    assert distance(grads, gradient(reference, params)) <= 1e-12
    other, _ = streamed(losses, params, similarity)
    assert other.item() != pytest.approx(value.item(), rel=1e-3)  # the next call draws other masks

    calls = itertools.count()
    torch.manual_seed(7)
    streamed([*losses, lambda: losses[0]() + torch.rand(next(calls)).sum()], params, similarity)
    seen = torch.get_rng_state()
    torch.manual_seed(7)
    [f() for f in (*losses, losses[0])]
    assert torch.equal(torch.get_rng_state(), seen)  # also where the second call drew more


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_streaming_adds_to_grad_and_leaves_other_tensors_alone(similarity):
    losses, params = problem(3, 5)
    _, alone = streamed(losses, params, similarity)
    for p in params:
        p.grad = torch.ones_like(p)
    dtl.gradient_collision_backward(losses, params[:2], similarity=similarity)
    assert torch.equal(params[2].grad, torch.ones_like(params[2]))  # not among params: nothing added
    for p in params:
        p.grad = torch.ones_like(p)
    dtl.gradient_collision_backward(losses, params, similarity=similarity)
    assert distance([p.grad - 1 for p in params], alone) <= 1e-12


@given(n=st.integers(2, 8), seed=st.integers(0, 2**31))
def test_cos_is_in_its_range(n, seed):
    losses, params = problem(n, seed)
    value = dtl.gradient_collision_loss([f() for f in losses], params, similarity="cos").item()
    assert -1 / (n - 1) - 1e-12 <= value <= 1 + 1e-12


@pytest.mark.filterwarnings("ignore:some parameters' gradients have no graph")  # of a loss that is linear
def test_cos_reaches_both_ends():
    p = torch.ones(2, requires_grad=True)
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([-6.0, -8.0])
    for similarity, other, value in (("cos", a, 1), ("cos", b, -1), ("dot", b, -50)):
        losses = [lambda: p @ a, lambda other=other: p @ other]
        first = dtl.gradient_collision_loss([f() for f in losses], [p], similarity=similarity)
        second, _ = streamed(losses, [p], similarity)
        assert first.item() == pytest.approx(value) and second.item() == pytest.approx(value)
    assert dtl.gradient_collision_loss([p[0] * 2, p[1] * 2], [p]).item() == 0


@pytest.mark.parametrize("similarity", SIMILARITIES)
@given(n=st.integers(2, 6), seed=st.integers(0, 2**31), order=st.randoms(use_true_random=False))
def test_order_of_chunks_does_not_matter(similarity, n, seed, order):
    losses, params = problem(n, seed)
    shuffled = order.sample(losses, n)
    value, grads = streamed(losses, params, similarity)
    value2, grads2 = streamed(shuffled, params, similarity)
    assert value.item() == pytest.approx(value2.item(), rel=1e-9, abs=1e-12)
    assert distance(grads, grads2) <= 1e-9


@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3))
def test_scaling_the_losses(seed, scale):
    (losses, params), (scaled, scaled_params) = problem(3, seed), problem(3, seed, scale=scale)
    for similarity, factor in (("cos", 1.0), ("dot", scale**2)):
        value = dtl.gradient_collision_loss([f() for f in losses], params, similarity=similarity)
        other = dtl.gradient_collision_loss([f() for f in scaled], scaled_params, similarity=similarity)
        assert other.item() == pytest.approx(factor * value.item(), rel=1e-8, abs=1e-10 * factor)


@pytest.mark.parametrize("scale", (1e19, 1e-24))  # whose squares float32 cannot hold
def test_cos_of_huge_and_tiny_float32_gradients(scale):
    losses, params = problem(3, 11)
    reference = dtl.gradient_collision_loss([f() for f in losses], params, similarity="cos")
    expected = gradient(reference, params)
    losses, params = problem(3, 11, torch.float32, scale)
    value = dtl.gradient_collision_loss([f() for f in losses], params, similarity="cos")
    assert value.item() == pytest.approx(reference.item(), abs=1e-5)
    assert distance(gradient(value, params), expected) <= 1e-4
    value, grads = streamed(losses, params, "cos")
    assert value.item() == pytest.approx(reference.item(), abs=1e-5) and distance(grads, expected) <= 1e-4


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@given(n=st.integers(2, 5), seed=st.integers(0, 2**31), scale=st.sampled_from((1e-12, 1e-6, 1.0, 1e6)))
def test_finite_everywhere(similarity, dtype, n, seed, scale):
    losses, params = problem(n, seed, dtype, scale)
    losses[0] = lambda: (params[0].square() * 0).sum()  # touches one parameter, with gradient zero
    value = dtl.gradient_collision_loss([f() for f in losses], params, similarity=similarity)
    assert value.isfinite() and value.dtype == dtype
    assert all(g.isfinite().all() for g in gradient(value, params))
    value, grads = streamed(losses, params, similarity)
    assert value.isfinite() and value.dtype == dtype and all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("factor", (math.nan, math.inf))
def test_what_is_not_finite_gives_a_value_that_is_not(similarity, factor):
    losses, params = problem(3, 2)
    spoilt = [losses[0], lambda: losses[1]() * factor, losses[2]]
    assert not dtl.gradient_collision_loss([f() for f in spoilt], params, similarity=similarity).isfinite()
    value, grads = streamed(spoilt, params, similarity)
    assert not value.isfinite() and not all(g.isfinite().all() for g in grads)


def test_a_zero_chunk_under_cos_counts_as_cosine_zero():
    losses, params = problem(2, 3)
    pair = dtl.gradient_collision_loss([f() for f in losses], params, similarity="cos").item()
    losses.append(lambda: (params[0].square() * 0).sum())
    three = dtl.gradient_collision_loss([f() for f in losses], params, similarity="cos").item()
    assert three == pytest.approx(pair / 3, rel=1e-12)  # one pair of three is left
    value, grads = streamed(losses, params, "cos")
    assert value.item() == pytest.approx(three, rel=1e-12) and max(g.abs().max() for g in grads) > 0


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_parameter_given_twice_counts_once(similarity):
    losses, params = problem(3, 4)
    reference = dtl.gradient_collision_loss([f() for f in losses], params, similarity=similarity)
    twice = dtl.gradient_collision_loss([f() for f in losses], [*params, params[0]], similarity=similarity)
    assert twice.item() == reference.item()
    value, grads = streamed(losses, [params[2], *params], similarity)
    assert value.item() == pytest.approx(reference.item(), rel=1e-12)
    assert distance(grads[1:], gradient(reference, params)) <= 1e-12


def test_parameters_of_two_precisions():
    a = torch.tensor([1.0, 2.0], requires_grad=True)
    b = torch.tensor([0.5, 3.0], dtype=torch.float64, requires_grad=True)
    losses = [lambda: (a.double() * b).sum().square(), lambda: (a.double() + b).square().sum()]
    reference = brute_force([f() for f in losses], [a, b], "cos")
    value, grads = streamed(losses, [a, b], "cos")
    assert value.item() == pytest.approx(reference.item(), rel=1e-6)
    assert [g.dtype for g in grads] == [torch.float32, torch.float64]
    assert distance(grads, gradient(reference, [a, b])) <= 1e-6


def test_loss_leaves_inputs_alone():
    losses, params = problem(3, 1)
    before = [p.detach().clone() for p in params]
    dtl.gradient_collision_loss([f() for f in losses], iter(params)).backward()
    dtl.gradient_collision_backward(iter(losses), iter(params))
    assert all(torch.equal(a, b) for a, b in zip(before, params))


def test_running_statistics_are_kept_and_the_flag_comes_back():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(KeyError), dtl.running_statistics_kept(model):
        model(torch.randn(8, 3) + 5)
        raise KeyError
    assert model[1].running_mean.abs().max() == 0 and model[1].num_batches_tracked == 0
    assert model[1].track_running_stats and not model[2].track_running_stats
    model(torch.randn(8, 3) + 5)
    assert model[1].num_batches_tracked == 1


# ------------------------------------------ what is refused ------------------------------------------

P = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
NET, TWIN = nn.Linear(3, 2), nn.Linear(3, 2)
HALF, COMPLEX = (torch.ones(3, dtype=d).requires_grad_() for d in (torch.float16, torch.complex64))


def good():
    return P.square().sum()


def without_graph():
    with torch.no_grad():
        return good()


def inference():
    with torch.inference_mode():
        return good()


LOSSES_TOLD = {
    "one chunk": ([good], [P], r"(?=.*\b1 chunks).*collide in pairs"),
    "no chunk": ([], [P], r"(?=.*\b0 chunks).*collide in pairs"),
    "no parameters": ([good, good], [], r"\b0 params"),
    "not a scalar": ([good, lambda: P * 2], [P], r"chunk 1's loss must be .*\(\), not of shape \(3,\)"),
    "a number": ([good, lambda: 1.0], [P], "chunk 1.* float"),
    "nothing": ([good, lambda: None], [P], "chunk 1.* NoneType"),
    "frozen": ([good, good], [P, torch.ones(4, 2)],
               r"params\[1\] of shape \(4, 2\) does not require grad.*\[p for p in .* if p.requires_grad\]"),
    "float16": ([good, good], [P, HALF], r"params\[1\] is torch.float16.*bfloat16, float32"),
    "complex": ([good, good], [COMPLEX], r"params\[0\] is torch.complex64"),
    "one tensor": ([good, good], P, "params must be a sequence, not one Parameter"),
    "a state dict": ([good, good], dict(NET.named_parameters()), "params must be a sequence, not one dict"),
    "a model": ([good, good], NET, "params must be a sequence, not one Linear"),
    "a name": ([good, good], "weight", "params must be a sequence, not one str"),
    "names": ([good, good], ["weight"], r"params\[0\] is a str, not a tensor: give model.parameters\(\)"),
    "named parameters": ([good, good], NET.named_parameters, r"params\[0\] is a tuple, not a tensor"),
    "another model": ([good, good], [*TWIN.parameters()], "chunk 0's loss touches none of params"),
    "its copy": ([lambda: NET(P).square().sum()] * 2, [*TWIN.parameters()], "touches none .*another model"),
    "no_grad": ([good, without_graph], [P], "chunk 1's loss has no graph: .*no_grad"),
    "inference_mode": ([inference, good], [P], "chunk 0's loss has no graph: .*inference_mode"),
    "detached": ([good, lambda: good().detach()], [P], "chunk 1's loss has no graph: .*detached"),
}


@pytest.mark.parametrize("name", LOSSES_TOLD)
def test_bad_input_is_told(name):
    losses, params, message = LOSSES_TOLD[name]
    if callable(params) and not isinstance(params, nn.Module):  # an iterator is used up by the first form
        params = params()
    with pytest.raises(ValueError, match=message):
        dtl.gradient_collision_loss([f() for f in losses], params)
    if name == "named parameters":
        params = NET.named_parameters()
    with pytest.raises(ValueError, match=message):
        dtl.gradient_collision_backward(losses, params)


def test_bad_similarity_is_told_and_options_have_names():
    for similarity in ("cosine", None, 1):
        with pytest.raises(ValueError, match=f"similarity must be 'dot' or 'cos', not {similarity!r}"):
            dtl.gradient_collision_loss([good(), good()], [P], similarity=similarity)
        with pytest.raises(ValueError, match=f"not {similarity!r}"):
            dtl.gradient_collision_backward([good, good], [P], similarity=similarity)
    for call in (dtl.gradient_collision_loss, dtl.gradient_collision_backward):
        with pytest.raises(TypeError, match="positional"):
            call([good, good], [P], "cos")


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_weight_may_be_a_tensor_and_nothing_random_inside_be_said(similarity):
    """As a step that a CUDA graph records needs it: the same gradients, to the bit."""
    losses, params = problem(3, 5)
    value, expected = streamed(losses, params, similarity, 0.3)
    state = torch.get_rng_state()
    weight = torch.tensor(0.3, dtype=torch.float64)
    other, grads = streamed(losses, params, similarity, weight, preserve_rng_state=False)
    assert torch.equal(value, other) and all(map(torch.equal, grads, expected))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("weight", (math.nan, math.inf, -math.inf, torch.ones(1), "2", [1.0]))
def test_bad_weight_is_told(weight):
    before, P.grad = P.grad, None
    with pytest.raises(ValueError, match="weight must be a finite number or a tensor"):
        dtl.gradient_collision_backward([good, good], [P], weight=weight)
    assert P.grad is None
    P.grad = before


def test_the_two_forms_are_told_apart():
    both = "gradient_collision_loss takes tensors, gradient_collision_backward callables"
    with pytest.raises(ValueError, match=f"chunk 1 is a function: {both}"):
        dtl.gradient_collision_loss([good(), good], [P])
    with pytest.raises(ValueError, match=f"chunk 0 is a Tensor: {both}"):
        dtl.gradient_collision_backward([good(), good], [P])
    with pytest.raises(ValueError, match="chunks must be a sequence, not one Tensor"):
        dtl.gradient_collision_loss(torch.ones(2), [P])
    with pytest.raises(ValueError, match="chunks must be a sequence, not one function"):
        dtl.gradient_collision_backward(good, [P])


def test_a_tensor_that_is_no_leaf():
    base, delta = torch.ones(3), torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    weight = base + delta  # as functional models have them: the first form differentiates by any tensor
    losses = [lambda: weight.pow(3).sum(), lambda: weight.square().sum()]
    value = dtl.gradient_collision_loss([f() for f in losses], [weight])
    assert torch.allclose(torch.autograd.grad(value, delta)[0], 18 * (base + delta).square())  # of <3w^2, 2w>
    with pytest.raises(ValueError, match=r"params\[0\].* is no leaf: it has no .grad"):
        dtl.gradient_collision_backward(losses, [weight])


def test_a_graph_built_outside_its_callable_is_told():
    layer, head = nn.Linear(3, 4), nn.Linear(4, 2)
    params = [*layer.parameters(), *head.parameters()]
    for together in (True, False):  # one graph for all chunks, which the first uses up; one for each
        shared = torch.tanh(layer(torch.randn(4, 3)))
        hidden = [shared if together else torch.tanh(layer(torch.randn(4, 3))) for _ in range(3)]
        with pytest.raises(ValueError, match=r"chunk \d: part of its graph was built outside the callable"):
            dtl.gradient_collision_backward([lambda h=h: head(h).square().sum() for h in hidden], params)


def test_called_under_no_grad_is_told():
    """Losses with graphs, but a GC loss without: added to another loss, it would do nothing, in silence."""
    def chunk():
        with torch.enable_grad():
            return good()

    losses = [chunk(), chunk()]
    with torch.no_grad():
        with pytest.raises(ValueError, match="no_grad"):
            dtl.gradient_collision_loss(losses, [P])
        with pytest.raises(ValueError, match="no_grad"):
            dtl.gradient_collision_backward([chunk, chunk], [P])


# ------------------------------------------ over several processes ------------------------------------------

SPREADS = {"1+3": (1, 3), "2+1+2": (2, 1, 2), "1+1": (1, 1)}


def in_processes(work, count, folder):
    """What work(rank) returns in each of `count` gloo processes, forked from one that has imported torch."""
    multiprocessing.set_forkserver_preload([__name__, work.__module__, "torch._dynamo"])
    arguments = work, count, str(folder)
    torch.multiprocessing.start_processes(in_a_process, arguments, count, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def in_a_process(rank, work, count, folder):
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    torch.save(work(rank), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def collide_in_a_process(rank):
    """Each spread's chunks over the first of three processes: value, gradient and what was exchanged."""
    groups = {2: distributed.new_group([0, 1]), 3: distributed.group.WORLD}
    reduce, calls, found = distributed.all_reduce, [], {}

    def counted(tensor, *args, **kwargs):
        calls.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    distributed.all_reduce = counted
    for (name, spread), similarity in itertools.product(SPREADS.items(), SIMILARITIES):
        if rank < len(spread):
            losses, params = problem(sum(spread), 9)
            mine = losses[sum(spread[:rank]):sum(spread[:rank + 1])]
            value, grads = streamed(mine, params, similarity, 3.0, group=groups[len(spread)])
            found[name, similarity] = value, grads, calls.copy()
            calls.clear()
    return found


def test_chunks_over_processes_are_as_in_one(tmp_path):
    ranks = in_processes(collide_in_a_process, 3, tmp_path)
    for (name, spread), similarity in itertools.product(SPREADS.items(), SIMILARITIES):
        value, grads = streamed(*problem(sum(spread), 9), similarity, 3.0)
        found = [rank[name, similarity] for rank in ranks[:len(spread)]]
        for seen, _, calls in found:
            assert seen.item() == pytest.approx(value.item(), rel=1e-12)
            assert calls == [sum(g.numel() for g in grads), 2]  # S, and two numbers
        mean = [sum(parts) / len(spread) for parts in zip(*(g for _, g, _ in found))]
        assert distance(mean, grads) <= 1e-12
        assert all(distance(g, grads) > 1e-3 for _, g, _ in found)  # none has it alone
