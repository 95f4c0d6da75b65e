"""Who waits for a place: a queue for each tenant, and beside them those whose adapters are being read.

The requests of a tenant run in order, except that a request whose adapter is not loaded yet lets others pass. Once it is loaded, the
request is first in its queue again. Places, blocks and rows are not known here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from trimtab.errors import TrimtabError
from trimtab.serve.fairness import Fairness
from trimtab.serve.request import head_problem
from trimtab.serve.residency import Residency
from trimtab.serve.sequence import Live

LOOKAHEAD = 16
"""Adapters that are loading, or loaded for requests that wait: others are not read, but for one of each tenant that has none."""
LOOKAHEAD_PART = 0.5
"""Part of the adapters' budget that these may take, so that they leave room for those of other tenants."""


class Queues:
    """waiting: by tenant, first come first; none is empty. loading: by digest. leased: those that wait and hold a lease. refused: those
    that can never run, until they are removed. max_length: tokens of one sequence, virtual ones included."""

    def __init__(self, residency: Residency, fairness: Fairness, max_length: int):
        self.residency, self.fairness, self.max_length = residency, fairness, max_length
        self.waiting: dict[str, deque[Live]] = {}
        self.loading: dict[str, list[Live]] = {}
        self.leased: set[Live] = set()
        self.refused: dict[Live, TrimtabError] = {}

    @property
    def loading_count(self) -> int:
        return sum(map(len, self.loading.values()))

    def heads(self) -> list[Live]:
        """The first of each queue."""
        return [queue[0] for queue in self.waiting.values()]

    def ready(self, tenant: str) -> Iterator[Live]:
        """Those of a tenant whose adapters need not be read first."""
        return (live for live in self.waiting[tenant] if not self.must_load(live))

    def add(self, live: Live) -> None:
        """A new request, at the end of its tenant's queue."""
        live.where = "waiting"
        self.waiting.setdefault(live.request.tenant, deque()).append(live)

    def remove(self, live: Live) -> None:
        """It waits no longer: it runs now, or has ended."""
        if live.where == "loading":
            self._leave_loading(live)
        else:
            self._leave_queue(live)
        self.leased.discard(live)
        self.refused.pop(live, None)

    def lease(self, live: Live) -> bool:
        """Whether its adapter is in memory, and now held for it."""
        if live.digest is not None and live.resident is None:
            resident = self.residency.lease(live.digest)
            if resident is None:
                return False
            live.begin_with(resident)
            self.leased.add(live)
        if problem := head_problem(None if live.resident is None else live.resident.head, live.request.pooling):
            self.refused[live] = problem
        if live.total > self.max_length:
            self.refused[live] = TrimtabError(
                f"the prompt has {len(live.tokens)} tokens and its adapter {live.virtual} virtual ones, {live.total} in all;"
                f" at most {self.max_length} fit",
                fix="shorten the prompt",
            )
        return live not in self.refused

    def must_load(self, live: Live) -> bool:
        """Whether its adapter has to be read first."""
        return live.digest is not None and live.resident is None and not self.residency.holds(live.digest)

    def start_loads(self) -> None:
        """Have the adapters read of those who are next, a tenant after the other. At most LOOKAHEAD adapters, and at most a part of the
        budget, so that a long queue does not turn memory over. But each tenant always has one, whatever others have."""
        tenants = self.fairness.order(live.request.tenant for live in self.heads() if self.must_load(live))
        if not tenants:
            return
        ahead: dict[str, set[str]] = {}
        for live in [*self.leased, *(live for waiting in self.loading.values() for live in waiting)]:
            assert live.digest is not None
            ahead.setdefault(live.request.tenant, set()).add(live.digest)
        while tenants:
            tenants = [t for t in tenants if self._start_load(t, ahead)]

    def take_loaded(self) -> None:
        """Take up loads that have ended: who waited for them is next in its tenant's queue."""
        ready: list[Live] = []
        for ended in self.residency.collect(self.loading):
            for live in self.loading.get(ended.digest, ()):
                if ended.error is not None:
                    self.refused[live] = ended.error
                elif self.lease(live):
                    ready.append(live)
        self.residency.settle()
        for live in sorted(ready, key=lambda r: -r.serial):
            self._leave_loading(live)
            live.where = "waiting"
            self.waiting.setdefault(live.request.tenant, deque()).appendleft(live)

    def _start_load(self, tenant: str, ahead: dict[str, set[str]]) -> bool:
        """Whether the adapter of the tenant's next is being read now. ahead: adapters that are loading or held by those who wait."""
        if tenant not in self.waiting or not self.must_load(live := self.waiting[tenant][0]):
            return False
        assert live.digest is not None and live.request.adapter is not None
        all_ahead = set[str]().union(*ahead.values())
        room = LOOKAHEAD_PART * self.residency.budget_bytes
        enough = len(all_ahead) >= LOOKAHEAD or self.residency.bytes_of(all_ahead) >= room
        if live.digest not in all_ahead and enough and ahead.get(tenant):
            return False
        ahead.setdefault(tenant, set()).add(live.digest)
        self._leave_queue(live)
        live.where = "loading"
        self.loading.setdefault(live.digest, []).append(live)
        self.residency.load(live.request.adapter)
        return True

    def _leave_queue(self, live: Live) -> None:
        queue = self.waiting[live.request.tenant]
        queue.remove(live)
        if not queue:
            del self.waiting[live.request.tenant]

    def _leave_loading(self, live: Live) -> None:
        assert live.digest is not None
        self.loading[live.digest].remove(live)
        if not self.loading[live.digest]:
            del self.loading[live.digest]
