"""Virtual token counters: who is next, what comes back after a pause, shares by weight."""

from __future__ import annotations

from tests.serve.common import ask, engine_of
from trimtab.serve import fairness as fairness_module
from trimtab.serve.fairness import Fairness


def test_served_tokens_count_by_kind_and_weight():
    f = Fairness()
    for t in "ab":
        f.arrive(t)
    f.charge("a", 1.0, tokens_in=10, tokens_out=5)
    f.charge("b", 4.0, tokens_in=10, tokens_out=5)
    assert f.counters == {"a": 20.0, "b": 5.0}
    assert f.order(["a", "b"]) == ["b", "a"]


def test_who_comes_back_is_lifted_to_the_smallest_of_those_who_were_there():
    f = Fairness()
    for t in "abc":
        f.arrive(t)
    f.leave("c")
    f.charge("a", 1.0, tokens_in=100)
    f.charge("b", 1.0, tokens_in=60)
    f.arrive("c")
    assert f.counters["c"] == 60.0
    f.charge("c", 1.0, tokens_in=500)
    f.leave("c")
    f.arrive("c")
    assert f.counters["c"] == 560.0, "leaving does not forgive what was served"
    f.arrive("new")
    assert f.counters["new"] == 60.0
    f.arrive("a")
    assert f.counters["a"] == 100.0, "another request of one that is there changes nothing"


def test_after_everybody_has_left_the_last_one_counts():
    f = Fairness()
    f.arrive("a")
    f.charge("a", 1.0, tokens_in=70)
    f.leave("a")
    f.arrive("b")
    assert f.counters["b"] == 70.0


def test_counters_of_those_who_have_gone_are_bounded(monkeypatch):
    monkeypatch.setattr(fairness_module, "MAX_IDLE", 10)
    f = Fairness()
    f.arrive("stays")
    f.charge("stays", 1.0, tokens_in=5)
    for i in range(100):
        f.arrive(f"t{i}")
        f.leave(f"t{i}")
    assert len(f.counters) <= 12 and "stays" in f.counters


def _served(engine, tenants, steps):
    for _ in range(steps):
        engine.step()
    return {t: sum(engine.stats().tenant_tokens.get(t, (0, 0))) for t in tenants}


def test_a_tenant_with_many_requests_does_not_hold_up_one_with_few():
    engine = engine_of(max_running=2)
    crowd = [ask(engine, f"crowd{i}", 8, tenant="crowd", max_tokens=10, ignore_eos=True) for i in range(30)]
    for _ in range(12):
        engine.step()
    lone = ask(engine, "lone", 8, tenant="lone", max_tokens=10, ignore_eos=True)
    before = sum(h.finish is not None for h in crowd)
    for _ in range(60):
        engine.step()
        if lone.finish:
            break
    assert lone.finish == "length" and sum(h.finish is not None for h in crowd) - before <= 4


def test_tokens_served_follow_the_weights():
    engine = engine_of(max_running=4, blocks=400)
    for i in range(60):
        for tenant, weight in (("one", 1.0), ("three", 3.0)):
            ask(engine, f"{tenant}{i}", 6, tenant=tenant, weight=weight, max_tokens=6, ignore_eos=True)
    served = _served(engine, ("one", "three"), 120)
    assert 2.3 < served["three"] / served["one"] < 3.7, served
    engine.close()


def test_equal_tenants_get_the_same_whatever_they_ask_for():
    """One asks for long answers, one for short ones: requests differ, tokens do not."""
    engine = engine_of(max_running=4, blocks=400)
    for i in range(80):
        ask(engine, f"short{i}", 6, tenant="short", max_tokens=2, ignore_eos=True)
        ask(engine, f"long{i}", 6, tenant="long", max_tokens=30, ignore_eos=True)
    counters = engine.scheduler.fairness.counters
    for _ in range(100):
        engine.step()
        assert abs(counters["short"] - counters["long"]) <= 4 * (6 + 2 * 30), "apart by more than what can run at once"
    engine.close()
