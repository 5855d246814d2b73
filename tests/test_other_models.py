"""The Gradient Collision loss on models not ours, against a double loop in float64; what fails."""

import contextlib
import copy
import warnings

import pytest
import torch
import torch.distributed as distributed
import torch.nn.functional as F
from test_gc_loss import assert_close, collision, distance, double_loop, each_similarity, evaluate
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import dtl

WORDS, WIDTH = 11, 8


class TinyGPT(nn.Module):
    """One block: explicit attention, dropout, and an output layer that is the embedding."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(6, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        hidden = nn.Linear(WIDTH, 9), nn.GELU(), nn.Linear(9, WIDTH), nn.Dropout(0.2)
        self.mlp, self.head = nn.Sequential(*hidden), nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):  # (B, T) -> (B, T, WORDS)
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        parts = self.attention(self.norms[0](x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in parts)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (B, heads, T, T)
        weights = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1)
        mixed = F.dropout(weights, 0.2, self.training) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return self.head(x + self.mlp(self.norms[1](x)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(5, WORDS)
        self.lstm = nn.LSTM(WIDTH, 5, batch_first=True)

    def forward(self, ids):
        return self.head(self.lstm(self.words(ids))[0])


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = TinyGPT()

    def forward(self, ids):
        return checkpoint(self.inner, ids, use_reentrant=False)


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.norm = nn.Embedding(WORDS, WIDTH), nn.BatchNorm1d(WIDTH)
        self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, ids):
        hidden = self.norm(self.layer(self.words(ids)).transpose(1, 2))
        return self.head(torch.tanh(hidden.transpose(1, 2)))


def chunks_of(model, dtype=torch.float64):
    """Four callables, each the next-word loss of three sequences of six words; and params."""
    texts = torch.randint(0, WORDS, (4, 3, 6), generator=torch.Generator().manual_seed(3))
    model.to(dtype).train()

    def loss(ids):
        return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    chunks = [lambda ids=ids: loss(ids) for ids in texts]
    return chunks, [p for p in model.parameters() if p.requires_grad]


def seeded(work, *arguments):
    torch.manual_seed(5)
    return work(*arguments)


@contextlib.contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


KINDS = (TinyGPT, Recurrent, Checkpointed, Normalised)


@each_similarity
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_double_loop(similarity, kind):
    chunks, params = chunks_of(kind())
    expected = seeded(double_loop, chunks, params, similarity)
    with no_warnings():
        assert_close(seeded(evaluate, chunks, params, similarity), expected, 1e-9)


@pytest.mark.parametrize("where", ("inside", "around"))
def test_bfloat16_autocast(where):
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    x, y, exact = torch.randn(4, 16, 8), torch.randint(0, 4, (4, 16)), copy.deepcopy(model).double()
    wide = [lambda i=i: F.cross_entropy(exact(x[i].double()), y[i]) for i in range(4)]
    expected = double_loop(wide, list(exact.parameters()), "cos")

    def loss(i):
        with torch.autocast("cpu", torch.bfloat16) if where == "inside" else no_warnings():
            assert model(x[i]).dtype == torch.bfloat16
            return F.cross_entropy(model(x[i]), y[i])

    with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"), no_warnings():
        chunks = [lambda i=i: loss(i) for i in range(4)]
        assert_close(evaluate(chunks, list(model.parameters()), "cos"), expected, 0.05)


@each_similarity
def test_bfloat16_parameters(similarity):
    model = Recurrent()
    chunks, params = chunks_of(model, torch.bfloat16)
    expected = double_loop(*chunks_of(copy.deepcopy(model)), similarity)
    value, grads = evaluate(chunks, params, similarity)
    assert value.dtype == torch.float32 and {g.dtype for g in grads} == {torch.bfloat16}
    assert_close((value, grads), expected, 0.1)


# ---- DistributedDataParallel ----


def mlp():
    """Weights and the callables of four chunks."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    x, y = torch.randn(4, 7, 6, dtype=torch.float64), torch.randint(0, 3, (4, 7))
    return model, [lambda i=i: F.cross_entropy(model(x[i]), y[i]) for i in range(4)]


@pytest.mark.parametrize("wrap", [{}, dict(gradient_as_bucket_view=True)])
def test_distributed_data_parallel_steps_as_without_it(wrap, tmp_path):
    """With the retain loss through the wrapper, and GC over the parameters of what it wraps."""
    meeting = f"file://{tmp_path}/meeting"
    distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    found, x = [], torch.randn(5, 6, dtype=torch.float64)
    try:
        for wrapper in (nn.parallel.DistributedDataParallel, lambda model, **_: model):
            model, chunks = mlp()
            start = [p.detach().clone() for p in model.parameters()]
            whole, optimizer = wrapper(model, **wrap), torch.optim.SGD(model.parameters(), 0.1)
            for _ in range(2):
                optimizer.zero_grad()
                loss = whole(x).square().mean() + 3 * collision(chunks, model.parameters())
                loss.backward()
                optimizer.step()
            found.append([p.detach() for p in model.parameters()])
    finally:
        distributed.destroy_process_group()
    assert distance(*found) <= 1e-12 and distance(found[0], start) > 1e-3


# ---- What is refused ----


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


class Fused(OnceDifferentiable):
    """As kernels that hide from autograd do: a gradient without a graph."""

    @staticmethod
    def backward(ctx, grad):
        return (grad * ctx.saved_tensors[0].cos()).detach()


@pytest.mark.parametrize("whole", (False, True), ids=("compiled model", "compiled loss"))
def test_what_is_compiled_is_refused(whole):
    torch._dynamo.reset()
    model, data = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(3, 5, 4)
    params, square = list(model.parameters()), lambda x: model(x).square().sum()
    compiled = torch.compile(square if whole else model, backend="aot_eager")
    chunks = [lambda x=x: compiled(x) if whole else compiled(x).square().sum() for x in data]
    with pytest.raises(ValueError, match="compiled"):
        collision(chunks, params)
    with torch.compiler.set_stance("force_eager"):  # the way out that the docstring names
        found = evaluate(chunks, params)
    assert_close(found, double_loop([lambda x=x: square(x) for x in data], params), 1e-5)


@pytest.mark.parametrize("beside", (False, True))
def test_what_can_be_differentiated_once_is_refused(beside):
    """beside: there is another way from the loss to every parameter, and autograd would take it."""
    first, second, data = nn.Linear(4, 3), nn.Linear(3, 3), torch.randn(3, 5, 4)

    def loss(x):
        hidden = OnceDifferentiable.apply(first(x))
        return second(hidden + torch.tanh(first(x)) if beside else hidden).square().sum()

    params = [*first.parameters(), *second.parameters()]
    with pytest.raises(ValueError, match="once_differentiable"):
        collision([lambda x=x: loss(x) for x in data], params)


def test_a_gradient_without_a_graph_beside_others_is_warned_of():
    first, second, data = nn.Linear(4, 3), nn.Linear(3, 3), torch.randn(3, 5, 4)
    chunks = [lambda x=x: second(Fused.apply(first(x))).square().sum() for x in data]
    with pytest.warns(UserWarning, match="no second derivative") as seen:
        losses = [f() for f in chunks]
        dtl.gradient_collision_loss(losses, [*first.parameters(), *second.parameters()])
    assert len(seen) == 1 and seen[0].filename == __file__  # it points at the caller
    with no_warnings():
        collision(chunks, list(second.parameters()))


def test_fused_attention_is_never_wrong_in_silence():
    layer, data = nn.Linear(8, 24), torch.randn(3, 2, 5, 8)

    def loss(x):
        q, k, v = layer(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).square().sum()

    chunks, params = [lambda x=x: loss(x) for x in data], list(layer.parameters())
    with pytest.raises(ValueError, match="scaled_dot_product"):
        evaluate(chunks, params)
    with sdpa_kernel(SDPBackend.MATH):  # the way out that the docstring names
        found, expected = evaluate(chunks, params), double_loop(chunks, params)
    assert_close(found, expected, 1e-4)
