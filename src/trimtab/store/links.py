"""Symbolic links of Hugging Face's cache: the only ones that are followed where an adapter is read.

A snapshot of the cache holds links to its blobs:

    models--acme--support/snapshots/<commit>/adapter_config.json -> ../../blobs/<hash>

A link is followed once, and only to a file in the adapter's own folder, in the `blobs` of the cache entry that the folder is a snapshot of,
or in those of another entry (a folder that `snapshot_download` filled with links). Whatever else a stranger's link names, such as
/etc/passwd, is refused. The rule is about the text of the link; the file is then opened part by part, no further link followed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""O_NONBLOCK: a named pipe would otherwise wait for a writer for ever."""
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
ENTRY = re.compile(r"(models|datasets|spaces)--.+")
LINK_TEXT = re.compile(rb"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)+")
MAX_LINK_TEXT = 512


class Refusal(ValueError):
    """One finding about one file; whoever reads the folder collects them into an AdapterError."""


def open_link(folder: int, path: Path, name: str, text: str) -> int:
    """A descriptor of what the link `name` in an open folder means. Refusal if it leads anywhere else, or to nothing that opens.

    folder: its descriptor. path: what it is called, used where the system does not say where the descriptor is.
    """
    here = _place(folder, path)
    target = Path(os.path.normpath(here / text))
    try:
        if here in target.parents:
            return _descend(folder, target.relative_to(here).parts)
        if _is_blob_of(target, here):
            blobs = os.open(target.parent, FOLDER)
            try:
                return _descend(blobs, (target.name,))
            finally:
                os.close(blobs)
    except OSError as error:
        raise Refusal(f"{name} is a symbolic link to {text[:200]!r}, which cannot be opened: {error.strerror}") from error
    raise Refusal(f"{name} is a symbolic link to {text[:200]!r}, outside its folder and no blob of a hub cache: it is not followed")


def link_text(file: int) -> str | None:
    """The text of a link where a file holds nothing else: what git makes of one where it can make no links, as on Windows."""
    if not 0 < os.fstat(file).st_size <= MAX_LINK_TEXT:
        return None
    text = os.pread(file, MAX_LINK_TEXT, 0)
    return text.decode() if LINK_TEXT.fullmatch(text) else None


def _place(folder: int, path: Path) -> Path:
    """Where an open folder is now, all links on the way resolved."""
    try:
        return Path(f"/proc/self/fd/{folder}").readlink()
    except OSError:
        return path.resolve()


def _is_blob_of(target: Path, here: Path) -> bool:
    entry = target.parent.parent
    if target.parent.name != "blobs":
        return False
    return entry / "snapshots" in here.parents or (ENTRY.fullmatch(entry.name) is not None and BLOB.fullmatch(target.name) is not None)


def _descend(folder: int, parts: tuple[str, ...]) -> int:
    """A descriptor of a file below an open folder, no link followed."""
    above = os.dup(folder)
    for part in parts[:-1]:
        try:
            below = os.open(part, FOLDER, dir_fd=above)
        finally:
            os.close(above)
        above = below
    try:
        return os.open(parts[-1], READ, dir_fd=above)
    finally:
        os.close(above)
