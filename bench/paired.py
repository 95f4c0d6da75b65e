"""Two ways of answering the same rows, compared row by row: the means, their difference with an interval, and whether it may be chance.

The interval is a bootstrap's: rows are drawn with replacement, both numbers of a row together. Where every number is 0 or 1, the exact
McNemar test is told too: of the rows that only one of both has right, half would be each one's if they were equally good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

DRAWS = 10_000


def told(before: Sequence[float], after: Sequence[float]) -> str:
    """Both means in percent, and the difference in points: "40.0 -> 45.0, +5.0 [1.2, 8.8]; 30 rows gained, 10 lost, p = 0.002"."""
    low, high = interval(before, after)
    a, b = 100 * float(np.mean(before)), 100 * float(np.mean(after))
    text = f"{a:.1f} -> {b:.1f}, {b - a:+.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    if {*before, *after} <= {0, 1}:
        gained, lost, p = mcnemar(before, after)
        text += f"; {gained} rows gained, {lost} lost, p = {p:.2g}"
    return text


def interval(before: Sequence[float], after: Sequence[float], share: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Of the mean difference after - before: where `share` of the bootstrap's means lie."""
    difference = np.asarray(after, float) - np.asarray(before, float)
    draw = np.random.default_rng(seed)
    means = [difference[draw.integers(0, len(difference), len(difference))].mean() for _ in range(DRAWS)]
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def mcnemar(before: Sequence[float], after: Sequence[float]) -> tuple[int, int, float]:
    """Rows that only `after` has right, rows that only `before` has right, and the two-sided p of a split at least as uneven."""
    gained = sum(b > a for a, b in zip(before, after, strict=True))
    lost = sum(b < a for a, b in zip(before, after, strict=True))
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    return gained, lost, min(1.0, 2 * tail / 2**n)
