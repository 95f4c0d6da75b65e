"""The header of a safetensors file, checked before anything else reads the file.

The library that reads the data accepts duplicate names, absurd shapes and any name. Here every entry must be one that an adapter can have,
and the entries together must cover the file's data exactly, without gap, overlap or extra bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from trimtab.store.files import Refusal, parse_json, read_exactly

MAX_HEADER_BYTES = 2**20
MAX_NAME = 512
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""Bytes of one element of each dtype that an adapter may be stored in."""
NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
MAGIC = {
    b"PK\x03\x04": "a zip archive (a torch pickle is one)",
    b"\x1f\x8b": "a gzip archive",
    b"\x80": "a pickle",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
}


@dataclass(frozen=True)
class Entry:
    """One tensor that a header declares: shape, safetensors' dtype name, byte range [start, stop) of the data behind the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: int, size: int, name: str) -> tuple[list[Entry], bytes]:
    """The entries of an open safetensors file of `size` bytes, and the bytes read so far. Refusal, with every finding, if it is unsound."""
    first = read_exactly(file, min(8, size), name)
    kind = next((what for magic, what in MAGIC.items() if first.startswith(magic)), None)
    length = int.from_bytes(first, "little")
    if len(first) == 8 and length <= MAX_HEADER_BYTES and length > size - 8:
        raise Refusal(f"{name} is truncated: {size:,} bytes, and its header alone claims {length:,}")
    if len(first) < 8 or length > MAX_HEADER_BYTES:
        if kind is not None:
            raise Refusal(f"{name} is {kind}, not a safetensors file")
        claim = (
            f"its header claims {length:,} bytes, more than the {MAX_HEADER_BYTES:,} allowed" if len(first) == 8 else f"it has {size} bytes"
        )
        raise Refusal(f"{name} is no safetensors file that is read here: {claim}")
    text = read_exactly(file, length, name)
    header = parse_json(text, f"the header of {name}")
    metadata = header.pop("__metadata__", {})
    problems = (
        []
        if isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
        else [f"{name}: __metadata__ is not a map of strings"]
    )
    entries = []
    for key, value in header.items():
        found = _entry(key, value)
        if isinstance(found, Entry):
            entries.append(found)
        else:
            problems.append(f"{name}: {found}")
    if not problems:
        problems = _layout_problems(entries, size - 8 - length, name)
    if problems:
        raise Refusal("\n".join(problems))
    return entries, first + text


def _entry(name: str, value: Any) -> Entry | str:
    """The entry, or what is wrong with it."""
    shown = repr(name if len(name) <= 80 else name[:77] + "…")
    if len(name) > MAX_NAME or NAME.fullmatch(name) is None:
        return f"{shown} is not a name that a tensor can have"
    if not isinstance(value, Mapping) or set(value) != {"dtype", "shape", "data_offsets"}:
        return f"{shown} does not have exactly dtype, shape and data_offsets"
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        return f"{shown} has dtype {dtype!r}; allowed are {', '.join(ITEM_BYTES)}"
    if not _counts(shape) or not 1 <= len(shape) <= 4:
        return f"{shown} has shape {shape!r}: one to four sizes are expected"
    if 0 in shape:
        return f"{shown} has shape {tuple(shape)}: a dimension of zero (a shard that was not gathered before saving?)"
    if not _counts(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != prod(shape) * ITEM_BYTES[dtype]:
        return f"{shown} has data_offsets {offsets!r}, which do not fit {dtype} {tuple(shape)}"
    return Entry(name, dtype, tuple(shape), *offsets)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**48 for n in value)


def _layout_problems(entries: list[Entry], data_bytes: int, name: str) -> list[str]:
    problems, at = [], 0
    for entry in sorted(entries, key=lambda e: e.start):
        if entry.start != at:
            gap = "overlaps the tensor before it" if entry.start < at else f"leaves {entry.start - at:,} unused bytes before it"
            problems.append(f"{name}: {entry.name} {gap}")
        at = max(at, entry.stop)
    if at > data_bytes:
        problems.append(f"{name} is truncated: {data_bytes:,} bytes of data where its header promises {at:,}")
    elif at < data_bytes:
        problems.append(f"{name} has {data_bytes - at:,} bytes behind its last tensor")
    return problems
