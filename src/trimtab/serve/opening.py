"""Which of the databases a place names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.serve.database import Database, is_url


def open_database(where: str | Path, *, create: bool = False) -> Database[Any]:
    """The database at a path or a URL (postgresql://…). create: make it where there is none.

    DatabaseError if there is none, or one that is not ours to use, or that cannot be reached.
    """
    if is_url(where):
        from trimtab.serve.postgres import PostgresDatabase

        return PostgresDatabase(str(where), create=create)
    from trimtab.serve.sqlite import SqliteDatabase

    return SqliteDatabase(where, create=create)
