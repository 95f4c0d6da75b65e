"""Which requests are admitted: a tenant's answers at a time, its tokens a minute, and the number of answers of the whole server.

This is decided before a prompt is tokenized, in microseconds, from counters in memory, so a refusal costs next to nothing. It knows tenants
and numbers, but no prompts, adapters or engine. Servers that share tenants hold parts of their limits (`leases.py`).
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, get_args

from trimtab.errors import LimitError, OverloadedError, TrimtabError
from trimtab.serve.leases import Leases, OutOfTokens, Unshared
from trimtab.serve.places import FIRST_GUESS, MEMORY, Answer, Places
from trimtab.serve.tenant import LOCAL, Tenant

DEFAULT_MAX_OPEN = 256
LEAST_WAIT, MOST_WAIT = 0.05, 60.0
"""Seconds: bounds of the Retry-After that a refusal names."""
FIRST_TOKENS = 256.0
"""Tokens of an answer, prompt included, before any has ended."""
FREE_PARTS = 4
"""A tenant holds at most this many times the answers that then remain free: four fifths if it is alone, four ninths each if there are two.
So there is room for the next tenant."""
Reason = Literal["concurrency", "tokens", "full", "draining", "database"]


@dataclass
class _Bucket:
    """Tokens that a tenant may still use: fills at tokens_per_minute / 60 a second up to tokens_per_minute, which it starts with."""

    level: float
    at: float

    def fill(self, per_minute: int, now: float) -> None:
        self.level = min(float(per_minute), self.level + (now - self.at) * per_minute / 60)
        self.at = now


@dataclass
class _Holding:
    """What one tenant has open."""

    open: int = 0
    weight: float = 1.0
    bucket: _Bucket | None = None
    seconds: float = FIRST_GUESS
    tokens: float = FIRST_TOKENS


@dataclass
class Ticket:
    """The right to run n answers. Close it exactly when they are over, however they ended; closing again changes nothing."""

    tenant: Tenant
    n: int
    estimate: float
    opened: float
    answers: tuple[Answer, ...]
    _close: Callable[[Ticket, int], None] = field(repr=False)
    closed: bool = False

    def close(self, usage_tokens: int = 0) -> None:
        """usage_tokens: prompt and completion tokens that were really used; what was charged too much at the start is given back."""
        self._close(self, usage_tokens)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Admission:
    """Counters of all tenants. max_open: answers that the server holds at a time, queued ones included. places: those of them that are
    computed at a time, by default all. max_wait: seconds that an answer may have to wait for a place, as far as can be told when it comes;
    None: any. leases: parts of the tenants' limits, where they are shared. Safe for any number of threads."""

    def __init__(
        self,
        max_open: int = DEFAULT_MAX_OPEN,
        clock: Callable[[], float] = time.monotonic,
        *,
        places: int | None = None,
        max_wait: float | None = None,
        leases: Leases | None = None,
    ):
        if max_open < 1:
            raise TrimtabError(f"max_open = {max_open}: must be at least 1")
        self.max_open, self.max_wait, self._clock, self._places = max_open, max_wait, clock, Places(places or max_open)
        self.rejects: Counter[Reason] = Counter(dict.fromkeys(get_args(Reason), 0))
        """How many requests were refused, by reason, since the start. Each reason is there, so that other threads may go through them."""
        self._lock = threading.Lock()
        self.leases = leases
        self._holdings: dict[str, _Holding] = {}
        self._open, self._draining = 0, False

    @property
    def open(self) -> int:
        """Answers that have a ticket."""
        return self._open

    def admit(self, tenant: Tenant, n: int = 1, estimate: int | None = None) -> Ticket:
        """A ticket for n answers. estimate: prompt and completion tokens that they will use, charged now and corrected when the ticket is
        closed; by default n times what the tenant's answers have used of late.

        LimitError if the tenant is over its own limits, OverloadedError if the server is full or drains, both with retry_after.
        TrimtabError if n answers can never run at a time under these limits. A tenant with any tokens left may start a request, however
        large: so its tokens are overdrawn by one request at most where no estimate is too low.
        """
        now = self._clock()
        with self._lock:
            holding = self._holdings.get(tenant.id) or _Holding()
            self._refuse_if_over(tenant, holding, n, now, known=False)
            charged = n * holding.tokens if estimate is None else float(estimate)
            if self.leases is not None:
                self.leases.take(tenant, n, charged)
            self._holdings[tenant.id] = holding
            holding.open += n
            holding.weight = tenant.weight
            self._open += n
            if holding.bucket is not None:
                holding.bucket.level -= charged
            return Ticket(tenant, n, charged, now, self._places.enter(now, n), self._close)

    @property
    def full(self) -> bool:
        """Whether the server has no room for a single answer more, but perhaps for one of a tenant that has less than its share."""
        with self._lock:
            late = self.max_wait is not None and self._places.wait(self._clock(), 1) > self.max_wait
            return late or self._open + 1 > self.max_open

    def most(self, tenant: Tenant) -> int:
        """Answers that a request of this tenant may have at most."""
        return min(self.max_open, tenant.max_concurrent or self.max_open)

    def refuse_if_over(self, tenant: Tenant) -> None:
        """What `admit` would raise for one answer, without letting it in. Where limits are shared, only if it is over the limits
        themselves: `admit` is called after this server's part has been made larger."""
        with self._lock:
            self._refuse_if_over(tenant, self._holdings.get(tenant.id) or _Holding(), 1, self._clock(), known=True)

    def drain(self) -> None:
        """From now on no request is admitted. Running ones are not touched."""
        self._draining = True

    def tokens_left(self, tenant: Tenant) -> float | None:
        """What the tenant may use at this moment, below 0 where it is overdrawn; None if it has no limit. Of shared limits: this server's
        part."""
        if tenant.tokens_per_minute is None:
            return None
        if self.leases is not None:
            return self.leases.tokens_left(tenant)
        with self._lock:
            holding = self._holdings.get(tenant.id)
            if holding is None or holding.bucket is None:
                return float(tenant.tokens_per_minute)
            holding.bucket.fill(tenant.tokens_per_minute, self._clock())
            return holding.bucket.level

    def _refuse_if_over(self, tenant: Tenant, holding: _Holding, n: int, now: float, *, known: bool) -> None:
        """The tenant's own limits are checked first, so that it hears of them even while the server is full."""
        bound = self.most(tenant)
        if not 1 <= n <= bound:
            raise TrimtabError(f"n = {n}: must be from 1 to {bound} here", fix="ask for fewer answers at a time")
        if self._draining:
            raise self._overloaded("draining", "the server is shutting down", self._places.seconds)
        if self.leases is None:
            self._refuse_if_over_alone(tenant, holding, n, now)
        else:
            self._refuse_if_over_shared(tenant, n, known)
        late = self.max_wait is not None and self._places.wait(now, n) > self.max_wait
        if self._open + n > self.max_open or (late and not self._within_share(tenant, holding, n)):
            raise self._overloaded("full", "the server is full", self._places.wait(now, n))
        self._refuse_if_it_leaves_no_room(tenant, holding, n)

    def _refuse_if_over_alone(self, tenant: Tenant, holding: _Holding, n: int, now: float) -> None:
        if tenant.max_concurrent is not None and holding.open + n > tenant.max_concurrent:
            self.rejects["concurrency"] += 1
            raise LimitError(
                f"{holding.open} answers are under way and {n} more would exceed this tenant's limit of {tenant.max_concurrent}",
                fix="wait until one has ended",
                retry_after=_wait(holding.seconds, holding.open),
            )
        self._refuse_if_out_of_tokens(tenant, holding, now)

    def _refuse_if_over_shared(self, tenant: Tenant, n: int, known: bool) -> None:
        assert self.leases is not None
        try:
            self.leases.refuse_if_over(tenant, n, known=known)
        except LimitError as error:
            self.rejects["database" if isinstance(error, Unshared) else "tokens" if isinstance(error, OutOfTokens) else "concurrency"] += 1
            raise

    def _refuse_if_it_leaves_no_room(self, tenant: Tenant, holding: _Holding, n: int) -> None:
        """Does not apply to a local server, which has no other tenants, nor to a tenant without answers, which may come as long as there is
        room."""
        most = FREE_PARTS * (self.max_open - self._open - n)
        if tenant.id != LOCAL.id and holding.open and holding.open + n > max(1, most):
            self.rejects["concurrency"] += 1
            raise LimitError(
                f"{holding.open} answers are under way; the rest of the server's room is kept for other tenants",
                fix="wait until one has ended",
                retry_after=_wait(holding.seconds, holding.open),
            )

    def _within_share(self, tenant: Tenant, holding: _Holding, n: int) -> bool:
        """Whether the answers would be computed at once although others wait: the scheduler preempts for a tenant that has less than its
        share."""
        others = sum(h.weight for h in self._holdings.values() if h.open and h is not holding)
        return bool(others) and holding.open + n <= max(1.0, self._places.count * tenant.weight / (others + tenant.weight))

    def _refuse_if_out_of_tokens(self, tenant: Tenant, holding: _Holding, now: float) -> None:
        if tenant.tokens_per_minute is None:
            holding.bucket = None
            return
        if holding.bucket is None:
            holding.bucket = _Bucket(float(tenant.tokens_per_minute), now)
        holding.bucket.fill(tenant.tokens_per_minute, now)
        if holding.bucket.level < 1:
            self.rejects["tokens"] += 1
            raise LimitError(
                f"this tenant's {tenant.tokens_per_minute} tokens a minute are used up",
                fix="wait, or ask for a higher limit",
                retry_after=max(LEAST_WAIT, (1 - holding.bucket.level) * 60 / tenant.tokens_per_minute),
            )

    def _overloaded(self, reason: Reason, message: str, wait: float) -> OverloadedError:
        self.rejects[reason] += 1
        return OverloadedError(message, fix="try again later", retry_after=min(MOST_WAIT, max(LEAST_WAIT, wait)))

    def _close(self, ticket: Ticket, tokens: int) -> None:
        now = self._clock()
        with self._lock:
            if ticket.closed:
                return
            ticket.closed = True
            holding = self._holdings[ticket.tenant.id]
            holding.open -= ticket.n
            self._open -= ticket.n
            held = now - ticket.opened
            holding.seconds += MEMORY * (held - holding.seconds)
            holding.tokens += MEMORY * (tokens / ticket.n - holding.tokens)
            self._places.leave(now, ticket.answers)
            if holding.bucket is not None and ticket.tenant.tokens_per_minute is not None:
                holding.bucket.fill(ticket.tenant.tokens_per_minute, now)
                holding.bucket.level += ticket.estimate - tokens
            if self.leases is not None:
                self.leases.give(ticket.tenant, ticket.n, ticket.estimate - tokens)


def _wait(seconds: float, open_answers: int) -> float:
    """When the next of so many answers should end, if one takes so many seconds and they began at all times."""
    return min(MOST_WAIT, max(LEAST_WAIT, seconds / max(1, open_answers)))
