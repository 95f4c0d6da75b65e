"""Files and folders that are written whole or not at all, whenever the machine stops.

What is written has another name at first, `.NAME.<12 digits>.new` beside the target. Its bytes are fsynced, it takes the name NAME, and the
folder that holds the name is fsynced. So NAME is always the old content or the new one, and what is there survives a power cut.

A folder that is there already is exchanged with the new one in one system call (renameat2 with RENAME_EXCHANGE). Where the kernel or the
file system has no such call, two renames do it: between them, for less than a millisecond, there is nothing under the name, and a machine
that stops just then leaves the old folder as `.NAME.<12 digits>.old` beside it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

AT_FDCWD, RENAME_EXCHANGE = -100, 2
UNFINISHED = re.compile(r"\.(.+)\.[0-9a-f]{12}\.(?:new|old)")


@contextmanager
def atomic_write(target: Path) -> Iterator[BinaryIO]:
    """A new file to write to, which takes the name `target` when the block ends well; otherwise nothing of it stays. OSError where it
    cannot be written, or where what has the name is no file: a device, say, which would be replaced."""
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "It is no regular file", str(target))
    work = _beside(target, "new")
    try:
        with work.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        take_name(work, target)
    finally:
        work.unlink(missing_ok=True)


def write_new(target: Path, text: str) -> None:
    """A file that is not there yet. FileExistsError where there is one; OSError where it cannot be written, and then nothing stays."""
    with target.open("x", encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
        except BaseException:
            target.unlink(missing_ok=True)
            raise


@contextmanager
def atomic_dir(target: Path, check: Callable[[Path], None] = lambda content: None) -> Iterator[Path]:
    """A new folder to fill, which takes the name `target` when the block ends well; otherwise nothing of it stays. The folder that is there
    already is removed. OSError where it cannot be written.

    check: called with the folder that is to be removed, before and after it has left its name. Where it raises, that folder stays.
    """
    work = _beside(target, "new")
    work.mkdir()
    try:
        yield work
        for path in sorted(work.rglob("*"), reverse=True):
            sync(path)
        sync(work)
        check(target)
        if not (target.exists() and exchange(work, target)):
            _replace(work, target)
            return
        try:
            check(work)  # a file may have come into the old folder at the last moment
        except BaseException:
            exchange(work, target)
            raise
        sync(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _replace(work: Path, target: Path) -> None:
    """`exchange` where there is none: the old folder steps aside, and back if the new one cannot have its name."""
    old = work.with_suffix(".old")
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(work, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def take_name(work: Path, target: Path) -> None:
    """Give a file or folder, whose bytes are on disk, another name, and make the name last."""
    os.replace(work, target)
    sync(target.parent)


def step_aside(folder: Path) -> None:
    """Take a folder's name away in one step; `clear_unfinished` removes what is left of it."""
    os.replace(folder, _beside(folder, "old"))


def is_unfinished(name: str) -> bool:
    """Whether a name is that of something which a writer has not finished, and which holds nothing that counts."""
    return UNFINISHED.fullmatch(name) is not None


def clear_unfinished(folder: Path, name: str | None = None, idle_s: float = 0.0) -> None:
    """Remove what killed writers have left in `folder`; with a name, only what was to have it. idle_s: only what nobody has written to for
    so long, where others may be writing now."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if (found := UNFINISHED.fullmatch(path.name)) and name in (None, found[1]):
            with suppress(OSError):
                if idle_s and time.time() - path.stat().st_mtime < idle_s:
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


def sync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, last."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False, nothing changed, where that cannot be done here. OSError as of a rename."""
    if _renameat2 is None:
        return False
    if _renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOENT, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM):  # gone; an old kernel or file system; a sandbox
        return False
    raise OSError(code, os.strerror(code))


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.{what}")


def _find_renameat2() -> Callable[..., int] | None:
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return cast("Callable[..., int] | None", function)


_renameat2 = _find_renameat2()
