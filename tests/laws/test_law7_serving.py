"""Law 7: served tokens and log-probabilities equal solo generation, whatever happens around them; nothing crosses tenants or adapters.

A world of many tenants and adapters of every method drives one engine: requests at random moments, aliases that move, adapters published,
evicted and fetched while requests run, cancellations, loads that end in any order, room for a few sequences and a few adapters only.
"""

from __future__ import annotations

import gc
import random
from collections import Counter
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch

from tests.laws.common import EXAMPLES, base_of, noisy, tokens
from tests.serve.common import ByHand, Clock, Heard, Held, engine_of, without_end
from trimtab.decode.generate import Sampling
from trimtab.serve import engine as engine_module
from trimtab.serve import scheduler as scheduler_module
from trimtab.serve.engine import Engine
from trimtab.serve.request import Request, SamplingParams
from trimtab.serve.step import Step

TENANTS, ADAPTERS, SPARE = 64, 128, 16
CLOSE = 1e-4
Owner = tuple[str, str | None]


@cache
def adapters(count: int = ADAPTERS + SPARE) -> tuple[Held, ...]:
    """Adapters of every method in turn, no two alike."""
    base, methods = base_of("llama"), list(EXAMPLES.values())
    return tuple(Held(f"sha256:{i:04}", noisy(base, methods[i % len(methods)], seed=2000 + i)) for i in range(count))


@cache
def openings() -> tuple[tuple[int, ...], ...]:
    """Beginnings that prompts of all tenants share: where keys say too little, these are found by others."""
    return tuple(tuple(tokens(n, 900 + n)) for n in (17, 33, 50))


@dataclass
class World:
    """One engine and what happens to it; the same for the same seed. The watch on blocks knows nothing of keys: it notes whose tokens
    each block was computed from, and compares when somebody finds it."""

    engine: Engine
    loader: ByHand
    rng: random.Random
    names: dict[str, Held]
    spare: list[Held]
    asked: dict[str, tuple[Request, Heard]] = field(default_factory=dict)
    written: dict[int, tuple[Owner, tuple[int, ...]]] = field(default_factory=dict)
    reused: int = 0
    faults: list[str] = field(default_factory=list)
    happened: Counter[str] = field(default_factory=Counter)

    def watch(self) -> None:
        scheduler, size = self.engine.scheduler, self.engine.config.block_size
        enter, computed = scheduler._enter, scheduler.computed

        def content(live, block):
            return tuple([-1] * live.virtual + live.tokens)[: (block + 1) * size]

        def watched_enter(live):
            entered = enter(live)
            for i, block in enumerate(live.blocks[: live.published] if entered else ()):
                self.reused += 1
                if self.written[block] != ((live.request.tenant, live.digest), content(live, i)):
                    self.faults.append(f"{live.request.tenant} under {live.digest} found a block of {self.written[block][0]}")
            return entered

        def watched_computed(work):
            entered = work.live.past == work.live.virtual  # then its blocks of virtual tokens alone are written with it
            first = 0 if entered else work.live.past // size
            computed(work)
            for i in range(first, -(-work.live.past // size)):
                self.written[work.live.blocks[i]] = ((work.live.request.tenant, work.live.digest), content(work.live, i))

        scheduler._enter, scheduler.computed = watched_enter, watched_computed

    def ask(self) -> None:
        rng, name = self.rng, f"r{len(self.asked)}"
        tenant = f"tenant{min(rng.randrange(TENANTS) for _ in range(3))}"
        adapter = None if rng.random() < 0.1 else self.names[rng.choice(list(self.names)[: rng.choice((4, 4, len(self.names)))])]
        prompt = (*(rng.choice(openings()) if rng.random() < 0.6 else ()), *tokens(rng.randint(1, 20), len(self.asked)))
        ended = [r for r, h in self.asked.values() if h.finish == "length"][-8:]
        if ended and rng.random() < 0.5:  # a conversation goes on, or somebody else says the same
            before = rng.choice(ended)
            prompt = (*before.prompt, *self.asked[before.id][1].ids, *prompt)[:120]
            tenant, adapter = rng.choice([(before.tenant, before.adapter)] * 3 + [(tenant, before.adapter), (before.tenant, adapter)])
        params = SamplingParams(
            max_tokens=rng.randint(1, rng.choice((6, 12, 90))), ignore_eos=rng.random() < 0.5, logprobs=rng.choice((None, 0, 2))
        )
        deadline = self.engine.clock() + rng.randint(3, 60) if rng.random() < 0.05 else None
        heard = Heard()
        request = Request(name, prompt, params, adapter, tenant, rng.choice((0.5, 1.0, 4.0)), deadline)
        self.asked[name] = (request, heard)
        self.engine.submit(request, heard)

    def disturb(self) -> None:
        rng, engine = self.rng, self.engine
        some = rng.choice(list(self.names))
        what = rng.choices(("alias", "publish", "evict", "prefetch", "cancel", "nothing"), (3, 2, 2, 1, 1, 6))[0]
        if what == "alias":
            self.names[some] = self.names[rng.choice(list(self.names))]
        elif what == "publish" and self.spare:
            self.names[some] = self.spare.pop()
        elif what == "evict":
            engine.evict(self.names[some].digest)
        elif what == "prefetch":
            engine.prefetch(self.names[some])
        elif what == "cancel" and engine.requests.by_id and rng.random() < 0.5:
            engine.cancel(rng.choice(sorted(engine.requests.by_id)))
        self.happened[what] += 1

    def run(self, requests: int) -> None:
        rng = self.rng
        while len(self.asked) < requests or self.engine.requests.by_id:
            for _ in range(rng.choice((0, 0, 2, 4, 8, 12)) if len(self.asked) < requests else 0):
                self.ask()
            self.disturb()
            for _ in range(min(len(self.loader.jobs), rng.choice((0, 1, 4)))):
                self.loader.run(rng.randrange(len(self.loader.jobs)))
            self.engine.step()
            self.engine.clock.now += 1.0
        while self.loader.jobs:
            self.loader.run()
            self.engine.step()

    def check(self, generate_every: int) -> None:
        """Every answer, also what came of those that were cancelled."""
        assert self.faults == [], self.faults[:5]
        for n, (request, heard) in enumerate(self.asked.values()):
            assert heard.finish in ("stop", "length", "cancelled", "deadline"), (request.id, heard.finish, heard.error)
            check_answer(self.engine, request, heard, generate=n % generate_every == 0)

    def check_baseline(self) -> None:
        engine = self.engine
        engine.idle_check()
        for adapter in [*adapters()]:
            engine.evict(adapter.digest)
        engine.step()
        assert (engine.residency.count, engine.residency.bytes) == (0, 0)
        of_the_base = sum(engine.pool._key[b] is not None for b in range(engine.pool.total))
        assert of_the_base == engine.pool.cached and engine.pool._by_digest == {}


def check_answer(engine: Engine, request: Request, heard: Heard, *, generate: bool) -> None:
    """Against one forward of the whole answer by itself, and against generation without an engine."""
    base, ids, adapter = engine.base, heard.ids, request.adapter and request.adapter.adapter
    if not ids:
        assert heard.finish in ("cancelled", "deadline")
        return
    logits_TV = base.logits([[*request.prompt, *ids[:-1]]], [adapter])[0][len(request.prompt) - 1 :].log_softmax(-1)
    best_T, own_T = logits_TV.amax(-1), logits_TV.gather(1, torch.tensor(ids)[:, None])[:, 0]
    assert float((best_T - own_T).max()) <= CLOSE, f"{request.id}: another token than solo"
    for token, logprob, row_V in zip(heard.tokens, own_T.tolist(), logits_TV, strict=True):
        if request.sampling.logprobs is not None:
            assert token.logprob == pytest.approx(logprob, abs=CLOSE)
            assert [p for _, p in token.top] == pytest.approx(row_V.topk(len(token.top)).values.tolist(), abs=CLOSE)
    if heard.finish == "length":
        assert len(ids) == request.sampling.max_tokens
    if generate and not request.sampling.ignore_eos:
        want = base.generate_ids([request.prompt], [adapter], Sampling(request.sampling.max_tokens))[0]
        got = without_end(engine, ids)
        assert got == (want if heard.finish in ("stop", "length") else want[: len(got)])


def world(seed: int, *, block_size: int = 8, max_step_rows: int = 40, kv_tokens: int = 320) -> World:
    """Room for a few sequences and a dozen adapters."""
    loader, some = ByHand(), adapters()
    budget = sum(t.numel() * 4 for h in some[:12] for t in h.adapter.params.values())
    engine = engine_of(
        blocks=kv_tokens // block_size,
        block_size=block_size,
        max_running=12,
        max_step_rows=max_step_rows,
        adapter_bytes=budget,
        loader=loader,
        clock=Clock(),
        max_queued=10_000,
    )
    made = World(engine, loader, random.Random(seed), {f"n{i}": h for i, h in enumerate(some[:ADAPTERS])}, list(some[ADAPTERS:]))
    made.watch()
    return made


def settled(made: World, requests: int, generate_every: int) -> World:
    made.run(requests)
    made.check(generate_every)
    made.check_baseline()
    return made


@pytest.mark.parametrize(("seed", "block_size", "max_step_rows", "kv_tokens"), [(1, 4, 13, 256), (2, 8, 40, 320), (10, 16, 200, 320)])
def test_everything_at_once_equals_solo(seed, block_size, max_step_rows, kv_tokens):
    made = settled(world(seed, block_size=block_size, max_step_rows=max_step_rows, kv_tokens=kv_tokens), 100, generate_every=4)
    stats = made.engine.stats()
    assert made.reused > 0 and stats.prefix_hit_tokens > 0, "nothing was found in the prefix cache"
    assert stats.evictions > 20 and stats.loads > 40, "the adapters' budget was not tight"
    assert stats.preemptions > 0, "the KV blocks were not tight"
    assert all(made.happened[w] for w in ("alias", "publish", "evict", "prefetch", "cancel"))


@pytest.mark.slow
def test_two_thousand_requests_equal_solo():
    made = settled(world(7, max_step_rows=100, kv_tokens=600), 2000, generate_every=8)
    stats = made.engine.stats()
    assert len({r.tenant for r, _ in made.asked.values()}) > 0.8 * TENANTS
    assert stats.preemptions > 10 and stats.evictions > 300 and made.reused > 200 and stats.prefix_hit_tokens > 1000
    finished = Counter(h.finish for _, h in made.asked.values())
    assert finished["cancelled"] > 20 and finished["deadline"] > 5 and finished["stop"] > 20 and finished["length"] > 1000


def test_an_adapter_that_has_left_leaves_no_tensors_behind():
    import weakref

    engine = engine_of()
    for adapter in adapters()[: 2 * len(EXAMPLES)]:
        engine.submit(Request(adapter.digest, tuple(tokens(20, 1)), SamplingParams(max_tokens=3), adapter), Heard())
    while engine.step():
        pass
    alive = [weakref.ref(r.packed) for r in engine.residency._resident.values()]
    assert len(alive) == 2 * len(EXAMPLES)
    for adapter in adapters()[: 2 * len(EXAMPLES)]:
        engine.evict(adapter.digest)
    engine.step()
    gc.collect()
    assert [r for r in alive if r() is not None] == [] and engine.stats().adapter_bytes == 0 and engine.stats().kv_blocks_cached == 0


# ---- the law has teeth ----


def _keys_without_tenant(monkeypatch):
    real = engine_module.chain_start
    monkeypatch.setattr(engine_module, "chain_start", lambda f, digest, tenant, salt, size: real(f, digest, None, salt, size))


def _keys_without_adapter(monkeypatch):
    real = engine_module.chain_start
    monkeypatch.setattr(engine_module, "chain_start", lambda f, digest, tenant, salt, size: real(f, None, tenant, salt, size))


def _one_token_too_few_at_a_chunks_end(monkeypatch):
    real = scheduler_module.Scheduler.computed

    def computed(self, work):
        more = work.live.remaining > work.rows
        real(self, work)
        work.live.past -= more

    monkeypatch.setattr(scheduler_module.Scheduler, "computed", computed)
    monkeypatch.setattr(Step, "_run", _skipping_feed(Step._run))


def _skipping_feed(real):
    def run(self, work):
        for w in work:  # the feed starts where past says, and says that it starts one further
            if w.live.past - w.live.virtual > 0 and w.rows > 1 and not w.live.unwritten:
                w.live.past += 1
                object.__setattr__(w, "rows", w.rows - 1)
        return real(self, work)

    return run


def _an_adapter_of_another_name(monkeypatch):
    real = scheduler_module.Residency.lease
    monkeypatch.setattr(scheduler_module.Residency, "lease", lambda self, d: real(self, next(reversed(self._resident), d)))


def _a_lease_that_stays(monkeypatch):
    real = scheduler_module.Residency.release

    def release(self, resident):
        if resident.leases > 1:
            real(self, resident)

    monkeypatch.setattr(scheduler_module.Residency, "release", release)


def _blocks_that_stay(monkeypatch):
    real = scheduler_module.BlockPool.release
    monkeypatch.setattr(scheduler_module.BlockPool, "release", lambda self, blocks: real(self, blocks[: max(1, len(blocks) - 1)]))


def _blocks_freed_too_early(monkeypatch):
    real = scheduler_module.BlockPool.take

    def take(self, count):
        taken = real(self, count)
        if len(self._cached) == 0 and taken:
            self._empty.insert(0, taken[0])  # somebody else gets it too
        return taken

    monkeypatch.setattr(scheduler_module.BlockPool, "take", take)


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (_keys_without_tenant, "found a block of"),
        (_keys_without_adapter, "found a block of"),
        (_one_token_too_few_at_a_chunks_end, "another token than solo"),
        (_an_adapter_of_another_name, "another token than solo"),
        (_a_lease_that_stays, "leases are held by nobody"),
        (_blocks_that_stay, "KV blocks are held by nobody"),
        (_blocks_freed_too_early, "is released by nobody's holder"),
    ],
)
def test_a_planted_fault_is_caught(plant, words, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=words):
        settled(world(5, max_step_rows=20, kv_tokens=400 if plant is _blocks_freed_too_early else 1200), 40, generate_every=8)
