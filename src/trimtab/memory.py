"""Memory that has run out: told from other errors, and reported with what was being done, how much was asked for, and what would fit."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import re
import resource
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from trimtab.errors import TrimtabError

_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "cannot allocate memory", "unable to allocate")
_ONEDNN = re.compile(r"could not (create|execute) an? (primitive|memory|engine|stream)\s*$")
"""oneDNN's errors where it gets no memory. What it cannot do at all it refuses earlier: "could not create a primitive descriptor"."""
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "pib": 2**50}
_ASKED = re.compile(r"(?:tried|unable) to allocate ([\d.]+) (bytes|[kmgtp]ib)", re.IGNORECASE)
CGROUP_FILES = {
    "": ("memory.max", "memory.current", ("active_file", "inactive_file")),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
}
"""By the controller's name in /proc/self/cgroup ("": version 2): a group's limit, what it has in use, and which lines of memory.stat count
files' pages among that, which the system takes back when memory is wanted."""
CGROUP_ROOT, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class OutOfMemory(TrimtabError):
    """Memory has run out."""

    http_status = 503


YOUNG = 500_000
"""Objects that may be made, and not freed, before they are looked at: some 50 MB."""
_without_full, _counted = 0, threading.Lock()


@contextmanager
def without_full_collections() -> Iterator[Callable[[], None]]:
    """While many objects are made and soon freed, Python's collector of reference cycles looks only at those made since it last did, when
    the caller calls what is yielded and `YOUNG` of them are left. By itself it looks at all objects of the process again and again: a sixth
    of the time that rows take. This holds for all threads until the last of such blocks is left. Where the collector was turned off, it
    stays off."""
    global _without_full
    with _counted:
        was_on = _without_full > 0 or gc.isenabled()
        _without_full += was_on
        gc.disable()

    def collect() -> None:
        if was_on and gc.get_count()[0] > YOUNG:
            gc.collect(1)

    try:
        yield collect
    finally:
        with _counted:
            _without_full -= was_on
            if was_on and not _without_full:
                gc.enable()


def ran_out(error: BaseException | None) -> bool:
    """Whether an error means that memory could not be had: Python's, NumPy's, torch's, the system's, or one of them in disguise."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        said = "" if isinstance(error, TrimtabError) else str(error).lower()
        if any(word in said for word in _WORDS) or _ONEDNN.search(said):
            return True
        error = error.__cause__ or error.__context__
    return False


def asked_bytes(error: BaseException) -> int | None:
    """How much was asked for at once, where the error says so."""
    found = _ASKED.search(str(error))
    return int(float(found[1]) * _UNITS[found[2].lower()]) if found else None


def machine_memory() -> tuple[int, int]:
    """(bytes in all, of these free at the moment): the machine's, or those of the container or control group, which sees the machine's but
    may use less."""
    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    for limit, left in _group_limits():
        total, free = min(total, limit), min(free, left)
    return total, max(0, free)


def _group_limits() -> Iterator[tuple[int, int]]:
    """(limit, bytes that can still be had) of every control group that this process is in, inner ones first."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in CGROUP_FILES:
            continue
        top = CGROUP_ROOT / controllers
        folder = top / path.lstrip("/")
        for group in [folder, *folder.parents]:  # in a container the path may be one outside of it; then the top is the container's
            if group.is_relative_to(top) and (found := _group_limit(group, *CGROUP_FILES[controllers])) is not None:
                yield found


def _group_limit(group: Path, limit_name: str, used_name: str, files: tuple[str, str]) -> tuple[int, int] | None:
    """One group's; None where it has no limit."""
    try:
        limit, used = (int((group / name).read_text()) for name in (limit_name, used_name))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit, limit - used + sum(int(counts.get(name, 0)) for name in files)
    except (OSError, ValueError):  # no such group here, or "max"
        return None


def obtainable_bytes() -> int:
    """The most memory that this process could come to have: what is free, and the swap."""
    return free_bytes(psutil.swap_memory().free)


def free_bytes(swap: int = 0) -> int:
    """Memory that this process can still get, within the container's limit and its own. swap: so much of it is counted as well."""
    free = machine_memory()[1] + swap
    for what, size in ((resource.RLIMIT_AS, "vms"), (resource.RLIMIT_DATA, "data")):
        limit, taken = resource.getrlimit(what)[0], getattr(psutil.Process().memory_info(), size, 0)
        if limit != resource.RLIM_INFINITY:
            free = min(free, limit - taken)
    return max(0, free)


def peak_resident_bytes() -> int:
    """The most memory that this process has had resident. Linux: VmHWM, since `ru_maxrss` of a process is at first that of the one which
    started it. Elsewhere `ru_maxrss`."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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


def release_files(paths: Iterable[Path]) -> int:
    """The same for all memory that is mapped from these files; returns the bytes that were released."""
    wanted = {str(path.resolve()) for path in paths}
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return 0
    released = 0
    for line in lines:
        where, *_, name = line.split(maxsplit=5)
        if name in wanted:
            start, stop = (int(end, 16) for end in where.split("-"))
            released += release_mapped(start, stop - start)
    return released


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
