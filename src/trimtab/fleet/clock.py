"""Time that goes from event to event."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count


class Clock:
    """now: seconds. What is due at the same moment happens in the order in which it was asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def __call__(self) -> float:
        return self.now

    def at(self, when: float, happens: Callable[[], None]) -> None:
        """Have something happen, not before now."""
        heappush(self._due, (max(when, self.now), next(self._order), happens))

    def run(self) -> None:
        """Until nothing is due."""
        while self._due:
            self.now, _, happens = heappop(self._due)
            happens()
