"""KTO (arXiv:2402.01306): answers that are wanted or unwanted, one by one. Pairs are read as one of each.

With c = log π(answer) − log π_base(answer), the loss is the mean over answers of

    kto                 desirable: w_d (1 − σ(β(c − z)))      undesirable: w_u (1 − σ(β(z − c)))
    apo_zero_unpaired   desirable: w_d (1 − σ(βc))            undesirable: w_u σ(βc)               APO (arXiv:2408.06266)

    z = max(0, mean of c over mismatched pairs): each prompt of the optimizer step with the answer of the row before it. It is a constant of
    the step, computed in forwards without gradients before it. TRL has one for each batch of a step.

Numbers are those of TRL's KTOTrainer. Logged: "kl" (z), and means over the wanted and the unwanted answers of βc and log π.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from trimtab.data.pairs import DESIRABLE, UNDESIRABLE, marked
from trimtab.data.rows import Record
from trimtab.objectives.base import Objective, Segments
from trimtab.objectives.preference import above_zero

if TYPE_CHECKING:
    from torch import Tensor

    from trimtab.data import Example


@dataclass(frozen=True, kw_only=True)
class Kto(Objective):
    """beta: how dear the distance from the base is. loss_type: the loss of an answer. desirable_weight,
    undesirable_weight: w_d and w_u; the paper wants w_d · desirable rows : w_u · undesirable rows between 1 and 4/3."""

    name: ClassVar[str] = "kto"
    needs_reference: ClassVar[bool] = True
    lr_scale: ClassVar[float] = 0.02
    metrics: ClassVar[Mapping[str, bool]] = {"rewards/margins": True, "rewards/chosen": True, "rewards/rejected": False}

    beta: float = 0.1
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def problems(self) -> list[str]:
        return [p for n in ("beta", "desirable_weight", "undesirable_weight") for p in above_zero(n, getattr(self, n))]

    @property
    def passes_before(self) -> int:
        return 2 if self.loss_type == "kto" else 0  # of the adapter, and of the base

    @staticmethod
    def parts(record: Record) -> Mapping[str, Record]:
        return marked(record)

    def probes(self, rows: Sequence[Example]) -> list[Example]:
        if self.loss_type != "kto":
            return []
        both = zip(rows, [rows[-1], *rows[:-1]], strict=True)  # of a pair, the two answers have one prompt: neither is mismatched there
        return [_mismatched(s, before.segments[i % len(before.segments)]) for row, before in both for i, s in enumerate(row.segments)]

    def unjudged(self, metric: str, roles: Collection[str]) -> str | None:
        wants = {"rewards/chosen": (DESIRABLE,), "rewards/rejected": (UNDESIRABLE,), "rewards/margins": (DESIRABLE, UNDESIRABLE)}
        names = {DESIRABLE: "wanted", UNDESIRABLE: "unwanted"}
        missing = [names[role] for role in wants.get(metric, ()) if role not in roles]
        return (
            f"no answer is {' and none is '.join(missing)}, and {metric} needs some: judge by loss, or add such rows" if missing else None
        )

    def loss(self, logp_R: Tensor, ref_R: Tensor | None, segments: Segments) -> tuple[Tensor, dict[str, Tensor]]:
        assert ref_R is not None
        logp_S = segments.sums(logp_R)
        ratio_S, counts = logp_S - segments.sums(ref_R), segments.of_all.segments_of
        wanted_S = segments.are(DESIRABLE)
        unwanted_S = 1 - wanted_S
        metrics: dict[str, Tensor] = {}
        shift = logp_S.new_zeros(())
        if segments.probes_P is not None:
            shift = segments.probes_P.mean().clamp(min=0)
            metrics["kl"] = shift * (len(segments.roles) / sum(counts.values()))
        good_S = 1 - (self.beta * (ratio_S - shift)).sigmoid()
        bad_S = 1 - (self.beta * (shift - ratio_S)).sigmoid()
        loss = (self.desirable_weight * wanted_S * good_S + self.undesirable_weight * unwanted_S * bad_S).sum() / sum(counts.values())
        for name, mine_S, role in (("chosen", wanted_S, DESIRABLE), ("rejected", unwanted_S, UNDESIRABLE)):
            if counts[role]:
                metrics[f"rewards/{name}"] = self.beta * (mine_S * ratio_S.detach()).sum() / counts[role]
                metrics[f"logps/{name}"] = (mine_S * logp_S.detach()).sum() / counts[role]
        if counts[DESIRABLE] and counts[UNDESIRABLE]:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return loss, metrics


def _mismatched(row: Example, other: Example) -> Example:
    """The prompt of a row with the answer of another one."""
    import numpy as np

    from trimtab.data import Example

    mine, theirs = int(row.supervised.argmax()), int(other.supervised.argmax())
    ids, supervised = (np.concatenate([a[:mine], b[theirs:]]) for a, b in ((row.ids, other.ids), (row.supervised, other.supervised)))
    return Example(ids, supervised, row.origin, row.row)
