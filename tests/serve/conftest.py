"""Fixtures of serving."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.laws.common import one_thread
from tests.serve.databases import KINDS, Postgres, postgres

__all__ = ["one_thread"]


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    with postgres() as server:
        yield server


@pytest.fixture(params=KINDS)
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str | Path:
    """Where a database for tenants may be made: a path, and the URL of an empty PostgreSQL database."""
    if request.param == "sqlite":
        return tmp_path / "t.db"
    server: Postgres = request.getfixturevalue("postgres_server")
    return server.database()
