"""Grammars: what may follow, what is refused at once, limits."""

from __future__ import annotations

import json
import sys
import time

import pytest

from tests.tiny import EOS_ID, tiny_tokenizer
from trimtab.errors import TrimtabError
from trimtab.serve import grammar as grammar_module
from trimtab.serve.grammar import Grammars, masks
from trimtab.serve.request import Grammar

TOKENIZER = tiny_tokenizer()
GRAMMARS = Grammars(TOKENIZER, 300, {EOS_ID, 256})


def allowed(matcher) -> set[int]:
    return set(masks([matcher], 300)[0].nonzero()[:, 0].tolist())


def takes(grammar: Grammar, text: str) -> bool:
    """Whether the text, and an end after it, follow the grammar."""
    matcher = GRAMMARS.matcher(grammar)
    for i in TOKENIZER(text, add_special_tokens=False)["input_ids"]:
        if i not in allowed(matcher):
            return False
        assert matcher.advance(i)
    return matcher.done or EOS_ID in allowed(matcher)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "n": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("kind", "text", "good", "bad"),
    [
        (
            "json_schema",
            json.dumps(SCHEMA),
            ['{"name":"é"}', '{"name": "abc", "n": 12}'],
            ['{"n":1}', '{"name":1}', "[]", '{"name":"abcdef"}'],
        ),
        ("json_object", "", ["{}", '{"a": [1, {"b": null}]}'], ["[]", "1", ""]),
        ("regex", "[a-c]{2,3}(x|é)", ["abx", "abcé"], ["ax", "abcdx", "ab"]),
        ("choice", '["ja", "nein", "a\\"b\\n", "/x/"]', ["ja", "nein", 'a"b\n', "/x/"], ["j", "x", "jaja", ""]),
    ],
)
def test_what_follows_and_what_does_not(kind, text, good, bad):
    grammar = Grammar(kind, text)
    assert [t for t in good if not takes(grammar, t)] == [] and [t for t in bad if takes(grammar, t)] == []


def test_an_end_is_allowed_where_the_grammar_may_end_and_nowhere_else():
    matcher = GRAMMARS.matcher(Grammar("regex", "a+"))
    assert allowed(matcher) == {TOKENIZER.encode("a")[0]}
    matcher.advance(TOKENIZER.encode("a")[0])
    assert allowed(matcher) == {TOKENIZER.encode("a")[0], EOS_ID, 256} and not matcher.done
    assert matcher.advance(EOS_ID) and matcher.done


def test_blanks_between_parts_are_bounded():
    assert takes(Grammar("json_object"), "{" + " " * 16 + "}") and not takes(Grammar("json_object"), "{" + " " * 40 + "}")


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("json_schema", "{", "not JSON"),
        ("json_schema", "[1]", "a JSON schema is an object"),
        ("json_schema", '{"type": "nope"}', "cannot be followed: .*nope"),
        ("json_schema", '{"$ref": "http://example.com/x"}', "cannot be followed"),
        ("json_schema", "[" * 60000, "not JSON"),
        ("json_schema", '{"description": "' + "x" * 70000 + '"}', "at most 65536"),
        ("regex", "a(b", "cannot be followed"),
        ("choice", '["a", 1]', "a JSON list of texts"),
        ("choice", "[]", "a JSON list of texts"),
        ("choice", json.dumps([str(i) for i in range(2000)]), "2000 choices, at most 1024"),
    ],
)
def test_what_cannot_be_followed_is_refused_soon(kind, text, words):
    began = time.perf_counter()
    with pytest.raises(TrimtabError, match=words) as caught:
        GRAMMARS.matcher(Grammar(kind, text))
    assert time.perf_counter() - began < 5 and caught.value.http_status == 400 and len(str(caught.value)) < 600


def test_a_grammar_is_compiled_once_and_kept_for_a_while(monkeypatch):
    monkeypatch.setattr(grammar_module, "MAX_KEPT", 2)
    ours, compiled = Grammars(TOKENIZER, 300, {EOS_ID}), []
    real = ours._compile
    monkeypatch.setattr(ours, "_compile", lambda g: compiled.append(g.text) or real(g))
    for text in ("a", "b", "a", "c", "a", "b"):
        ours.matcher(Grammar("regex", text))
    assert compiled == ["a", "b", "c", "b"]


def test_matchers_of_one_grammar_do_not_know_each_other():
    first, second = GRAMMARS.matcher(Grammar("regex", "ab")), GRAMMARS.matcher(Grammar("regex", "ab"))
    first.advance(TOKENIZER.encode("a")[0])
    assert allowed(first) == {TOKENIZER.encode("b")[0]} and allowed(second) == {TOKENIZER.encode("a")[0]}
    assert masks([first, second], 300).sum() == 2


def test_a_token_off_the_grammar_leaves_a_reason_and_no_tokens():
    matcher = GRAMMARS.matcher(Grammar("regex", "ab"))
    assert not matcher.advance(5) and "grammar" in matcher.error
    assert allowed(matcher) == set() and not matcher.done


def test_without_the_library_the_fix_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(TrimtabError, match=r"pip install 'trimtab\[serve\]'"):
        Grammars(TOKENIZER, 300, {EOS_ID}).matcher(Grammar("regex", "a"))


@pytest.mark.parametrize("regex", ["(((a{1,500}){1,500}){1,500})", "(a|b)*a(a|b){20}", ".*a.{1,200}b.*"])
def test_hard_grammars_stay_quick_or_give_up(regex):
    matcher, slowest = GRAMMARS.matcher(Grammar("regex", regex)), 0.0
    for _ in range(150):
        began = time.perf_counter()
        may = allowed(matcher)
        slowest = max(slowest, time.perf_counter() - began)
        if not may:
            assert "error" in matcher.error
            break
        matcher.advance(TOKENIZER.encode("a")[0])
    assert slowest < 1.0
