"""Decides what runs in a step: continuous batching, with chunked prefill over a paged KV cache.

Sequences that decode come first, then prompts, in chunks, up to a number of rows. Tenants take turns by their counters. The requests of a
tenant run in order, except that a request whose adapter is not loaded yet lets others pass. When KV blocks run out, the newest sequence is
preempted: it gives up its blocks and is computed again later. The newest sequence of a tenant that holds more than its share is preempted
as well, as soon as a tenant with less than its share has a request (`shares.py`). So no tenant waits for a whole answer of another.
Where tenants compete, a tenant with many rows gets some of them in each step, in turns (`turns.py`). Forwards, sampling and sinks are not
known here.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections import Counter, deque
from dataclasses import dataclass

from trimtab.errors import TrimtabError
from trimtab.serve.blocks import BlockPool
from trimtab.serve.config import EngineConfig
from trimtab.serve.entrance import Entrance
from trimtab.serve.fairness import Fairness
from trimtab.serve.residency import Residency
from trimtab.serve.sequence import Live
from trimtab.serve.shares import Shares
from trimtab.serve.turns import ELSEWHERE, ON_CPU, RECENT_S, row_limits

LOOKAHEAD = 16
"""Adapters that are loading, or loaded for requests that wait: others are not read, but for one of each tenant that has none."""
LOOKAHEAD_PART = 0.5
"""Part of the adapters' budget that these may take, so that they leave room for those of other tenants."""


@dataclass(frozen=True, slots=True)
class Work:
    """`rows` tokens of a sequence that enter this step."""

    live: Live
    rows: int


class Scheduler:
    """Queues, and the sequences that run. max_length: tokens of one sequence, virtual ones included."""

    def __init__(self, config: EngineConfig, pool: BlockPool, residency: Residency, max_length: int):
        self.config, self.pool, self.residency, self.max_length = config, pool, residency, max_length
        self.bounds = ON_CPU if residency.base.device.type == "cpu" else ELSEWHERE
        self.fairness = Fairness()
        self.running: list[Live] = []  # oldest arrival first
        self.loading: dict[str, list[Live]] = {}
        self.preemptions = self.query_tokens = self.hit_tokens = self._steps = 0
        self._waiting: dict[str, deque[Live]] = {}
        self._returning: list[Live] = []  # oldest arrival first
        self._leased: set[Live] = set()  # those that wait and hold a lease
        self._seen: dict[str, float] = {}  # when a tenant was last there
        self._promised = 0  # blocks that those who run will still take, while others enter
        self.refused: dict[Live, TrimtabError] = {}  # those that can never run, until they are removed

    @property
    def waiting_count(self) -> int:
        return sum(map(len, self._waiting.values())) + len(self._returning)

    @property
    def loading_count(self) -> int:
        return sum(map(len, self.loading.values()))

    # ---- coming and going ----

    def add(self, live: Live) -> None:
        """A new request, at the end of its tenant's queue."""
        live.where = "waiting"
        self.fairness.arrive(live.request.tenant)
        self._waiting.setdefault(live.request.tenant, deque()).append(live)

    def remove(self, live: Live) -> None:
        """Out, wherever it is; what it holds is free again."""
        if live.where == "new":
            live.where = "ended"
            return
        if live.where == "waiting":
            self._leave_queue(live)
        elif live.where == "loading":
            self._leave_loading(live)
        elif live.where == "returning":
            self._returning.remove(live)
        else:
            self.running.remove(live)
        live.where = "ended"
        self.refused.pop(live, None)
        self._give_back(live)
        if live.resident is not None:
            self.residency.release(live.resident)
            live.resident = None
        self.fairness.leave(live.request.tenant)

    def _take_loaded(self) -> None:
        """Take up loads that have ended: who waited for them is next in its tenant's queue."""
        ready: list[Live] = []
        for ended in self.residency.collect(self.loading):
            for live in self.loading.get(ended.digest, ()):
                if ended.error is not None:
                    self.refused[live] = ended.error
                elif self._lease(live):
                    ready.append(live)
        self.residency.settle()
        for live in sorted(ready, key=lambda r: -r.serial):
            self._leave_loading(live)
            live.where = "waiting"
            self._waiting.setdefault(live.request.tenant, deque()).appendleft(live)

    def _lease(self, live: Live) -> bool:
        """Whether its adapter is in memory, and now held for it."""
        if live.digest is not None and live.resident is None:
            live.resident = self.residency.lease(live.digest)
            if live.resident is None:
                return False
            live.virtual = live.resident.packed.virtual_tokens
            self._leased.add(live)
        if live.total > self.max_length:
            self.refused[live] = TrimtabError(
                f"the prompt has {len(live.tokens)} tokens and its adapter {live.virtual} virtual ones, {live.total} in all;"
                f" at most {self.max_length} fit",
                fix="shorten the prompt",
            )
        return live not in self.refused

    def _leave_queue(self, live: Live) -> None:
        queue = self._waiting[live.request.tenant]
        queue.remove(live)
        if not queue:
            del self._waiting[live.request.tenant]
        self._leased.discard(live)

    def _leave_loading(self, live: Live) -> None:
        assert live.digest is not None
        self.loading[live.digest].remove(live)
        if not self.loading[live.digest]:
            del self.loading[live.digest]

    # ---- a step ----

    def schedule(self, now: float) -> list[Work]:
        """What runs next: decodes, then chunks of prompts. Sequences that enter get their blocks."""
        self._start_loads()
        self._take_loaded()
        rows: dict[Live, int] = {}
        prefills = [live for live in self.running if live.remaining > 1 and live.unsaid is None]
        left = self._rows_left(prefills)
        with_prompts = {live.request.tenant for live in [*prefills, *self._returning]} | self._waiting.keys()
        self._decode(rows, left, {tenant: n // 2 for tenant, n in left.items() if tenant in with_prompts})
        budget = self._prompt_rows(self.config.max_step_rows - len(rows), now)
        self._admit(prefills, budget, rows, left, now)
        self._share(prefills, budget, rows, left)
        if left:
            self._decode(rows, left, {})
        self._steps += 1
        return [Work(live, n) for live, n in rows.items()]

    def _rows_left(self, prefills: list[Live]) -> dict[str, int]:
        """Rows of this step for each tenant; empty if none has to hold back for others."""
        wanted: dict[str, int] = {}
        weights: dict[str, float] = {}
        next_ones = [queue[0] for queue in self._waiting.values() if not self._must_load(queue[0])]
        decoding = (live for live in self.running if live.remaining == 1 and live.unsaid is None)
        for live in [*prefills, *next_ones, *self._returning, *decoding]:
            tenant, most = live.request.tenant, self.config.max_step_rows
            wanted[tenant] = min(most, wanted.get(tenant, 0) + live.remaining)
            weights[tenant] = live.request.weight
        return row_limits(wanted, weights, self.bounds.read_rows)

    def _prompt_rows(self, room: int, now: float) -> int:
        """Rows for prompts in this step, of so many that are left."""
        there = {live.request.tenant for live in [*self.running, *self._returning]} | self._waiting.keys()
        self._seen = {t: at for t, at in self._seen.items() if now - at < RECENT_S} | dict.fromkeys(there, now)
        return min(room, self.bounds.prompt_rows) if len(self._seen) > 1 else room

    def _decode(self, rows: dict[Live, int], left: dict[str, int], kept: dict[str, int]) -> None:
        """A row for each sequence that decodes, as far as its tenant has more left than are kept (for its prompts); who has waited longest
        for one first."""
        for live in sorted(self.running, key=lambda r: (r.ran, r.serial)) if left else list(self.running):
            tenant = live.request.tenant
            if live.remaining > 1 or live.unsaid is not None or live in rows or left.get(tenant, 1) <= kept.get(tenant, 0):
                continue
            if live.where == "running" and self._room(live, 1, rows):
                rows[live] = 1
                _take(left, tenant, 1)

    def _share(self, prefills: list[Live], budget: int, rows: dict[Live, int], left: dict[str, int]) -> None:
        """Rows for prompts: the same for each, and what short ones leave to the longer ones, so that a long prompt holds up nobody. A
        tenant that has to hold back divides its own in the same way."""
        others, own = len(prefills), Counter(live.request.tenant for live in prefills)
        for live in sorted(prefills, key=lambda p: (p.remaining, p.serial)):
            tenant = live.request.tenant
            most = -(-left[tenant] // own[tenant]) if tenant in left else budget
            chunk = min(live.remaining, budget // others, most)
            others -= 1
            own[tenant] -= 1
            if live.where == "running" and chunk and (chunk := self._room(live, chunk, rows)):
                rows[live] = chunk
                budget -= chunk
                _take(left, tenant, chunk)

    def _room(self, live: Live, chunk: int, rows: dict[Live, int]) -> int:
        """Blocks for `chunk` more tokens of a running sequence, taken from others if need be; how many of them have room."""
        size = self.config.block_size
        missing = -(-(live.past + chunk) // size) - len(live.blocks)
        while missing > self.pool.available and (gone := self._gives_way(live)) is not None:
            rows.pop(gone, None)
            self._preempt(gone)
        taken = min(max(missing, 0), self.pool.available)
        live.blocks.extend(self.pool.take(taken))
        return min(chunk, len(live.blocks) * size - live.past)

    def _gives_way(self, live: Live) -> Live | None:
        """Which sequence gives up its blocks for this one: the newest of a tenant that holds more than its share of them, else the newest
        of all, if it is newer than this one."""
        shares = Shares(self.running, [], places=self.config.max_running, blocks=self.pool.total)
        gone = shares.newest_of_the_greediest()
        if gone is None:
            gone = self.running[-1] if self.running[-1].serial > live.serial else None
        return None if gone is live else gone

    def _preempt(self, live: Live) -> None:
        self.preemptions += 1
        self.running.remove(live)
        self._give_back(live)
        live.where = "returning"
        insort(self._returning, live, key=lambda r: r.serial)

    def _give_back(self, live: Live) -> None:
        self.pool.release(live.blocks)
        live.blocks, live.past, live.published, live.unwritten = array("i"), 0, 0, False

    # ---- entering ----

    def _start_loads(self) -> None:
        """Have the adapters read of those who are next, a tenant after the other. At most LOOKAHEAD adapters, and at most a part of the
        budget, so that a long queue does not turn memory over. But each tenant always has one, whatever others have."""
        tenants = self.fairness.order(t for t, queue in self._waiting.items() if self._must_load(queue[0]))
        if not tenants:
            return
        ahead: dict[str, set[str]] = {}
        for live in [*self._leased, *(live for waiting in self.loading.values() for live in waiting)]:
            assert live.digest is not None
            ahead.setdefault(live.request.tenant, set()).add(live.digest)
        while tenants:
            tenants = [t for t in tenants if self._start_load(t, ahead)]

    def _start_load(self, tenant: str, ahead: dict[str, set[str]]) -> bool:
        """Whether the adapter of the tenant's next is being read now. ahead: adapters that are loading or held by those who wait."""
        if tenant not in self._waiting or not self._must_load(live := self._waiting[tenant][0]):
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

    def _must_load(self, live: Live) -> bool:
        return live.digest is not None and live.resident is None and not self.residency.holds(live.digest)

    def _admit(self, prefills: list[Live], budget: int, rows: dict[Live, int], left: dict[str, int], now: float) -> None:
        """Let sequences in while there is a place, rows worth a chunk, and blocks for the whole prompt. For a tenant that has less than its
        share, who has more makes way."""
        if not self._waiting and not self._returning:
            return
        heads = (queue[0] for queue in self._waiting.values())
        shares = Shares(self.running, [*self._returning, *heads], places=self.config.max_running, blocks=self.pool.total)
        entrance = Entrance(self._waiting, self._returning, self._lease, self.fairness.counters, shares, budget, left)
        for prompt in prefills:
            entrance.claim(prompt)
        self._promised = sum(map(self._owed, self.running))
        while (live := entrance.next()) is not None:
            if self._get_in(live, shares, rows, entrance):
                if live.admitted is None:
                    live.admitted = now
                    tokens = len(live.request.prompt) - live.cached
                    self.fairness.charge(live.request.tenant, live.request.weight, tokens_in=tokens)
                shares.entered(live)
                entrance.entered(live)
                prefills.append(live)
            elif shares.has_room(live.request.tenant):
                break  # what comes free is for this one
            else:
                entrance.stuck(live.request.tenant)
        entrance.close()

    def _get_in(self, live: Live, shares: Shares, rows: dict[Live, int], entrance: Entrance) -> bool:
        """Whether it runs now, after others were preempted if needed."""
        tenant, size = live.request.tenant, self.config.block_size
        while (full := len(self.running) >= self.config.max_running) or not self._enter(live):
            gone = shares.to_make_way(tenant, 0 if full else -(-live.total // size), self.fairness.counters)
            if gone is None:
                return False
            rows.pop(gone, None)
            self._promised -= self._owed(gone)
            self._preempt(gone)
            entrance.preempted(gone)
            shares.left(gone)
        return True

    def _owed(self, live: Live) -> int:
        """Blocks that a running sequence will still take: for its prompt, and one for what it writes."""
        return -(-live.total // self.config.block_size) - len(live.blocks) + 1

    def _enter(self, live: Live) -> bool:
        """Whether there was room: then it runs, with the blocks that are known already, and with those of its virtual tokens."""
        size, pool = self.config.block_size, self.pool
        known = pool.find(live.key(i, size) for i in range((live.total - 1) // size)) if self.config.prefix_cache else []
        free = pool.available - sum(not pool.held(b) for b in known)
        if free < -(-live.total // size) - len(known) + self._promised:
            return False
        if live.where == "returning":
            self._returning.remove(live)
        else:
            self._leave_queue(live)
        live.where = "running"
        insort(self.running, live, key=lambda r: r.serial)
        pool.share(known)
        live.blocks, live.past, live.published = array("i", known), len(known) * size, len(known)
        if live.past < live.virtual:
            live.past, live.unwritten = live.virtual, True
            live.blocks.extend(pool.take(-(-live.virtual // size) - len(known)))
        self._promised += self._owed(live)
        if live.admitted is None:
            live.cached = max(0, len(known) * size - live.virtual)
            self.query_tokens += len(live.tokens)
            self.hit_tokens += live.cached
        return True

    def computed(self, work: Work) -> None:
        """The rows have run: what they filled can be found by others from now on."""
        live, size = work.live, self.config.block_size
        live.ran = self._steps
        live.past += work.rows
        if self.config.prefix_cache:
            while (live.published + 1) * size <= live.past:
                self.pool.publish(live.blocks[live.published], live.key(live.published, size), live.digest)
                live.published += 1


def _take(left: dict[str, int], tenant: str, rows: int) -> None:
    if tenant in left:
        left[tenant] -= rows
