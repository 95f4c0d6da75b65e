"""An OCI image layout on disk: `oci-layout`, `index.json`, `blobs/sha256/<hex>`. Knows bytes and digests, nothing of adapters or names.

    root/oci-layout            {"imageLayoutVersion": "1.0.0"}
    root/index.json            the names; replaced by rename, never written in place
    root/changes/<name>.json   names that have changed since, in a large store (`refs.py`); put there by rename
    root/blobs/sha256/<hex>    read-only files; put there by rename, never changed
    root/tmp/<uuid>            what is being written; whatever a killed writer has left there counts for nothing
    root/.lock                 the writers' lock; readers take none

Bytes are given out only after they hash to their digest. Nothing that is a symbolic link is followed, wherever in the layout it is.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from trimtab.atomic import take_name
from trimtab.errors import AdapterError
from trimtab.store.blobs import Blobs, Staging, read_whole
from trimtab.store.files import Refusal, parse_json
from trimtab.store.names import NoSuchAdapter

VERSION = {"imageLayoutVersion": "1.0.0"}
LOCK_SECONDS = 120.0
"""How long a writer waits for another; the longest anyone holds the lock is a garbage collection."""
PARTS = ("oci-layout", "index.json", "blobs", "changes", "tmp", ".lock")
FOLDERS = ("blobs", "blobs/sha256", "changes", "tmp")


class Mark(NamedTuple):
    """What tells one state of index.json from another without reading it: writers make the time grow with every state."""

    inode: int
    mtime_ns: int
    size: int

    @classmethod
    def of(cls, status: os.stat_result) -> Mark:
        return cls(status.st_ino, status.st_mtime_ns, status.st_size)


class Layout:
    """root: as the user names it; a link to the folder itself is the user's own and is followed once, here."""

    def __init__(self, root: Path, *, create: bool, first_index: bytes):
        self.root = Path(os.path.realpath(root))
        self.blobs = Blobs(self.root / "blobs" / "sha256", self.root / "tmp")
        self.tmp, self.index, self.changes = self.blobs.tmp, self.root / "index.json", self.root / "changes"
        self.lock = FileLock(self.root / ".lock", timeout=LOCK_SECONDS)
        if create:
            self._create(first_index)
        if not self.index.is_file() or not self.blobs.folder.is_dir():
            fix = "publish an adapter to it, which creates it, or name another with TRIMTAB_STORE or --store"
            raise NoSuchAdapter(f"there is no store in {root}", fix=fix)
        self._refuse_strange()

    def _create(self, first_index: bytes) -> None:
        with self.writing(f"cannot create a store in {self.root}"):
            self.root.mkdir(parents=True, exist_ok=True)
            self.check_parts()
            others = sorted(p.name for p in self.root.iterdir() if p.name not in PARTS) if not self.index.exists() else []
            if others:
                raise AdapterError(
                    f"{self.root} holds other things ({', '.join(others[:5])}), so no store is created there",
                    fix="name a new or empty folder",
                )
            for name in FOLDERS:
                if name != "changes":  # is there as long as a change waits
                    (self.root / name).mkdir(exist_ok=True)
            for path, data in ((self.root / "oci-layout", b'{"imageLayoutVersion":"1.0.0"}'), (self.index, first_index)):
                if not path.exists():
                    with self.locked(), self.blobs.staging() as stage:
                        if not path.exists():
                            take_name(stage.write([data]).path, path)

    def _refuse_strange(self) -> None:
        """Refuse a layout that another version wrote, or in which something is not what it must be."""
        try:
            document = parse_json(read_whole(self.root / "oci-layout", 4096, "oci-layout"), "oci-layout")
        except (Refusal, OSError) as error:
            raise AdapterError(f"{self.root} is no store that can be read: {error}", fix="name another store") from error
        if document != VERSION:
            raise AdapterError(f"{self.root}: oci-layout says {document}, not {VERSION}", fix="update trimtab, or name another store")
        self.check_parts()

    def check_parts(self) -> None:
        """AdapterError if a part of the layout is a link, or a file where a folder belongs."""
        problems = []
        for name in (*FOLDERS, "oci-layout", "index.json", ".lock"):
            try:
                mode = os.lstat(self.root / name).st_mode
            except FileNotFoundError:
                continue
            if stat.S_ISLNK(mode):
                problems.append(f"{name} is a symbolic link, which is not followed")
            elif stat.S_ISDIR(mode) != (name in FOLDERS):
                problems.append(f"{name} is not a {'folder' if name in FOLDERS else 'file'}")
        if problems:
            raise AdapterError(f"the store {self.root} is refused", problems=problems, fix="put the store's own files and folders back")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the writers' lock; a thread that holds it already goes on. AdapterError if another writer keeps it too long."""
        try:
            self.lock.acquire()
        except Timeout:
            fix = "wait for the other process, or end it: the lock goes with it"
            raise AdapterError(f"another process has held {self.root / '.lock'} for {LOCK_SECONDS:.0f} seconds", fix=fix) from None
        except OSError as error:
            fix = "let the store be written to, or name another"
            raise AdapterError(f"cannot lock {self.root / '.lock'}: {error.strerror or error}", fix=fix) from error
        try:
            yield
        finally:
            self.lock.release()

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Say what could not be done where the disk is full, read-only or failing."""
        try:
            yield
        except OSError as error:
            raise AdapterError(f"{what}: {error.strerror or error}", fix=f"make room in {self.root}, or let it be written to") from error

    # index.json

    def mark(self) -> Mark:
        """Nothing but zeros where there is no index any more."""
        try:
            return Mark.of(os.lstat(self.index))
        except FileNotFoundError:
            return Mark(0, 0, 0)

    def marks(self) -> tuple[Mark, int]:
        """As `mark`, of all that says which names there are."""
        try:
            return self.mark(), os.lstat(self.changes).st_mtime_ns
        except FileNotFoundError:
            return self.mark(), 0

    def write_index(self, data: Iterable[bytes], stage: Staging) -> None:
        """Commit: from here on, whatever happens, readers see this state or the one before. Call it under the lock."""
        time_ns = max(time.time_ns(), self.mark().mtime_ns + 1)
        take_name(stage.write(data, time_ns=time_ns).path, self.index)
