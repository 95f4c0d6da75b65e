"""A trace through a router and R replicas, as a simulation of discrete events.

found = simulate(Traffic(adapters=1000, rate=20).trace(), Shape(resident=64), speed, replicas=2, routing="affinity")
found.hit_rate, found.first_s[0.5], found.replicas[0].busy
"""

from __future__ import annotations

import dataclasses
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.errors import ConfigError, nearest
from trimtab.fleet.clock import Clock
from trimtab.fleet.replica import Answer, Replica, Shape
from trimtab.fleet.routing import ROUTERS
from trimtab.fleet.speed import Speed
from trimtab.fleet.traffic import Asked, Trace

QUANTILES = (0.5, 0.95)


@dataclass(frozen=True)
class ReplicaFacts:
    """One replica. requests: that it was given; loads: adapters that it read. busy: part of the time in which it computed. waiting:
    requests without a place, on average; most_waiting: at most. rows_a_step: tokens that enter one."""

    requests: int
    refused: int
    loads: int
    busy: float
    waiting: float
    most_waiting: int
    steps: int
    rows_a_step: float
    tokens: int


@dataclass(frozen=True)
class Simulated:
    """counted: requests behind the warm-up that were answered; what follows is about them. hit_rate: part of them that caused no load.
    found: part of them whose adapter was in memory when they came. first_s, total_s: seconds until the first and the last token, by
    quantile. tokens_per_s: of all replicas, from the first request to the last answer. took_s, memory_bytes: of the simulation itself, the
    memory of its process at most."""

    routing: str
    counted: int
    refused: int
    hit_rate: float
    found: float
    first_s: dict[float, float]
    total_s: dict[float, float]
    tokens_per_s: float
    seconds: float
    replicas: tuple[ReplicaFacts, ...]
    took_s: float
    memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain JSON values."""
        return dataclasses.asdict(self)


def simulate(
    trace: Trace,
    shape: Shape,
    speed: Speed,
    *,
    replicas: int = 1,
    routing: str = "affinity",
    warm_up: float = 0.2,
    hear: Callable[[int], None] = lambda done: None,
) -> Simulated:
    """warm_up: part of the requests, the first ones, that are not counted: memory is empty when they come. hear: called now and then with
    how many requests have come. ConfigError where there is no such routing, or a number is out of range."""
    _check(replicas, routing, warm_up)
    began, clock = time.perf_counter(), Clock()
    fleet = [Replica(number, shape, speed, clock) for number in range(replicas)]
    choose = ROUTERS[routing](fleet)
    answers, skipped = list[Answer](), int(warm_up * len(trace))
    before: list[int] = []
    coming = iter(trace)

    def arrive(asked: Asked) -> None:
        if len(answers) == skipped:
            before[:] = [replica.residency.loads for replica in fleet]
        digest = str(asked.adapter)
        answer = Answer(asked.at, asked.adapter)
        answers.append(answer)
        fleet[choose(digest)].take(asked, digest, answer)
        if len(answers) % 1000 == 0:
            hear(len(answers))
        expect()

    def expect() -> None:
        if (asked := next(coming, None)) is not None:
            clock.at(asked.at, lambda: arrive(asked))

    expect()
    clock.run()
    return _facts(fleet, answers[skipped:], before, clock.now, routing, time.perf_counter() - began)


def _facts(fleet: Sequence[Replica], answers: Sequence[Answer], before: Sequence[int], end: float, routing: str, took: float) -> Simulated:
    done = [a for a in answers if a.last is not None]
    loads = sum(replica.residency.loads for replica in fleet) - sum(before)
    first = np.array([a.first - a.arrived for a in done if a.first is not None])
    total = np.array([a.last - a.arrived for a in done if a.last is not None])
    tokens = sum(replica.tokens for replica in fleet)
    return Simulated(
        routing=routing,
        counted=len(done),
        refused=sum(replica.refused for replica in fleet),
        hit_rate=1 - loads / max(1, len(done)),
        found=sum(a.ready for a in done) / max(1, len(done)),
        first_s=quantiles(first),
        total_s=quantiles(total),
        tokens_per_s=tokens / end if end else 0.0,
        seconds=end,
        replicas=tuple(_replica(replica, end) for replica in fleet),
        took_s=took,
        memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def quantiles(values: np.ndarray) -> dict[float, float]:
    """Of `QUANTILES`; nan where there are no values."""
    return {q: float(np.quantile(values, q)) if len(values) else float("nan") for q in QUANTILES}


def _replica(replica: Replica, end: float) -> ReplicaFacts:
    return ReplicaFacts(
        requests=replica.requests,
        refused=replica.refused,
        loads=replica.residency.loads,
        busy=replica.busy_s / end if end else 0.0,
        waiting=replica.queue_s / end if end else 0.0,
        most_waiting=replica.most_waiting,
        steps=replica.steps,
        rows_a_step=replica.rows / max(1, replica.steps),
        tokens=replica.tokens,
    )


def _check(replicas: int, routing: str, warm_up: float) -> None:
    problems = [] if replicas >= 1 else [f"replicas = {replicas}: must be at least 1"]
    if routing not in ROUTERS:
        problems.append(f"routing = {routing!r}: there is no such routing{nearest(routing, ROUTERS)}; use one of {', '.join(ROUTERS)}")
    if not 0 <= warm_up < 1:
        problems.append(f"warm_up = {warm_up}: must be at least 0 and below 1")
    if problems:
        raise ConfigError("this cannot be simulated", problems=problems)
