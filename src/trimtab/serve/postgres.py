"""The server's own database in PostgreSQL, for servers on several machines. All of it is in a schema named trimtab.

Writers take one advisory lock, so they come one after the other, as with SQLite. Keys are not asked for at each request: a thread listens
for changes (LISTEN), and asks every POLL_SECONDS as well. If it has heard nothing for STALE_SECONDS, no key is accepted. So a revoked key
ends within milliseconds, and within STALE_SECONDS on a server that is cut off from the database.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

from trimtab.errors import ConfigError
from trimtab.serve.database import APPLICATION_ID, COUNTED, TABLES, Connection, Cursor, Database, DatabaseError, Watch

try:
    import psycopg
    from psycopg.conninfo import conninfo_to_dict
except ImportError:
    raise ConfigError("a tenants database by URL needs psycopg", fix="pip install 'trimtab[postgres]'") from None

log = logging.getLogger(__name__)
SCHEMA = CHANNEL = "trimtab"
POLL_SECONDS, STALE_SECONDS = 0.5, 10.0
CONNECT_SECONDS, LOCK_SECONDS, SILENT_SECONDS = 5, 10, 5
"""How long is waited for a connection, for other writers, and for an answer on a connection that is silent."""
WORDS = {"REAL": "DOUBLE PRECISION", "BLOB": "BYTEA", "INTEGER": "BIGINT", " WITHOUT ROWID": ""}
"""SQLite's words that PostgreSQL has others for."""
T = TypeVar("T")


def _spelt(statement: str) -> str:
    return re.sub(r"\b(REAL|BLOB|INTEGER)\b| WITHOUT ROWID", lambda m: WORDS[m[0]], statement)


TRIGGERS = (
    f"""CREATE FUNCTION changed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        UPDATE {SCHEMA}.generation SET number = number + 1; PERFORM pg_notify('{CHANNEL}', ''); RETURN NULL; END $$""",
    *(
        f"CREATE TRIGGER {table}_changed AFTER INSERT OR UPDATE OR DELETE ON {table} FOR EACH STATEMENT EXECUTE FUNCTION changed()"
        for table in COUNTED
    ),
)
MIGRATIONS = tuple((*map(_spelt, tables), *(() if i else TRIGGERS)) for i, tables in enumerate(TABLES))


class _Asking:
    """A connection that takes statements with question marks."""

    def __init__(self, connection: psycopg.Connection[Any]):
        self.raw = connection

    def execute(self, statement: str, values: Sequence[Any] = (), /) -> Cursor:
        return cast(Cursor, self.raw.execute(statement.replace("?", "%s").encode(), values or None))


@dataclass(eq=False)
class Handle:
    """One connection, made again where it broke."""

    connection: psycopg.Connection[Any]
    lock: threading.Lock = field(default_factory=threading.Lock)


class PostgresDatabase(Database[Handle]):
    """All connections of a process to the database at a URL, as libpq has them: postgresql://user@host:port/name. A password may come from
    the environment (PGPASSWORD) or a file (PGPASSFILE)."""

    now = "SELECT extract(epoch FROM clock_timestamp())::float8"

    def __init__(self, url: str, *, create: bool = False):
        """DatabaseError if it cannot be reached, or has no schema of ours (unless create), or a later one."""
        try:
            told = conninfo_to_dict(url)
        except psycopg.Error as error:
            raise ConfigError(
                f"the tenants database's URL cannot be read: {_first(error)}", fix="give postgresql://user@host/name"
            ) from None
        self.url, self.name = url, f"{told.get('dbname', '')} at {told.get('host', 'this machine')}"
        with self._explained():
            connection = self._connect()
            try:
                self._migrate(connection, create)
            finally:
                connection.close()

    def handle(self, *, durable: bool = True) -> Handle:
        with self._explained():
            made = Handle(self._connect())
            made.connection.execute(f"SET synchronous_commit = {'on' if durable else 'off'}")
            return made

    @contextmanager
    def reading(self, handle: Handle) -> Iterator[Connection]:
        with handle.lock, self._explained(), self._begun(handle, "BEGIN") as connection:
            yield connection

    @contextmanager
    def writing(self, handle: Handle) -> Iterator[Connection]:
        begin = f"BEGIN; SELECT pg_advisory_xact_lock({APPLICATION_ID})"
        with handle.lock, self._explained(), self._begun(handle, begin) as connection:
            yield connection

    def watch(self, read: Callable[[Connection], T]) -> Watch[T]:
        return PostgresWatch(self, read)

    def close(self, handle: Handle) -> None:
        with handle.lock:
            handle.connection.close()

    def _connect(self) -> psycopg.Connection[Any]:
        connection = psycopg.connect(
            self.url,
            autocommit=True,
            connect_timeout=CONNECT_SECONDS,
            tcp_user_timeout=SILENT_SECONDS * 1000,
            keepalives_idle=SILENT_SECONDS,
            prepare_threshold=None,  # a transaction begins with two statements together, which cannot be prepared
        )
        connection.execute(f"SET search_path = {SCHEMA}; SET lock_timeout = '{LOCK_SECONDS}s'")
        return connection

    @contextmanager
    def _begun(self, handle: Handle, begin: str) -> Iterator[Connection]:
        """A transaction. A connection that broke since its last one (the database was restarted) is made again."""
        try:
            handle.connection.execute(begin.encode())
        except psycopg.OperationalError:
            if not handle.connection.closed:  # it works: somebody else holds the lock
                handle.connection.execute("ROLLBACK")
                raise
            handle.connection = self._connect()
            handle.connection.execute(begin.encode())
        try:
            yield _Asking(handle.connection)
            handle.connection.execute("COMMIT")
        except BaseException:
            with suppress(psycopg.Error):
                handle.connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """PostgreSQL's errors as ours, without the password."""
        try:
            yield
        except psycopg.Error as error:
            fix = "see that it runs, that this machine reaches it, and that the user may create the schema trimtab in it"
            raise DatabaseError(f"the tenants database {self.name} cannot be used: {_first(error)}", fix=fix) from error

    def _migrate(self, connection: psycopg.Connection[Any], create: bool) -> None:
        with connection.transaction():
            connection.execute(f"SELECT pg_advisory_xact_lock({APPLICATION_ID})")
            found = connection.execute("SELECT to_regclass('trimtab.version') IS NOT NULL").fetchone()
            if not found or not found[0]:
                if not create:
                    raise DatabaseError(
                        f"no tenants database at {self.name}", fix="make one: trimtab tenants add NAME --db URL, with the same URL"
                    )
                there = connection.execute("SELECT to_regnamespace(%s) IS NOT NULL", (SCHEMA,)).fetchone()
                if not there or not there[0]:  # an administrator may have made it for a user who may not
                    connection.execute(f"CREATE SCHEMA {SCHEMA}")
                connection.execute("CREATE TABLE version (number BIGINT NOT NULL)")
                connection.execute("INSERT INTO version VALUES (0)")
            row = connection.execute("SELECT number FROM version").fetchone()
            version = row[0] if row else 0
            if version > len(MIGRATIONS):
                text = f"the tenants database {self.name} has schema version {version}; this trimtab knows up to {len(MIGRATIONS)}"
                raise DatabaseError(text, fix="use the trimtab that wrote it")
            for statement in (s for statements in MIGRATIONS[version:] for s in statements):
                connection.execute(statement.encode())
            if version < len(MIGRATIONS):
                connection.execute("UPDATE version SET number = %s", (len(MIGRATIONS),))


class PostgresWatch(Watch[T], Generic[T]):
    """Kept in memory, by a thread that listens."""

    def __init__(self, database: PostgresDatabase, read: Callable[[Connection], T]):
        self._database, self._read, self._stop = database, read, threading.Event()
        self._handle, self._refreshing = database.handle(), database.handle()
        self._lock = threading.Lock()
        self._generation, self._heard = -1, 0.0
        self._value: T | None = None
        self._handle.connection.execute(f"LISTEN {CHANNEL}")
        self._look(self._handle)
        self._thread = threading.Thread(target=self._listen, name="trimtab-keys", daemon=True)
        self._thread.start()

    def value(self) -> T:
        if time.monotonic() - self._heard > STALE_SECONDS or self._value is None:
            raise DatabaseError(f"nothing was heard of the tenants database {self._database.name} for {STALE_SECONDS:g} s")
        return self._value

    def refresh(self) -> None:
        self._look(self._refreshing)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for handle in (self._handle, self._refreshing):
            self._database.close(handle)

    def _look(self, handle: Handle) -> None:
        with self._lock:  # the later look wins
            asked = time.monotonic()
            with self._database.reading(handle) as db:
                (generation,) = db.execute("SELECT number FROM generation").fetchone()
                if generation != self._generation:
                    self._value, self._generation = self._read(db), generation
            self._heard = asked

    def _listen(self) -> None:
        failing = False
        while not self._stop.is_set():
            before = self._handle.connection
            try:
                for _ in before.notifies(timeout=POLL_SECONDS, stop_after=1):
                    pass
                self._look(self._handle)
                if self._handle.connection is not before:
                    self._handle.connection.execute(f"LISTEN {CHANNEL}")
                failing = False
            except (DatabaseError, psycopg.Error) as error:
                if not failing:  # once, not twice a second of an outage
                    log.error("changes of keys cannot be heard: %s", _first(error))
                failing = True
                before.close()  # the next look makes another one
                with suppress(DatabaseError):
                    self._look(self._handle)
                    self._handle.connection.execute(f"LISTEN {CHANNEL}")
                self._stop.wait(POLL_SECONDS)


def _first(error: Exception) -> str:
    """The first line of what PostgreSQL says."""
    return str(error).strip().partition("\n")[0]
