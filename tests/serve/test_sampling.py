"""Choosing tokens: every setting against its definition, row by row, and no row knows its neighbours."""

from __future__ import annotations

import math
import random

import pytest
import torch

from tests.serve.common import ask, engine_of, finish
from tests.tiny import tiny_tokenizer
from trimtab.errors import TrimtabError
from trimtab.serve.grammar import Compiler
from trimtab.serve.request import Grammar, SamplingParams
from trimtab.serve.sampling import Sampler, make_draw

V = 40
STOP = (38, 39)


def sampler() -> Sampler:
    return Sampler(V, STOP, torch.device("cpu"))


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def drawn(row: torch.Tensor, params: SamplingParams, times: int = 1500) -> torch.Tensor:
    """How often each token comes, of many draws from the same logits."""
    s, counts = sampler(), torch.zeros(V)
    draw = make_draw(params, [1])
    for token in (t for _ in range(times // 50) for t in s(row.expand(50, V), [draw] * 50)):
        counts[token.id] += 1
    return counts / times


def test_greedy_takes_the_likeliest_whatever_else_is_set():
    x = logits(5)
    params = [
        SamplingParams(),
        SamplingParams(logprobs=0),
        SamplingParams(top_k=1, temperature=1.0),
        SamplingParams(top_p=1e-6, temperature=1.0),
        SamplingParams(min_p=0.999, temperature=1.0),
    ]
    tokens = sampler()(x, [make_draw(p, [1]) for p in params])
    assert [t.id for t in tokens] == x.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_at_the_temperature(temperature):
    x = logits(1)[0]
    p = torch.softmax(x / temperature, -1)
    got = drawn(x, SamplingParams(temperature=temperature, seed=1), 4000)
    assert float((got - p).abs().sum()) < 0.15


def test_a_row_knows_its_own_past_alone():
    """The same request alone, and among others of every kind that come and go."""
    params = SamplingParams(temperature=1.0, seed=7, top_p=0.9, presence_penalty=0.4, repetition_penalty=1.2, logprobs=3)
    steps = [logits(1, i) for i in range(30)]
    alone, s = make_draw(params, [1, 2]), sampler()
    want = [s(x, [alone])[0] for x in steps]
    rng, s, mine = random.Random(0), sampler(), make_draw(params, [1, 2])
    others = [make_draw(SamplingParams(temperature=t, seed=t and 3, frequency_penalty=f), [3]) for t in (0.0, 0.7) for f in (0.0, 1.0)]
    for x, token in zip(steps, want, strict=True):
        n, at = rng.randint(0, 4), rng.randint(0, 4)
        beside = [rng.choice(others) for _ in range(n)]
        rows, draws = [*logits(n, 99)], [*beside]
        rows.insert(min(at, n), x[0])
        draws.insert(min(at, n), mine)
        got = s(torch.stack(rows), draws)[min(at, n)]
        assert got.id == token.id and got.logprob == pytest.approx(token.logprob, abs=1e-6)
        gone = rng.randrange(4)
        s.release(others[gone])
        others[gone] = make_draw(others[gone].params, [3])


def test_penalties_are_what_they_say():
    prompt, x = [1, 2], logits(1)
    for params in (
        SamplingParams(presence_penalty=1.5),
        SamplingParams(frequency_penalty=-0.7),
        SamplingParams(repetition_penalty=1.7),
        SamplingParams(presence_penalty=2.0, frequency_penalty=1.0, repetition_penalty=0.8),
    ):
        s, draw, new = sampler(), make_draw(params, prompt), []
        for _ in range(12):
            want = x[0].clone()
            for i in {*prompt, *new}:
                want[i] = want[i] / params.repetition_penalty if want[i] > 0 else want[i] * params.repetition_penalty
            for i in set(new):
                want[i] -= params.presence_penalty + params.frequency_penalty * new.count(i)
            (token,) = s(x, [draw])
            assert token.id == int(want.argmax())
            new.append(token.id)


def test_tables_of_penalties_are_used_again_and_start_empty():
    s, params = sampler(), SamplingParams(presence_penalty=2.0)
    x = logits(1)
    for _ in range(20):
        draw = make_draw(params, [0])
        assert s(x, [draw])[0].id == int(x.argmax()), "nothing is left of the one before"
        s.release(draw)
        s.release(draw)
    assert len(s._penalties.new_SV) == 4


def test_logprobs_are_those_of_the_untouched_distribution():
    x = logits(2)
    params = SamplingParams(logprobs=5, temperature=0.5, top_k=2, presence_penalty=2.0, seed=0)
    draws = [make_draw(params, [1]), make_draw(SamplingParams(logprobs=0), [1])]
    want = torch.log_softmax(x, -1)
    first, second = sampler()(x, draws)
    assert first.logprob == pytest.approx(float(want[0, first.id]), abs=1e-5)
    assert [i for i, _ in first.top] == want[0].topk(5).indices.tolist()
    assert [p for _, p in first.top] == pytest.approx(want[0].topk(5).values.tolist(), abs=1e-5)
    assert second.top == () and second.logprob == pytest.approx(float(want[1].max()), abs=1e-5)


def test_no_end_comes_before_min_tokens():
    x = logits(1).fill_(0.0)
    x[0, STOP[0]], x[0, 5], x[0, 7] = 9.0, 8.0, 7.0
    s, draw = sampler(), make_draw(SamplingParams(min_tokens=2, stop_token_ids=(5,)), [1])
    assert [s(x, [draw])[0].id for _ in range(3)] == [7, 7, STOP[0]]


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(logprobs=1, presence_penalty=1.0)])
def test_rows_without_numbers_give_no_token_and_spare_the_others(params):
    x = logits(3)
    x[1, 4] = math.nan
    tokens = sampler()(x, [make_draw(params, [1])] * 3)
    assert tokens[1] is None and tokens[0] is not None and tokens[2] is not None


def test_bf16_logits_and_ties():
    x = torch.zeros(1, V, dtype=torch.bfloat16)
    x[0, 3:7] = 5.0
    got = drawn(x[0], SamplingParams(temperature=1.0, top_k=2, seed=0), 500)
    assert set(got.nonzero()[:, 0].tolist()) == {3, 4, 5, 6}, "equal ones stay together"


def test_a_grammar_leaves_its_tokens_alone():
    tokenizer = tiny_tokenizer()
    matcher = Compiler(tokenizer.backend_tokenizer.to_str(), 300, {258}).matcher("regex", "[xy]z")
    s = Sampler(300, {258}, torch.device("cpu"))
    draw = make_draw(SamplingParams(grammar=Grammar("regex", "[xy]z"), min_tokens=5, max_tokens=9), [1], matcher)
    x = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    out = ""
    while not draw.matcher.done:
        (token,) = s(x, [draw])
        assert draw.matcher.advance(token.id)
        out += tokenizer.decode([token.id])
    assert out in ("xz", "yz")


def test_settings_that_cannot_be_are_listed_together():
    with pytest.raises(TrimtabError) as caught:
        SamplingParams(temperature=-1, top_p=0, min_p=1.0, seed=-1, logprobs=21)
    assert len(caught.value.problems) == 5


def test_seeds_repeat_and_their_absence_does_not():
    engine = engine_of()
    kind = {"temperature": 1.5, "max_tokens": 20, "ignore_eos": True}
    heard = [ask(engine, f"{i}", [1, 2, 3], seed=s, **kind) for i, s in enumerate([5, 5, 6, None, None])]
    finish(engine)
    ids = [tuple(h.ids) for h in heard]
    assert ids[0] == ids[1] and len(set(ids)) == 4
