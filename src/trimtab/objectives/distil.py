"""Distillation: predict what a teacher predicts, at each supervised token, instead of that token alone.

With p the teacher's distribution and q the adapter's, both at `distil_temperature`, over the teacher's K likeliest tokens and one class for
all others:

    L = mean over supervised tokens of  D(p, q)
    beta 0          KL(p ‖ q) = Σ p (log p − log q)        forward: covers all that the teacher may say
    beta 1          KL(q ‖ p)                              reverse: keeps to what the teacher would say
    between         beta KL(p ‖ m) + (1 − beta) KL(q ‖ m),  m = beta p + (1 − beta) q       (GKD, arXiv:2306.13649)

With K the vocabulary this is TRL's generalised Jensen-Shannon divergence. The teacher is computed once for each data set, before the first
step: another base is gone from memory by then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trimtab.objectives.base import Objective, Segments, Taught
from trimtab.objectives.preference import above_zero

if TYPE_CHECKING:
    from torch import Tensor

RARE = 1e-6
"""The least probability of all other tokens together: below it fp32 has rounding alone."""


@dataclass(frozen=True, kw_only=True)
class Distil(Objective):
    """teacher: a base, or an adapter on the run's base: a folder, or a name in the store; "base": the run's base as it is. distil_beta:
    0 is the forward KL divergence, 1 the reverse one, between them their generalised Jensen-Shannon divergence. distil_temperature: logits
    of both are divided by it. teacher_tokens: K; 8 bytes are kept for each of a supervised token."""

    name: ClassVar[str] = "distil"

    teacher: str = "base"
    distil_beta: float = 0.0
    distil_temperature: float = 1.0
    teacher_tokens: int = 64

    def problems(self) -> list[str]:
        found = [] if self.teacher.strip() else ["teacher = '': name a base or an adapter"]
        found += [] if 0 <= self.distil_beta <= 1 else [f"distil_beta = {self.distil_beta}: must be from 0 to 1"]
        found += above_zero("distil_temperature", self.distil_temperature)
        return found + ([] if self.teacher_tokens >= 1 else [f"teacher_tokens = {self.teacher_tokens}: must be at least 1"])

    @property
    def taught_by(self) -> Taught:
        return Taught(self.teacher, self.teacher_tokens, self.distil_temperature)

    def loss(self, logp_R: Tensor, ref_R: Tensor | None, segments: Segments) -> tuple[Tensor, dict[str, Tensor]]:
        import torch

        assert ref_R is not None
        student, teacher = _with_rest(logp_R), _with_rest(ref_R)
        beta = self.distil_beta
        if beta == 0:
            divergence = teacher.exp() * (teacher - student)
        elif beta == 1:
            divergence = student.exp() * (student - teacher)
        else:
            mixed = torch.logsumexp(torch.stack([student + math.log1p(-beta), teacher + math.log(beta)]), 0)
            divergence = beta * teacher.exp() * (teacher - mixed) + (1 - beta) * student.exp() * (student - mixed)
        return divergence.sum() / segments.of_all.targets, {}


def _with_rest(logp_RK: Tensor) -> Tensor:
    """[R, K + 1]: the last is the log-probability of all tokens but these."""
    import torch

    rest = (1 - logp_RK.exp().sum(1, keepdim=True)).clamp(min=RARE).log()
    return torch.cat([logp_RK, rest], 1)
