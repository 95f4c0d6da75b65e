"""Read records from JSONL, JSON, CSV and Parquet files, folders of text, and the hub.

Each reader takes (path, shown), where shown is the path as messages name it, and yields (origin, record) or a `Dropped` with the line that
could not be read. UTF-8 only, a byte order mark is tolerated. Where only a part of a file is not UTF-8, its bytes arrive as surrogates
(PEP 383), so that only the rows that hold them are dropped (`rows.bad_character`).
"""

from __future__ import annotations

import codecs
import csv
import importlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trimtab.data.documents import split_document
from trimtab.data.rows import Dropped
from trimtab.errors import DataError

Records = Iterator[tuple[str, Any] | Dropped]

_JSON_ERRORS = (ValueError, RecursionError)  # a JSONDecodeError, a number of 5,000 digits, a thousand open brackets


def read_jsonl(path: Path, shown: str) -> Records:
    """One object a line; blank lines are skipped, lines that cannot be read are dropped by number."""
    for number, raw in enumerate(_bytes(path, shown).split(b"\n"), 1):
        if not raw.strip():
            continue
        origin = f"{shown}:{number}"
        try:
            record = json.loads(raw.decode())
        except UnicodeDecodeError as error:
            yield Dropped(origin, f"not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}")
        except _JSON_ERRORS as error:
            yield Dropped(origin, f"not JSON: {error}")
        else:
            yield origin, record


def read_json(path: Path, shown: str) -> Records:
    """An array of objects; a file that holds one object a line instead is read as JSONL. Raises DataError where the array is broken."""
    text = _bytes(path, shown).decode("utf-8", "surrogateescape")
    position = _skip_blank(text, 0)
    if text[position : position + 1] == "{":
        try:
            json.loads(text)
        except _JSON_ERRORS:
            yield from read_jsonl(path, shown)
            return
    if text[position : position + 1] != "[":
        raise DataError(f"{shown} does not hold a JSON array of rows", fix="write [{...}, {...}], or one object a line in a .jsonl file.")
    decoder, line, counted = json.JSONDecoder(), 1, 0
    position = _skip_blank(text, position + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            record, position = decoder.raw_decode(text, position)
            position = _skip_blank(text, position)
            if text[position : position + 1] not in (",", "]"):
                raise ValueError("a comma or ] is missing after the row that starts here")
        except _JSON_ERRORS as error:
            raise DataError(f"{shown}:{line} is not JSON: {error}", fix="mend the file; what follows cannot be read.") from None
        yield f"{shown}:{line}", record
        if text[position] == ",":
            position = _skip_blank(text, position + 1)


def read_csv(path: Path, shown: str) -> Records:
    """Comma, semicolon or tab separated (what the header uses most), with a header line; quoted fields may hold line breaks."""
    text = _bytes(path, shown).decode("utf-8", "surrogateescape")
    header_line = text.lstrip("\r\n").partition("\n")[0]
    delimiter = max(",;\t", key=header_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        origin = f"{shown}:{reader.line_num + 1}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            if "unexpected end" in str(error):  # the rest of the file went into one field: too much to count as one bad row
                raise DataError(
                    f"{origin} opens a quote that is never closed", fix='close it, and write a quote within a field as "".'
                ) from None
            yield Dropped(origin, f"not CSV: {error}")
            continue
        if fields is None:
            return
        if not any(fields):
            continue
        if not header:
            header = [name.strip() for name in fields]
            if len(set(header)) < len(header):
                raise DataError(f"{shown} names a column twice: {', '.join(header)}", fix="give each column a name of its own.")
        elif len(fields) != len(header):
            yield Dropped(origin, f"not CSV: {len(fields)} fields where the header has {len(header)}")
        else:
            yield origin, dict(zip(header, fields, strict=True))


def read_parquet(path: Path, shown: str) -> Records:
    """Rows of a Parquet file, numbered from 1. Needs pyarrow; DataError without it, or on a file that is not Parquet."""
    parquet = _import("pyarrow.parquet", "pyarrow", f"{shown} is a Parquet file")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"{shown}:{number}", record
    except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
        raise DataError(f"{shown} cannot be read as Parquet: {error}", fix="write the file anew, or give JSONL.") from error


def read_text(path: Path, shown: str) -> Records:
    """A Markdown or text file, cut into rows of bounded size."""
    text = _bytes(path, shown).decode("utf-8", "surrogateescape").replace("\r\n", "\n")
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


def _bytes(path: Path, shown: str) -> bytes:
    """The file without a byte order mark. Raises DataError where it is missing, unreadable, empty or UTF-16."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {error.strerror or error}") from error
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{shown} is UTF-16", fix="save it as UTF-8.")
    raw = raw.removeprefix(codecs.BOM_UTF8)
    if not raw.strip():
        raise DataError(f"{shown} is empty", fix="name a file that has rows.")
    return raw


def _skip_blank(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _import(module: str, package: str, why: str) -> Any:
    """An optional dependency, imported when a source needs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"{why}, and the package {package} is not installed", fix=f"pip install {package}") from None
