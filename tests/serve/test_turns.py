"""Rows of a step where tenants compete: nobody waits long for the rows of others, and nobody is left without any."""

from __future__ import annotations

import random
from collections import Counter

from tests.laws.common import tokens
from tests.serve.common import Clock, Heard, ask, engine_of, finish
from trimtab.serve import turns
from trimtab.serve.engine import Engine
from trimtab.serve.runner import Runner
from trimtab.serve.turns import row_limits


def test_limits_by_hand():
    assert row_limits({}, {}, 4, 99) == {} == row_limits({"a": 99}, {"a": 1.0}, 4, 99)
    assert row_limits({"a": 100}, {"a": 1.0}, 4, 99) == {"a": 99}, "others may come"
    equal = {"a": 1.0, "b": 1.0}
    # alone b takes 4 + 1, so both may take 10: six rows
    assert row_limits({"a": 60, "b": 1}, equal, 4, 99) == {"b": 1, "a": 5}
    assert row_limits({"a": 5, "b": 1}, equal, 4, 99) == {}
    # 4 + 30 alone, 68 for both
    assert row_limits({"a": 34, "b": 30}, equal, 4, 99) == {} and row_limits({"a": 35, "b": 30}, equal, 4, 99) == {"b": 30, "a": 34}
    # b has a quarter: (4 + 1) * 4 - 4 = 16 rows; a has three: (4 + 60) * 4/3 - 4 is more
    assert row_limits({"a": 60, "b": 1}, {"a": 3.0, "b": 1.0}, 4, 99) == {"b": 1, "a": 15}


def test_limits_keep_their_promise_and_waste_nothing():
    rng = random.Random(0)
    for _ in range(500):
        wanted = {t: rng.randrange(1, 80) for t in "abcdef"[: rng.randrange(2, 7)]}
        weights = {t: rng.choice([0.5, 1.0, 2.0]) for t in wanted}
        bound = rng.choice([40, 10_000])
        limits = row_limits(wanted, weights, 4, bound)
        total = sum(weights.values())
        most = min(bound, *((4 + wanted[t]) * total / weights[t] - 4 for t in wanted))
        if not limits:
            assert sum(wanted.values()) <= most
            continue
        assert all(1 <= limits[t] <= wanted[t] for t in wanted)
        assert most - len(wanted) <= sum(limits.values()) <= most
        slowest = min(wanted, key=lambda t: (4 + wanted[t]) / weights[t])
        assert most == bound or limits[slowest] == wanted[slowest], "who sets the bound has all that it wants"


def fed(monkeypatch) -> list[list[int]]:
    """Rows of each sequence in each forward."""
    steps: list[list[int]] = []
    real = Runner.__call__
    monkeypatch.setattr(Runner, "__call__", lambda self, feeds: steps.append([len(f.ids) for f in feeds]) or real(self, feeds))
    return steps


def test_many_answers_of_one_tenant_take_turns_beside_another(monkeypatch):
    """Nothing changes in what they say, each gets on, and alone they have all rows again."""
    engine, steps = engine_of(max_running=32, blocks=400), fed(monkeypatch)
    prompts = [tokens(6, i) for i in range(20)]
    many = [ask(engine, f"m{i}", p, max_tokens=40, ignore_eos=True, tenant="many") for i, p in enumerate(prompts)]
    for _ in range(2):
        engine.step()
    assert steps[-1] == [1] * 20
    one = ask(engine, "one", tokens(8, 99), max_tokens=21, ignore_eos=True, tenant="one")
    before, at = [len(h.ids) for h in many], len(steps)
    while one.finish is None:
        engine.step()
    prompt, beside = steps[at], steps[at + 1 :]
    assert len(beside) == 20 and 8 in prompt and sum(prompt) == 4 + 2 * 8 and all(sum(rows) == 6 for rows in beside)
    gained = Counter(len(h.ids) - n for h, n in zip(many, before, strict=True))
    assert set(gained) <= {5, 6} and sum(n * k for k, n in gained.items()) == 12 + 20 * 5, "in turns"
    engine.step()
    assert steps[-1] == [1] * 20
    finish(engine)
    alone = engine_of(max_running=32, blocks=400)
    expected = [ask(alone, f"m{i}", p, max_tokens=40, ignore_eos=True) for i, p in enumerate(prompts)]
    finish(alone)
    assert [h.ids for h in many] == [h.ids for h in expected]


def beside_one_answer(engine: Engine, steps: list[list[int]], full: int, requests: int, prompt: int, max_tokens: int) -> list[Heard]:
    """Another tenant's requests, which come when an answer of 30 tokens has begun. Until it ends a step has six rows at most, and all of
    them but few are used: as many as `full` steps have."""
    one = ask(engine, "one", 6, max_tokens=30, ignore_eos=True, tenant="one")
    engine.step()
    others = [ask(engine, f"o{i}", prompt, max_tokens=max_tokens, ignore_eos=True, tenant="other") for i in range(requests)]
    at = len(steps)
    while one.finish is None:
        engine.step()
    assert all(sum(rows) <= 6 for rows in steps[at:]) and sum(map(sum, steps[at:])) >= full * 6
    return others


def test_long_prompts_of_one_tenant_are_cut_small_beside_answers_of_another(monkeypatch):
    clock = Clock()
    engine, steps = engine_of(max_running=16, blocks=900, clock=clock), fed(monkeypatch)
    long = beside_one_answer(engine, steps, 29, 4, 300, 2)
    engine.step()
    assert sum(steps[-1]) == turns.ON_CPU.recent_rows, "the other may come back soon"
    clock.now += turns.RECENT_S + 0.1
    engine.step()
    assert sum(steps[-1]) == turns.ON_CPU.lately_rows, "or later"
    clock.now += turns.LATELY_S
    long += [ask(engine, f"m{i}", 300, max_tokens=2, ignore_eos=True, tenant="other") for i in range(4)]
    finish(engine)
    assert all(h.finish == "length" for h in long) and max(map(sum, steps)) > 400, "alone they have whole steps again"


def test_short_prompts_that_come_together_are_cut_too(monkeypatch):
    """All of them count as wanted, not only the first of the queue."""
    engine, steps = engine_of(max_running=64, blocks=600), fed(monkeypatch)
    many = beside_one_answer(engine, steps, 28, 60, 4, 30)
    finish(engine)
    assert all(h.finish == "length" for h in many)


def test_answers_of_one_tenant_leave_room_for_another_that_was_just_there(monkeypatch):
    """A step's rows are bounded, whether they are of prompts or of answers, and both get on."""
    clock = Clock()
    engine, steps = engine_of(max_running=100, blocks=900, clock=clock), fed(monkeypatch)
    many = [ask(engine, f"m{i}", tokens(4, i), max_tokens=40, ignore_eos=True, tenant="many") for i in range(90)]
    engine.step()
    assert len(many[-1].ids) == 1, "nobody else was there"
    one = ask(engine, "one", 4, max_tokens=1, tenant="one")
    while one.finish is None:
        engine.step()
    late, before = ask(engine, "late", tokens(4, 100), max_tokens=3, ignore_eos=True, tenant="many"), [len(h.ids) for h in many]
    at = len(steps)
    for _ in range(9):
        engine.step()
    assert [sum(rows) for rows in steps[at:]] == [turns.ON_CPU.recent_rows] * 9
    assert all(len(h.ids) >= n + 4 for h, n in zip(many, before, strict=True)), "at least every other step"
    assert late.finish == "length", "its prompt has not waited"
    clock.now += turns.LATELY_S + 1
    engine.step()
    assert sum(steps[-1]) == 90
    engine.close()


def test_prompts_of_a_tenant_that_holds_back_get_half_of_its_rows():
    engine = engine_of(max_running=32, blocks=400)
    for i in range(20):
        ask(engine, f"m{i}", 4, max_tokens=60, ignore_eos=True, tenant="many")
    engine.step()
    ask(engine, "one", 4, max_tokens=60, ignore_eos=True, tenant="one")
    engine.step()
    late = ask(engine, "late", 6, max_tokens=4, ignore_eos=True, tenant="many")
    for _ in range(8):
        engine.step()
    assert late.ids, "its prompt did not wait until an answer has ended"
    engine.close()


def test_rows_are_cheap_on_a_gpu():
    """One row beside 200 of another tenant: a step of all of them costs little more than a step of one."""
    assert row_limits({"a": 200, "b": 1}, {"a": 1.0, "b": 1.0}, turns.ELSEWHERE.read_rows, 1024) == {}
