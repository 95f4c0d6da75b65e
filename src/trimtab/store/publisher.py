"""Puts adapters into a store: checks them, copies them, gives them a number. `registry` says why that is safe beside other writers."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from trimtab.errors import AdapterError
from trimtab.store.blobs import CHUNK, BlobFolder, Staged, Staging, open_regular
from trimtab.store.describe import contradictions, describe
from trimtab.store.files import MAX_JSON_BYTES, AdapterFolder, Refusal, digest_of, open_folder
from trimtab.store.folder import PICKLES, WEIGHTS, check_layout, read_opened
from trimtab.store.header import read_header
from trimtab.store.manifest import (
    EMPTY,
    EMPTY_DESCRIPTOR,
    FILE_TYPES,
    MAX_ADAPTER_BYTES,
    SMALL_FILES,
    Descriptor,
    Manifest,
    file_descriptor,
    parse_manifest,
)
from trimtab.store.name import Entry, Name
from trimtab.store.names import Ref, check_aliases, parse_name
from trimtab.store.reader import StoreReader, refusing
from trimtab.store.version import Version

if TYPE_CHECKING:
    from trimtab.model import Base
    from trimtab.store.in_memory import AdapterInMemory

log = logging.getLogger(__name__)


class BlobsMissing(AdapterError):
    """A blob that a manifest needs is not in the store: it was collected, or was never there."""


class StorePublisher(StoreReader):
    """What `Store` does to add versions and blobs."""

    def publish(self, source: str | Path | AdapterInMemory, name: str, *, base: Base | None = None, aliases: Sequence[str] = ()) -> Version:
        """Make an adapter, or an adapter's folder, the newest version of a name. `aliases` move to it in the same step.

        Names and sizes are checked before a byte is copied. The folder's files are copied, and the copies are checked: with `base` as on
        loading, without it as far as possible. Files that are no part of an adapter are refused. If the newest version has the same files,
        that version is returned. An Adapter is saved first; since trimtab.json has the time, it is a new version each time. AdapterError if
        anything is wrong; nothing is published then.
        """
        ref, wanted = parse_name(name), check_aliases(aliases)
        if not isinstance(source, (str, Path)):
            with tempfile.TemporaryDirectory(prefix="trimtab-") as work:
                folder = source.save(Path(work) / "adapter", run=source.info.get("run"))
                return self.publish(folder, name, base=source.base, aliases=aliases)
        with self._changing(f"cannot publish {ref}"), open_folder(source) as opened:
            return self.publish_opened(opened, ref, base=base, aliases=wanted)

    def publish_opened(self, opened: AdapterFolder, name: str | Ref, *, base: Base | None = None, aliases: Sequence[str] = ()) -> Version:
        """`publish` for a folder that is open."""
        ref, wanted, where = parse_name(name), check_aliases(aliases), f"adapter {str(opened.path)!r}"
        with self._changing(f"cannot publish {ref}"), self._blobs.staging() as stage:
            with refusing(where, f"publish a folder that holds nothing but {', '.join(FILE_TYPES)}"):
                sizes = _sizes(opened)
                if base is not None:
                    check_layout(opened, base, where)
                self._check_room(sum(sizes.values()), where)
                copies = {name: _copy(opened, name, size, stage) for name, size in sizes.items()}
            files = {n: file_descriptor(n, c.digest, c.size) for n, c in copies.items()}
            copied = BlobFolder(opened.path, self._blobs, {n: (files[n], c.path) for n, c in copies.items()})
            manifest = Manifest(files, describe(copied, where))
            if base is not None:
                read_opened(copied, base, where)
            return self._commit(ref, manifest, stage.write([manifest.to_bytes()]), [*copies.values()], stage, wanted)

    def adopt(self, manifest_bytes: bytes, name: str, *, aliases: Sequence[str] = (), blobs: Mapping[str, Path] | None = None) -> Version:
        """`publish` for a manifest, as after a pull. All is checked as it is without a base.

        blobs: digest -> a file in the store's tmp that holds a blob which the store lacks; it is moved in in the instant of the commit. All
        others must be in the store: `BlobsMissing` where one is not.
        """
        ref, wanted = parse_name(name), check_aliases(aliases)
        where = f"manifest {digest_of(manifest_bytes)}"
        with self._changing(f"cannot publish {ref}"), self._blobs.staging() as stage:
            with refusing(where, "pull it again, or publish the adapter's folder"):
                manifest = parse_manifest(manifest_bytes, "the manifest")
            given = blobs or {}
            with refusing(where, "pull it again"):
                damage = [self._blobs.problem(b, given[b.digest]) for b in manifest.blobs if b.digest in given]
                if any(damage):
                    raise Refusal("\n".join(d for d in damage if d))
            self._check_there([b for b in manifest.files.values() if b.digest not in given], ref)
            folder = BlobFolder(Path(where), self._blobs, {n: (b, given.get(b.digest)) for n, b in manifest.files.items()})
            derived = describe(folder, where)
            if problems := contradictions(manifest.annotations, derived):
                raise AdapterError(f"{where} is refused", problems=problems, fix="publish the adapter's folder anew")
            files = [Staged(given[b.digest], b.digest, b.size, True) for b in manifest.blobs if b.digest in given]
            return self._commit(ref, manifest, stage.write([manifest_bytes]), files, stage, wanted)

    def put_blob(self, source: BinaryIO | bytes | str | Path, expected_digest: str | None = None) -> Descriptor:
        """Put one blob in. AdapterError, nothing kept, if its bytes are not those of `expected_digest`.

        Nothing refers to it yet: garbage collection spares it for its grace, anew whenever it is put in.
        """
        with self._changing("cannot write a blob"), self._blobs.staging() as stage:
            if isinstance(source, (str, Path)):
                with refusing(str(source), "give a regular file"), open_regular(Path(source), str(source)) as (file, size):
                    self._check_room(size, str(source))
                    staged = stage.copy(file, size, str(source))
            else:
                staged = stage.write([source] if isinstance(source, bytes) else _chunks(source))
            if expected_digest not in (None, staged.digest):
                raise AdapterError(f"the bytes hash to {staged.digest}, not to {expected_digest}", fix="fetch them anew")
            with self._layout.locked():
                self._layout.check_parts()
                self._blobs.keep([staged])
        return Descriptor("application/octet-stream", staged.digest, staged.size)

    def _commit(
        self, ref: Ref, manifest: Manifest, written: Staged, files: Sequence[Staged], stage: Staging, aliases: Sequence[str]
    ) -> Version:
        """Give staged files their names, then the version its number."""
        empty = [] if self._blobs.problem(EMPTY_DESCRIPTOR) is None else [stage.write([EMPTY])]
        with self._layout.locked():
            there = self.get(ref) or Name(ref.path)
            self._blobs.keep([*files, *empty, written])
            self._check_there(manifest.blobs, ref)
            name = there.published(Entry(written.digest, written.size))
            for alias in aliases:
                name = name.aliased(alias, name.newest)
            self._write(name)
        return self.version(name, name.newest)

    def _check_there(self, blobs: Sequence[Descriptor], ref: Ref) -> None:
        gone = [f"blob {b.digest} is missing" for b in blobs if not self._blobs.has(b.digest, b.size)]
        if gone:
            raise BlobsMissing(f"cannot publish {ref}", problems=gone, fix="put them in again: they were collected, or never came")

    def _check_room(self, size: int, where: str) -> None:
        """AdapterError, before anything is copied, where the disk has no room for it."""
        free = shutil.disk_usage(self.root).free
        if size > free:
            raise AdapterError(f"{where}: {size:,} bytes are to be copied, and {free:,} are free in {self.root}", fix="make room")

    def has_blob(self, digest: str) -> bool:
        """Whether a blob is there; its bytes are not looked at. One that is becomes young again, so that collection spares it for now."""
        path = self.blob_path(digest)
        if not self._blobs.has(digest):
            return False
        try:
            os.utime(path, follow_symlinks=False)
        except OSError:
            pass  # a store that can only be read has no collection either
        return True

    # ---- beneath ----

    @contextmanager
    def _changing(self, what: str) -> Iterator[None]:
        """Before a change, and while it is made: the layout is as it must be, and a disk that fails is said."""
        self._layout.check_parts()
        with self._layout.writing(what):
            yield

    def _write(self, name: Name) -> None:
        """Commit a changed name. Call it under the lock."""
        with self._trusting():
            self._refs.write(name)


def _sizes(folder: AdapterFolder) -> dict[str, int]:
    """The adapter's files and their sizes, the weights' as their header explains it. Refusal, with a line for each, where there are others,
    or one is too large or is none."""
    names = folder.names()
    left_out = [n for n in names if n in PICKLES and WEIGHTS in names]
    known = (*FILE_TYPES, *left_out)
    problems = [f"{n} is {'a pickle' if n in PICKLES else 'none of the files of an adapter'}" for n in names if n not in known]
    sizes = {}
    for name in (n for n in FILE_TYPES if n in names):
        try:
            with folder.open(name) as (file, size):
                limit = MAX_JSON_BYTES if name in SMALL_FILES else MAX_ADAPTER_BYTES
                if size > limit:
                    raise Refusal(f"{name} has {size:,} bytes; at most {limit:,} are read")
                if name == WEIGHTS:
                    read_header(file, size, name)
                sizes[name] = size
        except Refusal as reason:
            problems.append(str(reason))
    if problems:
        raise Refusal("\n".join(problems))
    for name in left_out:
        log.warning("%s: %s is a pickle and is left out; %s beside it is taken", folder.path, name, WEIGHTS)
    return sizes


def _copy(folder: AdapterFolder, name: str, size: int, stage: Staging) -> Staged:
    with folder.open(name) as (file, now):
        if now != size:
            raise Refusal(f"{name} was changed while it was read")
        return stage.copy(file, size, name)


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK):
        yield chunk
