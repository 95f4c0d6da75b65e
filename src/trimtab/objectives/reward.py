"""A reward model: a head of one score, larger for the chosen of two answers (Bradley-Terry; arXiv:1706.03741, 2203.02155).

    L = mean over pairs of −log σ(r_chosen − r_rejected − m) + c (r_chosen + r_rejected)²

r: the score at a conversation's last token. m: the row's `margin` (arXiv:2307.09288), 0 where it has none. c: `center_rewards_coefficient`,
which keeps rewards around 0 (arXiv:2312.09244). Numbers are those of TRL's RewardTrainer. Logged: accuracy (pairs whose chosen answer has
the larger reward), margin, mean_reward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trimtab.bases.template import BadRow
from trimtab.data.keys import is_empty
from trimtab.data.pairs import pair
from trimtab.data.rows import Read, Record
from trimtab.methods import Head
from trimtab.objectives.base import Objective, Segments
from trimtab.objectives.preference import CHOSEN, REJECTED

if TYPE_CHECKING:
    from torch import Tensor

MARGIN = " by "
"""Between the role and the margin of a chosen answer that has one."""


@dataclass(frozen=True, kw_only=True)
class Reward(Objective):
    """center_rewards_coefficient: c above; None: 0."""

    name: ClassVar[str] = "reward"
    reads_head: ClassVar[bool] = True
    lr_scale: ClassVar[float] = 0.1
    metrics: ClassVar[Mapping[str, bool]] = {"accuracy": True, "margin": True, "mean_reward": True}
    head: ClassVar[Head] = Head(("reward",))

    center_rewards_coefficient: float | None = None

    def problems(self) -> list[str]:
        c = self.center_rewards_coefficient
        return [f"center_rewards_coefficient = {c}: must be at least 0"] if c is not None and c < 0 else []

    @staticmethod
    def parts(record: Record) -> Mapping[str, Record]:
        margin = record.get("margin")
        chosen, rejected = pair({k: v for k, v in record.items() if k != "margin"})
        role = CHOSEN if is_empty(margin) else f"{CHOSEN}{MARGIN}{_number(margin)!r}"
        return {role: Read(chosen), REJECTED: Read(rejected)}

    def loss(self, logp_R: Tensor, ref_R: Tensor | None, segments: Segments) -> tuple[Tensor, dict[str, Tensor]]:
        from torch.nn.functional import logsigmoid

        chosen_B, rejected_B = logp_R[::2, 0], logp_R[1::2, 0]
        margin_B = segments.floats([float(role.partition(MARGIN)[2] or 0.0) for role in segments.roles[::2]])
        loss_B, pairs = -logsigmoid(chosen_B - rejected_B - margin_B), segments.of_all.rows
        if self.center_rewards_coefficient:
            loss_B = loss_B + self.center_rewards_coefficient * (chosen_B + rejected_B) ** 2
        won, lost = chosen_B.detach(), rejected_B.detach()
        logged = {"accuracy": (won > lost).float(), "margin": won - lost, "mean_reward": (won + lost) / 2}
        return loss_B.sum() / pairs, {name: values.sum() / pairs for name, values in logged.items()}


def _number(margin: object) -> float:
    try:
        value = float(margin)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(margin, bool) or not math.isfinite(value):
        raise BadRow(f"margin: {margin!r} is no finite number")
    return value
