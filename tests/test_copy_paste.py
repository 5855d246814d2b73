"""The block people copy stands alone, and the examples in its docstrings run."""

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
PUBLIC = ("gradient_collision_loss", "gradient_collision_backward")


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


def test_block_uses_no_name_that_it_does_not_define(copied):
    """Also where the other tests never come: every global name that the code of the block loads."""
    def loaded(code):
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                yield instruction.argval
        for constant in code.co_consts:
            if hasattr(constant, "co_code"):
                yield from loaded(constant)

    names = set(loaded(compile(FENCED[0], "copied", "exec")))
    assert names >= {"torch", "_gc_vector"} and names <= set(copied) | set(dir(builtins))


def test_block_works_in_an_empty_namespace(copied):
    p = torch.tensor([1.0, 2.0], requires_grad=True)
    losses = [lambda: p.square().sum(), lambda: (p - 1).square().sum()]
    value = copied["gradient_collision_loss"]([f() for f in losses], [p])
    assert value.item() == pytest.approx(4 * (p * (p - 1)).sum().item())
    assert copied["gradient_collision_backward"](losses, [p]).item() == pytest.approx(value.item())
    assert torch.allclose(p.grad, 4 * (2 * p.detach() - 1))
    norm = nn.BatchNorm1d(2)
    with copied["running_statistics_kept"](norm):
        norm(torch.randn(4, 2))
    assert norm.num_batches_tracked == 0


def example(copied, name):
    """The last paragraph of the docstring."""
    code = textwrap.dedent(copied[name].__doc__.split("\n\n")[-1].rstrip())
    assert len(code.strip().splitlines()) == 5 and name in code and "30.0" in code
    return code


def step(copied, code):
    """The parameters of a small backbone in float64, before and after the code."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    before = [p.detach().clone() for p in backbone.parameters()]
    x = torch.randn(32, 6, dtype=torch.float64)
    names = dict(copied, F=F, nn=nn, backbone=backbone, features=5, classes=3, source_x=x,
                 source_y=torch.arange(32) % 3, optimizer=torch.optim.SGD(backbone.parameters(), 0.1),
                 retain_loss=backbone(x[:4]).square().mean())
    torch.set_default_dtype(torch.float64)  # of the head that the code makes
    try:
        exec(code, names)
    finally:
        torch.set_default_dtype(torch.float32)
    return before, [p.detach() for p in backbone.parameters()]


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_example_runs(copied, name):
    """It changes every parameter, and some elsewhere than the same step without GC does."""
    before, after = step(copied, example(copied, name))
    assert not any(torch.equal(a, b) for a, b in zip(before, after))
    _, without = step(copied, example(copied, name).replace("30.0", "0.0"))
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(after, without))


def test_the_two_examples_take_the_same_step(copied):
    """One is written for four chunks, the other for eight: with as many, they are one loss."""
    codes = [example(copied, name).replace("chunk(4)", "chunk(8)") for name in PUBLIC]
    (_, first), (_, second) = (step(copied, code) for code in codes)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(first, second))
