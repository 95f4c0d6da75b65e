"""Grammars for calls: in llguidance's form of Lark, from a base's `CallFormat` and the tools that may be called.

JSON arguments are `%json` of the tool's schema between the format's own texts. Tagged arguments stand in the order of the schema's
properties; a text goes to the first `close`, and of what a schema asks of texts `enum`, `const`, lengths and anchored patterns are kept.
Texts of added tokens are those tokens: the letters alone would be something else to the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trimtab.bases.calls import CallFormat
from trimtab.errors import TrimtabError

MOST_CALLS = 16
"""In one answer under a grammar."""
WHITESPACE = r"[ \n]{0,16}"
"""Between the parts of JSON: bounded, since a model may write blanks for ever."""
MOST_SCHEMAS = 64
"""Of a union that are looked at: they may refer to each other, so that there is no end of them."""
SLASH = re.compile(r"\\.|[/\n]", re.DOTALL)
"""What ends a regular expression in a grammar, and what a backslash takes that away from."""
SAID = frozenset({"$comment", "default", "deprecated", "description", "readOnly", "title", "writeOnly"})
"""What a schema says to people and to the model: no answer is held to it, and it is most of an ordinary tool's text."""
INNER = frozenset({"additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then"})
INNER_LISTS = frozenset({"allOf", "anyOf", "items", "oneOf", "prefixItems"})
INNER_MAPS = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})
"""Where schemas stand within a schema. What stands elsewhere is a value, whatever it looks like."""
PYTHON = (("boolean", "True"), ("boolean", "False"), ("null", "None"))
Schemas = Mapping[str, Mapping[str, Any]]


class TooLarge(TrimtabError):
    """A grammar that is larger than any that is followed."""


@dataclass
class CallGrammar:
    """form: how calls are written. added: ids of added tokens by their texts. tools: schemas of arguments by the names of those that may be
    called. many: several calls may be made. most: characters of a grammar; TooLarge as soon as there are more, since each property of a
    tool may repeat all definitions of its schema."""

    form: CallFormat
    added: Mapping[str, int]
    tools: Schemas
    many: bool
    most: int = 1 << 18
    _rules: dict[str, None] = field(default_factory=dict)
    _size: int = 0

    def whole(self, reasoning: tuple[str, str] | None = None, opened: bool = False, content: Mapping[str, Any] | None = None) -> str:
        """Of an answer that makes calls; content: or is JSON of this schema. reasoning: the tags around what may stand before. opened: the
        prompt has opened it."""
        calls = self._calls(self._literal(self.form.before))
        body = calls if content is None else f"({calls} | {self._json('content', content)})"
        if reasoning is not None:
            thought = f"{self._until('thought', reasoning[1])} BLANKS"
            body = f"{thought} {body}" if opened else f"({self._literal(reasoning[0])} {thought})? {body}"
            self._rule(r"BLANKS: /\s{0,4}/")
        return self._text(body)

    def lazy(self) -> str:
        """Of the end of an answer that has just begun a call: from the opening on where that is an added token, else from anywhere before
        it."""
        form = self.form
        if form.harmony:
            header = " | ".join(["/[^<]+/", *map(self._literal, ("<|channel|>", "<|constrain|>"))])
            self._rule(f"header: ({header}){{0,8}}")
            return self._text(f"{self._until('text', form.opening)} {self._call('header ' + self._literal('<|message|>'))}")
        before = form.before.lstrip()
        if form.anywhere and form.opening not in self.added:
            return self._text(self._calls(f"{self._until('text', form.opening)} {self._literal(before.removeprefix(form.opening))}"))
        calls = self._calls(self._literal(before))
        if not form.anywhere:  # blanks before the opening are passed over (`Watch`)
            self._rule(r"BLANKS: /\s*/")
            calls = f"BLANKS {calls}"
        return self._text(calls)

    def _calls(self, before: str) -> str:
        call, form = self._call(self._literal(self.form.middle)), self.form
        more = "" if form.between is None or not self.many else f"({self._literal(form.between)} {call}){{0,{MOST_CALLS - 1}}}"
        return f"{before} {call} {more} {self._literal(form.after)}"

    def _call(self, middle: str) -> str:
        """A name and its arguments."""
        if not any(rule.startswith("call:") for rule in self._rules):
            ways = [f"{json.dumps(name)} {middle} {self._arguments(i, schema)}" for i, (name, schema) in enumerate(self.tools.items())]
            self._rule("call: " + "\n    | ".join(ways))
        return "call"

    def _arguments(self, number: int, schema: Mapping[str, Any]) -> str:
        schema = binding(schema if "type" in schema else {"type": "object", **schema})
        return self._json(f"args{number}", schema) if self.form.tagged is None else self._tagged(f"args{number}", schema)

    def _tagged(self, name: str, schema: Mapping[str, Any]) -> str:
        properties, required = schema.get("properties"), schema.get("required")
        required = {key for key in required if isinstance(key, str)} if isinstance(required, list) else set()
        tags = self.form.tagged
        assert tags is not None
        parts = []
        if isinstance(properties, Mapping) and properties:
            for i, (key, of) in enumerate(properties.items()):
                value = self._value(f"{name}_{i}", of if isinstance(of, Mapping) else {}, schema)
                part = f"{self._literal(tags.key + str(key) + tags.value)} {value}"
                parts.append(part if key in required else f"({part})?")
        elif schema.get("additionalProperties") is not False:
            self._rule("KEY: /[A-Za-z_][A-Za-z0-9_]{0,31}/")
            text = self._until(f"{name}_any", tags.close)
            parts.append(f"({self._literal(tags.key)} KEY {self._literal(tags.value)} {text}){{0,16}}")
        self._rule(f"{name}: {' '.join(parts)}".rstrip() if parts else f'{name}: ""')
        return name

    def _value(self, name: str, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        """A value and what closes it."""
        assert self.form.tagged is not None
        close = self.form.tagged.close
        of = resolved(schema, root)
        types, options = types_of(of, root), [of["const"]] if "const" in of else of.get("enum")
        if isinstance(options, list) and options and all(isinstance(o, str) for o in options):
            return f"({' | '.join(self._literal(o) for o in options)}) {self._literal(close)}"
        if "string" in types or not types:
            return self._until(name, close, _body(of))
        shared = {key: root[key] for key in ("$defs", "definitions") if key in root} if '"$ref"' in json.dumps(schema) else {}
        ways = [self._json(name, {**shared, **schema})]
        if not isinstance(options, list):  # as templates write what Python has: the base has learnt that
            ways += [f'"{word}"' for kind, word in PYTHON if kind in types]
        return f"({' | '.join(ways)}) {self._literal(close)}"

    def _json(self, name: str, schema: Mapping[str, Any]) -> str:
        guidance = {"whitespace_pattern": WHITESPACE, "lenient": False}
        self._rule(f"{name}: %json {json.dumps({**schema, 'x-guidance': guidance})}")
        return name

    def _until(self, name: str, mark: str, body: str = "(?s:.*)") -> str:
        """Text up to the first of these marks, and that."""
        if mark in self.added:
            self._rule(f"{name.upper()}: /{body}/")
            return f"{name.upper()} {self._literal(mark)}"
        self._rule(f"{name}[lazy]: /{body}{_escaped(mark)}/")
        return name

    def _literal(self, text: str) -> str:
        """A text, its added tokens as such."""
        marks = sorted((mark for mark in self.added if mark in text), key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, marks))})", text) if marks else [text]
        return " ".join(f"<[{self.added[part]}]>" if part in self.added else json.dumps(part) for part in parts if part)

    def _text(self, start: str) -> str:
        self._rule(f"start: {start}")
        return "\n".join(self._rules) + "\n"

    def _rule(self, rule: str) -> None:
        self._size += len(rule)
        if self._size > self.most:
            raise TooLarge(f"the grammar of these tools has more than {self.most} characters")
        self._rules[rule] = None


def _escaped(text: str) -> str:
    return re.escape(text).replace("\\\n", "\\n").replace("/", "\\/")


def _slashed(found: re.Match[str]) -> str:
    return {"/": "\\/", "\n": "\\n"}.get(found[0], found[0])


def _body(schema: Mapping[str, Any]) -> str:
    """What a text of this schema matches."""
    pattern = schema.get("pattern")
    if isinstance(pattern, str) and pattern.startswith("^") and pattern.endswith("$"):
        return f"(?:{SLASH.sub(_slashed, pattern[1:-1])})"
    least, most = schema.get("minLength"), schema.get("maxLength")
    if not any(isinstance(n, int) for n in (least, most)):
        return "(?s:.*)"
    return f"(?s:.{{{least if isinstance(least, int) else 0},{most if isinstance(most, int) else ''}}})"


def binding(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema without what binds nobody (`SAID`), at any depth."""
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key in INNER_MAPS and isinstance(value, Mapping):
            found[key] = {name: binding(of) if isinstance(of, Mapping) else of for name, of in value.items()}
        elif key in INNER_LISTS and isinstance(value, list):
            found[key] = [binding(of) if isinstance(of, Mapping) else of for of in value]
        elif key in INNER and isinstance(value, Mapping):
            found[key] = binding(value)
        elif key not in SAID:
            found[key] = value
    return found


def resolved(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema, or the one that it refers to within its document."""
    for _ in range(8):
        path = schema.get("$ref")
        if not isinstance(path, str) or not path.startswith("#/"):
            break
        found: Any = root
        for key in path[2:].split("/"):
            found = found.get(key) if isinstance(found, Mapping) else None
        if not isinstance(found, Mapping):
            break
        schema = found
    return schema


def types_of(schema: Mapping[str, Any], root: Mapping[str, Any]) -> set[str]:
    """The types that a value may have, as far as the first `MOST_SCHEMAS` schemas of its unions say; none where they do not say."""
    found, schemas, seen = set[str](), [schema], set[int]()
    while schemas and len(seen) < MOST_SCHEMAS:
        of = resolved(schemas.pop(), root)
        if id(of) in seen:
            continue
        seen.add(id(of))
        said = of.get("type")
        found.update([said] if isinstance(said, str) else [t for t in said if isinstance(t, str)] if isinstance(said, list) else [])
        for options in (of.get("anyOf"), of.get("oneOf")):
            if isinstance(options, list):
                schemas += [option for option in options[:MOST_SCHEMAS] if isinstance(option, Mapping)]
    return found
