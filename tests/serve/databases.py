"""Databases for tenants in tests: a SQLite file, and a PostgreSQL server that the tests start for themselves."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

KINDS = ("sqlite", "postgres")
PORT = 54321


@cache
def programs() -> Path | None:
    """The folder of initdb and postgres, as Debian has them or on the PATH."""
    folders = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    if found := shutil.which("initdb"):
        folders.append(Path(found).parent)
    return next((f for f in folders if (f / "initdb").exists() and (f / "postgres").exists()), None)


def missing() -> str:
    """Why there is no PostgreSQL here, "" where there is."""
    if find_spec("psycopg") is None:
        return "psycopg is not installed"
    return "" if programs() else "PostgreSQL is not installed (apt-get install postgresql)"


class Postgres:
    """A server on a socket in a folder of its own, and on port PORT of the given addresses, which anybody may enter. As root it runs as
    nobody else's user: PostgreSQL refuses root."""

    def __init__(self, addresses: Sequence[str] = ()) -> None:
        self._addresses = addresses
        self.folder = Path(tempfile.mkdtemp(prefix="trimtab-pg-"))
        self._user = next((u for u in ("postgres", "nobody") if os.getuid() == 0 and _exists(u)), "")
        if self._user:
            shutil.chown(self.folder, self._user)
        made = self._command("initdb", "-D", self.data, "-U", "trimtab", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")
        subprocess.run(made, check=True, stdin=subprocess.DEVNULL, capture_output=True, cwd=self.folder, timeout=120)
        with Path(self.data, "pg_hba.conf").open("a") as rules:
            rules.writelines(f"host all all {address}/30 trust\n" for address in addresses)
        self.start()
        self._made = 0

    @property
    def data(self) -> str:
        return str(self.folder / "data")

    def start(self) -> None:
        import psycopg

        options = (
            f"listen_addresses={','.join(self._addresses)}",
            f"port={PORT}",
            f"unix_socket_directories={self.folder}",
            "fsync=off",
            "max_connections=80",
        )
        command = self._command("postgres", "-D", self.data, *(x for o in options for x in ("-c", o)))
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder)
        end = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self._url("postgres")).close()
                return
            except psycopg.OperationalError:
                assert time.monotonic() < end and self.process.poll() is None, (self.folder / "log").read_text()
                time.sleep(0.05)

    def stop(self) -> None:
        """Every connection is cut."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)

    def end(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def database(self) -> str:
        """The URL of a new, empty one."""
        import psycopg

        self._made += 1
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE t{self._made}".encode())
        return self._url(f"t{self._made}")

    def _url(self, name: str) -> str:
        return f"postgresql://trimtab@/{name}?host={self.folder}&port={PORT}"

    def _command(self, program: str, *arguments: str) -> list[str]:
        folder = programs()
        assert folder is not None
        as_user = ["setpriv", f"--reuid={self._user}", f"--regid={self._user}", "--clear-groups"] if self._user else []
        return [*as_user, str(folder / program), *arguments]


@contextmanager
def postgres(addresses: Sequence[str] = ()) -> Iterator[Postgres]:
    """A server for a while; the test is skipped, with the reason, where there is none."""
    if why := missing():
        pytest.skip(why)
    server = Postgres(addresses)
    try:
        yield server
    finally:
        server.end()


def _exists(user: str) -> bool:
    import pwd

    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True
