"""A run folder's lock: one process trains into a folder, and one that has lost its lock notices before it writes a checkpoint.

The lock is on the file `.lock` in the folder, since NFS has no locks on folders. It is one of the open file (OFD), so it stays when the
file is read and closed elsewhere in the process, and ends with the process. A file server also releases it when a machine does not answer
for some time, and that machine may only be cut off: once it is back it would write beside its successor. Therefore each holder writes a
token of its own into the file, and `Hold.check` compares.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trimtab.errors import ConfigError

LOCK = ".lock"
SIZE = 512
"""Bytes of the lock file, always: it is written in place, so a full disk does not keep a run from going on."""
NONE_HERE = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What file systems without locks answer."""


class Occupied(ConfigError):
    """Another process trains into the run folder, or has just done so."""


@dataclass(frozen=True)
class Hold:
    """A run folder that a process holds. token: of this holder alone. Every rank has a copy, and any of them may `check`."""

    out: Path
    token: str

    def check(self) -> None:
        """Occupied where another process has taken the folder over. OSError where that cannot be read."""
        now = holder(self.out)
        if now.get("token") != self.token:
            who = f"{_named(now)} has" if now else f"{self.out / LOCK} has been removed or overwritten: another process may have"
            text = f"{who} taken over out = {str(self.out)!r}, so this run ends, and writes nothing more there"
            raise Occupied(text, fix="leave the run to it; if nothing runs there any more, go on with --resume")


@contextmanager
def held(out: Path, warn: Callable[[str], None]) -> Iterator[Hold]:
    """The folder `out`, which is there, held for this process alone. Occupied where another process holds it; OSError where the lock file
    cannot be written. warn: hears that the file system has no locks, and the folder only a token."""
    file = os.open(out / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            _lock(file)
        except BlockingIOError:
            text = f"another process is training into out = {str(out)!r}: {_named(holder(out))}"
            raise Occupied(text, fix="wait for it, or stop it first") from None
        except OSError as error:
            if error.errno not in NONE_HERE:
                raise
            warn(f"the file system of {out} has no locks ({error.strerror}): see to it that no other process trains into this folder")
        hold = Hold(out, os.urandom(16).hex())
        said = {"token": hold.token, "host": socket.gethostname(), "pid": os.getpid(), "since": round(time.time())}
        os.pwrite(file, json.dumps(said).encode().ljust(SIZE - 1) + b"\n", 0)
        os.fsync(file)
        yield hold
    finally:
        os.close(file)


def holder(out: Path) -> dict[str, str | int]:
    """Who held the folder last (token, host, pid, since), empty where that is not told. OSError where it cannot be read."""
    try:
        opened = os.open(out / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)  # anew: a client of NFS asks its server
        with os.fdopen(opened, "rb") as file:
            found = json.loads(file.read(SIZE) if stat.S_ISREG(os.fstat(opened).st_mode) else b"")
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _named(said: dict[str, str | int]) -> str:
    return f"process {said.get('pid', '?')} on {said.get('host', '?')}" if said else "a process that has not said its name yet"


def _lock(file: int) -> None:
    """BlockingIOError where another process has the lock."""
    command = getattr(fcntl, "F_OFD_SETLK", None)
    if command is None:  # not Linux
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        whole_file = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(file, command, whole_file)
