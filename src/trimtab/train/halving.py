"""Successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943): of variants that train together, the worst end at every rung, so that
the remaining time goes to the better ones.

A decision is stored in the variant's `progress.finished_early`, which checkpoints have. A resumed run makes the later ones again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from trimtab.train.options import lower_is_better

if TYPE_CHECKING:
    from trimtab.train.variant import Variant

HALVED = "halved at step "
"""How `progress.finished_early` begins for a variant that ended here."""


class Halving(BaseModel):
    """When rungs come, and what share of the variants goes on after each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep: float = Field(0.5, gt=0, lt=1, description="share of the live trials that go on after a rung, rounded down; always at least one")
    every: int = Field(ge=1, description="steps between rungs, which are the validations too")


def end_worst(halving: Halving, validated: Iterable[Variant]) -> list[Variant]:
    """End the worst of the variants that have just been validated, if the step is a rung; returns them, best first.

    All remaining variants of a run are at the same step. They are ranked by this validation, not by the best so far. If two are equal, the
    one with the lower loss goes on; if that is equal too, the one that comes first in the run. A value that is not finite is the worst.
    """
    live = sorted((v for v in validated if v.live and v.progress.step % halving.every == 0), key=_badness)
    stay = max(1, math.floor(halving.keep * len(live) + 1e-9))  # 0.29 · 100 is a little below 29
    for rank, v in enumerate(live[stay:], stay + 1):
        metric = v.config.options.valid_metric
        value = v.progress.valid[-1][metric]
        shown = "not finite" if value is None else f"{value:.6g}"
        v.progress.finished_early = f"{HALVED}{v.progress.step}: {metric} {shown}, rank {rank} of {len(live)}"
    return live[stay:]


def _badness(v: Variant) -> tuple[float, float]:
    metric, last = v.config.options.valid_metric, v.progress.valid[-1]
    value, loss = last[metric], last["loss"]
    bad = math.inf if value is None else value if lower_is_better(metric) else -value
    return bad, math.inf if loss is None else loss
