"""Tenants and their keys in a database that all server processes and the command line share: adding, changing, removing.

Knows nothing of HTTP, adapters or the engine, and writes no audit log: whoever acts for an administrator does that (`serve/audit.py`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from trimtab.errors import ConfigError, NotFoundError, nearest
from trimtab.serve.database import TENANT_COLUMNS, Connection, default_path, tenant_of
from trimtab.serve.keys import Key, Keyring, hash_secret, make_key
from trimtab.serve.leases import Leases
from trimtab.serve.opening import open_database
from trimtab.serve.tenant import DEFAULT_CONCURRENT, LOCAL, NAME, Forbidden, Tenant, check
from trimtab.serve.usage import UsageBook, UsageRow

__all__ = ["DEFAULT_CONCURRENT", "LOCAL", "NAME", "Forbidden", "Key", "Tenant", "Tenants", "UsageRow", "check", "default_path"]

DEFAULT_GRACE_SECONDS = 24 * 3600.0
KEY_COLUMNS = "id, tenant, created, expires, revoked"


class Tenants:
    """The tenants of one database. Safe for any number of threads and processes. A context manager, or `close()`: usage is then written.

    authenticate(text) -> Tenant: whose key this is; AuthError, the same whatever is wrong. usage: an open `UsageBook` on the same database.
    """

    def __init__(self, where: str | Path, *, create: bool = False, clock: Callable[[], float] = time.time):
        """where: a file, or a PostgreSQL database's URL. DatabaseError if there is none (unless create), or one that is damaged, another
        program's or from a later version."""
        self.where, self._clock = where, clock
        self._database = open_database(where, create=create)
        self._handle = self._database.handle()
        self._keyring, self.usage = Keyring(self._database, clock), UsageBook(self._database, clock=clock)
        self.authenticate = self._keyring.authenticate
        self.leases: Leases | None = None

    def share_limits(self) -> Leases:
        """From now on this process is one of the servers that share the tenants' limits, until `close`."""
        self.leases = Leases(self._database)
        self.leases.start()
        return self.leases

    def __enter__(self) -> Tenants:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Writes the usage that is pending. DatabaseError if that fails."""
        try:
            if self.leases is not None:
                self.leases.close()
            self.usage.close()
        finally:
            self._keyring.close()
            self._database.close(self._handle)

    # ---- tenants ----

    def add(
        self,
        name: str,
        *,
        namespaces: Sequence[str] = (),
        max_concurrent: int | None = DEFAULT_CONCURRENT,
        tokens_per_minute: int | None = None,
        weight: float = 1.0,
        admin: bool = False,
    ) -> Tenant:
        """A new tenant; namespaces: by default the one of its own name. ConfigError if a value is wrong or the name is taken."""
        tenant = Tenant(name, name, tuple(namespaces) or (name,), max_concurrent, tokens_per_minute, weight, admin)
        check(tenant)
        with self._writing() as db:
            if db.execute("SELECT 1 FROM tenants WHERE name = ? AND removed IS NULL", (name,)).fetchone():
                raise ConfigError(
                    f"there is a tenant {name!r} already",
                    fix=f"choose another name; `trimtab tenants key-create {name}` makes a further key, `update` changes what it may do",
                )
            if before := db.execute("SELECT count(*) FROM tenants WHERE name = ?", (name,)).fetchone()[0]:
                tenant = replace(tenant, id=f"{name}~{before + 1}")  # no name has a ~
            db.execute(
                "INSERT INTO tenants (name, namespaces, max_concurrent, tokens_per_minute, weight, admin, id, created) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (tenant.name, *_settings(tenant), tenant.id, self._clock()),
            )
        return tenant

    def update(self, tenant: Tenant) -> Tenant:
        """Write the namespaces, limits, weight and admin flag of the tenant with this id; they count from the next request on."""
        check(tenant)
        with self._writing() as db:
            if _required(db, tenant.name).id != tenant.id:
                raise NotFoundError(f"the tenant {tenant.name!r} was removed and added again meanwhile", fix="get it again")
            db.execute(
                "UPDATE tenants SET namespaces = ?, max_concurrent = ?, tokens_per_minute = ?, weight = ?, admin = ? WHERE id = ?",
                (*_settings(tenant), tenant.id),
            )
        return tenant

    def get(self, name: str) -> Tenant:
        """NotFoundError, with the nearest name, where there is none."""
        with self._reading() as db:
            return _required(db, name)

    def list(self) -> tuple[Tenant, ...]:
        """By name."""
        with self._reading() as db:
            return tuple(map(tenant_of, db.execute(f"SELECT {TENANT_COLUMNS} FROM tenants t WHERE removed IS NULL ORDER BY name")))

    def remove(self, name: str) -> Tenant:
        """From now on none of its keys is valid. Its usage stays in the reports. NotFoundError if there is none."""
        with self._writing() as db:
            tenant, now = _required(db, name), self._clock()
            db.execute("UPDATE keys SET revoked = ? WHERE tenant = ? AND revoked IS NULL", (now, tenant.id))
            db.execute("UPDATE tenants SET removed = ? WHERE id = ?", (now, tenant.id))
        return tenant

    # ---- keys ----

    def create_key(self, name: str, *, lifetime: float | None = None) -> tuple[Key, str]:
        """(what may be shown, the key itself): a new key of a tenant. The text is kept nowhere. lifetime: seconds; None: no end."""
        if lifetime is not None and not 0 < lifetime < math.inf:
            raise ConfigError(f"lifetime = {lifetime}: must be a number of seconds above 0")
        with self._writing() as db:
            return self._new_key(db, _required(db, name).id, lifetime)

    def rotate_key(self, key_id: str, *, grace: float = DEFAULT_GRACE_SECONDS) -> tuple[Key, str]:
        """A new key for the same tenant, as long-lived as the old one was; the old one is valid for `grace` more seconds at most."""
        if not 0 <= grace < math.inf:
            raise ConfigError(f"grace = {grace}: must be a number of seconds, 0 or above")
        with self._writing() as db:
            old, now = _key(db, key_id), self._clock()
            if old.state(now) in ("revoked", "expired"):
                raise ConfigError(f"the key {key_id!r} is {old.state(now)}", fix="create a new key for the tenant")
            end = now + grace if old.expires is None else min(old.expires, now + grace)
            db.execute("UPDATE keys SET expires = ? WHERE id = ?", (end, key_id))
            (lifetime,) = db.execute("SELECT lifetime FROM keys WHERE id = ?", (key_id,)).fetchone()  # an earlier rotation moved its end
            return self._new_key(db, old.tenant, lifetime)

    def revoke_key(self, key_id: str) -> Key:
        """At once and for good. NotFoundError if there is no such key; revoking twice changes nothing."""
        with self._writing() as db:
            _key(db, key_id)
            db.execute("UPDATE keys SET revoked = ? WHERE id = ? AND revoked IS NULL", (self._clock(), key_id))
            return _key(db, key_id)

    def keys(self, name: str) -> tuple[Key, ...]:
        """A tenant's keys, oldest first, those that are over included."""
        with self._reading() as db:
            tenant = _required(db, name)
            return tuple(
                Key(*row) for row in db.execute(f"SELECT {KEY_COLUMNS} FROM keys WHERE tenant = ? ORDER BY created, id", (tenant.id,))
            )

    def _new_key(self, db: Connection, tenant_id: str, lifetime: float | None) -> tuple[Key, str]:
        key_id, secret = make_key()
        now = self._clock()
        key = Key(key_id, tenant_id, now, None if lifetime is None else now + lifetime)
        db.execute(
            "INSERT INTO keys (id, tenant, secret_sha256, created, lifetime, expires) VALUES (?, ?, ?, ?, ?, ?)",
            (key.id, key.tenant, hash_secret(secret), key.created, lifetime, key.expires),
        )
        return key, f"{key_id}.{secret}"

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with self._database.writing(self._handle) as db:
            yield db
        self._keyring.refresh()

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with self._database.reading(self._handle) as db:
            yield db


def _settings(tenant: Tenant) -> tuple[str, int | None, int | None, float, int]:
    return json.dumps(tenant.namespaces), tenant.max_concurrent, tenant.tokens_per_minute, tenant.weight, int(tenant.admin)


def _required(db: Connection, name: str) -> Tenant:
    found = f"SELECT {TENANT_COLUMNS} FROM tenants t WHERE name = ? AND removed IS NULL"
    row = db.execute(found, (name,)).fetchone() if NAME.fullmatch(name) else None  # PostgreSQL takes no NUL
    if row is None:
        known = [r[0] for r in db.execute("SELECT name FROM tenants WHERE removed IS NULL")]
        raise NotFoundError(f"there is no tenant {name!r}{nearest(name, known)}", fix="see them with: trimtab tenants list")
    return tenant_of(row)


def _key(db: Connection, key_id: str) -> Key:
    row = None if "\0" in key_id else db.execute(f"SELECT {KEY_COLUMNS} FROM keys WHERE id = ?", (key_id,)).fetchone()
    if row is None:
        shown = key_id.partition(".")[0]  # a whole key, secret and all, may have been given by mistake: it goes into no log
        raise NotFoundError(f"there is no key with the id {shown!r}", fix="give the part before the dot; trimtab tenants list shows them")
    return Key(*row)
