"""Writing a folder so that under its final name there is a whole one, or none: never a half-written one, whenever the machine stops.

A folder that is there already is exchanged with the new one in one system call (renameat2 with RENAME_EXCHANGE), so that under the name
there is always the old or the new one. Where the kernel or the file system has no such call, two renames do it: between them, for less than
a millisecond, there is nothing under the name, and a machine that stops just then leaves the old folder as .NAME.*.old beside it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from trimtab.errors import AdapterError

AT_FDCWD, RENAME_EXCHANGE = -100, 2


@contextmanager
def staged(target: str | Path, *, may_replace: Collection[str] = ()) -> Iterator[Path]:
    """A new empty folder beside `target`; when the block ends well its files are fsynced and it takes the name `target`.

    may_replace: names of files; an existing target is replaced only if it holds no other. AdapterError where it does, or cannot be written.
    """
    target = Path(target).absolute()
    check_target(target, may_replace)
    work = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(mode=0o777)
    except OSError as error:
        raise AdapterError(f"cannot write into {target.parent}: {error.strerror}", fix="give a folder that can be written") from error
    try:
        yield work
        for path in sorted(work.rglob("*"), reverse=True):
            _fsync(path)
        _fsync(work)
        check_target(target, may_replace)
        _take_name(work, target, may_replace)
    except OSError as error:
        raise AdapterError(f"cannot write {target}: {error.strerror or error}", fix="make room, or give another folder") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_target(target: Path, may_replace: Collection[str] = (), content: Path | None = None) -> None:
    """AdapterError where target must not be replaced. content: where what was in it is by now."""
    if target.is_symlink():
        raise AdapterError(f"{target} is a symbolic link, which is not replaced", fix="give the folder itself")
    if target.exists() and not target.is_dir():
        raise AdapterError(f"{target} is a file", fix="give the name of a folder, new or empty")
    if (up := next((p for p in target.absolute().parents if p.exists()), None)) is not None and not up.is_dir():
        raise AdapterError(f"cannot write {target}: {up} is a file", fix="give the name of a folder, new or empty")
    content = content or target
    others = sorted(p.name for p in content.iterdir() if p.name not in may_replace) if content.exists() else []
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        raise AdapterError(
            f"{target} already holds {', '.join(others[:5])}{more}, which would be lost", fix="give the name of a new folder"
        )


def _take_name(work: Path, target: Path, may_replace: Collection[str]) -> None:
    """Rename; with an old folder change places, so that the old one is under the name of `work`."""
    if target.exists() and exchange(work, target):
        try:
            check_target(target, may_replace, content=work)  # a file may have come into the old folder at the last moment
        except AdapterError:
            exchange(work, target)
            raise
        _fsync(target.parent)
        return
    old = work.with_name(work.name.removesuffix(".new") + ".old")
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(work, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise
    _fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


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


def _find_renameat2() -> Callable[..., int] | None:
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return cast("Callable[..., int] | None", function)


_renameat2 = _find_renameat2()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
