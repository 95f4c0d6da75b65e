"""Objectives over pairs: a chosen and a rejected answer to one prompt. What they share: rows, lengths, what is logged.

reward of an answer   what `rewards` says, by default β log p(answer); relative to the base's where there is a reference
logged                means over pairs of both rewards, their margin, the share of pairs whose chosen answer has the larger one
                      ("accuracies"), and both log-probabilities, under TRL's names
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from trimtab.data.pairs import pair
from trimtab.data.rows import Record
from trimtab.objectives.base import Objective, Segments

if TYPE_CHECKING:
    from torch import Tensor

CHOSEN, REJECTED = "chosen", "rejected"
REWARDS: Mapping[str, bool] = {
    "rewards/accuracies": True,
    "rewards/margins": True,
    "rewards/chosen": True,
    "rewards/rejected": False,
}
"""What runs can be judged by, and whether higher is better."""


@dataclass(frozen=True)
class Pairs:
    """The pairs of a call of `loss`. logp_R: of all tokens. ref_R: the base's; None without a reference. Dimension: B pairs."""

    logp_R: Tensor
    ref_R: Tensor | None
    segments: Segments

    @property
    def rows(self) -> int:
        """Pairs over which the loss is a mean."""
        return self.segments.of_all.rows

    @cached_property
    def logps(self) -> tuple[Tensor, Tensor]:
        """[B], [B]: log p of the chosen and of the rejected answers: sums over tokens."""
        return self._both(self.segments.sums(self.logp_R))

    @cached_property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """The same, less the base's."""
        assert self.ref_R is not None
        return self._both(self.segments.sums(self.logp_R) - self.segments.sums(self.ref_R))

    @cached_property
    def lengths(self) -> tuple[Tensor, Tensor]:
        """Supervised tokens of both answers."""
        return self._both(self.segments.lengths())

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """log p of a token, on average, of both answers."""
        return self.logps[0] / self.lengths[0], self.logps[1] / self.lengths[1]

    @property
    def chosen_nll(self) -> Tensor:
        """Part of the mean over all tokens of the chosen answers of −log p."""
        return -self.logps[0].sum() / self.segments.of_all.targets_of[CHOSEN]

    def mean(self, values_B: Tensor) -> Tensor:
        """Part of the mean over pairs."""
        return values_B.sum() / self.rows

    def metrics(self, rewards: tuple[Tensor, Tensor], logps: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Parts of what is logged. rewards, logps: of both answers."""
        (won, lost), (logp_won, logp_lost) = (tuple(t.detach() for t in both) for both in (rewards, logps))
        found = {
            "rewards/chosen": won,
            "rewards/rejected": lost,
            "rewards/accuracies": (won > lost).float(),
            "rewards/margins": won - lost,
            "logps/chosen": logp_won,
            "logps/rejected": logp_lost,
        }
        return {name: self.mean(values) for name, values in found.items()}

    def _both(self, values_S: Tensor) -> tuple[Tensor, Tensor]:
        """Of the chosen and of the rejected answers, which `parts` gives in turns."""
        return values_S[::2], values_S[1::2]


@dataclass(frozen=True, kw_only=True)
class Preference(Objective):
    """Base of the objectives over pairs. Learning rates are a fiftieth of imitation's: 2e-5 for LoRA (TRL: 1e-6 for whole models, ten times
    that for LoRA)."""

    lr_scale: ClassVar[float] = 0.02
    metrics: ClassVar[Mapping[str, bool]] = REWARDS

    @staticmethod
    def parts(record: Record) -> Mapping[str, Record]:
        chosen, rejected = pair(record)
        return {CHOSEN: chosen, REJECTED: rejected}

    def loss(self, logp_R: Tensor, ref_R: Tensor | None, segments: Segments) -> tuple[Tensor, dict[str, Tensor]]:
        return self.of_pairs(Pairs(logp_R, ref_R, segments))

    def of_pairs(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics), as `loss`."""
        raise NotImplementedError


def smoothed(margin_B: Tensor, label_smoothing: float) -> Tensor:
    """−(1 − ε) log σ(margin) − ε log σ(−margin): a share ε of the pairs is taken to be labelled the wrong way round."""
    from torch.nn.functional import logsigmoid

    return -(1 - label_smoothing) * logsigmoid(margin_B) - label_smoothing * logsigmoid(-margin_B)


def above_zero(name: str, value: float) -> list[str]:
    """The finding where a field is not above 0."""
    return [] if value > 0 else [f"{name} = {value}: must be above 0"]


def share(name: str, value: float, below: float = 1.0) -> list[str]:
    """The finding where a field is no share below `below`."""
    return [] if 0 <= value < below else [f"{name} = {value}: must be at least 0 and below {below:g}"]
