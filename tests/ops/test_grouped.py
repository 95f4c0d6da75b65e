"""LoRA of many adapters in products grouped by adapter, against each adapter alone in plain torch. `grouped_mm` runs on a CPU, too."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.laws.common import gradient_difference
from trimtab.methods.base import Rows, Span
from trimtab.ops import grouped
from trimtab.ops.grouped import Factors, GroupedLora, stack_factors

I, O, T = 48, 64, 40
RANKS, SCALINGS = (4, 8, 64, 16, 8), (2.0, 1.0, 0.5, 2.0, 3.0)
SPANS = (Span(3, 9, 0), Span(9, 20, 1), Span(20, 22, 2), Span(25, 40, 3))
"""Rows of nobody before and between; the last adapter has none."""


class Frozen:
    """A layer of the base, as a kernel sees it."""

    def __init__(self, weight_OI: torch.Tensor):
        self.weight_OI, self.matrix = weight_OI, self

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        return x_TI @ self.weight_OI.T

    def matmul_t(self, dy_TO: torch.Tensor) -> torch.Tensor:
        return dy_TO @ self.weight_OI


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_a_batch(frozen: Frozen, x: torch.Tensor) -> torch.Tensor:
    """A view, as a block's result is, or that of GPT-2's layers."""
    return frozen(x).view(1, T, O).flatten(0, -2)


@pytest.mark.parametrize("before", [lambda frozen, x: None, Frozen.__call__, in_a_batch], ids=["inside", "before", "a view before"])
def test_products_grouped_by_adapter_equal_each_alone(before: Callable[[Frozen, torch.Tensor], torch.Tensor | None]) -> None:
    bf16 = torch.bfloat16
    weight, x, dy = numbers(O, I, seed=1).to(bf16), numbers(T, I, seed=2).to(bf16).requires_grad_(), numbers(T, O, seed=3).to(bf16)
    leaves = [(numbers(r, I, seed=10 + i).requires_grad_(), numbers(O, r, seed=20 + i).requires_grad_()) for i, r in enumerate(RANKS)]
    (stacks,) = stack_factors([[Factors(A, B, s, bf16) for (A, B), s in zip(leaves, SCALINGS, strict=True)]])
    assert sorted(i for s in stacks for i in s.slots) == [0, 1, 2, 3, 4] and [s.A.shape[1] for s in stacks] == [64, 8]
    rows, frozen = Rows(SPANS, T, torch.device("cpu")), Frozen(weight)
    tensors = [t for s in stacks for t in (s.A, s.B)]
    y = GroupedLora.apply(before(frozen, x), x, frozen, [rows.of_slots(s.slots) for s in stacks], *tensors)
    y.backward(dy)
    got = [x.grad, *(t.grad for pair in leaves for t in pair)]

    exact_x = x.detach().float().requires_grad_()
    exact = [(A.detach().to(bf16).float().requires_grad_(), B.detach().clone().requires_grad_()) for A, B in leaves]
    want = exact_x @ weight.float().T
    parts = [torch.zeros(T, O).index_add(0, torch.arange(s.start, s.stop), _lora(exact_x, exact, s)) for s in SPANS]
    (want + sum(parts)).backward(dy.float())
    assert gradient_difference(y.detach().float(), (want + sum(parts)).detach()) < 0.02
    wanted = [exact_x.grad, *(t.grad for pair in exact for t in pair)]
    for n, (ours, theirs) in enumerate(zip(got, wanted, strict=True)):
        if theirs is None:
            assert ours is not None and not ours.any(), "an adapter without rows learns nothing"
        else:
            assert ours.dtype == (bf16 if n == 0 else torch.float32)
            assert gradient_difference(ours.float(), theirs) < 0.02, n


@pytest.mark.parametrize("wrong", range(5))
def test_a_product_that_is_no_number_is_refused(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the five forms it is; an empty group may be memory that nobody wrote."""
    right, calls, compared = F.grouped_mm, itertools.count(), grouped._trusted.__wrapped__

    def grouped_mm(*args: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        return right(*args, offs=offs) * (torch.nan if next(calls) == wrong else 1)

    assert compared(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(F, "grouped_mm", grouped_mm)
    assert not compared(torch.device("cpu"), torch.bfloat16) and next(calls) == 5


def _lora(x: torch.Tensor, factors: list[tuple[torch.Tensor, torch.Tensor]], s: Span) -> torch.Tensor:
    A, B = factors[s.slot]
    return x[s.start : s.stop] @ A.T @ (SCALINGS[s.slot] * B).T
