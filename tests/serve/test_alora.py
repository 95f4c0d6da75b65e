"""aLoRA in the engine: the answers of the forward alone, whatever is found in the cache; who finds what there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.laws.common import base_of, noisy, tokens
from tests.serve.common import Held, ask, engine_of, finish, held, solo, without_end
from trimtab.methods import LoraConfig

CALL = (61, 62, 63)
ONE, TWO = (
    Held(f"sha256:alora{seed}", noisy(base_of("llama"), LoraConfig(r=4, alora_invocation_tokens=CALL), seed=seed, scale=0.3))
    for seed in (5, 6)
)


def prompt_of(before: int, after: int = 4, seed: int = 1) -> list[int]:
    """A call with so many tokens before and after it."""
    return [t % 60 for t in tokens(before, seed)] + list(CALL) + [t % 60 for t in tokens(after, seed + 50)]


def answer(engine: Any, name: str, prompt: list[int], adapter: Held | None, **more: Any) -> tuple[list[int], int]:
    """(new tokens, prompt tokens found in the cache) of a request alone."""
    heard = ask(engine, name, prompt, adapter, max_tokens=8, **more)
    finish(engine)
    return without_end(engine, heard.ids), heard.deltas[-1].usage.cached


@pytest.mark.parametrize("rows", [64, 1024])
def test_answers_are_those_of_the_forward_alone_beside_others(rows):
    """Calls in the middle of a block, at its edge, first and last, none at all; prompts in chunks; others in the same steps."""
    engine = engine_of("llama", max_step_rows=rows, max_running=32)
    prompts = [prompt_of(n) for n in (0, 1, 16, 29, 32, 100)] + [prompt_of(40, 0), tokens(30, 9)]
    prompts.append(prompt_of(20) + prompt_of(25, 3, seed=4))
    asked = [(f"{i}-{who}", p, a) for i, p in enumerate(prompts) for who, a in (("one", ONE), ("base", None))]
    asked += [(f"lora-{i}", prompts[i], held("lora-0")) for i in (3, 5)]
    heard = [(name, p, a, ask(engine, name, p, a, max_tokens=8)) for name, p, a in asked]
    finish(engine)
    for name, prompt, adapter, h in heard:
        assert without_end(engine, h.ids) == solo("llama", prompt, adapter, 8), name


def test_the_tokens_before_a_call_are_shared_with_the_base_and_other_aloras():
    engine = engine_of("llama")
    prompt = prompt_of(100)
    want = {who: solo("llama", prompt, a, 8) for who, a in (("base", None), ("one", ONE), ("two", TWO))}
    assert answer(engine, "a", prompt, ONE) == (want["one"], 0)
    assert answer(engine, "b", prompt, TWO) == (want["two"], 96)  # 6 blocks of 16 before token 100
    assert answer(engine, "c", prompt, None) == (want["base"], 96)
    assert answer(engine, "d", prompt, ONE) == (want["one"], 96 + 0)  # the prompt has 107 tokens, no further whole block
    assert answer(engine, "e", prompt, ONE, tenant="another") == (want["one"], 0)
    assert answer(engine, "f", prompt, TWO, cache_salt="s") == (want["two"], 0)
    assert answer(engine, "g", prompt, held("lora-0")) == (solo("llama", prompt, held("lora-0"), 8), 0)
    engine.evict(ONE.digest)
    engine.step()
    assert answer(engine, "h", prompt, TWO)[1] == 96  # they were never the evicted adapter's


def test_blocks_after_a_call_are_its_adapters_and_its_places():
    """A conversation goes on: what was called before is the base's now, and blocks with rows of the adapter are not found again."""
    engine = engine_of("llama", block_size=8)
    first = prompt_of(12, 9)
    said, _ = answer(engine, "a", first, ONE)
    assert answer(engine, "b", first, ONE) == (said, 16)  # 24 tokens: the last one is computed always
    assert answer(engine, "c", first, TWO) == (solo("llama", first, TWO, 8), 8)
    second = first + said + prompt_of(3, 5, seed=8)
    assert answer(engine, "d", second, ONE) == (solo("llama", second, ONE, 8), 8)


def test_a_call_that_an_answer_wrote_is_none_until_it_is_asked_again():
    """The same tokens fill a block in both requests. In the first the adapter is on from the prompt's call, in the second from the later
    one, which the first answer had written."""
    engine = engine_of("llama", block_size=8)
    prompt = [t % 60 for t in tokens(9, 3)] + [*CALL, 5]
    sample, written = engine.sampler.__call__, [*CALL, 7]
    engine._step.sampler = lambda logits, draws: [
        replace(t, id=written[d.new - 1]) for t, d in zip(sample(logits, draws), draws, strict=True)
    ]  # type: ignore[assignment]
    ask(engine, "first", prompt, ONE, max_tokens=4)
    finish(engine)
    engine._step.sampler = engine.sampler
    again = [*prompt, *CALL, 1, 2, 3, 4]
    assert answer(engine, "second", again, ONE) == (solo("llama", again, ONE, 8), 8)


def test_preempted_sequences_are_computed_again_as_they_were():
    engine = engine_of("llama", blocks=14)
    prompts = [prompt_of(30 + 5 * i, seed=i) for i in range(4)]
    heard = [ask(engine, f"{i}", p, ONE, max_tokens=30, ignore_eos=True) for i, p in enumerate(prompts)]
    finish(engine)
    assert engine.stats().preemptions > 0
    for prompt, h in zip(prompts, heard, strict=True):
        want = solo("llama", prompt, ONE, 30)
        assert h.ids[: len(want)] == want


def test_the_second_adapter_computes_few_rows():
    """A long prompt that one aLoRA has read costs another the rows from its last whole block on; an ordinary LoRA reads it all again."""
    engine = engine_of("llama", blocks=400)
    rows: list[int] = []
    engine.on_step = lambda facts: rows.append(facts.prefill_rows)
    prompt = prompt_of(200, 10)

    def cost(name: str, adapter: Held | None) -> int:
        rows.clear()
        answer(engine, name, prompt, adapter)
        return sum(rows)

    assert cost("a", ONE) == 213
    assert cost("b", TWO) == 213 - 192
    assert cost("c", held("lora-0")) == 213
