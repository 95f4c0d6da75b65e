"""A folder that fsspec can reach (s3, gs, file, memory, …), laid out as an OCI image layout.

    <root>/oci-layout                what it is
    <root>/blobs/sha256/<hex>        files and manifests, by their digest; one that is there is not moved again
    <root>/index.json                every version and alias as a descriptor of its manifest; written last, so that its blobs are there
    <root>/changes/<name>.json       the same of one name, where it is there; it counts instead (a large store's folder: `store/refs`)

It is what a store has on disk: one folder holds many adapters, equal files of all of them once, and one can pull from a store's folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from filelock import FileLock

from trimtab.errors import AdapterError
from trimtab.store.files import MAX_JSON_BYTES, digest_of
from trimtab.store.index import Index, parse_index
from trimtab.store.manifest import MANIFEST_TYPE, Descriptor
from trimtab.store.name import Entry, Name
from trimtab.store.names import LATEST, NoSuchAdapter, Ref
from trimtab.store.refs import change_file
from trimtab.store.remotes import bucket
from trimtab.store.remotes.address import FolderAddress
from trimtab.store.remotes.bucket import Bucket
from trimtab.store.remotes.fetch import patiently
from trimtab.store.remotes.source import Source

if TYPE_CHECKING:
    from trimtab.store.registry import Version

LAYOUT, INDEX, LOCK = "oci-layout", "index.json", ".lock"
MAX_INDEX_BYTES = 2**26
LOOKS = 4
"""How often tags are written anew when a push at the same time has overwritten them."""


class FolderRemote:
    """One folder. wanted: the adapter to pull, where the address names none."""

    def __init__(self, address: FolderAddress, wanted: Ref):
        self.address, self.where, self.wanted = address, str(address), address.ref or wanted
        self._bucket = Bucket(address)

    # ---- reading ----

    def manifest(self) -> bytes:
        """The manifest that the wanted adapter's tag names, or the newest of its numbers."""
        found = self._find(self._index(self.wanted.path)[0])
        entry = Descriptor(MANIFEST_TYPE, found.digest, found.size)
        if entry.size > MAX_JSON_BYTES:
            raise AdapterError(f"{self.where}: its manifest has {entry.size:,} bytes; at most {MAX_JSON_BYTES:,} are read")
        data = b"".join(patiently(lambda: list(self.read(entry, 0)), self.where))
        if digest_of(data) != entry.digest:
            raise AdapterError(f"{self.where}: the manifest is not {entry.digest}", fix="pull again, or do not trust that folder")
        return data

    def _find(self, index: Index) -> Entry:
        try:
            name = index.find(self.wanted, self.address.root)
            return name.versions[name.number(self.wanted)]
        except NoSuchAdapter as error:
            there = [f"{n.path}@{n.newest}" for n in index.live[:20]]
            fix = (
                f"there are {', '.join(there)}; say which by {self.address.root}#namespace/name@version"
                if there
                else "push one there first"
            )
            raise AdapterError(f"{self.address.root} holds no {self.wanted}", fix=fix) from error

    def has(self, blob: Descriptor) -> bool:
        """Whether a file of the blob's name and size is there."""
        return self._bucket.size(self._blob(blob)) == blob.size

    def read(self, blob: Descriptor, start: int) -> Iterator[bytes]:
        """A blob's bytes from `start` on, range by range."""
        path = self._blob(blob)
        size = self._bucket.size(path)
        if size != blob.size:
            found = "is missing" if size is None else f"has {size:,} bytes, not {blob.size:,}"
            raise AdapterError(f"{self.where}: blob {blob.digest} {found}", fix="push the adapter there again")
        for at in range(start, blob.size, bucket.RANGE_BYTES):
            yield self._bucket.piece(path, at, min(at + bucket.RANGE_BYTES, blob.size))

    def _index(self, path: str) -> tuple[Index, str]:
        """The tags of the name `path` as they are now, which may stand among all others, and the file that has them."""
        change = self._tags(change_file(path), of=path)
        return (self._tags(INDEX) or Index(), INDEX) if change is None else (change, change_file(path))

    def _tags(self, file: str, of: str | None = None) -> Index | None:
        """What a file says, where it is to be of one name alone; None where there is no such file."""
        size = patiently(lambda: self._bucket.size(file), self.where)
        if size is None:
            return None
        if size > MAX_INDEX_BYTES:
            raise AdapterError(f"{self.where}: {file} has {size:,} bytes; at most {MAX_INDEX_BYTES:,} are read")
        data = patiently(lambda: self._bucket.whole(file, MAX_INDEX_BYTES), self.where)
        if data is None:  # folded into index.json meanwhile
            return None
        index, problems = parse_index(data, file, of=of)
        if problems:
            fix = "see whether the URL names a folder that adapters were pushed to"
            raise AdapterError(f"{self.where}: its {file} is refused", problems=problems[:12], fix=fix)
        return index

    # ---- writing ----

    def write(self, blob: Descriptor, source: Source) -> None:
        """Upload a blob; under its name there is all of it, or nothing."""
        patiently(lambda: self._bucket.put(self._blob(blob), blob.size, source), f"{self.where}, {blob.digest},")

    def finish(self, version: Version, manifest: bytes) -> list[str]:
        """Write the manifest, then the tags: the version's number and its aliases, or the one that the address names. Returns them.

        AdapterError if the number is taken by other content: a version never changes.
        """
        ref, aliases = self._tag(version)
        blob, entry = Descriptor(MANIFEST_TYPE, version.digest, len(manifest)), Entry(version.digest, len(manifest))
        for path, data in ((LAYOUT, b'{"imageLayoutVersion":"1.0.0"}'), (self._blob(blob), manifest)):
            self._put_small(path, data)
        assert ref.number is not None
        with FileLock(f"{self._bucket.root}/{LOCK}") if self._bucket.local else nullcontext():
            for _ in range(LOOKS):
                index, file = self._index(ref.path)
                name = index.names.get(ref.path, Name(ref.path))
                there = name.versions.get(ref.number, entry)
                if there != entry:
                    fix = f"push it under a name of its own: {self.address.root}#{ref.path}-other@1"
                    raise AdapterError(f"{self.address.root} has {ref} already, with other content ({there.digest})", fix=fix)
                wanted = replace(
                    name,
                    versions={**name.versions, ref.number: entry},
                    aliases={**name.aliases, **dict.fromkeys(aliases, ref.number)},
                    last=max(name.last, ref.number),
                )
                if wanted == name:
                    return [str(ref), *(f"{ref.path}@{a}" for a in aliases)]
                self._put_small(file, index.with_name(wanted).to_bytes())
        raise AdapterError(f"{self.where}: others keep overwriting its {INDEX}", fix="push again")

    def _tag(self, version: Version) -> tuple[Ref, list[str]]:
        """The name and number under which a version is pushed, and the aliases that move to it."""
        ref = self.address.ref
        if ref is None:
            return Ref.parse(f"{version.name}@{version.version}"), [a for a in version.aliases if a != LATEST]
        if ref.number is None:
            fix = f"write {self.address.root}#{ref.path}@{version.version}, or nothing behind '#'"
            raise AdapterError(f"{self.where}: a number is missing behind '#'", fix=fix)
        return ref, []

    def _put_small(self, path: str, data: bytes) -> None:
        patiently(lambda: self._bucket.put(path, len(data), [data]), self.where)

    def _blob(self, blob: Descriptor) -> str:
        return f"blobs/sha256/{blob.digest.removeprefix('sha256:')}"
