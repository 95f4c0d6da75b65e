"""Fetches one file, whole or not at all: it continues a partial file, never takes more bytes than were promised, and checks the digest.

It knows bytes, digests and retries, but no protocols. A transport raises `Transient` for what may succeed later (a cut connection, a busy
server). Any other error ends the transfer at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trimtab.errors import AdapterError
from trimtab.store.blobs import is_still
from trimtab.store.remotes.address import redacted
from trimtab.store.remotes.deadline import Deadline

ATTEMPTS = 5
WAIT_S = 0.5
"""Before the second attempt; doubled before each later one."""
MAX_WAIT_S = 30.0
"""The longest that a server's Retry-After is obeyed."""
CHUNK_BYTES = 2**20
TIMEOUT_S = (10.0, 60.0)
"""To connect, and between two pieces of an answer."""

Moved = Callable[[int], None]
"""Told of every piece of bytes that was moved."""
T = TypeVar("T")


class Transient(Exception):
    """What went wrong may go right the next time. after_s: how long the server asks to wait."""

    def __init__(self, message: str, after_s: float | None = None):
        super().__init__(redacted(message))
        self.after_s = after_s


@dataclass(frozen=True)
class Part:
    """One file to fetch. digest: "sha256:…" of its bytes, or "git:…" for the id that git gives it."""

    name: str
    digest: str
    size: int

    def hasher(self) -> hashlib._Hash:
        if self.digest.startswith("sha256:"):
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


def patiently(work: Callable[[], T], where: str, deadline: Deadline[Any] | None = None, attempts: int | None = None) -> T:
    """work's result, tried again a few times, each time after a longer wait, as long as it says Transient. AdapterError in the end.
    attempts: in all; None: ATTEMPTS."""
    attempts = ATTEMPTS if attempts is None else attempts
    for attempt in range(attempts):
        if deadline is not None:
            deadline.check()
        try:
            return work()
        except Transient as error:
            if attempt + 1 == attempts:
                often = f", {attempts} times in a row" if attempts > 1 else ""
                raise AdapterError(
                    f"{where} does not answer as it should{often}: {error}",
                    fix="see whether it can be reached, then run the command again: it goes on where it stopped",
                ) from error
            wait_s = WAIT_S * 2**attempt * random.uniform(0.75, 1.25)
            wait_s = min(MAX_WAIT_S, max(wait_s, error.after_s or 0.0))
            time.sleep(wait_s if deadline is None else min(wait_s, deadline.left))
    raise AssertionError("not reached")


def download(
    part: Part, read: Callable[[int], Iterator[bytes]], file: int, where: str, moved: Moved, deadline: Deadline[Any] | None = None
) -> None:
    """Fill an open, `held` file with one part, going on behind the bytes that are there. read(start): its bytes from there on.

    AdapterError if the other side sends more than it promised, or other bytes than the digest says; the file is empty then. Where the
    deadline has passed, what has come stays.
    """
    if os.fstat(file).st_size > part.size:
        os.ftruncate(file, 0)
    patiently(lambda: _append(part, read, file, where, moved, deadline), f"{where}, {part.name},", deadline)
    found = _digest(part, file)
    if found != part.digest:
        os.ftruncate(file, 0)
        raise AdapterError(
            f"{where}: the bytes of {part.name} that arrived are not those that were promised",
            problems=[f"promised {part.digest}", f"arrived {found}"],
            fix="pull again; if it happens again, the other side is damaged or not to be trusted",
        )
    os.fsync(file)


@contextmanager
def held(target: Path) -> Iterator[int]:
    """A partial file, open, and locked against another process that moves the same one, which is waited for, and against collection."""
    while True:
        try:
            file = os.open(target, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _unwritable(error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if is_still(target, file):
                yield file
                return
        finally:
            os.close(file)


def _append(
    part: Part, read: Callable[[int], Iterator[bytes]], file: int, where: str, moved: Moved, deadline: Deadline[Any] | None
) -> None:
    at = os.lseek(file, 0, os.SEEK_END)
    if at == part.size:
        return
    for piece in read(at):
        at += len(piece)
        if at > part.size:
            os.ftruncate(file, 0)
            raise AdapterError(
                f"{where}: {part.name} is larger than the {part.size:,} bytes that were promised", fix="do not trust that source"
            )
        _write(file, piece)
        moved(len(piece))
        if deadline is not None and at < part.size:
            deadline.check()
    if at < part.size:
        raise Transient(f"the connection ended {part.size - at:,} bytes early")


def _write(file: int, piece: bytes) -> None:
    view = memoryview(piece)
    while view:
        try:
            view = view[os.write(file, view) :]
        except OSError as error:
            raise _unwritable(error) from error


def _unwritable(error: OSError) -> AdapterError:
    return AdapterError(f"the store cannot be written: {error.strerror}", fix="make room, then pull again: it goes on where it stopped")


def _digest(part: Part, file: int) -> str:
    hasher = part.hasher()
    os.lseek(file, 0, os.SEEK_SET)
    while piece := os.read(file, CHUNK_BYTES):
        hasher.update(piece)
    return f"{part.digest.partition(':')[0]}:{hasher.hexdigest()}"
