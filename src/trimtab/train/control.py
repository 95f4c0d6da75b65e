"""What is asked of a run in progress: control.json in its run folder. Commands and the page write it, the training loop reads it.

    {"format": 1, "end": false, "variants": {"a": "stop", "b": "pause"}, "clones": {"c": {"of": "a", "set": {"lr": 1e-4}}}}

It holds what is wanted, not a list of events: an order stands until it is taken back. So it means the same to a run that is resumed after
a kill. Only `end` is for the process that trains now; the next one takes it away when it starts.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from trimtab.atomic import atomic_write, clear_unfinished
from trimtab.data.opened import open_file
from trimtab.errors import ConfigError, DataError, first_of, printable

CONTROL = "control.json"
MAX_BYTES = 1 << 20
FORMAT = 1
MAX_CLONES = 64
"""Of a run, those that were refused with them."""
MAX_NAME = 63
SHOWN = 10
"""Of what is wrong with the file, so many findings are told, and how many more there are."""
LOCK_S = 5.0
"""For how long another writer may hold the file."""

Order = Literal["stop", "pause"]


@dataclass(frozen=True)
class Clone:
    """A new variant: the settings of the variant `of`, and those of `changes` in their place."""

    of: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"of": self.of, "set": dict(self.changes)}

    @classmethod
    def from_dict(cls, value: Any) -> Clone:
        """ValueError where it is not such a mapping."""
        if (
            not isinstance(value, dict)
            or not isinstance(of := value.get("of"), str)
            or not isinstance(changes := value.get("set", {}), dict)
        ):
            raise ValueError("expected a mapping with `of`, a variant's name, and `set`, its changed settings")
        return cls(of, changes)


@dataclass(frozen=True)
class Orders:
    """What is asked. end: the run ends after its step, as on Ctrl-C. variants: name -> what it is to do; those that are not in it train.
    clones: by name, in the order in which they were asked for."""

    end: bool = False
    variants: Mapping[str, Order] = field(default_factory=dict)
    clones: Mapping[str, Clone] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        clones = {name: clone.to_dict() for name, clone in self.clones.items()}
        return {"format": FORMAT, "end": self.end, "variants": dict(self.variants), "clones": clones}

    def with_order(self, names: Sequence[str], order: Order | None) -> Orders:
        """order: None: they go on. A variant that was told to stop stays so."""
        kept = {n: o for n, o in self.variants.items() if n not in names or o == "stop"}
        return replace(self, variants=kept | {n: order for n in names if order is not None and kept.get(n) != "stop"})

    def with_clone(self, name: str, clone: Clone, refused: Collection[str] = ()) -> Orders:
        """The clone comes last, though one of its name was refused before: it may be one of another clone, which must join first.
        refused: clones that are forgotten where there would be more than MAX_CLONES. ConfigError where there are too many still."""
        others = {n: c for n, c in self.clones.items() if n != name}
        if len(others) >= MAX_CLONES:
            others = {n: c for n, c in others.items() if n not in refused}
        if len(others) >= MAX_CLONES:
            raise ConfigError(f"this run has {len(others)} clones; at most {MAX_CLONES} are taken", fix="train more as a run of their own")
        return replace(self, clones=others | {name: clone})


NOTHING = Orders()


def read_orders(folder: Path) -> tuple[Orders, list[str]]:
    """What is asked of the run in a folder, and what of the file is not as trimtab writes it and counts for nothing. DataError where the
    file as a whole cannot be read."""
    path = folder / CONTROL
    if not os.path.lexists(path):
        return NOTHING, []
    with open_file(path, printable(str(path))) as file:
        return _orders(file.read(MAX_BYTES + 1), path)


def _orders(data: bytes, path: Path) -> tuple[Orders, list[str]]:
    if not data:
        return NOTHING, []  # made by a writer that holds the lock on it
    shown, fix = printable(str(path)), "take it away, then ask for everything once more"
    if len(data) > MAX_BYTES:
        raise DataError(f"{shown} has more than {MAX_BYTES:,} bytes", fix=fix)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shown} is not JSON: {error}", fix=fix) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{shown} is not a mapping with format {FORMAT}", fix=fix)
    problems: list[str] = []
    variants: dict[str, Order] = {}
    for name, order in _entries(content, "variants", problems):
        if order in ("stop", "pause"):
            variants[name] = order
        else:
            problems.append(f"variants.{printable(name[:80])}: neither 'stop' nor 'pause'")
    clones = {}
    asked = _entries(content, "clones", problems)
    if len(asked) > MAX_CLONES:
        problems.append(f"clones: {len(asked):,}, of which the first {MAX_CLONES} count")
    for name, value in asked[:MAX_CLONES]:
        try:
            if len(name) > MAX_NAME:
                raise ValueError(f"a name has at most {MAX_NAME} characters")
            clones[name] = Clone.from_dict(value)
        except ValueError as error:
            problems.append(f"clones.{printable(name[:80])}: {error}")
    end = content.get("end", False)
    if not isinstance(end, bool):
        problems.append("end: neither true nor false")
    return Orders(end is True, variants, clones), first_of(problems, SHOWN)


def _entries(content: Mapping[str, Any], key: str, problems: list[str]) -> Sequence[tuple[str, Any]]:
    value = content.get(key, {})
    if not isinstance(value, dict):
        problems.append(f"{key}: expected a mapping")
        return ()
    return list(value.items())


def change_orders(folder: Path, change: Callable[[Orders], Orders]) -> Orders:
    """Replace what is asked of the run in a folder, whole or not at all, one writer after another. ConfigError where the file cannot be
    read or written."""
    path = folder / CONTROL
    try:
        with _locked(path) as data:
            orders, _ = _orders(data, path)
            changed = change(orders)
            content = json.dumps(changed.to_dict(), indent=1).encode()
            if len(content) > MAX_BYTES:
                raise ConfigError(f"{printable(str(path))} would have more than {MAX_BYTES:,} bytes", fix="ask for less")
            with suppress(OSError):
                clear_unfinished(folder, CONTROL)  # of writers that were killed: one that lives would have the lock
            with atomic_write(path) as file:
                file.write(content)
            return changed
    except DataError as error:
        raise ConfigError(error.message, problems=error.problems, fix=error.fix) from None
    except OSError as error:
        why = error.strerror or str(error)
        raise ConfigError(f"{printable(str(path))} cannot be written: {why}", fix="let this user write to the run folder") from error


@contextmanager
def _locked(path: Path) -> Iterator[bytes]:
    """The file's bytes while no other writer has it. A writer replaces the file, so the lock counts only if it is still the same file."""
    until = time.monotonic() + LOCK_S
    while True:
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        try:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise ConfigError(f"another program holds {printable(str(path))}", fix="try again") from None
                time.sleep(0.02)
                continue
            if not _is_still(path, opened):
                continue
            with open_file(path, printable(str(path))) as file:
                data = file.read(MAX_BYTES + 1)
            yield data
            return
        finally:
            os.close(opened)


def _is_still(path: Path, opened: int) -> bool:
    try:
        there, here = path.stat(), os.fstat(opened)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


class Watched:
    """Whether control.json may have changed, for one `stat` a call."""

    def __init__(self, folder: Path):
        self._path = folder / CONTROL
        self._last: tuple[int, ...] | None = None

    def changed(self) -> bool:
        """Whether it may be another one than at the last call. A file that is not there has not changed."""
        try:
            s = os.stat(self._path)
        except OSError:
            now = None
        else:
            now = (s.st_dev, s.st_ino, s.st_mtime_ns, s.st_ctime_ns, s.st_size)
        before, self._last = self._last, now
        return now != before


def forget_end(folder: Path, warn: Callable[[str], None]) -> None:
    """Take `end` away, which was for a process that trained before."""
    try:
        if read_orders(folder)[0].end:
            change_orders(folder, lambda orders: replace(orders, end=False))
    except (DataError, ConfigError) as error:
        warn(error.message)
