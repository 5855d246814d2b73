"""BatchNorm with a second derivative of its own: nn.BatchNorm2d in all that it gives."""

import contextlib
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_gc_loss import assert_close, distance, evaluate
from test_gc_loss import small_resnet as chunks_through_resnet8
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dtl

SOURCE = Path(dtl.__file__).read_text()
NAME = "fast second derivatives"
(FENCED,) = re.findall(
    rf"# --- copy from here: {NAME} ---\n(.*)# --- to here: {NAME} ---", SOURCE, re.S
)
SHAPE = (3, 4, 5, 3)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layers(new=dtl.BatchNorm2d, dtype=torch.float64, **how):
    """One of each kind, in the same state, which is no fresh one."""
    old, new = nn.BatchNorm2d(4, **how).to(dtype), new(4, **how).to(dtype)
    with torch.no_grad():
        for k, tensor in enumerate(v for v in old.state_dict().values() if v.dim()):
            tensor.copy_(normal(4, seed=k).square() + 0.5)
    assert old.state_dict().keys() == new.state_dict().keys()
    new.load_state_dict(old.state_dict())
    return old, new


def derivatives(layer, x):
    """What the layer gives, and first and second derivatives by x and by what of it is trained."""
    x = x.detach().requires_grad_()
    by = [x, *(p for p in layer.parameters() if p.requires_grad)]
    y = layer(x)
    first = torch.autograd.grad((y.sin() * normal(*y.shape).to(y)).sum(), by, create_graph=True)
    mixed = sum((g.pow(3) + g * normal(*g.shape, seed=9).to(g)).sum() for g in first)
    return [y, *first, *torch.autograd.grad(mixed, by)]


def assert_alike(old, new, x):
    """Also in the state that they end in."""
    for a, b in zip(derivatives(old, x), derivatives(new, x), strict=True):
        assert a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-10, atol=1e-10)
    after, before = old.state_dict(), new.state_dict()
    assert all(torch.allclose(after[k], before[k], rtol=1e-12) for k in after)


@pytest.mark.parametrize("shape", [(1, 2, 3, 5), (5, 2), (3, 2, 3), (3, 2, 1, 3)])
def test_derivatives_are_those_of_central_differences(shape):
    given = [v.requires_grad_() for v in (normal(*shape), normal(2, seed=1), normal(2, seed=2))]

    def normalised(*given):
        return dtl._Normalise.apply(*given, None, None, 0.1, 1e-5)

    assert torch.autograd.gradcheck(normalised, given)
    assert torch.autograd.gradgradcheck(normalised, given)


LAYOUTS = {
    "plain": lambda x: x,
    "one image": lambda x: x[:1],
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "every second": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3),
    "expanded": lambda x: x[:, :, :1].expand(-1, -1, 6, -1),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_gives_what_nn_batchnorm2d_does(layout, kept, frozen):
    """frozen: weight and bias do not require grad. kept: running statistics stay as they are."""
    old, new = (layer.requires_grad_(not frozen) for layer in layers())
    before = new.running_mean.clone()
    with contextlib.ExitStack() as stack:
        for layer in (old, new) if kept else ():
            stack.enter_context(dtl.running_statistics_kept(layer))
        assert_alike(old, new, LAYOUTS[layout](normal(*SHAPE)))
    assert new.running_mean.equal(before) == kept and new.num_batches_tracked == (not kept)
    x = normal(*SHAPE, seed=3)
    assert new.eval()(x).equal(old.eval()(x))


KINDS = [dict(momentum=None), dict(affine=False), dict(track_running_stats=False)]


@pytest.mark.parametrize("how", [*KINDS, dict(momentum=0.4, eps=0.3)])
def test_it_does_so_with_other_arguments(how):
    old, new = layers(**how)
    for seed in (0, 1):
        assert_alike(old, new, normal(*SHAPE, seed=seed))
    assert_alike(old.eval(), new.eval(), normal(*SHAPE, seed=2))


def test_one_value_a_channel_is_refused_as_ever():
    told = []
    for layer in layers():
        with pytest.raises(ValueError, match="more than 1 value per channel") as error:
            layer(normal(1, 4, 1, 1))
        told.append(str(error.value))
    assert told[0] == told[1]


@pytest.mark.parametrize("channels", [1, 3])
def test_another_number_of_channels_is_refused(channels):
    """Of more than its own, PyTorch's routine would read and write beyond the layer's tensors."""
    for layer in layers():
        with pytest.raises((RuntimeError, ValueError)):
            layer(normal(2, channels, 3, 3))


def test_bfloat16_images_and_float32_weights():
    old, new = layers(dtype=torch.float32)
    x = normal(32, 4, 7, 7).bfloat16()
    expected, found = derivatives(old, x.float()), derivatives(new, x)
    kinds = [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert [tensor.dtype for tensor in found] == kinds + kinds[1:]
    for a, b in zip(found, expected):
        assert distance([a.float()], [b]) < 0.02
    assert torch.allclose(new.running_var, old.running_var, rtol=1e-3)


def test_the_fenced_text_works_alone():
    namespace = {}
    exec("import torch; from torch import nn\n" + FENCED, namespace)
    old, new = layers(namespace["BatchNorm2d"])
    assert type(new) is namespace["BatchNorm2d"] is not dtl.BatchNorm2d
    assert_alike(old, new, normal(*SHAPE))


@pytest.mark.parametrize("similarity", ["dot", "cos"])
def test_collision_through_resnet8_is_the_same(similarity, monkeypatch):
    found, norms = [], []
    for kind in (dtl.BatchNorm2d, nn.BatchNorm2d):
        monkeypatch.setattr(dtl, "BatchNorm2d", kind)
        chunks, model = chunks_through_resnet8(0, torch.float64)
        norms.append({type(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d)})
        found.append(evaluate(chunks, list(model.parameters()), similarity))
    assert norms[0] != norms[1] == {nn.BatchNorm2d}
    assert_close(*found, 1e-10)


# ---- What a step of the GC loss costs ----


class Counting(TorchDispatchMode):
    """Operations that are no mere views, and the bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.operations, self.bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        written = [t for t in tree_leaves(results) if isinstance(t, torch.Tensor)]
        stored = {t.untyped_storage().data_ptr() for t in read}
        views = all(t.untyped_storage().data_ptr() in stored for t in written)
        if func._schema.is_mutable or not views:
            self.operations += 1
            self.bytes += sum(t.numel() * t.element_size() for t in (*read, *written))
        return results


def gc_step(layer, monkeypatch):
    """A step of the GC loss and a plain one, as functions; 4 chunks of 32 images of 16 pixels."""
    monkeypatch.setattr(dtl, "BatchNorm2d", layer)
    backbone, head = dtl.new_backbone("resnet8", 0, "cpu").train(), nn.Linear(64, 80)
    x, y, params = torch.randn(128, 3, 16, 16), torch.arange(128) % 80, [*backbone.parameters()]

    def collide():
        losses = dtl.chunk_losses(backbone, head, x, y, 4)
        dtl.gradient_collision_loss(losses, [*params, *head.parameters()]).backward()

    return collide, lambda: F.cross_entropy(head(backbone(x)), y).backward()


def test_operations_and_bytes_of_a_gc_step(monkeypatch):
    """4,645 operations and 10.0 times the bytes of a plain step with nn.BatchNorm2d. The profiler
    sees about as many operations, so none hides in another."""
    counts = {}
    for name, layer in (("torch", nn.BatchNorm2d), ("ours", dtl.BatchNorm2d)):
        collide, plain = gc_step(layer, monkeypatch)
        with Counting() as of_plain:
            plain()
        with Counting() as of_gc:
            collide()
        counts[name] = of_gc.operations, of_gc.bytes / of_plain.bytes
    assert counts["ours"][0] <= 2400 and counts["ours"][1] <= 5.5, counts
    assert counts["torch"][0] > 4000 and counts["torch"][1] > 9, counts
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        collide()
    leaves = [e for e in profile.events() if e.name.startswith("aten::") and not e.cpu_children]
    views = "view reshape t transpose expand detach alias slice select unsqueeze permute as_strided"
    views += " empty empty_like empty_strided resolve_conj narrow split to resize_ as_strided_"
    views += " _unsafe_view promote_types"
    work = [e for e in leaves if e.name.removeprefix("aten::") not in views.split()]
    assert len(work) <= 1.2 * counts["ours"][0], (len(work), counts)
