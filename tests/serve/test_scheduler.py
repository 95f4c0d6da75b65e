"""What runs in a step: decodes before prompts, chunks, preemption, who may pass whom."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.laws.common import tokens
from tests.serve.common import ByHand, Held, ask, engine_of, finish, held, solo, without_end
from trimtab.serve import entrance, queues
from trimtab.serve.residency import packed_bytes
from trimtab.serve.runner import Feed, Runner


def _fed(engine, monkeypatch):
    """What each forward is fed: a list of (past, rows, logits) for each step."""
    steps: list[list[tuple[int, int, bool]]] = []
    real = Runner.__call__

    def spy(self, feeds: list[Feed]):
        steps.append([(f.past, len(f.ids), f.logits) for f in feeds])
        return real(self, feeds)

    monkeypatch.setattr(Runner, "__call__", spy)
    return steps


def test_decodes_come_first_and_prompts_fill_the_rest(monkeypatch):
    engine = engine_of(max_step_rows=20, max_running=4)
    steps = _fed(engine, monkeypatch)
    first = ask(engine, "a", 15, max_tokens=6, ignore_eos=True)
    engine.step()
    ask(engine, "b", 50, max_tokens=2, ignore_eos=True)
    finish(engine)
    assert steps[0] == [(0, 15, True)]
    assert steps[1] == [(15, 1, True), (0, 19, False)] and steps[2] == [(16, 1, True), (19, 19, False)]
    assert steps[3] == [(17, 1, True), (38, 12, True)]
    assert all(sum(rows for _, rows, _ in s) <= 20 for s in steps) and len(first.ids) == 6


def test_a_long_prompt_does_not_hold_up_a_short_one(monkeypatch):
    monkeypatch.setattr(entrance, "MIN_CHUNK", 8)
    engine = engine_of(max_step_rows=40, max_running=8)
    long, short = ask(engine, "long", 300, max_tokens=1), ask(engine, "short", 10, max_tokens=1)
    engine.step()
    assert short.finish is not None and long.finish is None
    finish(engine)


def test_a_step_that_is_full_of_prompts_takes_no_more_than_it_can_chunk():
    engine = engine_of(max_step_rows=128, max_running=64, blocks=400)
    for i in range(5):
        ask(engine, f"{i}", 200, max_tokens=1)
    engine.step()
    assert engine.stats().running == 1, "each gets MIN_CHUNK rows, so one at a time here"
    finish(engine)


def test_no_more_run_than_may_and_the_others_wait_their_turn():
    engine = engine_of(max_running=2)
    heard = [ask(engine, f"{i}", 4, max_tokens=3, ignore_eos=True) for i in range(5)]
    engine.step()
    assert (engine.stats().running, engine.stats().waiting) == (2, 3)
    assert [bool(h.deltas) for h in heard] == [True, True, False, False, False]
    finish(engine)
    assert all(h.finish == "length" for h in heard)


def test_the_newest_gives_way_and_comes_back_with_the_same_answer():
    engine = engine_of(blocks=10, max_running=3)
    prompts = [tokens(30, i) for i in range(3)]
    heard = [ask(engine, f"{i}", p, held("prefix-0") if i == 1 else None, max_tokens=60, ignore_eos=True) for i, p in enumerate(prompts)]
    finished = []
    for _ in range(500):
        if not engine.step():
            break
        finished += [i for i, h in enumerate(heard) if h.finish and i not in finished]
    engine.idle_check()
    assert engine.stats().preemptions > 0 and finished == [0, 1, 2]
    for i, h in enumerate(heard):
        want = engine_of(blocks=200)
        alone = ask(want, "x", prompts[i], held("prefix-0") if i == 1 else None, max_tokens=60, ignore_eos=True)
        finish(want)
        assert h.ids == alone.ids and h.text == alone.text and h.deltas[-1].usage.completion == 60


def test_a_preempted_sequence_draws_what_it_would_have_drawn():
    def drawn(blocks):
        engine = engine_of(blocks=blocks, max_running=3)
        heard = [ask(engine, f"{i}", 30, max_tokens=50, temperature=1.2, seed=i, presence_penalty=0.5, ignore_eos=True) for i in range(3)]
        finish(engine)
        return [h.ids for h in heard], engine.stats().preemptions

    (tight, some), (roomy, none) = drawn(8), drawn(100)
    assert some > 0 and none == 0 and tight == roomy


def test_one_sequence_may_fill_all_blocks():
    engine = engine_of(blocks=3)
    a = ask(engine, "a", 40, max_tokens=60, ignore_eos=True)
    b = ask(engine, "b", 40, max_tokens=3, ignore_eos=True)
    finish(engine)
    assert a.finish == "length" and len(a.ids) == 48 - 40 + 1 and len(b.ids) == 3


def test_who_waits_for_an_adapter_lets_others_of_its_tenant_pass():
    loader = ByHand()
    engine = engine_of(loader=loader)
    slow, base = ask(engine, "slow", 5, held("lora-0"), max_tokens=3), ask(engine, "base", 5, max_tokens=3)
    finish_steps = 0
    while engine.step():
        finish_steps += 1
    assert base.finish is not None and slow.deltas == [] and engine.stats().loading == 1
    loader.run()
    finish(engine)
    assert slow.finish is not None


def test_requests_of_one_adapter_wait_for_one_load_and_keep_their_order():
    loader = ByHand()
    engine = engine_of(loader=loader, max_running=1)
    heard = [ask(engine, f"{i}", 5, held("lora-0"), max_tokens=2, ignore_eos=True) for i in range(3)]
    engine.step()
    assert len(loader.jobs) == 1 and engine.stats().loading == 3
    loader.run()
    engine.step()
    assert [bool(h.deltas) for h in heard] == [True, False, False]
    finish(engine)
    assert engine.stats().loads == 1


def test_a_long_queue_does_not_claim_memory_ahead(monkeypatch):
    monkeypatch.setattr(queues, "LOOKAHEAD", 3)
    loader = ByHand()
    engine = engine_of(loader=loader, max_running=1)
    some = [Held(f"sha256:{i}", held("ia3-0").adapter) for i in range(8)]
    for i, adapter in enumerate(some):
        ask(engine, f"{i}", 5, adapter, max_tokens=2)
    engine.step()
    assert engine.stats().loading == 3
    while loader.jobs:
        loader.run()
        engine.step()
        stats = engine.stats()
        assert stats.loading + len(engine.scheduler.queues.leased) <= 3 and stats.adapter_leases <= 4
    while loader.jobs or engine.step():
        if loader.jobs:
            loader.run()
    engine.idle_check()
    assert engine.stats().loads == 8


def test_a_tenant_with_many_adapters_does_not_take_all_loads(monkeypatch):
    monkeypatch.setattr(queues, "LOOKAHEAD", 3)
    engine = engine_of(loader=ByHand())
    for i in range(6):
        ask(engine, f"many{i}", 5, Held(f"sha256:{i}", held("ia3-0").adapter), tenant="many")
    ask(engine, "one", 5, held("lora-0"), tenant="one")
    engine.step()
    assert sorted(x.request.tenant for waiting in engine.scheduler.queues.loading.values() for x in waiting) == ["many", "many", "one"]
    engine.close()


@pytest.mark.parametrize("adapters", [1, queues.LOOKAHEAD])
def test_answers_of_a_tenant_that_wait_keep_nobody_elses_adapter_from_being_read(adapters):
    loader = ByHand()
    engine = engine_of(loader=loader, max_running=2, blocks=400)
    ask(engine, "known", 4, Held("sha256:known", held("ia3-0").adapter), max_tokens=1, tenant="many")
    engine.step()
    loader.run()
    finish(engine)  # so that it is known how little such adapters take
    for i in range(2):
        ask(engine, f"long{i}", 4, max_tokens=400, ignore_eos=True, tenant="many")
    engine.step()
    waiting = [Held(f"sha256:{i % adapters}", held("ia3-0").adapter) for i in range(16)]
    for i, adapter in enumerate(waiting):
        ask(engine, f"wait{i}", 4, adapter, max_tokens=4, tenant="many")
    for _ in range(20):
        engine.step()
        while loader.jobs:
            loader.run()
    assert engine.stats().loads == adapters + 1 and engine.stats().adapter_leases == 16
    loads = ask(engine, "loads", 4, held("lora-0"), max_tokens=2, ignore_eos=True, tenant="one")
    base = ask(engine, "base", 4, max_tokens=2, ignore_eos=True, tenant="one")
    for _ in range(4):
        engine.step()
    assert base.finish == "length" and len(loader.jobs) == 1
    loader.run()
    for _ in range(4):
        engine.step()
    assert loads.finish == "length" and running(engine)["many"]
    engine.close()


@pytest.mark.parametrize("first", [True, False])
def test_adapters_of_answers_that_wait_leave_room_for_those_of_other_tenants(first):
    """A tenant whose answers wait for places holds adapters in memory; another's must not wait until these answers are over."""
    loader = ByHand()
    adapter = held("lora-0").adapter
    size = packed_bytes(adapter.base.packed(adapter))
    engine = engine_of(loader=loader, max_running=2, blocks=400, adapter_bytes=int(6.5 * size))
    if first:
        ask(engine, "known", 4, Held("sha256:known", adapter), max_tokens=1, tenant="many")
        engine.step()
        loader.run()
        finish(engine)
    for i in range(2):
        ask(engine, f"long{i}", 4, max_tokens=400, ignore_eos=True, tenant="many")
    engine.step()
    for i in range(12):
        ask(engine, f"wait{i}", 4, Held(f"sha256:{i}", adapter), max_tokens=4, tenant="many")
    for _ in range(20):
        engine.step()
        while loader.jobs:
            loader.run()
    assert 1 < engine.stats().adapter_leases <= 5
    one = ask(engine, "one", 4, Held("sha256:one", adapter), max_tokens=3, ignore_eos=True, tenant="one")
    for _ in range(6):
        engine.step()
        while loader.jobs:
            loader.run()
    assert one.finish == "length" and running(engine) == {"many": 2}
    engine.close()


def test_a_prompt_too_long_beside_its_virtual_tokens_keeps_no_other_adapter_from_being_read(monkeypatch):
    monkeypatch.setattr(queues, "LOOKAHEAD", 1)
    engine = engine_of(blocks=3)
    long = ask(engine, "long", 47, held("prefix-0"), max_tokens=1)
    finish(engine)
    assert long.finish == "error" and "virtual ones" in str(long.error)
    other = ask(engine, "other", 4, held("lora-0"), max_tokens=2, ignore_eos=True)
    finish(engine)
    assert other.finish == "length"


def test_answers_that_wait_for_one_adapter_count_once(monkeypatch):
    monkeypatch.setattr(queues, "LOOKAHEAD", 2)
    loader = ByHand()
    engine = engine_of(loader=loader)
    for i in range(5):
        ask(engine, f"same{i}", 4, held("lora-0"), max_tokens=2)
    ask(engine, "other", 4, held("ia3-0"), max_tokens=2)
    engine.step()
    assert len(loader.jobs) == 2 and engine.stats().loading == 6
    engine.close()


def test_who_has_its_adapter_passes_one_that_cannot_be_read_yet(monkeypatch):
    monkeypatch.setattr(queues, "LOOKAHEAD", 1)
    loader = ByHand()
    engine = engine_of(loader=loader)
    there = ask(engine, "there", 4, held("ia3-0"), max_tokens=2, ignore_eos=True)
    engine.step()
    loader.run()
    finish(engine)
    first, second = ask(engine, "first", 4, held("lora-0"), max_tokens=2), ask(engine, "second", 4, held("lora-1"), max_tokens=2)
    again = ask(engine, "again", 4, held("ia3-0"), max_tokens=2, ignore_eos=True)
    base = ask(engine, "base", 4, max_tokens=2, ignore_eos=True)
    while engine.step():
        pass
    assert there.finish and again.finish and base.finish and not first.deltas and not second.deltas
    assert len(loader.jobs) == 1
    for _ in range(2):
        loader.run()
        while engine.step():
            pass
    assert first.finish and second.finish
    engine.idle_check()


def test_blocks_that_a_long_prompt_will_need_are_not_given_away(monkeypatch):
    monkeypatch.setattr(entrance, "MIN_CHUNK", 8)
    engine = engine_of(blocks=10, max_step_rows=32, max_running=4)
    long, short = ask(engine, "long", 128, max_tokens=4), ask(engine, "short", 40, max_tokens=4)
    finish(engine)
    assert long.finish and short.finish and engine.stats().preemptions == 0


def test_who_enters_leaves_a_block_for_what_others_write_next():
    engine = engine_of(blocks=3, max_running=4)
    a = ask(engine, "a", 15, max_tokens=10, ignore_eos=True)
    engine.step()
    b = ask(engine, "b", 17, max_tokens=3, ignore_eos=True)
    finish(engine)
    assert a.finish == b.finish == "length" and engine.stats().preemptions == 0, "b would have been thrown out by a's next block"


def test_who_comes_back_enters_before_who_is_new_of_the_same_tenant():
    engine = engine_of(blocks=8, max_running=2)
    a = ask(engine, "a", 30, max_tokens=60, ignore_eos=True)
    b = ask(engine, "b", 30, max_tokens=60, ignore_eos=True)
    while not engine.stats().preemptions:
        engine.step()
    c = ask(engine, "c", 30, max_tokens=5, ignore_eos=True)
    while b.finish is None:
        engine.step()
        assert not (c.deltas and a.finish is None)
    finish(engine)
    assert without_end(engine, c.ids)[:3] == solo("llama", tokens(30, ord("c")), None, 5)[:3]


# ---- tenants share places and blocks ----


def running(engine) -> Counter:
    return Counter(live.request.tenant for live in engine.scheduler.running)


def test_a_tenant_that_fills_all_places_makes_way_at_once():
    engine = engine_of(max_running=4, blocks=200)
    many = [ask(engine, f"m{i}", tokens(8, i), max_tokens=40, ignore_eos=True, tenant="many") for i in range(12)]
    for _ in range(5):
        engine.step()
    assert running(engine) == {"many": 4}
    one = ask(engine, "one", tokens(8, 99), max_tokens=4, ignore_eos=True, tenant="one")
    for _ in range(4):
        engine.step()
    assert one.finish == "length", "it had its place in the next step, and nothing of it was lost"
    assert engine.stats().preemptions == 1
    finish(engine)
    roomy = engine_of(max_running=12, blocks=400)
    alone = [ask(roomy, f"m{i}", tokens(8, i), max_tokens=40, ignore_eos=True) for i in range(12)]
    finish(roomy)
    assert [h.ids for h in many] == [h.ids for h in alone]


def test_places_are_shared_by_weight_among_those_who_want_them():
    engine = engine_of(max_running=8, blocks=400)
    for i in range(20):
        ask(engine, f"a{i}", 4, max_tokens=60, ignore_eos=True, tenant="a")
    for _ in range(3):
        engine.step()
    for i in range(20):
        ask(engine, f"b{i}", 4, max_tokens=60, ignore_eos=True, tenant="b", weight=3.0)
    engine.step()
    assert running(engine)["b"] >= 1, "at once"
    for _ in range(6):
        engine.step()
    assert running(engine) == {"a": 2, "b": 6}
    ask(engine, "c", 4, max_tokens=30, ignore_eos=True, tenant="c", weight=0.001)
    engine.step()
    assert running(engine)["c"] == 1, "one place at least"
    finish(engine)


def test_who_keeps_places_without_using_them_makes_way_however_few_tokens_he_had(monkeypatch):
    """Sequences whose grammar does not answer cost no tokens, so their tenant's counter stands still."""
    engine = engine_of(max_running=3, blocks=200)
    stuck = [ask(engine, f"s{i}", 4, max_tokens=9, tenant="stuck", ignore_eos=True) for i in range(3)]
    engine.step()
    for live in engine.scheduler.running[:]:
        live.unsaid = live.request  # type: ignore[assignment]  # as if it waited for its grammar
    for i in range(4):
        plain = ask(engine, f"p{i}", 4, max_tokens=5, tenant="plain", ignore_eos=True)
        for _ in range(6):
            engine.step()
        assert plain.finish == "length", i
    for live in list(engine.requests.by_id.values()):
        live.unsaid = None
    finish(engine)
    assert all(len(h.ids) == 9 for h in stuck)


def test_alone_a_tenant_has_all_places_and_gets_them_back():
    engine = engine_of(max_running=4, blocks=200)
    for i in range(8):
        ask(engine, f"a{i}", 4, max_tokens=30, ignore_eos=True, tenant="a")
    ask(engine, "b", 4, max_tokens=3, ignore_eos=True, tenant="b")
    for _ in range(2):  # beside four rows of b's, a step has eight of a's
        engine.step()
    assert running(engine) == {"a": 3, "b": 1}
    for _ in range(3):
        engine.step()
    assert running(engine) == {"a": 4}
    finish(engine)


def test_blocks_are_shared_too():
    """A tenant whose long sequences hold all blocks gives some up for another's short one, and the other keeps them."""
    engine = engine_of(blocks=12, max_running=8)
    long = [ask(engine, f"l{i}", 60, max_tokens=100, ignore_eos=True, tenant="long") for i in range(3)]
    for _ in range(4):
        engine.step()
    short = ask(engine, "s", 20, max_tokens=20, ignore_eos=True, tenant="short")
    for _ in range(22):
        engine.step()
    assert short.finish == "length"
    finish(engine)
    assert all(h.finish == "length" for h in long)


def test_long_prompts_of_one_do_not_hold_up_the_prompt_of_another():
    engine = engine_of(max_step_rows=256, max_running=16, blocks=600)
    for i in range(6):
        ask(engine, f"l{i}", 400, max_tokens=2, ignore_eos=True, tenant="long")
    engine.step()
    assert running(engine) == {"long": 2}, "each gets MIN_CHUNK rows"
    short = ask(engine, "s", 20, max_tokens=1, tenant="short")
    engine.step()
    assert short.finish is not None
    finish(engine)


def test_the_oldest_of_a_tenant_never_makes_way():
    engine = engine_of(max_running=1, blocks=50)
    first = ask(engine, "a", 8, max_tokens=20, ignore_eos=True, tenant="a")
    engine.step()
    ask(engine, "b", 8, max_tokens=3, ignore_eos=True, tenant="b")
    while first.finish is None:
        engine.step()
        assert engine.stats().preemptions == 0
    finish(engine)
