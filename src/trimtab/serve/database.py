"""The server's own database: what tenants, keys, usage and shared limits are kept in. Its tables, and what may be done with it.

It is one SQLite file (`sqlite.py`) that all processes of a machine share, or a PostgreSQL database (`postgres.py`) for several machines.
Statements are written once, in words that both know; values stand at question marks.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from trimtab.errors import TrimtabError
from trimtab.serve.tenant import Tenant

APPLICATION_ID = 0x54524954  # "TRIT": tells our database from any other program's
COUNTED = ("tenants", "keys")
"""Tables whose changes are counted in `generation`, by triggers. So a writing of usage makes nobody read all keys again."""
TABLES: tuple[tuple[str, ...], ...] = (
    (
        # A removed tenant's row stays, so that its usage keeps its owner; its name may be taken again, its id never.
        """CREATE TABLE tenants (
            id TEXT PRIMARY KEY,
            name TEXT NOT NULL,
            namespaces TEXT NOT NULL,
            max_concurrent INTEGER CHECK (max_concurrent > 0),
            tokens_per_minute INTEGER CHECK (tokens_per_minute > 0),
            weight REAL NOT NULL CHECK (weight > 0),
            admin INTEGER NOT NULL CHECK (admin IN (0, 1)),
            created REAL NOT NULL,
            removed REAL
        )""",
        "CREATE UNIQUE INDEX tenants_name ON tenants (name) WHERE removed IS NULL",
        """CREATE TABLE keys (
            id TEXT PRIMARY KEY,
            tenant TEXT NOT NULL REFERENCES tenants (id),
            secret_sha256 BLOB NOT NULL CHECK (length(secret_sha256) = 32),
            created REAL NOT NULL,
            lifetime REAL CHECK (lifetime > 0),
            expires REAL,
            revoked REAL
        )""",
        """CREATE TABLE usage (
            tenant TEXT NOT NULL REFERENCES tenants (id),
            day TEXT NOT NULL,
            adapter TEXT NOT NULL,
            requests INTEGER NOT NULL,
            prompt_tokens INTEGER NOT NULL,
            completion_tokens INTEGER NOT NULL,
            PRIMARY KEY (tenant, day, adapter)
        ) WITHOUT ROWID""",
        "CREATE TABLE generation (number INTEGER NOT NULL)",
        "INSERT INTO generation VALUES (1)",
    ),
    (
        # Servers that share the limits of tenants (leases.py). seen: seconds since 1970, by the database's clock.
        "CREATE TABLE replicas (id TEXT PRIMARY KEY, seen REAL NOT NULL)",
        # What a replica holds of a tenant's limits. slots: answers that may be under way there; running: those that are; tokens: that may
        # be used there.
        """CREATE TABLE leases (
            replica TEXT NOT NULL REFERENCES replicas (id) ON DELETE CASCADE,
            tenant TEXT NOT NULL,
            slots INTEGER NOT NULL,
            running INTEGER NOT NULL,
            tokens REAL NOT NULL,
            PRIMARY KEY (replica, tenant)
        ) WITHOUT ROWID""",
        # Tokens of a tenant that no replica holds, at the time `filled`.
        "CREATE TABLE buckets (tenant TEXT PRIMARY KEY, level REAL NOT NULL, filled REAL NOT NULL) WITHOUT ROWID",
    ),
)
"""What leads from version i to i + 1 of the schema, in SQLite's words, without the triggers. Only ever appended to."""

TENANT_COLUMNS = "t.id, t.name, t.namespaces, t.max_concurrent, t.tokens_per_minute, t.weight, t.admin"
URLS = ("postgresql://", "postgres://")
T = TypeVar("T")
H = TypeVar("H")


class DatabaseError(TrimtabError):
    """The database cannot be used: damaged, another program's, from a later version, not readable, not reached."""

    http_status = 503


class Cursor(Protocol):
    """What a statement gives."""

    @property
    def rowcount(self) -> int: ...
    def fetchone(self) -> Any: ...
    def fetchall(self) -> list[Any]: ...
    def __iter__(self) -> Iterator[Any]: ...


class Connection(Protocol):
    """Runs statements; a question mark stands for each value."""

    def execute(self, statement: str, values: Sequence[Any] = ..., /) -> Cursor: ...


class Watch(ABC, Generic[T]):
    """Something that is read from tenants and keys, and read again when these have changed."""

    @abstractmethod
    def value(self) -> T:
        """As of now. Microseconds: it may be asked on an event loop. DatabaseError where it is not known."""

    @abstractmethod
    def refresh(self) -> None:
        """What this process has just written is in `value` from now on."""

    @abstractmethod
    def close(self) -> None: ...


class Database(ABC, Generic[H]):
    """All connections of a process to one database. Any number of threads."""

    now: ClassVar[str]
    """A statement that gives the seconds since 1970 by a clock that all who share the database see."""

    @abstractmethod
    def handle(self, *, durable: bool = True) -> H:
        """A connection more, to be given back with `close`. durable: what it has written survives a power cut."""

    @abstractmethod
    def reading(self, handle: H) -> AbstractContextManager[Connection]:
        """Its connection, for one thread at a time."""

    @abstractmethod
    def writing(self, handle: H) -> AbstractContextManager[Connection]:
        """Its connection, in a transaction: all of the block's changes, or none. There is one writer at a time among all processes."""

    @abstractmethod
    def watch(self, read: Callable[[Connection], T]) -> Watch[T]: ...

    @abstractmethod
    def close(self, handle: H) -> None: ...

    def follow(self) -> None:
        """Notice that the database was replaced by another one."""


def default_path() -> Path:
    """${XDG_DATA_HOME:-~/.local/share}/trimtab/tenants.db"""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "trimtab" / "tenants.db"


def is_url(where: str | Path) -> bool:
    """Whether this names a PostgreSQL database; everything else is the path of a file."""
    return str(where).startswith(URLS)


def tenant_of(row: Sequence[Any]) -> Tenant:
    """A row of TENANT_COLUMNS as a tenant."""
    tenant_id, name, namespaces, max_concurrent, tokens_per_minute, weight, admin = row
    return Tenant(tenant_id, name, tuple(json.loads(namespaces)), max_concurrent, tokens_per_minute, weight, bool(admin))
