"""The simulator against closed forms, cases made by hand, and a real engine that steps on the same clock."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tests.laws.common import tokens
from tests.serve.common import Clock, Heard, Held, ask, engine_of, held
from trimtab.cli.simulate import simulate as command
from trimtab.errors import ConfigError, DataError, TrimtabError
from trimtab.fleet import served
from trimtab.fleet.measured import _mixing
from trimtab.fleet.replica import Shape
from trimtab.fleet.routing import ROUTERS, SPILL
from trimtab.fleet.served import added_by_server, token_seconds, tokens_of, way_and_rows
from trimtab.fleet.simulate import Simulated, simulate
from trimtab.fleet.speed import Speed, Step, fit
from trimtab.fleet.traffic import Asked, Trace, Traffic
from trimtab.serve.residency import packed_bytes
from trimtab.serve.stats import StepFacts

SECOND = Speed((1,), (1.0,), "a test's: a second a step")


def trace_of(*asked: tuple[float, int, int, int] | tuple[float, int, int, int, int]) -> Trace:
    """(at, adapter, prompt, answer), or with the tenant before the prompt."""
    rows = [a if len(a) == 5 else (*a[:2], 0, *a[2:]) for a in asked]
    at, *whole = zip(*rows, strict=True)
    return Trace(np.array(at, dtype=float), *(np.array(column) for column in whole))


def run(
    trace: Trace, speed: Speed = SECOND, *, replicas: int = 1, routing: str = "round-robin", warm_up: float = 0.0, **shape
) -> Simulated:
    return simulate(trace, Shape(**shape), speed, replicas=replicas, routing=routing, warm_up=warm_up)


def seldom(adapters: int, requests: int, zipf: float, seed: int = 0) -> Trace:
    """So rarely that no request meets another: then residency is an LRU cache."""
    return Traffic(adapters, zipf=zipf, rate=1e-3, requests=requests, prompt_tokens=1, answer_tokens=1, spread=0, seed=seed).trace()


# ---- traffic


def test_traffic_has_the_rates_lengths_and_popularity_that_it_is_told() -> None:
    traffic = Traffic(50, tenants=7, zipf=1.2, rate=4.0, requests=20_000, prompt_tokens=100, answer_tokens=30, spread=0.6, seed=3)
    trace = traffic.trace()
    assert trace.at[-1] / len(trace) == pytest.approx(0.25, rel=0.03) and (np.diff(trace.at) >= 0).all()
    assert trace.prompt.mean() == pytest.approx(100, rel=0.03) and np.log(trace.prompt).std() == pytest.approx(0.6, rel=0.05)
    assert trace.answer.mean() == pytest.approx(30, rel=0.03)
    weights = [1 / rank**1.2 for rank in range(1, 51)]
    counts = np.bincount(trace.adapter, minlength=50) / len(trace)
    assert counts[:5] == pytest.approx([w / sum(weights) for w in weights[:5]], rel=0.05)
    assert (trace.tenant == trace.adapter % 7).all()
    again = traffic.trace()
    assert all((getattr(again, f) == getattr(trace, f)).all() for f in Asked._fields)


def test_a_trace_comes_back_from_its_file(tmp_path: Path) -> None:
    trace = Traffic(20, tenants=3, requests=50).trace()
    (tmp_path / "trace.jsonl").write_text(trace.lines())
    assert list(Trace.read(tmp_path / "trace.jsonl")) == list(trace)


def test_lines_that_are_no_requests_are_named(tmp_path: Path) -> None:
    good = json.dumps({"at": 1, "adapter": 0, "tenant": 0, "prompt": 5, "answer": 5})
    (tmp_path / "t").write_text(f'{good}\n{{"at": 2}}\n{good.replace("5", "0")}\nno\n{good.replace("1", "NaN")}\n')
    with pytest.raises(DataError) as refused:
        Trace.read(tmp_path / "t")
    assert [p.split(":")[1] for p in refused.value.problems] == ["2", "3", "4", "5"]
    with pytest.raises(DataError, match="cannot be read"):
        Trace.read(tmp_path / "missing")


def test_numbers_of_a_trace_that_are_too_large_are_named(tmp_path: Path) -> None:
    good = {"at": 1, "adapter": 0, "tenant": 0, "prompt": 5, "answer": 5}
    texts = [json.dumps(good | {key: 2**31 - 1}) for key in ("adapter", "tenant")]
    (tmp_path / "fits").write_text("\n".join(texts))
    assert len(Trace.read(tmp_path / "fits")) == 2
    texts += [json.dumps(good).replace('"prompt": 5', f'"prompt": {value}') for value in ("1e999", "2147483648", "1" + "0" * 20)]
    texts += [json.dumps(good | {"adapter": 10**20}), json.dumps(good | {"at": 10**400})]
    (tmp_path / "t").write_text("\n".join(texts))
    with pytest.raises(DataError) as refused:
        Trace.read(tmp_path / "t")
    assert [p.split(":")[1] for p in refused.value.problems] == ["3", "4", "5", "6", "7"]
    assert "at most 2,147,483,647" in refused.value.problems[3]


@pytest.mark.parametrize(
    "bad", [{"adapters": 0}, {"rate": 0.0}, {"rate": math.nan}, {"zipf": -1.0}, {"spread": math.nan}, {"answer_tokens": 0}]
)
def test_there_is_no_such_traffic(bad: dict) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(bad))} = "):
        Traffic(**bad)


# ---- hits: an LRU cache


def test_one_place_hits_where_the_same_comes_twice() -> None:
    trace = seldom(4, 400, 0.8)
    found = run(trace, resident=1)
    repeats = sum(a == b for a, b in pairwise(trace.adapter))
    assert found.hit_rate == pytest.approx(repeats / 400) == found.found


def test_two_places_hit_as_the_closed_form_says() -> None:
    """LRU with two places, independent requests: Σ pᵢ (pᵢ + Σ_{j≠i} pⱼ pᵢ / (1 − pⱼ)): i was last, or last but one as all since are j."""
    p = Traffic(6, zipf=1.0).popularity
    exact = sum(a * (a + sum(b * a / (1 - b) for j, b in enumerate(p) if j != i)) for i, a in enumerate(p))
    found = run(seldom(6, 3000, 1.0, seed=1), resident=2, warm_up=0.05)
    assert found.hit_rate == pytest.approx(exact, abs=0.02) and 0.4 < exact < 0.6


def che(p: np.ndarray, places: int) -> float:
    """Che, Tung and Wang 2002: an adapter is there if it came within T, of which Σ (1 − e^(−pT)) = places."""
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - np.exp(-p * middle)).sum() < places else (low, middle)
    return float((p * (1 - np.exp(-p * low))).sum())


@pytest.mark.parametrize(("zipf", "places"), [(0.7, 30), (1.0, 30), (1.0, 100)])
def test_many_places_hit_as_ches_approximation_says(zipf: float, places: int) -> None:
    p = Traffic(400, zipf=zipf).popularity
    found = run(seldom(400, 3000, zipf), resident=places, warm_up=0.2)
    assert found.hit_rate == pytest.approx(che(p, places), abs=0.025)


# ---- waiting


def test_one_place_waits_as_a_queue_of_one_server_does() -> None:
    """M/D/1: requests of one step each, at random times. Waiting: ρ/(2(1 − ρ)) steps on average (Pollaczek and Khinchine)."""
    trace = Traffic(1, rate=0.7, requests=4000, prompt_tokens=1, answer_tokens=1, spread=0, seed=5).trace()
    load = len(trace) / trace.at[-1]
    found = run(trace, max_running=1, max_queued=10_000, resident=1)
    assert found.replicas[0].busy == pytest.approx(load, rel=0.01)
    # Little's law: those who wait are the rate times the waiting
    assert found.replicas[0].waiting == pytest.approx(load * load / (2 * (1 - load)), rel=0.12)
    waited, free = [], 0.0
    for at in trace.at:  # the same by Lindley's recursion
        free = max(at, free) + 1.0
        waited.append(free - at)
    assert found.total_s == pytest.approx({q: float(np.quantile(waited, q)) for q in (0.5, 0.95)})


def test_a_full_server_refuses() -> None:
    found = run(trace_of(*[(0.0, 0, 1, 5)] * 10), max_running=2, max_queued=3)
    assert (found.refused, found.counted, found.replicas[0].most_waiting) == (5, 5, 4)  # the first runs


# ---- by hand


def test_a_request_takes_its_way() -> None:
    """Its way to the server, a load, a step for 10 tokens, two of one token each, and back."""
    speed = Speed((1, 10), (1.0, 2.0), "", sequence_s=0.5, adapter_s=0.25, context_s=0.01, load_s=3.0, before_s=0.125, after_s=0.375)
    found = run(trace_of((10.0, 0, 10, 3)), speed)
    first = 0.125 + 3.0 + (2.0 + 0.5 + 0.25) + 0.375
    assert found.first_s[0.5] == pytest.approx(first)
    assert found.total_s[0.5] == pytest.approx(first + (1.75 + 0.1) + (1.75 + 0.11))
    assert (found.hit_rate, found.found, found.replicas[0].steps, found.replicas[0].tokens) == (0.0, 0.0, 3, 3)
    assert found.replicas[0].rows_a_step == 4.0 and found.tokens_per_s == pytest.approx(3 / found.seconds)


def test_a_mix_of_adapters_is_put_together_where_the_last_one_lacks_some() -> None:
    """Such a step takes 3 s more: the first of adapter 0, the first of 0 and 1 (6 to 10), and that of 2. Then the mix lacks 0 again. At 20
    and at 30 the mix of both still is there."""
    requests = [(0.0, 0, 1, 9), (5.0, 1, 1, 1), (20.0, 1, 1, 2), (30.0, 0, 1, 1), (40.0, 2, 1, 1), (50.0, 0, 1, 1)]
    found = run(trace_of(*requests), Speed((1,), (1.0,), "", mix_s=3.0))
    assert found.first_s == pytest.approx({q: np.quantile([4.0, 5.0, 1.0, 1.0, 4.0, 4.0], q) for q in (0.5, 0.95)})
    assert found.total_s == pytest.approx({q: np.quantile([15.0, 5.0, 2.0, 1.0, 4.0, 4.0], q) for q in (0.5, 0.95)})
    assert found.replicas[0].busy == pytest.approx((9 + 5 + 4 * 3) / 54)


@pytest.mark.parametrize(("resident", "seconds"), [(2, 4.0), (3, 1.0)])
def test_a_mix_goes_with_an_adapter_that_leaves(resident: int, seconds: float) -> None:
    """With room for two, 2 pushes 0 out; its own request is too long to run. 1 is there, but the mix of 0 and 1 is not."""
    requests = [(0.0, 0, 1, 9), (1.0, 1, 1, 9), (30.0, 2, 200, 1), (40.0, 1, 1, 1)]
    found = run(trace_of(*requests), Speed((1,), (1.0,), "", mix_s=3.0), resident=resident, kv_tokens=64, warm_up=0.75)
    assert found.counted == 1 and found.first_s[0.5] == pytest.approx(seconds)


def test_steps_are_slower_while_an_adapter_is_read() -> None:
    speed = Speed((1,), (1.0,), "", load_s=2.5, slowed=0.5)
    found = run(trace_of((0.0, 0, 1, 6), (3.0, 1, 1, 1)), speed)
    # reads 0 until 2.5; steps end at 3.5, then 1.5 s each while 1 is read from 3.5 on (until 6.0): 5.0, 6.5; then in steps of 1 s
    assert found.total_s[0.95] == pytest.approx(np.quantile([9.5, 4.5], 0.95))


def test_who_waits_for_the_same_adapter_waits_for_one_load() -> None:
    found = run(trace_of((0.0, 7, 1, 1), (0.5, 7, 1, 1), (9.0, 7, 1, 1)), Speed((1,), (1.0,), "", load_s=2.0))
    assert found.replicas[0].loads == 1 and found.hit_rate == pytest.approx(2 / 3) and found.found == pytest.approx(1 / 3)


def test_two_loads_at_a_time() -> None:
    """`residency.LOADERS`: three adapters take two loads' time."""
    found = run(trace_of((0.0, 0, 1, 1), (0.0, 1, 1, 1), (0.0, 2, 1, 1)), Speed((1,), (0.001,), "", load_s=2.0))
    assert found.total_s[0.5] == pytest.approx(2.0, abs=0.01) and found.seconds == pytest.approx(4.0, abs=0.01)


def test_a_prompt_beyond_the_cache_is_refused_and_others_go_on() -> None:
    found = run(trace_of((0.0, 0, 200, 1), (0.0, 0, 5, 1)), kv_tokens=64)
    assert (found.counted, found.refused) == (1, 1)


def test_the_warm_up_is_not_counted() -> None:
    found = run(trace_of(*((float(10 * i), 0, 1, 1) for i in range(10))), warm_up=0.5)
    assert found.counted == 5 and found.hit_rate == 1.0


# ---- routing


def test_round_robin_takes_turns_and_a_hash_stays() -> None:
    trace = seldom(30, 600, 0.5)
    turns, fixed = run(trace, replicas=3, resident=64), run(trace, replicas=3, routing="hash", resident=64)
    assert [r.requests for r in turns.replicas] == [200] * 3
    assert sum(r.loads for r in fixed.replicas) == len(set(trace.adapter.tolist())) < sum(r.loads for r in turns.replicas)
    assert fixed.hit_rate == 1 - sum(r.loads for r in fixed.replicas) / 600


def test_a_hash_moves_few_adapters_where_a_replica_comes() -> None:
    class Free:
        open = requests = 0

        def holds(self, digest: str) -> bool:
            return False

    of_4, of_5 = (ROUTERS["hash"]([Free()] * n) for n in (4, 5))
    chosen = [(of_4(str(i)), of_5(str(i))) for i in range(4000)]
    assert all(after in (before, 4) for before, after in chosen)
    assert sum(after == 4 for _, after in chosen) == pytest.approx(800, rel=0.15)
    assert np.bincount([before for before, _ in chosen]) == pytest.approx([1000] * 4, rel=0.15)


def test_affinity_prefers_the_holder_until_it_is_busier() -> None:
    class Seen:
        def __init__(self, open: int, names: str = ""):
            self.open, self.names, self.requests = open, names, 0

        def holds(self, digest: str) -> bool:
            return digest in self.names

    choose = ROUTERS["affinity"]([Seen(SPILL, "ab"), Seen(0, "c"), Seen(3, "b")])
    assert [choose(name) for name in "abcd"] == [0, 2, 1, 1]
    assert ROUTERS["affinity"]([Seen(SPILL + 1, "a"), Seen(0)])("a") == 1
    assert ROUTERS["least-loaded"]([Seen(2, "a"), Seen(1)])("a") == 1


def test_equal_shares_hit_as_each_alone() -> None:
    """Round robin: each of two replicas sees half of the same traffic, and has the hit rate of one place for all of its own."""
    p = Traffic(200, zipf=1.0).popularity
    found = run(seldom(200, 3000, 1.0), replicas=2, resident=20, warm_up=0.2)
    assert found.hit_rate == pytest.approx(che(p, 20), abs=0.03)


@pytest.mark.parametrize(
    ("changes", "words"), [({"routing": "hsah"}, "did you mean 'hash'"), ({"replicas": 0}, "replicas = 0"), ({"warm_up": 1.0}, "warm_up")]
)
def test_what_cannot_be_simulated(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        run(trace_of((0.0, 0, 1, 1)), **changes)
    assert words in str(refused.value.problems)


@pytest.mark.parametrize("bad", [{"resident": 0}, {"kv_tokens": 8}, {"max_queued": -1}])
def test_there_is_no_such_server(bad: dict) -> None:
    with pytest.raises(ConfigError, match="there is no such server"):
        Shape(**bad)


# ---- the real engine


def stepped(trace: Trace, resident: int, adapters: list[Held], **config) -> tuple[list[tuple[float, float]], int, int]:
    """((first token, last token) of each request, steps, loads) of a real engine each step of which takes a second."""
    clock = Clock()
    clock.now = 0.0
    engine = engine_of(clock=clock, adapter_bytes=resident * size_of(adapters[0]), prefix_cache=False, **config)
    coming, asked = list(enumerate(trace)), dict[int, Heard]()
    times: dict[int, list[float]] = {}
    while coming or len(times) < len(trace) or any(len(t) < 2 for t in times.values()):
        while coming and coming[0][1].at <= clock.now:
            i, one = coming.pop(0)
            prompt = tokens(one.prompt, i)
            asked[i] = ask(engine, str(i), prompt, adapters[one.adapter], tenant=str(one.tenant), max_tokens=one.answer, ignore_eos=True)
        if not engine.step():
            assert coming, "the engine stands still"
            clock.now = coming[0][1].at
            continue
        clock.now += 1.0
        for i, heard in asked.items():
            if heard.tokens and i not in times:
                times[i] = [clock.now]
            if heard.finish and len(times[i]) < 2:
                assert heard.finish == "length"
                times[i].append(clock.now)
    engine.idle_check()
    stats = engine.stats()
    return [(times[i][0], times[i][1]) for i in range(len(trace))], stats.steps, stats.loads


def size_of(adapter: Held) -> int:
    engine = engine_of()
    assert adapter.adapter is not None
    return packed_bytes(engine.base.pack(adapter.adapter))


@pytest.mark.parametrize(
    ("rate", "resident", "tenants", "shape"),
    [
        (0.5, 3, 1, {}),
        (1.0, 3, 3, {"max_running": 3}),
        (0.8, 2, 2, {"max_running": 4, "max_step_rows": 24}),
        (1.0, 4, 2, {"max_running": 6, "blocks": 12}),
    ],
    ids=["alone", "places", "chunks", "blocks"],
)
def test_a_real_engine_takes_the_same_steps(rate: float, resident: int, tenants: int, shape: dict) -> None:
    """Tenants, chunks of prompts, full places, preemption, evictions: the same first and last step of every request, the same loads."""
    traffic = Traffic(8, tenants=tenants, zipf=0.8, rate=rate, requests=40, prompt_tokens=20, answer_tokens=6, spread=0.5, seed=2)
    trace, one = traffic.trace(), held("lora-0")
    adapters = [Held(f"sha256:{i}", one.adapter) for i in range(8)]
    real, steps, loads = stepped(trace, resident, adapters, **shape)
    sizes = {name: n for name, n in shape.items() if name != "blocks"}
    found = run(trace, resident=resident, kv_tokens=16 * shape.get("blocks", 200), **sizes)
    assert (found.replicas[0].steps, found.replicas[0].loads, found.refused) == (steps, loads, 0)
    for part, q in ((0, found.first_s), (1, found.total_s)):
        took = [times[part] - at for times, at in zip(real, trace.at, strict=True)]
        assert q == pytest.approx({k: float(np.quantile(took, k)) for k in q})


def plain(trace: Trace, speed: Speed) -> list[tuple[float, float]]:
    """(first, last) of each request at one server with room for all, in a plain loop: whoever has come and has its adapter is in the next
    step, two adapters are read at a time, and each step gives everyone a token."""
    coming = [(asked.at + speed.before_s, i, asked) for i, asked in enumerate(trace)]
    waiting, running, wanted, loading, there = list[tuple[int, Asked]](), dict[int, Asked](), list[int](), dict[int, float](), set[int]()
    mix = set[int]()
    told, first, last, now = dict.fromkeys(range(len(trace)), 0), dict[int, float](), dict[int, float](), 0.0
    while coming or waiting or running:
        while coming and coming[0][0] <= now:
            _, i, asked = coming.pop(0)
            waiting.append((i, asked))
            if asked.adapter not in {*there, *loading, *wanted}:
                wanted.append(asked.adapter)
        there |= {a for a, end in loading.items() if end <= now}
        loading = {a: end for a, end in loading.items() if end > now}
        while wanted and len(loading) < 2:
            loading[wanted.pop(0)] = now + speed.load_s
        running |= {i: asked for i, asked in waiting if asked.adapter in there}
        waiting = [(i, asked) for i, asked in waiting if i not in running]
        if not running:
            now = min([*loading.values(), *(at for at, _, _ in coming[:1])])
            continue
        rows = sum(1 if told[i] else asked.prompt for i, asked in running.items())
        context = sum(asked.prompt + told[i] - 1 for i, asked in running.items() if told[i])
        adapters = {asked.adapter for asked in running.values()}
        mixed = not adapters <= mix
        mix = adapters if mixed else mix
        now += speed(Step(rows, len(running), len(adapters), context, mixed), bool(loading))
        for i, asked in list(running.items()):
            told[i] += 1
            if told[i] == 1:
                first[i] = now + speed.after_s - asked.at
            if told[i] == asked.answer:
                last[i] = now + speed.after_s - asked.at
                del running[i]
    return [(first[i], last[i]) for i in range(len(trace))]


@pytest.mark.parametrize(("rate", "load_s"), [(0.4, 0.3), (2.0, 0.3), (3.0, 0.05)])
def test_a_server_does_what_a_plain_loop_does(rate: float, load_s: float) -> None:
    """At rest and busy: the times of requests, with every kind of cost. (A longer queue has rules of its own: how many adapters are read
    ahead. Above, a real engine has them.)"""
    costs = {
        "sequence_s": 0.002,
        "adapter_s": 0.004,
        "context_s": 1e-5,
        "mix_s": 0.006,
        "load_s": load_s,
        "slowed": 0.4,
        "before_s": 0.011,
        "after_s": 0.013,
    }
    speed = Speed((1, 8, 64), (0.02, 0.03, 0.15), "", **costs)
    trace = Traffic(12, zipf=0.9, rate=rate, requests=60, prompt_tokens=20, answer_tokens=12, seed=4).trace()
    found, times = run(trace, speed, resident=12, kv_tokens=10**6), np.array(plain(trace, speed))
    assert found.hit_rate == 1 - len(set(trace.adapter)) / 60
    for column, q in ((0, found.first_s), (1, found.total_s)):
        assert q == pytest.approx({k: float(np.quantile(times[:, column], k)) for k in q}, rel=1e-9)


# ---- speed


def test_a_step_takes_what_lines_between_say() -> None:
    speed = Speed((1, 4, 8), (1.0, 1.3, 2.1), "")
    assert [speed.of_rows(n) for n in (1, 2, 4, 6, 8, 12)] == pytest.approx([1.0, 1.1, 1.3, 1.7, 2.1, 2.9])
    given = Speed.given(0.02, 0.001, 0.0005, 0.05)
    assert given(Step(5, 2, 2, 100)) == pytest.approx(0.02 + 4 * 0.001 + 2 * 0.0005)


def test_a_fit_finds_what_made_the_steps() -> None:
    true = Speed((1, 4, 16, 64), (0.010, 0.011, 0.014, 0.030), "", sequence_s=2e-4, adapter_s=5e-4, context_s=1e-6, mix_s=2e-3)
    draw = np.random.default_rng(0)
    steps = [Step(n, n, k, n * c) for n in (1, 4, 16, 64) for k in (0, n) for c in (10, 400)]
    steps += [Step(n, 1, 1, 0, mixed) for n in (4, 16, 64) for mixed in (False, True)]
    found = fit([(s, true(s) * draw.normal(1, 0.01)) for s in steps for _ in range(5)], "here", load_s=0.2)
    for s in [*steps, Step(32, 7, 3, 500), Step(8, 8, 8, 800)]:
        assert found(s) == pytest.approx(true(s), rel=0.04), s
    assert found.load_s == 0.2 and found.source == "here" and found.mix_s == pytest.approx(2e-3, rel=0.1)


def test_a_fit_has_no_costs_below_nothing() -> None:
    steps = [(Step(n, n, k, 0), 0.01 + 1e-4 * n - 1e-5 * k) for n in (1, 8, 64) for k in (0, n)]
    found = fit(steps, "")
    assert found.adapter_s == 0.0 and list(found.seconds) == sorted(found.seconds)


def test_a_load_beside_steps_takes_longer() -> None:
    """Alone 2 s; beside a stream that decodes from 0 to 20 it takes 5 s from the step on that begins at 4."""
    speed = Speed((1,), (1.0,), "", load_s=2.0, busy_load_s=5.0)
    alone = run(trace_of((0.0, 1, 1, 1)), speed)
    assert alone.total_s[0.5] == pytest.approx(2.0 + 1.0)
    found = run(trace_of((0.0, 0, 1, 20), (3.5, 1, 1, 1)), speed)
    assert found.total_s[0.5] == pytest.approx(np.median([2.0 + 20.0, 0.5 + 5.0 + 1.0]))


def test_a_load_slows_down_steps() -> None:
    speed = Speed((1,), (1.0,), "", slowed=0.5)
    assert (speed(Step(1, 1, 1, 0), True), speed(Step(1, 1, 1, 0))) == (1.5, 1.0)


def test_the_time_of_a_mix_is_measured_in_pairs() -> None:
    """Prompts take 1 s, for another adapter than the last one 0.25 s more, for its first use 9 s, and one in three is held up by others."""

    class Timed:
        adapters, asked, held_up = "abcde", list[str](), 0

        def begin(self, streams: int, prompt: int, answer: int, own: int) -> None:
            assert (streams, prompt, answer, own) == (1, 64, 1, 1)
            self.asked.append(self.adapters[0])

        def finish(self) -> list[StepFacts]:
            other, self.held_up = self.asked[-2:-1] != self.asked[-1:], (self.held_up + 1) % 3
            first = self.asked.count(self.asked[-1]) == 1
            return [StepFacts(1.0 + 0.25 * other + 9.0 * first + 5.0 * (self.held_up == 0), 64, 0, 1)]

    timed: Any = Timed()
    assert _mixing(timed, 64) == pytest.approx(0.25) and timed.adapters == "abcde"


def event(*tokens: int) -> bytes:
    return b'data: {"choices": [{"text": "", "token_ids": %s, "prompt_token_ids": [7, 8, 9]}]}\n\n' % json.dumps(tokens).encode()


def test_tokens_are_counted_and_not_events() -> None:
    """Two tokens in one event, an event in two pieces, two events in one piece, and one without tokens."""
    pieces = [b"HTTP/1.1 200 OK\r\n\r\n", event(5), event(6, 7), (cut := event(8))[:-40], cut[-40:] + event() + event(9), b"data: [DONE]"]
    sizes = np.cumsum([len(p) for p in pieces]).tolist()
    assert pieces[3].count(b"]") == 0
    assert tokens_of(b"".join(pieces), list(zip(range(6), sizes, strict=True))) == [(1, 1), (2, 3), (4, 5)]


def test_seconds_of_a_token_while_all_are_decoded() -> None:
    """The second one begins at 3 and the first one ends at 9: from then to then they have 4 and 2 tokens more."""
    one = [(1.0, 1), (3.0, 2), (5.0, 4), (9.0, 6)]
    two = [(3.0, 1), (6.0, 2), (9.0, 3), (20.0, 9)]
    assert token_seconds([one, two]) == pytest.approx((6 / 4 + 6 / 2) / 2)
    assert token_seconds([one]) == pytest.approx(8 / 5)
    with pytest.raises(TrimtabError, match="no two answers"):
        token_seconds([[(1.0, 1)], [(5.0, 1)]])


def test_what_a_server_adds_is_split_into_steps_and_sequences() -> None:
    assert added_by_server([(n, 0.5 + 0.25 * n) for n in (1, 2, 4)]) == pytest.approx((0.5, 0.25))
    assert added_by_server([(1, 3.0), (2, 2.0), (3, 1.0)]) == pytest.approx((2.0, 0.0))
    assert added_by_server([(1, 3.0)]) == pytest.approx((3.0, 0.0))


def test_the_way_and_rows_come_from_prompts_that_come_alone() -> None:
    """A step of 4 rows is taken to take 1.3, of 8 rows 2.1. First tokens after 2 and 3.2 s: the way is 0.7, and four rows more are 1.2."""
    speed = Speed((1, 4, 8), (1.0, 1.3, 2.1), "")
    way_s, seconds = way_and_rows({4: 2.0, 8: 3.2}, speed)
    assert (way_s, seconds) == (pytest.approx(0.7), pytest.approx((1.0, 1.3, 2.5)))
    assert way_and_rows({4: 1.0}, speed) == (0.0, speed.seconds)


class Server(served._Client):
    """One that takes no longer answers than so many tokens. busy_with: of the streams beside which adapters are read."""

    def __init__(self, most: int) -> None:
        super().__init__("http://127.0.0.1:1", "a")
        self.most, self.busy_with = most, list[int]()

    async def together(self, n: int, answer: int = served.ANSWER) -> list[served.Streams]:
        if answer != served.ANSWER:
            self.busy_with.append(answer)
        if answer > self.most:
            raise TrimtabError("too long")
        await asyncio.sleep(0.001)
        return [[(0.0, 1), (1.0, 48)]] * n

    async def alone(self, prompt: int, model: str | None = None) -> float:
        await asyncio.sleep(0.002)
        return 1.0

    async def loading(self, numbers: Iterable[int]) -> tuple[float, float]:
        await asyncio.sleep(0.002)
        return 0.1, 0.2


def test_streams_beside_which_adapters_are_read_fit_the_base_and_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "PAUSE_S", 0.002)
    server = Server(most=84)
    found = asyncio.run(served._measured(SECOND, Shape(), 100, server))
    assert found.busy_load_s == pytest.approx(0.2) and set(server.busy_with) == {84}
    with pytest.raises(TrimtabError, match="too long"):  # a figure of adapters that are read alone would be taken for one beside streams
        asyncio.run(served._measured(SECOND, Shape(), 100, Server(most=60)))


def test_what_a_load_takes_in_a_server_is_without_the_mix_that_comes_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load takes 0.1 s, and delays a first token by 0.2: by itself, by 0.03 for the mix that the step puts together, and by its way to a
    thread and back."""
    monkeypatch.setattr(served, "PAUSE_S", 0.002)
    found = asyncio.run(served._measured(replace(SECOND, mix_s=0.03), Shape(), 100, Server(most=84)))
    assert (found.load_s, found.busy_load_s, found.mix_s) == pytest.approx((0.1 + 0.07, 0.1 + 0.07, 0.03))


@pytest.mark.parametrize(
    "bad", [{"rows": ()}, {"seconds": (0.0,)}, {"load_s": -1.0}, {"slowed": math.nan}, {"rows": (2, 1), "seconds": (1.0, 1.0)}]
)
def test_no_step_takes_so_long(bad: dict) -> None:
    with pytest.raises(ConfigError, match="no step takes so long"):
        Speed(**{"rows": (1,), "seconds": (1.0,), "source": "", **bad})


# ---- the command


def invoke(*args: str):
    return CliRunner().invoke(command, list(args), catch_exceptions=False)


GIVEN = ("--step-ms", "10", "--row-us", "100", "--load-ms", "20")


def test_the_command_says_what_it_was_told_and_compares_routings(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    text = invoke(
        "--adapters", "20", "--requests", "50", "--answer-tokens", "8", "--replicas", "2", "--write-trace", str(trace), *GIVEN
    ).output
    assert all(name in text for name in ROUTERS) and "steps: as given" in text and "assumed: " in text
    found = json.loads(invoke("--trace", str(trace), "--routing", "hash", "--replicas", "2", "--json", *GIVEN).output)
    [simulated] = found["simulated"]
    assert found["speed"]["seconds"] == pytest.approx([0.01, 0.0101]) and simulated["counted"] == 40
    plain = run(Trace.read(trace), Speed.given(0.01, 1e-4, 0, 0.02), replicas=2, routing="hash", warm_up=0.2)
    assert simulated["hit_rate"] == plain.hit_rate and simulated["total_s"] == {str(q): s for q, s in plain.total_s.items()}
    with pytest.raises(ConfigError, match="File exists"):
        invoke("--requests", "5", "--write-trace", str(trace), *GIVEN)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--load-ms", "5"], "--load-ms: of no use"),
        (["--step-ms", "5", "--speed", "x"], "both say"),
        (["--speed", "missing.json"], "no speeds can be read"),
        (["--rate", "0", *GIVEN], "there is no such traffic"),
    ],
)
def test_options_that_do_not_go_together(args: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        invoke(*args)


@pytest.mark.slow
def test_a_base_is_measured_and_its_speeds_are_kept(tmp_path: Path, tiny_llama_folder: Path) -> None:
    """Of a real engine: every kind of step has a time, and what is written is what is used again."""
    kept = tmp_path / "speed.json"
    base = ("--base", str(tiny_llama_folder), "--max-running", "8", "--kv-tokens", "4096")
    traffic = ("--requests", "50", "--prompt-tokens", "20", "--answer-tokens", "5", "--routing", "hash", "--json")
    first = json.loads(invoke(*base, *traffic, "--write-speed", str(kept)).stdout)
    speed = first["speed"]
    assert len(speed["rows"]) > 3 and speed["rows"][0] == 1 and 0 < speed["seconds"][0] < 10 and speed["load_s"] > 0
    assert 0 < speed["before_s"] < 10 and 0 < speed["busy_load_s"] < 10
    assert "measured on" in speed["source"] and "in a server" in speed["source"] and Speed.read(kept).load_s == speed["load_s"]
    again = json.loads(invoke("--speed", str(kept), "--max-running", "8", "--kv-tokens", "4096", *traffic).stdout)
    assert again["simulated"][0]["total_s"] == first["simulated"][0]["total_s"]
