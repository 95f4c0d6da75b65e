"""The rows of a `Source`: looked at, or read one after the other."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trimtab.bases.template import BadRow
from trimtab.data.documents import TEXT_SUFFIXES, text_files
from trimtab.data.formats import READERS, SUFFIXES, holds_something, hub_fingerprint, read_hub
from trimtab.data.forms import check_columns, form_of, unused, used_columns
from trimtab.data.keys import Repeated
from trimtab.data.opened import digest
from trimtab.data.pairs import PAIR_COLUMNS
from trimtab.data.prompts_alone import Asked
from trimtab.data.rows import Dropped, Parts, Record, Records, Row, RowId, named_as_ours, to_segments, whole
from trimtab.data.sources import HUB, Source
from trimtab.errors import DataError, nearest
from trimtab.paths import user_path


def peek_source(source: Source, root: Path, parts: Parts = whole) -> None:
    """DataError if `read_source` would refuse the whole source; reads only as far as it must to tell. Hub datasets are not looked up."""
    if source.path.startswith(HUB):
        return
    seen: dict[str, None] = {}
    any_form, found_any, first = False, False, None
    for found in records_of(source, root):
        found_any = True
        record = None if isinstance(found, Dropped) else found[1]
        if isinstance(record, dict):
            first = record if first is None else first
            seen.update(dict.fromkeys(map(str, record)))
            any_form = bool(_forms(record, source, parts)) or any_form
        if any_form and seen.keys() >= set(source.columns.values()):
            break
    _refuse_whole(source, found_any, seen, None if any_form else first, parts)


def _refuse_whole(source: Source, found_any: bool, seen: Mapping[str, None], formless: Record | None, parts: Parts) -> None:
    """formless: the first record, where none had a known form."""
    if not found_any:
        raise DataError(f"{source.path} holds no rows", fix="name a file that has rows.")
    if seen:
        more = () if parts is whole else PAIR_COLUMNS
        why = None if formless is None or parts is whole else to_segments(formless, "", source.columns, source.system, parts)
        reason = why.reason if isinstance(why, Dropped) else ""
        check_columns(seen, source.columns, source.path, any_form=formless is None, more=more, why=reason)


Note = Callable[[str], None]
ASKED = "asked"
"""The form of a prompt without an answer, all of whose columns rewards may use."""


def read_source(
    source: Source, root: Path, number: int = 0, note: Note = lambda text: None, parts: Parts = whole
) -> tuple[list[Row], list[Dropped]]:
    """All rows of a source in file order, and the lines that could not be read or understood: what `rows_of` gives."""
    found = list(rows_of(source, root, number, note, parts))
    return [r for r in found if isinstance(r, Row)], [r for r in found if isinstance(r, Dropped)]


def rows_of(source: Source, root: Path, number: int = 0, note: Note = lambda text: None, parts: Parts = whole) -> Iterator[Row | Dropped]:
    """The rows of a source in file order, and each line that could not be read or understood, with "file:line" and the reason.

    root: where relative paths start. number: of the source among those that are read together; rows are found by it and by their place
    here (`Row.id`). note: hears, once, what the source holds and no row uses. parts: how a record becomes segments. Raises DataError if
    the source is missing or empty, needs a package that is not installed, or has no column of a known form; the message lists the columns
    that exist.
    """
    columns_seen: dict[str, None] = {}
    columns = source.columns if parts is whole else {}
    left_over: Counter[str] = Counter()
    any_form, found_any, read, first = False, False, 0, None
    for found in records_of(source, root):
        found_any = True
        if isinstance(found, Dropped):
            yield found
            continue
        origin, record = found
        forms: list[tuple[Record, str]] = []
        if isinstance(record, dict):
            first = record if first is None else first
            forms = _forms(record, source, parts)
            if not record.keys() <= columns_seen.keys():
                columns_seen.update(dict.fromkeys(map(str, record)))
            any_form = any_form or bool(forms)
        row = to_segments(record, origin, source.columns, source.system, parts)
        if isinstance(row, Row):
            row = _found(row, (number, read), source.trusted)
            read += 1
            if beside := {what for part, form in forms if form != ASKED for what in unused(part, columns, form)}:
                left_over.update(beside)
        yield row
    _refuse_whole(source, found_any, columns_seen, None if any_form else first, parts)
    if left_over:
        said = (f"{what} ({n} row{'s' * (n > 1)})" for what, n in sorted(left_over.items()))
        note(f"{source.path}: not used: {', '.join(said)}")


def content_of(source: Source, root: Path) -> tuple[str, bytes] | None:
    """(the source's name, with which the origins of its rows begin; a digest of all its bytes and of how they are read). None where it has
    none: what is missing, or a data set that does not say which it is. The files of a folder have names of their own, so that their
    folder's place is part of its digest."""
    how = [source.format, sorted(source.columns.items()), source.system, source.trusted, source.limit]
    if source.rows is not None:
        return source.path, hashlib.sha256(json.dumps([*how, source.rows.digest]).encode()).digest()
    if source.path.startswith(HUB):
        name, mark = source.path.removeprefix(HUB), hub_fingerprint(source.path.removeprefix(HUB), _hub_split(source))
        return (source.path, hashlib.sha256(json.dumps([*how, name, _hub_split(source), mark]).encode()).digest()) if mark else None
    path = user_path(source.path, DataError, "path", root)
    files, name = (text_files(path), "") if path.is_dir() else ([path], _shown(path, root))
    sha = hashlib.sha256(json.dumps([*how, path.suffix.lower(), "" if name else _shown(path, root)]).encode())
    try:
        for file in files:
            sha.update(json.dumps([str(file.relative_to(path)), file.stat().st_size]).encode())
            digest(sha, file, source.path, "text" if path.is_dir() else source.format or SUFFIXES.get(path.suffix.lower()))
    except (OSError, DataError):
        return None  # why, is said by those who read it
    return name, sha.digest()


def text_bytes(source: Source, root: Path) -> int:
    """Bytes of a source's text at most: the size of its files, more than any memory where that does not say it (Parquet, the hub)."""
    if source.rows is not None:
        return int(source.rows.nbytes)
    path = user_path(source.path, DataError, "path", root)
    if source.path.startswith(HUB) or "parquet" in (source.format, SUFFIXES.get(path.suffix.lower())):
        return 1 << 60
    return sum(file.stat().st_size for file in (text_files(path) if path.is_dir() else [path]))


def _forms(record: Record, source: Source, parts: Parts) -> list[tuple[Record, str]]:
    """(segment, its form) of each segment that a record holds; none where one of them is missing or has no form."""
    form = form_of(record, source.columns)
    _refuse_repeated(record, source, form)
    if parts is whole:
        return [] if form is None else [(record, form)]
    try:
        made = list(parts(named_as_ours(record, source.columns)).values())
    except (BadRow, KeyError):
        return []
    found = [(part.record, ASKED) if isinstance(part, Asked) else (part, form_of(part, {})) for part in made]
    known = [(part, form) for part, form in found if form is not None]
    return known if len(known) == len(found) else []


def _found(row: Row, id: RowId, trusted: bool) -> Row:
    for segment in (row, *row.others):  # nobody else has them yet, and a copy costs as much as reading the row
        object.__setattr__(segment, "id", id)
        object.__setattr__(segment, "trusted", trusted)
    return row


def _refuse_repeated(record: Mapping[str, Any], source: Source, form: str | None) -> None:
    """DataError if a column that rows are made of stands several times in the header: which of them is meant is not known."""
    if Repeated not in map(type, record.values()):
        return
    twice = [c for c in used_columns(form, source.columns) if isinstance(record.get(c), Repeated)]
    if twice:
        raise DataError(f"{source.path} names a column twice: {', '.join(sorted(twice))}", fix="give each a name of its own.")


def records_of(source: Source, root: Path) -> Records:
    """The records of a source as they are read: (origin, record), or a `Dropped`. DataError where it cannot be read at all."""
    return itertools.islice(_all(source, root), source.limit)


def _all(source: Source, root: Path) -> Records:
    if source.rows is not None:
        return source.rows.records(source.path)
    if source.path.startswith(HUB):
        return read_hub(source.path.removeprefix(HUB), _hub_split(source))
    path = user_path(source.path, DataError, "path", root)
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{source.path} does not exist{nearest(path.name, siblings)}", fix=f"looked for {path.absolute()}")
    if path.is_dir():
        return _folder(path, root)
    format = source.format or SUFFIXES.get(path.suffix.lower())
    if format is None:
        raise DataError(
            f"{source.path}: the suffix {path.suffix!r} does not say what it holds",
            fix=f"add `format:` with one of {', '.join(READERS)}; known suffixes are {', '.join(SUFFIXES)}.",
        )
    return READERS[format](path, _shown(path, root))


def _hub_split(source: Source) -> str | None:
    return source.split if isinstance(source.split, str) else None


def _folder(folder: Path, root: Path) -> Iterator[tuple[str, Any] | Dropped]:
    files = text_files(folder)
    if not files:
        others = sorted(p.name for p in folder.iterdir())[:10]
        raise DataError(
            f"{_shown(folder, root)} holds no {', '.join(TEXT_SUFFIXES)} files",
            problems=[f"it holds {name}" for name in others],
            fix="a folder is read as Markdown and text; name files of other formats one by one.",
        )
    for file in files:
        if holds_something(file):  # an empty page among others is no fault
            yield from READERS["text"](file, _shown(file, root))


def _shown(path: Path, root: Path) -> str:
    """The path as messages name it: from the root where it lies below, else whole."""
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
