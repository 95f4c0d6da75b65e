"""What a lazy grammar begins with, as tokens: none of them begins within a character."""

from __future__ import annotations

from tests.tiny import tiny_tokenizer
from trimtab.decode.text import HALF, Decoder
from trimtab.serve.request import Trigger
from trimtab.serve.watch import Watch


def watched(text, trigger):
    """(the tokens that the watch hands over first, how many it has seen by then)"""
    tokenizer = tiny_tokenizer()
    watch = Watch(trigger, Decoder(tokenizer).stream())
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for i, token in enumerate(ids, 1):
        if found := watch(token):
            return tokenizer.decode(found), tokenizer.decode(ids[:i])
    return None


def test_a_trigger_behind_characters_of_several_tokens():
    for before in ("", "word ", "世界" * 40, "a < b <<to", "😀" * 50 + "<"):
        text, seen = watched(f"{before}<tool>\nrest", Trigger("<tool>"))
        assert "<tool>" in text and HALF not in text and seen.endswith(text) and len(text) < 20
    assert watched("<to<ol> <tool", Trigger("<tool>")) is None


def test_a_trigger_at_the_beginning_has_the_blanks_before_it():
    trigger = Trigger('{"name": "', at_start=True)
    assert watched('{"name": "f"}', trigger)[0].startswith('{"name": "')
    assert watched(" \n" * 100 + '{"name": "f"}', trigger)[0].strip().startswith('{"name": "')
    assert watched('No {"name": "f"}', trigger) is None
