"""Kernels of edits against plain formulas, where the laws do not reach."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from trimtab import ops
from trimtab.methods.base import Rows, Span

T = 5


@pytest.mark.parametrize("outputs", [3, 4])
def test_lora_adds_to_what_edits_before_it_give_even_where_that_is_a_view(outputs: int) -> None:
    """A block's result is flattened, so it is a view of another tensor. With as many inputs as outputs mistaken gradients would fit."""
    generator = torch.Generator().manual_seed(0)
    x, W, A, B, dy = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(T, 4), (outputs, 4), (2, 4), (outputs, 2), (T, outputs)]
    )

    class Before:
        plain, site, matrix = False, 0, None

        def __call__(self, x_TI: Tensor) -> Tensor:
            return (3 * (x_TI @ leaves[1].T)).view(1, T, outputs).flatten(0, -2)

    def gradients(y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(y, leaves, dy))

    leaves = [t.clone().requires_grad_() for t in (x, W, A, B)]
    packs = SimpleNamespace(items=[SimpleNamespace(tensors={"A": leaves[2], "B": leaves[3]}, dropout=0.0)])
    rows = Rows((Span(1, 4, 0),), T, torch.device("cpu"))
    found = gradients(ops.lora(leaves[0], Before(), packs, rows))
    inside = torch.zeros(T, 1, dtype=torch.float64)
    inside[1:4] = 1
    wanted = gradients(3 * (leaves[0] @ leaves[1].T) + inside * (leaves[0] @ leaves[2].T @ leaves[3].T))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_what_a_function_writes_in_place_is_its_first_argument() -> None:
    """Autograd takes the first for it where that is a view."""
    found = []
    for file in Path(ops.__file__).parent.glob("*.py"):
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef) and function.name == "forward":
                calls = [c for c in ast.walk(function) if isinstance(c, ast.Call) and ast.unparse(c.func) == "ctx.mark_dirty"]
                found += [(file.name, [ast.unparse(a) for a in c.args], function.args.args[1].arg) for c in calls]
    assert len(found) >= 2 and all(written == [first] for _, written, first in found), found
