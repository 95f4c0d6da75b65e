"""Memory that has run out: told from other errors, and reported with what was being done, how much was asked for, and what would fit."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from trimtab.errors import TrimtabError

_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "cannot allocate memory", "unable to allocate")
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "pib": 2**50}
_ASKED = re.compile(r"(?:tried|unable) to allocate ([\d.]+) (bytes|[kmgtp]ib)", re.IGNORECASE)
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""A container's limit, and what it has in use."""


class OutOfMemory(TrimtabError):
    """Memory has run out."""

    http_status = 503


def ran_out(error: BaseException | None) -> bool:
    """Whether an error means that memory could not be had: Python's, NumPy's, torch's, the system's, or one of them in disguise."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        if not isinstance(error, TrimtabError) and any(word in str(error).lower() for word in _WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def asked_bytes(error: BaseException) -> int | None:
    """How much was asked for at once, where the error says so."""
    found = _ASKED.search(str(error))
    return int(float(found[1]) * _UNITS[found[2].lower()]) if found else None


def machine_memory() -> tuple[int, int]:
    """(bytes in all, of these free at the moment): the machine's, or those of the container, which sees the machine's but may use less."""
    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    for limit, used in CGROUPS:
        if Path(limit).exists() and (text := Path(limit).read_text().strip()).isdigit():
            taken = Path(used).read_text().strip() if Path(used).exists() else ""
            total, free = min(total, int(text)), min(free, int(text) - (int(taken) if taken.isdigit() else 0))
    return total, max(0, free)


def free_bytes() -> int:
    """Memory that this process can still get, within the container's limit and its own."""
    free = machine_memory()[1]
    for what, size in ((resource.RLIMIT_AS, "vms"), (resource.RLIMIT_DATA, "data")):
        limit, taken = resource.getrlimit(what)[0], getattr(psutil.Process().memory_info(), size, 0)
        if limit != resource.RLIM_INFINITY:
            free = min(free, limit - taken)
    return max(0, free)


def release_mapped(address: int, size: int) -> int:
    """Take this memory out of the process where it is an unwritten private mapping of a file: what reads it next gets it from the file,
    which the system may keep cached. Memory that is anything else stays, and so does memory that was written to. Returns the bytes that
    were released; 0 where the system does not say what kind of memory it is."""
    import numpy as np

    page = resource.getpagesize()
    first, stop = -(-address // page), (address + size) // page
    if sys.platform != "linux" or stop <= first:
        return 0
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:  # noqa: PTH123 - no other file can be read at an offset so simply
            kinds = np.frombuffer(os.pread(pagemap.fileno(), 8 * (stop - first), 8 * first), dtype=np.uint64)
    except OSError:
        return 0
    there, of_file = kinds >> np.uint64(62) != 0, kinds >> np.uint64(61) & np.uint64(1) != 0
    if len(kinds) < stop - first or bool((there & ~of_file).any()):  # written: the pages are the process's own
        return 0
    failed = ctypes.CDLL(None).madvise(ctypes.c_void_p(first * page), ctypes.c_size_t((stop - first) * page), 4)  # MADV_DONTNEED
    return 0 if failed else int(there.sum()) * page


def release_freed() -> None:
    """Give memory back to the system that has been freed: glibc keeps it, each thread's apart from the others'. Other threads go on
    meanwhile. Does nothing where the C library has no such call."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


@contextmanager
def explained(doing: str | Callable[[], str], fix: str | Callable[[], str]) -> Iterator[None]:
    """Turn memory that runs out in here into an OutOfMemory. doing: what is done here. fix: what would fit. Functions are asked when it
    has happened."""
    try:
        yield
    except Exception as error:
        if isinstance(error, TrimtabError) or not ran_out(error):
            raise
        asked = asked_bytes(error)
        told = f"{asked / 1e9:.3g} GB were asked for at once" if asked else "a block could not be had"
        message = f"memory ran out while {doing if isinstance(doing, str) else doing()}: {told}, {free_bytes() / 1e9:.3g} GB are free"
    else:
        return
    # outside of `except`, where the error and the tensors in its frames are gone
    raise OutOfMemory(message, fix=fix if isinstance(fix, str) else fix())
