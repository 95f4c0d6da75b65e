"""A server of which all is real but the forward: the engine's scheduler, queues, shares, turns, blocks and residency, on simulated time.

A step takes as long as `Speed` says, and a load as well. Tokens have no values: an answer is as long as the trace says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache, partial
from threading import Lock
from types import SimpleNamespace
from typing import Any, cast

import torch

from trimtab.errors import ConfigError
from trimtab.fleet.clock import Clock
from trimtab.fleet.speed import Speed, Step
from trimtab.fleet.traffic import Asked
from trimtab.serve.blocks import BlockPool
from trimtab.serve.config import EngineConfig
from trimtab.serve.request import Request, SamplingParams
from trimtab.serve.residency import Loaded, Residency, Resident
from trimtab.serve.scheduler import Scheduler, Work
from trimtab.serve.sequence import Live
from trimtab.serve.turns import ELSEWHERE


@dataclass(frozen=True)
class Shape:
    """A server's sizes. resident: adapters that fit in memory; all are equally large. kv_tokens: tokens whose keys and values fit. All else
    as `trimtab serve` has it. on_cpu: whether steps are kept as short as on a CPU where tenants compete."""

    resident: int = 64
    kv_tokens: int = 65536
    max_running: int = 64
    max_queued: int = 256
    max_step_rows: int = 1024
    block_size: int = 16
    on_cpu: bool = True

    def __post_init__(self) -> None:
        names = ("resident", "kv_tokens", "max_running", "max_step_rows", "block_size")
        problems = [f"{name} = {getattr(self, name)}: must be at least 1" for name in names if getattr(self, name) < 1]
        if self.max_queued < 0:
            problems.append(f"max_queued = {self.max_queued}: must be at least 0")
        if self.kv_tokens < self.block_size:
            problems.append(f"kv_tokens = {self.kv_tokens}: not even one block of {self.block_size} tokens fits")
        if problems:
            raise ConfigError("there is no such server", problems=problems)


@dataclass(eq=False, slots=True)
class Answer:
    """One request's way. arrived: at the router. replica: who had it. ready: whether its adapter was in memory when it came there. first,
    last: when its first and its last token reached the client. None: it was refused."""

    arrived: float
    adapter: int
    replica: int = -1
    ready: bool = False
    first: float | None = None
    last: float | None = None


class _Packed:
    """What the scheduler asks of an adapter in memory: no virtual tokens, on for all of a sequence, no head."""

    virtual_tokens = 0
    head = None

    def on_from(self, ids: Sequence[int]) -> int:
        return 0


PACKED = cast(Any, _Packed())
NO_BASE = cast(Any, SimpleNamespace(device=torch.device("cpu")))


@dataclass(frozen=True)
class _Adapter:
    digest: str

    def load(self) -> Any:
        raise AssertionError("nothing is read")


class _Residency(Residency):
    """Loads end after some seconds of simulated time. An adapter takes one byte, so the budget is how many fit."""

    def __init__(
        self, places: int, clock: Clock, load_s: Callable[[], float], wake: Callable[[], None], on_free: Callable[[Resident], None]
    ):
        super().__init__(NO_BASE, places, cast(Executor, self), Lock(), wake, on_free)
        self._clock, self._load_s = clock, load_s

    def submit(self, run: Callable[[str], None], digest: str) -> None:
        """In the place of the threads that read adapters."""
        if seconds := self._load_s():
            self._clock.at(self._clock.now + seconds, partial(self._end, digest, seconds))
        else:
            self._put(digest, 0.0)

    def _end(self, digest: str, seconds: float) -> None:
        self._put(digest, seconds)
        self.wake()

    def _put(self, digest: str, seconds: float) -> None:
        self._handed.pop(digest)
        self._ended.put(Loaded(digest, Resident(digest, PACKED, 1), seconds=seconds))

    @property
    def reading(self) -> bool:
        return bool(self._handed)


class Replica:
    """One server. number: among the others. open: requests that it has. loads: adapters that it has read. busy_s: of its steps."""

    def __init__(self, number: int, shape: Shape, speed: Speed, clock: Clock):
        self.number, self.shape, self.speed, self.clock = number, shape, speed, clock
        config = EngineConfig(
            block_size=shape.block_size,
            max_running=shape.max_running,
            max_step_rows=max(shape.max_step_rows, shape.max_running),
            prefix_cache=False,
        )
        pool = BlockPool(shape.kv_tokens // shape.block_size)
        self.residency = _Residency(shape.resident, clock, self._load_s, self._wake, self._forget)
        self.scheduler = Scheduler(config, pool, self.residency, pool.total * shape.block_size)
        if not shape.on_cpu:
            self.scheduler.bounds = ELSEWHERE
        self.open = self.refused = self.requests = self.steps = self.tokens = self.rows = 0
        self.busy_s = self.queue_s = 0.0
        self.most_waiting = 0
        self._inbox: list[Live] = []
        self._answers: dict[Live, Answer] = {}
        self._serial, self._stepping, self._seen = 0, False, 0.0
        self._mix: set[str] = set()

    def _load_s(self) -> float:
        return self.speed.of_load(bool(self.scheduler.running))

    def _forget(self, gone: Resident) -> None:
        """As `Runner.forget` does it: a mix is let go with any of its adapters."""
        if gone.digest in self._mix:
            self._mix = set()

    def holds(self, digest: str) -> bool:
        """Whether an adapter is in memory."""
        return self.residency.holds(digest)

    @property
    def waiting(self) -> int:
        """Requests that have no place."""
        return self.open - len(self.scheduler.running)

    def take(self, asked: Asked, digest: str, answer: Answer) -> None:
        """A request arrives. It is refused where as many are open as may be."""
        answer.replica = self.number
        self.requests += 1
        if self.open >= self.shape.max_running + self.shape.max_queued:
            self.refused += 1
            return
        self._count_queue()
        self.open += 1
        self.most_waiting = max(self.most_waiting, self.waiting)
        answer.ready = self.holds(digest)
        self.clock.at(self.clock.now + self.speed.before_s, partial(self._enter, asked, digest, answer))

    def _enter(self, asked: Asked, digest: str, answer: Answer) -> None:
        request = Request(str(self._serial), _prompt(asked.prompt), _sampling(asked.answer), _Adapter(digest), tenant=str(asked.tenant))
        none = cast(Any, None)
        live = Live(request, none, none, none, None, self._serial, self.clock.now, b"", b"", list(request.prompt))
        self._serial += 1
        self._answers[live] = answer
        self._inbox.append(live)
        self._wake()

    def _wake(self) -> None:
        """Begin a step, unless one runs: then its end does."""
        if not self._stepping:
            self._step()

    def _step(self) -> None:
        """As `serve.step.Step` does it."""
        for live in self._inbox:
            self.scheduler.add(live)
        self._inbox.clear()
        self._count_queue()
        work = self.scheduler.schedule(self.clock.now)
        for live in list(self.scheduler.queues.refused):
            self._finish(live, served=False)
        work = [w for w in work if w.live.where == "running"]
        if not work:
            return
        wanted = {w.live.digest for w in work if w.live.digest is not None}
        step = Step(
            rows=sum(w.rows for w in work),
            sequences=len(work),
            adapters=len({w.live.digest for w in work}),
            context=sum(w.live.past for w in work),
            mixed=not wanted <= self._mix,
        )
        if step.mixed:
            self._mix = wanted
        took = self.speed(step, self.residency.reading)
        self.busy_s += took
        self.steps += 1
        self.rows += step.rows
        self._stepping = True
        self.clock.at(self.clock.now + took, partial(self._computed, work))

    def _computed(self, work: Sequence[Work]) -> None:
        self._stepping = False
        self._count_queue()
        now = self.clock.now
        for w in work:
            self.scheduler.computed(w)
        for live in [w.live for w in work if w.live.remaining == 0]:
            live.take(0, now)
            live.gaps.clear()
            self.tokens += 1
            self.scheduler.fairness.charge(live.request.tenant, live.request.weight, tokens_out=1)
            if live.new == 1:
                self._answers[live].first = now + self.speed.after_s
            if live.new >= live.request.sampling.max_tokens or live.past >= self.scheduler.max_length:
                self._finish(live, served=True)
        self._step()

    def _finish(self, live: Live, *, served: bool) -> None:
        answer = self._answers.pop(live)
        self.scheduler.remove(live)
        self.open -= 1
        if served:
            answer.last = self.clock.now + self.speed.after_s
        else:
            self.refused += 1
            answer.first = None

    def _count_queue(self) -> None:
        """Waiting requests times seconds, since this was last asked."""
        self.queue_s += self.waiting * (self.clock.now - self._seen)
        self._seen = self.clock.now


@lru_cache(maxsize=4096)
def _prompt(tokens: int) -> tuple[int, ...]:
    return (0,) * tokens


@lru_cache(maxsize=4096)
def _sampling(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, ignore_eos=True)
