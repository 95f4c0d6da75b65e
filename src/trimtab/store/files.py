"""Reads files from strangers: regular files only, bounded sizes, unambiguous JSON, and no symlinks except those of a hub cache.

A folder is opened once, and its files through it. So a folder that is replaced while it is read never gives parts of two adapters.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trimtab.errors import AdapterError
from trimtab.store.links import READ, Refusal, link_text, open_link

__all__ = ["ARCHIVES", "MAX_JSON_BYTES", "AdapterFolder", "Refusal", "digest_of", "open_folder", "parse_json", "read_exactly"]

MAX_JSON_BYTES = 2**20
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")


class AdapterFolder:
    """An open adapter folder. Files are read through its descriptor, never through their path."""

    def __init__(self, path: Path, descriptor: int):
        self.path, self._descriptor = path, descriptor

    def names(self) -> list[str]:
        return sorted(os.listdir(self._descriptor))  # noqa: PTH208 - the descriptor, so that a renamed folder stays the one that was opened

    @property
    def is_replaced(self) -> bool:
        """Whether another folder, or none, is under the path by now."""
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except OSError:
            return True

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[int, int]]:
        """(descriptor, size in bytes) of a regular file, which may be a link into a hub cache's blobs (`links.open_link`).

        Refusal if it is another link, a pipe or a folder; FileNotFoundError without it.
        """
        file = self._open(name)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise Refusal(f"{name} is not a regular file")
            yield file, status.st_size
        finally:
            os.close(file)

    @contextmanager
    def open_unhashed(self, name: str) -> Iterator[tuple[int, int]]:
        """As `open`, but what is read counts only once `check` has had the digest of the whole file."""
        with self.open(name) as opened:
            yield opened

    def check(self, name: str, digest: str) -> None:
        """Refusal if a file that hashes to this ("sha256:…") is not the one that belongs here. A plain folder knows no digests."""

    def _open(self, name: str) -> int:
        try:
            file = os.open(name, READ, dir_fd=self._descriptor)
        except FileNotFoundError:
            raise
        except OSError as error:
            if stat.S_ISLNK(os.stat(name, dir_fd=self._descriptor, follow_symlinks=False).st_mode):
                return open_link(self._descriptor, self.path, name, os.readlink(name, dir_fd=self._descriptor))
            raise Refusal(f"{name} cannot be opened: {error.strerror}") from error
        text = link_text(file)
        if text is None:
            return file
        os.close(file)
        return open_link(self._descriptor, self.path, name, text)

    def read(self, name: str, limit: int) -> bytes:
        """A whole file of at most `limit` bytes. Refusal if it is larger."""
        with self.open(name) as (file, size):
            if size > limit:
                raise Refusal(f"{name} has {size:,} bytes; at most {limit:,} are read")
            return read_exactly(file, size, name)

    def read_json(self, name: str) -> tuple[dict[str, Any], bytes]:
        """One JSON object, and the bytes that it was read from."""
        data = self.read(name, MAX_JSON_BYTES)
        return parse_json(data, name), data


@contextmanager
def open_folder(path: str | Path) -> Iterator[AdapterFolder]:
    """Open an adapter folder. AdapterError if it is not there, a symlink, or a file (an archive, a bare weights file)."""
    path = Path(path)
    try:
        mode = path.lstat().st_mode
    except (OSError, ValueError) as error:
        fix = "give a folder that holds adapter_config.json and adapter_model.safetensors"
        raise AdapterError(f"adapter {str(path)!r}: no such folder (looked for {path.absolute()})", fix=fix) from error
    if stat.S_ISLNK(mode):
        raise AdapterError(
            f"adapter {str(path)!r} is a symbolic link, which is not followed", fix=f"give the folder itself: {path.resolve()}"
        )
    if not stat.S_ISDIR(mode):
        kind = "an archive, and archives are not unpacked" if path.suffix.lower() in ARCHIVES else "a file"
        raise AdapterError(f"adapter {str(path)!r} is {kind}", fix="give the folder that holds adapter_config.json")
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield AdapterFolder(path, descriptor)
    finally:
        os.close(descriptor)


def read_exactly(file: int, count: int, name: str) -> bytes:
    """The next `count` bytes of an open file. Refusal if it ends before."""
    parts, left = [], count
    while left:
        part = os.read(file, min(left, 2**30))
        if not part:
            raise Refusal(f"{name} ends {left:,} bytes early: it is truncated, or was changed while it was read")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """One JSON object. Refusal on anything else, on a key that is there twice, on NaN and Infinity, on nesting too deep."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise Refusal(f"{name} has the key {twice!r} more than once")
        return found

    def constant(text: str) -> Any:
        raise Refusal(f"{name} holds {text}, which is not JSON")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except Refusal:
        raise
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{name} is not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise Refusal(f"{name} holds {type(value).__name__} where a JSON object belongs")
    return value


def digest_of(data: bytes) -> str:
    """ "sha256:…" of bytes, as manifests and notes write it."""
    return "sha256:" + hashlib.sha256(data).hexdigest()
