"""Read records from JSONL, JSON, CSV and Parquet files, folders of text, and the hub.

Each reader takes (path, shown), where shown is the path as messages name it, and yields (origin, record) or a `Dropped` with the line that
could not be read. UTF-8 only (CSV also UTF-16); byte order marks are left out. Where only a part of a file is not UTF-8, its bytes arrive
as surrogates (PEP 383), so that only the rows that hold them are dropped (`turns.bad_character`). Only regular files are read, and their
lines and sizes are bounded.
"""

from __future__ import annotations

import codecs
import importlib
import itertools
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from trimtab.data.delimited import read_delimited
from trimtab.data.documents import split_document
from trimtab.data.forms import form_of
from trimtab.data.rows import Dropped
from trimtab.data.turns import JSON_ERRORS, STRICT_JSON, TwiceError, unique
from trimtab.errors import DataError

Records = Iterator[tuple[str, Any] | Dropped]

MAX_LINE, MAX_WHOLE = 64 << 20, 2 << 30
"""Bytes of a line of JSONL, and of a file of another format, which is read at once: more is not what was meant."""
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_JSON_FIX = "write [{...}, {...}], or one object a line in a .jsonl file."
_EMPTY_FIX = "name a file that has rows."


def read_jsonl(path: Path, shown: str) -> Records:
    """One object a line; blank lines are skipped, lines that cannot be read are dropped by number. DataError if a line has no end."""
    for number, raw in _lines(path, shown):
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
    text = _whole(path, shown).decode("utf-8", "surrogateescape")
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


def read_csv(path: Path, shown: str) -> Records:
    """Comma, semicolon or tab separated, with a header line; quoted fields may hold line breaks. UTF-8, or UTF-16 with its mark."""
    raw = _whole(path, shown, utf16=True)
    if not raw.startswith(UTF16):
        return read_delimited(raw.decode("utf-8", "surrogateescape"), shown)
    try:
        return read_delimited(raw.decode("utf-16", "surrogatepass"), shown)
    except UnicodeDecodeError as error:
        raise DataError(f"{shown} is cut off: {error.reason} (UTF-16)", fix="save it as UTF-8.") from None


def read_parquet(path: Path, shown: str) -> Records:
    """Rows of a Parquet file, numbered from 1. Needs pyarrow; DataError without it, or on a file that is not Parquet."""
    parquet = _import("pyarrow.parquet", "pyarrow", f"{shown} is a Parquet file")
    number = 0
    try:
        with _open(path, shown) as opened, parquet.ParquetFile(opened) as file:
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"{shown}:{number}", record
    except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
        raise DataError(f"{shown} cannot be read as Parquet: {error}", fix="write the file anew, or give JSONL.") from error


def read_text(path: Path, shown: str) -> Records:
    """A Markdown or text file, cut into rows of bounded size."""
    text = _whole(path, shown).decode("utf-8", "surrogateescape").replace("\r\n", "\n").replace("\n\ufeff", "\n")
    for line, piece in split_document(text, markdown=path.suffix.lower() != ".txt"):
        yield f"{shown}:{line}", {"text": piece}


def read_hub(name: str, split: str | None) -> Records:
    """Rows of a hub dataset "org/name" or "org/name:config" through `datasets`; labels arrive by name. split: "train" where it is None."""
    datasets = _import("datasets", "datasets", f"hf:{name} is a dataset of the hub")
    path, _, config = name.partition(":")
    try:
        data = datasets.load_dataset(path, config or None, split=split or "train")
        labels = {c: f for c, f in data.features.items() if isinstance(f, datasets.ClassLabel)}
    except Exception as error:  # offline, unknown name or split, needs a login: as many classes as there are reasons, the text says which
        raise DataError(
            f"the dataset hf:{name} cannot be loaded: {type(error).__name__}: {error}",
            fix="check the name, the split and the network, or download its files and name one of them.",
        ) from error
    for number, record in enumerate(data, 1):
        named = {c: f.int2str(record[c]) for c, f in labels.items() if isinstance(record[c], int) and record[c] >= 0}
        yield f"hf:{name}:{number}", {**record, **named}


READERS: dict[str, Callable[[Path, str], Records]] = {
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "parquet": read_parquet,
    "text": read_text,
}
SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".md": "text",
    ".markdown": "text",
    ".txt": "text",
}


def holds_something(path: Path) -> bool:
    """Whether a file has more than blanks."""
    with path.open("rb") as file:
        return any(chunk.strip() for chunk in iter(lambda: file.read(1 << 16), b""))


def _open(path: Path, shown: str) -> BinaryIO:
    """A regular file, to read. DataError for all else: a pipe or a device may have no end."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{shown} is not a regular file", fix="name a file; write what a pipe gives into one.")
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {error.strerror or error}") from error


def _lines(path: Path, shown: str) -> Iterator[tuple[int, bytes]]:
    """(number, line) of lines that are not blank, each without a byte order mark: files that were put together have some in the middle."""
    found = False
    with _open(path, shown) as file:
        for number in itertools.count(1):
            raw = file.readline(MAX_LINE + 1)
            if not raw:
                break
            if number == 1:
                _refuse_utf16(raw, shown)
            if len(raw) > MAX_LINE:
                raise DataError(
                    f"{shown}:{number} has more than {MAX_LINE >> 20} MiB", fix="write one row a line, each ended by a line break."
                )
            raw = raw.removeprefix(codecs.BOM_UTF8)
            if raw.strip():
                found = True
                yield number, raw
    if not found:
        raise DataError(f"{shown} is empty", fix=_EMPTY_FIX)


def _whole(path: Path, shown: str, *, utf16: bool = False) -> bytes:
    """The file without a byte order mark. Raises DataError if it is missing, unreadable, empty, too large to read at once, or UTF-16
    where that is not expected (which keeps its mark)."""
    with _open(path, shown) as file:
        raw = file.read(MAX_WHOLE + 1) if os.fstat(file.fileno()).st_size <= MAX_WHOLE else None
    if raw is None or len(raw) > MAX_WHOLE:
        raise DataError(f"{shown} has more than {MAX_WHOLE >> 30} GiB, and is read at once", fix="write JSONL, which is read line by line.")
    if not utf16:
        _refuse_utf16(raw, shown)
    raw = raw.removeprefix(codecs.BOM_UTF8)
    if not raw.strip():
        raise DataError(f"{shown} is empty", fix=_EMPTY_FIX)
    return raw


def _refuse_utf16(raw: bytes, shown: str) -> None:
    if raw.startswith(UTF16):
        raise DataError(f"{shown} is UTF-16", fix="save it as UTF-8.")


def _skip_blank(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n\ufeff":  # files that were put together have marks of byte order within
        position += 1
    return position


def _import(module: str, package: str, why: str) -> Any:
    """An optional dependency, imported when a source needs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"{why}, and the package {package} is not installed", fix=f"pip install {package}") from None
