"""Each tenant's share of running sequences and KV blocks, by weight, among the tenants that want some; and which sequence is preempted for
another tenant.

A tenant may hold more than its share while no other tenant wants it, and to catch up in tokens. A tenant that has less than its share, and
not more tokens, gets room from the tenant that is most above its share: that tenant's newest sequence is preempted. A tenant's oldest
sequence is never preempted for others, so every tenant makes progress.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from trimtab.serve.sequence import Live


class Shares:
    """running: oldest arrival first. wanting: one at least of each tenant that waits. places, blocks: how many there are."""

    def __init__(self, running: Sequence[Live], wanting: Iterable[Live], *, places: int, blocks: int):
        self.places, self.blocks = places, blocks
        self._running: dict[str, list[Live]] = {}  # by tenant, oldest first
        for live in running:
            self._running.setdefault(live.request.tenant, []).append(live)
        weights = {live.request.tenant: live.request.weight for live in [*running, *wanting]}
        total = sum(weights.values())
        self._share = {tenant: weight / total for tenant, weight in weights.items()}

    def of(self, tenant: str) -> float:
        """0 to 1; 1 if no other tenant wants anything."""
        return self._share[tenant]

    def has_room(self, tenant: str) -> bool:
        """Whether one sequence more stays within its share of the places; one is always within."""
        return len(self._held(tenant)) + 1 <= max(1.0, self.places * self.of(tenant))

    def to_make_way(self, tenant: str, blocks: int, counters: Mapping[str, float]) -> Live | None:
        """The sequence that is preempted so that this tenant gets to run one, or (blocks above 0) gets so many blocks. counters: tokens
        served to each tenant, by weight.

        None if the tenant has its share already, or if no other tenant has both more than its share and as many tokens. A sequence that
        waits for its grammar is preempted whatever its tenant's tokens, since it holds a place without using it.
        """
        if not self.has_room(tenant) or self._blocks(tenant) + blocks > self.blocks * self.of(tenant):
            return None
        others = [t for t in self._running if t != tenant]
        part = {t: max(self._places_part(t), self._blocks_part(t) if blocks else 0.0) for t in others}
        gone = self._most({t: p for t, p in part.items() if counters[t] >= counters[tenant]})
        if gone is None:
            over = [t for t, p in part.items() if p > self.of(t)]
            gone = next((live for t in over for live in reversed(self._running[t][1:]) if live.unsaid is not None), None)
        return gone

    def newest_of_the_greediest(self) -> Live | None:
        """The newest sequence of the tenant that is over its share of the blocks by most; None if nobody else wants any."""
        return self._most({t: self._blocks_part(t) for t in self._running}) if len(self._running) > 1 else None

    def _most(self, part: Mapping[str, float]) -> Live | None:
        """part: what each tenant holds of all there is."""
        over = {t: part[t] / self.of(t) for t in part if len(self._running[t]) > 1}
        most = max(over, key=lambda t: (over[t], t), default=None)
        return self._running[most][-1] if most is not None and over[most] > 1.0 else None

    def entered(self, live: Live) -> None:
        self._running.setdefault(live.request.tenant, []).append(live)

    def left(self, live: Live) -> None:
        self._running[live.request.tenant].remove(live)

    def _held(self, tenant: str) -> list[Live]:
        return self._running.get(tenant, [])

    def _blocks(self, tenant: str) -> int:
        return sum(len(live.blocks) for live in self._held(tenant))

    def _places_part(self, tenant: str) -> float:
        return len(self._held(tenant)) / self.places

    def _blocks_part(self, tenant: str) -> float:
        return self._blocks(tenant) / self.blocks
