"""Text as it appears: all deltas joined are what the tokenizer makes of all ids, cut before the first stop text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.tiny import EOS_ID, tiny_tokenizer
from trimtab.decode.text import Decoder

TOKENIZER = tiny_tokenizer()
DECODER = Decoder(TOKENIZER)


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


EURO, FACE, RO = encode("€"), encode("😀"), encode("ロ")
"""Characters of three, four and three bytes, a token each byte."""


def sentencepiece() -> PreTrainedTokenizerFast:
    """Llama 2's way: words begin with a mark, the first blank goes, bytes that have no token come one by one."""
    words = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁the", "▁end", "ing", "▁", "é", "▁�", "x"]
    backend = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", clean_up_tokenization_spaces=False)


SENTENCEPIECE = sentencepiece()
FALLBACK = Decoder(SENTENCEPIECE)


def streamed(ids, stop=(), decoder=DECODER, min_tokens=0):
    stream, deltas = decoder.stream(stop, min_tokens), []
    for i in ids:
        deltas.append(stream.push(i))
        if stream.stopped:
            break
    deltas.append(stream.finish())
    return deltas, stream


def test_half_characters_are_held_back():
    deltas, _ = streamed(encode("aé€😀b"))
    assert deltas == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]


def test_half_a_character_at_the_end_comes_out_as_the_tokenizer_says():
    ids = encode("a€")[:-1]
    assert "".join(streamed(ids)[0]) == TOKENIZER.decode(ids) == "a\ufffd"


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.one_of(st.integers(0, 255), st.sampled_from([*EURO, *FACE, 256, EOS_ID, *encode("a")])), max_size=120))
def test_any_bytes_join_to_what_the_tokenizer_says(ids):
    assert "".join(streamed(ids)[0]) == TOKENIZER.decode(ids, skip_special_tokens=True)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.one_of(st.integers(0, 263), st.integers(257, 263), st.sampled_from([1 + b for b in "ロ".encode()])), max_size=120))
def test_any_pieces_of_sentencepiece_join_to_what_the_tokenizer_says(ids):
    assert "".join(streamed(ids, decoder=FALLBACK)[0]) == SENTENCEPIECE.decode(ids, skip_special_tokens=True)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.text("ab€\n", max_size=60), st.lists(st.text("ab€", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_text_is_cut_before_the_first_stop_text(text, stops):
    deltas, stream = streamed(encode(text), stops)
    places = [text.find(s) for s in stops if s in text]
    # the first that is complete decides, as for whoever reads along; of several complete at once, the one that begins first
    ends = [text.find(s) + len(s) for s in stops if s in text]
    if not places:
        assert "".join(deltas) == text and not stream.stopped
        return
    complete = [text.find(s) for s in stops if s in text and len(text[: text.find(s) + len(s)].encode()) <= len(text[: min(ends)].encode())]
    assert "".join(deltas) == text[: min(complete)] and stream.stopped


def test_nothing_that_may_begin_a_stop_text_is_shown():
    deltas, stream = streamed(encode("one STOX two STOP three"), ["STOP"])
    seen = ""
    for d in deltas:
        seen += d
        assert not seen.endswith(("S", "ST", "STO", "STOP")), seen
    assert seen == "one STOX two " and stream.stopped


def test_a_stop_text_split_over_two_deltas_is_found():
    deltas, stream = streamed(encode("aST") + encode("OPb"), ["STOP"])
    assert deltas == ["a", "", "", "", "", ""] and stream.stopped


def test_a_stop_text_that_the_end_completes():
    stream = DECODER.stream(["a\ufffd"])
    out = [stream.push(i) for i in (*encode("a"), EURO[0])]
    assert out == ["", ""] and stream.finish() == "" and stream.stopped


def test_no_stop_text_ends_before_min_tokens():
    deltas, stream = streamed(encode("xxSTOPxxSTOPxx"), ["STOP"], min_tokens=7)
    assert "".join(deltas) == "xxSTOPxx" and stream.stopped


@pytest.mark.parametrize(
    "ids", [EURO[1:2] * 500, EURO[:2] * 250, EURO[:1] * 500, RO * 200, [256] * 500, [*FACE[:2], 256] * 200, [*FACE[:3], *RO[1:]] * 99]
)
def test_the_window_stays_short_whatever_comes(ids):
    stream = DECODER.stream()
    longest, text = 0, ""
    for i in ids:
        text += stream.push(i)
        longest = max(longest, len(stream._window))
    assert text + stream.finish() == TOKENIZER.decode(ids, skip_special_tokens=True)
    assert longest <= 40


def test_a_tokenizer_that_tidies_blanks_goes_its_own_way():
    """Its rules reach over tokens, so its own decode is asked."""
    tidy = tiny_tokenizer()
    tidy.clean_up_tokenization_spaces = True
    ids = encode("a b.")
    assert Decoder(tidy).decode(ids) == tidy.decode(ids, skip_special_tokens=True)
