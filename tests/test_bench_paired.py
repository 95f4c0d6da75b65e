"""bench/paired.py: what it says of two ways of answering the same rows, beside cases that are computed by hand."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("paired", Path(__file__).parent.parent / "bench" / "paired.py")
assert SPEC is not None and SPEC.loader is not None
paired = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(paired)


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [(5, 0, 2 / 32), (0, 5, 2 / 32), (1, 1, 1.0), (0, 0, 1.0), (9, 1, 2 * (1 + 10) / 1024), (3, 2, 1.0)],
)
def test_the_exact_test_of_mcnemar(gained: int, lost: int, p: float) -> None:
    before = [0.0] * gained + [1.0] * lost + [1.0, 0.0]
    after = [1.0] * gained + [0.0] * lost + [1.0, 0.0]
    assert paired.mcnemar(before, after) == (gained, lost, pytest.approx(p))


def test_the_interval_is_that_of_the_paired_difference() -> None:
    """Beside the normal one of the same differences; rows of the same number on both sides do not widen it."""
    before = [float(i % 7) for i in range(400)]
    after = [b + (1.0 if i % 2 else 0.0) for i, b in enumerate(before)]
    low, high = paired.interval(before, after)
    error = 1.96 * math.sqrt(0.25 / 400)
    assert (low, high) == (pytest.approx(0.5 - error, abs=0.006), pytest.approx(0.5 + error, abs=0.006))
    assert paired.interval(before, before) == (0.0, 0.0)


def test_what_is_told() -> None:
    before, after = [1.0] * 40 + [0.0] * 60, [1.0] * 35 + [0.0] * 5 + [1.0] * 15 + [0.0] * 45
    assert paired.told(before, after).startswith("40.0 -> 50.0, +10.0 [") and "15 rows gained, 5 lost, p = 0.041" in paired.told(
        before, after
    )
    assert "gained" not in paired.told([0.25, 0.5], [0.5, 0.5])
