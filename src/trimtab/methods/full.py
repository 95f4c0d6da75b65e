"""Full fine-tuning, for comparison: a trainable copy of all weights.

It is not an adapter. It shares nothing with the base, so it has its own forward, cannot be in a mixed batch, and is not in METHODS. It
trains from the same run file, with the same data, schedule and reports, and is saved as a model folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trimtab.bases.spec import Spec
from trimtab.methods.base import Method, Site


@dataclass(frozen=True, kw_only=True)
class FullConfig(Method):
    """No hyperparameters of its own: every weight of the base trains."""

    name: ClassVar[str] = "full"
    preset_lr: ClassVar[float] = 5e-5

    def sites(self, spec: Spec) -> list[Site]:
        return []
