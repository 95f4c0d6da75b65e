"""Garbage collection: it removes blobs that no version needs, and what killed writers have left. Files of a living writer stay."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trimtab.atomic import sync
from trimtab.store.blobs import unowned
from trimtab.store.layout import Layout
from trimtab.store.names import DIGEST


@dataclass(frozen=True)
class GcReport:
    """Removed, or, in a dry run, what would be. unfinished: files of writers that never came to their end. bytes: of all of these."""

    blobs: int
    bytes: int
    unfinished: int


def collect(layout: Layout, needed: Iterable[str], grace_seconds: float, dry_run: bool) -> GcReport:
    """Call it under the lock, with the digests that the index needs as it is now.

    Files in tmp that a living process has locked stay, whatever `grace_seconds` is. Of the rest, what is younger stays: an interrupted pull
    goes on from its partial files, and a blob may have been put in by hand for a manifest to come. Names in blobs/ that are not digests are
    left alone: they are not ours.
    """
    kept = set(needed)
    # the index that was read may have been renamed by a writer that was killed then: no blob goes before it is sure to last
    sync(layout.root)
    oldest = time.time() - grace_seconds
    blobs = [f for f in _files(layout.blobs.folder) if DIGEST.fullmatch(f"sha256:{f.name}") and f"sha256:{f.name}" not in kept]
    doomed = [f for f in blobs if f.changed <= oldest]
    unfinished = [f for f in _files(layout.tmp, folders=True) if f.changed <= oldest and _collect_unfinished(f.path, dry_run)]
    if not dry_run:
        for file in doomed:
            file.path.unlink()
        sync(layout.blobs.folder)
    return GcReport(len(doomed), sum(f.size for f in (*doomed, *unfinished)), len(unfinished))


def _collect_unfinished(path: Path, dry_run: bool) -> bool:
    """Remove a file or folder in tmp that no living writer owns, or, in a dry run, say whether it would go."""
    with unowned(path) as free:
        if free and not dry_run:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        return free


@dataclass(frozen=True)
class _File:
    path: Path
    name: str
    size: int
    changed: float


def _files(folder: Path, *, folders: bool = False) -> Iterator[_File]:
    """Regular files, links not followed; with `folders`, folders too."""
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False) or (folders and entry.is_dir(follow_symlinks=False)):
                status = entry.stat(follow_symlinks=False)
                yield _File(Path(entry.path), entry.name, status.st_size, status.st_mtime)
