"""The one sampler: its distribution is that of transformers' warpers, its draws follow it, and every way to tokens goes through it."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.laws.common import EXAMPLES, base_of, noisy, tokens
from tests.serve.common import ask, engine_of, finish, held
from trimtab.decode.generate import Sampling
from trimtab.decode.sampling import choose, draw, warped
from trimtab.errors import TrimtabError

COLDEST = [0.0, 5e-324, 1e-300, 1e-45, 1e-10, 9.9e-6]


@dataclass(frozen=True)
class Settings:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def theirs(row_V: torch.Tensor, s: Settings) -> torch.Tensor:
    """What transformers would draw from, in the order in which `generate` puts its warpers."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(s.temperature)])
    warpers += [TopKLogitsWarper(s.top_k)] if s.top_k else []
    warpers += [TopPLogitsWarper(s.top_p)] if s.top_p < 1.0 else []
    warpers += [MinPLogitsWarper(s.min_p)] if s.min_p else []
    return warpers(None, row_V.float()[None])[0]


def rows(kind: str, count: int, V: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = 3.0 * torch.randn(count, V, generator=generator)
    if kind == "ties":  # a few values, each many times: every cut falls among equals
        x = x.round()
    elif kind == "flat":
        x = torch.full_like(x, 1.5)
    elif kind == "masked":  # as a grammar leaves them
        x[torch.rand(count, V, generator=generator) < 0.7] = -torch.inf
        x[:, 3] = 0.5
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [7, 300, 2000])
@pytest.mark.parametrize("kind", ["plain", "ties", "flat", "masked"])
def test_the_distribution_is_that_of_transformers_warpers(kind, V, dtype):
    """Bit for bit, ties included, in one batch of rows that all want something else."""
    rng = random.Random(V)
    every = [
        Settings(rng.choice([0.01, 0.3, 0.7, 1.0, 1.7, 50.0]), k, p, m)
        for k in (0, 1, 2, 5, 40, V, V + 1, 10**9)
        for p in (1.0, 0.95, 0.9, 0.5, 1e-9, 0.0)
        for m in (0.0, 0.05, 0.5, 0.999)
    ]
    x = rows(kind, len(every), V, dtype, V)
    before = x.clone()
    got = warped(x, every)
    assert torch.equal(x, before), "the logits are somebody else's"
    for row, s, mine in zip(x, every, got, strict=True):
        assert torch.equal(mine, theirs(row, s)), s


def test_the_order_is_that_in_which_transformers_generates():
    config = GenerationConfig(do_sample=True, temperature=0.7, top_k=5, top_p=0.8, min_p=0.1)
    found = base_of("llama").model._get_logits_processor(config, input_ids_seq_length=1)
    kinds = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
    assert [type(p) for p in found if isinstance(p, kinds)] == list(kinds)


@pytest.mark.parametrize("s", [Settings(0.7), Settings(1.3, top_k=6), Settings(1.0, top_p=0.8), Settings(2.0, 20, 0.9, 0.05)])
def test_draws_come_as_often_as_their_probability(s):
    times, x = 20000, rows("plain", 1, 30, torch.float32, 5)
    want = torch.softmax(theirs(x[0], s), -1)
    generator = random.Random(1)
    ids = draw(warped(x, [s]).expand(times, -1), [generator.random() for _ in range(times)])
    got = torch.bincount(ids, minlength=30) / times
    assert got[want == 0].sum() == 0
    assert float(((got - want).abs() / (want * (1 - want) / times).sqrt().clamp_min(1e-9))[want > 1e-3].max()) < 4.5  # standard errors


def test_a_number_picks_the_token_whose_share_it_falls_into():
    """By hand: weights 1, 2, 0, 1 of 4; the ends of the range too."""
    x = torch.tensor([[1.0, 2.0, 0.0, 1.0]]).log()
    numbers = {0.0: 0, 0.2499: 0, 0.25: 1, 0.7499: 1, 0.75: 3, 1.0 - 2**-53: 3}
    assert draw(x.expand(len(numbers), -1), list(numbers)).tolist() == list(numbers.values())


@pytest.mark.parametrize("temperature", COLDEST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_next_to_zero_a_temperature_is_greedy(temperature, dtype):
    x = torch.cat([rows("ties", 4, 50, dtype, 1), rows("plain", 4, 50, dtype, 2), rows("masked", 2, 50, dtype, 3)])
    s = [Settings(temperature, *cuts) for cuts in [(0, 1.0, 0.0), (3, 0.9, 0.1)] for _ in range(5)]
    want = [min(i for i, v in enumerate(row.tolist()) if v == row.max()) for row in x]
    assert choose(x, s, [random.Random(0)] * 10).tolist() == want, "the first of equals"


def test_a_row_is_drawn_as_alone_and_takes_one_number():
    x, rng = rows("plain", 6, 300, torch.bfloat16, 4), random.Random(2)
    s = [Settings(), Settings(0.0), Settings(0.5, top_p=0.7), Settings(1.0, top_k=9), Settings(2.0, min_p=0.1), Settings(1.0, 7, 0.6, 0.2)]
    generators = [random.Random(i) for i in range(6)]
    together = choose(x, s, generators).tolist()
    assert together == [int(choose(x[i : i + 1], [s[i]], [random.Random(i)])) for i in range(6)]
    drawn_once = [random.Random(i) for i in range(6)]
    numbers = [g.random() for i, g in enumerate(drawn_once) if i != 1]
    assert [g.random() for g in generators] == [g.random() for g in drawn_once] and len(set(numbers)) == 5
    order = rng.sample(range(6), 6)
    again = choose(x[order], [s[i] for i in order], [random.Random(i) for i in order]).tolist()
    assert again == [together[i] for i in order]


@pytest.mark.parametrize(
    "cuts", [{}, {"top_p": 0.7}, {"top_k": 12}, {"top_k": 20, "top_p": 0.8, "min_p": 0.02}, {"temperature": 1e-12}, {"temperature": 5e-324}]
)
def test_generate_and_the_engine_draw_the_same_tokens(cuts):
    """One sampler: the same logits and the same seed are the same answer."""
    base, cuts = base_of("llama"), {"temperature": 1.2} | cuts
    for n, a in ((4, None), (5, held("lora-0")), (6, None)):
        prompt = tokens(n, n)
        want = base.generate_ids([prompt], [a and a.adapter], Sampling(max_new_tokens=24, seed=0, **cuts))[0]
        engine = engine_of()
        heard = ask(engine, "x", prompt, a, seed=0, max_tokens=24, **cuts)
        finish(engine)
        assert [i for i in heard.ids if i not in base.stop_ids] == want and want


def test_generate_draws_each_sequence_from_a_generator_of_its_own():
    """Sequence i of seed s draws Python's Random(1_000_003 s + i), one number a token, by the definition above."""
    base, prompt = base_of("llama"), tokens(6, 8)
    s = Sampling(max_new_tokens=6, temperature=1.5, top_k=40, top_p=0.9, min_p=0.01, seed=3)
    got = base.generate_ids([prompt] * 3, None, s)
    assert len({tuple(g) for g in got}) == 3
    for i, ids in enumerate(got):
        generator, text = random.Random(3 * 1_000_003 + i), list(prompt)
        for token in ids:
            p = torch.softmax(theirs(base.logits([text])[0][-1], Settings(1.5, 40, 0.9, 0.01)).double(), -1)
            assert int((p.cumsum(-1) > generator.random()).nonzero()[0]) == token
            text.append(token)


def test_logits_that_are_not_finite_are_named():
    base = base_of("llama")
    broken = noisy(base, EXAMPLES["ia3-0"])
    broken.params = {k: torch.full_like(t, torch.nan) for k, t in broken.params.items()}
    with pytest.raises(TrimtabError, match="not finite") as caught:
        base.generate_ids([tokens(5, 1), tokens(6, 2)], [None, broken], Sampling(4, temperature=1.0))
    assert list(caught.value.problems) == ["prompt 1, under adapter 0 of the mix"]
