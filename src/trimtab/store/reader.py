"""Finding and reading what a store holds: takes no lock and changes nothing.

Index and blobs are replaced by rename, never written in place, and every byte is compared with its digest before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeAlias

from trimtab.errors import AdapterError, first_of
from trimtab.store.blobs import BlobFolder
from trimtab.store.card import CARD, is_untouched
from trimtab.store.diff import Diff, compare
from trimtab.store.files import AdapterFolder, Refusal
from trimtab.store.folder import REPLACEABLE
from trimtab.store.index import Index
from trimtab.store.layout import Layout
from trimtab.store.manifest import CREATED, MANIFEST_TYPE, Descriptor, Manifest, parse_manifest
from trimtab.store.name import Entry, Name
from trimtab.store.names import DIGEST, Ref, default_root, parse_name, short
from trimtab.store.refs import END_OF_PATHS, Refs
from trimtab.store.staging import staged
from trimtab.store.verify import VerifyReport, verify
from trimtab.store.version import Version

MAX_SHOWN = 12
MAX_MANIFESTS = 2**16
"""Manifests that a store remembers, about 3 KB each."""
Versions: TypeAlias = list[Version]
Names: TypeAlias = list[str]
"""In the class below, `list` is a method."""


class StoreReader:
    """What `Store` does without changing anything."""

    def __init__(self, root: str | Path | None = None, create: bool = False):
        self._layout = Layout(default_root() if root is None else Path(root), create=create, first_index=Index().to_bytes())
        self._blobs = self._layout.blobs
        self._refs = Refs(self._layout)
        self._manifests: dict[str, Manifest] = {}

    @property
    def root(self) -> Path:
        return self._layout.root

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    # ---- finding ----

    def resolve(self, ref: str | Ref) -> Version:
        """The version that a reference means. NoSuchAdapter, with the nearest name, where there is none."""
        ref = Ref.parse(ref)
        name = self._find(ref)
        return self.version(name, name.number(ref))

    def get(self, ref: str | Ref) -> Name | None:
        """What the store has of a name; None without one. Unlike `resolve` it takes no longer where other names are like this one."""
        with self._trusting():
            return self._refs.get(Ref.parse(ref).path)

    def version(self, name: Name, number: int) -> Version:
        """A version of a name that was found."""
        entry = name.versions[number]
        manifest = self._manifest(entry, f"{name.path}@{number}")
        created = manifest.annotations.get(CREATED, "")
        return Version(name.path, number, entry.digest, name.aliases_of(number), created, manifest.files, manifest.annotations)

    def names(self, namespace: str | None = None, after: str = "") -> Iterator[Name]:
        """Names that have a version, in the order of their paths, read as they are asked for; those behind the path `after`."""
        first, before = (after, END_OF_PATHS) if namespace is None else (max(after, f"{namespace}/"), f"{namespace}0")
        with self._trusting():
            yield from self._refs.names(first, before)

    def list(self, namespace: str | None = None) -> Versions:
        """The newest version of each name, in the order of their paths."""
        return [self.version(n, n.newest) for n in self.names(namespace)]

    def versions(self, name: str | Ref) -> Versions:
        """All versions of a name, oldest first."""
        found = self._find(parse_name(name))
        return [self.version(found, number) for number in sorted(found.versions)]

    def namespaces(self, name: str | None = None) -> Names:
        """All, or those that have a name."""
        with self._trusting():
            return self._refs.namespaces() if name is None else self._refs.namespaces_of(name)

    # ---- reading ----

    @contextmanager
    def open(self, version: Version | str | Ref) -> Iterator[AdapterFolder]:
        """A version's files as those of a folder. Every byte that it gives has hashed to its digest; AdapterError if one has not."""
        found = version if isinstance(version, Version) else self.resolve(version)
        with refusing(found.ref):
            yield self._folder(found.ref, found)

    def export(self, ref: str | Ref, folder: str | Path) -> Path:
        """Write a version as a plain peft folder, whole or not at all. AdapterError if the folder holds files that would be lost."""
        version = self.resolve(ref)
        replaceable = (*REPLACEABLE, CARD) if is_untouched(Path(folder) / CARD) else REPLACEABLE
        with staged(folder, may_replace=replaceable) as work, refusing(version.ref):
            for name, blob in version.files.items():
                self._blobs.copy(blob, work / name)
        return Path(folder)

    def diff(self, a: str | Ref, b: str | Ref, *, weights: bool = True) -> Diff:
        """What differs between two versions. weights: compare tensors, for which both are read."""
        old, new = self.resolve(a), self.resolve(b)
        shared = tuple(n for n, blob in old.files.items() if n in new.files and new.files[n].digest == blob.digest)
        with refusing(f"{old.ref} or {new.ref}"):
            return compare(old.ref, new.ref, self._folder(old.ref, old), self._folder(new.ref, new), shared, weights=weights)

    def manifest(self, digest: str) -> bytes:
        """A manifest's bytes. AdapterError if it is missing or damaged."""
        path = self.blob_path(digest)
        with refusing(f"manifest {digest}"):
            size = path.lstat().st_size if self._blobs.has(digest) else 0
            return self._blobs.read(Descriptor(MANIFEST_TYPE, digest, size))

    def blob_path(self, digest: str) -> Path:
        """Where a blob is, if it is there. Its bytes are not looked at: compare them with the digest while reading."""
        if DIGEST.fullmatch(digest) is None:
            raise AdapterError(f"{short(digest)} is no digest", fix="write sha256: and 64 hexadecimal digits")
        return self._blobs.path(digest)

    def verify(self) -> VerifyReport:
        """Hash every blob and compare all that refers to another; everything that is wrong is in the report."""
        before = self._layout.marks()
        report = verify(self._layout)
        if report.problems and self._layout.marks() != before:  # a version was removed, and collected, under our eyes
            with self._layout.locked():
                report = verify(self._layout)
        return report

    # ---- beneath ----

    def _find(self, ref: Ref) -> Name:
        with self._trusting():
            return self._refs.find(ref, str(self.root))

    def _trusting(self) -> AbstractContextManager[None]:
        """AdapterError if what is read of the names cannot be."""
        return refusing(f"the store {self.root}")

    def _manifest(self, entry: Entry, where: str) -> Manifest:
        found = self._manifests.get(entry.digest)
        if found is None:
            with refusing(where):
                found = parse_manifest(self._blobs.read(Descriptor(MANIFEST_TYPE, *entry)), "its manifest")
            if len(self._manifests) >= MAX_MANIFESTS:
                self._manifests.clear()
            self._manifests[entry.digest] = found
        return found

    def _folder(self, where: str, version: Version | Manifest) -> BlobFolder:
        return BlobFolder(Path(where), self._blobs, {name: (blob, None) for name, blob in version.files.items()})


@contextmanager
def refusing(what: str, fix: str = "`trimtab store verify` lists all that is wrong; publish or pull it again") -> Iterator[None]:
    """Turn what reading refuses into the user's error."""
    try:
        yield
    except Refusal as reason:
        raise AdapterError(f"{what} is refused", problems=first_of(str(reason).splitlines(), MAX_SHOWN), fix=fix) from reason
