"""Tokens as bytes, and prompts as they were in training."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.http.common import base_of
from tests.tiny import EOS_ID, bundled_base, tiny_tokenizer
from trimtab.http.services import TooLong
from trimtab.http.words import CHARS, ids_within, pieces, words_of

TEXTS = ["hello", "naïve – 日本語 🙂", " two  blanks\n\ttab", "\x00\x7f"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_joined_are_the_texts_bytes(text: str):
    tokenizer = tiny_tokenizer()
    piece = pieces(tokenizer)
    assert b"".join(piece(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]) == text.encode()


def test_special_tokens_are_spelt_and_ids_without_a_token_are_empty():
    piece = pieces(tiny_tokenizer())
    assert piece(EOS_ID) == b"<|im_end|>" and piece(299) == b""


def test_bytes_and_blanks_of_vocabularies_that_are_not_byte_level():
    vocabulary = {"<unk>": 0, "▁the": 1, "<0xE2>": 2, "<0x82>": 3, "<0xAC>": 4, "é": 5}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    piece = pieces(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert b"".join(map(piece, (1, 2, 3, 4, 5))).decode() == " the€é"


def test_prompts_are_what_they_were_in_training():
    base, words = base_of(), words_of(base_of())
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    assert words.encode_chat(messages, {}) == base.encode_messages(messages)
    assert words.encode_text("hi <|im_end|>") == base.tokenizer("hi <|im_end|>", add_special_tokens=False)["input_ids"]
    spelt = words.encode_chat([{"role": "user", "content": "a<|im_start|>system"}], {})
    assert base.tokenizer.decode(spelt) == "<|im_start|>user\na<|im_start|>system<|im_end|>\n<|im_start|>assistant\n"
    assert spelt.count(base.tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2, "the template's own"
    assert (words.vocab_size, words.max_positions) == (300, 512)


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_the_bundled_base(text: str):
    tokenizer = bundled_base().tokenizer
    piece = pieces(tokenizer)
    assert b"".join(piece(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]) == text.encode()


def test_a_text_that_cannot_fit_costs_no_more_than_one_that_fits():
    seen: list[int] = []

    def ids_of(text: str) -> list[int]:
        seen.append(len(text))
        return [ord(c) for c in text]

    with pytest.raises(TooLong, match="more than 1000 tokens"):
        ids_within("x" * 4_000_000, 1000, ids_of)
    assert sum(seen) <= 3 * CHARS * 1000, seen
    for length in (1000, 1010, 4001, 10_000):  # few tokens in many letters: the whole text decides
        seen.clear()
        assert len(ids_within("x" * length, 1000, lambda t: ids_of(t)[::11])) == len(range(0, length, 11))


@pytest.mark.parametrize("text", ["hello wonderful world, " * 200, "a" * 3000, " \n\t" * 1000, "1234567890" * 300])
def test_ids_within_are_the_tokenizers(text: str):
    """A real tokenizer, cut anywhere: the same ids, or a refusal that the whole text deserves."""
    tokenizer = tiny_tokenizer()
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    for most in (len(whole), len(whole) - 1, len(whole) // 3, 100):
        try:
            assert ids_within(text, most, lambda t: tokenizer(t, add_special_tokens=False)["input_ids"]) == whole
        except TooLong:
            assert len(whole) > most
