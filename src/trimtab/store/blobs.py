"""Blobs: files named by the sha256 of their bytes. Knows nothing of what refers to them.

Bytes are given out only after they hash to their digest, and as they were hashed. A blob is put in place by rename and never changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from trimtab.atomic import sync
from trimtab.store.files import AdapterFolder, Refusal, read_exactly
from trimtab.store.manifest import Descriptor

CHUNK = 2**20
MEMORY_BYTES = 2**28
"""Larger blobs are given out as an unnamed file on the store's disk, where it can be written, rather than in memory."""


class Missing(Refusal):
    """There is no such file."""


@dataclass
class Staged:
    """A whole file in tmp. anew: there was no good blob under its digest when it was written, so it was flushed to disk."""

    path: Path
    digest: str
    size: int
    anew: bool


class Blobs:
    """folder: `blobs/sha256`. tmp: where files are written before they get their names; in the same file system."""

    def __init__(self, folder: Path, tmp: Path):
        self.folder, self.tmp = folder, tmp

    def path(self, digest: str) -> Path:
        algorithm, _, digits = digest.partition(":")
        assert algorithm == "sha256" and len(digits) == 64 and set(digits) <= set("0123456789abcdef"), digest
        return self.folder / digits

    def has(self, digest: str, size: int | None = None) -> bool:
        """Whether a blob is there, of this size; its bytes are not read."""
        try:
            status = os.lstat(self.path(digest))
        except FileNotFoundError:
            return False
        return stat.S_ISREG(status.st_mode) and size in (None, status.st_size)

    def problem(self, blob: Descriptor, path: Path | None = None) -> str | None:
        """What is wrong with a blob, all its bytes having been hashed; None if it is there and whole. path: as in `open`."""
        try:
            for _ in self._chunks(blob, path):
                pass
        except Refusal as reason:
            return str(reason)
        return None

    def read(self, blob: Descriptor) -> bytes:
        """A small blob's bytes, compared with its digest. Refusal if it is missing or differs."""
        return b"".join(self._chunks(blob))

    @contextmanager
    def open(self, blob: Descriptor, path: Path | None = None) -> Iterator[tuple[int, int]]:
        """(descriptor, size) of a file without a name that holds the blob's bytes as they were hashed.

        path: where the bytes are if not in the store yet. The blob's own file is not given out: it could change after it was hashed.
        """
        copy = self._nameless(blob.size)
        try:
            for chunk in self._chunks(blob, path):
                write_all(copy, chunk)
            os.lseek(copy, 0, os.SEEK_SET)
            yield copy, blob.size
        finally:
            os.close(copy)

    def _nameless(self, size: int) -> int:
        if size > MEMORY_BYTES:
            try:
                return os.open(self.tmp, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            except OSError:
                pass  # a store that can only be read, or a file system that has no such files
        return os.memfd_create("blob", os.MFD_CLOEXEC)

    def copy(self, blob: Descriptor, target: Path) -> None:
        """Copy a blob's bytes to a new file. Refusal if they differ from the digest; the file is incomplete or wrong then."""
        file = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            for chunk in self._chunks(blob):
                write_all(file, chunk)
        finally:
            os.close(file)

    def _chunks(self, blob: Descriptor, path: Path | None = None) -> Iterator[bytes]:
        """A blob's bytes. Refusal, at the latest behind the last chunk, where they are not those of its digest and size."""
        sha = hashlib.sha256()
        with self.open_unhashed(blob, path) as (file, _):
            for chunk in pieces(file, blob.size, f"blob {blob.digest}"):
                sha.update(chunk)
                yield chunk
        _compare(blob, f"sha256:{sha.hexdigest()}")

    @contextmanager
    def open_unhashed(self, blob: Descriptor, path: Path | None = None) -> Iterator[tuple[int, int]]:
        """(descriptor, size) of the blob's own file, whose bytes have not been looked at. Refusal if it is missing or has another size."""
        with open_regular(path or self.path(blob.digest), f"blob {blob.digest}") as (file, size):
            if size != blob.size:
                raise Refusal(f"blob {blob.digest} has {size:,} bytes; its descriptor says {blob.size:,}")
            yield file, size

    @contextmanager
    def staging(self) -> Iterator[Staging]:
        """Files in tmp that are gone when the block ends, but for those that were renamed.

        Each is locked (`owned`) as long as the block runs, so that garbage collection knows that its writer lives, whatever its age.
        """
        self.tmp.mkdir(exist_ok=True)  # other tools' layouts have none
        with ExitStack() as ending:  # goes on where a file cannot be removed: a lock that stayed would keep it from every collection
            yield Staging(self, ending)

    def keep(self, staged: Iterable[Staged]) -> None:
        """Move staged files among the blobs, and make that last. Call it under the lock.

        A good blob is never replaced. It is touched instead: nothing may refer to it yet, and garbage collection goes by its age. A damaged
        one is replaced by the good bytes at hand, whole, so that readers of the old file are not disturbed.
        """
        for item in staged:
            target = self.path(item.digest)
            blob = Descriptor("", item.digest, item.size)
            if self.has(item.digest, item.size) and (not item.anew or self.problem(blob) is None):
                os.utime(target, follow_symlinks=False)
            else:
                if not item.anew:  # the blob was there when it was staged, and was collected since
                    sync(item.path)
                item.path.chmod(0o444)
                os.replace(item.path, target)
        sync(self.folder)  # once for all of them


class Staging:
    """Writes files into tmp: read-only, hashed on the way, flushed to disk. ending: removes and unlocks them when the writer is done."""

    def __init__(self, blobs: Blobs, ending: ExitStack):
        self.blobs, self.ending = blobs, ending

    def copy(self, file: int, size: int, name: str) -> Staged:
        """The next `size` bytes of an open file. Refusal if it ends before."""
        return self.write(pieces(file, size, name))

    def write(self, chunks: Iterable[bytes], *, time_ns: int | None = None) -> Staged:
        """time_ns: the file's time, for one that will not be a blob."""
        file, path = self._new()
        sha, size = hashlib.sha256(), 0
        for chunk in chunks:
            write_all(file, chunk)
            sha.update(chunk)
            size += len(chunk)
        digest = f"sha256:{sha.hexdigest()}"
        anew = self.blobs.problem(Descriptor("", digest, size)) is not None
        if time_ns is not None:
            os.utime(file, ns=(time_ns, time_ns))
        if anew or time_ns is not None:  # else it is thrown away
            os.fsync(file)
        return Staged(path, digest, size, anew)

    def _new(self) -> tuple[int, Path]:
        """An empty file that is this writer's own, and its path."""
        while True:
            path = self.blobs.tmp / uuid.uuid4().hex
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o444)
            self.ending.callback(os.close, file)
            self.ending.callback(path.unlink, missing_ok=True)
            fcntl.flock(file, fcntl.LOCK_SH)
            if is_still(path, file):  # else a collection has seen it before it was locked
                return file, path


class BlobFolder(AdapterFolder):
    """An adapter's folder whose files are blobs. path: what it is called. files: name -> the blob and, before it is in its place, where."""

    def __init__(self, path: Path, blobs: Blobs, files: Mapping[str, tuple[Descriptor, Path | None]]):
        self.path, self._blobs, self._files = path, blobs, files

    def names(self) -> list[str]:
        return sorted(self._files)

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[int, int]]:
        """(descriptor, size) of a file whose bytes have hashed to its digest. Refusal if they do not; FileNotFoundError without it."""
        if name not in self._files:
            raise FileNotFoundError(name)
        with self._blobs.open(*self._files[name]) as opened:
            yield opened

    @contextmanager
    def open_unhashed(self, name: str) -> Iterator[tuple[int, int]]:
        if name not in self._files:
            raise FileNotFoundError(name)
        with self._blobs.open_unhashed(*self._files[name]) as opened:
            yield opened

    def check(self, name: str, digest: str) -> None:
        _compare(self._files[name][0], digest)


def _compare(blob: Descriptor, digest: str) -> None:
    if digest != blob.digest:
        raise Refusal(f"blob {blob.digest} is damaged: its bytes hash to {digest}")


@contextmanager
def open_regular(path: Path, what: str) -> Iterator[tuple[int, int]]:
    """(descriptor, size) of a regular file. Missing if there is none; Refusal if it is a link, or anything else."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Missing(f"{what} is missing") from None
    except OSError as error:
        reason = "is a symbolic link, which is not followed" if path.is_symlink() else f"cannot be opened: {error.strerror}"
        raise Refusal(f"{what} {reason}") from error
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise Refusal(f"{what} is not a regular file")
        yield file, status.st_size
    finally:
        os.close(file)


def read_whole(path: Path, limit: int, what: str) -> bytes:
    """A regular file. Missing if there is none; Refusal if it is anything else, or larger than `limit` bytes."""
    with open_regular(path, what) as (file, size):
        if size > limit:
            raise Refusal(f"{what} has {size:,} bytes; at most {limit:,} are read")
        return read_exactly(file, size, what)


def pieces(file: int, size: int, name: str) -> Iterator[bytes]:
    """The next `size` bytes of an open file, CHUNK at a time. Refusal if it ends before."""
    for at in range(0, size, CHUNK):
        yield read_exactly(file, min(CHUNK, size - at), name)


def is_still(path: Path, file: int) -> bool:
    """Whether a name still means the file that was opened by it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


@contextmanager
def unowned(path: Path) -> Iterator[bool]:
    """Whether no living process works on a file in tmp; while the block runs none can begin to.

    Writers lock what they write there; the lock goes with their process, however that ends.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        yield False  # it has gone, or cannot be read: not ours to judge
        return
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError:
            free = False
        yield free
    finally:
        os.close(file)


def write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
