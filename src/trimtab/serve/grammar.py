"""Answers that follow a grammar: a JSON schema, a regular expression, a choice. Which tokens may come next is llguidance's to say.

A grammar is compiled once, by whoever submits the request and never on the step loop, under limits on its size and work. llguidance is
imported when the first grammar comes.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Sequence
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.serve.request import Grammar

MAX_CHARS = 65536
MAX_CHOICES = 1024
MAX_KEPT = 64
"""Compiled grammars that are kept."""
WHITESPACE = r"[ \n]{0,16}"
"""Between the parts of a JSON answer: bounded, since a model may write blanks for ever."""
LEXER_FUEL, MAX_SIZE, MAX_STATES = 500_000, 100_000, 50_000
"""llguidance's limits, below its own: fuel is spent at about 50,000 a millisecond while compiling; a state takes 1 to 2 kB."""


class Matcher:
    """Where one answer stands in its grammar. done: nothing but an end can follow. error: why no token is possible."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def mask(self, row: np.ndarray) -> None:
        """Write which tokens may come next: a bit each, int32 words; none where the grammar has run into its limits (see `error`)."""
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self._matcher.is_error():  # the library allows an end then, which would pass off half an answer as a whole one
            row[:] = 0

    def advance(self, token: int) -> bool:
        """Whether the token was allowed."""
        return bool(self._matcher.consume_token(token))

    @property
    def done(self) -> bool:
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def error(self) -> str:
        return _short(self._matcher.get_error()) if self._matcher.is_error() else ""


class Grammars:
    """Compiles grammars for one tokenizer. stop_ids: tokens that may end an answer where the grammar may end."""

    def __init__(self, tokenizer: Any, vocab_size: int, stop_ids: Collection[int]):
        self._tokenizer, self._vocab_size, self._stop_ids = tokenizer, vocab_size, sorted(stop_ids)
        self._ours: Any = None
        self._kept: OrderedDict[Grammar, Any] = OrderedDict()
        self._lock = Lock()

    def matcher(self, grammar: Grammar) -> Matcher:
        """A new matcher. TrimtabError where the grammar is wrong, too large, or llguidance is not installed."""
        with self._lock:
            if grammar not in self._kept:
                self._kept[grammar] = self._compile(grammar)
                while len(self._kept) > MAX_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(grammar)
            return Matcher(self._kept[grammar].deep_copy())

    def _compile(self, grammar: Grammar) -> Any:
        if len(grammar.text) > MAX_CHARS:
            raise TrimtabError(f"the {grammar.kind} has {len(grammar.text)} characters, at most {MAX_CHARS} are taken")
        try:
            import llguidance
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise TrimtabError("answers under a grammar need llguidance", fix="pip install 'trimtab[serve]'") from None
        if self._ours is None:
            self._ours = from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=self._stop_ids)
        limits = llguidance.LLParserLimits(
            initial_lexer_fuel=LEXER_FUEL, max_grammar_size=MAX_SIZE, max_lexer_states=MAX_STATES, verbose_errors=False
        )
        matcher = llguidance.LLMatcher(self._ours, _source(grammar), log_level=0, limits=limits)
        if matcher.is_error():
            raise TrimtabError(f"this {grammar.kind} cannot be followed: {_short(matcher.get_error())}")
        return matcher


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's own form."""
    from llguidance import LLMatcher

    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "choice":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(c) for c in _choices(grammar.text)))
    schema = {"type": "object"} if grammar.kind == "json_object" else _parse(grammar)
    if not isinstance(schema, dict):
        raise TrimtabError(f"a JSON schema is an object, this is {type(schema).__name__}")
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_pattern": WHITESPACE, "lenient": False})


def _choices(text: str) -> list[str]:
    choices = _parse(Grammar("choice", text))
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise TrimtabError("a choice is a JSON list of texts, none of them empty")
    if len(choices) > MAX_CHOICES:
        raise TrimtabError(f"{len(choices)} choices, at most {MAX_CHOICES} are taken")
    return choices


def _parse(grammar: Grammar) -> Any:
    try:
        return json.loads(grammar.text)
    except (ValueError, RecursionError) as error:
        raise TrimtabError(f"this {grammar.kind} is not JSON: {error}") from None


def _short(message: str) -> str:
    return message.strip().splitlines()[0][:300] if message.strip() else "no reason given"


def masks(matchers: Sequence[Matcher], vocab_size: int) -> Tensor:
    """Which tokens may come next [n, V] bool, on the CPU."""
    words = np.zeros((len(matchers), (vocab_size + 31) // 32), dtype=np.int32)
    for row, matcher in zip(words, matchers, strict=True):
        matcher.mask(row)
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, :vocab_size]
    return torch.from_numpy(bits).bool()
