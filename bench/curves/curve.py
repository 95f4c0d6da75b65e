"""What a file of this folder holds: a `CURVE`, whose `ours` and `peers` get a point's value and return a number (or text) a column.

These functions import what they measure inside, and warm up what is not to be measured. `cpu_seconds` and `peak_bytes` measure.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Measure = Callable[[Any], Sequence[float | str]]


@dataclass(frozen=True)
class Point:
    """name: as the table shows it. value: what the functions get. long: left out by --quick."""

    name: str
    value: Any
    long: bool = False


@dataclass(frozen=True)
class Curve:
    """what: the work, one line. grows: head of the first column. threads: of OpenMP. timeout_s: of one point."""

    what: str
    grows: str
    points: Sequence[Point]
    columns: Sequence[str]
    ours: Measure
    limit: Callable[[Point], str]
    peers: Mapping[str, Measure] = field(default_factory=dict)
    threads: int = 1
    timeout_s: int = 600

    def measure(self, side: str, index: int) -> list[float | str]:
        function = self.ours if side == "trimtab" else self.peers[side]
        return list(function(self.points[index].value))


def cpu_seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """CPU seconds of one run of `work`, all threads of this process: the least of so many runs."""
    found = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found)


def peak_bytes() -> int:
    """The most memory that this process has had resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
