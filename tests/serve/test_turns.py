"""Rows of a step where tenants compete: nobody waits long for the rows of others, and nobody is left without any."""

from __future__ import annotations

import random
from collections import Counter

from tests.laws.common import tokens
from tests.serve.common import Clock, ask, engine_of, finish
from trimtab.serve import turns
from trimtab.serve.runner import Runner
from trimtab.serve.turns import row_limits


def test_limits_by_hand():
    assert row_limits({}, {}, 4) == {} == row_limits({"a": 1000}, {"a": 1.0}, 4)
    equal = {"a": 1.0, "b": 1.0}
    # alone b takes 4 + 1, so both may take 10: six rows
    assert row_limits({"a": 60, "b": 1}, equal, 4) == {"b": 1, "a": 5}
    assert row_limits({"a": 5, "b": 1}, equal, 4) == {}
    # 4 + 30 alone, 68 for both
    assert row_limits({"a": 34, "b": 30}, equal, 4) == {} and row_limits({"a": 35, "b": 30}, equal, 4) == {"b": 30, "a": 34}
    # b has a quarter: (4 + 1) * 4 - 4 = 16 rows; a has three: (4 + 60) * 4/3 - 4 is more
    assert row_limits({"a": 60, "b": 1}, {"a": 3.0, "b": 1.0}, 4) == {"b": 1, "a": 15}


def test_limits_keep_their_promise_and_waste_nothing():
    rng = random.Random(0)
    for _ in range(500):
        wanted = {t: rng.randrange(1, 80) for t in "abcdef"[: rng.randrange(2, 7)]}
        weights = {t: rng.choice([0.5, 1.0, 2.0]) for t in wanted}
        limits = row_limits(wanted, weights, 4)
        total = sum(weights.values())
        most = min((4 + wanted[t]) * total / weights[t] for t in wanted) - 4
        if not limits:
            assert sum(wanted.values()) <= most
            continue
        assert all(1 <= limits[t] <= wanted[t] for t in wanted)
        assert most - len(wanted) <= sum(limits.values()) <= most
        slowest = min(wanted, key=lambda t: (4 + wanted[t]) / weights[t])
        assert limits[slowest] == wanted[slowest], "who sets the bound has all that it wants"


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


def test_long_prompts_of_one_tenant_are_cut_small_beside_answers_of_another(monkeypatch):
    clock = Clock()
    engine, steps = engine_of(max_step_rows=256, max_running=16, blocks=600, clock=clock), fed(monkeypatch)
    one = ask(engine, "one", 6, max_tokens=30, ignore_eos=True, tenant="one")
    engine.step()
    long = [ask(engine, f"l{i}", 300, max_tokens=2, ignore_eos=True, tenant="long") for i in range(4)]
    at = len(steps)
    while one.finish is None:
        engine.step()
    assert all(sum(rows) <= 6 for rows in steps[at:]) and sum(map(sum, steps[at:])) >= 29 * 6
    engine.step()
    assert sum(steps[-1]) == turns.ON_CPU.prompt_rows, "the other may come back soon"
    clock.now += turns.RECENT_S
    finish(engine)
    assert all(h.finish == "length" for h in long) and max(map(sum, steps)) > 200, "alone they have whole steps again"


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
    assert row_limits({"a": 200, "b": 1}, {"a": 1.0, "b": 1.0}, turns.ELSEWHERE.read_rows) == {}
