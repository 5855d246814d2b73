"""The Gradient Collision loss on models not ours, against a double loop in float64; what is refused."""

import contextlib
import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as distributed
import torch.nn.functional as F
from test_gc_loss import SIMILARITIES, brute_force, distance, gradient, in_processes, streamed
from torch import nn
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
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 9), nn.GELU(), nn.Linear(9, WIDTH), nn.Dropout(0.2))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
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


class LowRank(nn.Module):
    """LoRA: a frozen layer, and the product of two small matrices beside it."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features))
        self.up = nn.Parameter(torch.randn(layer.out_features, rank))

    def forward(self, x):
        return self.layer(x) + x @ self.down.T @ self.up.T


def with_low_rank():
    model = TinyGPT().requires_grad_(False)
    model.attention, model.out = LowRank(model.attention), LowRank(model.out)
    return model


class LabelsGiven(nn.Module):
    """What Hugging Face's models look like from outside: a loss where labels are given, and names."""

    def __init__(self):
        super().__init__()
        self.inner = TinyGPT()

    def forward(self, input_ids=None, labels=None):
        logits = self.inner(input_ids)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=logits)


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
        return self.head(torch.tanh(self.norm(self.layer(self.words(ids)).transpose(1, 2)).transpose(1, 2)))


def chunks_of(model, n=4, seed=3, dtype=torch.float64):
    """n callables, each the next-word loss of three sequences of six words, by a model of a kind above."""
    texts = torch.randint(0, WORDS, (n, 3, 6), generator=torch.Generator().manual_seed(seed))
    model.to(dtype).train()

    def loss(ids):
        if isinstance(model, LabelsGiven):
            return model(input_ids=ids, labels=ids).loss
        return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    return [lambda ids=ids: loss(ids) for ids in texts]


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def compare(chunks, params, similarity, expected, tolerance):
    """Both forms, each from the same random state, against (value, gradient)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no model here gives cause for a warning
        torch.manual_seed(5)
        value = dtl.gradient_collision_loss([f() for f in chunks], params, similarity=similarity)
        first = value, gradient(value, params)
        torch.manual_seed(5)
        second = streamed(chunks, params, similarity)
    for value, grads in (first, second):
        assert abs(value.item() - expected[0].item()) <= tolerance * max(abs(expected[0].item()), 1e-3)
        assert distance(grads, expected[1]) <= tolerance


def double_loop(chunks, params, similarity):
    torch.manual_seed(5)
    value = brute_force([f() for f in chunks], params, similarity)
    return value.detach(), gradient(value, params)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("kind", (TinyGPT, Recurrent, with_low_rank, LabelsGiven, Checkpointed, Normalised))
def test_is_the_double_loop(kind, similarity):
    model = kind()
    chunks, params = chunks_of(model), trainable(model)
    expected = double_loop(chunks, params, similarity)
    compare(chunks, params, similarity, expected, 1e-9)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_tied_weights_in_a_list_made_by_hand(similarity):
    model = TinyGPT()
    chunks, params = chunks_of(model), trainable(model)
    value, grads = double_loop(chunks, params, similarity)
    torch.manual_seed(5)
    seen, twice = streamed(chunks, [model.head.weight, *params], similarity)
    assert seen.item() == pytest.approx(value.item(), rel=1e-9) and distance(twice[1:], grads) <= 1e-9


def test_frozen_parameters_of_low_rank_adaptation_are_told():
    model = with_low_rank()
    with pytest.raises(ValueError, match=r"does not require grad: give \[p for p in model.parameters\(\) if"):
        dtl.gradient_collision_backward(chunks_of(model), model.parameters())


@pytest.mark.parametrize("where", ("inside", "around"))
def test_bfloat16_autocast(where):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    x, y = torch.randn(4, 16, 8), torch.randint(0, 4, (4, 16))
    exact = copy.deepcopy(model).double()
    expected = double_loop([lambda i=i: F.cross_entropy(exact(x[i].double()), y[i]) for i in range(4)],
                           list(exact.parameters()), "cos")

    def loss(i):
        with torch.autocast("cpu", torch.bfloat16) if where == "inside" else contextlib.nullcontext():
            assert model(x[i]).dtype == torch.bfloat16
            return F.cross_entropy(model(x[i]), y[i])

    with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
        compare([lambda i=i: loss(i) for i in range(4)], list(model.parameters()), "cos", expected, 0.05)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_bfloat16_parameters(similarity):
    model = Recurrent()
    chunks = chunks_of(model, dtype=torch.bfloat16)
    exact = copy.deepcopy(model)
    expected = double_loop(chunks_of(exact), list(exact.parameters()), similarity)
    value, grads = streamed(chunks, list(model.parameters()), similarity)
    assert value.dtype == torch.float32 and {g.dtype for g in grads} == {torch.bfloat16}
    assert value.item() == pytest.approx(expected[0].item(), rel=0.1) and distance(grads, expected[1]) <= 0.1


def test_batch_norm_statistics_stay_where_they_are_kept():
    model = Normalised()
    chunks, params = chunks_of(model), trainable(model)
    before = copy.deepcopy(dict(model.named_buffers()))
    with dtl.running_statistics_kept(model):
        kept, kept_grads = streamed(chunks, params, "dot")
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    value, grads = streamed(chunks, params, "dot")
    assert value.item() == kept.item() and distance(grads, kept_grads) == 0  # batch statistics in both
    assert model.norm.num_batches_tracked == 8  # each chunk twice


# ------------------------------------------ DistributedDataParallel -------------------------------


def retain(model, part):
    x = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    return model(x[part]).square().mean()


def collision_chunks(model):
    g = torch.Generator().manual_seed(4)
    x, y = torch.randn(4, 7, 6, dtype=torch.float64, generator=g), torch.randint(0, 3, (4, 7), generator=g)
    return [lambda i=i: F.cross_entropy(model(x[i]), y[i]) for i in range(4)]


def mlp():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double()


def step_in_a_process(rank):
    """Two steps of one of two processes, as the docstring tells: GC, then the retain loss through DDP."""
    found = {}
    for view in (False, True):
        ddp = nn.parallel.DistributedDataParallel(mlp(), gradient_as_bucket_view=view)
        chunks = collision_chunks(ddp.module)
        optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            mine = chunks[:1] if rank else chunks[1:]
            dtl.gradient_collision_backward(mine, ddp.module.parameters(), weight=3.0,
                                            group=distributed.group.WORLD)
            retain(ddp, rank).backward()
            optimizer.step()
        found[view] = [p.detach() for p in ddp.parameters()]
    return found


def test_distributed_data_parallel_steps_as_one_process(tmp_path):
    ranks = in_processes(step_in_a_process, 2, tmp_path)
    model = mlp()
    chunks, optimizer = collision_chunks(model), torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        dtl.gradient_collision_backward(chunks, model.parameters(), weight=3.0)
        ((retain(model, 0) + retain(model, 1)) / 2).backward()
        optimizer.step()
    assert distance(list(model.parameters()), list(mlp().parameters())) > 1e-3
    for view in (False, True):
        ours, theirs = (found[view] for found in ranks)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
        assert distance(ours, [p.detach() for p in model.parameters()]) <= 1e-12


# ------------------------------------------ what is refused ------------------------------------------


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


def both_forms(chunks, params):
    return (lambda: dtl.gradient_collision_loss([f() for f in chunks], params),
            lambda: dtl.gradient_collision_backward(chunks, params))


@pytest.mark.parametrize("form", (0, 1), ids=("loss", "backward"))
@pytest.mark.parametrize("whole", (False, True), ids=("compiled model", "compiled loss"))
def test_what_is_compiled_is_refused(whole, form):
    torch._dynamo.reset()
    model, data = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(3, 5, 4)
    compiled = torch.compile((lambda x: model(x).square().sum()) if whole else model, backend="aot_eager")
    chunks = [lambda x=x: compiled(x) if whole else compiled(x).square().sum() for x in data]
    with pytest.raises(ValueError, match="compiled"):
        both_forms(chunks, list(model.parameters()))[form]()
    with torch.compiler.set_stance("force_eager"):  # the way out that the docstring names
        value, _ = streamed(chunks, list(model.parameters()), "dot")
    reference = brute_force([model(x).square().sum() for x in data], list(model.parameters()), "dot")
    assert value.item() == pytest.approx(reference.item(), rel=1e-5)


@pytest.mark.parametrize("beside", (False, True))
def test_what_can_be_differentiated_once_is_refused(beside):
    """beside: there is another way from the loss to every parameter, and autograd alone would pass it by."""
    first, second, data = nn.Linear(4, 3), nn.Linear(3, 3), torch.randn(3, 5, 4)

    def loss(x):
        hidden = OnceDifferentiable.apply(first(x))
        return (second(hidden + torch.tanh(first(x))) if beside else second(hidden)).square().sum()

    params = [*first.parameters(), *second.parameters()]
    for form in both_forms([lambda x=x: loss(x) for x in data], params):
        with pytest.raises(ValueError, match="once_differentiable"):
            form()


def test_a_gradient_without_a_graph_beside_others_is_warned_of():
    first, second, data = nn.Linear(4, 3), nn.Linear(3, 3), torch.randn(3, 5, 4)
    chunks = [lambda x=x: second(Fused.apply(first(x))).square().sum() for x in data]
    for form in both_forms(chunks, [*first.parameters(), *second.parameters()]):
        with pytest.warns(UserWarning, match="no second derivative") as seen:
            form()
        assert len(seen) == 1 and seen[0].filename == __file__  # it points at the caller
    for form in both_forms(chunks, list(second.parameters())):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            form()


def test_fused_attention_is_never_wrong_in_silence():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    layer, data = nn.Linear(8, 24), torch.randn(3, 2, 5, 8)

    def loss(x):
        q, k, v = layer(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).square().sum()

    chunks, params = [lambda x=x: loss(x) for x in data], list(layer.parameters())
    with pytest.raises(RuntimeError, match="scaled_dot_product"):
        dtl.gradient_collision_backward(chunks, params)
    with sdpa_kernel(SDPBackend.MATH):  # the way out that the docstring names
        value, grads = streamed(chunks, params, "cos")
        reference = brute_force([f() for f in chunks], params, "cos")
        assert distance(grads, gradient(reference, params)) <= 1e-4
    assert value.item() == pytest.approx(reference.item(), rel=1e-4)
