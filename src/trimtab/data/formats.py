"""Read records from JSONL, JSON, CSV and Parquet files, folders of text, and the hub.

Each reader takes (path, shown), where shown is the path as messages name it, and yields (origin, record) or a `Dropped` with the line that
could not be read. UTF-8 only (CSV also UTF-16); byte order marks are left out. Where only a part of a file is not UTF-8, its bytes arrive
as surrogates (PEP 383), so that only the rows that hold them are dropped (`characters.bad_character`). Only regular files are read, and
their lines and sizes are bounded.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from trimtab.data.delimited import read_delimited
from trimtab.data.documents import split_document
from trimtab.data.json_files import read_json, read_jsonl
from trimtab.data.opened import UTF16, open_file, whole
from trimtab.data.rows import Records
from trimtab.errors import DataError


def read_csv(path: Path, shown: str) -> Records:
    """Comma, semicolon or tab separated, with a header line; quoted fields may hold line breaks. UTF-8, or UTF-16 with its mark."""
    raw = whole(path, shown, utf16=True)
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
        with open_file(path, shown) as opened, parquet.ParquetFile(opened) as file:
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"{shown}:{number}", record
    except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
        raise DataError(f"{shown} cannot be read as Parquet: {error}", fix="write the file anew, or give JSONL.") from error


def read_text(path: Path, shown: str) -> Records:
    """A Markdown or text file, cut into rows of bounded size."""
    text = whole(path, shown).decode("utf-8", "surrogateescape").replace("\r\n", "\n").replace("\n\ufeff", "\n")
    for line, piece in split_document(text, markdown=path.suffix.lower() != ".txt"):
        yield f"{shown}:{line}", {"text": piece}


def read_hub(name: str, split: str | None) -> Records:
    """Rows of a hub dataset "org/name" or "org/name:config" through `datasets`; labels arrive by name. split: "train" where it is None."""
    data, labels = _hub(name, split)
    for number, record in enumerate(data, 1):
        named = {c: f.int2str(record[c]) for c, f in labels.items() if isinstance(record[c], int) and record[c] >= 0}
        yield f"hf:{name}:{number}", {**record, **named}


def hub_fingerprint(name: str, split: str | None) -> str | None:
    """What `datasets` tells apart the contents of data sets by; None where it says nothing."""
    try:
        found = getattr(_hub(name, split)[0], "_fingerprint", None)
    except DataError:  # it is said when the rows are read
        return None
    return str(found) if found else None


def hub_problem(name: str) -> str:
    """What is wrong with the name of a hub dataset, by how it is written; "" where nothing is. `datasets` reads a path or a URL that it is
    given for a name."""
    right = HUB_DATASET.fullmatch(name) and not name.partition(":")[0].endswith(".py")
    return "" if right else "not the name of a hub dataset, org/name or name; a file or a folder is written without hf:"


def _hub(name: str, split: str | None) -> tuple[Any, dict[str, Any]]:
    """(a data set of the hub, its columns of labels). DataError for a name that `datasets` would take for something of this machine: a
    file or a folder that is here, or one of its own readers, which reads the files of the current folder."""
    datasets = _import("datasets", "datasets", f"hf:{name} is a dataset of the hub")
    path, _, config = name.partition(":")
    if problem := hub_problem(name):
        raise DataError(f"hf:{name}: {problem}", fix="write the path without hf:")
    if Path(path).exists() or path in _readers():
        what = "a file or folder of this name lies here" if Path(path).exists() else "`datasets` has a reader of files of this name"
        raise DataError(f"hf:{name}: {what}, and no hub dataset would be read", fix="to read files, write their path without hf:")
    try:
        data = datasets.load_dataset(path, config or None, split=split or "train")
        return data, {c: f for c, f in data.features.items() if isinstance(f, datasets.ClassLabel)}
    except Exception as error:  # offline, unknown name or split, needs a login: as many classes as there are reasons, the text says which
        raise DataError(
            f"the dataset hf:{name} cannot be loaded: {type(error).__name__}: {error}",
            fix="check the name, the split and the network, or download its files and name one of them.",
        ) from error


def _readers() -> Collection[str]:
    """Names that `datasets` takes for one of its readers of files."""
    try:
        return tuple(importlib.import_module("datasets.packaged_modules")._PACKAGED_DATASETS_MODULES)
    except ImportError:
        return ()


HUB_DATASET = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._-]{0,95}/)?[A-Za-z0-9_][A-Za-z0-9._-]{0,95}(?::[^<>:/\\|?*\0]*)?")
"""A hub dataset, and the name of its configuration, in which the hub allows none of these."""
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


def _import(module: str, package: str, why: str) -> Any:
    """An optional dependency, imported when a source needs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"{why}, and the package {package} is not installed", fix=f"pip install {package}") from None
