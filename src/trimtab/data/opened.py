"""Files of rows as bytes: regular ones only, bounded in their lines and sizes, without byte order marks."""

from __future__ import annotations

import codecs
import itertools
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from trimtab.errors import DataError

MAX_LINE, MAX_WHOLE = 64 << 20, 2 << 30
"""Bytes of a line of JSONL, and of a file of another format, which is read at once: more is not what was meant."""
PARQUET_ENDS = (b"PAR1", b"PARE")
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def open_file(path: Path, shown: str) -> BinaryIO:
    """A regular file, to read. DataError for all else: a pipe or a device may have no end."""
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # O_NONBLOCK: a pipe would wait for a writer
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise DataError(f"{shown} is not a regular file", fix="name a file; write what a pipe gives into one.")
    return os.fdopen(opened, "rb")


def lines_of(path: Path, shown: str) -> Iterator[tuple[int, bytes]]:
    """(number, line) of lines that are not blank, each without a byte order mark: files that were put together have some in the middle."""
    found = False
    with open_file(path, shown) as file:
        for number in itertools.count(1) if _size(file) else ():
            raw = file.readline(MAX_LINE + 1)
            if not raw:
                break
            if number == 1:
                _refuse_utf16(raw, shown)
            if len(raw) > MAX_LINE:
                raise _endless(f"{shown}:{number}")
            raw = raw.removeprefix(codecs.BOM_UTF8)
            if raw.strip():
                found = True
                yield number, raw
    if not found:
        raise DataError(f"{shown} is empty", fix="name a file that has rows.")


def whole(path: Path, shown: str, *, utf16: bool = False) -> bytes:
    """The file without a byte order mark. Raises DataError if it is missing, unreadable, empty, too large to read at once, or UTF-16
    where that is not expected (which keeps its mark)."""
    with open_file(path, shown) as file:
        size = _size(file)
        raw = file.read(MAX_WHOLE + 1) if 0 < size <= MAX_WHOLE else b""
    if max(size, len(raw)) > MAX_WHOLE:
        raise _too_large(shown)
    if not utf16:
        _refuse_utf16(raw, shown)
    raw = raw.removeprefix(codecs.BOM_UTF8)
    if not raw.strip():
        raise DataError(f"{shown} is empty", fix="name a file that has rows.")
    return raw


def digest(sha: Any, path: Path, shown: str, format: str | None) -> None:
    """Put all bytes of a file into `sha`. DataError as soon as it is certain that a reader of this format will refuse them: a file may
    claim more bytes than can be read in a day. format: None if no reader is known."""
    with open_file(path, shown) as file:
        size = _size(file)
        if format is None or (format not in ("jsonl", "parquet") and size > MAX_WHOLE):
            raise _too_large(shown)
        if format == "parquet" and size and os.pread(file.fileno(), 4, max(size - 4, 0)) not in PARQUET_ENDS:
            raise DataError(f"{shown} does not end as a Parquet file", fix="write the file anew, or give JSONL.")
        line = 0
        for piece in iter(lambda: file.read(1 << 20), b"") if size else ():
            sha.update(piece)
            line = line + len(piece) if (end := piece.rfind(b"\n")) < 0 else len(piece) - end - 1
            if format == "jsonl" and line > MAX_LINE:
                raise _endless(shown)


def _size(file: BinaryIO) -> int:
    """Bytes of an open file as its folder tells them. 0 of what the kernel makes up (`/proc`): it may have no end, and is read as empty."""
    return os.fstat(file.fileno()).st_size


def _too_large(shown: str) -> DataError:
    return DataError(f"{shown} has more than {MAX_WHOLE >> 30} GiB, and is read at once", fix="write JSONL, which is read line by line.")


def _endless(where: str) -> DataError:
    return DataError(f"{where} has more than {MAX_LINE >> 20} MiB", fix="write one row a line, each ended by a line break.")


def _refuse_utf16(raw: bytes, shown: str) -> None:
    if raw.startswith(UTF16):
        raise DataError(f"{shown} is UTF-16", fix="save it as UTF-8.")
