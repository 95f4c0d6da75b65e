"""Which rows of a weighted source an epoch draws, by the documented function written again."""

from __future__ import annotations

import numpy as np
import pytest

from trimtab.data.reading import drawn


@pytest.mark.parametrize(("weight", "whole", "part"), [(1.0, 1, 0), (2.0, 2, 0), (0.5, 0, 6), (2.25, 2, 3), (0.01, 0, 1)])
def test_all_rows_whole_times_and_a_seeded_sample_of_its_own_for_each_source(weight: float, whole: int, part: int) -> None:
    samples = []
    for seed in (0, 7):
        for source in range(3):
            chosen = drawn(12, weight, seed, source)
            draws = np.random.Philox(np.random.SeedSequence([seed, source])).random_raw(12)
            sample = sorted(range(12), key=lambda i: draws[i])[:part]
            assert sorted(chosen) == sorted([*range(12)] * whole + sample)
            samples.append(tuple(sorted(sample)))
    assert part < 6 or len(set(samples)) == 6, "neither seeds nor sources share a sample"
