"""`trimtab tenants` as an administrator meets it: keys shown once, everything audited, JSON for machines."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.http.common import base_of
from tests.store.common import stirred
from trimtab.cli import main
from trimtab.cli.tenants import tenants as group
from trimtab.errors import AuthError
from trimtab.methods import LoraConfig
from trimtab.serve.tenants import Tenant, Tenants
from trimtab.store.registry import Store


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "data" / "tenants.db"


def call(db: Path | None, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["tenants", *arguments, *(["--db", str(db)] if db else [])])


def told(db: Path, *arguments: str):  # type: ignore[no-untyped-def]
    result = call(db, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def audit(db: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in db.with_suffix(".audit.jsonl").read_text().splitlines()]


def test_a_tenants_life(db: Path) -> None:
    added = call(
        db, "add", "acme", "--namespace", "acme", "--namespace", "shared", "--max-concurrent", "0", "--tokens-per-minute", "500", "--admin"
    )
    assert added.exit_code == 0, added.output
    first = added.stdout.strip()
    with Tenants(db) as store:
        assert store.authenticate(first) == Tenant("acme", "acme", ("acme", "shared"), None, 500, 1.0, True)
        second = told(db, "key-create", "acme", "--expires-days", "2")
        assert store.authenticate(second["key"]).name == "acme" and second["state"] == "expiring"
        third = call(db, "key-rotate", second["id"], "--grace-hours", "0").stdout.strip()
        assert store.authenticate(third).name == "acme"
        with pytest.raises(AuthError):
            store.authenticate(second["key"])
        changed = told(db, "update", "acme", "--weight", "2", "--tokens-per-minute", "0", "--no-admin")
        assert (changed["weight"], changed["tokens_per_minute"], changed["admin"], changed["namespaces"]) == (
            2.0,
            None,
            False,
            ["acme", "shared"],
        )
        assert told(db, "key-revoke", first.split(".")[0])["state"] == "revoked"
        with pytest.raises(AuthError):
            store.authenticate(first)
        store.usage.add("acme", "sha256:abc", 10, 5)
        store.usage.flush()
        (row,) = told(db, "usage")
        assert (row["tenant"], row["adapter"], row["requests"], row["prompt_tokens"], row["completion_tokens"]) == (
            "acme",
            "sha256:abc",
            1,
            10,
            5,
        )
        assert told(db, "usage", "--tenant", "other") == told(db, "usage", "--until", "2000-01-01") == []
        (listed,) = told(db, "list")
        assert [k["state"] for k in listed["keys"]] == ["revoked", "expired", "expiring"] and listed["weight"] == 2.0
        assert told(db, "remove", "acme")["name"] == "acme"
        with pytest.raises(AuthError):
            store.authenticate(third)
        assert told(db, "list") == [] and len(told(db, "usage")) == 1


def test_what_people_read(db: Path) -> None:
    added = call(db, "add", "acme")
    assert added.stdout.count("\n") == 1, "the key alone, so that a script can take it"
    assert "shown this once" in added.stderr
    call(db, "add", "law", "--tokens-per-minute", "1000", "--admin")
    listed = call(db, "list").output
    assert "32 answers at a time, weight 1" in listed and "1,000 tokens a minute" in listed and "admin" in listed and "(active)" in listed
    with Tenants(db) as store:
        store.usage.add("acme", "", 12345, 1)
    shown = call(db, "usage").output
    assert "12,345" in shown and "base" in shown
    assert call(db, "remove", "law").output == "removed law\n"


def test_usage_names_the_adapters_that_the_store_has(db: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    store = Store(root, create=True)
    for _ in range(2):
        version = store.publish(stirred(base_of(), LoraConfig(r=2), seed=0), "acme/support")
    gone = "sha256:" + "0" * 64
    call(db, "add", "acme")
    with Tenants(db) as tenants:
        for digest in (version.digest, gone, ""):
            tenants.usage.add("acme", digest, 1, 1)
    rows = {row["adapter"]: row["names"] for row in told(db, "usage", "--store", str(root))}
    assert rows[version.digest][-1] == version.ref and rows[gone] == rows[""] == []
    shown = call(db, "usage", "--store", str(root)).output
    assert version.ref in shown and "not in the store" in shown


def test_a_key_is_shown_once_and_is_nowhere_afterwards(db: Path) -> None:
    secrets = [call(db, "add", "acme").stdout.strip().split(".")[1], told(db, "key-create", "acme")["key"].split(".")[1]]
    later = call(db, "list").output + call(db, "list", "--json").output + call(db, "usage").output
    for secret in secrets:
        assert len(secret) == 43 and secret not in later
        for path in db.parent.iterdir():
            assert secret.encode() not in path.read_bytes(), path


def test_every_act_is_in_the_audit_log(db: Path) -> None:
    key = told(db, "add", "acme", "--weight", "3")
    call(db, "key-rotate", key["id"])
    call(db, "remove", "acme")
    call(db, "remove", "acme")
    assert [(line["event"], line["stage"]) for line in audit(db)] == [
        ("tenant.add", "begin"),
        ("tenant.add", "done"),
        ("key.rotate", "begin"),
        ("key.rotate", "done"),
        ("tenant.remove", "begin"),
        ("tenant.remove", "done"),
        ("tenant.remove", "begin"),
        ("tenant.remove", "failed"),
    ]
    first = audit(db)[1]
    assert first["actor"] == f"cli:uid={os.getuid()}" and first["target"] == "acme" and first["key"] == key["id"]
    assert isinstance(first["details"], dict) and first["details"]["weight"] == 3.0


def test_what_cannot_be_audited_is_not_done(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told(db, "add", "acme")
    from trimtab.serve import audit as module

    def full(file: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "write", full)
    for arguments in (["add", "law"], ["remove", "acme"], ["key-create", "acme"], ["update", "acme", "--weight", "9"]):
        result = call(db, *arguments)
        assert result.exit_code == 2 and "is not carried out" in result.output
    monkeypatch.undo()
    (only,) = told(db, "list")
    assert (only["name"], only["weight"], len(only["keys"])) == ("acme", 1.0, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list"], "trimtab tenants add"),
        (["usage"], "trimtab tenants add"),
        (["remove", "acme"], "trimtab tenants add"),
        (["add", "Bad/Name"], "must start with a-z"),
        (["add", "acme", "--weight", "nan"], "weight = nan"),
        (["add", "acme", "--namespace", "*"], "namespace '*'"),
        (["key-revoke", "0123.secret-part"], "give its id only"),
        (["key-rotate", "0123.secret-part"], "give its id only"),
    ],
)
def test_mistakes_say_the_fix_and_make_nothing(db: Path, arguments: list[str], words: str) -> None:
    result = call(db, *arguments)
    assert result.exit_code == 2 and words in result.output and "secret-part" not in result.output
    assert not db.exists() and "Traceback" not in result.output


def test_a_damaged_database_is_said_and_left(db: Path) -> None:
    db.parent.mkdir()
    db.write_text("not a database " * 100)
    before = db.read_bytes()
    for arguments in (["list"], ["add", "acme"]):
        result = call(db, *arguments)
        assert result.exit_code == 2 and "restore it from a backup" in result.output
    assert db.read_bytes() == before


def test_files_are_their_owners_alone_and_lie_in_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert call(None, "add", "acme").exit_code == 0
    found = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "trimtab").iterdir()}
    assert found == {"tenants.db": 0o600, "tenants.audit.jsonl": 0o600}


@pytest.mark.parametrize("name", group.commands)
def test_every_command_has_json_and_db(name: str) -> None:
    result = CliRunner().invoke(main, ["tenants", name, "--help"])
    assert result.exit_code == 0 and "--json" in result.output and "--db" in result.output
