"""Grammars of calls: what writing one costs, whatever the schemas, and what regular expressions become in one."""

from __future__ import annotations

import json
import re

import pytest

from trimtab.bases import call_grammar
from trimtab.bases.call_grammar import CallGrammar, TooLarge, binding, types_of
from trimtab.bases.calls import CallFormat, Tagged

TAGGED = CallFormat("<f=", ">", "</f>", None, "<f=", True, Tagged("<p=", ">", "</p>"))


def grammar(schema):
    return CallGrammar(TAGGED, {}, {"f": schema}, many=False, most=10_000)


def test_unions_that_refer_to_themselves_are_looked_at_once(monkeypatch):
    looked = []
    real = call_grammar.resolved
    monkeypatch.setattr(call_grammar, "resolved", lambda *a: (looked.append(1), assert_few(looked), real(*a))[-1])
    itself = {"anyOf": [{"$ref": "#/$defs/a"} for _ in range(1000)]}
    root = {"$defs": {"a": itself, "b": {"oneOf": [itself, {"type": ["null", "integer"]}]}}}
    assert types_of(itself, root) == set()
    assert types_of({"anyOf": [{"$ref": "#/$defs/b"}, {"type": "boolean"}]}, root) == {"null", "integer", "boolean"}


def assert_few(looked):
    assert len(looked) < 5000


def test_definitions_that_each_property_repeats_end_at_the_bound():
    schema = {
        "$defs": {"a": {"type": "object", "required": ["x" * 5000]}},
        "properties": {f"p{i}": {"$ref": "#/$defs/a"} for i in range(1000)},
    }
    made = grammar(schema)
    with pytest.raises(TooLarge, match="more than 10000 characters"):
        made.lazy()
    assert sum(map(len, made._rules)) <= 10_000
    schema["properties"] = {f"p{i}": {"type": "integer"} for i in range(30)}
    assert "xxx" not in grammar(schema).lazy(), "definitions that nothing refers to are left out"


@pytest.mark.parametrize("pattern", ["a/b", r"a\/b", r"a\\/b", r"[/]\/\d", "a\nb"])
def test_a_pattern_stands_between_slashes_as_it_is(pattern):
    text = grammar({"properties": {"p": {"type": "string", "pattern": f"^{pattern}$"}}}).lazy()
    rule = next(line for line in text.splitlines() if line.startswith("args0_0"))
    body = re.fullmatch(r"args0_0\[lazy\]: /((?:\\.|[^/\\])*)/", rule)
    assert body is not None, rule
    own = body[1].removeprefix("(?:").partition(")</p>")[0].partition(")<\\/p>")[0]
    examples = ["a/b", r"a\/b", "//7", "a\nb"]
    assert [bool(re.fullmatch(own, t)) for t in examples] == [bool(re.fullmatch(pattern, t)) for t in examples]


def test_a_grammar_has_of_a_schema_what_binds():
    """A property may be called as a word that only says something, and a value may look like a schema."""
    said = {"title": "T", "description": "D", "default": 3, "$comment": "C"}
    odd = {"type": "object", **said, "properties": {"title": {"type": "string", **said}, "default": {"const": said}}, "required": ["title"]}
    assert binding(odd) == {
        "type": "object",
        "properties": {"title": {"type": "string"}, "default": {"const": said}},
        "required": ["title"],
    }
    places = {"anyOf": [odd, {"$ref": "#/$defs/a"}], "items": odd, "additionalProperties": odd, "not": odd, "prefixItems": [odd, True]}
    assert json.dumps(binding({"$defs": {"a": odd}, **places, "enum": [said]})).count('"D"') == json.dumps([odd] * 6).count('"const"') + 1
    assert binding({"additionalProperties": False, "items": False, "enum": [odd]}) == {
        "additionalProperties": False,
        "items": False,
        "enum": [odd],
    }
