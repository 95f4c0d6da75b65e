"""Answers that are constrained: to a JSON schema, a regular expression, a choice, or a grammar in Lark's form or GBNF. All are grammars
to llguidance, which says which tokens may come next.

What a grammar costs cannot be told from its text, and nothing can be stopped once it has begun: so all this runs in a process of its own
(`grammar_process.py`), which may end at any call for want of time or memory. It imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError

MAX_CHARS = 65536
MAX_CALL_CHARS = 4 * MAX_CHARS
"""Of a grammar of tools, which has the schemas of all of them: 128 of 1,800 characters fit."""
MAX_CHOICES = 1024
KEPT_BYTES = 16 << 20
"""Memory that compiled grammars may take which nobody uses at the moment."""
WHITESPACE = r"[ \n]{0,16}"
"""Between the parts of a JSON answer: bounded, since a model may write blanks for ever."""
_NOTHING = "NoExtensionBias"
"""llguidance's word for a grammar of which no text is."""
_NAMES = {"calls": "the grammar of these tools"}
LEXER_FUEL, MAX_SIZE, MAX_STATES = 500_000, 100_000, 50_000
"""llguidance's limits, below its own; a state takes 1 to 2 kB. They bound time loosely: a unit of fuel may take 100 ns or 3 µs."""


class GrammarError(TrimtabError):
    """A grammar that cannot be followed: it is wrong, too large, or takes too long."""


class Matcher:
    """Where one answer stands in its grammar. done: nothing but an end can follow. error: why no token is possible."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    @property
    def mask(self) -> bytes:
        """Which tokens may come next: a bit each, in int32 words; none where the grammar has run into its limits (see `error`)."""
        found: bytes = self._matcher.compute_bitmask()
        # the library allows an end after an error, which would pass off half an answer as a whole one
        return bytes(len(found)) if self._matcher.is_error() else found

    def advance(self, token: int) -> bool:
        """Whether the token was allowed."""
        return bool(self._matcher.consume_token(token))

    @property
    def done(self) -> bool:
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def error(self) -> str:
        return _short(self._matcher.get_error()) if self._matcher.is_error() else ""


class Compiler:
    """Compiles grammars for one tokenizer. tokenizer: its tokenizer.json. stop_ids: tokens that may end an answer where the grammar may
    end."""

    def __init__(self, tokenizer: str, vocab_size: int, stop_ids: Collection[int]):
        import llguidance

        self._ours = llguidance.LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=sorted(stop_ids))
        self._kept: OrderedDict[tuple[str, str], tuple[Any, int]] = OrderedDict()  # the matcher at its start, and what it takes

    def matcher(self, kind: str, text: str) -> Matcher:
        """A new matcher. GrammarError where the grammar is wrong or too large."""
        key = (kind, text)
        if key in self._kept:
            self._kept.move_to_end(key)
            return Matcher(self._kept[key][0].deep_copy())
        before = resident_bytes()
        made = self._compile(kind, text)
        self._kept[key] = made.deep_copy(), max(4 * len(text), resident_bytes() - before)
        while sum(size for _, size in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return Matcher(made)

    def _compile(self, kind: str, text: str) -> Any:
        import llguidance

        check_size(kind, text)
        limits = llguidance.LLParserLimits(
            initial_lexer_fuel=LEXER_FUEL, max_grammar_size=MAX_SIZE, max_lexer_states=MAX_STATES, verbose_errors=False
        )
        matcher = llguidance.LLMatcher(self._ours, _source(kind, text), log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarError(f"{_NAMES.get(kind, f'this {kind}')} cannot be followed: {_short(matcher.get_error())}")
        return matcher


def check_size(kind: str, text: str) -> None:
    """GrammarError where the text is larger than any that is read."""
    if len(text) > (most := MAX_CALL_CHARS if kind == "calls" else MAX_CHARS):
        raise GrammarError(f"{_NAMES.get(kind, f'the {kind}')} has {len(text)} characters, at most {most} are taken")


def resident_bytes() -> int:
    """Memory of this process; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _source(kind: str, text: str) -> str:
    """The grammar in llguidance's own form."""
    from llguidance import LLMatcher

    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    if kind == "calls":
        return LLMatcher.grammar_from_lark(text)
    if kind == "grammar":
        return LLMatcher.grammar_from_lark(_lark(text))
    if kind == "choice":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(c) for c in _choices(text)))
    schema = {"type": "object"} if kind == "json_object" else _parse(kind, text)
    if not isinstance(schema, dict):
        raise GrammarError(f"a JSON schema is an object, this is {type(schema).__name__}")
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_pattern": WHITESPACE, "lenient": False})


def _lark(text: str) -> str:
    """A grammar in Lark's form, as it is; one in GBNF turned into it."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(text))
    except Exception as error:  # of its own kind, or whatever a text makes of it
        raise GrammarError(f"this grammar cannot be read: {_short(str(error))}") from None


def _choices(text: str) -> list[str]:
    choices = _parse("choice", text)
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise GrammarError("a choice is a JSON list of texts, none of them empty")
    if len(choices) > MAX_CHOICES:
        raise GrammarError(f"{len(choices)} choices, at most {MAX_CHOICES} are taken")
    return choices


def _parse(kind: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"this {kind} is not JSON: {error}") from None


def _short(message: str) -> str:
    """Its first line; where that tells of a regex alone that it is invalid, with the reason, which is in a later one."""
    first, *others = message.strip().splitlines() or ["no reason given"]
    if first == _NOTHING:
        return "no text follows it: each of its rules needs another one, or what it asks for cannot be"
    reason = next((line.removeprefix("error:") for line in others if line.startswith("error:")), "")
    return first[: 300 - len(reason[:200])] + reason[:200]
