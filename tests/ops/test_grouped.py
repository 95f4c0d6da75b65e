"""LoRA of many adapters in products grouped by adapter, against each adapter alone in plain torch. `grouped_mm` runs on a CPU, too."""

from __future__ import annotations

import pytest
import torch

from tests.laws.common import gradient_difference
from trimtab.methods.base import Rows, Span
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


@pytest.mark.parametrize("inside", [True, False])
def test_products_grouped_by_adapter_equal_each_alone(inside: bool) -> None:
    bf16 = torch.bfloat16
    weight, x, dy = numbers(O, I, seed=1).to(bf16), numbers(T, I, seed=2).to(bf16).requires_grad_(), numbers(T, O, seed=3).to(bf16)
    leaves = [(numbers(r, I, seed=10 + i).requires_grad_(), numbers(O, r, seed=20 + i).requires_grad_()) for i, r in enumerate(RANKS)]
    (stacks,) = stack_factors([[Factors(A, B, s, bf16) for (A, B), s in zip(leaves, SCALINGS, strict=True)]])
    assert sorted(i for s in stacks for i in s.slots) == [0, 1, 2, 3, 4] and [s.A.shape[1] for s in stacks] == [64, 8]
    rows, frozen = Rows(SPANS, T, torch.device("cpu")), Frozen(weight)
    tensors = [t for s in stacks for t in (s.A, s.B)]
    y = GroupedLora.apply(x, None if inside else frozen(x), frozen, [rows.of_slots(s.slots) for s in stacks], *tensors)
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


def _lora(x: torch.Tensor, factors: list[tuple[torch.Tensor, torch.Tensor]], s: Span) -> torch.Tensor:
    A, B = factors[s.slot]
    return x[s.start : s.stop] @ A.T @ (SCALINGS[s.slot] * B).T
