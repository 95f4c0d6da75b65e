"""How the parts of a call are told in an answer's text: where JSON ends, white space that may differ, what a tagged argument is as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import regex  # type: ignore[import-untyped]

from trimtab.bases.call_grammar import resolved, types_of


class JsonScan:
    """Finds the end of a JSON object whose text comes in pieces."""

    def __init__(self) -> None:
        self._depth, self._text, self._escaped = 0, False, False

    def __call__(self, text: str) -> tuple[int | None, bool]:
        """(characters that belong to it, whether it ends there); None where none begins here."""
        for i, c in enumerate(text):
            if self._text:
                if self._escaped:
                    self._escaped = False
                elif c == "\\":
                    self._escaped = True
                elif c == '"':
                    self._text = False
            elif c == '"':
                self._text = True
            elif c in "{[":
                self._depth += 1
            elif c in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return i + 1, True
            if self._depth == 0 and not c.isspace():
                return None, False
        return len(text), False


def flexible(text: str) -> str:
    """Matches a text of a format whose white space may differ, between the marks of JSON too; arguments may be called parameters."""
    if text.isspace():
        return r"\s+"
    parts = regex.split(r"(\s+|[{}\[\],:])", text)
    spelt = "".join(r"\s*" if p.isspace() else rf"\s*{regex.escape(p)}\s*" if p in "{}[],:" and p else regex.escape(p) for p in parts)
    return regex.sub('"(?:arguments|parameters)"', '"(?:arguments|parameters)"', spelt)


def once(pattern: str) -> str:
    """A pattern without white space twice in a row: a long run of it could be divided between the two in many ways."""
    return regex.sub(r"(?:\\s[*+])+", lambda run: r"\s+" if "+" in run[0] else r"\s*", pattern)


def lines(text: str) -> str:
    """Matches a text whose line breaks may be missing."""
    return regex.escape(text).replace("\\\n", "\n").replace("\n", r"\n?")


def value_of(text: str, key: str, schema: Mapping[str, Any]) -> str:
    """A tagged argument as JSON: text where the schema takes text, else what it spells."""
    properties = schema.get("properties")
    of = properties.get(key) if isinstance(properties, Mapping) else None
    of = resolved(of, schema) if isinstance(of, Mapping) else {}
    types, options = types_of(of, schema), [of["const"]] if "const" in of else of.get("enum")
    options = options if isinstance(options, list) else []
    spelt = {"True": "true", "False": "false", "None": "null"}.get(text.strip(), text.strip())
    try:
        kind = _KINDS[type(json.loads(spelt))]
    except (ValueError, RecursionError):
        kind = ("string",)
    plain = "string" in types and not set(kind) & (set(types) - {"string"})
    return json.dumps(text, ensure_ascii=False) if kind == ("string",) or plain or text in options else spelt


_KINDS: dict[type, tuple[str, ...]] = {
    dict: ("object",),
    list: ("array",),
    bool: ("boolean",),
    int: ("integer", "number"),
    float: ("number",),
    str: ("string",),
    type(None): ("null",),
}
"""What a value of JSON is in a schema."""
