"""Where run folders are below a folder, and whether somebody works on one."""

from __future__ import annotations

import os
import re
import socket
import time
from collections import deque
from pathlib import Path

from trimtab.train.hold import LOCK, holder

DEPTH, MAX_FOLDERS, MAX_RUNS = 4, 20_000, 2_000
"""How deep below the given folder runs are looked for, and of how many folders and runs."""
FILES = ("summary.json", "metrics.jsonl")
"""A folder with one of them is a run's."""
LOCKS = Path("/proc/locks")
HELD = re.compile(r" (?:OFDLCK|FLOCK) +\S+ +\S+ +-?\d+ ([0-9a-f]+):([0-9a-f]+):(\d+) ")
"""The kernel's list of locks; of each its device and inode."""
QUIET_S = 60.0
"""Where the system tells no locks, a run whose metrics are older is not taken to be running."""


def walk(root: Path) -> tuple[list[Path], bool]:
    """(run folders, whether there may be more), those nearest to `root` first. What is inside of one is not looked at; links are followed,
    each folder once."""
    seen: set[tuple[int, int]] = set()
    waiting = deque([(root, 0)])
    runs: list[Path] = []
    while waiting and len(runs) < MAX_RUNS and len(seen) < MAX_FOLDERS:
        folder, depth = waiting.popleft()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = {e.name: e for e in os.scandir(folder)}
        except OSError:
            continue  # it has gone, or is not ours to read
        if any(n in entries for n in FILES) and is_run(folder):
            runs.append(folder)
        elif depth < DEPTH:
            inner = sorted(e.name for e in entries.values() if not e.name.startswith(".") and _is_folder(e))
            waiting.extend((folder / name, depth + 1) for name in inner)
    return runs, bool(waiting)


def is_run(folder: Path) -> bool:
    return any(is_file(folder / name) for name in FILES)


def is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113 (unlike Path's it is False in a folder that may not be entered)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link to itself, or into a folder that may not be entered


def state(folder: Path) -> str:
    """ "finished", "running", or "stopped" where nobody works on it any more."""
    if is_file(folder / "summary.json"):
        return "finished"
    if (locked := _is_locked(folder)) is not None:
        return "running" if locked else "stopped"
    try:
        return "running" if time.time() - (folder / "metrics.jsonl").stat().st_mtime < QUIET_S else "stopped"
    except OSError:
        return "stopped"


def _is_locked(folder: Path) -> bool | None:
    """Whether somebody holds a run folder, as a running `trimtab train` does; None where the system does not tell: it knows the locks of
    this machine alone. Asking for the lock itself would disturb one that starts."""
    lock = folder / LOCK
    try:
        if holder(folder).get("host", socket.gethostname()) != socket.gethostname():
            return None
        held = HELD.findall(LOCKS.read_text())
        devices = {(int(major, 16), int(minor, 16)) for major, minor, inode in held if lock.exists() and int(inode) == lock.stat().st_ino}
    except OSError:
        return None
    return bool(devices) and ((device := _device(lock)) is None or device in devices)


def _device(path: Path) -> tuple[int, int] | None:
    """The device of a file's file system as the kernel's lists name it; `stat` tells another one on some. None if it is not told."""
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            told = Path(f"/proc/self/fdinfo/{opened}").read_text().split()
        finally:
            os.close(opened)
        mount = told[told.index("mnt_id:") + 1]
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            number, _, device, *_ = line.split()
            if number == mount:
                major, minor = map(int, device.split(":"))
                return major, minor
    except (OSError, ValueError, IndexError):
        pass
    return None
