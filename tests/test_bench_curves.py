"""The limits that curves of `bench/growth.py` print, against counts of the model that they run and of pairs of tokens."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from curves import prefill, train_context
from curves.curve import attention_flops, linear_flops, random_llama


def test_flops_of_linear_layers() -> None:
    model = random_llama(layers=2, vocab_size=16)
    inside = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    assert len(inside) == 2 * 7
    assert linear_flops(2) == 2 * sum(m.weight.numel() for m in inside)


def test_flops_of_causal_attention() -> None:
    tokens, layers = 7, 3
    pairs = sum(1 for query in range(tokens) for key in range(tokens) if key <= query)
    config = random_llama(layers=1, vocab_size=16).config
    numbers = config.num_attention_heads * config.head_dim
    assert attention_flops(layers, tokens) * tokens == layers * pairs * 2 * 2 * numbers  # a score, and a weighted value


@pytest.mark.parametrize("curve, short", [(prefill, 1024), (train_context, 2048)])
def test_limit_falls_with_attention(curve: Any, short: int) -> None:
    by_arithmetic = curve.by_arithmetic
    assert by_arithmetic(short) == 1
    assert 0.49 < by_arithmetic(8192) < 0.53
    assert [p.name for p in curve.CURVE.points if curve.CURVE.limit(p)] == [p.name for p in curve.CURVE.points if p.value > short]
