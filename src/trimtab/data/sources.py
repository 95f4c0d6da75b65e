"""Where rows come from: a `Source` names a file, a folder or a hub dataset, or holds rows of the program."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import PlainSerializer

from trimtab.data.formats import READERS, hub_problem
from trimtab.data.forms import COLUMNS
from trimtab.data.given import GivenRows, is_table
from trimtab.errors import ConfigError, nearest
from trimtab.foreign import answer

HUB = "hf:"
ROWS = "rows"
"""What messages call rows that a program gives."""
_HOLDERS = frozenset(("path", "rows"))


MAX_DROPPED = 0.1
"""The part of a source's rows that may be dropped where nothing else is said: with more, the rest would not be the data that was meant."""


@dataclass(frozen=True)
class Source:
    """One source of rows.

    path: a file, a folder of Markdown/text, or "hf:org/name" ("hf:org/name:config"); relative paths start at the run file's folder. rows:
    in the place of a path, what a program has: a list of dicts, a generator, a DataFrame, a `datasets.Dataset`. They are read at once: this
    is then a `GivenRows`, and path is what messages call it. weight: how often an epoch draws each of its rows (2: twice; 0.5: a fixed half
    of them). format: jsonl, json, csv, parquet or text, if the suffix does not say it. columns: our column name -> the file's. system: a
    system turn for rows that have none. split: of a hub dataset ("train"); or a number: so many of the rows (below 1: this part of them)
    are held out as valid rows. trusted: control tokens in its plain text are read as such. limit: only the first so many rows are read.
    max_dropped: the part of its rows that may be dropped, 0 to 1; where more are, it is refused. None: 0.1.

    held: a number that was given as `split`. held_out: this is the source of those valid rows. Neither is a key of run files.
    """

    path: str = ""
    weight: float = 1.0
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    split: str | float | None = None
    trusted: bool = False
    limit: int | None = None
    max_dropped: float | None = None
    held: float = 0
    held_out: bool = False
    rows: Annotated[Any, PlainSerializer(lambda rows: None)] = None  # no setting: the digest of a data set says which rows it has

    def __post_init__(self) -> None:
        problems = []
        if self.rows is not None and self.path == "":
            object.__setattr__(self, "path", ROWS)
        if not isinstance(self.path, str) or not self.path.removeprefix(HUB):
            problems.append(f"path = {self.path!r}: not the name of a file, a folder or hf:org/name")
        elif self.rows is None and self.path.startswith(HUB) and (said := hub_problem(self.path.removeprefix(HUB))):
            problems.append(f"path = {self.path!r}: {said}")
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float) or not 0 < self.weight < math.inf:
            problems.append(f"weight = {self.weight!r}: not a number above 0")
        if self.format is not None and self.format not in READERS:
            problems.append(f"format = {self.format!r}: not one of {', '.join(READERS)}{nearest(str(self.format), READERS)}")
        if not isinstance(self.columns, Mapping) or not all(isinstance(x, str) for pair in self.columns.items() for x in pair):
            problems.append(f"columns = {self.columns!r}: not a mapping from our column names to the file's")
        problems += [f"system = {v!r}: not text" for v in (self.system,) if not isinstance(v, str | None)]
        problems += [f"trusted = {v!r}: neither true nor false" for v in (self.trusted,) if type(v) is not bool]
        if self.limit is not None and (type(self.limit) is not int or self.limit < 1):
            problems.append(f"limit = {self.limit!r}: not a number of rows, at least 1")
        if text := dropped_problem(self.max_dropped):
            problems.append(f"max_dropped = {self.max_dropped!r}: {text}")
        if self.rows is not None and not problems:
            problems += self._take_rows()
        if self.rows is None and isinstance(self.path, str):
            problems += self._of_other_sources()
        if not isinstance(self.split, str | None):
            problems += [f"split = {self.split!r}: {text}" for text in (part_problem(self.split),) if text]
            object.__setattr__(self, "held", self.split)
            object.__setattr__(self, "split", None)
        if problems:
            raise ConfigError(f"the source {self.path!r} cannot be used", problems=problems)

    def _of_other_sources(self) -> list[str]:
        """Keys that such a source does not have. A file is one split, which `datasets` calls train."""
        if self.path.startswith(HUB):
            return [] if self.format is None else [f"format = {self.format!r}: of files; data sets of the hub say it themselves"]
        if isinstance(self.split, str) and self.split != "train":
            return [f"split = {self.split!r}: a file or folder has no splits by name; a number holds so many rows out for validation"]
        return []

    def _take_rows(self) -> list[str]:
        """Read the rows that were given, once; what is wrong with them."""
        if not (is_table(self.rows) or isinstance(self.rows, list | tuple | GivenRows)):
            return [f"rows = {reprlib.repr(self.rows)}: not a list of dicts, a generator, a DataFrame or a Dataset"]
        if self.format is not None or isinstance(self.split, str):
            named = {"format": self.format is not None, "split": isinstance(self.split, str)}
            return [f"{key}: of files and of data sets of the hub; these are rows" for key, is_said in named.items() if is_said]
        if isinstance(self.rows, GivenRows):
            return []
        try:
            object.__setattr__(self, "rows", GivenRows(self.rows, self.limit))
        except ConfigError as e:
            return e.among_others()
        return []


def dropped_problem(part: Any) -> str:
    """What is wrong with a part of the rows that may be dropped; "" where nothing is."""
    right = part is None or (not isinstance(part, bool) and isinstance(part, int | float) and 0 <= part <= 1)
    return "" if right else "not a part of the rows, 0 to 1"


def part_problem(part: Any) -> str:
    """What is wrong with a number of rows to hold out; "" where nothing is."""
    if isinstance(part, bool) or not isinstance(part, int | float):
        return "neither a hub dataset's split nor a number"
    right = 0 < part < 1 or (1 <= part < math.inf and part == int(part))
    return "" if right else "not a part of the rows between 0 and 1, nor a number of them"


KEYS = tuple(f.name for f in dataclasses.fields(Source) if f.name not in ("held", "held_out"))
"""Of a source in a run file."""


def parse_sources(value: Any, *, where: str = "data") -> list[Source]:
    """Sources as a run file writes them: a path, a mapping of `Source`'s fields, or a list of either.

    where: what the value is, for the message. Raises ConfigError that lists every unknown key with the nearest known one.
    """
    sources, problems = sources_in(value, where)
    if problems:
        raise ConfigError(f"{where} cannot be used", problems=problems, fix=f"a source takes: {', '.join(KEYS)}")
    return sources


def sources_in(value: Any, where: str) -> tuple[list[Source], list[str]]:
    """(the sources that can be told from `value`, what is wrong with the others)."""
    several = isinstance(value, list | tuple) and not holds_rows(value)
    items = list(value) if several else [value]
    if not items:
        return [], [f"{where} names no source: name a file, a folder or hf:org/name"]
    sources, problems, tables, said = list[Source](), list[str](), 0, False
    for i, item in enumerate(items):
        at = f"{where}[{i}]" if several else where
        if holds_rows(item):
            item = {"rows": item}
        if isinstance(item, Source):
            sources.append(item)
        elif isinstance(item, str | Path):
            sources.append(Source(str(item)))
        elif isinstance(item, Mapping) and any(map(is_table, item.values())) and "rows" not in item:
            problems.append(f"{at}: several splits, {', '.join(map(str, item))}: give one of them")
        elif isinstance(item, Mapping) and _is_row(item):
            if said:  # of those before it
                continue
            problems.append(f"{at}: one row: rows stand in a list")
        elif isinstance(item, Mapping) and "rows" not in item and (columns := _columns_beside(item)):
            if not said:  # once, not of a thousand rows
                listed = ", ".join(map(repr, columns))
                problems.append(
                    f"{at}: {listed} beside `path`: if these are rows with a column `path`, write {{'rows': [...]}}; if this is a file,"
                    " its column names stand in `columns`"
                )
            said = True
        elif not isinstance(item, Mapping) or _HOLDERS.isdisjoint(item):
            unknown = [k for k in item if k not in KEYS] if isinstance(item, Mapping) else []
            hints = "".join(f"; {k!r}{hint}" for k in unknown if (hint := answer(k, KEYS)))
            problems.append(f"{at} = {reprlib.repr(item)}: neither a path, nor rows, nor a mapping with one of them{hints}")
        else:
            problems += [f"{at}: unknown key {key!r}{answer(key, KEYS)}" for key in item if key not in KEYS]
            if item.keys() >= _HOLDERS:
                problems.append(
                    f"{at}: `path` and `rows` are both given: take one of them away; rows that have a column `path` stand in `rows`"
                )
                continue
            named = {k: v for k, v in item.items() if k in KEYS}
            if item.get("rows") is not None:
                tables += 1
                named["path"] = ROWS if tables == 1 else f"{ROWS} {tables}"
            try:
                sources.append(Source(**named))
            except ConfigError as e:
                problems += [f"{at}: {p}" for p in e.problems]
    return sources, problems


def holds_rows(value: Any) -> bool:
    """Whether a value is rows: a table, or a list of rows rather than of sources, which its first item decides."""
    listed = isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping) and _is_row(value[0])
    return listed or is_table(value) or isinstance(value, GivenRows)


def taken(data: Any) -> Any:
    """`data` as a run file has it, with the rows in it read: a generator can be read only once."""
    if holds_rows(data):
        return GivenRows(data)
    if isinstance(data, Mapping) and holds_rows(data.get("rows")) and not isinstance(data["rows"], GivenRows):
        limit = data.get("limit")
        return {**data, "rows": GivenRows(data["rows"], limit if type(limit) is int and limit > 0 else None)}
    if isinstance(data, Mapping):
        return {name: taken(value) for name, value in data.items()}
    return [taken(item) for item in data] if isinstance(data, list | tuple) else data


def _columns_beside(item: Mapping[Any, Any]) -> list[str]:
    """The keys of a mapping with `path` that are no source's but columns of rows."""
    return [key for key in item if key in (*COLUMNS, "chosen", "rejected") and key not in KEYS] if "path" in item else []


def _is_row(item: Mapping[Any, Any]) -> bool:
    """Whether a mapping is a row rather than a source with a key that is misspelt: it has a column."""
    if not _HOLDERS.isdisjoint(item):
        return False
    return any(key in COLUMNS or not answer(key, KEYS) for key in item if key not in KEYS)
