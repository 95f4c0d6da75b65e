"""The base under trimtab's attention equals transformers' own forward and generate, on every family.

Ragged batches, windows, soft caps, texts longer than a block of the attention, bf16.
"""

import pytest
import torch

from tests.laws.common import base_of, cached_logits, difference, one_thread, plain_of, tokens
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer
from trimtab import ops
from trimtab.decode.generate import Sampling
from trimtab.errors import BaseError, TrimtabError
from trimtab.model import Base

__all__ = ["one_thread"]

LENGTHS = (1, 2, 7, 8, 9, 17, 40, 40, 41, ops.QUERY_BLOCK, ops.QUERY_BLOCK + 1, ops.QUERY_BLOCK + 44, 3)


@torch.no_grad()
def _plain(family, ids):
    return plain_of(family)(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_batch_equals_transformers(family):
    base, sequences = base_of(family), [tokens(n, n) for n in LENGTHS]
    assert plain_of(family).config._attn_implementation == "eager"
    for ids, got in zip(sequences, base.logits(sequences), strict=True):
        assert difference(got, _plain(family, ids)) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_fed_in_chunks_equals_transformers(family):
    """Chunks across the window's edge and across a block's, beside sequences that are at other places."""
    base, sequences = base_of(family), [tokens(n, n + 1) for n in (30, 12, ops.QUERY_BLOCK + 40)]
    chunks = [[7, 1, 1, 9, 12], [1] * 12, [ops.QUERY_BLOCK + 20, 1, 1, 18]]
    for ids, got in zip(sequences, cached_logits(base, sequences, [None] * 3, chunks), strict=True):
        assert difference(got, _plain(family, ids)) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_equals_transformers_greedy(family):
    base, prompts = base_of(family), [tokens(n, n + 5) for n in (1, 6, 13)]
    for ids, got in zip(prompts, base.generate_ids(prompts, sampling=Sampling(max_new_tokens=14)), strict=True):
        attention_mask = torch.ones(1, len(ids), dtype=torch.int64)
        new = plain_of(family).generate(torch.tensor([ids]), attention_mask=attention_mask, max_new_tokens=14, do_sample=False)[
            0, len(ids) :
        ]
        assert got == [t for t in new.tolist() if t not in base.stop_ids]


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_good_as_transformers(family):
    """In bf16, as near to the fp32 logits as transformers' own bf16 forward is, within half as much again."""
    base, plain, ids = (
        Base(tiny_model(family, dtype=torch.bfloat16), tiny_tokenizer()),
        tiny_model(family, dtype=torch.bfloat16),
        tokens(40, 8),
    )
    exact = tiny_model(family, dtype=torch.bfloat16).float()
    for model in (plain, exact):
        model.set_attn_implementation("eager")  # the one that has Gemma 2's soft cap
    with torch.no_grad():
        want, theirs = exact(torch.tensor([ids])).logits[0], plain(torch.tensor([ids])).logits[0]
    ours = base.logits([ids])[0]
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - want).norm() <= 1.5 * (theirs.float() - want).norm()


def test_windows_and_caps_are_small_enough_to_matter():
    """Without them the comparisons above would not see a window that is off by one, or no cap at all."""
    ids = torch.tensor([tokens(30, 9)])
    for family, change in [
        ("mistral", {"sliding_window": 9}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma3_text", {"sliding_window": 9}),
    ]:
        changed = tiny_model(family)
        changed.set_attn_implementation("eager")
        for config in (changed.config, *(layer.self_attn for layer in changed.model.layers)):
            for key, value in change.items():
                if getattr(config, key, None) is not None:
                    setattr(config, key, value)
        with torch.no_grad():
            assert difference(changed(ids).logits, plain_of(family)(ids).logits) > 1e-3, family


def test_an_attached_model_does_not_run_by_itself():
    with pytest.raises(RuntimeError, match="attached to trimtab"):
        base_of("llama").model(torch.tensor([[1, 2]]))


def test_what_is_not_computed_exactly_is_refused_by_name():
    bidirectional, chunked = tiny_model("gemma3_text"), tiny_model("llama")
    bidirectional.config.use_bidirectional_attention = True
    chunked.config.attention_chunk_size = 8192
    for model, words in [(bidirectional, "use_bidirectional_attention"), (chunked, "attention_chunk_size = 8192")]:
        with pytest.raises(BaseError, match=words):
            Base(model, tiny_tokenizer())


def test_bad_sequences_are_listed_together():
    base = base_of("llama")
    with pytest.raises(TrimtabError) as e:
        base.logits([[], [1, 2], [base.spec.vocab_size], [-1]])
    assert len(e.value.problems) == 3
    with pytest.raises(TrimtabError, match="positions"):
        base.logits([[1] * (base.spec.max_positions + 1)])
    with pytest.raises(TrimtabError, match="prompt 1 needs 513 positions"):
        base.generate_ids([[1], [1] * (base.spec.max_positions + 1)], sampling=Sampling(max_new_tokens=2))


def test_generation_ends_where_the_positions_end():
    """The last token that is asked for needs no position of its own: nothing is computed from it."""
    base = base_of("llama")
    base.stop_ids = set()
    try:
        new = base.generate_ids([[1] * (base.spec.max_positions - 2), [1]], sampling=Sampling(max_new_tokens=5))
    finally:
        del base.stop_ids
    assert [len(n) for n in new] == [3, 5]
