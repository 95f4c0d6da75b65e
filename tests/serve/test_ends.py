"""Requests that end in every way and at any moment: afterwards nothing is held for anybody, in no set and under no counter."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from tests.laws.common import tokens
from tests.serve.common import ByHand, Clock, Heard, Held, engine_of, held
from trimtab.errors import AdapterError, OverloadedError, TrimtabError
from trimtab.serve.engine import Engine
from trimtab.serve.grammar import GrammarError
from trimtab.serve.request import Delta, Grammar, Request, SamplingParams
from trimtab.serve.residency import packed_bytes
from trimtab.serve.runner import Runner

ADAPTERS = [held(case) for case in ("lora-0", "prefix-0", "prompt-0", "bottleneck-0", "ia3-0")]
BROKEN = [Held("sha256:refused", error=AdapterError("no")), Held("sha256:bug", error=ZeroDivisionError("oh"))]


@dataclass(eq=False)
class StandIn:
    """A matcher whose process is a die."""

    rng: random.Random
    tenant: str
    vocab_size: int
    closed: bool = False
    error: str = ""
    awaited: bool = True

    done = False

    @property
    def mask(self) -> bytes:
        return b"\xff" * (4 * ((self.vocab_size + 31) // 32))

    def advance(self, token: int) -> None:
        self.awaited = True

    def fault(self, told: str = "") -> TrimtabError:
        return GrammarError(told + self.error)

    def close(self) -> None:
        assert not self.closed
        self.closed = True


@dataclass(eq=False)
class StandIns:
    """Instead of processes for grammars."""

    rng: random.Random
    vocab_size: int
    made: list[StandIn] = field(default_factory=list)

    def matcher(self, grammar: Grammar, tenant: str) -> StandIn:
        self.made.append(StandIn(self.rng, tenant, self.vocab_size))
        return self.made[-1]

    def wait(self, matchers: list[StandIn], seconds: float) -> set[StandIn]:
        for matcher in matchers:
            if self.rng.random() < 0.4:
                matcher.awaited, matcher.error = False, "no" if self.rng.random() < 0.1 else ""
        return {m for m in matchers if not m.awaited}


@dataclass
class Deaf(Heard):
    """A sink that fails after so many deltas."""

    hears: int = 1 << 30

    def __call__(self, delta: Delta) -> None:
        super().__call__(delta)
        if len(self.deltas) > self.hears:
            raise ConnectionError


def left_over(engine: Engine) -> dict[str, object]:
    """Whatever anybody still holds, by where it is."""
    s, r, q = engine.scheduler, engine.residency, engine.scheduler.queues
    penalties = engine.sampler._penalties
    return {
        "open requests": dict(engine.requests.by_id),
        "posted": list(engine.requests._inbox),
        "deadlines": list(engine.requests._deadlines),
        "running": s.running,
        "returning": s._returning,
        "waiting": q.waiting,
        "loading": q.loading,
        "leased": q.leased,
        "refused": q.refused,
        "active tenants": s.fairness._open,
        "KV blocks": engine.pool.used,
        "leases": r.leases,
        "adapters that leave": r._leaving,
        "adapters wanted": r._wanted,
        "adapters being read": r._loading,
        "adapters handed to threads": r._handed,
        "adapters without room": r._parked,
        "adapters to leave at once": r._leave_at_once,
        "adapters placed just now": r._fresh,
        "to evict at last": engine._ending.departing,
        "held for grammars": engine._step.held,
        "rows of penalties": len(penalties.new_SV) - len(set(penalties._free)),
    }


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 6])
def test_nothing_is_left_of_requests_that_end_anyhow(seed, monkeypatch):
    rng, clock, loader = random.Random(seed), Clock(), ByHand()
    sizes = [packed_bytes(ADAPTERS[0].load().base.pack(a.load())) for a in ADAPTERS]
    engine = engine_of(
        blocks=rng.choice([20, 40]),
        max_running=6,
        max_step_rows=64,
        max_queued=30,
        adapter_bytes=int(rng.choice([0.7, 1.0, 2.1]) * max(sizes)),
        clock=clock,
        loader=loader,
    )
    engine.grammars = engine._step.grammars = grammars = StandIns(rng, engine.base.spec.vocab_size)  # type: ignore[assignment]
    heard: dict[str, Heard] = {}
    broken = [0]
    real = Runner.__call__

    def run(self, feeds):
        if broken[0]:
            broken[0] = 0
            raise RuntimeError("a forward went wrong")
        return real(self, feeds)

    monkeypatch.setattr(Runner, "__call__", run)
    longest = engine.scheduler.max_length

    def ask() -> None:
        name, prompt = f"r{len(heard)}", rng.choice([1, 8, 40, longest - 2, longest - 1])
        heard[name] = Deaf(hears=rng.choice([1, 3, 1 << 30, 1 << 30]))
        params = SamplingParams(
            max_tokens=rng.choice([1, 4, 30]),
            stop_token_ids=rng.choice([(), tuple(range(0, 256, 8))]),
            frequency_penalty=rng.choice([0.0, 0.0, 1.0]),
            logprobs=rng.choice([None, 2]),
            grammar=rng.choice([None, None, Grammar("regex", "a")]),
        )
        adapter = rng.choice([None, *ADAPTERS, *BROKEN])
        deadline = rng.choice([None, None, clock.now + rng.choice([1, 20])])
        request = Request(
            name, tuple(tokens(prompt, len(heard))), params, adapter, rng.choice("abcd"), rng.choice([0.5, 1.0, 2.0]), deadline
        )
        try:
            engine.submit(request, heard[name])
        except OverloadedError:
            del heard[name]

    def load() -> None:
        if loader.jobs:
            loader.run(rng.randrange(len(loader.jobs)))

    acts = [
        *[ask] * 6,
        *[engine.step] * 8,
        *[load] * 3,
        lambda: heard and engine.cancel(rng.choice(list(heard))),
        lambda: engine.evict(rng.choice([*ADAPTERS, *BROKEN]).digest),
        lambda: engine.prefetch(rng.choice([*ADAPTERS, *BROKEN])),
        lambda: setattr(clock, "now", clock.now + rng.random()),
        lambda: rng.random() < 0.2 and broken.__setitem__(0, 1),
    ]
    for _ in range(300):
        rng.choice(acts)()
    for _ in range(3000):
        load()
        if not engine.step() and not loader.jobs and not engine.requests:
            break
    clock.now += 1000
    engine.step()
    engine.idle_check()
    assert {where: what for where, what in left_over(engine).items() if what} == {}
    assert all(h.finish is not None for h in heard.values()) and all(m.closed for m in grammars.made)
    ends = {h.finish for h in heard.values()}
    assert ends == {"stop", "length", "cancelled", "deadline", "error"}, "all ways of ending were there"
