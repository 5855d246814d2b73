"""The block people copy stands alone, and the example in its docstring trains."""

import ast
import builtins
import dis
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

SOURCE = (Path(__file__).parents[1] / "dtl.py").read_text()
FENCED = re.findall(r"^# --- copy from here ---\n(.*?)^# --- to here ---$", SOURCE, re.S | re.M)


@pytest.fixture
def copied():
    namespace = {}
    exec(compile(FENCED[0], "copied", "exec"), namespace)
    return namespace


def test_there_is_one_block_and_it_imports_the_standard_library_and_torch():
    assert len(FENCED) == 1
    imported = set()
    for node in ast.walk(ast.parse(FENCED[0])):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert "torch" in imported and imported - {"torch"} <= sys.stdlib_module_names


def loaded(code):
    """Every global name that the code loads, and the code within it."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if hasattr(constant, "co_code"):
            yield from loaded(constant)


def test_block_uses_no_name_that_it_does_not_define(copied):
    """Also where the other tests never come."""
    names = set(loaded(compile(FENCED[0], "copied", "exec")))
    in_class_bodies = {"__name__", "__module__", "__qualname__"}
    assert names >= {"torch", "_gc_vector"}
    assert names <= set(copied) | set(dir(builtins)) | in_class_bodies


def test_block_works_in_an_empty_namespace(copied):
    p = torch.tensor([1.0, 2.0], requires_grad=True)
    losses = [p.square().sum(), (p - 1).square().sum()]
    value = copied["gradient_collision_loss"](losses, [p])
    assert value.item() == pytest.approx(4 * (p * (p - 1)).sum().item())
    balance = copied["Balance"](1e-9, strength=2.0, limits=(2.0, 2.0))
    balance.backward(p.sum(), value, [p])  # |(1, 1)| and |(4, 12)| on the way
    expected = 1 + 2 * 2**0.5 / 160**0.5 * torch.tensor([4.0, 12.0])
    assert torch.allclose(p.grad, expected)
    norm = nn.BatchNorm1d(2)
    with copied["running_statistics_kept"](norm):
        norm(torch.randn(4, 2))
    assert norm.num_batches_tracked == 0


def test_the_docstring_example_trains(copied):
    """Its last paragraph, completed: both losses fall."""
    example = textwrap.dedent(copied["gradient_collision_loss"].__doc__.split("\n\n")[-1].rstrip())
    assert "gradient_collision_loss(losses, backbone.parameters())" in example
    backbone = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh())
    target_head, x = nn.Linear(8, 3), torch.randn(32, 6)
    parameters = [*backbone.parameters(), *target_head.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.1)
    names = dict(copied, nn=nn, F=F, backbone=backbone, target_head=target_head)
    names |= dict(features=8, classes=4, device="cpu", balance=copied["Balance"](1.0))
    retained, forgotten = [], []
    for _ in range(120):
        source_y = torch.arange(64) % 4  # of each class as many in every chunk
        source_x = 3 * torch.eye(6)[source_y] + 0.3 * torch.randn(64, 6)
        names |= dict(source_x=source_x, source_y=source_y)
        names["retain_loss"] = F.cross_entropy(target_head(backbone(x)), x[:, :3].argmax(1))
        optimizer.zero_grad()
        exec(example, names)
        optimizer.step()
        retained.append(names["retain_loss"].item())
        forgotten.append(names["forget"].item())
    assert sum(retained[-10:]) < 0.7 * sum(retained[:10])
    assert sum(forgotten[-10:]) < 0.5 * sum(forgotten[:10])
