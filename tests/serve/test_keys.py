"""API keys: who gets in, who does not, and what is kept of a key."""

from __future__ import annotations

import hashlib
import hmac
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import AuthError, ConfigError, NotFoundError
from trimtab.serve import keys
from trimtab.serve.database import DatabaseError
from trimtab.serve.tenants import Tenants


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tenants(where: str | Path, clock: Clock):
    with Tenants(where, create=True, clock=clock) as found:
        found.add("acme")
        yield found


def refusal(tenants: Tenants, text: str | None) -> str:
    with pytest.raises(AuthError) as caught:
        tenants.authenticate(text)
    assert caught.value.http_status == 401
    return str(caught.value)


def test_a_key_is_its_tenants_and_only_whole(tenants: Tenants) -> None:
    tenants.add("other")
    key, text = tenants.create_key("acme")
    _, others = tenants.create_key("other")
    assert tenants.authenticate(text).name == "acme" and tenants.authenticate(others).name == "other"
    key_id, secret = text.split(".")
    assert key_id == key.id and len(secret) == 43
    wrong = [
        key_id,
        key_id + ".",
        "." + secret,
        secret,
        text + "x",
        text[:-1],
        text.upper(),
        f"{key_id}.{others.split('.')[1]}",
        " " + text,
    ]
    said = {refusal(tenants, w) for w in wrong}
    assert len(said) == 1 and key_id not in said.pop()


def test_without_a_key_it_says_how_to_send_one(tenants: Tenants) -> None:
    assert "Authorization: Bearer" in refusal(tenants, None) == refusal(tenants, "")


@pytest.mark.parametrize("where", ["sqlite"], indirect=True)
def test_only_a_hash_of_the_secret_is_kept_anywhere(tenants: Tenants, tmp_path: Path) -> None:
    key, text = tenants.create_key("acme")
    secret = text.split(".")[1]
    assert secret not in repr(key) and secret not in repr(tenants.keys("acme"))
    kept = sqlite3.connect(tmp_path / "t.db").execute("SELECT secret_sha256 FROM keys").fetchall()
    assert kept == [(hashlib.sha256(secret.encode()).digest(),)]
    for path in tmp_path.iterdir():
        assert secret.encode() not in path.read_bytes(), path


def test_secrets_are_compared_in_constant_time_whether_the_id_is_known_or_not(tenants: Tenants, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: (compared.append((a, b)), real(a, b))[1])
    key, text = tenants.create_key("acme")
    tenants.authenticate(text)
    refusal(tenants, key.id + ".wrong")
    refusal(tenants, "0123456789ab." + text.split(".")[1])
    assert len(compared) == 3 and all(len(a) == len(b) == 32 for a, b in compared)
    assert compared[0][0] == compared[0][1]
    assert compared[2][1] == keys.NOBODY, "an unknown id costs a comparison too"


def test_an_unknown_id_gets_nobodys_rights_even_with_a_matching_hash(tenants: Tenants, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "NOBODY", hashlib.sha256(b"x").digest())
    refusal(tenants, "nobody.x")


def test_expiry_and_rotation(tenants: Tenants, clock: Clock) -> None:
    old, old_text = tenants.create_key("acme", lifetime=100.0)
    assert old.expires == clock.now + 100
    new, new_text = tenants.rotate_key(old.id, grace=30.0)
    assert new.id != old.id and new.expires == clock.now + 100
    clock.now += 29.9
    assert tenants.authenticate(old_text) == tenants.authenticate(new_text)
    clock.now += 0.1
    refusal(tenants, old_text)
    tenants.authenticate(new_text)
    with pytest.raises(ConfigError, match="is expired"):
        tenants.rotate_key(old.id)
    clock.now += 70
    refusal(tenants, new_text)
    assert [k.state(clock.now) for k in tenants.keys("acme")] == ["expired", "expired"]


def test_rotating_never_lengthens_a_key(tenants: Tenants, clock: Clock) -> None:
    old, text = tenants.create_key("acme", lifetime=10.0)
    tenants.rotate_key(old.id, grace=1000.0)
    clock.now += 10
    refusal(tenants, text)


def test_a_key_that_is_rotated_twice_gives_keys_that_live_as_long_as_it_did(tenants: Tenants, clock: Clock) -> None:
    old, _ = tenants.create_key("acme")
    tenants.rotate_key(old.id, grace=10.0)
    assert tenants.rotate_key(old.id, grace=10.0)[0].expires is None
    short, _ = tenants.create_key("acme", lifetime=500.0)
    tenants.rotate_key(short.id, grace=10.0)
    clock.now += 5
    assert tenants.rotate_key(short.id)[0].expires == clock.now + 500


@pytest.mark.parametrize("where", ["sqlite"], indirect=True)
def test_while_the_database_cannot_be_read_nobody_gets_in_and_nothing_is_told(tenants: Tenants, tmp_path: Path) -> None:
    _, text = tenants.create_key("acme")
    tenants.authenticate(text)
    tenants._keyring._watch._handle.connection.close()
    with pytest.raises(DatabaseError) as caught:
        tenants.authenticate(text)
    assert caught.value.http_status == 503 and str(tmp_path) not in str(caught.value)


def test_a_revoked_key_ends_at_once_and_for_good(tenants: Tenants) -> None:
    key, text = tenants.create_key("acme")
    _, other = tenants.create_key("acme")
    tenants.authenticate(text)
    first = tenants.revoke_key(key.id)
    refusal(tenants, text)
    assert tenants.authenticate(other).name == "acme"
    assert tenants.revoke_key(key.id) == first, "revoking twice changes nothing"
    with pytest.raises(ConfigError, match="is revoked"):
        tenants.rotate_key(key.id)


def test_a_removed_tenants_keys_end_even_if_its_name_comes_back(tenants: Tenants) -> None:
    _, text = tenants.create_key("acme")
    before = tenants.authenticate(text)
    tenants.remove("acme")
    refusal(tenants, text)
    again = tenants.add("acme")
    assert again.name == before.name and again.id != before.id
    refusal(tenants, text)
    assert tenants.keys("acme") == ()


def test_settings_count_from_the_next_request_on(tenants: Tenants) -> None:
    from dataclasses import replace

    _, text = tenants.create_key("acme")
    before = tenants.authenticate(text)
    tenants.update(replace(before, max_concurrent=1, namespaces=("shared",)))
    assert tenants.authenticate(text).max_concurrent == 1
    assert tenants.authenticate(text).namespaces == ("shared",)


def test_usage_makes_nobody_read_all_keys_again(tenants: Tenants, monkeypatch: pytest.MonkeyPatch) -> None:
    _, text = tenants.create_key("acme")
    tenants.authenticate(text)
    monkeypatch.setattr(tenants._keyring._watch, "_read", lambda db: pytest.fail("the keys were read again"))
    for _ in range(3):
        tenants.usage.add("acme", "", 1, 1)
        tenants.usage.flush()
        tenants.authenticate(text)


def test_an_unknown_key_id_is_said_without_its_secret(tenants: Tenants) -> None:
    with pytest.raises(NotFoundError) as caught:
        tenants.revoke_key("0123456789ab.very-secret")
    assert "0123456789ab" in str(caught.value) and "very-secret" not in str(caught.value)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_a_lifetime_must_be_one(tenants: Tenants, seconds: float) -> None:
    with pytest.raises(ConfigError, match="lifetime"):
        tenants.create_key("acme", lifetime=seconds)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory):
    with Tenants(tmp_path_factory.mktemp("keys") / "t.db", create=True) as found:
        found.add("acme")
        found.create_key("acme")
        yield found


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text(alphabet=".\0\ud800 'abc", max_size=400))
def test_whatever_is_sent_as_a_key_is_refused_alike(shared: Tenants, text: str) -> None:
    with pytest.raises(AuthError) as caught:
        shared.authenticate(text)
    assert len(str(caught.value)) < 120


def until(holds: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


REVOKE = """
import sys
from trimtab.serve.tenants import Tenants
with Tenants(sys.argv[1]) as t:
    t.revoke_key(sys.argv[2])
"""


def test_a_revocation_counts_in_another_process_at_the_next_request(where: str | Path) -> None:
    """Of PostgreSQL: once it has told so, which takes milliseconds."""
    with Tenants(where, create=True) as tenants:
        tenants.add("acme")
        key, text = tenants.create_key("acme")
        assert tenants.authenticate(text).name == "acme"
        subprocess.run([sys.executable, "-c", REVOKE, str(where), key.id], check=True, timeout=60)
        if not isinstance(where, Path):
            until(lambda: key.id not in tenants._keyring._watch.value())
        refusal(tenants, text)


@pytest.mark.parametrize("where", ["sqlite"], indirect=True)
def test_what_looks_like_a_key_is_taken_out_of_texts(tenants: Tenants) -> None:
    _, text = tenants.create_key("acme")
    for said in (text, text.replace(".", "%2E"), text.upper(), f"Bearer {text}", f"chatcmpl-{text}", text[:40]):
        left = keys.redacted(f"the model '{said}' does not exist")
        assert said.split(".")[-1][-20:] not in left and "does not exist" in left and "(key)" in left
    for fine in (
        "support",
        "acme/support@3",
        "sha256:" + "ab" * 32,
        "0123456789ab.safetensors",
        "chatcmpl-" + "ab" * 16 + "-0",
        "10.0.0.1",
    ):
        assert keys.redacted(fine) == fine


def spellings(text: str) -> list[str]:
    """Of a key, as people and programs mangle it."""
    key_id, secret = text.split(".")
    every = "".join(f"%{ord(c):02x}" for c in text)
    return [
        secret,
        f"x-{secret}",
        f"Bearer {secret}",
        f"{key_id}:{secret}",
        f"{key_id} . {secret}",
        f"{key_id}:{secret[:30]}",
        f"{key_id}%2e{secret}",
        f"{key_id}%252e{secret}",
        f"{key_id}%25252E{secret}",
        f"{key_id}%20.%20{secret}",
        every,
        every.replace("%", "%25"),
        every.replace("%", "%" + "25" * 40),
        "".join(f"%{ord(c):02x}" for c in secret),
    ]


@pytest.mark.parametrize("where", ["sqlite"], indirect=True)
def test_a_key_is_found_however_it_is_spelt(tenants: Tenants) -> None:
    for _ in range(20):  # secrets with - and _ at any place
        text = tenants.create_key("acme")[1]
        for said in spellings(text):
            left = keys.redacted(f"no route /v1/{said}/x")
            for _ in range(50):
                left = unquote(left)
            assert text.split(".")[1][:16] not in left and "(key)" in left, said


def test_texts_without_a_key_stay_as_they_are() -> None:
    for fine in ("100%", "a%20b", "%zz%2", "50%25 off", "a-long-name-of-an-adapter-without-any-capitals-2026-11", "A" * 60, "é" * 60):
        assert keys.redacted(fine) == fine
    began = "%" + "25" * 500_000
    assert keys.redacted(began) == "(key)", "encoded too often to look into, which would take for ever"
