"""Texts and numbers out of files that may be anybody's, such as JSON can carry to a browser."""

from __future__ import annotations

import json
from typing import Any

from trimtab.errors import printable
from trimtab.train.past import is_finite

MAX_TEXT = 20_000
"""Characters of a text that are shown."""
MAX_DEPTH = 20
"""How deep lists and objects are shown."""
UNLIKE = (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError)
"""What comes of JSON that has other things than trimtab writes where it looks for its own."""


def clean(value: Any, depth: int = 0) -> Any:
    """A value out of JSON: control characters and lone surrogates as \\x1b, None for what is no finite number, not nested too deeply."""
    if isinstance(value, str):
        return word(value)
    if isinstance(value, dict | list) and depth == MAX_DEPTH:
        return "…"
    if isinstance(value, dict):
        return {word(k): clean(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list):
        return [clean(v, depth + 1) for v in value]
    return value if value is None or isinstance(value, bool) else number(value)


def word(text: str) -> str:
    """A name or a short text, on one line."""
    return printable(text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…")


def number(value: Any) -> float | None:
    """A number as it is, yes and no as 1 and 0."""
    return int(value) if isinstance(value, bool) else value if isinstance(value, int | float) and is_finite(value) else None


def shown_text(value: Any) -> str:
    """A text of many lines, as it is; other JSON as JSON."""
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"
    return text.encode(errors="backslashreplace").decode()  # half a pair of UTF-16 cannot be sent
