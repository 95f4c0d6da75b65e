"""Decides what runs in a step: continuous batching, with chunked prefill over a paged KV cache.

Sequences that decode come first, then prompts, in chunks, up to a number of rows. Requests wait in `queues.py`; `entrance.py` says who is
next. When KV blocks run out, the newest sequence is preempted: it gives up its blocks and is computed again later. The newest sequence of a
tenant that holds more than its share is preempted as well, as soon as a tenant with less than its share has a request (`shares.py`). So no
tenant waits for a whole answer of another. Where tenants compete, a tenant with many rows gets some of them in each step, in turns
(`turns.py`). Forwards, sampling and sinks are not known here.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from math import inf

from trimtab.serve.blocks import BlockPool
from trimtab.serve.config import EngineConfig
from trimtab.serve.entrance import Entrance
from trimtab.serve.fairness import Fairness
from trimtab.serve.queues import Queues
from trimtab.serve.residency import Residency
from trimtab.serve.sequence import Live
from trimtab.serve.shares import Shares
from trimtab.serve.step_cost import StepCost
from trimtab.serve.turns import ELSEWHERE, LATELY_S, ON_CPU, RECENT_S, row_limits


@dataclass(frozen=True, slots=True)
class Work:
    """`rows` tokens of a sequence that enter this step, and drafts of those that may follow."""

    live: Live
    rows: int
    drafts: Sequence[int] = ()


PAYS = 1.05
"""How much more a step with drafts is to give, since what it gives is estimated, and since drafts' logits take time too."""


class Scheduler:
    """The queues, and the sequences that run. max_length: tokens of one sequence, virtual ones included. step_cost: drafts are made by it;
    None: none are."""

    def __init__(self, config: EngineConfig, pool: BlockPool, residency: Residency, max_length: int, step_cost: StepCost | None = None):
        self.step_cost = step_cost
        self.config, self.pool, self.residency, self.max_length = config, pool, residency, max_length
        self.bounds = ON_CPU if residency.base.device.type == "cpu" else ELSEWHERE
        self.fairness = Fairness()
        self.queues = Queues(residency, self.fairness, max_length)
        self.running: list[Live] = []  # oldest arrival first
        self.preemptions = self.drafted = self.query_tokens = self.hit_tokens = self._steps = 0
        self._returning: list[Live] = []  # oldest arrival first
        self._seen: dict[str, float] = {}  # when the two tenants were last there who were so last
        self._promised = 0  # blocks that those who run will still take, while others enter

    @property
    def waiting_count(self) -> int:
        return sum(map(len, self.queues.waiting.values())) + len(self._returning)

    # ---- coming and going ----

    def add(self, live: Live) -> None:
        """A new request, at the end of its tenant's queue."""
        self.fairness.arrive(live.request.tenant)
        self.queues.add(live)

    def remove(self, live: Live) -> None:
        """Out, wherever it is; what it holds is free again."""
        if live.where == "new":
            live.where = "ended"
            return
        if live.where in ("waiting", "loading"):
            self.queues.remove(live)
        elif live.where == "returning":
            self._returning.remove(live)
        else:
            self.running.remove(live)
        live.where = "ended"
        self._give_back(live)
        if live.resident is not None:
            self.residency.release(live.resident)
            live.resident = None
        self.fairness.leave(live.request.tenant)

    # ---- a step ----

    def schedule(self, now: float) -> list[Work]:
        """What runs next: decodes, then chunks of prompts. Sequences that enter get their blocks."""
        self.queues.start_loads()
        self.queues.take_loaded()
        rows: dict[Live, int] = {}
        prefills = [live for live in self.running if live.remaining > 1 and live.unsaid is None]
        left = self._rows_left(prefills, now)
        with_prompts = {live.request.tenant for live in [*prefills, *self._returning]} | self.queues.waiting.keys()
        self._decode(rows, left, {tenant: n // 2 for tenant, n in left.items() if tenant in with_prompts})
        budget = self.config.max_step_rows - len(rows)
        self._admit(prefills, budget, rows, left, now)
        self._share(prefills, budget, rows, left)
        if left:
            self._decode(rows, left, {})
        self._steps += 1
        drafts = {} if self.step_cost is None else self._speculate(self.step_cost, rows, left)
        return [Work(live, n, drafts.get(live, ())) for live, n in rows.items()]

    def _rows_left(self, prefills: list[Live], now: float) -> dict[str, int]:
        """Rows of this step for each tenant; empty if none has to hold back for others."""
        if (alone_s := self._alone(now)) > LATELY_S:
            return {}
        most = min(self.config.max_step_rows, self.bounds.recent_rows if alone_s <= RECENT_S else self.bounds.lately_rows)
        wanted: dict[str, int] = {}
        weights: dict[str, float] = {}
        decoding = (live for live in self.running if live.remaining == 1 and live.unsaid is None)
        for live in chain(prefills, self._returning, decoding, *(islice(self.queues.ready(t), most + 1) for t in self.queues.waiting)):
            tenant = live.request.tenant
            wanted[tenant] = wanted.get(tenant, 0) + live.remaining
            weights[tenant] = live.request.weight
        return row_limits(wanted, weights, self.bounds.read_rows, most)

    def _alone(self, now: float) -> float:
        """Seconds for which no second tenant was there."""
        there = {live.request.tenant for live in [*self.running, *self._returning]} | self.queues.waiting.keys()
        seen = sorted((self._seen | dict.fromkeys(there, now)).items(), key=lambda tenant: -tenant[1])[:2]
        self._seen = dict(seen)
        return now - seen[1][1] if len(seen) > 1 else inf

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
            chunk = min(live.alike, budget // others, most)
            others -= 1
            own[tenant] -= 1
            if live.where == "running" and chunk and (chunk := self._room(live, chunk, rows)):
                rows[live] = chunk
                budget -= chunk
                _take(left, tenant, chunk)

    def _speculate(self, cost: StepCost, rows: dict[Live, int], left: dict[str, int]) -> dict[Live, list[int]]:
        """Drafts for sequences that decode, out of their tenant's rows and of blocks that nobody else needs: of all that could be drafted
        the likeliest, as many as make the step give most tokens a second. A step of R rows takes cost(R) seconds and gives `told` tokens
        without drafts; a draft gives one more with its probability. None, unless that is PAYS times what the step gives without."""
        total, told = sum(rows.values()), sum(n == live.remaining for live, n in rows.items())
        offers: dict[Live, list[tuple[int, float]]] = {}
        for live in (live for live, n in rows.items() if n == live.remaining == 1 and live.drafts is not None):
            assert live.drafts is not None
            most = min(live.request.sampling.max_tokens - live.new - 1, self.max_length - live.total, self.config.max_step_rows - total)
            offers[live] = live.drafts.next(live.tokens, most)
        likeliest = sorted(((likely, live) for live, offer in offers.items() for _, likely in offer), key=lambda o: -o[0])
        if not likeliest:
            return {}
        gained, best, counts = 0.0, PAYS * told / cost(total), Counter[Live]()
        for n, (likely, _) in enumerate(likeliest, 1):
            gained += likely
            if (told + gained) / cost(total + n) > best:
                best, counts = (told + gained) / cost(total + n), Counter(live for _, live in likeliest[:n])
        found: dict[Live, list[int]] = {}
        for live, n in counts.items():
            tenant = live.request.tenant
            if (n := min(n, self.config.max_step_rows - total, left.get(tenant, n), self._spare(live))) > 0:
                found[live] = [token for token, _ in offers[live][:n]]
                self.drafted += n
                self.fairness.charge(tenant, live.request.weight, tokens_in=n)
                total += n
                live.blocks.extend(self.pool.take(max(0, self._missing(live, 1 + n))))
                _take(left, tenant, n)
        return found

    def _missing(self, live: Live, rows: int) -> int:
        """Blocks that a running sequence lacks for so many rows more."""
        return -(-(live.past + rows) // self.config.block) - len(live.blocks)

    def _spare(self, live: Live) -> int:
        """Rows for drafts: in its own blocks, and in a further one where the pool has more than those who run may need next."""
        room = len(live.blocks) * self.config.block - live.past - 1
        return room + self.config.block if self.pool.available > len(self.running) else room

    def _room(self, live: Live, chunk: int, rows: dict[Live, int]) -> int:
        """Blocks for `chunk` more tokens of a running sequence, taken from others if need be; how many of them have room."""
        size = self.config.block
        missing = self._missing(live, chunk)
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

    def _admit(self, prefills: list[Live], budget: int, rows: dict[Live, int], left: dict[str, int], now: float) -> None:
        """Let sequences in while there is a place, rows worth a chunk, and blocks for the whole prompt. For a tenant that has less than its
        share, who has more makes way."""
        if not self.queues.waiting and not self._returning:
            return
        shares = Shares(self.running, [*self._returning, *self.queues.heads()], places=self.config.max_running, blocks=self.pool.total)
        entrance = Entrance(self.queues.waiting, self._returning, self.queues.lease, self.fairness.counters, shares, budget, left)
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

    def _get_in(self, live: Live, shares: Shares, rows: dict[Live, int], entrance: Entrance) -> bool:
        """Whether it runs now, after others were preempted if needed."""
        tenant, size = live.request.tenant, self.config.block
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
        return -(-live.total // self.config.block) - len(live.blocks) + 1

    def _enter(self, live: Live) -> bool:
        """Whether there was room: then it runs, with the blocks that are known already, and with those of its virtual tokens."""
        size, pool = self.config.block, self.pool
        known = pool.find(live.key(i, size) for i in range(live.shareable // size)) if self.config.prefix_cache else []
        free = pool.available - sum(not pool.held(b) for b in known)
        if free < -(-live.total // size) - len(known) + self._promised:
            return False
        if live.where == "returning":
            self._returning.remove(live)
        else:
            self.queues.remove(live)
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
        live, size = work.live, self.config.block
        live.ran = self._steps
        live.past += work.rows
        if self.config.prefix_cache:
            while (live.published + 1) * size <= live.past:
                self.pool.publish(live.blocks[live.published], live.key(live.published, size), live.owner(live.published, size))
                live.published += 1


def _take(left: dict[str, int], tenant: str, rows: int) -> None:
    if tenant in left:
        left[tenant] -= rows
