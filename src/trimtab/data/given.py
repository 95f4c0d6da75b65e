"""Rows that a program gives: a list of dicts, a generator, a DataFrame, a `datasets.Dataset`.

They are read once and written as JSON lines into a file that has no name. So what is trained on stays as it was given, a generator may be
longer than memory, and rows are read back as those of a .jsonl file are: the same values are honoured, dropped and reported.
"""

from __future__ import annotations

import datetime
import decimal
import hashlib
import itertools
import json
import math
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any
from weakref import finalize

from trimtab.data.rows import Dropped, Records
from trimtab.data.turns import JSON_ERRORS, STRICT_JSON, TwiceError
from trimtab.errors import ConfigError, DataError

UNREADABLE = b"!"
"""Begins the line of a row that JSON cannot hold; the reason follows."""
CHUNK = 1 << 20
AT_ONCE = 1000
"""Rows of a DataFrame that are dicts at a time."""


class GivenRows:
    """Rows as they were when this was made. digest: "sha256:…" of all of them in order. nbytes: of them as JSON lines. Equal where the rows
    are."""

    def __init__(self, rows: Any, limit: int | None = None):
        """rows: a list of dicts, or what `is_table` says yes to. limit: no more than so many are taken. ConfigError where a table names a
        column twice."""
        sha, self.nbytes = hashlib.sha256(), 0
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  as long as this lives
        finalize(self, self._file.close)
        for row in itertools.islice(_each(rows), limit):
            line = _line(row)
            sha.update(line)
            with _kept():
                self._file.write(line)
            self.nbytes += len(line)
        with _kept():
            self._file.flush()
        self.digest = f"sha256:{sha.hexdigest()}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GivenRows) and self.digest == other.digest

    def __repr__(self) -> str:
        return "<rows given in Python>"

    def __hash__(self) -> int:
        return hash(self.digest)

    def records(self, name: str) -> Records:
        """(origin, record) of each row, or a `Dropped` where it cannot be read; origins are "name[17]", counted from 0."""
        for n, line in enumerate(self._lines()):
            origin = f"{name}[{n}]"
            if line.startswith(UNREADABLE):
                yield Dropped(origin, line[len(UNREADABLE) :].decode())
                continue
            try:
                yield origin, STRICT_JSON.decode(line.decode())
            except TwiceError as error:
                yield Dropped(origin, str(error))
            except JSON_ERRORS as error:  # a number of 5,000 digits
                yield Dropped(origin, f"not JSON: {error}")

    def _lines(self) -> Iterator[bytes]:
        """By their places in the file: several may read it at a time."""
        left = b""
        for start in range(0, self.nbytes, CHUNK):
            *lines, left = (left + os.pread(self._file.fileno(), CHUNK, start)).split(b"\n")
            yield from lines


@contextmanager
def _kept() -> Iterator[None]:
    """While rows are written; an OSError of the generator that gives them is its own."""
    try:
        yield
    except OSError as error:
        where = tempfile.gettempdir()
        raise DataError(
            f"the rows cannot be kept in {where}: {error.strerror}", fix="make room there, or name a folder in TMPDIR"
        ) from error


def is_table(value: Any) -> bool:
    """Whether a value is rows in a container of its own: any iterable but a text, a path, a mapping, a list and a tuple."""
    if isinstance(value, str | bytes | PurePath | Mapping | list | tuple):
        return False
    return isinstance(value, Iterable) or hasattr(value, "to_batches") or hasattr(value, "iter_rows")


def _each(rows: Any) -> Iterator[Any]:
    """The rows one by one, in plain Python as far as their container has it."""
    if hasattr(rows, "to_frame") and not hasattr(rows, "columns"):  # a Series of pandas or polars
        name = getattr(rows, "name", None)
        column = name if isinstance(name, str) and name else "text"
        raise ConfigError(f"the rows are one column ({type(rows).__name__}), not a table", fix=f"give the table df[[{column!r}]]")
    if hasattr(rows, "iloc") and hasattr(rows, "to_dict"):
        yield from _of_frame(rows)
    elif hasattr(rows, "to_batches") and hasattr(rows, "column_names"):  # pyarrow
        _refuse_twice(rows.column_names)
        for batch in rows.to_batches(AT_ONCE):
            yield from batch.to_pylist()
    elif hasattr(rows, "iter_rows"):  # polars
        yield from rows.iter_rows(named=True)
    elif hasattr(rows, "with_format") and hasattr(rows, "features"):
        yield from _of_dataset(rows)
    else:
        yield from rows


def _of_frame(frame: Any) -> Iterator[dict[Any, Any]]:
    _refuse_twice(frame.columns)
    for start in range(0, len(frame), AT_ONCE):
        yield from frame.iloc[start : start + AT_ONCE].to_dict("records")


def _of_dataset(data: Any) -> Iterator[dict[str, Any]]:
    """Labels by name, as of data sets of the hub."""
    names = {c: f for c, f in (data.features or {}).items() if hasattr(f, "int2str")}
    for row in data.with_format(None):
        yield row | {c: f.int2str(row[c]) for c, f in names.items() if isinstance(row[c], int) and row[c] >= 0}


def _refuse_twice(columns: Iterable[Any]) -> None:
    names = list(columns)
    if twice := sorted({str(c) for c in names if names.count(c) > 1}):
        raise ConfigError(f"the table names a column twice: {', '.join(twice)}", fix="give each a name of its own")


def _line(row: Any) -> bytes:
    """A row as a line of JSON, or why it is none."""
    try:
        text = json.dumps(row, allow_nan=False, default=_plain)
    except (ValueError, TypeError) as first:  # a number that is none, a key that is no text
        if "Circular" in str(first):
            return _refused(first)
        try:
            text = json.dumps(_cleaned(row), allow_nan=False, default=_plain)
        except (ValueError, TypeError, RecursionError) as error:
            return _refused(error)
    except RecursionError as error:
        return _refused(error)
    return text.encode() + b"\n"


def _refused(error: Exception) -> bytes:
    return UNREADABLE + f"not JSON: {error}".replace("\n", " ").encode("utf-8", "backslashreplace") + b"\n"


def _plain(value: Any) -> Any:
    """What JSON has in the place of a value that it has no form for. What has none at all becomes an object that names its type: a column
    that no row uses does no harm, and one that a row is made of is seen to be no text."""
    if type(value).__name__ in ("NAType", "NaTType"):  # pandas' missing values
        return None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | uuid.UUID | PurePath | datetime.timedelta):
        return str(value)
    if (kind := getattr(getattr(value, "dtype", None), "kind", "")) and kind in "mM":  # `tolist` makes numbers of those in nanoseconds
        if getattr(value, "shape", ()):
            return _cleaned(list(value))
        return _date(value) if kind == "M" else _duration(value)
    if callable(tolist := getattr(value, "tolist", None)):  # numpy's numbers and arrays, torch's tensors
        return _cleaned(tolist())
    if isinstance(value, Mapping):
        return _cleaned(dict(value))
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return _cleaned(list(value))
    return {"a value of type": f"{type(value).__module__}.{type(value).__qualname__}"}


def _date(value: Any) -> str | None:
    """The ISO text of numpy's date, as Python writes it where Python can hold it."""
    if value != value:  # not a time
        return None
    for held in (value, value.astype("datetime64[us]")):
        if held == value and isinstance(found := held.tolist(), datetime.date):
            return found.isoformat()
    return str(value)


def _duration(value: Any) -> str | None:
    """The text of numpy's duration, as Python writes it where Python can hold it: not the length of a month, nor a nanosecond."""
    if value != value:  # not a time
        return None
    if value.dtype.str.endswith(("Y]", "M]")) or (held := value.astype("timedelta64[us]")) != value:
        return str(value)
    return str(held.tolist())


def _cleaned(value: Any) -> Any:
    """Without numbers that JSON lacks (NaN is how tables write a missing value), and with keys that are texts."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _cleaned(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(v) for v in value]
    if type(value).__name__ == "NaTType":  # a date, to `json`'s eyes none
        return None
    return value
