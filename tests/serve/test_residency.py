"""Adapters in memory: budget, leases, loads beside the loop, leaving."""

from __future__ import annotations

from dataclasses import replace
from threading import Lock

import pytest
import torch

from tests.laws.common import CASES, base_of, noisy, tokens
from tests.serve.common import AtOnce, ByHand, Held, ask, engine_of, finish, held
from tests.tiny import tiny_model, tiny_tokenizer
from trimtab.errors import AdapterError, OverloadedError, TrimtabError
from trimtab.methods import LoraConfig
from trimtab.model import Base
from trimtab.serve.residency import Residency, packed_bytes

SIZE = packed_bytes(base_of("llama").packed(held("lora-0").adapter))


def _like(n: int) -> Held:
    return Held(f"sha256:{n}", held("lora-0").adapter)


def _residency(adapters: float, loader=None):
    freed: list[str] = []
    made = Residency(base_of("llama"), int(adapters * SIZE), loader or AtOnce(), Lock(), on_free=lambda r: freed.append(r.digest))
    return made, freed


def _load(residency, adapter, wanted=True):
    residency.load(adapter)
    ended = residency.collect({adapter.digest} if wanted else set())
    residency.settle()
    return ended


def test_the_least_recently_leased_leaves_when_there_is_no_room():
    r, freed = _residency(2.5)
    for n in (1, 2):
        assert _load(r, _like(n))[0].resident is not None
    r.release(r.lease("sha256:1"))
    _load(r, _like(3))
    assert freed == ["sha256:2"] and r.holds("sha256:1") and r.holds("sha256:3")
    assert (r.count, r.bytes, r.loads, r.evictions) == (2, 2 * SIZE, 3, 1)


def test_one_in_use_leaves_with_its_last_lease_for_one_that_is_waited_for():
    r, freed = _residency(1.5)
    _load(r, _like(1))
    first, second = r.lease("sha256:1"), r.lease("sha256:1")
    assert _load(r, _like(2)) == [] and r.busy, "it waits for room"
    assert r.lease("sha256:1") is None, "no new leases, or it would never leave"
    r.release(first)
    assert r.collect({"sha256:2"}) == [] and freed == []
    r.release(second)
    assert [e.digest for e in r.collect({"sha256:2"})] == ["sha256:2"] and freed == ["sha256:1"]
    assert r.bytes <= r.budget_bytes and not r.busy


def test_evicting_one_that_leaves_already_takes_all_that_is_kept_of_it():
    freed: list[tuple[str, bool]] = []
    r = Residency(base_of("llama"), int(1.5 * SIZE), AtOnce(), Lock(), on_free=lambda x: freed.append((x.digest, x.purge)))
    _load(r, _like(1))
    lease = r.lease("sha256:1")
    _load(r, _like(2))
    r.evict("sha256:1")
    r.release(lease)
    assert freed == [("sha256:1", True)]


def test_one_that_nobody_waits_for_puts_out_nobody_who_is_used():
    r, freed = _residency(1.5)
    _load(r, _like(1))
    lease = r.lease("sha256:1")
    _load(r, _like(2), wanted=False)
    assert not r.holds("sha256:2") and r.holds("sha256:1") and freed == [] and not r.busy
    r.release(lease)


def test_no_more_is_read_while_something_read_finds_no_room():
    loader = ByHand()
    r, _ = _residency(1.5, loader)
    r.load(_like(1))
    loader.run()
    r.collect(set())
    lease = r.lease("sha256:1")
    r.settle()
    for n in range(2, 8):
        r.load(_like(n))
    everybody = {f"sha256:{n}" for n in range(2, 8)}
    assert len(loader.jobs) == 2, "LOADERS at once"
    loader.run(), loader.run()
    r.collect(everybody)
    assert loader.jobs == []
    r.release(lease)
    assert len(r.collect(everybody)) == 1 and loader.jobs == [], "those who wait for the first have not leased it yet"
    lease = r.lease("sha256:2")
    r.settle()
    assert r.collect(everybody) == [] and not r.holds("sha256:3")
    r.release(lease)
    assert [e.digest for e in r.collect(everybody)] == ["sha256:3"] and len(loader.jobs) == 2
    assert r.bytes <= r.budget_bytes


def test_one_that_is_larger_than_the_budget_fails_with_both_numbers():
    r, _ = _residency(0.5)
    (ended,) = _load(r, _like(1))
    assert ended.resident is None and str(SIZE) in str(ended.error) and str(SIZE // 2) in str(ended.error)
    assert r.failures == 1 and r.count == 0


def test_asking_again_loads_once():
    loader = ByHand()
    r, _ = _residency(3, loader)
    for _ in range(3):
        r.load(_like(1))
    assert len(loader.jobs) == 1
    loader.run()
    assert r.loads == 0, "loads are counted by the thread that collects them: several that load would lose some"
    r.load(_like(1))
    r.collect({"sha256:1"})
    r.load(_like(1))
    assert loader.jobs == [] and r.loads == 1 and r.load_seconds > 0


def test_evicting_while_it_loads_serves_those_who_wait_and_then_lets_go():
    loader = ByHand()
    engine = engine_of(loader=loader)
    heard = ask(engine, "a", tokens(40, 1), held("lora-0"), max_tokens=3)
    engine.step()
    engine.evict("sha256:lora-0")
    engine.step()
    loader.run()
    finish(engine)
    assert heard.finish in ("stop", "length") and engine.stats().adapters_resident == 0
    assert engine.stats().kv_blocks_cached == 0, "what is kept of its digest goes too"


@pytest.mark.parametrize("steps", [0, 1])
def test_evicting_one_that_is_only_queued_for_serves_it_and_then_lets_go(steps):
    """Before its load has begun: it has just come, or stands behind others of its tenant."""
    engine = engine_of(max_running=1)
    first = ask(engine, "a", tokens(40, 1), held("lora-0"), max_tokens=8, ignore_eos=True)
    queued = [ask(engine, name, tokens(40, 1), held("lora-1"), max_tokens=3) for name in "bc"]
    for _ in range(steps):
        engine.step()
    engine.evict("sha256:lora-1")
    finish(engine)
    assert first.finish == "length" and all(q.finish in ("stop", "length") for q in queued)
    assert engine.stats().adapters_resident == 1 and not engine.residency.holds("sha256:lora-1")


def test_evicting_one_in_use_finishes_its_requests_and_frees_everything_of_it():
    engine = engine_of()
    running = ask(engine, "a", tokens(40, 1), held("lora-0"), max_tokens=10, ignore_eos=True)
    engine.step()
    engine.evict("sha256:lora-0")
    late = ask(engine, "b", tokens(40, 1), held("lora-0"), max_tokens=4, ignore_eos=True)
    engine.step()
    assert engine.stats().adapters_resident == 2, "the one that leaves, and the one that came anew"
    finish(engine)
    assert running.finish == late.finish == "length" and late.ids == running.ids[:4]
    engine.evict("sha256:lora-0")
    engine.step()
    assert (engine.stats().adapters_resident, engine.stats().adapter_bytes, engine.stats().kv_blocks_cached) == (0, 0, 0)


def test_evicting_in_order_to_make_room_keeps_the_prompts_that_were_computed():
    """The same digest means the same tensors for ever, so its blocks stay right while it is away."""
    engine = engine_of(adapter_bytes=int(1.5 * SIZE))
    for name, adapter in (("a", _like(1)), ("b", _like(2)), ("c", _like(1))):
        heard = ask(engine, name, tokens(40, 1), adapter, max_tokens=2)
        finish(engine)
    assert engine.stats().loads == 3 and heard.deltas[-1].usage.cached == 32


def test_prefetching_spares_the_first_request_its_wait():
    loader = ByHand()
    engine = engine_of(loader=loader)
    engine.prefetch(held("lora-0"))
    engine.step()
    loader.run()
    engine.step()
    assert engine.stats().adapters_resident == 1
    heard = ask(engine, "a", 5, held("lora-0"), max_tokens=1)
    engine.step()
    assert heard.finish is not None and engine.stats().loads == 1


def test_one_for_another_base_is_refused():
    other = Base(tiny_model("llama", seed=3), tiny_tokenizer(), name="other", fingerprint="sha256:other")
    engine = engine_of()
    heard = ask(engine, "a", 5, Held("sha256:x", noisy(other, LoraConfig(r=2))))
    finish(engine)
    assert isinstance(heard.error, AdapterError) and "other" in str(heard.error)


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_those_of_the_packed_tensors(case):
    base = base_of("llama")
    packed = base.packed(held(case).adapter)
    edits = [t for e in packed.edits.values() for t in e.tensors.values()]
    kv = list(packed.kv or ())
    prefix = [t for t in (*(packed.prefix.kv_LNHD or ()), packed.prefix.embeds_NH) if t is not None] if packed.prefix else []
    assert 0 < packed_bytes(packed) <= sum(t.nbytes for t in [*edits, *kv, *prefix])
    same = replace(packed, edits={**packed.edits, **{f"{k} again": v for k, v in packed.edits.items()}})
    assert packed_bytes(same) == packed_bytes(packed), "shared tensors count once"


def test_a_prompt_is_packed_while_no_forward_runs():
    """Its keys and values take a forward, and the base runs one at a time."""
    base, lock, seen = base_of("llama"), Lock(), []
    r = Residency(base, 1 << 20, AtOnce(), lock)

    class Spy:
        spec, fingerprint, name = base.spec, base.fingerprint, base.name

        @staticmethod
        def pack(adapter):
            seen.append((adapter.method.name, lock.locked()))
            return base.pack(adapter)

    r.base = Spy()
    for case in ("prompt-0", "prefix-0", "lora-0"):
        _load(r, held(case))
    assert seen == [("prompt", True), ("prefix", True), ("lora", False)]


def test_a_failed_load_is_tried_again_for_the_next_request():
    engine, failing = engine_of(), [TrimtabError("not yet"), None]

    class Sometimes:
        digest = "sha256:sometimes"

        def load(self):
            error = failing.pop(0)
            if error:
                raise error
            return held("lora-0").adapter

    a = ask(engine, "a", 5, Sometimes(), max_tokens=2)
    finish(engine)
    b = ask(engine, "b", 5, Sometimes(), max_tokens=2)
    finish(engine)
    assert a.finish == "error" and b.finish in ("stop", "length")
    assert torch.isfinite(torch.tensor(engine.stats().load_seconds)) and engine.stats().load_failures == 1


def test_an_eviction_is_over_with_the_load_that_it_meant():
    """A load that is dropped, because nobody waits for it and there is no room, is not evicted once it comes again."""
    loader = ByHand()
    r, _ = _residency(1.5, loader)
    r.load(_like(1))
    loader.run()
    r.collect({"sha256:1"})
    lease = r.lease("sha256:1")
    r.settle()
    r.load(_like(2))
    r.evict("sha256:2")
    loader.run()
    assert [e.digest for e in r.collect(set())] == ["sha256:2"] and not r.holds("sha256:2")
    r.settle()
    r.release(lease)
    r.load(_like(2))
    loader.run()
    r.collect({"sha256:2"})
    r.settle()
    assert r.holds("sha256:2")


class NoThread(ByHand):
    """Keeps what it is given and then says that there is no thread, as a pool of threads does."""

    full = True

    def submit(self, fn, /, *args, **kwargs):
        future = super().submit(fn, *args, **kwargs)
        if self.full:
            raise RuntimeError("can't start new thread")
        return future


def test_a_load_that_no_thread_takes_fails_and_the_next_one_is_tried():
    loader = NoThread()
    engine = engine_of(loader=loader)
    adapters = [held(case) for case in ("lora-0", "ia3-0", "prompt-0")]
    heard = [ask(engine, f"r{i}", 5, adapter, tenant=str(i), max_tokens=1) for i, adapter in enumerate(adapters)]
    for _ in range(3):
        engine.step()
    finish(engine)
    assert [type(h.error) for h in heard] == [OverloadedError] * 3
    loader.full = False
    again = [ask(engine, f"s{i}", 5, adapter, tenant=str(i), max_tokens=1) for i, adapter in enumerate(adapters)]
    for _ in range(10):
        engine.step()
        while loader.jobs:
            loader.run()  # those that were left lying, too
    finish(engine)
    assert [h.error for h in again] == [None] * 3 and engine.stats().adapters_resident == 3


def test_a_load_that_was_taken_all_the_same_is_no_failure():
    r, _ = _residency(2)

    class Taken(AtOnce):
        def submit(self, fn, /, *args, **kwargs):
            super().submit(fn, *args, **kwargs)
            raise RuntimeError("can't start new thread")

    r.loader = Taken()
    assert [e.error for e in _load(r, _like(1))] == [None] and r.holds("sha256:1") and not r.busy
