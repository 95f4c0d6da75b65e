"""Limits of a tenant that several servers share: each holds a part, and parts move in the background.

A part is a number of answers that may be under way here (slots), and tokens that may be used here. A request is admitted from what is held,
in memory. A thread exchanges parts through the database, a few times a second where there is traffic, and at once where a part is too small
(`short`); requests that need more wait for that, beside the event loop. The parts of all servers never exceed the limit, so

- answers under way never exceed `max_concurrent` (a request near it may be refused for about a second while others still hold a slot), and
- tokens are overdrawn by one request for each server at most (one server alone: by one request), where no estimate is too low.

A server that is not heard of for LEASE_SECONDS loses its parts to the others. It stops admitting SAFETY_SECONDS earlier. If it was not
dead but cut off, answers that still run on it come on top.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from trimtab.errors import LimitError, OverloadedError, TrimtabError
from trimtab.serve.database import Database, DatabaseError
from trimtab.serve.exchange import IDLE_SECONDS, LEASE_SECONDS, Ask, Exchange, Grant, Part
from trimtab.serve.tenant import Tenant

log = logging.getLogger(__name__)
SYNC_SECONDS, HEARTBEAT_SECONDS, PAUSE_SECONDS = 0.25, 2.0, 0.02
"""Between exchanges: with traffic, without, and at least."""
SAFETY_SECONDS = 3.0
"""By how much earlier than LEASE_SECONDS a server stops itself."""
WAIT_SECONDS = 0.5
"""How long a request waits for its part."""


class OutOfTokens(LimitError):
    """A tenant's tokens of the minute are used up."""


class Unshared(OverloadedError):
    """Parts have not been exchanged for so long that others may have them."""


class Leases:
    """This server's parts. Any number of threads. Nothing is exchanged before `start` but by `sync`; `close` gives everything back.

    clock: seconds that only grow. problem: why parts cannot be exchanged, "" while all is well."""

    def __init__(self, database: Database[Any], clock: Callable[[], float] = time.monotonic):
        self._database, self._clock = database, clock
        self._handle = database.handle(durable=False)
        self._lock, self._exchanging = threading.Lock(), threading.Lock()
        self._parts: dict[str, Part] = {}
        self.exchange = Exchange(uuid.uuid4().hex, database.now)
        self._waiting: list[Future[None]] = []
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._synced = -math.inf
        self.problem = ""

    def start(self) -> None:
        """Exchange from now on. DatabaseError if the first exchange fails."""
        self.sync()
        self._thread = threading.Thread(target=self._exchange_now_and_then, name="trimtab-leases", daemon=True)
        self._thread.start()

    @property
    def servers(self) -> int:
        """How many share the limits."""
        return self.exchange.servers

    # ---- on the way of a request: microseconds ----

    def short(self, tenant: Tenant, n: int) -> bool:
        """Whether this server's part is too small for n answers, though the tenant may be within its limits: an exchange then follows at
        once."""
        if tenant.max_concurrent is None and tenant.tokens_per_minute is None:
            return False
        with self._lock:
            part = self._part(tenant)
            if short := part.short(n):
                part.wanted = max(part.wanted, n)
                self._wake.set()
            return short

    def exchanged(self) -> Future[None]:
        """Done when an exchange that begins from now on is over, well or not."""
        with self._lock:
            self._waiting.append(future := Future[None]())
            self._wake.set()
            return future

    def refuse_if_over(self, tenant: Tenant, n: int, *, known: bool = False) -> None:
        """LimitError if n answers are more than this server's part; OverloadedError if parts cannot be exchanged. known: only if they are
        more than the limits themselves, as far as the last exchange has told."""
        if tenant.max_concurrent is None and tenant.tokens_per_minute is None:
            return
        with self._lock:
            part = self._part(tenant)
            if not (known and part.short(n)):
                self._refuse_if_over(part, n)

    def take(self, tenant: Tenant, n: int, tokens: float) -> None:
        """n answers begin, which are charged so many tokens. LimitError where an exchange has just made the part smaller."""
        with self._lock:
            part = self._part(tenant)
            self._refuse_if_over(part, n)
            part.open += n
            part.credit -= tokens

    def _refuse_if_over(self, part: Part, n: int) -> None:
        most, per_minute = part.tenant.max_concurrent, part.tenant.tokens_per_minute
        if most is not None or per_minute is not None:
            if self._clock() - self._synced > LEASE_SECONDS - SAFETY_SECONDS:
                raise Unshared("limits that servers share cannot be checked at the moment", fix="try again later", retry_after=SYNC_SECONDS)
            if most is not None and part.open + n > part.slots:
                under_way = part.open + (part.elsewhere or 0)
                text = f"{under_way} answers are under way and {n} more would exceed this tenant's limit of {most}"
                raise LimitError(text, fix="wait until one has ended", retry_after=SYNC_SECONDS)
            if per_minute is not None and part.credit < 1:
                missing = 1 - part.credit - (part.pool or 0.0)
                text = f"this tenant's {per_minute} tokens a minute are used up"
                wait = max(SYNC_SECONDS, missing * 60 / per_minute)
                raise OutOfTokens(text, fix="wait, or ask for a higher limit", retry_after=wait)

    def give(self, tenant: Tenant, n: int, tokens: float) -> None:
        """n answers are over, and so many tokens were charged too much (or, below 0, too little)."""
        with self._lock:
            part = self._part(tenant, asks=False)
            part.open -= n
            part.credit += tokens

    def tokens_left(self, tenant: Tenant) -> float:
        """What the tenant may use here at this moment without asking."""
        with self._lock:
            return self._part(tenant, asks=False).credit

    def _part(self, tenant: Tenant, *, asks: bool = True) -> Part:
        part = self._parts.get(tenant.id)
        if part is None:
            part = self._parts[tenant.id] = Part(tenant, self._clock())
        if asks:
            part.tenant, part.used = tenant, self._clock()
        return part

    # ---- in the background ----

    def sync(self) -> None:
        """One exchange. DatabaseError if it fails: parts stay as they are, and end by themselves."""
        with self._exchanging:
            began = self._clock()
            with self._lock:
                waiting, self._waiting = self._waiting, []
                asks = [part.ask(began) for part in self._parts.values()]
            try:
                with self._database.writing(self._handle) as db:
                    grants = self.exchange.run(db, asks)
            except BaseException:
                with self._lock:
                    for ask in asks:
                        ask.part.credit += ask.returned
                raise
            else:
                with self._lock:
                    self.exchange.done()
                    self._synced = began
                    for ask, grant in zip(asks, grants, strict=True):
                        self._apply(ask, grant)
            finally:
                for future in waiting:
                    if future.set_running_or_notify_cancel():
                        future.set_result(None)

    def close(self) -> None:
        """Give everything back. The database may be gone: then it ends by itself."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(TrimtabError):
            self.give_back()
        self._database.close(self._handle)

    def give_back(self) -> None:
        """Leave those who share."""
        with self._lock:
            for part in self._parts.values():
                part.open, part.wanted, part.used = 0, 0, -math.inf
        self.sync()
        with self._database.writing(self._handle) as db:
            self.exchange.leave(db)

    def _apply(self, ask: Ask, grant: Grant) -> None:
        part = ask.part
        part.slots, part.elsewhere, part.spare = grant.slots, grant.elsewhere, grant.spare
        part.credit, part.share, part.pool = part.credit + grant.taken, grant.share, grant.pool
        if ask.gone and not part.open and not part.wanted and self._clock() - part.used > IDLE_SECONDS:
            del self._parts[part.tenant.id]

    def _exchange_now_and_then(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                traffic = any(p.open or p.wanted or self._clock() - p.used < HEARTBEAT_SECONDS for p in self._parts.values())
            self._wake.wait(SYNC_SECONDS if traffic else HEARTBEAT_SECONDS)
            self._stop.wait(PAUSE_SECONDS)
            self._wake.clear()
            try:
                self.sync()
                self.problem = ""
            except DatabaseError as error:
                if not self.problem:  # once, not with every try of an outage
                    log.error("limits that servers share cannot be exchanged: %s", error.message)
                self.problem = error.message
