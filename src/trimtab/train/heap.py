"""Memory that is freed goes back to the system, now and then.

Batches differ in shape from step to step, and glibc keeps what they free in pieces that the next one cannot use: six LoRAs in one run
were seen to grow from 2 to 5 GB, of which 1.2 were in use. Giving everything back after each step costs a sixth of the speed, so it is
done where the process has grown well beyond what its first step left.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import psutil

GROWTH = 1.3
"""How far the resident memory may grow beyond that after the first step."""


class Heap:
    """Watches the process between joint steps. Does nothing where there is no glibc."""

    def __init__(self) -> None:
        self.trim = _malloc_trim()
        self.process = psutil.Process()
        self.allowed = 0.0

    def after_step(self) -> bool:
        """Give freed memory back if the process has outgrown its allowance; whether it was done."""
        if self.trim is None:
            return False
        resident = self.process.memory_info().rss
        if not self.allowed:
            self.allowed = GROWTH * resident
        if resident <= self.allowed:
            return False
        self.trim()
        return True


def _malloc_trim() -> Callable[[], object] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    return lambda: trim(0)
