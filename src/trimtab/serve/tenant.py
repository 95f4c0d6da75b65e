"""One tenant: who asks, what it may see, how much it may use. Admission, catalog and HTTP share this; it knows no database."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from trimtab.errors import AuthError, ConfigError

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
EVERYTHING = "*"
"""The namespace of `LOCAL`, which stands for all; no stored tenant may have it."""
DEFAULT_CONCURRENT = 32
MAX_COUNT = 2**53


@dataclass(frozen=True)
class Tenant:
    """Who asks. id: never used again for another tenant, so that whatever is kept by it (KV blocks, usage) never changes hands.

    namespaces: of the store, in the order in which a name without a namespace is looked up. max_concurrent: answers at a time;
    tokens_per_minute: prompt and completion tokens; None: no limit. weight: share of the machine. admin: may use the admin routes.
    """

    id: str
    name: str
    namespaces: tuple[str, ...] = ()
    max_concurrent: int | None = DEFAULT_CONCURRENT
    tokens_per_minute: int | None = None
    weight: float = 1.0
    admin: bool = False

    def sees(self, namespace: str) -> bool:
        return namespace in self.namespaces or EVERYTHING in self.namespaces

    def require_admin(self) -> None:
        """Forbidden (403) unless this tenant may use the admin routes."""
        if not self.admin:
            raise Forbidden("this API key may not do that", fix="use a key of an admin tenant")


LOCAL = Tenant("local", "local", (EVERYTHING,), max_concurrent=None, admin=True)
"""The only tenant of a local server (`--local`): it sees all namespaces and has no limits."""


class Forbidden(AuthError):
    """The key is good, but not for this."""

    http_status = 403


def check(tenant: Tenant) -> None:
    """ConfigError with everything that is wrong with the values of a tenant to be stored."""
    rule = "must start with a-z or 0-9 and have at most 63 of a-z 0-9 . _ -"
    problems = [f"name {tenant.name!r} {rule}"] if not NAME.fullmatch(tenant.name) else []
    problems += [f"namespace {n!r} {rule}" for n in tenant.namespaces if not NAME.fullmatch(n)]
    problems += [f"namespace {n!r} is given twice" for n in dict.fromkeys(tenant.namespaces) if tenant.namespaces.count(n) > 1]
    problems += [
        f"{field} = {value}: must be a whole number from 1 to 2**53, or None for no limit"
        for field, value in (("max_concurrent", tenant.max_concurrent), ("tokens_per_minute", tenant.tokens_per_minute))
        if value is not None and not 1 <= value <= MAX_COUNT
    ]
    if not (math.isfinite(tenant.weight) and 0.001 <= tenant.weight <= 1000):
        problems.append(f"weight = {tenant.weight}: must be a number from 0.001 to 1000")
    if problems:
        raise ConfigError("a tenant cannot have these values", problems=problems)
