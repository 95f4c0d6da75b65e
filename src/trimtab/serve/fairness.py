"""Which tenant is next: a virtual token counter for each tenant (Sheng et al. 2023, arXiv:2401.00588).

A counter grows by the tokens served, weighted and divided by the tenant's weight. The tenant with the smallest counter is next. When a
tenant comes back after a pause, its counter is raised to the smallest counter of the active tenants, so that idle time is not saved up.
"""

from __future__ import annotations

from collections.abc import Iterable

WEIGHT_IN, WEIGHT_OUT = 1.0, 2.0
"""What a token of a prompt and a new token count: a new token costs a step, a prompt's tokens share one."""
MAX_IDLE = 4096
"""Counters of tenants that have gone are kept up to this many: a server sees more tenants than it has at once."""


class Fairness:
    """Counters of tenants. A tenant is active from its first open request to the end of its last."""

    def __init__(self) -> None:
        self.counters: dict[str, float] = {}
        self._open: dict[str, int] = {}
        self._last = 0.0

    def arrive(self, tenant: str) -> None:
        """One more open request."""
        if not self._open.get(tenant):
            floor = min((self.counters[t] for t in self._open), default=self._last)
            self.counters[tenant] = max(self.counters.get(tenant, 0.0), floor)
        self._open[tenant] = self._open.get(tenant, 0) + 1

    def leave(self, tenant: str) -> None:
        """One open request less."""
        self._open[tenant] -= 1
        if not self._open[tenant]:
            del self._open[tenant]
            self._last = self.counters[tenant]
            if len(self.counters) - len(self._open) > MAX_IDLE:
                self._drop_idle()

    def charge(self, tenant: str, weight: float, *, tokens_in: int = 0, tokens_out: int = 0) -> None:
        """Tokens served to an active tenant. weight: its share; twice the weight gets twice the tokens."""
        self.counters[tenant] += (WEIGHT_IN * tokens_in + WEIGHT_OUT * tokens_out) / weight

    def order(self, tenants: Iterable[str]) -> list[str]:
        """Active tenants, who is next first; equal ones by name, so that the order is the same each time."""
        return sorted(tenants, key=lambda t: (self.counters[t], t))

    def _drop_idle(self) -> None:
        """Those below every active counter would be lifted anyway."""
        floor = min((self.counters[t] for t in self._open), default=self._last)
        self.counters = {t: c for t, c in self.counters.items() if t in self._open or c > floor}
