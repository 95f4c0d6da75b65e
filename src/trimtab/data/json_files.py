"""Rows of JSONL and JSON files, each with the line that it is in. An object that has a key twice is dropped, since readers differ on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimtab.data.forms import form_of
from trimtab.data.opened import lines_of, whole
from trimtab.data.rows import Dropped, Records
from trimtab.data.turns import JSON_ERRORS, STRICT_JSON, TwiceError, unique
from trimtab.errors import DataError

_JSON_FIX = "write [{...}, {...}], or one object a line in a .jsonl file."


def read_jsonl(path: Path, shown: str) -> Records:
    """One object a line; blank lines are skipped, lines that cannot be read are dropped by number. DataError if a line has no end."""
    for number, raw in lines_of(path, shown):
        origin = f"{shown}:{number}"
        try:
            record = STRICT_JSON.decode(raw.decode())
        except UnicodeDecodeError as error:
            yield Dropped(origin, f"not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}")
        except TwiceError as error:
            yield Dropped(origin, str(error))
        except JSON_ERRORS as error:
            yield Dropped(origin, f"not JSON: {error}")
        else:
            yield origin, record


def read_json(path: Path, shown: str) -> Records:
    """Arrays of objects, or an object that holds one; one object is one row; a file that holds one object a line is read as JSONL. Raises
    DataError if an array is broken."""
    text = whole(path, shown).decode("utf-8", "surrogateescape")
    position = _skip_blank(text, 0)
    if text[position : position + 1] == "[":
        yield from _arrays(text, position, shown)
        return
    if text[position : position + 1] == "{":
        twice: list[str] = []
        try:
            content = json.loads(text, object_pairs_hook=lambda pairs: _object(pairs, twice))
        except JSON_ERRORS:
            yield from read_jsonl(path, shown)
            return
        yield from _without_twice(content, twice, shown) if twice else _inside(content, shown)
        return
    raise DataError(f"{shown} does not hold a JSON array of rows", fix=_JSON_FIX)


def _inside(content: dict[str, Any], shown: str) -> Iterator[tuple[str, Any]]:
    """The rows of an object: of the only list of objects in it, or itself."""
    lists = dict(_lists(content))
    is_row = form_of(content, {}) is not None or any(_is_talk(value) for value in content.values())
    if is_row or not lists:
        yield f"{shown}:1", content
        return
    tables = [key for key, value in lists.items() if value and all(isinstance(row, dict) for row in value)]
    if len(tables) != 1:
        which = f": it is an object with {len(tables)} lists of them: {', '.join(tables)}" if tables else ""
        raise DataError(f"{shown} does not hold a JSON array of rows{which}", fix=_JSON_FIX)
    for i, row in enumerate(lists[tables[0]]):
        yield f"{shown}:{tables[0]}[{i}]", row


class _Twice(dict[str, Any]):
    """What stands for an object that has a key twice."""

    def __init__(self, reason: str):
        super().__init__()
        self.reason = reason


def _object(pairs: list[tuple[str, Any]], twice: list[str]) -> dict[str, Any]:
    try:
        return unique(pairs)
    except TwiceError as error:
        twice.append(str(error))
        return _Twice(twice[-1])


def _without_twice(content: dict[str, Any], twice: list[str], shown: str) -> Records:
    """The rows of an object, but for those that hold a key twice; none where another part of it does. twice: what holds one."""
    rows = [(f"{shown}:1", content)] if isinstance(content, _Twice) else list(_inside(content, shown))
    lost = [list(_twice_in(row)) for _, row in rows]
    if sum(map(len, lost)) < len(twice):
        yield Dropped(f"{shown}:1", twice[0])
        return
    for (origin, row), reasons in zip(rows, lost, strict=True):
        yield Dropped(origin, reasons[0]) if reasons else (origin, row)


def _twice_in(value: Any) -> Iterator[str]:
    if isinstance(value, _Twice):
        yield value.reason
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _twice_in(item)


def _lists(content: dict[str, Any], above: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Every list of an object and of the objects in it, with its path."""
    for key, value in content.items():
        if isinstance(value, list):
            yield f"{above}{key}", value
        elif isinstance(value, dict):
            yield from _lists(value, f"{above}{key}.")


def _is_talk(value: Any) -> bool:
    """Whether a value is a conversation rather than a list of rows."""
    return isinstance(value, list) and value != [] and isinstance(value[0], dict) and not {"role", "from"}.isdisjoint(value[0])


def _arrays(text: str, position: int, shown: str) -> Records:
    """The rows of an array, and of the arrays and objects behind it: files that were put together. DataError if all else follows."""
    line, counted, inside = 1, 0, False
    while inside or position < len(text):
        line, counted = line + text.count("\n", counted, position), position
        origin, here = f"{shown}:{line}", text[position : position + 1]
        if here == ("]" if inside else "["):
            inside, position = not inside, _skip_blank(text, position + 1)
            continue
        if not inside and here != "{":
            raise DataError(f"{origin} is behind the array of rows, and is neither an array nor an object", fix=_JSON_FIX)
        try:
            found, position = _decoded(text, position, origin)
            if inside and text[position : position + 1] not in (",", "]"):
                raise ValueError("a comma or ] is missing after the row that starts here")
        except JSON_ERRORS as error:
            raise DataError(f"{origin} is not JSON: {error}", fix="mend the file; what follows cannot be read.") from None
        yield found
        if inside and text[position] == ",":
            position = _skip_blank(text, position + 1)


def _decoded(text: str, position: int, origin: str) -> tuple[tuple[str, Any] | Dropped, int]:
    """(the row that starts here, where what follows starts)."""
    found: tuple[str, Any] | Dropped
    try:
        record, end = STRICT_JSON.raw_decode(text, position)
        found = (origin, record)
    except TwiceError as error:
        found, end = Dropped(origin, str(error)), json.JSONDecoder().raw_decode(text, position)[1]
    return found, _skip_blank(text, end)


def _skip_blank(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n\ufeff":  # files that were put together have marks of byte order within
        position += 1
    return position
