"""What made the copied loss wrong without a word, or fail with a riddle: kinds, and lines."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_gc_loss import assert_close, collision, double_loop, evaluate, problem
from torch import nn

import dtl

X = list(torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0)))
Y = torch.arange(6) % 3


def chunks_of(model):
    dtype = next(model.parameters()).dtype
    return [lambda x=x: F.cross_entropy(model(x.to(dtype)), Y) for x in X]


def network(layer):
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 3))


# ---- Second derivatives that PyTorch has wrong, or not at all ----


def attention():
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
    layer.train()
    return layer, lambda x: layer(x[:, :4].reshape(3, 1, 8).expand(3, 4, 8)).square().mean()


def embedding(kind, **how):
    layer = kind(7, 4, **how)
    words = torch.arange(18).reshape(6, 3) % 7

    def loss(x):
        found = layer(words)
        found = found if found.dim() == 2 else found.mean(1)
        return (found.tanh() @ x[:4, :3]).logsumexp(1).mean()

    return layer, loss


def linear_then(loss):
    layer = nn.Linear(5, 4)
    return layer, lambda x: loss(layer(x))


def normed(norm):
    model = network(norm(nn.Linear(5, 4)))
    return model, lambda x: F.cross_entropy(model(x), Y)


def ctc(logits):
    words, lengths = torch.tensor([[1, 2]]), torch.tensor([6])
    return F.ctc_loss(logits.log_softmax(1)[:, None], words, lengths, torch.tensor([2]))


RIDDLES = {
    "weight_norm": (lambda: normed(nn.utils.parametrizations.weight_norm), "v.norm"),
    "old weight_norm": (lambda: normed(nn.utils.weight_norm), "remove_parametrizations"),
    "by frequency": (
        lambda: embedding(nn.Embedding, scale_grad_by_freq=True),
        "scale_grad_by_freq=False",
    ),
    "sparse": (lambda: embedding(nn.Embedding, sparse=True), "sparse=False"),
    "bag": (lambda: embedding(nn.EmbeddingBag, mode="mean"), r"F.embedding\(...\).mean\(1\)"),
    "hardsigmoid": (
        lambda: linear_then(lambda x: F.hardsigmoid(x).square().mean()),
        r"hardsigmoid.*F.relu6\(x \+ 3\) / 6",
    ),
    "ctc": (lambda: linear_then(ctc), "ctc_loss.*other operations"),
    "multi_margin": (
        lambda: linear_then(lambda x: F.multi_margin_loss(x, Y)),
        "multi_margin_loss.*other operations",
    ),
    "cdist": (
        lambda: linear_then(lambda x: torch.cdist(x, x + 1).square().mean()),
        r"Cdist.*norm\(dim=-1\)",
    ),
    "fused attention": (attention, r"attention.*sdpa_kernel\(SDPBackend.MATH\)"),
    "compiled": (
        lambda: normed(lambda layer: torch.compile(layer, backend="aot_eager")),
        "force_eager",
    ),
}


@pytest.mark.parametrize("case", RIDDLES)
def test_no_or_a_wrong_second_derivative_is_told_at_the_first_chunk(case):
    make, told = RIDDLES[case]
    model, loss = make()
    with pytest.raises(ValueError, match=told):
        collision([lambda x=x: loss(x) for x in X], model.parameters())


class my_attention(torch.autograd.Function):  # noqa: N801 - a name like that of what is refused
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def test_a_function_of_ones_own_is_not_refused_for_its_name():
    model = nn.Linear(5, 3).double()
    data = [x.double() for x in X]
    chunks = [lambda x=x: F.cross_entropy(my_attention.apply(model(x)), Y) for x in data]
    found = evaluate(chunks, list(model.parameters()))
    assert_close(found, double_loop(chunks, list(model.parameters())), 1e-9)


WAYS_OUT = {
    "weight_norm": lambda v, g, x: x @ (v * (g / v.norm(dim=1, keepdim=True))).T,
    "hardsigmoid": lambda v, g, x: F.relu6(x @ v.T * g[:, 0] + 3) / 6,
    "cdist": lambda v, g, x: ((x @ v.T)[:, None] - g[:, 0]).norm(dim=-1),
    "embedding bag": lambda v, g, x: F.embedding(torch.arange(18).reshape(6, 3) % 4, v * g).mean(1),
}


@pytest.mark.parametrize("way", WAYS_OUT)
def test_the_way_out_is_right(way):
    g = torch.Generator().manual_seed(0)
    params = [torch.randn(*s, generator=g).double().requires_grad_() for s in ((4, 5), (4, 1))]
    data = [x.double() for x in X]
    chunks = [lambda x=x: WAYS_OUT[way](*params, x).square().mean() + params[1].sum() for x in data]
    chunks = [lambda f=f, k=k: f() * (k + 1) for k, f in enumerate(chunks)]
    assert_close(evaluate(chunks, params), double_loop(chunks, params), 1e-9)


# ---- Values that are not finite, scalers, and what else was a riddle ----


@pytest.mark.parametrize("labels", ["ignored", "empty"])
def test_a_chunk_without_a_loss_gives_no_finite_value(labels):
    losses, params = problem(3, 0)
    model = nn.Linear(4, 3).double()
    x = torch.randn(6 if labels == "ignored" else 0, 4).double()
    y = torch.full((len(x),), -100)
    nothing = [lambda: losses[0]() + F.cross_entropy(model(x), y)]  # a NaN of zero gradient
    value, _ = evaluate([*losses, *nothing], params)
    assert not value.isfinite()


def test_under_a_gradient_scaler_it_is_the_same():
    losses, params = problem(3, 1, torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    value, expected = evaluate(losses, params)
    scaler.scale(collision(losses, params)).backward()
    optimizer = torch.optim.SGD([p for p in params if p.grad is not None], lr=0.1)
    scaler.unscale_(optimizer)
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    assert_close((value, found), (value, expected), 1e-5)


def test_numpy_numbers_are_numbers_to_a_balance():
    a, b = dtl.Balance(np.float32(2), strength=np.float64(0.5)), dtl.Balance(2.0, strength=0.5)
    for balance in (a, b):
        p = torch.ones(3, requires_grad=True)
        balance.backward(p.square().sum(), p.sum(), [p])
        balance.found = p.grad
    assert type(a.allowance) is float and torch.equal(a.found, b.found)


def test_parameters_that_were_used_up_or_lie_apart_are_told():
    losses, params = problem(2, 0)
    used = iter(params)
    list(used)
    with pytest.raises(ValueError, match="0 params: .* an iterator that was used up"):
        collision(losses, used)
    with pytest.raises(ValueError, match="meta is not on cpu, as params.0. is: one device"):
        collision(losses, [*params, torch.ones(1, device="meta", requires_grad=True)])
