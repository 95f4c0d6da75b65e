"""ORPO (arXiv:2403.07691): imitate the chosen answers, and prefer them by their odds. No reference.

    L = NLL − β · mean over pairs of log σ(log odds(chosen) − log odds(rejected))

    log odds = l̄ − log(1 − exp l̄), l̄: log π of a token, on average over an answer
    NLL: −mean log π over the tokens of all chosen answers, as in the paper. TRL imitates the prompts of the chosen answers too.

All else is as in TRL's ORPOTrainer. Rewards that are logged: β l̄.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trimtab.objectives.preference import Pairs, Preference, above_zero

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Orpo(Preference):
    """beta: weight of the odds; λ in the paper."""

    name: ClassVar[str] = "orpo"

    beta: float = 0.1

    def problems(self) -> list[str]:
        return above_zero("beta", self.beta)

    def of_pairs(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        from torch.nn.functional import logsigmoid

        chosen, rejected = pairs.means
        log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
        ratio, nll = logsigmoid(log_odds), pairs.chosen_nll
        metrics = pairs.metrics((self.beta * chosen, self.beta * rejected), (chosen, rejected))
        metrics |= {
            "nll_loss": nll.detach(),
            "log_odds_ratio": pairs.mean(ratio).detach(),
            "log_odds_chosen": pairs.mean(log_odds).detach(),
        }
        return nll - self.beta * pairs.mean(ratio), metrics


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 − exp x) for x ≤ 0, whichever way is exact (Mächler 2012). fp32 may round x up to 0, where it has none: −1e-7 is taken then."""
    import torch

    x = x.clamp(max=-1e-7)
    near = x > -0.6931471805599453
    safe = torch.where(near, x, -1.0)  # so that the branch that is not taken has no infinite gradient
    return torch.where(near, (-safe.expm1()).log(), (-torch.where(near, -1.0, x).exp()).log1p())
