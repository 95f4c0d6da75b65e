"""The cache on disk: where it is, and how a folder gets into it whole or not at all.

A folder is written beside its final place, flushed, then renamed, so a crash leaves a `.tmp-` folder that the next writer removes and
never a half-written base. A lock file keeps two processes from doing the same work twice.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from trimtab.bases.progress import Progress
from trimtab.errors import BaseError


def cache_dir() -> Path:
    """`$TRIMTAB_CACHE`, else `~/.cache/trimtab`; absolute, read anew at each call, not created."""
    named = os.environ.get("TRIMTAB_CACHE")
    return Path(named).expanduser().absolute() if named else Path.home() / ".cache" / "trimtab"


@contextmanager
def locked(name: str, progress: Progress) -> Iterator[None]:
    """Hold the cache's lock `name` (a plain word); waits for as long as another process holds it, and says so.

    Raises BaseError where the cache cannot be written.
    """
    folder = cache_dir() / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress(f"waiting for another process that prepares {name}")
            lock.acquire()
    except OSError as error:
        raise _unwritable(error) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder to write in; on a clean exit flush it and rename it to `final`, replacing what was there.

    On an exception nothing of it stays. Call it under `locked`: leftovers of crashed writers are removed here.
    Raises BaseError where the cache cannot be written (read-only, disk full).
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        for leftover in final.parent.glob(f"{final.name}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        work = final.parent / f"{final.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        work.mkdir()
    except OSError as error:
        raise _unwritable(error) from error
    try:
        yield work
        flush_folder(work)
        if final.exists():
            os.replace(final, final.parent / f"{final.name}.tmp-old-{uuid.uuid4().hex[:8]}")
        os.replace(work, final)
        flush(final.parent)
    except OSError as error:
        raise _unwritable(error) from error
    finally:
        for leftover in final.parent.glob(f"{final.name}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """fsync every file and folder below `folder`, itself included."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def flush(path: Path) -> None:
    """fsync one file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unwritable(error: OSError) -> BaseError:
    return BaseError(
        f"the cache folder {cache_dir()} cannot be written: {error}",
        fix="free some space there, or set TRIMTAB_CACHE to a folder that you can write to.",
    )
