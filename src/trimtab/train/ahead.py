"""What a run has before it beside its steps: validations, and the scores at its end. Counted in tokens that go through a forward."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trimtab.data import Example

DECODED = 4.0
"""What a generated token costs beside one of many in a forward without gradients: an assumption, until a validation has been timed."""


@dataclass(frozen=True)
class Held:
    """Held-out rows, as far as they cost. examples: of all rows. asked: how many of them have an answer. labels: of the classification."""

    examples: Sequence[Example]
    asked: int
    labels: int
    max_new_tokens: int

    @property
    def longest(self) -> int:
        return max((e.longest for e in self.examples), default=0)

    @property
    def tokens(self) -> int:
        return sum(e.tokens for e in self.examples)

    def work(self, generates: bool, chooses: bool) -> float:
        """Of judging one contestant: a pass for the loss; prompts and answers, of their references' lengths; prompts and labels."""
        share = self.asked / len(self.examples) if self.examples else 0.0
        written = sum(min(self.max_new_tokens, e.targets) for e in self.examples) * share
        prompts = self.tokens * share - written
        answers = written or self.max_new_tokens * self.asked  # of prompts alone it is not known how long they are
        generated = prompts + DECODED * answers if generates else 0.0
        return self.tokens + generated + (prompts + self.labels * answers if chooses and self.labels else 0.0)


@dataclass(frozen=True)
class Ahead:
    """every: variant -> steps between its validations; variants that are never validated are not in it. valid: what one of them takes.
    first: what the first one of all takes besides, as the base is judged then. scoring: what the scores at the end take."""

    every: Mapping[str, int]
    valid: Mapping[str, float]
    first: float
    scoring: float

    def to_go(self, variant: str, done: int, total: int) -> int:
        """Validations of a variant that come after `done` of its `total` steps: every so many, and at its end."""
        every = self.every.get(variant)
        if every is None or done >= total:
            return 0
        return total // every - done // every + bool(total % every)


def validations(total: int, every: int) -> int:
    """How often a variant of `total` steps is validated."""
    return math.ceil(total / every)
