"""API keys: `id.secret`. The id is public and finds the row; of the secret only a sha256 is kept, and it is compared in constant time.

A plain hash is enough: the secret has 256 random bits, so there is nothing to guess that a slow hash would protect. All keys are held in
memory, and read again when tenants or keys have changed (`Watch`): a revocation counts from the next request on, in every process that
shares a SQLite file, and within the bounds of `postgres.py` where servers share a PostgreSQL database.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from trimtab.errors import AuthError
from trimtab.serve.database import TENANT_COLUMNS, Connection, Database, DatabaseError, tenant_of
from trimtab.serve.tenant import LOCAL, Tenant

log = logging.getLogger(__name__)
MAX_KEY_CHARS = 200
LOOKS_LIKE_A_KEY = re.compile(
    r"[0-9a-fA-F]{12}\s*[.:]\s*[A-Za-z0-9_-]{16,}"
    r"|(?<![A-Za-z0-9_-])(?=[a-z0-9_-]*[A-Z])(?=[A-Z0-9_-]*[a-z])[A-Za-z0-9_-]{43,}"  # a secret alone: digests and our ids have no capitals
)
MAX_ENCODED = 8
"""How often a text may be percent-encoded and still be told."""
NOBODY = hashlib.sha256(secrets.token_bytes(32)).digest()
"""What an unknown id is compared with: no secret has this hash, and the comparison costs what a known id's costs."""


@dataclass(frozen=True)
class Key:
    """What may be shown of a key. tenant: its id. created, expires, revoked: seconds since 1970, or None."""

    id: str
    tenant: str
    created: float
    expires: float | None = None
    revoked: float | None = None

    def state(self, now: float) -> str:
        """active, expiring (it works but has an end), expired or revoked."""
        if self.revoked is not None:
            return "revoked"
        if self.expires is None:
            return "active"
        return "expiring" if now < self.expires else "expired"


def make_key() -> tuple[str, str]:
    """(public id, secret), fresh."""
    return secrets.token_hex(6), secrets.token_urlsafe(32)


def split_key(text: str) -> tuple[str, bytes]:
    """(id, the secret's hash) of any text that a client sent. It never fails, so every wrong key is handled in the same way."""
    key_id, _, secret = text[:MAX_KEY_CHARS].partition(".")
    return key_id, hash_secret(secret)


def redacted(text: str) -> str:
    """The text without anything that looks like one of our keys, or like a secret alone. For logs and answers: people put keys in wrong
    places (a model, an id, a path, a field). If a key is percent-encoded, the rest of the text is returned decoded."""
    plain = text
    for _ in range(MAX_ENCODED):
        if (further := unquote(plain)) == plain:
            left = LOOKS_LIKE_A_KEY.sub("(key)", plain)
            return LOOKS_LIKE_A_KEY.sub("(key)", text) if left == plain else left
        plain = further
    return "(key)"


def redacted_in(value: Any) -> Any:
    """`redacted` for each text in a value that will become JSON; redacting the whole line could break it. Values that JSON lacks become
    text."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, dict):
        return {redacted(str(k)): redacted_in(v) for k, v in value.items()}
    return [redacted_in(v) for v in value] if isinstance(value, list | tuple) else redacted(str(value))


def hash_secret(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


class Keyring:
    """The keys in force, for reading. Any number of threads."""

    def __init__(self, database: Database[Any], clock: Callable[[], float]):
        self._clock, self._watch = clock, database.watch(_in_force)
        self.refresh, self.close = self._watch.refresh, self._watch.close

    def authenticate(self, text: str | None) -> Tenant:
        """The tenant whose key this is. AuthError, the same whatever is wrong with the key: unknown, wrong secret, expired, revoked.
        DatabaseError (503), without details, if the database cannot be read; no key is accepted then."""
        if not text:
            raise AuthError("no API key was given", fix="send the header Authorization: Bearer <key>")
        key_id, given = split_key(text)
        try:
            kept, end, tenant = self._watch.value().get(key_id, (NOBODY, -math.inf, LOCAL))
        except DatabaseError as error:
            log.error("keys cannot be checked", extra={"told": {"error": error.message}})
            raise DatabaseError("API keys cannot be checked at the moment", fix="try again later") from error
        if hmac.compare_digest(given, kept) and self._clock() < end:
            return tenant
        raise AuthError("this API key is not valid", fix="check the key, or ask for a new one")


def _in_force(db: Connection) -> dict[str, tuple[bytes, float, Tenant]]:
    """id -> (hash, end, tenant) of every key that is neither revoked nor a removed tenant's."""
    rows = db.execute(
        f"SELECT k.id, k.secret_sha256, k.expires, {TENANT_COLUMNS} FROM keys k JOIN tenants t ON t.id = k.tenant "
        "WHERE k.revoked IS NULL AND t.removed IS NULL"
    )
    return {key_id: (kept, math.inf if expires is None else expires, tenant_of(rest)) for key_id, kept, expires, *rest in rows}
