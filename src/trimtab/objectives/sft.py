"""Supervised fine-tuning: imitate the answers.

    L = −Σ log p(target) / N        N: supervised tokens of all rows of the optimizer step

The mean is over tokens, not over rows: a long answer counts for more than a short one. Reported beside the loss: perplexity, exp(L).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trimtab.data.scores import perplexity
from trimtab.objectives.base import Objective, Segments

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sft(Objective):
    """Every supervised token weighs the same."""

    name: ClassVar[str] = "sft"
    metrics: ClassVar[Mapping[str, bool]] = {"perplexity": False}

    def loss(self, logp_R: Tensor, ref_R: Tensor | None, segments: Segments) -> tuple[Tensor, dict[str, Tensor]]:
        return -logp_R.sum() / segments.of_all.targets, {}

    def nll_weights(self, segments: Segments) -> Tensor | None:
        import torch

        return torch.full((sum(segments.targets),), 1.0 / max(1, segments.of_all.targets), dtype=torch.float32, device=segments.device)

    def report(self, loss: float, metrics: Mapping[str, float]) -> dict[str, float | None]:
        return {"loss": loss, "perplexity": perplexity(loss)}
