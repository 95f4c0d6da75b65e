"""Contrastive preference optimisation (arXiv:2401.08417): a loss over pairs without a reference, and imitation of the chosen answers.

With Δ = log π(chosen) − log π(rejected), and Δ̄ the same of means over tokens:

    L = mean over pairs of ℓ + cpo_alpha · NLL      NLL: −mean log π over the tokens of all chosen answers

    sigmoid  ℓ = −(1 − ε) log σ(βΔ) − ε log σ(−βΔ)
    hinge    ℓ = max(0, 1 − βΔ)
    ipo      ℓ = (Δ̄ − 1/(2β))²

Numbers are those of TRL's CPOTrainer. Rewards that are logged: β log π, for `ipo` of means over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from trimtab.objectives.preference import Pairs, Preference, above_zero, share, smoothed

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Cpo(Preference):
    """beta: how steep the loss is. loss_type: the loss of a pair. label_smoothing: ε of `sigmoid`. cpo_alpha: weight of imitation."""

    name: ClassVar[str] = "cpo"

    beta: float = 0.1
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0
    cpo_alpha: float = 1.0

    def problems(self) -> list[str]:
        found = above_zero("beta", self.beta) + share("label_smoothing", self.label_smoothing)
        if self.label_smoothing and self.loss_type != "sigmoid":
            found.append(f"label_smoothing = {self.label_smoothing}: only sigmoid has it, this is {self.loss_type}")
        return found + ([] if self.cpo_alpha >= 0 else [f"cpo_alpha = {self.cpo_alpha}: must not be below 0"])

    def of_pairs(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = logps = pairs.means if self.loss_type == "ipo" else pairs.logps
        margin = chosen - rejected
        if self.loss_type == "sigmoid":
            losses = smoothed(self.beta * margin, self.label_smoothing)
        elif self.loss_type == "hinge":
            losses = (1 - self.beta * margin).relu()
        else:
            losses = (margin - 1 / (2 * self.beta)) ** 2
        nll = pairs.chosen_nll
        metrics = pairs.metrics((self.beta * chosen, self.beta * rejected), logps)
        return pairs.mean(losses) + self.cpo_alpha * nll, metrics | {"nll_loss": nll.detach()}
