"""The process's memory between steps: kept for the next one, given back where it is only scattered.

A step frees what it allocated, and the next one asks for as much. glibc by itself hands a free end of its heap back to the system after
every step, and each page of it costs a fault when it comes again: a sixth of the speed. But batches differ in shape, and what they free
in pieces the next one cannot always use: six LoRAs in one run were seen to grow from 2 to 5 GB, of which 1.2 were in use. So the heap keeps
what steps need, and gives all back where it has grown well beyond that.

Where memory counts more than time (activation checkpointing) that is the wrong bargain: each layer leaves something among what it frees,
and glibc fills such gaps badly, so that the heap grew by 2 GB for 0.25 in use. There, all that is large is mapped by itself, at the price
of those faults.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import psutil

GROWTH = 1.3
"""How far the resident memory may grow beyond that after a step which began with nothing to spare."""
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""glibc's numbers of these settings of `mallopt`."""
LARGEST_BLOCK, LARGEST_SPARED = 2**25, 2**20
"""Bytes; what is larger is mapped and unmapped by itself: glibc takes no higher threshold; and where memory counts."""


class Heap:
    """Watches the process between joint steps. sparing: memory counts more than time. Does nothing where there is no glibc."""

    def __init__(self, sparing: bool = False) -> None:
        self.trim = _keep_what_is_freed(LARGEST_SPARED if sparing else LARGEST_BLOCK)
        self.process = psutil.Process()
        self.allowed = 0.0
        """Bytes that may stay resident; 0 where the next step shows what steps need."""

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
        self.allowed = 0.0
        return True


def _keep_what_is_freed(largest: int) -> Callable[[], object] | None:
    """Tell glibc to keep freed blocks up to this size; returns what gives it back, or None where there is no glibc."""
    try:
        libc: Any = ctypes.CDLL(None)
        trim, mallopt = libc.malloc_trim, libc.mallopt
    except (OSError, AttributeError, TypeError):
        return None
    mallopt(TRIM_THRESHOLD, 2**31 - 1)
    mallopt(MMAP_THRESHOLD, largest)
    return lambda: trim(0)
