"""LoRA on experts against a loop over rows and experts, in fp64: results and gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab import ops
from trimtab.methods.base import Packed, Rows, Span

T, K, E, I, O = 11, 2, 5, 6, 7
SPANS = (Span(2, 6, 0), Span(6, 9, 1))
"""Rows 0, 1, 9 and 10 are the base's."""
KEYS = torch.arange(T, dtype=torch.int32) * 77_777


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class _Dense:
    def __init__(self, W_EOI: Tensor):
        self.W = W_EOI

    def outputs(self) -> int:
        return O

    def matmul(self, expert: int, x: Tensor, out: Tensor) -> None:
        out.copy_(x @ self.W[expert].T)

    def matmul_t(self, expert: int, dy: Tensor) -> Tensor:
        return dy @ self.W[expert]


def _plain(x: Tensor, chosen: Tensor, weight: Tensor, W: Tensor, bias: Tensor, packs: list[Packed], p: float) -> Tensor:
    """Row by row. Each expert's mask is that of a site of its own."""
    out = []
    for row in range(T):
        total: Any = 0
        for place in range(K):
            e = int(chosen[row, place])
            y = x[row] @ W[e].T + bias[e]
            for s in SPANS:
                if s.start <= row < s.stop:
                    t = packs[s.slot].tensors
                    at = int(t["place"][e]) if "place" in t else e
                    if at >= 0:
                        kept = ops.dropout(x[row][None], p, KEYS[row : row + 1], 9 + (e + 1) * ops.experts.EXPERT_SITES)[0]
                        y = y + t["expert_B"][at] @ (t["expert_A"][at] @ kept)
            total = total + weight[row, place] * y
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_rows_by_adapter_and_expert(p: float) -> None:
    chosen = torch.stack([torch.randperm(E - 1, generator=torch.Generator().manual_seed(i))[:K] for i in range(T)])  # nobody asks the last
    weight, W, bias = _random(T, K, seed=1), _random(E, O, I, seed=2), _random(E, O, seed=3)
    factors = [_random(*s, seed=i).requires_grad_() for i, s in enumerate([(E, 3, I), (E, O, 3), (2, 4, I), (2, O, 4)])]
    packs = [
        Packed(ops.lora_experts, {"expert_A": factors[0], "expert_B": factors[1]}, p),
        Packed(ops.lora_experts, {"expert_A": factors[2], "expert_B": factors[3], "place": torch.tensor([-1, 0, -1, 1, -1])}, p),
    ]
    rows, results = Rows(SPANS, T, torch.device("cpu"), KEYS), []
    for ours in (True, False):
        x = _random(T, I, seed=8).requires_grad_()
        if ours:
            routes = ops.Routes(chosen, E)
            around = SimpleNamespace(matrices=_Dense(W), bias_EO=bias, routes=routes, site=9)
            y = routes.scatter(ops.lora_experts(routes.gather(x), around, SimpleNamespace(items=packs), rows), weight)
        else:
            y = _plain(x, chosen, weight, W, bias, packs, p)
        results.append([y, *torch.autograd.grad((y * _random(T, O, seed=9)).sum(), [x, *factors])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    assert not results[0][2][E - 1].any() and results[0][4].any()
