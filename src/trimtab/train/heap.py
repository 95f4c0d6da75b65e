"""The process's memory between steps: kept for the next step, and returned to the system if it is only fragmented.

A step frees what it allocated, and the next one allocates as much again. By default glibc returns the free end of its heap to the system
after every step, and each page then costs a fault when it is used again: a sixth of the speed. But batches differ in shape, and the next
one cannot use every free piece. Six LoRAs in one run were seen to grow from 2 to 5 GB, of which 1.2 were in use. So the heap keeps what
steps need, and returns everything when it has grown well beyond that.

With activation checkpointing memory matters more than time. Each layer leaves something in between the pieces that it frees, and glibc
fills such gaps badly: the heap grew by 2 GB for 0.25 in use. So there every large block is mapped by itself, which costs the faults.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import psutil

from trimtab.ops.reuse import reuse_blocks

GROWTH = 1.3
"""How far the resident memory may grow beyond that after a step which began with nothing to spare."""
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""glibc's numbers of these settings of `mallopt`."""
LARGEST_BLOCK, LARGEST_SPARED = 2**25, 2**20
"""Bytes; what is larger, and fits into no freed piece, is mapped by itself: glibc takes no higher threshold; and where memory counts."""


class Heap:
    """Watches the process between joint steps, and has torch use freed blocks again (`ops.reuse`). sparing: memory matters more than time.
    It does nothing without glibc."""

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
    reuse_blocks()
    mallopt(TRIM_THRESHOLD, 2**31 - 1)
    mallopt(MMAP_THRESHOLD, largest)
    return lambda: trim(0)
