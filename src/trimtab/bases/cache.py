"""The cache on disk: where it is, and how a folder is put into it whole or not at all. A lock file keeps two processes from doing the same
work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from trimtab.atomic import atomic_dir, clear_unfinished
from trimtab.bases.progress import Progress
from trimtab.errors import BaseError


def cache_dir() -> Path:
    """`$TRIMTAB_CACHE`, else `~/.cache/trimtab`; absolute, read anew at each call, not created."""
    named = os.environ.get("TRIMTAB_CACHE")
    return Path(named).expanduser().absolute() if named else Path.home() / ".cache" / "trimtab"


@contextmanager
def locked(name: str, progress: Progress) -> Iterator[None]:
    """Hold the cache's lock `name` (a plain word); waits for as long as another process holds it, and says so.

    Raises BaseError if the cache cannot be written.
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
    Raises BaseError if the cache cannot be written (read-only, disk full).
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        clear_unfinished(final.parent, final.name)
        with atomic_dir(final) as work:
            yield work
    except OSError as error:
        raise _unwritable(error) from error


def _unwritable(error: OSError) -> BaseError:
    return BaseError(
        f"the cache folder {cache_dir()} cannot be written: {error}",
        fix="free some space there, or set TRIMTAB_CACHE to a folder that you can write to.",
    )
