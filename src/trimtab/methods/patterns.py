"""Regular expressions that people and files give, matched against modules' names in bounded time.

Python's `re` tries one way after another: `(.+)+!` takes a time that doubles with each character of the name. Here all ways are followed at
once, as sets of the positions that a part of the pattern can end at, so the time is at most a polynomial of the name's length. Whether a
whole name matches is the same as for `re.fullmatch`. What needs the order of the ways is refused: back references, conditions on groups,
atomic groups and possessive repeats.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

MAX_DEPTH = 20
"""How deep groups and repeats may be nested."""
MAX_PARTS = 10_000
"""Of how many parts (characters, groups, repeats) a pattern may consist."""

IN_ORDER = {
    op.GROUPREF: "a back reference",
    op.GROUPREF_EXISTS: "a condition on a group",
    op.ATOMIC_GROUP: "an atomic group",
    op.POSSESSIVE_REPEAT: "a possessive repeat",
}
CATEGORIES: dict[Any, tuple[Callable[[str], bool], bool]] = {
    op.CATEGORY_DIGIT: (str.isdecimal, True),
    op.CATEGORY_NOT_DIGIT: (str.isdecimal, False),
    op.CATEGORY_SPACE: (str.isspace, True),
    op.CATEGORY_NOT_SPACE: (str.isspace, False),
    op.CATEGORY_WORD: (lambda c: c.isalnum() or c == "_", True),
    op.CATEGORY_NOT_WORD: (lambda c: c.isalnum() or c == "_", False),
}


def regex_problem(pattern: str) -> str | None:
    """What is wrong with a regular expression, or None."""
    try:
        re.compile(pattern)
        tree = parser.parse(pattern)
        parts = _parts(tree, 1)
    except (re.error, OverflowError) as e:
        return f"is not a regular expression: {e}"
    except RecursionError:
        return f"is not a regular expression: more than {MAX_DEPTH} groups and repeats in one another"
    if kind := next((IN_ORDER[p] for p, _ in parts if p in IN_ORDER), None):
        return f"has {kind}, which is not read: name the modules in a list"
    if max((depth for _, depth in parts), default=0) > MAX_DEPTH:
        return f"has more than {MAX_DEPTH} groups and repeats in one another"
    if len(parts) > MAX_PARTS:
        return f"has {len(parts):,} parts, of which at most {MAX_PARTS:,} are read: name the modules in a list"
    return None


def whole(pattern: str, name: str) -> bool:
    """`re.fullmatch`, for a pattern in which `regex_problem` finds nothing."""
    tree = _parsed(pattern)
    return bool(_Names(name, tree.state.flags).ends(tree, 0) >> len(name) & 1)


@lru_cache(maxsize=8192)  # a table may have an entry for each module of a large base
def _parsed(pattern: str) -> Any:
    return parser.parse(pattern)


def _parts(node: Any, depth: int) -> list[tuple[Any, int]]:
    """Each operation of a parsed pattern, with its depth."""
    found = []
    for what, argument in node:
        found.append((what, depth))
        for inner in _inside(what, argument):
            found += _parts(inner, depth + 1)
    return found


def _inside(what: Any, argument: Any) -> Iterable[Any]:
    if what is op.BRANCH:
        return argument[1]
    if what in (op.MAX_REPEAT, op.MIN_REPEAT, op.SUBPATTERN):
        return [argument[-1]]
    if what in (op.ASSERT, op.ASSERT_NOT):
        return [argument[1]]
    return []


class _Names:
    """One name, and where parts of a pattern can end in it. Sets of positions are numbers: bit i stands for position i."""

    def __init__(self, name: str, flags: int) -> None:
        self.name, self.flags = name, flags
        self.known: dict[tuple[int, int, int], int] = {}

    def ends(self, tree: Any, at: int, flags: int | None = None) -> int:
        """Where a sequence can end that begins at a position."""
        flags = self.flags if flags is None else flags
        key = id(tree), at, flags
        if key not in self.known:
            found = 1 << at
            for what, argument in tree:
                found = self._through(found, lambda i, w=what, a=argument: self._one(w, a, i, flags))  # type: ignore[misc]
            self.known[key] = found
        return self.known[key]

    def _through(self, starts: int, step: Callable[[int], int]) -> int:
        found = 0
        while starts:
            at = starts.bit_length() - 1
            starts ^= 1 << at
            found |= step(at)
        return found

    def _one(self, what: Any, argument: Any, at: int, flags: int) -> int:
        if what is op.BRANCH:
            found = 0
            for one in argument[1]:
                found |= self.ends(one, at, flags)
            return found
        if what is op.SUBPATTERN:
            _, more, less, inner = argument
            return self.ends(inner, at, (flags | more) & ~less)
        if what in (op.MAX_REPEAT, op.MIN_REPEAT):
            least, most, inner = argument
            return self._repeat(least, most, inner, at, flags)
        if what in (op.ASSERT, op.ASSERT_NOT):
            direction, inner = argument
            start = at if direction > 0 else at - inner.getwidth()[0]
            there = start >= 0 and (self.ends(inner, start, flags) if direction > 0 else self.ends(inner, start, flags) >> at & 1)
            return 1 << at if bool(there) is (what is op.ASSERT) else 0
        if what is op.AT:
            return 1 << at if self._stands(argument, at, flags) else 0
        if what is op.FAILURE:
            return 0
        return 1 << (at + 1) if at < len(self.name) and self._is(what, argument, self.name[at], flags) else 0

    def _repeat(self, least: int, most: int, inner: Any, at: int, flags: int) -> int:
        now = 1 << at
        for _ in range(least):
            now, before = self._through(now, lambda i: self.ends(inner, i, flags)), now
            if now == before:  # as it would be after all further ones
                break
        found, new, rounds = now, now, most - least
        while new and rounds > 0:
            new = self._through(new, lambda i: self.ends(inner, i, flags)) & ~found
            found, rounds = found | new, rounds - 1
        return found

    def _stands(self, place: Any, at: int, flags: int) -> bool:
        name = self.name
        if place in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
            return at == 0 or (place is op.AT_BEGINNING and bool(flags & re.MULTILINE) and name[at - 1] == "\n")
        if place is op.AT_END_STRING:
            return at == len(name)
        if place is op.AT_END:
            return at == len(name) or name[at:] == "\n" or (bool(flags & re.MULTILINE) and name[at] == "\n")
        sides = [self._is(op.CATEGORY, op.CATEGORY_WORD, c, flags) for c in (name[at - 1 : at], name[at : at + 1]) if c]
        return (sum(sides) == 1) is (place is op.AT_BOUNDARY) and (bool(name) or place is op.AT_BOUNDARY)

    def _is(self, what: Any, argument: Any, c: str, flags: int) -> bool:
        """Whether a character is the one, or of the set."""
        if what is op.ANY:
            return c != "\n" or bool(flags & re.DOTALL)
        if what is op.CATEGORY:
            kind, wanted = CATEGORIES[argument]
            return (kind(c) and (c.isascii() or not flags & re.ASCII)) is wanted
        if what is op.NOT_LITERAL:
            return not self._is(op.LITERAL, argument, c, flags)
        if what is op.IN:
            negated = bool(argument) and argument[0][0] is op.NEGATE
            return any(self._is(w, a, c, flags) for w, a in argument[negated:]) is not negated
        low, high = argument if what is op.RANGE else (argument, argument)
        forms = {c, *(f for f in (c.lower(), c.upper()) if len(f) == 1)} if flags & re.IGNORECASE else {c}
        return any(low <= ord(f) <= high for f in forms)
