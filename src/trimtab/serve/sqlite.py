"""The server's own database as one SQLite file in WAL mode, opened safely, its schema brought up to date.

A file that is not ours, is damaged, or was made by a later trimtab is refused and never written. A file that was replaced (a backup that
was moved to its place) is opened anew at the next use; while there is none that can be read, every use is refused.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from trimtab.serve.database import APPLICATION_ID, COUNTED, TABLES, Connection, Database, DatabaseError, Watch

T = TypeVar("T")

BUSY_SECONDS = 10.0
FOLLOW_SECONDS = 0.1
"""How long a new file at the path is waited for that somebody holds: everybody waits meanwhile, the server's event loop among them."""
SIDE_FILES = ("-wal", "-shm")

TRIGGERS = tuple(
    f"CREATE TRIGGER {table}_{verb.lower()} AFTER {verb} ON {table} BEGIN UPDATE generation SET number = number + 1; END"
    for table in COUNTED
    for verb in ("INSERT", "UPDATE", "DELETE")
)
MIGRATIONS: tuple[tuple[str, ...], ...] = ((*TABLES[0], *TRIGGERS), *TABLES[1:])
"""Statements that lead from version i to i + 1 of the schema. Only ever appended to."""


@dataclass(eq=False)
class Handle:
    """One connection of a `SqliteDatabase`. opened: how often it was made, so that its user sees that the file is another one."""

    connection: sqlite3.Connection
    lock: threading.Lock = field(default_factory=threading.Lock)
    opened: int = 1


class SqliteDatabase(Database[Handle]):
    """All connections of a process to the file at a path. Any number of threads."""

    now = "SELECT (julianday('now') - 2440587.5) * 86400.0"

    def __init__(self, path: str | Path, *, create: bool = False):
        """DatabaseError if there is no file (unless create), or one that is not ours to use."""
        self.path = Path(path)
        connect(self.path, create=create).close()
        self._handles: list[Handle] = []
        self._lock = threading.Lock()
        self._identity: tuple[int, int] | None = self._there()
        self._side_files: set[int] = set()  # inode numbers

    def handle(self, *, durable: bool = True) -> Handle:
        with self._lock:
            self._handles.append(made := Handle(connect(self.path)))
            if not durable:  # in WAL mode: written, but not waited for
                made.connection.execute("PRAGMA synchronous = NORMAL")
            self._side_files |= self._numbers()
            return made

    @contextmanager
    def reading(self, handle: Handle) -> Iterator[sqlite3.Connection]:
        """The connection, to the file that is at the path now."""
        self.follow()
        with handle.lock, explained(self.path):
            yield handle.connection

    @contextmanager
    def writing(self, handle: Handle) -> Iterator[sqlite3.Connection]:
        """Waits up to BUSY_SECONDS for other writers."""
        with self.reading(handle) as connection, transaction(connection):
            yield connection

    def watch(self, read: Callable[[Connection], T]) -> Watch[T]:
        return SqliteWatch(self, read)

    def close(self, handle: Handle) -> None:
        with self._lock, handle.lock:
            self._handles.remove(handle)
            handle.connection.close()

    def _there(self) -> tuple[int, int]:
        try:
            found = os.stat(self.path)
        except OSError as error:
            fix = "put it back, or start the server anew with another one"
            raise DatabaseError(f"the tenants database {self.path} is gone: {error.strerror}", fix=fix) from error
        return found.st_dev, found.st_ino

    def _numbers(self) -> set[int]:
        return {os.stat(f).st_ino for f in map(self._side_file, SIDE_FILES) if f.exists()}

    def _side_file(self, end: str) -> Path:
        return self.path.with_name(self.path.name + end)

    def _drop_side_files(self) -> None:
        """Those that were there while ours were open; others came with the new file."""
        for file in map(self._side_file, SIDE_FILES):
            with suppress(FileNotFoundError):
                if file.stat().st_ino in self._side_files:
                    file.unlink()

    def follow(self) -> None:
        """Open the file anew if it is another one; DatabaseError if that fails.

        The old file's side files (-wal, -shm) still lie at the path, and SQLite would read the new file through them: what they hold is
        written into the old file first, then they go.
        """
        if self._there() == self._identity:
            return
        with self._lock, ExitStack() as locks:
            if (identity := self._there()) == self._identity:
                return
            for handle in self._handles:
                locks.enter_context(handle.lock)
                with suppress(sqlite3.Error):
                    handle.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                handle.connection.close()
            self._drop_side_files()
            patience = 0.0 if self._identity is None else FOLLOW_SECONDS  # once; then each use only looks
            self._identity = None  # nobody gets in before all of them are open
            for handle in self._handles:
                handle.connection = connect(self.path, busy_seconds=patience)
                handle.opened += 1
            for handle in self._handles:
                handle.connection.execute(f"PRAGMA busy_timeout = {round(BUSY_SECONDS * 1000)}")
            self._side_files = self._numbers()
            self._identity = identity  # where it was replaced again meanwhile, the next use sees that


class SqliteWatch(Watch[T], Generic[T]):
    """Asks the file at each use: SQLite's `data_version`, which is in shared memory, tells whether anybody has written, and then the
    generation whether that was to tenants or keys."""

    def __init__(self, database: SqliteDatabase, read: Callable[[Connection], T]):
        self._database, self._read = database, read
        self._handle = database.handle()  # of its own: data_version shows only what other connections have changed
        self._opened, self._data_version, self._generation = 0, -1, -1
        self._value: T | None = None

    def value(self) -> T:
        with self._database.reading(self._handle) as db:
            if self._handle.opened != self._opened:  # the numbers of another file say nothing
                self._opened, self._data_version, self._generation = self._handle.opened, -1, -1
            data_version = db.execute("PRAGMA data_version").fetchone()[0]
            if data_version != self._data_version:  # usage is written often; only the generation says that keys have changed
                generation = db.execute("SELECT number FROM generation").fetchone()[0]
                if generation != self._generation:
                    self._value = self._read(db)
                self._data_version, self._generation = data_version, generation
            assert self._value is not None
            return self._value

    def refresh(self) -> None:
        """Each use sees what is in the file."""

    def close(self) -> None:
        self._database.close(self._handle)


def connect(path: Path, *, create: bool = False, busy_seconds: float = BUSY_SECONDS) -> sqlite3.Connection:
    """An open connection, for any thread but one at a time, the schema up to date. create: make the file (mode 0600) where there is none.
    busy_seconds: how long it waits for others, now and later.

    DatabaseError if there is no file, or one that is not ours to use.
    """
    if create:
        _create_file(path)
    elif not path.is_file():
        raise DatabaseError(f"no tenants database at {path}", fix="make one: trimtab tenants add NAME --db " + str(path))
    with explained(path):
        connection = sqlite3.connect(path, timeout=busy_seconds, isolation_level=None, check_same_thread=False)
        try:
            _check_owner(connection, path)
            _write_ahead(connection, busy_seconds)
            connection.execute("PRAGMA synchronous = FULL")  # a revocation must survive a power cut
            connection.execute("PRAGMA foreign_keys = ON")
            _migrate(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """All of the block's changes, or none. Waits up to BUSY_SECONDS for other writers."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # a full disk may have ended it already
            connection.execute("ROLLBACK")
        raise


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """SQLite's errors as ours, with the file's name."""
    try:
        yield
    except sqlite3.OperationalError as error:
        fix = "look at the disk and at who else holds the file; it was not changed"
        raise DatabaseError(f"the tenants database {path} cannot be used: {error}", fix=fix) from error
    except sqlite3.DatabaseError as error:
        fix = "restore it from a backup, or move it away and make a new one; it was not changed"
        raise DatabaseError(f"{path} is damaged, or no tenants database: {error}", fix=fix) from error


def _create_file(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))  # SQLite gives its side files the same mode
    except FileExistsError:
        if not path.is_file():
            raise DatabaseError(f"{path} is no file", fix="give --db the name of a file") from None
    except OSError as error:
        raise DatabaseError(f"cannot make {path}: {error.strerror}", fix="give --db a file in a folder that can be written") from error


def _check_owner(connection: sqlite3.Connection, path: Path) -> None:
    """Before anything is written: is this file empty, or ours? One transaction: another process may be making it just now."""
    connection.execute("BEGIN")
    owner = connection.execute("PRAGMA application_id").fetchone()[0]
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    connection.execute("COMMIT")
    if owner == APPLICATION_ID or (not owner and not tables):
        return
    raise DatabaseError(f"{path} is another program's database", fix="give --db another file")


def _write_ahead(connection: sqlite3.Connection, busy_seconds: float) -> None:
    """Change the file to WAL mode, if it is not. SQLite reads the mode first and then asks for the writer's lock, without the waiting that
    `timeout` promises: while another process makes the change it is refused at once."""
    until = time.monotonic() + busy_seconds
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL").fetchone()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= until:
                raise
            time.sleep(0.01)


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    def version() -> int:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])

    if version() == len(MIGRATIONS):
        return
    with transaction(connection):
        found = version()  # again: another process may have been faster
        if found > len(MIGRATIONS):
            raise DatabaseError(
                f"{path} has schema version {found}; this trimtab knows up to {len(MIGRATIONS)}", fix="use the trimtab that wrote it"
            )
        for statements in MIGRATIONS[found:]:
            for statement in statements:
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
