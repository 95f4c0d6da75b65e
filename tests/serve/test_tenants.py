"""Tenants and their usage in a database that several processes share, and database files that are not to be used."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.serve.databases import postgres
from trimtab.errors import AuthError, ConfigError, NotFoundError
from trimtab.serve import sqlite
from trimtab.serve.database import DatabaseError
from trimtab.serve.opening import open_database
from trimtab.serve.sqlite import connect
from trimtab.serve.tenants import LOCAL, Forbidden, Tenant, Tenants, default_path
from trimtab.serve.usage import UsageBook, UsageRow


@pytest.fixture
def tenants(where: str | Path):
    with Tenants(where, create=True) as found:
        yield found


def test_what_is_added_is_found_and_listed(tenants: Tenants) -> None:
    acme = tenants.add("acme")
    legal = tenants.add("legal", namespaces=["acme", "law"], max_concurrent=None, tokens_per_minute=500, weight=2.5, admin=True)
    assert acme == Tenant("acme", "acme", ("acme",), 32, None, 1.0, False)
    assert legal == Tenant("legal", "legal", ("acme", "law"), None, 500, 2.5, True)
    assert tenants.list() == (acme, legal) and tenants.get("legal") == legal
    changed = tenants.update(replace(legal, weight=1.0))
    assert tenants.get("legal") == changed and changed.weight == 1.0
    assert tenants.remove("acme") == acme and tenants.list() == (changed,)


def test_only_an_admin_may(tenants: Tenants) -> None:
    with pytest.raises(Forbidden) as caught:
        tenants.add("acme").require_admin()
    assert caught.value.http_status == 403 and isinstance(caught.value, AuthError)
    tenants.add("root", admin=True).require_admin()
    LOCAL.require_admin()


def test_namespaces_are_seen_by_name_and_all_by_the_local_tenant_alone(tenants: Tenants) -> None:
    acme = tenants.add("acme", namespaces=["acme", "shared"])
    assert acme.sees("shared") and not acme.sees("acm") and not acme.sees("*") and LOCAL.sees("anything")
    with pytest.raises(ConfigError, match=r"namespace '\*'"):
        tenants.add("everyone", namespaces=["*"])


@pytest.mark.parametrize(
    "name", ["", "Acme", "../x", "a/b", ".a", "-a", "a" * 64, "a b", "a\n", "acme~2", "*", "ä", "a\0", "'; DROP TABLE tenants; --"]
)
def test_hostile_names_are_refused(tenants: Tenants, name: str) -> None:
    with pytest.raises(ConfigError, match="must start with a-z"):
        tenants.add(name)
    with pytest.raises(ConfigError, match="must start with a-z"):
        tenants.add("acme", namespaces=["fine", name])
    with pytest.raises(NotFoundError):
        tenants.get(name)
    assert tenants.list() == ()


def test_all_that_is_wrong_is_said_at_once(tenants: Tenants) -> None:
    with pytest.raises(ConfigError) as caught:
        tenants.add("A", namespaces=["x", "x"], max_concurrent=0, tokens_per_minute=-5, weight=float("nan"))
    assert [p.split()[0] for p in caught.value.problems] == ["name", "namespace", "max_concurrent", "tokens_per_minute", "weight"]


def test_a_taken_name_and_an_unknown_one(tenants: Tenants) -> None:
    acme = tenants.add("acme")
    with pytest.raises(ConfigError, match="already"):
        tenants.add("acme")
    for ask in (tenants.get, tenants.remove, tenants.create_key, tenants.keys):
        with pytest.raises(NotFoundError, match="did you mean 'acme'"):
            ask("acmee")
    tenants.remove("acme")
    tenants.add("acme")
    with pytest.raises(NotFoundError, match="removed and added again"):
        tenants.update(acme)


def test_the_default_path_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_path() == tmp_path / "trimtab" / "tenants.db"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert default_path() == Path.home() / ".local/share/trimtab/tenants.db"


# ---- usage ----


def test_usage_adds_up_per_tenant_day_and_adapter(tenants: Tenants) -> None:
    tenants.add("acme")
    tenants.add("law")
    now = [0.0]
    tenants.usage.clock = lambda: now[0]
    for _ in range(3):
        tenants.usage.add("acme", "sha256:a", 10, 1)
    tenants.usage.add("acme", "", 5, 2)
    now[0] = 86400.0
    tenants.usage.add("acme", "sha256:a", 1, 1)
    tenants.usage.add("law", "", 7, 7, requests=2)
    whole = [
        UsageRow("acme", "1970-01-01", "", 1, 5, 2),
        UsageRow("acme", "1970-01-01", "sha256:a", 3, 30, 3),
        UsageRow("acme", "1970-01-02", "sha256:a", 1, 1, 1),
        UsageRow("law", "1970-01-02", "", 2, 7, 7),
    ]
    assert tenants.usage.report() == whole
    assert tenants.usage.report("law") == whole[3:]
    assert tenants.usage.report(since="1970-01-02") == whole[2:] and tenants.usage.report(until="1970-01-01") == whole[:2]
    tenants.remove("acme")
    tenants.add("acme")
    assert tenants.usage.report() == whole, "what was used stays, and is not another tenant's of the same name"


def test_usage_of_an_unknown_tenant_holds_up_nobody(tenants: Tenants, caplog: pytest.LogCaptureFixture) -> None:
    tenants.add("acme")
    tenants.usage.add("ghost", "", 1, 1)
    tenants.usage.add("acme", "", 2, 2)
    assert [r.tenant for r in tenants.usage.report()] == ["acme"]
    assert "unknown tenant" in caplog.text


def test_usage_is_written_without_being_asked(tmp_path: Path) -> None:
    with Tenants(tmp_path / "t.db", create=True) as tenants:
        tenants.add("acme")
    book = UsageBook(open_database(tmp_path / "t.db"), flush_seconds=0.02)
    book.add("acme", "", 3, 4)
    looking = sqlite3.connect(tmp_path / "t.db")
    for _ in range(500):
        if found := looking.execute("SELECT prompt_tokens FROM usage").fetchall():
            break
        threading.Event().wait(0.01)
    assert found == [(3,)]
    book.close()


def test_a_failed_writing_loses_and_doubles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Tenants(tmp_path / "t.db", create=True) as tenants:
        tenants.add("acme")
        tenants.usage._handle.connection.execute("PRAGMA busy_timeout = 10")
        other = sqlite3.connect(tmp_path / "t.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        tenants.usage.add("acme", "", 1, 1)
        for _ in range(2):
            with pytest.raises(DatabaseError, match="locked"):
                tenants.usage.flush()
        tenants.usage.add("acme", "", 10, 10)
        other.execute("ROLLBACK")
        assert tenants.usage.report() == [UsageRow("acme", tenants.usage.report()[0].day, "", 2, 11, 11)]


def test_a_thread_that_cannot_write_says_it_once_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Tenants(tmp_path / "t.db", create=True) as tenants:
        tenants.add("acme")
    book = UsageBook(open_database(tmp_path / "t.db"), flush_seconds=0.01)
    book._handle.connection.execute("PRAGMA busy_timeout = 1")
    other = sqlite3.connect(tmp_path / "t.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    book.add("acme", "", 1, 1)
    for _ in range(500):
        if book.problem:
            break
        threading.Event().wait(0.01)
    threading.Event().wait(0.1)
    assert "locked" in book.problem
    other.execute("ROLLBACK")
    for _ in range(500):
        if not book.problem:
            break
        threading.Event().wait(0.01)
    assert book.problem == "" and [r.prompt_tokens for r in book.report()] == [1]
    assert sum("kept in memory" in r.getMessage() for r in caplog.records) == 1
    book.close()


WRITER = """
import sys
from trimtab.serve.opening import open_database
from trimtab.serve.usage import UsageBook
book = UsageBook(open_database(sys.argv[1]), flush_seconds=0.001)
print("ready", flush=True)
sys.stdin.readline()
for i in range(400):
    book.add("acme", f"sha256:{i % 3}", 2, 1)
    if i % 20 == 0:
        book.flush()
book.close()
"""


def test_two_processes_write_usage_at_once(where: str | Path) -> None:
    with Tenants(where, create=True) as tenants:
        tenants.add("acme")
        command = [sys.executable, "-c", WRITER, str(where)]
        writers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        for w in writers:
            assert w.stdout is not None and w.stdin is not None and w.stdout.readline() == "ready\n"
        for w in writers:
            w.stdin.write("\n")  # type: ignore[union-attr]
            w.stdin.flush()  # type: ignore[union-attr]
        for w in writers:
            w.communicate(timeout=60)
            assert w.returncode == 0
        rows = tenants.usage.report()
        assert sum(r.requests for r in rows) == 800 and sum(r.prompt_tokens for r in rows) == 1600


SERVER = """
import signal, sys, threading
from trimtab.serve.tenants import Tenants
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *a: stop.set())
with Tenants(sys.argv[1]) as tenants:
    tenants.usage.flush_seconds = 3600
    for _ in range(100):
        tenants.usage.add("acme", "", 1, 2)
    print("ready", flush=True)
    stop.wait()
"""


def test_a_terminated_server_loses_no_usage(where: str | Path) -> None:
    with Tenants(where, create=True) as tenants:
        tenants.add("acme")
        server = subprocess.Popen([sys.executable, "-c", SERVER, str(where)], stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None and server.stdout.readline() == "ready\n"
        assert tenants.usage.report() == []
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) == 0
        server.stdout.close()
        assert [(r.requests, r.completion_tokens) for r in tenants.usage.report()] == [(100, 200)]


# ---- the file ----


def test_the_files_are_their_owners_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with Tenants(tmp_path / "new" / "t.db", create=True) as tenants:
            tenants.add("acme")
            modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "new").iterdir()}
    finally:
        os.umask(old)
    assert set(modes.values()) == {0o600} and "t.db" in modes and "t.db-wal" in modes
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_without_a_file_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match="trimtab tenants add"):
        Tenants(tmp_path / "t.db")
    with pytest.raises(DatabaseError, match="is no file"):
        Tenants(tmp_path, create=True)
    assert list(tmp_path.iterdir()) == []


def other_program(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE notes (x)")
    db.close()


def later_version(path: Path) -> None:
    connect(path, create=True).close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {len(sqlite.MIGRATIONS) + 1}")
    db.close()


def torn(path: Path) -> None:
    connect(path, create=True).close()
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 3])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_text("hello, I am a text " * 100), "not a database"),
        (lambda path: path.write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 20), "cannot be used|damaged"),
        (other_program, "another program's"),
        (later_version, "use the trimtab that wrote it"),
        (torn, "malformed|damaged|disk"),
    ],
)
@pytest.mark.parametrize("create", [False, True])
def test_a_file_that_is_not_to_be_used_is_refused_and_left_as_it_is(tmp_path: Path, make, words: str, create: bool) -> None:
    path = tmp_path / "t.db"
    make(path)
    before = path.read_bytes()
    with pytest.raises(DatabaseError, match=words) as caught:
        Tenants(path, create=create)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


def test_a_failed_migration_leaves_the_old_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.db"
    with Tenants(path, create=True) as tenants:
        tenants.add("acme")
    monkeypatch.setattr(sqlite, "MIGRATIONS", (*sqlite.MIGRATIONS, ("ALTER TABLE tenants ADD COLUMN note TEXT", "SELECT no_such()")))
    with pytest.raises(DatabaseError, match="no_such"):
        Tenants(path)
    monkeypatch.setattr(sqlite, "MIGRATIONS", (*sqlite.MIGRATIONS[:-1], ("ALTER TABLE tenants ADD COLUMN note TEXT",)))
    with Tenants(path) as tenants:
        assert tenants.get("acme").name == "acme"
    assert sqlite3.connect(path).execute("PRAGMA user_version").fetchone() == (len(sqlite.MIGRATIONS),)
    assert sqlite3.connect(path).execute("SELECT note FROM tenants").fetchone() == (None,)


def test_two_processes_make_the_database_at_once(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def make() -> None:
        try:
            connect(tmp_path / "t.db", create=True).close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert failures == []


def test_a_file_that_another_process_is_changing_to_wal_mode_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.2, other.rollback)
    release.start()
    connect(path).close()
    release.join()
    other.close()


def replace_file(path: Path, keep: Path) -> str:
    """Another database at this path, by rename, as a restored backup comes; the old one is kept at `keep`. A key of the new one."""
    new = path.with_name("new.db")
    with Tenants(new, create=True) as made:
        made.add("globex")
        _, text = made.create_key("globex")
    os.link(path, keep)
    os.replace(new, path)
    return text


def test_a_replaced_database_counts_from_the_next_request_on(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    with Tenants(path, create=True) as tenants:
        tenants.add("acme")
        _, old = tenants.create_key("acme")
        assert tenants.authenticate(old).name == "acme"
        tenants.usage.add("acme", "", 1, 1)
        tenants.usage.flush()
        new = replace_file(path, tmp_path / "old.db")
        with pytest.raises(AuthError):
            tenants.authenticate(old)
        assert tenants.authenticate(new).name == "globex"
        assert [t.name for t in tenants.list()] == ["globex"], "what administrators see and write is the same file"
        tenants.usage.add("globex", "", 5, 6)
        assert [(r.tenant, r.prompt_tokens) for r in tenants.usage.report()] == [("globex", 5)]
        key, text = tenants.create_key("globex")
        tenants.authenticate(text)
        with Tenants(path) as other:
            other.revoke_key(key.id)
        with pytest.raises(AuthError):
            tenants.authenticate(text)
    for file, names in ((path, ["globex"]), (tmp_path / "old.db", ["acme"])):
        with Tenants(file) as read:
            assert [t.name for t in read.list()] == names
            (fine,) = sqlite3.connect(file).execute("PRAGMA integrity_check").fetchone()
            assert fine == "ok"


def test_a_replaced_database_that_somebody_holds_is_not_waited_for(tmp_path: Path) -> None:
    """The event loop is who would wait. The lock goes long before others would give up."""
    path = tmp_path / "t.db"
    with Tenants(path, create=True) as tenants:
        tenants.add("acme")
        _, text = tenants.create_key("acme")
        with sqlite3.connect(path) as db, sqlite3.connect(tmp_path / "backup.db") as backup:
            db.backup(backup)
        db.close()
        backup.close()
        holder = sqlite3.connect(tmp_path / "backup.db", isolation_level=None, check_same_thread=False)
        holder.execute("PRAGMA journal_mode = DELETE").fetchone()
        holder.execute("BEGIN EXCLUSIVE")
        os.replace(tmp_path / "backup.db", path)
        let_go = threading.Timer(1.5, holder.execute, ["ROLLBACK"])
        let_go.start()
        for _ in range(2):
            with pytest.raises(DatabaseError) as caught:
                tenants.authenticate(text)
            assert caught.value.http_status == 503
        let_go.join()
        assert tenants.authenticate(text).name == "acme"
        (patience,) = tenants._handle.connection.execute("PRAGMA busy_timeout").fetchone()
        assert patience == 1000 * sqlite.BUSY_SECONDS, "writers of usage are waited for as before"
        holder.close()


def test_a_database_that_is_gone_or_damaged_lets_nobody_in_until_it_is_back(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    with Tenants(path, create=True) as tenants:
        tenants.add("acme")
        _, text = tenants.create_key("acme")
        tenants.authenticate(text)
        path.rename(tmp_path / "away.db")
        for act in (lambda: tenants.authenticate(text), tenants.list, lambda: tenants.add("more")):
            with pytest.raises(DatabaseError) as caught:
                act()
            assert caught.value.http_status == 503
        tenants.usage.add("acme", "", 2, 3)
        with pytest.raises(DatabaseError, match="gone"):
            tenants.usage.flush()
        path.write_bytes(b"no database" * 1000)
        for _ in range(2):
            with pytest.raises(DatabaseError):
                tenants.authenticate(text)
        os.replace(tmp_path / "away.db", path)
        assert tenants.authenticate(text).name == "acme"
        assert [r.prompt_tokens for r in tenants.usage.report()] == [2], "usage was kept meanwhile"


# ---- PostgreSQL ----


def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_database_server_that_was_restarted_is_found_again() -> None:
    with postgres() as server:
        from trimtab.serve.postgres import STALE_SECONDS

        with Tenants(server.database(), create=True) as tenants:
            tenants.add("acme")
            key, text = tenants.create_key("acme")
            server.stop()
            assert tenants.authenticate(text).name == "acme", "known for some seconds"
            tenants.usage.add("acme", "", 2, 3)
            with pytest.raises(DatabaseError) as caught:
                tenants.usage.flush()
            assert caught.value.http_status == 503
            tenants._keyring._watch._heard -= STALE_SECONDS  # type: ignore[attr-defined]
            with pytest.raises(DatabaseError, match="cannot be checked at the moment"):
                tenants.authenticate(text)
            server.start()
            until(lambda: authenticates(tenants, text))
            assert [r.prompt_tokens for r in tenants.usage.report()] == [2], "usage was kept meanwhile"
            with Tenants(tenants.where) as other:
                other.revoke_key(key.id)
            until(lambda: not authenticates(tenants, text))


def authenticates(tenants: Tenants, text: str) -> bool:
    try:
        return tenants.authenticate(text).name == "acme"
    except (AuthError, DatabaseError):
        return False


def test_a_database_that_cannot_be_reached_or_read_is_told_without_its_password(where: str | Path) -> None:
    with pytest.raises(DatabaseError, match="no tenants database"):
        Tenants(where)
    if isinstance(where, Path):
        return
    with pytest.raises(DatabaseError) as caught:
        Tenants("postgresql://trimtab:very-secret@/t?host=/nowhere", create=True)
    assert "/nowhere" in str(caught.value) and "very-secret" not in str(caught.value)
    with pytest.raises(ConfigError) as wrong:
        Tenants("postgresql://trimtab:very-secret@host/t?nonsense=1", create=True)
    assert "very-secret" not in str(wrong.value)
    with Tenants(where, create=True) as tenants, tenants._database.writing(tenants._handle) as db:
        db.execute("UPDATE version SET number = 99")
    with pytest.raises(DatabaseError, match="use the trimtab that wrote it"):
        Tenants(where, create=True)
