"""One exchange of parts of tenants' limits between a server and the database that it shares with others (`leases.py`)."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.serve.database import Connection
from trimtab.serve.tenant import Tenant

LEASE_SECONDS = 10.0
"""How long a server is believed that is not heard of."""
BUSY_SECONDS, IDLE_SECONDS = 1.0, 60.0
"""A tenant that asked within so long gets its full share of the tokens; one that did not within so long gives all back."""
MAX_SPARE = 8
"""Slots that are held beyond those in use, at most, if there are other servers."""
Row = tuple[int, int, float]
"""(slots, answers under way, tokens) as others see them."""
NOTHING: Row = (0, 0, 0.0)


@dataclass
class Part:
    """Of one tenant's limits, on this server.

    open, slots: answers under way, and how many may be. spare: slots to hold beyond those in use. elsewhere: answers under way on other
    servers; pool: tokens that no server holds; None: not told yet. credit: tokens that may be used here; share: how many to hold. wanted:
    answers that found no slot since the last exchange. used: when the tenant last asked."""

    tenant: Tenant
    used: float
    open: int = 0
    slots: int = 0
    spare: int = 0
    elsewhere: int | None = None
    credit: float = 0.0
    share: float = 0.0
    pool: float | None = None
    wanted: int = 0

    def short(self, n: int) -> bool:
        """Whether n answers want more than this part, though the limits may have it."""
        most, per_minute = self.tenant.max_concurrent, self.tenant.tokens_per_minute
        over = most is not None and self.elsewhere is not None and self.open + self.elsewhere + n > most
        slots = most is not None and self.open + n > self.slots
        tokens = per_minute is not None and self.credit < 1 and (self.pool is None or self.pool >= 1)
        return not over and (slots or tokens)

    def ask(self, now: float) -> Ask:
        """Slots and tokens that go back are not used from now on, before others may get them."""
        idle = now - self.used
        gone = not self.open and not self.wanted and idle > IDLE_SECONDS
        self.slots = keep = self.open if gone else max(self.open, min(self.slots, self.open + self.spare))
        returned = self.credit if gone or self.credit < 0 else max(0.0, self.credit - self.share)
        self.credit -= returned
        wanted, self.wanted = self.wanted, 0
        asked = self.open if gone else self.open + wanted + self.spare
        return Ask(self, keep, asked, self.open, returned, self.credit, idle < BUSY_SECONDS, gone)


@dataclass
class Ask:
    """What one exchange is to do for a part: keep these slots at least, have so many if they are free, give back tokens. gone: the tenant
    has not asked for long, so everything goes back."""

    part: Part
    keep: int
    slots: int
    running: int
    returned: float
    kept: float
    busy: bool
    gone: bool


@dataclass
class Grant:
    """What came of it. taken: tokens from the pool, of which `pool` are left."""

    slots: int
    elsewhere: int
    spare: int
    share: float
    taken: float
    pool: float | None


class Exchange:
    """A server's side of it. now: the database's statement for the time. servers: how many share the limits, as of the last one."""

    def __init__(self, replica: str, now: str):
        self.replica, self._now, self.servers = replica, now, 1
        self._published: dict[str, Row] = {}
        self._next: dict[str, Row] = {}

    def done(self) -> None:
        """What the last run has written is there."""
        self._published = self._next

    def run(self, db: Connection, asks: list[Ask]) -> list[Grant]:
        """What comes of each, within the transaction of this connection; call `done` once it has been committed."""
        (now,) = db.execute(self._now).fetchone()
        published = self._next = dict(self._published)
        if not db.execute("UPDATE replicas SET seen = ? WHERE id = ?", (now, self.replica)).rowcount:
            db.execute("INSERT INTO replicas VALUES (?, ?)", (self.replica, now))
            published = self._next = {}  # it was taken for dead, and its parts went to others
        db.execute("DELETE FROM replicas WHERE seen < ?", (now - LEASE_SECONDS,))
        self.servers = int(db.execute("SELECT count(*) FROM replicas").fetchone()[0])
        if not asks:
            return []
        found = "SELECT tenant, sum(slots), sum(running), sum(tokens) FROM leases WHERE replica <> ? GROUP BY tenant"
        others = {t: (int(slots), int(running), tokens) for t, slots, running, tokens in db.execute(found, (self.replica,))}
        levels = {tenant: (level, filled) for tenant, level, filled in db.execute("SELECT tenant, level, filled FROM buckets")}
        grants = []
        for ask in asks:
            tenant = ask.part.tenant
            theirs, elsewhere, tokens = others.get(tenant.id, NOTHING)
            slots, spare = self._slots(ask, theirs)
            share, taken, pool = self._tokens(db, ask, tokens, levels.get(tenant.id), now)
            grants.append(Grant(slots, elsewhere, spare, share, taken, pool))
            self._publish(db, tenant.id, (slots, ask.running, ask.kept + taken), published)
        return grants

    def _slots(self, ask: Ask, others: int) -> tuple[int, int]:
        """(slots to hold, slots to hold beyond those in use from the next exchange on). others: slots that other servers hold."""
        most = ask.part.tenant.max_concurrent
        if most is None:
            return 0, 0
        spare = most if self.servers == 1 else min(MAX_SPARE, max(0, most - others - ask.running) // (2 * self.servers))
        asked = ask.running if ask.gone else max(ask.slots, ask.running + spare)
        return max(ask.keep, min(asked, most - others)), spare

    def _tokens(
        self, db: Connection, ask: Ask, others: float, known: tuple[float, float] | None, now: float
    ) -> tuple[float, float, float | None]:
        """(tokens to hold, tokens taken, tokens that are left). The pool fills up to what all servers and the pool may have together.
        others: tokens that other servers hold."""
        per_minute = ask.part.tenant.tokens_per_minute
        if per_minute is None:
            return 0.0, 0.0, None
        level, filled = known or (float(per_minute), now)
        level += ask.returned
        level = min(level + max(0.0, now - filled) * per_minute / 60, max(level, per_minute - others - ask.kept))
        parts = 1 if self.servers == 1 else (self.servers + 1) * (1 if ask.busy else 8)
        share = 0.0 if ask.gone else max(0.0, level + ask.kept) / parts
        taken = min(max(0.0, share - ask.kept), max(0.0, level))
        statement = (
            "INSERT INTO buckets VALUES (?, ?, ?) ON CONFLICT (tenant) DO UPDATE SET level = excluded.level, filled = excluded.filled"
        )
        db.execute(statement, (ask.part.tenant.id, level - taken, now))
        return share, taken, level - taken

    def _publish(self, db: Connection, tenant: str, row: Row, published: dict[str, Row]) -> None:
        if row == published.get(tenant, NOTHING):
            return
        if row == NOTHING:
            db.execute("DELETE FROM leases WHERE replica = ? AND tenant = ?", (self.replica, tenant))
            published.pop(tenant, None)
            return
        db.execute(
            "INSERT INTO leases VALUES (?, ?, ?, ?, ?) ON CONFLICT (replica, tenant) DO UPDATE SET "
            "slots = excluded.slots, running = excluded.running, tokens = excluded.tokens",
            (self.replica, tenant, *row),
        )
        published[tenant] = row

    def leave(self, db: Connection) -> None:
        """No longer one of those who share."""
        db.execute("DELETE FROM replicas WHERE id = ?", (self.replica,))
