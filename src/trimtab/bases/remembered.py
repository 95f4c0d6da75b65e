"""What was found out about a template or a tokenizer is kept, up to a bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

KNOWN = 4096
"""Keys of a dict: roles, sequences of roles, short texts."""
K = TypeVar("K")
V = TypeVar("V")


def remembered(known: dict[K, V], key: K, find: Callable[[], V]) -> V:
    """What `find` finds, once for a key; `known` is emptied when it is full. Threads may ask at the same time."""
    try:
        return known[key]
    except KeyError:
        found = find()
    if len(known) >= KNOWN:
        known.clear()
    known[key] = found
    return found
