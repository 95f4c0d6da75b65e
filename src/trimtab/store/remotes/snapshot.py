"""A folder of this machine and its copy under a URL that fsspec reaches.

    <url>/<path>            the folder's files, sent in an order that the sender chooses
    <url>/snapshot.json     who sent them, and the size and sha256 of each; written when all of them are there

So what a snapshot names was there, whole, before it. A file that only grows, such as a log, may be longer by now: then its first
bytes count. Before any other file that it names is replaced, a snapshot without that file is written. So a sender that is killed leaves
a copy that can be fetched. A bucket has no locks. Each sender has a token instead, which stands in the snapshot. A sender that finds
another one's there, before it sends or before it writes a snapshot, sends no more.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import quote

from trimtab.atomic import atomic_write
from trimtab.bases.cache import cache_dir
from trimtab.errors import AdapterError
from trimtab.store.names import default_root
from trimtab.store.remotes import bucket
from trimtab.store.remotes.address import FolderAddress, parse_address
from trimtab.store.remotes.bucket import Bucket
from trimtab.store.remotes.fetch import ATTEMPTS, CHUNK_BYTES, Transient, patiently

SNAPSHOT = "snapshot.json"
MAX_SNAPSHOT = 2**26
ROOM = "make room, or name another place: $TRIMTAB_RUNS for runs in progress, $TRIMTAB_CACHE for what is read"
UP = 3
"""How many folders up from a path its snapshot is looked for."""


class TakenOver(Exception):
    """Another sender has written the snapshot; the text names it."""


@dataclass(frozen=True)
class Mark:
    """How much of a file counts: its first `size` bytes, whose sha256 is known."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Snapshot:
    """What is under a URL. sender: its token, host and pid."""

    sender: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Mark] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        files = {path: {"size": m.size, "sha256": m.sha256} for path, m in self.files.items()}
        return json.dumps({"sender": dict(self.sender), "files": files}, indent=1).encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes) -> Snapshot:
        """ValueError where it is none, or names files outside of the folder."""
        content = json.loads(data)
        try:
            found = cls(dict(content["sender"]), {str(p): Mark(int(m["size"]), str(m["sha256"])) for p, m in content["files"].items()})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(str(error)) from None
        for path, mark in found.files.items():
            if PurePosixPath(path).as_posix() != path or path.startswith("/") or {"..", "."} & set(path.split("/")) or mark.size < 0:
                raise ValueError(f"{path!r} is no file of it")
        return found


class Copy:
    """The copy under `url`. AdapterError where it is no URL, or its library is missing.

    sender: of this copy, a new one at first; ranks share one. attempts: how often the other side is asked before it counts as out of reach.
    """

    def __init__(self, url: str):
        self.bucket = Bucket(folder_address(url))
        self.where = self.bucket.where
        self.sender: Mapping[str, Any] = {"token": os.urandom(16).hex(), "host": socket.gethostname(), "pid": os.getpid()}
        self.attempts = ATTEMPTS

    def read(self) -> Snapshot | None:
        """What is there, None where there is no snapshot. AdapterError where it cannot be read."""
        data = self._patiently(lambda: self.bucket.whole(SNAPSHOT, MAX_SNAPSHOT), SNAPSHOT)
        if data is None:
            return None
        try:
            return Snapshot.parse(data)
        except ValueError as error:
            raise AdapterError(f"{self.where}: its {SNAPSHOT} is refused: {error}", fix="name another folder") from error

    def files(self) -> list[str]:
        """All files there, whether a snapshot names them or not."""
        found: list[str] = self._patiently(self.bucket.files, "its list of files")
        return found

    def send(self, folder: Path, paths: Iterable[str], *, claim: bool = False) -> None:
        """Send these files in their order, but those that are there already, then the snapshot. What the last one named beside them goes.

        claim: whoever sent before. TakenOver where that was another sender. AdapterError where the other side takes nothing; OSError where
        a file cannot be read.
        """
        there = self._owned(claim)
        named, files = dict(there.files), dict[str, Mark]()
        for path in paths:
            with (folder / path).open("rb") as file:  # one for both: another process may give another file its name meanwhile
                before, mark = named.get(path), _mark(file)
                if mark != before:
                    if before is not None and _mark(file, before.size) != before:
                        del named[path]
                        self._name(Snapshot(self.sender, named), claim)
                    self._put(path, mark.size, _Pieces(file, mark.size))
            files[path] = mark
        if (now := Snapshot(self.sender, files)) != there:
            self._name(now, claim)
        for path in there.files.keys() - files.keys():
            self._patiently(lambda path=path: self.bucket.remove(path), path)  # type: ignore[misc]

    def remove_unnamed(self, which: Callable[[str], bool]) -> None:
        """Remove the files that `which` says yes to, but those that the snapshot names. TakenOver where that is another sender's."""
        listed = self.files()  # before it is read whose the snapshot is: another sender's files, unnamed as yet, are not among these
        named = self._owned(claim=False).files
        for path in listed:
            if path not in named and which(path):
                self._patiently(lambda path=path: self.bucket.remove(path), path)  # type: ignore[misc]

    def fetch(self, snapshot: Snapshot, folder: Path, paths: Iterable[str]) -> None:
        """Write these files of a snapshot into `folder`, in their order, but those that are there already. AdapterError where one is not
        what the snapshot says, or cannot be written."""
        for path in paths:
            mark, target = snapshot.files[path], folder / path
            if target.is_file() and target.stat().st_size == mark.size and mark_of(target) == mark:
                continue
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                self._patiently(lambda p=path, m=mark, t=target: self._fetch(p, m, t), path)  # type: ignore[misc]
            except OSError as error:
                raise AdapterError(f"{self.where}: {target} cannot be written: {error.strerror or error}", fix=ROOM) from error

    def _fetch(self, path: str, mark: Mark, target: Path) -> None:
        size, sha = self.bucket.size(path), hashlib.sha256()
        if size is None or size < mark.size:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise AdapterError(
                f"{self.where}: {path} {found}, and {SNAPSHOT} says {mark.size:,} bytes", fix="another process may write there"
            )
        with atomic_write(target) as file:
            for at in range(0, mark.size, bucket.RANGE_BYTES):
                piece = self.bucket.piece(path, at, end := min(at + bucket.RANGE_BYTES, mark.size))
                if len(piece) != end - at:
                    raise Transient(f"{end - at:,} bytes were asked for, {len(piece):,} came")
                sha.update(piece)
                file.write(piece)
            if sha.hexdigest() != mark.sha256:
                fix = "another process may write there; if not, the copy is damaged"
                raise AdapterError(f"{self.where}: {path} is not what {SNAPSHOT} says", fix=fix)

    def _owned(self, claim: bool) -> Snapshot:
        """What is there. TakenOver where that is another sender's, unless it is claimed."""
        there = self.read() or Snapshot()
        if not claim and there.sender.get("token") != self.sender["token"]:
            raise TakenOver(f"process {there.sender.get('pid', '?')} on {there.sender.get('host', '?')}")
        return there

    def _name(self, snapshot: Snapshot, claim: bool) -> None:
        """Write the snapshot, unless another sender has written one since."""
        if not claim:
            self._owned(claim)
        data = snapshot.to_bytes()
        self._put(SNAPSHOT, len(data), [data])

    def _put(self, path: str, size: int, pieces: Iterable[bytes]) -> None:
        self._patiently(lambda: self.bucket.put(path, size, pieces), path)

    def _patiently(self, work: Callable[[], Any], what: str) -> Any:
        return patiently(work, f"{self.where}, {what},", attempts=self.attempts)


class _Pieces:
    """The first `size` bytes of an open file, any number of times."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size = file, size

    def __iter__(self) -> Iterator[bytes]:
        self._file.seek(0)
        left = self._size
        while left and (piece := self._file.read(min(left, CHUNK_BYTES))):
            left -= len(piece)
            yield piece


def mark_of(path: Path) -> Mark:
    with path.open("rb") as file:
        return _mark(file)


def _mark(file: BinaryIO, most: int = sys.maxsize) -> Mark:
    """Of an open file's first `most` bytes, of all where it has fewer."""
    size, sha = 0, hashlib.sha256()
    for piece in _Pieces(file, most):
        size += len(piece)
        sha.update(piece)
    return Mark(size, sha.hexdigest())


def folder_address(url: str) -> FolderAddress:
    """AdapterError where a URL names no folder that fsspec reaches."""
    address = parse_address(url)
    if not isinstance(address, FolderAddress) or address.ref is not None:
        raise AdapterError(f"{url!r} is no folder of a file system", fix="write for example s3://bucket/folder or file:///folder")
    return address


def below(root: Path, url: str) -> Path:
    """The folder below `root` that stands for a URL: folders of a URL are folders in it."""
    scheme, _, rest = folder_address(url).root.partition("://")
    return root.joinpath(scheme, *(quote(part, safe=" ") for part in rest.split("/") if part))


def working_copy(url: str) -> Path:
    """The folder of this machine for a run whose `out` is this URL: in `$TRIMTAB_RUNS`, else in `runs` beside the store's folder."""
    named = os.environ.get("TRIMTAB_RUNS")
    return below(Path(named).expanduser().absolute() if named else default_root().parent / "runs", url)


def brought(url: str, leave_out: Sequence[str] = ("checkpoints",)) -> Path:
    """A copy in the cache, to be read, of a folder that was sent with a snapshot, or of one in it. leave_out: folders that stay there.
    AdapterError where there is none."""
    root, inner = folder_address(url).root, list[str]()
    for _ in range(UP):
        copy = Copy(root)
        if (found := copy.read()) is not None:
            break
        root, _, name = root.rpartition("/")
        inner.insert(0, name)
        if root.endswith(("/", ":")):
            found = None
            break
    prefix = "".join(f"{name}/" for name in inner)

    def wanted(snapshot: Snapshot | None) -> list[str]:
        paths = snapshot.files if snapshot else ()
        return [p for p in paths if p.startswith(prefix) and p.split("/")[0] not in leave_out]

    if not wanted(found):
        raise AdapterError(f"{url}: there is no run or adapter", fix="name what a run file's `out` names, or a folder in it")
    folder = below(cache_dir() / "copies", root)
    with _alone(folder):
        found = copy.read() or Snapshot()  # anew: another process may have brought a newer one meanwhile
        for path in sorted(folder.rglob("*"), reverse=True):  # of an earlier snapshot
            if path.is_file() and path.relative_to(folder).as_posix() not in found.files:
                path.unlink()
        copy.fetch(found, folder, wanted(found))
    return folder.joinpath(*inner)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While another process of this machine brings the same copy, wait for it. The lock is on a file beside the folder."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(folder.with_name(f".{folder.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise AdapterError(f"the cache {folder.parent} cannot be written: {error.strerror or error}", fix=ROOM) from error
    try:
        with suppress(OSError):  # a file system without locks: each file is written whole all the same
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
