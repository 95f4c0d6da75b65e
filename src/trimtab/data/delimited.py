"""CSV and similar formats: text with a header line, separated by comma, semicolon or tab, as spreadsheets and helpdesk programs export it.

A record is a line, but a quoted field may contain line breaks. If one quote is missing or not doubled, everything up to the next such quote
is misread: text inside quotes looks as if it were outside, and the reverse. Two rules prevent that a part of a record is read as a row:

- A quote with a letter on one side shows which side is inside: `,"a` opens a field, `a",` closes one. A record is handed on only after the
  next quote that agrees with the reading so far. If a quote disagrees, everything since the last one that agreed is dropped.
- After a broken record, reading resumes at the end of the record that has the next such quote. The record after it is dropped too if the
  broken part has fewer fields than the header. Until the next record with such a quote, rows must have all fields. If no quote in the rest
  of the file shows its side, the file is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.data.keys import Repeated
from trimtab.data.rows import Dropped
from trimtab.errors import DataError

DELIMITERS = ",;\t"
BOM = "\ufeff"
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?(?:\r\n|\r|\n|\Z)', re.IGNORECASE)
_QUOTED = re.compile(r'"[^"]*+(?:""[^"]*+)*+')
_RUN = re.compile(r'"+')
MAX_LOST_LINES, MAX_LOST_SHARE = 50, 0.1
"""A broken record that takes more lines along than both, the second a share of the file's, stops the file."""
_UNDOUBLED = "not CSV: a quote within a field that is not doubled"


@dataclass
class _Record:
    """What was read from `start`. end: where the next record begins. told: whether a quote in it tells its side. loose: whether a field
    that is not quoted holds quotes. fault: of a broken one, the place behind the quote that cannot be. outside: whether all behind it is
    surely outside of quotes. closed: False where a quoted field runs to the end of the text."""

    start: int
    fields: list[str] = field(default_factory=list)
    end: int = 0
    told: bool = False
    loose: bool = False
    fault: int | None = None
    outside: bool = False
    closed: bool = True


def read_delimited(text: str, shown: str) -> Iterator[tuple[str, Any] | Dropped]:
    """(origin, record) of each record of a file, or what was dropped. shown: the file's name in messages. DataError if no header is
    found, or where reading cannot go on."""
    table = _Table(text, shown)
    header = table.header
    for line, record in table.records():
        origin = f"{shown}:{line}"
        if isinstance(record, str):
            yield Dropped(origin, record)
        elif not any(record):
            continue
        elif record == header:
            yield Dropped(origin, "not CSV: the header stands here again")
        elif any(record[len(header) :]):
            yield Dropped(origin, f"not CSV: {len(record)} fields where the header has {len(header)}")
        else:
            yield origin, _named(header, record)


def _named(header: Sequence[str], cells: Sequence[str]) -> dict[str, Any]:
    """A record by column; missing cells are empty, columns of one name are `Repeated`, and those without a name only where they say
    something."""
    padded = [*cells, *[""] * (len(header) - len(cells))]
    record: dict[str, Any] = {}
    for name, cell in zip(header, padded, strict=False):
        if name in record:
            record[name] = Repeated((*(record[name] if isinstance(record[name], Repeated) else (record[name],)), cell))
        elif name or cell:
            record[name] = cell
    return record


class _Table:
    """The text, and how it is cut into records."""

    def __init__(self, text: str, shown: str):
        self.text, self.shown = text, shown
        self.newline = "\n" if "\n" in text else "\r"
        start = len(BOM) if text.startswith(BOM) else 0
        start += len(text[start:]) - len(text[start:].lstrip("\r\n"))
        named = _SEPARATOR_LINE.match(text, start)
        start = named.end() if named else start
        self.delimiter = named[1] if named else _sniff(text[start : start + (1 << 20)])
        self.edges = {self.delimiter, "\r", "\n", ""}
        d = re.escape(self.delimiter)
        self._bare = re.compile(rf"[^{d}\r\n]*+")
        ends = rf'"(?={d}|\Z)|[^{d}]*+'
        self._lenient = re.compile(rf'"(?:[^"]|""|"(?!{d}|\Z))*+{ends}'), re.compile(rf'"(?:[^"]|"(?!{d}|\Z))*+{ends}')
        self._last_quote = text.rfind('"')
        self._at, self._line = 0, 1
        first = self._parse(start)
        while not any(first.fields) and first.fault is None and first.end < len(text):
            first = self._parse(first.end)
        if first.fault is not None or not any(first.fields):
            raise DataError(f"{shown}:{self._line_of(first.start)} is not a header of columns", fix="name the columns in the first line.")
        self.header = [name.strip() for name in first.fields]
        self._begin = first.end

    def records(self) -> Iterator[tuple[int, list[str] | str]]:
        """(line, fields) of each record, or (line, why it is dropped)."""
        at, waiting = self._begin, list[_Record]()
        suspect = strict = False  # after a broken record: whether the next is dropped; whether a record needs all fields and no odd quote
        while at < len(self.text):
            record = self._parse(at)
            if record.fault is not None:
                yield from self._settle(waiting, sure=record.told)
                waiting = []
                at, suspect = self._resume(record)
                strict = True
                yield self._line_of(record.start), _UNDOUBLED + self._lost(record.start, at)
                continue
            at = record.end
            if strict and any(record.fields):
                doubtful, suspect = suspect or record.loose or len(record.fields) != len(self.header), False
                strict = (doubtful or not record.told) and at <= self._last_quote
                if doubtful:
                    yield self._line_of(record.start), "not CSV: not surely a whole record, after a quote that is not doubled"
                    continue
            if record.told or at > self._last_quote:
                yield from self._settle(waiting, sure=True)
                waiting = []
            waiting.append(record)
        yield from self._settle(waiting, sure=True)

    def _lost(self, start: int, end: int) -> str:
        """Which lines a broken stretch takes along. DataError if they are too many to count as one bad row."""
        first, last = self._line_of(start), self._line_of(min(end, len(self.text)) - 1)
        if last - first > max(MAX_LOST_LINES, MAX_LOST_SHARE * self.text.count(self.newline)):
            raise DataError(
                f"{self.shown}:{first} holds a quote that is not doubled, and up to line {last} it is not certain where a row begins",
                fix='write a quote within a field as "".',
            )
        return f" (lines {first} to {last})" if last > first else ""

    def _settle(self, waiting: Sequence[_Record], *, sure: bool) -> Iterator[tuple[int, list[str] | str]]:
        """Records that waited for a quote to agree. sure: whether it did; else they may be parts of what is broken."""
        for record in waiting:
            doubt = "not CSV: not surely a whole record, before a quote that is not doubled"
            yield self._line_of(record.start), record.fields if sure else doubt

    def _parse(self, start: int) -> _Record:
        """One record from `start`, which is outside of quotes."""
        text, edges, record = self.text, self.edges, _Record(start)
        at = start + len(BOM) if text.startswith(BOM, start) else start  # files were put together
        while True:
            if text.startswith('"', at):
                close = _QUOTED.match(text, at).end()  # type: ignore[union-attr]
                cell = text[at + 1 : close]
                inner = cell.strip('"')
                record.told = record.told or (inner != "" and inner[0] not in edges)
                if close == len(text) or text[close + 1 : close + 2] not in edges:
                    record.fault, record.closed = close + 1, close < len(text)
                    return record
                record.told = record.told or (inner != "" and inner[-1] not in edges)
                record.fields.append(cell.replace('""', '"'))
                at = close + 1
            else:
                cell = self._bare.match(text, at)[0]  # type: ignore[index]
                at += len(cell)
                record.loose = record.loose or '"' in cell
                if cell.count('"') % 2:
                    record.fault, record.outside = at, True
                    record.told = record.told or cell[-1] != '"'  # a quote within a line, as in 5" disk, is itself what is wrong
                    return record
                record.fields.append(cell)
            if text[at : at + 1] != self.delimiter:
                record.end = self._next_line(at)
                return record
            at += 1

    def _next_line(self, at: int) -> int:
        return at + (2 if self.text.startswith("\r\n", at) else 1)

    def _resume(self, broken: _Record) -> tuple[int, bool]:
        """(where the next record begins, whether it is doubtful all the same). DataError if that cannot be known."""
        start = broken.start
        while True:
            if not broken.closed:
                why = "opens a quote that is never closed"
                raise DataError(f"{self.shown}:{self._line_of(start)} {why}", fix='close it, and write a quote within a field as "".')
            assert broken.fault is not None
            rest = self._rest(broken.fault) if broken.outside else self._next_sure(start, broken.fault)
            if rest.fault is None:
                stretch = self.text[start : rest.end].rstrip("\r\n")
                return rest.end, all(_count(field, stretch) != len(self.header) for field in self._lenient)
            broken = rest

    def _rest(self, at: int) -> _Record:
        """What is left of a record behind one of its fields."""
        return self._parse(at + 1) if self.text[at : at + 1] == self.delimiter else _Record(at, end=self._next_line(at))

    def _next_sure(self, start: int, fault: int) -> _Record:
        """The record up to whose end reading is lost, or what is left of it, from the next quote behind `fault` that tells its side."""
        text = self.text
        even = True
        for run in _RUN.finditer(text, fault):
            if len(run[0]) % 2 == 0:
                continue
            even = False
            left, right = text[run.start() - 1] in self.edges, text[run.end() : run.end() + 1] in self.edges
            if right and not left:
                return self._rest(run.end())
            if left and not right:
                line = max(text.rfind(c, fault, run.start()) for c in "\r\n")
                whole = line >= 0 and '"' not in text[line : run.start()]
                return _Record(line, end=line + 1) if whole else self._parse(run.start())
        if not even:
            raise DataError(
                f"{self.shown}:{self._line_of(start)} holds a quote that is not doubled, and where the next row begins is not certain",
                fix='write a quote within a field as "".',
            )
        end = re.compile(r"\r\n|\r|\n|\Z").search(text, max(fault, self._last_quote))  # pairs only: all is outside behind them
        assert end is not None
        return _Record(fault, end=max(end.end(), end.start() + 1))

    def _line_of(self, place: int) -> int:
        if place < self._at:
            self._at, self._line = 0, 1
        self._line += self.text.count(self.newline, self._at, place)
        self._at = place
        return self._line


def _count(field: re.Pattern[str], stretch: str) -> int:
    """Fields of a broken stretch, where a quote ends a field only before a delimiter. field: matches one; whether two quotes there are a
    doubled one, or one of the text and the end, is open."""
    at = count = 0
    while True:
        at = field.match(stretch, at).end() + 1  # type: ignore[union-attr]
        count += 1
        if at > len(stretch):
            return count


def _sniff(text: str) -> str:
    """The delimiter that the header has most of, outside of quotes."""
    header = re.sub(r'"[^"]*"', "", text).lstrip("\r\n")
    line = re.split(r"[\r\n]", header, maxsplit=1)[0]
    return max(DELIMITERS, key=line.count)
