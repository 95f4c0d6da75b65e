"""Whose turn it is to enter, while one step has rows left for prompts. What a step admits costs time in proportion to it.

Tenants take turns by their counters. Of a tenant, preempted sequences come before new ones; of the new ones the first whose adapter is
loaded. Places and blocks are the scheduler's matter.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush

from trimtab.serve.sequence import Live
from trimtab.serve.shares import Shares

MIN_CHUNK = 128
"""Prompts enter together while each gets so many rows of a step: fewer at once finish sooner."""


class Entrance:
    """One step's admissions. waiting: each tenant's queue, which whoever enters leaves. returning: oldest arrival first. lease: whether a
    sequence's adapter is loaded, and now held for it. counters: tokens served to each tenant, by weight. left: rows of this step for each
    tenant that has to hold back. budget: rows for prompts."""

    def __init__(
        self,
        waiting: Mapping[str, Sequence[Live]],
        returning: Iterable[Live],
        lease: Callable[[Live], bool],
        counters: Mapping[str, float],
        shares: Shares,
        budget: int,
        left: Mapping[str, int],
    ):
        self._waiting, self._lease, self._counters, self._shares = waiting, lease, counters, shares
        self._budget, self._left = budget, left
        self._claims: dict[Live, int] = {}
        self._claimed, self._total = Counter[str](), 0
        self._back: dict[str, list[Live]] = {}
        for live in returning:
            if live.unsaid is None:
                self._back.setdefault(live.request.tenant, []).append(live)
        self._passed = Counter[str]()  # how many in front of each queue cannot enter: their adapters are not loaded
        self._stuck: set[str] = set()
        self._order = list[tuple[float, str]]()
        self._line_up()

    def next(self) -> Live | None:
        """Who enters next; the same one again until it has entered or its tenant is stuck."""
        while self._order:
            counter, tenant = self._order[0]
            if counter == self._counters[tenant] and self._may(tenant) and (live := self._first(tenant)) is not None:
                return live
            heappop(self._order)
        return None

    def claim(self, live: Live) -> None:
        """It takes part in this step's rows for prompts."""
        self._claims[live] = rows = min(live.remaining, MIN_CHUNK)
        self._claimed[live.request.tenant] += rows
        self._total += rows

    def entered(self, live: Live) -> None:
        """The one that was next runs now; its tenant has been charged for it."""
        tenant = live.request.tenant
        if (back := self._back.get(tenant)) and back[0] is live:
            del back[0]
        self.claim(live)
        heappush(self._order, (self._counters[tenant], tenant))

    def preempted(self, live: Live) -> None:
        """It no longer runs, so others may enter that could not, and it may come back."""
        rows = self._claims.pop(live, 0)
        self._claimed[live.request.tenant] -= rows
        self._total -= rows
        if live.unsaid is None:
            insort(self._back.setdefault(live.request.tenant, []), live, key=lambda r: r.serial)
        self._line_up()

    def stuck(self, tenant: str) -> None:
        """It has its share, and finds nothing more in this step."""
        self._stuck.add(tenant)

    def _line_up(self) -> None:
        """Everybody who may be next. Later entries with an old counter are passed over."""
        self._order = [(self._counters[t], t) for t in {*self._waiting, *self._back}]
        heapify(self._order)

    def _may(self, tenant: str) -> bool:
        """What others claim only grows until somebody is preempted, so who may not enter now may not before that."""
        mine = self._claimed[tenant]
        if tenant in self._stuck or mine >= self._left.get(tenant, mine + 1):
            return False
        return self._total < self._budget or mine < self._budget * self._shares.of(tenant)

    def _first(self, tenant: str) -> Live | None:
        if back := self._back.get(tenant):
            return back[0]
        queue = self._waiting.get(tenant, ())
        while self._passed[tenant] < len(queue):
            if self._lease(live := queue[self._passed[tenant]]):
                return live
            self._passed[tenant] += 1
        return None
