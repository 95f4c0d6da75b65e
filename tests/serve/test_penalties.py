"""Penalties against transformers' repetition penalty and OpenAI's formula, where they matter: the prompt holds the likeliest tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from trimtab.serve.request import SamplingParams
from trimtab.serve.sampling import Sampler, make_draw

V = 40


def shaped(row_V: torch.Tensor, prompt: list[int], new: list[int], p: SamplingParams) -> torch.Tensor:
    """OpenAI counts new tokens alone: μ - count · frequency - [count > 0] · presence. Repetition counts the prompt too, and comes first."""
    x = RepetitionPenaltyLogitsProcessor(p.repetition_penalty)(torch.tensor([prompt + new]), row_V.clone()[None])[0]
    counts = torch.bincount(torch.tensor(new, dtype=torch.int64), minlength=V)
    return x - counts * p.frequency_penalty - (counts > 0) * p.presence_penalty


@pytest.mark.parametrize(
    "options",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.6},
        {"frequency_penalty": -0.4, "presence_penalty": 0.9},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.7, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    ],
)
def test_choices_and_logprobs_over_many_steps(options: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(4)
    x = 2 * torch.randn(25, V, generator=generator)
    x[:, 8:] -= 3.0  # a few tokens share the choice, so that each comes again and again
    prompt = [0, 1, 2, 3, 1]
    params = SamplingParams(logprobs=4, **options)
    sampler, new = Sampler(V, (), torch.device("cpu")), []
    draw = make_draw(params, prompt)
    changed = 0
    for row in x:
        (token,) = sampler(row[None], [draw])
        want, log_p = shaped(row, prompt, new, params), torch.log_softmax(row, -1)
        assert token.id == int(want.argmax())
        assert token.logprob == pytest.approx(float(log_p[token.id]), abs=1e-5), "of the untouched distribution"
        assert [i for i, _ in token.top] == log_p.topk(4).indices.tolist()
        assert [v for _, v in token.top] == pytest.approx(log_p.topk(4).values.tolist(), abs=1e-5)
        changed += token.id != int(row.argmax())
        new.append(token.id)
    assert changed > 3, "the penalties were at work"
