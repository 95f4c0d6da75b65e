"""Segments that a variant has drawn itself, and what is known of them beside their tokens: what they are worth, and how likely they were.

The supervised tokens of a `Sample` are the answer; all before them is the prompt. Samples of one prompt are segments of one row, so that
their prompt is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trimtab.data.examples import Example
from trimtab.objectives.base import Samples

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Sample(Example):
    """A drawn answer. advantage: how much better than expected it is. old_R: log p of its tokens in the forward of the first step on it,
    fp32; None where that is still to come: then they are what that finds. base_R: those of the base; None where no objective wants them.
    drawn_R: those of the sampler, to measure how far it is from the trainer."""

    advantage: float = 0.0
    old_R: np.ndarray | None = None
    base_R: np.ndarray | None = None
    drawn_R: np.ndarray | None = None

    @property
    def targets_here(self) -> int:
        """Tokens of this answer."""
        return int(self.supervised.sum())


def prompt_of(segment: Example) -> int | None:
    """How many tokens an answer that was drawn has before it; None of other segments. What it says calls no aLoRA: none was called while it
    was drawn."""
    return len(segment.ids) - segment.targets_here if isinstance(segment, Sample) else None


def samples_of(segments: Sequence[Example], device: torch.device) -> Samples:
    """What the segments of one variant know; what one of them has, all have."""
    from trimtab import ops

    mine = [s for s in segments if isinstance(s, Sample)]
    assert len(mine) == len(segments), "segments of an objective that samples are samples"
    found = {"advantage_S": np.array([s.advantage for s in mine], dtype=np.float32)}
    for name in ("old_R", "base_R", "drawn_R"):
        if known := [values for s in mine if (values := getattr(s, name)) is not None]:
            found[name] = np.concatenate(known)
    return Samples(**dict(zip(found, ops.upload(list(found.values()), device), strict=True)))
