"""What is asked of a prompt itself: how likely its tokens are, its hidden states; and prompts that several answers share. The reference is
each method as `laws/plain.py` writes it on transformers' own model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.laws.common import CASES, adapter_of, base_of, difference, plain_of, tokens
from tests.laws.plain import plain_hidden, plain_logits
from tests.serve.common import Heard, Held, ask, engine_of, finish, held
from tests.store.test_heads import stirred
from trimtab.decode import scoring
from trimtab.methods import Head, LoraConfig
from trimtab.serve.engine import Engine

LONG, NEAR = 45, 1e-4


def wanted(case: str | None, ids: list[int], family: str = "llama") -> Tensor:
    """log p [T - 1, V] of what follows each token but the last."""
    with torch.no_grad():
        logits = plain_logits(plain_of(family), None if case is None else adapter_of(family, case), ids)
    return torch.log_softmax(logits.double(), -1)[:-1]


def told(heard: Heard) -> list:
    """The prompt's tokens, checked to come before the new ones."""
    parts = [bool(d.tokens) for d in heard.deltas if d.prompt or d.tokens]
    assert parts == sorted(parts)
    return [t for d in heard.deltas for t in d.prompt]


@pytest.mark.parametrize("case", [None, *CASES])
def test_prompt_logprobs_are_the_methods_own(case: str | None):
    """In chunks of every size, beside others."""
    engine, ids = engine_of(max_step_rows=16, max_running=4), tokens(LONG, 5)
    mine = ask(engine, "mine", ids, case and held(case), prompt_logprobs=3, max_tokens=2)
    other = ask(engine, "other", 21, held("lora-0"), prompt_logprobs=0, max_tokens=0)
    finish(engine)
    want = wanted(case, ids)
    first, *rest = told(mine)
    assert (first.id, first.logprob, first.top) == (ids[0], None, ()) and [t.id for t in rest] == ids[1:]
    own = want.gather(1, torch.tensor(ids[1:])[:, None])
    assert difference(torch.tensor([[t.logprob] for t in rest]).double(), own) < NEAR
    assert difference(torch.tensor([[lp for _, lp in t.top] for t in rest]).double(), want.topk(3).values) < NEAR
    for row, t in zip(want, rest, strict=True):
        assert (row > row[t.id] + NEAR).sum() < t.rank <= (row > row[t.id] - NEAR).sum()
    assert len(mine.tokens) == 2 and len(told(other)) == 21 and not other.tokens and (other.finish, other.text) == ("length", "")


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "qwen3"])
def test_prompt_logprobs_of_other_families(family: str):
    engine, ids = engine_of(family), tokens(LONG, 6)
    mine = ask(engine, "mine", ids, prompt_logprobs=0, max_tokens=0)
    finish(engine)
    own = wanted(None, ids, family).gather(1, torch.tensor(ids[1:])[:, None])
    assert difference(torch.tensor([[t.logprob] for t in told(mine)[1:]]).double(), own) < NEAR


def test_a_known_prompt_is_scored_again_and_a_preempted_one_is_told_once():
    engine, ids = engine_of(blocks=8, block_size=8, max_running=3, max_step_rows=8), tokens(40, 7)
    alone = ask(engine, "alone", ids, prompt_logprobs=1, max_tokens=0)
    finish(engine)
    again = ask(engine, "again", ids, prompt_logprobs=1, max_tokens=20, ignore_eos=True)
    others = [ask(engine, f"o{i}", 16, max_tokens=20, ignore_eos=True) for i in range(2)]
    finish(engine)
    assert engine.stats().preemptions, "nothing was preempted"
    assert [t.id for t in told(again)] == ids and all(len(o.tokens) == 20 for o in others)
    for a, b in zip(told(alone)[1:], told(again)[1:], strict=True):
        assert abs(a.logprob - b.logprob) < NEAR and a.rank == b.rank


def test_logits_of_a_long_prompt_are_made_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch):
    engine, seen = engine_of(max_step_rows=256), []
    head = engine.base.attached.head
    monkeypatch.setattr(engine.base.attached, "head", lambda h, b, i: (seen.append(len(h)), head(h, b, i))[1])
    monkeypatch.setattr(scoring, "LOGITS", 7 * engine.base.spec.vocab_size)
    ask(engine, "long", 100, prompt_logprobs=1, max_tokens=0)
    finish(engine)
    assert max(seen) == 7 and sum(seen) == 99


@pytest.mark.parametrize("case", [None, *CASES])
def test_pooled_hidden_states(case: str | None):
    engine, ids = engine_of(max_step_rows=16, max_running=4), tokens(LONG, 8)
    adapter = case and held(case)
    heard = {p: ask(engine, p, ids, adapter, pooling=p, max_tokens=0) for p in ("mean", "last")}
    finish(engine)
    again = {p: ask(engine, p, ids, adapter, pooling=p, max_tokens=0) for p in ("mean", "last")}
    finish(engine)
    with torch.no_grad():
        hidden = plain_hidden(plain_of("llama"), None if case is None else adapter_of("llama", case), ids)
    for p, want in (("mean", hidden.mean(0)), ("last", hidden[-1])):
        for h in (heard[p], again[p]):
            (vector,) = [d.vector for d in h.deltas if d.vector]
            assert difference(torch.from_numpy(np.frombuffer(vector, "<f4").copy()), want) < NEAR


def test_pooled_hidden_states_are_the_final_norms():
    """Granite divides its logits, which forwards here do before the head."""
    engine, ids = engine_of("granite"), tokens(LONG, 8)
    heard = ask(engine, "mine", ids, pooling="last", max_tokens=0)
    finish(engine)
    with torch.no_grad():
        hidden = plain_hidden(plain_of("granite"), None, ids)
    (vector,) = [d.vector for d in heard.deltas if d.vector]
    assert difference(torch.from_numpy(np.frombuffer(vector, "<f4").copy()), hidden[-1]) < NEAR


def test_prompts_whose_numbers_are_not_finite_end_with_an_error(monkeypatch: pytest.MonkeyPatch):
    engine = engine_of()
    forward = engine.base.attached.forward
    monkeypatch.setattr(engine.base.attached, "forward", lambda batch: forward(batch) * float("nan"))
    asked: list[dict] = [{"prompt_logprobs": 1}, {"pooling": "mean"}, {"pooling": "last"}]
    heard = [ask(engine, f"{i}", 9, max_tokens=0, **more) for i, more in enumerate(asked)]
    finish(engine)
    assert [h.finish for h in heard] == ["error"] * 3 and all("not finite" in str(h.deltas[-1].error) for h in heard)


def rows_run(engine: Engine) -> int:
    return sum(engine.base.attached.cached_rows.values())


@pytest.mark.parametrize("case", [None, "lora-0", "prefix-0"])
def test_answers_to_one_prompt_compute_it_once(case: str | None):
    engine, ids = engine_of(), tokens(64, 9)
    before = rows_run(engine)
    adapter: Held | None = case and held(case)
    heard = [ask(engine, f"{i}", ids, adapter, like="0" if i else "", max_tokens=3, temperature=1.0, seed=i) for i in range(4)]
    finish(engine)
    rows = rows_run(engine) - before
    alone = [engine_of() for _ in range(4)]
    for i, (e, h) in enumerate(zip(alone, heard, strict=True)):
        want = ask(e, "x", ids, adapter, max_tokens=3, temperature=1.0, seed=i)
        finish(e)
        assert h.ids == want.ids
    once = 64 + 3 * 16 + 4 * 2  # each answer runs its last block of the prompt again, and all but its last token
    assert rows <= once


def test_who_waits_for_a_prompt_goes_on_when_that_one_ends():
    engine = engine_of(max_step_rows=16, max_running=4)
    first = ask(engine, "first", 64, max_tokens=3)
    second, third = (ask(engine, n, 64, like="first", max_tokens=3, deadline=d) for n, d in (("second", None), ("third", 100.5)))
    engine.step()
    engine.cancel("first")
    engine.clock.now = 101.0  # type: ignore[attr-defined]
    finish(engine)
    assert (first.finish, second.finish, third.finish) == ("cancelled", "length", "deadline") and not engine._step.following
    gone = ask(engine, "gone", 8, like="nobody", max_tokens=1)
    finish(engine)
    assert gone.finish == "length"


def test_a_bias_moves_logits_and_no_others_answer():
    engine, ids = engine_of(), tokens(9, 3)
    plain = ask(engine, "plain", ids, max_tokens=6)
    finish(engine)
    logits = wanted(None, ids + plain.ids)[len(ids) - 1 :]
    best, second = logits[0].topk(2).indices.tolist()
    gap = float(logits[0, best] - logits[0, second])
    cases = {"up": [(second, gap + 0.01)], "not quite": [(second, gap - 0.01)], "down": [(best, -gap - 0.01)], "ban": [(best, -100.0)]}
    heard = {name: ask(engine, name, ids, max_tokens=6, logit_bias=tuple(bias), logprobs=1) for name, bias in cases.items()}
    beside = ask(engine, "beside", ids, max_tokens=6)
    finish(engine)
    assert {n: h.ids[0] for n, h in heard.items()} == {"up": second, "not quite": best, "down": second, "ban": second}
    assert beside.ids == plain.ids and best not in heard["ban"].ids
    assert abs(heard["up"].tokens[0].logprob - float(logits[0, second])) < NEAR, "log-probabilities are the model's own"


def test_stop_texts_and_control_tokens_in_the_text():
    engine, ids = engine_of(), tokens(9, 4)
    plain = ask(engine, "plain", ids, max_tokens=12, ignore_eos=True)
    finish(engine)
    mark = plain.text[2:4]
    at = plain.text.index(mark)
    cut = {w: ask(engine, f"cut {w}", ids, max_tokens=12, ignore_eos=True, stop=(mark, "nowhere"), with_stop=w) for w in (False, True)}
    forced = {
        (shown, w): ask(engine, f"{shown} {w}", ids, max_tokens=3, logit_bias=((258, 100.0),), all_shown=shown, with_stop=w)
        for shown in (False, True)
        for w in (False, True)
    }
    finish(engine)
    assert (cut[False].text, cut[True].text) == (plain.text[:at], plain.text[: at + 2])
    end = base_of("llama").tokenizer.convert_ids_to_tokens(258)
    assert [forced[k].text for k in ((False, False), (False, True), (True, False), (True, True))] == ["", "", "", end]


@pytest.mark.parametrize("called", [False, True])
def test_a_head_of_an_alora_reads_texts_that_call_it_and_others(called: bool):
    base, ids = base_of("llama"), tokens(LONG, 8)
    adapter = stirred(base, LoraConfig(r=4, alora_invocation_tokens=tuple(ids[20:23]) if called else (1, 2, 1, 2)), Head(("a", "b", "c")))
    engine = engine_of(max_step_rows=16, max_running=4)
    heard = [ask(engine, f"{i}", ids, Held("sha256:scores", adapter), pooling="head", max_tokens=0) for i in range(2)]
    other = ask(engine, "other", 21, held("lora-0"), max_tokens=3)
    finish(engine)
    (want,) = base.scores([ids], [adapter])
    for h in heard:
        (told,) = [d for d in h.deltas if d.vector]
        assert told.labels == ("a", "b", "c") and difference(torch.from_numpy(np.frombuffer(told.vector, "<f4").copy()), want) < NEAR
    assert len(other.tokens) == 3
