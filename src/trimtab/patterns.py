"""Regular expressions that people and files give, matched in bounded time: against modules' names, and against answers that are rewarded.

Python's `re` tries one way after another: `(.+)+!` takes a time that doubles with each character of the text. Here all ways are followed at
once, as sets of the positions that a part of the pattern can end at. A set is a number (bit i stands for position i), and a step moves all
of a set's positions together, so a repeated character costs one addition. Whether a text matches is the same as for `re.fullmatch` and
`re.search`. What needs the order of the ways is not read: back references, conditions on groups, atomic groups and possessive repeats.
"""

from __future__ import annotations

import math
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
MAX_KEPT = 4096
"""Sets of positions that are remembered while one text is matched."""
QUICK, MAX_QUICK = 1_000_000, 3
"""A pattern with at most MAX_QUICK repeats, for which `re` needs at most QUICK steps, is left to `re`. For a module's name that takes a
thirtieth of the time, and a table of an adapter may have an entry for each module."""

IN_ORDER = {
    op.GROUPREF: "a back reference",
    op.GROUPREF_EXISTS: "a condition on a group",
    op.ATOMIC_GROUP: "an atomic group",
    op.POSSESSIVE_REPEAT: "a possessive repeat",
}
REPEATS = {op.MAX_REPEAT, op.MIN_REPEAT}
CHARACTERS = {op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN, op.CATEGORY}
CATEGORIES: dict[Any, tuple[Callable[[str], bool], bool]] = {
    op.CATEGORY_DIGIT: (str.isdecimal, True),
    op.CATEGORY_NOT_DIGIT: (str.isdecimal, False),
    op.CATEGORY_SPACE: (str.isspace, True),
    op.CATEGORY_NOT_SPACE: (str.isspace, False),
    op.CATEGORY_WORD: (lambda c: c.isalnum() or c == "_", True),
    op.CATEGORY_NOT_WORD: (lambda c: c.isalnum() or c == "_", False),
}
KINDS = re.ASCII | re.LOCALE | re.UNICODE
"""Flags of which one takes the place of another."""
SEPARATORS = "\x1c\x1d\x1e\x1f"
"""Characters of ASCII that are space to Unicode, and none to `re` with ASCII."""


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


def whole(pattern: str, text: str) -> bool:
    """`re.fullmatch`, for a pattern in which `regex_problem` finds nothing."""
    compiled, steps, repeats = _steps(pattern)
    if steps * (len(text) + 1) ** repeats <= QUICK:
        return compiled.fullmatch(text) is not None
    tree = _parsed(pattern, 0)
    return bool(_Text(text).ends(tree, 1, tree.state.flags) >> len(text) & 1)


def occurs(pattern: str, text: str, flags: int = 0) -> bool:
    """`re.search`, likewise."""
    tree = _parsed(pattern, flags)
    return bool(_Text(text).ends(tree, (2 << len(text)) - 1, tree.state.flags))


@lru_cache(maxsize=8192)  # a table may have an entry for each module of a large base
def _parsed(pattern: str, flags: int) -> Any:
    return parser.parse(pattern, flags)


@lru_cache(maxsize=8192)
def _steps(pattern: str) -> tuple[re.Pattern[str], float, int]:
    """(the pattern, s, n): `re` takes at most s · (the text's length + 1) ** n steps. s is inf where more than a character is repeated."""
    tree = _parsed(pattern, 0)
    steps, repeats, todo = 1.0 + len(_parts(tree, 1)), 0, list(tree)
    while todo:
        what, argument = todo.pop()
        if what is op.BRANCH:
            steps *= len(argument[1])
        elif what in REPEATS and argument[1] <= 1:
            steps *= 2
        elif what in REPEATS:
            repeats += 1
            if repeats > MAX_QUICK or len(argument[2]) != 1 or argument[2][0][0] not in CHARACTERS:
                return re.compile(pattern), math.inf, 0
        todo += [part for inner in _inside(what, argument) for part in inner]
    return re.compile(pattern), steps, repeats


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


class _Text:
    """One text, and where parts of a pattern can end in it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._letters: dict[str, int] = {}  # each character, and its positions
        for at, c in enumerate(text):
            self._letters[c] = self._letters.get(c, 0) | 1 << at
        self._known: dict[tuple[int, int, int], int] = {}
        self._ahead: dict[tuple[int, int, int], bool] = {}
        self._characters: dict[tuple[Any, Any, int], int] = {}
        self._places: dict[tuple[Any, int], int] = {}

    def ends(self, tree: Any, starts: int, flags: int) -> int:
        """Where a sequence can end that begins at one of these positions."""
        if len(tree) == 1 and tree[0][0] not in REPEATS:
            what, argument = tree[0]
            return self._through(what, argument, starts, flags)
        key = id(tree), starts, flags
        if (known := self._known.get(key)) is not None:
            return known
        found = starts
        for what, argument in tree:
            if not found:
                break
            found = self._through(what, argument, found, flags)
        if len(self._known) >= MAX_KEPT:
            self._known.clear()
        self._known[key] = found
        return found

    def _through(self, what: Any, argument: Any, starts: int, flags: int) -> int:
        """Where one part of a sequence can end."""
        if what is op.BRANCH:
            found = 0
            for one in argument[1]:
                found |= self.ends(one, starts, flags)
            return found
        if what is op.SUBPATTERN:
            _, more, less, inner = argument
            kept = flags & ~KINDS if more & KINDS else flags  # "(?u:…)" within "(?a)…" takes the other letters again
            return self.ends(inner, starts, (kept | more) & ~less)
        if what in REPEATS:
            least, most, inner = argument
            return self._repeat(least, most, inner, starts, flags)
        if what in (op.ASSERT, op.ASSERT_NOT):
            direction, inner = argument
            there = self._followed(inner, starts, flags) if direction > 0 else self._preceded(inner, starts, flags)
            return there if what is op.ASSERT else starts & ~there
        if what is op.AT:
            return starts & self._standing(argument, flags)
        if what is op.FAILURE:
            return 0
        return (starts & self._being(what, argument, flags)) << 1

    def _repeat(self, least: int, most: int, inner: Any, starts: int, flags: int) -> int:
        now = starts
        for _ in range(least):
            now, before = self.ends(inner, now, flags), now
            if now == before:  # as it would be after all further ones
                break
        if len(inner) == 1 and inner[0][0] in CHARACTERS and most - least >= len(self.text):
            what, argument = inner[0]
            run = self._being(what, argument, flags)
            return now | ((now & run) + run ^ run)  # the carry of each start runs through the characters behind it, to their end
        found, new, rounds = now, now, most - least
        while new and rounds > 0:
            new = self.ends(inner, new, flags) & ~found
            found, rounds = found | new, rounds - 1
        return found

    def _followed(self, inner: Any, starts: int, flags: int) -> int:
        """Those of the positions at which a sequence can begin."""
        found, left = 0, starts
        while left:
            at = left.bit_length() - 1
            left ^= 1 << at
            key = id(inner), at, flags
            if key not in self._ahead:
                self._ahead[key] = bool(self.ends(inner, 1 << at, flags))
            found |= self._ahead[key] << at
        return found

    def _preceded(self, inner: Any, starts: int, flags: int) -> int:
        """Those of the positions at which a sequence can end. All that it matches has one width."""
        return self.ends(inner, starts >> inner.getwidth()[0], flags) & starts

    def _standing(self, place: Any, flags: int) -> int:
        """The positions that an anchor stands for."""
        key = place, flags
        if key not in self._places:
            self._places[key] = sum(1 << at for at in range(len(self.text) + 1) if self._stands(place, at, flags))
        return self._places[key]

    def _stands(self, place: Any, at: int, flags: int) -> bool:
        text = self.text
        if place in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
            return at == 0 or (place is op.AT_BEGINNING and bool(flags & re.MULTILINE) and text[at - 1] == "\n")
        if place is op.AT_END_STRING:
            return at == len(text)
        if place is op.AT_END:
            return at == len(text) or (text[at] == "\n" and (at == len(text) - 1 or bool(flags & re.MULTILINE)))
        sides = [self._is(op.CATEGORY, op.CATEGORY_WORD, c, flags) for c in (text[at - 1 : at], text[at : at + 1]) if c]
        return (sum(sides) == 1) is (place is op.AT_BOUNDARY) and (bool(text) or place is op.AT_BOUNDARY)

    def _being(self, what: Any, argument: Any, flags: int) -> int:
        """The positions of characters that are the one, or of the set."""
        if what is op.LITERAL and not flags & re.IGNORECASE:
            return self._letters.get(chr(argument), 0)
        key = what, argument if isinstance(argument, int) else id(argument), flags
        if key not in self._characters:
            found = 0
            for c, places in self._letters.items():
                if self._is(what, argument, c, flags):
                    found |= places
            self._characters[key] = found
        return self._characters[key]

    def _is(self, what: Any, argument: Any, c: str, flags: int) -> bool:
        """Whether a character is the one, or of the set."""
        if what is op.ANY:
            return c != "\n" or bool(flags & re.DOTALL)
        if what is op.CATEGORY:
            kind, wanted = CATEGORIES[argument]
            narrow = bool(flags & re.ASCII)
            return (kind(c) and not (narrow and (not c.isascii() or c in SEPARATORS))) is wanted
        if what is op.NOT_LITERAL:
            return not self._is(op.LITERAL, argument, c, flags)
        if what is op.IN:
            negated = bool(argument) and argument[0][0] is op.NEGATE
            return any(self._is(w, a, c, flags) for w, a in argument[negated:]) is not negated
        low, high = argument if what is op.RANGE else (argument, argument)
        if flags & re.IGNORECASE:
            return _in_either_case(low, high, flags & re.ASCII).fullmatch(c) is not None
        return bool(low <= ord(c) <= high)


@lru_cache(maxsize=512)
def _in_either_case(low: int, high: int, ascii_only: int) -> re.Pattern[str]:
    """Characters of a range, as `re` has it: to it "K" is a "k" too, the Kelvin sign is one of them, and with ASCII it is not."""
    return re.compile(f"[{re.escape(chr(low))}-{re.escape(chr(high))}]", re.IGNORECASE | ascii_only)
