"""Rewards that need no code of the user's. Each has TRL's signature: lists over answers in, a number for each out, None where it does not
apply. `completions` are texts here; `references` what they are compared with, text or any JSON value."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trimtab.bases.template import BadRow
from trimtab.data.calls import canonical, read_calls
from trimtab.patterns import occurs, regex_problem

Scores = list[float | None]


def exact_match(completions: Sequence[str], references: Sequence[Any], column: str | None = None) -> Scores:
    """1 where the answer is the reference, blanks around either ignored. If the reference is a JSON object or list, as JSON: blanks and the
    order of keys do not count."""
    return [_equal(said, wanted) for said, wanted in zip(completions, references, strict=True)]


def regex(completions: Sequence[str], *, pattern: str) -> Scores:
    """1 where the pattern is found in the answer; `.` matches line ends too. The time is bounded, unless `patterns` does not read the
    pattern, as where it has a back reference: then Python's `re` searches, until it is done or the reward's time limit ends it."""
    if regex_problem(pattern) is None:
        return [float(occurs(pattern, said, re.DOTALL)) for said in completions]
    found = re.compile(pattern, re.DOTALL)
    return [float(found.search(said) is not None) for said in completions]


def json_schema(completions: Sequence[str], *, schema: Mapping[str, Any]) -> Scores:
    """1 where the answer is JSON that the schema accepts."""
    from jsonschema import Draft202012Validator

    validator = Draft202012Validator(schema)
    parsed = [_json(said) for said in completions]
    return [float(value is not _NONE and validator.is_valid(value)) for value in parsed]


def tool_call(completions: Sequence[str], references: Sequence[Any], calls: Sequence[Sequence[str]], column: str | None = None) -> Scores:
    """1 where the answer makes the calls of the reference, by name and arguments, in any order. calls: the answers', as `canonical`."""
    return [_same(made, wanted) for made, wanted in zip(calls, references, strict=True)]


def length(completions: Sequence[str], min_words: int | None = None, max_words: int | None = None) -> Scores:
    """1 where the answer has from min_words to max_words words, less the further it is away: n / min_words, max_words / n."""
    found: Scores = []
    for said in completions:
        n = len(said.split())
        found.append(n / min_words if min_words and n < min_words else max_words / n if max_words is not None and n > max_words else 1.0)
    return found


REWARDS: Mapping[str, Callable[..., Scores]] = {f.__name__: f for f in (exact_match, regex, json_schema, tool_call, length)}

_NONE = object()


def _equal(said: str, wanted: Any) -> float | None:
    if wanted is None:
        return None
    text = wanted if isinstance(wanted, str) else json.dumps(wanted)
    if said.strip() == text.strip():
        return 1.0
    value = _json(text)
    return float(isinstance(value, dict | list) and _json(said) == value)


def _same(made: Sequence[str], wanted: Any) -> float | None:
    if wanted is None:
        return None
    try:
        return float(list(made) == canonical(read_calls(wanted, "the reference")))
    except BadRow:
        return None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NONE
