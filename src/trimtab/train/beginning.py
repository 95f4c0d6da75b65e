"""Runs that the page begins: `trimtab train` as a process of its own, which outlives the page's server, and what it prints."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trimtab.data.opened import open_file
from trimtab.errors import ConfigError, DataError, NotFoundError, printable
from trimtab.paths import real_path, user_path
from trimtab.train.config import RunConfig
from trimtab.train.run_folders import DEPTH, MAX_FOLDERS, is_run
from trimtab.train.runfile import outer_keys

KEYS = {"base", "out", "data", "variants"}
"""A YAML file with all of them is a run file."""
MAX_FILE, MAX_FILES = 64 << 10, 500
"""Bytes of a run file that is listed, and how many are."""
TAIL = 16 << 10
"""Bytes of a log that are shown: its last ones."""
LISTED_S = 3.0
QUICK_S = 0.5
"""How long a run is watched that has just begun: a mistake that shows at once is told at once."""


def log_of(out: Path) -> Path:
    """The file beside a run folder to which a run prints that the page has begun. It is not in the folder, which must be empty at first."""
    return out.with_name(f"{out.name}.log")


class Beginner:
    """Begins runs from run files at and below `root`, whose run folders lie there too, so that the page shows them."""

    def __init__(self, root: Path):
        self.root = root.resolve()
        self._children: list[subprocess.Popen[bytes]] = []
        self._files: list[str] = []
        self._until = 0.0
        self._known: Known = {}

    def files(self, anew: bool = False) -> list[str]:
        """Run files below the root, as paths from there, as of LISTED_S ago at most, or now."""
        if anew or time.monotonic() >= self._until:
            paths, self._known = _run_files(self.root, self._known)
            names = (str(p.relative_to(self.root)) for p in paths)
            self._files = [name for name in names if printable(name) == name]  # others cannot be sent as they are
            self._until = time.monotonic() + LISTED_S
        return self._files

    def begin(self, name: str, resume: bool) -> dict[str, Any]:
        """Start `trimtab train` on a run file, by its path from the root. resume: go on with what its run folder holds. NotFoundError where
        it is not one that `files` lists; ConfigError that lists what is wrong with it, before anything is started."""
        self._children = [child for child in self._children if child.poll() is None]
        path = (self.root / name).resolve() if name in self.files() or name in self.files(anew=True) else None
        if path is None or not path.is_relative_to(self.root):
            raise NotFoundError("there is no such run file here", fix="choose one of those that are listed")
        run = RunConfig.load(path)
        out = real_path(run.out, ConfigError, "out")
        if not out.is_relative_to(self.root) or out == self.root:
            where = f"out = {printable(str(run.out))!r} lies outside of {printable(str(self.root))}"
            raise ConfigError(f"{where}, which this page shows", fix="name a folder below it, or start `trimtab studio` on a folder above")
        if not resume and _holds_something(out):
            raise ConfigError(
                f"out = {printable(str(run.out))!r} is not empty: a run never overwrites another",
                fix="name another folder in `out`, or resume it",
            )
        words = ["train", str(path), *(["--resume"] if resume else [])]
        log = user_path(log_of(out), ConfigError, "out with .log, to which it prints,")
        try:
            started = log.stat().st_size if os.path.lexists(log) else 0
            log.parent.mkdir(parents=True, exist_ok=True)
            opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError as error:
            raise ConfigError(
                f"{printable(str(log))} cannot be written: {error.strerror}", fix="make the folder one that can be written"
            ) from error
        try:
            if not stat.S_ISREG(os.fstat(opened).st_mode):
                raise ConfigError(f"{printable(str(log))} is not a file", fix="take it away: the run's output goes there")
            command = [sys.executable, "-m", "trimtab", *words]
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=opened, stderr=opened, start_new_session=True)
        finally:
            os.close(opened)
        self._children.append(child)
        until = time.monotonic() + QUICK_S
        while child.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        return {
            "out": str(out.relative_to(self.root)),
            "command": f"trimtab {shlex.join(words)}",
            "log": printable(str(log)),
            "from": started,
        }

    def log(self, out: str, start: int = 0) -> dict[str, Any]:
        """The end of what the run into a folder, named from the root, has printed from byte `start` on. NotFoundError where there is
        no such file."""
        try:
            folder = (self.root / out).resolve()
        except (OSError, ValueError, RuntimeError):
            folder = self.root  # no name of a file: it holds a NUL, is too long, or a link to itself
        if folder == self.root or not folder.is_relative_to(self.root):
            raise NotFoundError("there is no such log here")
        return read_log(log_of(folder), start)


def read_log(path: Path, start: int = 0) -> dict[str, Any]:
    """The last bytes of a log, as text that a browser can be sent. A link is not followed: it may lead to what the page does not show.
    NotFoundError where there is no such file, and where no file can have its name: a folder's may be as long as names are."""
    try:
        if path.is_symlink():
            raise NotFoundError("there is no such log here")
        with open_file(path, printable(str(path))) as file:
            size = file.seek(0, os.SEEK_END)
            begin = max(start if start <= size else 0, size - TAIL)
            file.seek(begin)
            data = file.read(TAIL)
    except (DataError, OSError, ValueError):
        raise NotFoundError("there is no such log here") from None
    text = data.decode("utf-8", errors="replace")
    lines = [printable(line.rsplit("\r", 1)[-1]) for line in text.splitlines()]
    return {"text": "\n".join(lines), "cut": begin > start, "size": size}


def _holds_something(out: Path) -> bool:
    """ConfigError where that cannot be looked up."""
    try:
        return out.is_dir() and any(out.iterdir())
    except OSError as error:
        why = error.strerror or str(error)
        raise ConfigError(f"out = {printable(str(out))!r} cannot be read: {why}", fix="name a folder that this user may read") from None


Known = Mapping[tuple[str, int, int], bool]
"""Path, time and size of YAML files that were read -> whether each is a run file."""


def _run_files(root: Path, before: Known) -> tuple[list[Path], Known]:
    """(those that are nearest to the root first, what is known now). What is inside of run folders is not looked at."""
    known, found = dict[tuple[str, int, int], bool](), list[Path]()
    waiting, seen = deque([(root, 0)]), 0
    while waiting and len(found) < MAX_FILES and seen < MAX_FOLDERS:
        folder, depth = waiting.popleft()
        seen += 1
        try:
            entries = sorted(os.scandir(folder), key=lambda e: e.name)
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = folder / entry.name
                if entry.is_dir(follow_symlinks=False):
                    if depth < DEPTH and not is_run(path):
                        waiting.append((path, depth + 1))
                elif entry.name.endswith((".yaml", ".yml")):
                    status = entry.stat()
                    key = str(path), status.st_mtime_ns, status.st_size
                    known[key] = before[key] if key in before else _is_run_file(path)
                    found += [path] if known[key] else []
        except OSError:
            continue
    return found, known


def _is_run_file(path: Path) -> bool:
    """By its top-level keys, without building what it holds: it is read whole when it is to be trained."""
    try:
        with open_file(path, printable(str(path))) as file:
            data = file.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            return False
        return outer_keys(data.decode("utf-8")) >= KEYS
    except (DataError, OSError, ValueError, yaml.YAMLError):
        return False
