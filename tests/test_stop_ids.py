"""What ends an answer: the template's end of turn, the tokenizer's end token and those of the generation config, as in transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.laws.common import plain_of, tokens
from tests.tiny import CHATML, EOS_ID, tiny_model, tiny_tokenizer
from trimtab.decode.generate import Sampling
from trimtab.model import Base

IM_END, END_OF_TEXT = EOS_ID, 256


@pytest.mark.parametrize(
    ("configured", "eos", "template", "want"),
    [
        (None, "<|im_end|>", CHATML, {IM_END}),
        (7, "<|im_end|>", CHATML, {7, IM_END}),
        ([7, 9], "<|im_end|>", CHATML, {7, 9, IM_END}),
        ([7], "<|endoftext|>", CHATML, {7, END_OF_TEXT, IM_END}),
        ((7,), "<|endoftext|>", None, {7, END_OF_TEXT}),
        (None, None, CHATML, {IM_END}),
    ],
)
def test_every_source_counts(configured: Any, eos: str | None, template: str | None, want: set[int]) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.generation_config.eos_token_id = configured
    tokenizer.eos_token, tokenizer.chat_template = eos, template
    assert Base(model, tokenizer).stop_ids == want


def test_a_base_without_a_chat_template_generates() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    base = Base(tiny_model("gpt2"), tokenizer)
    assert len(base.generate(["once upon"], max_new_tokens=3)) == 1


@pytest.mark.parametrize("count", [1, 4])
def test_an_answer_ends_where_transformers_ends_it(count: int) -> None:
    """The token that comes `count`-th becomes an end token of the generation config; it is no part of the answer."""
    prompt = next(p for p in (tokens(9, seed) for seed in range(20)) if len({*_greedy(p, 6)}) == 6)
    ends = [_greedy(prompt, 6)[count - 1], 299]
    model = tiny_model("llama")
    model.generation_config.eos_token_id = ends
    base = Base(model, tiny_tokenizer())
    theirs = _greedy(prompt, 6, eos_token_id=ends)
    assert theirs[-1] == ends[0] and len(theirs) == count
    assert base.generate_ids([prompt], None, Sampling(6)) == [theirs[:-1]]


def test_an_answer_has_max_new_tokens_beside_longer_prompts_too() -> None:
    prompts = [tokens(5, 1), tokens(20, 2)]
    base = Base(tiny_model("llama"), tiny_tokenizer())
    base.stop_ids = set()
    assert [len(ids) for ids in base.generate_ids(prompts, None, Sampling(5))] == [5, 5]


def _greedy(prompt: list[int], new: int, **options: Any) -> list[int]:
    """transformers' own greedy answer."""
    options = {"eos_token_id": None} | options
    ids = torch.tensor([prompt])
    ids = plain_of("llama").generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0, **options
    )
    return ids[0, len(prompt) :].tolist()
