"""Speculation: the answers of an engine without it, token by token, whatever is drafted; where nothing is drafted; what it costs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import pytest

from tests.laws.common import base_of, tokens
from tests.serve.common import Heard, ask, engine_of, finish, held, solo, without_end
from trimtab.serve.drafts import LONGEST, Drafts
from trimtab.serve.engine import Engine
from trimtab.serve.request import Grammar
from trimtab.serve.step_cost import MEASURED, StepCost

ENDLESS = {"ignore_eos": True, "max_tokens": 40}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": ENDLESS,
    "ends": {"max_tokens": 60},
    "seeded": ENDLESS | {"temperature": 0.7, "seed": 3, "top_p": 0.9},
    "hot": ENDLESS | {"temperature": 1.5, "seed": 4, "top_k": 5},
    "penalties": ENDLESS | {"presence_penalty": 0.7, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
    "logprobs": ENDLESS | {"logprobs": 3},
    "least": {"max_tokens": 40, "min_tokens": 25},
    "one": {"max_tokens": 1, "ignore_eos": True},
    "two": {"max_tokens": 2, "ignore_eos": True},
}


class Settled(StepCost):
    """One that learns nothing."""

    def learn(self, rows: int, seconds: float) -> None: ...


def speculating(seconds: Sequence[float] = (1.0, 1.5), **config: Any) -> Engine:
    """An engine whose steps of 1 and 101 rows are taken to last so long: others lie on the line."""
    engine = engine_of("llama", speculate=True, **config)
    engine.scheduler.step_cost = Settled((1, 101), list(seconds))
    return engine


def told(heard: Heard) -> list[Any]:
    """Every delta, log-probabilities apart."""
    return [(d.text, [t.id for t in d.tokens], d.finish, d.usage if d.finish else None) for d in heard.deltas]


def prompts() -> list[list[int]]:
    """Some that repeat themselves, so that something is drafted from the first token on."""
    return [tokens(n, n) * times for n, times in ((5, 4), (9, 1), (20, 3), (3, 12))]


def run(engine: Engine, **settings: Any) -> list[Heard]:
    adapters = [None, held("lora-0"), held("prefix-0"), held("ia3-0")]
    heard = [ask(engine, f"{i}", p, a, **settings) for i, (p, a) in enumerate(zip(prompts(), adapters, strict=True))]
    finish(engine)
    return heard


def oracle(answers: Sequence[Sequence[int]], wrong: int) -> Callable[..., list[int]]:
    """Drafts that know the answers, but that each `wrong`-th token is another."""
    known = {tuple(p): [*p, *a] for p, a in zip(prompts(), answers, strict=True)}

    def next_of(self: Drafts, so_far: Sequence[int], most: int) -> list[tuple[int, float]]:
        whole = next(w for p, w in known.items() if tuple(so_far[: len(p)]) == p and w[: len(so_far)] == list(so_far))
        drafts = whole[len(so_far) :][: min(most, 6)]
        return [(t if (len(so_far) + i) % wrong else (t + 1) % 256, 0.9) for i, t in enumerate(drafts)]

    return next_of


@cache
def plainly(name: str) -> list[Heard]:
    return run(engine_of("llama"), **SETTINGS[name])


CASES = [(name, drafts) for name in SETTINGS for drafts in ("its own", "some wrong")]
CASES += [(name, drafts) for name in ("greedy", "seeded") for drafts in ("all right", "all wrong")]


@pytest.mark.parametrize(("name", "drafts"), CASES)
def test_answers_are_those_without(monkeypatch, name, drafts):
    plain = plainly(name)
    if drafts != "its own":
        wrong = {"all right": 10**6, "some wrong": 3, "all wrong": 1}[drafts]
        monkeypatch.setattr(Drafts, "next", oracle([h.ids for h in plain], wrong))
    engine = speculating()
    heard = run(engine, **SETTINGS[name])
    assert [told(h) for h in heard] == [told(h) for h in plain]
    for one, other in zip(heard, plain, strict=True):
        for a, b in zip(one.tokens, other.tokens, strict=True):
            assert a.logprob == (None if b.logprob is None else pytest.approx(b.logprob, abs=1e-4))
            assert [i for i, _ in a.top] == [i for i, _ in b.top]
    stats = engine.stats()
    if drafts == "all wrong":
        assert stats.accepted_tokens == 0
    elif drafts == "all right":
        assert stats.accepted_tokens == stats.drafted_tokens > 0


def test_it_is_a_plain_loops_greedy_answer_in_fewer_steps():
    engine, slow = speculating(), engine_of("llama")
    prompt = tokens(4, 8) * 5
    for e in (engine, slow):
        heard = ask(e, "a", prompt, max_tokens=60)
        finish(e)
        want = solo("llama", prompt, None, 60)
        assert without_end(e, heard.ids) == want
    assert engine.stats().accepted_tokens > 8
    assert engine.stats().steps <= slow.stats().steps - engine.stats().accepted_tokens + 1


def test_stop_texts_and_tokens_end_within_a_draft(monkeypatch):
    plain = plainly("greedy")
    text = plain[0].text
    stop = next(text[i : i + 2] for i in range(4, len(text)) if text[i : i + 2].isprintable())
    for more in ({"stop": (stop,)}, {"stop_token_ids": (plain[1].ids[7],)}):
        want = run(engine_of("llama"), **ENDLESS | more)
        with monkeypatch.context() as m:
            m.setattr(Drafts, "next", oracle([h.ids for h in plain], 10**6))
            got = run(speculating(), **ENDLESS | more)
        assert [told(h) for h in got] == [told(h) for h in want] and any(h.finish == "stop" for h in got)


def test_with_few_blocks_it_takes_from_nobody():
    """Sequences are preempted as often as without, and nothing is left behind; the prefix cache holds what was said alone."""
    counts = []
    for speculate in (True, False):
        engine = (speculating if speculate else partial(engine_of, "llama"))(blocks=16, block_size=8)
        heard = [ask(engine, f"{i}", tokens(3, i) * 6, max_tokens=40, ignore_eos=True) for i in range(4)]
        finish(engine)
        counts.append((engine.stats().preemptions, [h.ids for h in heard]))
        first = tokens(3, 0) * 6 + heard[0].ids
        again = ask(engine, "again", first, max_tokens=8, ignore_eos=True)
        finish(engine)
        assert again.ids == base_of("llama").generate_ids([first], None)[0][:8] or engine.base.stop_ids & set(again.ids)
    assert counts[0][1] == counts[1][1]


def test_grammars_have_no_drafts():
    engine = speculating()
    grammar = Grammar("choice", json.dumps(["aaaaaaaaaaaaaaaaaaaa"]))
    heard = ask(engine, "g", tokens(4, 1) * 5, max_tokens=40, grammar=grammar)
    try:
        for _ in range(2000):
            engine.step()
            if heard.finish:
                break
        assert heard.finish == "stop" and heard.text == "a" * 20 and engine.stats().drafted_tokens == 0
    finally:
        engine.close()


def test_a_tenant_pays_for_its_drafts_and_has_its_own_rows_alone():
    """Of two tenants, one repeats itself: its drafted rows are in its share of each step, and in its counter."""
    engine = speculating()
    steps: list[dict[str, int]] = []
    schedule = engine.scheduler.schedule

    def watched(now: float) -> Any:
        work = schedule(now)
        rows = {"a": 0, "b": 0}
        for w in work:
            rows[w.live.request.tenant] += w.rows + len(w.drafts)
        steps.append(rows)
        return work

    engine.scheduler.schedule = watched  # type: ignore[method-assign]
    for i in range(6):
        ask(engine, f"a{i}", tokens(3, i) * 8, tenant="a", max_tokens=40, ignore_eos=True)
    ask(engine, "b", 12, tenant="b", max_tokens=30, ignore_eos=True)
    finish(engine)
    stats = engine.stats()
    assert stats.drafted_tokens > 0
    both = [s for s in steps if s["a"] and s["b"]]
    bound = engine.scheduler.bounds.read_rows
    assert both and max(s["a"] + s["b"] for s in both[5:]) <= 2 * (bound + 1 + LONGEST) - bound


def test_as_many_are_drafted_as_pay(monkeypatch):
    """Two sequences, one with drafts that are right at 0.9 each, one at 0.5. The best number by hand: of all that could be drafted."""
    rates = {"a": 0.9, "b": 0.5}
    for steep, want in ((0.0, {"a": 5, "b": 5}), (0.1, {"a": 5, "b": 1}), (0.4, {"a": 3}), (0.8, {})):  # at 0.8 one would give 0.4% more
        engine = speculating((1.0, 1.0 + 100 * steep))
        for name in rates:
            ask(engine, name, tokens(8, 3), max_tokens=9, ignore_eos=True, tenant=name)
        while not all(live.new for live in engine.scheduler.running) or len(engine.scheduler.running) < 2:
            engine.step()
        lives = {live.request.id: live for live in engine.scheduler.running}
        with monkeypatch.context() as m:
            offers = {id(live.drafts): [(7, rates[name] ** (i + 1)) for i in range(5)] for name, live in lives.items()}
            m.setattr(Drafts, "next", lambda self, so_far, most, offers=offers: offers[id(self)][:most])
            cost = engine.scheduler.step_cost
            found = engine.scheduler._speculate(cost, dict.fromkeys(lives.values(), 1), {})
        by_hand = max(
            ((2 + sum(p for _, p in chosen)) / (1 + steep * (1 + len(chosen))), len(chosen))
            for k in range(11)
            for chosen in [sorted(((n, rates[n] ** (i + 1)) for n in rates for i in range(5)), key=lambda o: -o[1])[:k]]
        )[1]
        counts = {live.request.id: len(drafts) for live, drafts in found.items()}
        assert counts == want and sum(counts.values()) in (by_hand, 0)
        engine.close()


def test_a_step_without_rows_asks_for_no_cost():
    """Between requests, and while an adapter loads: two rows that take twice as long as one would make the cost of none 0."""
    engine = engine_of("llama", speculate=True)
    engine.scheduler.step_cost = Settled((1, 2), [1.0, 2.0])
    engine.step()
    heard = ask(engine, "a", tokens(4, 8) * 3, held("lora-0"), max_tokens=6, ignore_eos=True)
    finish(engine)
    assert len(heard.ids) == 6


def test_a_step_is_measured_and_lies_on_straight_lines():
    cost = StepCost((1, 4, 10), [2.0, 5.0, 8.0])
    assert [cost(n) for n in (1, 2, 4, 6, 10, 12)] == pytest.approx([2, 3, 5, 6, 8, 9])
    for _ in range(500):
        for n, seconds in ((2, 3.5), (4, 6.0), (12, 12.0)):  # 10 and below lie on lines through these
            cost.learn(n, seconds)
    assert [cost(n) for n in (1, 2, 4, 12)] == pytest.approx([2.25, 3.5, 6, 12], rel=0.02)
    for _ in range(100):
        cost.learn(10, 1.0)
    assert cost(4) <= cost(10)
    engine = engine_of("llama", speculate=True)
    measured = engine.scheduler.step_cost
    assert tuple(measured.rows) == MEASURED and 0 < measured.seconds[0] <= measured.seconds[-1] < 10
    assert list(measured.seconds) == sorted(measured.seconds) and engine.pool.used == 0
    engine.close()


def test_drafts_follow_what_stood_there_before():
    drafts = Drafts(6)
    assert drafts.next([1, 2, 3, 4, 5, 6], 8) == []
    assert drafts.next([1, 2, 3, 4, 5, 6, 1, 2], 8) == []
    told = [1, 2, 3, 4, 5, 6, 1, 2, 3]
    assert drafts.next(told, 2) == [(4, 0.5), (5, pytest.approx(0.5 * 0.6))]
    assert drafts.next(told, 0) == []
    assert [t for t, _ in drafts.next(told, 15)] == [4, 5, 6, 1]  # then less likely than LEAST
    told += [4, 5, 6, 1] * 6
    assert [t for t, _ in drafts.next(told, 9)] == [4, 5, 6, 1, 4, 5, 6, 1, 4]  # it goes on in circles, and was right often


def test_drafts_that_are_wrong_become_rare():
    """Three tokens come again and again, and each time another follows."""
    drafts, told, drafted = Drafts(0), list[int](), 0
    for i in range(60):
        told += [1, 2, 3]
        drafted += bool(drafts.next(told, 8))
        told.append(10 + i)
    assert drafted < 15
