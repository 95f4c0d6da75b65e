"""Direct preference optimisation: raise the chosen answer's probability over the rejected one's, measured against the base's.

With c = log π(chosen) − log π_base(chosen), r the same of the rejected answer, Δ = c − r, and c̄, r̄, Δ̄ the same divided by each answer's
tokens, the loss is the mean over pairs of

    sigmoid       −log σ(βΔ)                                            DPO (arXiv:2305.18290)
    hinge         max(0, 1 − βΔ)                                        SLiC (arXiv:2309.06657)
    ipo           (Δ̄ − 1/(2β))²                                         IPO (arXiv:2310.12036)
    exo_pair      KL of σ(±βΔ) from (1 − ε, ε)                          EXO (arXiv:2402.00856)
    nca_pair      −log σ(βc) − ½ log σ(−βc) − ½ log σ(−βr)              NCA (arXiv:2402.05369)
    robust        [−(1 − ε) log σ(βΔ) + ε log σ(−βΔ)] / (1 − 2ε)        robust DPO (arXiv:2403.00409)
    bco_pair      −log σ(βc) − log σ(−βr)                               BCO (arXiv:2404.04656)
    sppo_hard     (c − 1/(2β))² + (r + 1/(2β))²                         SPPO (arXiv:2405.00675)
    apo_zero      1 − σ(βc) + σ(βr)                                     APO (arXiv:2408.06266)
    apo_down      σ(βc) + 1 − σ(βΔ)                                     APO
    discopop      −log σ(βΔ) (1 − m) + exp(−βΔ) m, m = σ(βΔ/τ)          DiscoPOP (arXiv:2406.08414)
    sigmoid_norm  −log σ(βΔ̄)                                            Tülu 3 (arXiv:2411.15124)
    sft           −mean log π over the tokens of all chosen answers     as a term beside another: RPO, MPO

and of several the sum, each times its weight. Numbers are those of TRL's DPOTrainer. Rewards that are logged: βc and βr.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from trimtab.objectives.preference import Pairs, Preference, above_zero, share, smoothed

if TYPE_CHECKING:
    from torch import Tensor

LossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
    "sft",
]


@dataclass(frozen=True, kw_only=True)
class Dpo(Preference):
    """beta: how dear the distance from the base is; a smaller one lets the adapter go further. loss_type: one, or a list. loss_weights: one
    for each of them; None: 1. label_smoothing: ε of `robust` and `exo_pair`, the share of pairs that are labelled the wrong way round.
    discopop_tau: τ of `discopop`."""

    name: ClassVar[str] = "dpo"
    needs_reference: ClassVar[bool] = True

    beta: float = 0.1
    loss_type: LossType | tuple[LossType, ...] = "sigmoid"
    loss_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05

    @property
    def types(self) -> tuple[LossType, ...]:
        return (self.loss_type,) if isinstance(self.loss_type, str) else self.loss_type

    @property
    def terms(self) -> tuple[tuple[str, float], ...]:
        """(loss type, weight)"""
        return tuple(zip(self.types, self.loss_weights or (1.0,) * len(self.types), strict=True))

    def problems(self) -> list[str]:
        types = self.types
        found = above_zero("beta", self.beta) + above_zero("discopop_tau", self.discopop_tau)
        found += share("label_smoothing", self.label_smoothing, 0.5 if "robust" in types else 1.0)
        if not types or len(set(types)) < len(types):
            found.append(f"loss_type = {list(types)}: name at least one, and each once")
        if self.loss_weights is not None and len(self.loss_weights) != len(types):
            found.append(f"loss_weights = {list(self.loss_weights)}: one for each of the {len(types)} loss types")
        if "exo_pair" in types and self.label_smoothing == 0:
            found.append("label_smoothing = 0.0: exo_pair needs one above 0, such as 0.001: its loss has the logarithm of it")
        elif self.label_smoothing and not {"robust", "exo_pair"} & set(types):
            found.append(f"label_smoothing = {self.label_smoothing}: only robust and exo_pair have it")
        return found

    def of_pairs(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = pairs.ratios
        parts = [weight * (pairs.chosen_nll if kind == "sft" else pairs.mean(_LOSSES[kind](self, pairs))) for kind, weight in self.terms]
        return sum(parts[1:], parts[0]), pairs.metrics((self.beta * chosen, self.beta * rejected), pairs.logps)


# ---- the loss of each pair, [B] ------------------------------------------------------------


def _margin(o: Dpo, pairs: Pairs) -> Tensor:
    """βΔ"""
    chosen, rejected = pairs.ratios
    return o.beta * (chosen - rejected)


def _mean_margin(pairs: Pairs) -> Tensor:
    """Δ̄"""
    (chosen, rejected), (long_chosen, long_rejected) = pairs.ratios, pairs.lengths
    return chosen / long_chosen - rejected / long_rejected


def _sigmoid(o: Dpo, pairs: Pairs) -> Tensor:
    return smoothed(_margin(o, pairs), 0.0)


def _hinge(o: Dpo, pairs: Pairs) -> Tensor:
    return (1 - _margin(o, pairs)).relu()


def _ipo(o: Dpo, pairs: Pairs) -> Tensor:
    return (_mean_margin(pairs) - 1 / (2 * o.beta)) ** 2


def _exo_pair(o: Dpo, pairs: Pairs) -> Tensor:
    from torch.nn.functional import logsigmoid

    margin = _margin(o, pairs)
    wins = margin.sigmoid() * (logsigmoid(margin) - math.log1p(-o.label_smoothing))
    return wins + (-margin).sigmoid() * (logsigmoid(-margin) - math.log(o.label_smoothing))


def _nca_pair(o: Dpo, pairs: Pairs) -> Tensor:
    from torch.nn.functional import logsigmoid

    chosen, rejected = (o.beta * ratio for ratio in pairs.ratios)
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _robust(o: Dpo, pairs: Pairs) -> Tensor:
    from torch.nn.functional import logsigmoid

    margin = _margin(o, pairs)
    clean, flipped = -(1 - o.label_smoothing) * logsigmoid(margin), -o.label_smoothing * logsigmoid(-margin)
    return (clean - flipped) / (1 - 2 * o.label_smoothing)


def _bco_pair(o: Dpo, pairs: Pairs) -> Tensor:
    from torch.nn.functional import logsigmoid

    chosen, rejected = pairs.ratios
    return -logsigmoid(o.beta * chosen) - logsigmoid(-o.beta * rejected)


def _sppo_hard(o: Dpo, pairs: Pairs) -> Tensor:
    chosen, rejected = pairs.ratios
    return (chosen - 0.5 / o.beta) ** 2 + (rejected + 0.5 / o.beta) ** 2


def _apo_zero(o: Dpo, pairs: Pairs) -> Tensor:
    chosen, rejected = pairs.ratios
    return 1 - (o.beta * chosen).sigmoid() + (o.beta * rejected).sigmoid()


def _apo_down(o: Dpo, pairs: Pairs) -> Tensor:
    return (o.beta * pairs.ratios[0]).sigmoid() + 1 - _margin(o, pairs).sigmoid()


def _discopop(o: Dpo, pairs: Pairs) -> Tensor:
    margin = _margin(o, pairs)
    modulation = (margin / o.discopop_tau).sigmoid()
    return smoothed(margin, 0.0) * (1 - modulation) + (-margin).exp() * modulation


def _sigmoid_norm(o: Dpo, pairs: Pairs) -> Tensor:
    return smoothed(o.beta * _mean_margin(pairs), 0.0)


_LOSSES: Mapping[str, Callable[[Dpo, Pairs], Tensor]] = {kind: globals()[f"_{kind}"] for kind in get_args(LossType) if kind != "sft"}
