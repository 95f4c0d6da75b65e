"""Files of rows below some folders, for people to choose from."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from trimtab.data.documents import TEXT_SUFFIXES
from trimtab.data.formats import SUFFIXES
from trimtab.train.run_folders import FILES

DEPTH, MAX_FOLDERS, MAX_FILES = 5, 5_000, 1_000
KINDS = frozenset(SUFFIXES) - frozenset(TEXT_SUFFIXES)
"""Texts are read by the folder, which people name themselves."""
SKIPPED = frozenset(("node_modules", "__pycache__", "site-packages"))
Found = tuple[Path, int, float]
"""A file, its bytes, and when it was written."""


def data_files(folders: Sequence[Path]) -> tuple[list[Found], bool]:
    """(files by path, whether there may be more). Folders of runs are left out: what they hold is what runs have written. Links are not
    followed."""
    waiting = deque((folder, 0) for folder in folders)
    seen = set[Path]()
    found = dict[Path, Found]()
    while waiting and len(seen) < MAX_FOLDERS and len(found) < MAX_FILES:
        folder, depth = waiting.popleft()
        if folder in seen:
            continue
        seen.add(folder)
        try:
            entries = sorted(os.scandir(folder), key=lambda e: e.name)
        except OSError:
            continue  # it has gone, or is not ours to read
        if any(e.name in FILES for e in entries):
            continue
        for entry in entries:
            path = folder / entry.name
            try:
                if entry.name.startswith(".") or entry.name in SKIPPED:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    waiting += [(path, depth + 1)] if depth < DEPTH else []
                elif entry.is_file(follow_symlinks=False) and path.suffix.lower() in KINDS and len(found) < MAX_FILES:
                    status = entry.stat(follow_symlinks=False)
                    found[path] = path, status.st_size, status.st_mtime
            except OSError:
                continue
    return [found[path] for path in sorted(found)], bool(waiting) or len(found) >= MAX_FILES
