"""SimPO (arXiv:2405.14734): the mean log-probability of a token is the reward, and the chosen one must win by a margin. No reference.

    L = mean over pairs of −(1 − ε) log σ(u) − ε log σ(−u) + cpo_alpha · NLL,   u = β(l̄_chosen − l̄_rejected) − γ

    l̄: log π of a token, on average over an answer.  NLL: −mean log π over the tokens of all chosen answers (CPO-SimPO)

Numbers are those of TRL's CPOTrainer with loss_type simpo. Rewards that are logged: β l̄.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trimtab.objectives.preference import Pairs, Preference, above_zero, share, smoothed

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Simpo(Preference):
    """beta: how steep the loss is; 2 to 2.5 in the paper. simpo_gamma: γ, the margin; 0.5 to 1.6. label_smoothing: ε, the part of pairs
    that count the wrong way round. cpo_alpha: weight of imitation."""

    name: ClassVar[str] = "simpo"

    beta: float = 2.0
    simpo_gamma: float = 1.0
    label_smoothing: float = 0.0
    cpo_alpha: float = 0.0

    def problems(self) -> list[str]:
        found = above_zero("beta", self.beta) + share("label_smoothing", self.label_smoothing)
        return found + [f"{n} = {v}: must not be below 0" for n in ("simpo_gamma", "cpo_alpha") if (v := getattr(self, n)) < 0]

    def of_pairs(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = pairs.means
        margin = self.beta * (chosen - rejected) - self.simpo_gamma
        metrics = pairs.metrics((self.beta * chosen, self.beta * rejected), (chosen, rejected))
        loss = pairs.mean(smoothed(margin, self.label_smoothing))
        if not self.cpo_alpha:
            return loss, metrics
        nll = pairs.chosen_nll
        return loss + self.cpo_alpha * nll, metrics | {"nll_loss": nll.detach()}
