"""Writing a folder so that under its final name there is a whole one, or none: never a half-written one, whenever the machine stops."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from trimtab.errors import AdapterError


@contextmanager
def staged(target: str | Path, *, may_replace: Collection[str] = ()) -> Iterator[Path]:
    """A new empty folder beside `target`; when the block ends well its files are fsynced and it takes the name `target`.

    may_replace: names of files; an existing target is replaced only if it holds no other. AdapterError where it does, or cannot be written.
    """
    target = Path(target).absolute()
    _check(target, may_replace)
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
        _check(target, may_replace)
        _take_name(work, target)
    except OSError as error:
        raise AdapterError(f"cannot write {target}: {error.strerror or error}", fix="make room, or give another folder") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check(target: Path, may_replace: Collection[str]) -> None:
    if target.is_symlink():
        raise AdapterError(f"{target} is a symbolic link, which is not replaced", fix="give the folder itself")
    if target.exists() and not target.is_dir():
        raise AdapterError(f"{target} is a file", fix="give the name of a folder, new or empty")
    others = sorted(p.name for p in target.iterdir() if p.name not in may_replace) if target.exists() else []
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        raise AdapterError(
            f"{target} already holds {', '.join(others[:5])}{more}, which would be lost", fix="give the name of a new folder"
        )


def _take_name(work: Path, target: Path) -> None:
    """Rename; an old folder steps aside first, since only an empty one can be renamed over."""
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


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
