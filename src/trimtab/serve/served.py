"""What a name of the catalog stands for, as the engine loads it: a version of the store, or a plain folder pinned to its bytes.

A digest means the same tensors for ever: the store's versions never change, and a folder's files are compared with what they were when its
digest was taken, each time they are read. Also here: which folders are really below an allowed one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from trimtab.errors import AdapterError
from trimtab.serve.request import Servable
from trimtab.store.files import AdapterFolder, Refusal, read_exactly
from trimtab.store.find import InStore, find_adapter
from trimtab.store.folder import CONFIG, NOTE, WEIGHTS, check_layout, own_head
from trimtab.store.registry import Store
from trimtab.store.version import Version

if TYPE_CHECKING:
    from trimtab.methods import Head
    from trimtab.model import Base
    from trimtab.store import Adapter

FILES = (CONFIG, WEIGHTS, NOTE)
CHUNK = 2**22


class Served(Servable, Protocol):
    """What a name stands for. ref: what to call it in logs: acme/support@3, or the folder's path."""

    @property
    def ref(self) -> str: ...
    @property
    def head(self) -> Head | None:
        """Its own head, by its small files. AdapterError, or OSError, where they cannot be read: `load` says what is wrong."""
        ...


@dataclass(frozen=True)
class StoredAdapter:
    """A version of the store as the engine loads it. digest: its manifest's."""

    version: Version = field(repr=False)
    store: Store = field(repr=False, compare=False)
    base: Base = field(repr=False, compare=False)

    @property
    def digest(self) -> str:
        return self.version.digest

    @property
    def ref(self) -> str:
        return self.version.ref

    def load(self) -> Adapter:
        """AdapterError if it was removed meanwhile, is damaged, or is for another base."""
        from trimtab.store import Adapter

        with self.store.open(self.version) as folder:
            return Adapter.read(folder, self.base, f"adapter {self.version.ref}")

    @property
    def head(self) -> Head | None:
        with self.store.open(self.version) as folder:
            return own_head(folder, f"adapter {self.version.ref}")


class Pinned(AdapterFolder):
    """A folder of which only files with known digests are given out, as copies that nobody can change any more."""

    def __init__(self, path: Path, descriptor: int, digests: Mapping[str, str]):
        super().__init__(path, descriptor)
        self._digests = digests

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[int, int]]:
        """Refusal if the bytes are not those that were there at first."""
        copy = os.memfd_create("adapter", os.MFD_CLOEXEC)
        try:
            with super().open(name) as (file, size):
                self.check(name, f"sha256:{_hash(file, size, name, copy)}")
            os.lseek(copy, 0, os.SEEK_SET)
            yield copy, size
        finally:
            os.close(copy)

    @contextmanager
    def open_unhashed(self, name: str) -> Iterator[tuple[int, int]]:
        with super().open(name) as opened:
            yield opened

    def check(self, name: str, digest: str) -> None:
        if digest != f"sha256:{self._digests.get(name)}":
            raise Refusal(f"{name} has changed since the adapter was loaded: unload it and load it again")


@dataclass(frozen=True)
class FolderAdapter:
    """A folder as the engine loads it. parts: of its path below root. digest: sha256 over names and bytes of the files that count."""

    root: Path
    parts: tuple[str, ...]
    digest: str
    digests: Mapping[str, str] = field(repr=False, compare=False)
    base: Base = field(repr=False, compare=False)

    @property
    def ref(self) -> str:
        return str(self.root.joinpath(*self.parts))

    @classmethod
    def read(cls, root: Path, parts: tuple[str, ...], base: Base) -> FolderAdapter:
        """AdapterError if a file is missing or is none that is read."""
        where, digests = root.joinpath(*parts), {}
        try:
            with descend(root, parts) as descriptor:
                folder = AdapterFolder(where, descriptor)
                check_layout(folder, base, f"adapter {str(where)!r}")  # so that no more is hashed than an adapter can hold
                for name in sorted(set(folder.names()) & set(FILES)):
                    with folder.open(name) as (file, size):
                        digests[name] = _hash(file, size, name)
        except (Refusal, OSError) as error:
            raise AdapterError(f"adapter {str(where)!r} is refused", problems=[str(error)]) from error
        whole = hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in digests.items()).encode())
        return cls(root, parts, f"sha256:{whole.hexdigest()}", digests, base)

    def load(self) -> Adapter:
        """AdapterError if it is refused, or has changed since it was read."""
        from trimtab.store import Adapter

        where = f"adapter {self.ref!r}"
        try:
            with descend(self.root, self.parts) as descriptor:
                pinned = Pinned(Path(self.ref), descriptor, self.digests)
                return Adapter.read(pinned, self.base, where)
        except OSError as error:
            raise AdapterError(f"{where} cannot be read any more: {error.strerror}", fix="unload it") from error

    @property
    def head(self) -> Head | None:
        with descend(self.root, self.parts) as descriptor:
            return own_head(AdapterFolder(Path(self.ref), descriptor), f"adapter {self.ref!r}")


def served(source: str, base: Base, store: str | Path | Store | None = None) -> StoredAdapter | FolderAdapter:
    """The adapter that a folder's path or a name in the store means. AdapterError if there is none."""
    found = find_adapter(source, store)
    if isinstance(found, InStore):
        return StoredAdapter(found.version, found.store, base)
    real = Path(os.path.realpath(found))
    return FolderAdapter.read(real.parent, (real.name,), base)


def below(roots: Sequence[Path], path: str, first: Collection[str] | None) -> tuple[Path, tuple[str, ...]] | None:
    """(root, parts below it) of a folder that is really below one of the roots, links followed; None if it is not, or is not there.
    first: what the first part may be; None: anything."""
    if "\0" in path or len(path) > 4096 or not Path(path).is_absolute():
        return None
    real = Path(os.path.realpath(path))
    for root in roots:
        if root in real.parents and os.path.isdir(real):  # noqa: PTH112 (unlike Path's it is False of a name that is too long)
            parts = real.relative_to(root).parts
            if first is None or (parts[0] in first and len(parts) > 1):
                return root, parts
    return None


@contextmanager
def descend(root: Path, parts: Sequence[str]) -> Iterator[int]:
    """A descriptor of a folder below root, reached part by part without following a link: what was checked cannot be swapped for one."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    descriptor = os.open(root, flags)
    try:
        for part in parts:
            descriptor, above = os.open(part, flags | os.O_NOFOLLOW, dir_fd=descriptor), descriptor
            os.close(above)
        yield descriptor
    finally:
        os.close(descriptor)


def _hash(file: int, size: int, name: str, copy: int | None = None) -> str:
    """sha256 of the next `size` bytes, copied on the way. Refusal if the file ends before."""
    sha = hashlib.sha256()
    for start in range(0, size, CHUNK):
        chunk = read_exactly(file, min(CHUNK, size - start), name)
        sha.update(chunk)
        view = memoryview(chunk)
        while copy is not None and view:
            view = view[os.write(copy, view) :]
    return sha.hexdigest()
