"""What a step takes by the number of its rows: measured before the first one, and learnt from those that follow. Reading the weights takes
as long for a few rows as for one; from how many on a row takes time of its own depends on the machine, the base, and its kernels' tiles."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from trimtab.serve.blocks import BlockPool
from trimtab.serve.runner import Feed, Runner

MEASURED = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64)
"""Rows of the steps that are timed, each once: what was wrong with it is learnt later."""
LEARN = 0.1
"""Part of a step's surprise that is learnt."""


@dataclass
class StepCost:
    """rows, seconds: steps that were measured, at least two, by growing rows; more rows never take less."""

    rows: Sequence[int]
    seconds: list[float]

    def __call__(self, rows: int) -> float:
        """Seconds of a step: between two that were measured, and beyond the last, on the straight line through them."""
        at, part = self._place(rows)
        return (1 - part) * self.seconds[at - 1] + part * self.seconds[at]

    def learn(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long: contexts, other adapters and other programs make it longer or shorter than at first."""
        at, part = self._place(min(rows, self.rows[-1]))
        surprise = LEARN * (seconds - self(rows))
        self.seconds[at - 1] += (1 - part) * surprise
        self.seconds[at] += part * surprise
        self.seconds = list(accumulate(self.seconds, max))

    def _place(self, rows: int) -> tuple[int, float]:
        """The measured step above these rows, and which part of the way from the one below they are."""
        at = min(max(bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        return at, (rows - self.rows[at - 1]) / (self.rows[at] - self.rows[at - 1])

    @classmethod
    def measured(cls, runner: Runner, pool: BlockPool) -> StepCost:
        """Of the base's own rows, each the first of a sequence. All write the same keys and values into one block, which nobody uses."""
        blocks = pool.take(1)
        _seconds(runner, [Feed([0], 0, blocks)])  # what is made at first use
        seconds = [_seconds(runner, [Feed([0], 0, blocks)] * rows) for rows in MEASURED]
        pool.release(blocks)
        return cls(MEASURED, list(accumulate(seconds, max)))


def _seconds(runner: Runner, feeds: Sequence[Feed]) -> float:
    began = time.perf_counter()
    runner(feeds)[0, 0].item()  # waits for a device
    return time.perf_counter() - began
