"""Data sets of other programs as sources of a run file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from trimtab.data.formats import SUFFIXES
from trimtab.train.imported.carry import Carry


def located(path: Any, c: Carry, name: Any = None) -> str:
    """A data set's path as a source names it: a file that is there, from the settings' folder or the current one; what looks like a file as
    it is; else a data set of the hub. name: its configuration."""
    text = str(path)
    for start in (c.folder, Path()):
        if (there := start / Path(text).expanduser()).exists():
            return text if start == c.root else from_root(there, c)
    local = text.startswith((".", "/", "~")) or Path(text).suffix.lower() in SUFFIXES or text.count("/") > 1
    return text if local else f"hf:{text}" + (f":{name}" if name else "")


def from_root(path: Path, c: Carry) -> str:
    """A path of a run file, where relative ones start at its folder."""
    return str(path) if path.is_absolute() else os.path.relpath(path, c.root)


def source(path: str, **keys: Any) -> str | dict[str, Any]:
    """A source with those of `keys` that say something: as short as a run file would have it."""
    said = {k: v for k, v in keys.items() if v not in (None, {}, "")}
    return {"path": path, **said} if said else path


def in_column(c: Carry, sources: list[Any]) -> list[Any]:
    """Sources whose plain text stands in another column than `text`, where `dataset_text_field` says so."""
    column = c.take("dataset_text_field")
    if column in (None, "text"):
        if column:
            c.needless("dataset_text_field", column, "the form of a row is told by its columns")
        return sources
    return [source(s, columns={"text": column}) if isinstance(s, str) else {**s, "columns": {"text": column}} for s in sources]
