"""The block people copy stands alone, and the examples in its docstrings run."""

import re
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

SOURCE = (Path(__file__).parents[1] / "dtl.py").read_text()
BLOCK = re.search(r"# --- copy from here ---\n(.*?)# --- to here ---", SOURCE, re.S)[1]


@pytest.fixture
def copied():
    namespace = {}
    exec(compile(BLOCK, "copied", "exec"), namespace)
    return namespace


def test_block_imports_torch_alone():
    assert re.findall(r"^\s*(?:import|from)\s+(\S+)", BLOCK, re.M) == ["torch"]


def test_block_works_in_an_empty_namespace(copied):
    p = torch.tensor([1.0, 2.0], requires_grad=True)
    losses = [lambda: p.square().sum(), lambda: (p - 1).square().sum()]
    value = copied["gradient_collision_loss"]([f() for f in losses], [p])
    assert value.item() == pytest.approx(4 * (p * (p - 1)).sum().item())
    assert copied["gradient_collision_backward"](losses, [p]) == pytest.approx(value.item())
    assert torch.allclose(p.grad, 4 * (2 * p.detach() - 1))


@pytest.mark.parametrize("name", ("gradient_collision_loss", "gradient_collision_backward"))
def test_docstring_example_runs(copied, name):
    example = copied[name].__doc__.split("\n\n")[-1].rstrip()
    assert len(example.strip().splitlines()) <= 5
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    before = [p.detach().clone() for p in backbone.parameters()]
    source_x, source_y = torch.randn(32, 6), torch.randint(0, 3, (32,))
    names = dict(copied, F=F, nn=nn, backbone=backbone, features=5, classes=3, source_x=source_x, source_y=source_y,
                 optimizer=torch.optim.SGD(backbone.parameters(), 0.1),
                 retain_loss=backbone(torch.randn(4, 6)).square().mean())
    exec(textwrap.dedent(example), names)
    assert any(not torch.equal(a, b) for a, b in zip(before, backbone.parameters()))
