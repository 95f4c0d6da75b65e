"""A folder that fsspec can reach (s3, gs, file, memory, …), laid out as an OCI image layout.

    <root>/oci-layout                what it is
    <root>/blobs/sha256/<hex>        files and manifests, by their digest; one that is there is not moved again
    <root>/index.json                every version and alias as a descriptor of its manifest; written last, so that its blobs are there
    <root>/changes/<name>.json       the same of one name, where it is there; it counts instead (a large store's folder: `store/refs`)

It is what a store has on disk: one folder holds many adapters, equal files of all of them once, and one can pull from a store's folder.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from trimtab.atomic import atomic_write
from trimtab.errors import AdapterError, nearest
from trimtab.store.files import MAX_JSON_BYTES, digest_of
from trimtab.store.index import Index, parse_index
from trimtab.store.manifest import MANIFEST_TYPE, Descriptor
from trimtab.store.name import Entry, Name
from trimtab.store.names import LATEST, NoSuchAdapter, Ref
from trimtab.store.refs import change_file
from trimtab.store.remotes.address import CREDENTIALS, OTHER_CREDENTIALS, FolderAddress, redacted
from trimtab.store.remotes.fetch import Transient, patiently
from trimtab.store.remotes.source import Source

if TYPE_CHECKING:
    from trimtab.store.registry import Version

LAYOUT, INDEX, LOCK = "oci-layout", "index.json", ".lock"
RANGE_BYTES = 2**23
"""Asked for at once; what an interrupted download may have to fetch again is less than that."""
MAX_INDEX_BYTES = 2**26
LOOKS = 4
"""How often tags are written anew when a push at the same time has overwritten them."""
FINAL = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP)
S3 = ("s3", "s3a")
OBJECT_STORES = (*S3, "gs", "gcs", "abfs", "abfss", "az", "adl", "oss")
EXTRAS = {"s3": "pip install 'trimtab[s3]'", "gs": "pip install gcsfs", "gcs": "pip install gcsfs", "abfs": "pip install adlfs"}


class FolderRemote:
    """One folder. wanted: the adapter to pull, where the address names none."""

    def __init__(self, address: FolderAddress, wanted: Ref):
        self.address, self.where, self.wanted = address, str(address), address.ref or wanted
        self._fs, self._root = _file_system(address)
        self._local = "file" in ((self._fs.protocol,) if isinstance(self._fs.protocol, str) else self._fs.protocol)

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
        return self._size(self._blob(blob)) == blob.size

    def read(self, blob: Descriptor, start: int) -> Iterator[bytes]:
        """A blob's bytes from `start` on, range by range."""
        path = self._blob(blob)
        size = self._size(path)
        if size != blob.size:
            found = "is missing" if size is None else f"has {size:,} bytes, not {blob.size:,}"
            raise AdapterError(f"{self.where}: blob {blob.digest} {found}", fix="push the adapter there again")
        for at in range(start, blob.size, RANGE_BYTES):
            with self._speaking():
                piece = self._fs.cat_file(path, start=at, end=min(at + RANGE_BYTES, blob.size))
            yield piece

    def _index(self, path: str) -> tuple[Index, str]:
        """The tags of the name `path` as they are now, which may stand among all others, and the file that has them."""
        change = self._tags(change_file(path), of=path)
        return (self._tags(INDEX) or Index(), INDEX) if change is None else (change, change_file(path))

    def _tags(self, file: str, of: str | None = None) -> Index | None:
        """What a file says, where it is to be of one name alone; None where there is no such file."""
        path = f"{self._root}/{file}"
        size = patiently(lambda: self._size(path), self.where)
        if size is None:
            return None
        if size > MAX_INDEX_BYTES:
            raise AdapterError(f"{self.where}: {file} has {size:,} bytes; at most {MAX_INDEX_BYTES:,} are read")
        data = patiently(lambda: self._cat(path), self.where)
        if data is None:  # folded into index.json meanwhile
            return None
        index, problems = parse_index(data, file, of=of)
        if problems:
            fix = "see whether the URL names a folder that adapters were pushed to"
            raise AdapterError(f"{self.where}: its {file} is refused", problems=problems[:12], fix=fix)
        return index

    def _cat(self, path: str) -> bytes | None:
        with self._speaking():
            try:
                return bytes(self._fs.cat_file(path, start=0, end=MAX_INDEX_BYTES))
            except FileNotFoundError:
                return None

    def _size(self, path: str) -> int | None:
        with self._speaking():
            try:
                found = self._fs.info(path)
            except FileNotFoundError:
                return None
            return found["size"] if found["type"] == "file" else None

    # ---- writing ----

    def write(self, blob: Descriptor, source: Source) -> None:
        """Upload a blob; under its name there is all of it, or nothing."""
        patiently(lambda: self._put(self._blob(blob), blob.size, source), f"{self.where}, {blob.digest},")

    def finish(self, version: Version, manifest: bytes) -> list[str]:
        """Write the manifest, then the tags: the version's number and its aliases, or the one that the address names. Returns them.

        AdapterError if the number is taken by other content: a version never changes.
        """
        ref, aliases = self._tag(version)
        blob, entry = Descriptor(MANIFEST_TYPE, version.digest, len(manifest)), Entry(version.digest, len(manifest))
        for path, data in ((f"{self._root}/{LAYOUT}", b'{"imageLayoutVersion":"1.0.0"}'), (self._blob(blob), manifest)):
            self._put_small(path, data)
        assert ref.number is not None
        with FileLock(f"{self._root}/{LOCK}") if self._local else nullcontext():
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
                self._put_small(f"{self._root}/{file}", index.with_name(wanted).to_bytes())
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
        patiently(lambda: self._put(path, len(data), [data]), self.where)

    def _put(self, path: str, size: int, pieces: Iterable[bytes]) -> None:
        """A file whole or not at all: one request or a transaction, as object stores have them; on this machine's disks a rename."""
        with self._speaking():
            if self.address.scheme not in OBJECT_STORES:  # there a missing folder would be a missing bucket, and a typing error made one
                self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            if self._local:
                with atomic_write(Path(path)) as file:
                    file.writelines(pieces)
            elif size <= RANGE_BYTES:
                self._fs.pipe_file(path, b"".join(pieces))
            else:
                with self._fs.transaction, self._fs.open(path, "wb") as file:
                    for piece in pieces:
                        file.write(piece)

    def _blob(self, blob: Descriptor) -> str:
        return f"{self._root}/blobs/sha256/{blob.digest.removeprefix('sha256:')}"

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        """The errors of storage libraries as ours. Bugs of ours (KeyError and the like) pass as they are."""
        try:
            yield
        except (AdapterError, Transient):
            raise
        except Exception as error:
            if not isinstance(error, OSError) and type(error).__module__ == "builtins":
                raise
            said = f"{type(error).__name__}: {redacted(str(error))}"
            if isinstance(error, PermissionError) or "Credential" in type(error).__name__ or "Profile" in type(error).__name__:
                fix = CREDENTIALS.get(self.address.scheme, OTHER_CREDENTIALS)
                raise AdapterError(f"{self.where}: access is refused ({said})", fix=fix) from error
            if isinstance(error, (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)) or (
                isinstance(error, OSError) and error.errno in FINAL
            ):
                raise AdapterError(f"{self.where}: {said}", fix="see whether the URL is right, and whether there is room") from error
            raise Transient(said) from error


def _file_system(address: FolderAddress) -> tuple[Any, str]:
    import fsspec  # type: ignore[import-untyped]

    try:
        # no listings kept: what another process has pushed since must be seen
        options = {"config_kwargs": {"retries": {"total_max_attempts": 1}}} if address.scheme in S3 else {}
        files, root = fsspec.core.url_to_fs(address.root, use_listings_cache=False, skip_instance_cache=True, **options)
        if address.scheme in S3:
            files.retries = 1  # s3fs's tries, botocore's and ours would multiply: five minutes for a server that is gone
        return files, root
    except ImportError as error:
        raise AdapterError(
            f"{address}: {address.scheme}:// needs a package that is missing ({error})",
            fix=EXTRAS.get(address.scheme, "install that package"),
        ) from error
    except ValueError as error:
        known = fsspec.available_protocols()
        raise AdapterError(
            f"{address}: {address.scheme}:// is not known{nearest(address.scheme, ['hf', 'oci', *known])}",
            fix="use hf, oci, s3, gs, file or another scheme of fsspec",
        ) from error
