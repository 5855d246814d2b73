"""A training step waits for nothing: no value is read back from the device, nothing is copied to it."""

import collections
import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dtl

CPU = torch.device("cpu")
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique")


class Count(TorchDispatchMode):
    """Operations by name; `copies`: those that move a tensor between devices."""

    def __init__(self):
        super().__init__()
        self.ops, self.copies = collections.Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.ops[name] += 1
        if name in ("_to_copy", "copy_") and isinstance(args[0], torch.Tensor) and isinstance(result, torch.Tensor):
            self.copies += len({t.device for t in (*args[:2], result) if isinstance(t, torch.Tensor)}) > 1
        return result


class Steps(dtl.Progress):
    """Progress that keeps what was counted in the second step, from its beginning to that of the third."""

    def __init__(self, count):
        super().__init__()
        self.count, self.second = count, None

    def at(self, step, steps):
        super().at(step, steps)
        if step == 1:
            self.count.ops.clear()
        if step == 2:
            self.second = collections.Counter(self.count.ops)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    source, target = (dtl.load_task(name, 0, tmp_path_factory.mktemp("data"), CPU)
                      for name in ("shapes[0:4]@16", "shapes[16:20]@8"))
    backbone = dtl.new_backbone("resnet8", 1, CPU)
    return source, target, dtl.Model(backbone, dtl.new_head(64, 4, 1, CPU)), dtl.new_head(64, 4, 2, CPU)


def count_step(work, monkeypatch):
    """The operations of one step of `work(schedule, progress)`."""
    monkeypatch.setattr(dtl, "FETCH", 1000)
    count = Count()
    progress = Steps(count)
    with count:
        work(progress)
    assert progress.second and not count.copies
    return progress.second


def schedule(**more):
    return dtl.Schedule(4, 0.02, 8, **more)


@pytest.mark.parametrize("method", dtl.METHODS)
def test_a_step_of_disposal_waits_for_nothing(world, method, monkeypatch):
    source, target, model, head = world
    ops = count_step(lambda progress: dtl.dispose(
        model, head, source, target, dtl.METHODS[method], schedule(), 7, progress, network="resnet8", weight=1.0,
        chunks=2, chunk_size=4), monkeypatch)
    assert not [name for name in ops if name in WAITS], ops
    assert ops["convolution_backward"] >= 7


@pytest.mark.parametrize("attacker", [name for name, how in dtl.ATTACKERS.items() if not how.ridge])
def test_a_step_of_an_attack_waits_for_nothing(world, attacker, monkeypatch):
    how = dtl.ATTACKERS[attacker]
    ops = count_step(lambda progress: dtl.piggyback(
        world[2].backbone, world[1], how, schedule(optimizer=how.optimizer, gentle=how.gentle), 7, progress), monkeypatch)
    assert not [name for name in ops if name in WAITS], ops


def test_pretraining_and_transfer_wait_for_nothing(world, monkeypatch):
    for work in (lambda progress: dtl.pretrain(world[0], "resnet8", schedule(), 7, progress),
                 lambda progress: dtl.transfer(world[2], world[1], schedule(), 7, progress)):
        ops = count_step(work, monkeypatch)
        assert not [name for name in ops if name in WAITS], ops


def test_the_counter_sees_a_read_back():
    with Count() as count:
        torch.ones(3).sum().item()
        torch.nonzero(torch.ones(2))
    assert count.ops["_local_scalar_dense"] == 1 and count.ops["nonzero"] == 1


def test_bfloat16_trains_and_leaves_float32_weights(world):
    """What --precision auto does on CUDA, here on the CPU."""
    source, target, model, head = world
    mixed = copy.deepcopy(model)
    mixed.mixed = True
    assert (mixed(dtl.normalise(target.x[:8])) - model(dtl.normalise(target.x[:8]))).abs().max() > 0
    for method in ("uniform", "gc", "gc-fresh"):
        scrubbed = dtl.dispose(mixed, head, source, target, dtl.METHODS[method], schedule(mixed=True), 7,
                               dtl.Progress(), network="resnet8", weight=1.0, chunks=2, chunk_size=4)
        assert scrubbed.mixed and all(p.dtype == torch.float32 and p.isfinite().all() for p in scrubbed.parameters())
