"""What a .gguf file's header says of its own size, walked through before the package gguf reads it.

That package takes a header at its word: an array of 2**60 numbers is read on behind the file's end, until memory is full.
"""

from __future__ import annotations

import struct
from mmap import ACCESS_READ, mmap
from pathlib import Path

from trimtab.errors import BaseError

MAX_VALUES = 1 << 22
"""Keys, elements of arrays and tensors of a header that are read. Published vocabularies and their merges have half a million."""
TEXT, ARRAY, DEEPEST = 8, 9, 4
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a number, by GGUF's number of its type."""
WHOLE = {4: "I", 5: "i", 10: "Q", 11: "q"}
"""Those of whole numbers of 32 and 64 bits, as `struct` names them."""


def refuse_damage(path: Path) -> None:
    """BaseError where a .gguf file's header goes on behind its end, or names more layers than there are tensors."""
    try:
        _walk(path)
    except (OSError, ValueError) as error:
        raise BaseError(f"the GGUF file {str(path)!r} cannot be read: {error}", fix="fetch the file anew.") from error


def _walk(path: Path) -> None:
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise ValueError("it does not start with the letters GGUF")
        header = _Header(data)
        header.skip(8)
        tensors, keys = header.number("Q"), header.number("Q")
        for _ in header.counted(keys):
            name, kind, at = header.text(), header.number("I"), header.at
            header.value(kind)
            if name.endswith(b".block_count") and kind in WHOLE:
                (layers,) = struct.unpack_from(header.order + WHOLE[kind], data, at)
                if layers > tensors:
                    raise ValueError(f"{name.decode(errors='replace')} is {layers:,}, and it has {tensors:,} tensors")
        for _ in header.counted(tensors):
            header.text()
            header.skip(8 * header.number("I") + 12)


class _Header:
    """Where the walk is. order: of bytes, as `struct` names it; a file for other machines has its version the other way round."""

    def __init__(self, data: mmap):
        self.data, self.at, self.values = data, 0, 0
        self.order = ">" if data[4:6] == b"\0\0" else "<"

    def skip(self, size: int) -> int:
        """Go on by so many bytes; where they begin."""
        begin, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise ValueError(f"it ends at {len(self.data):,} bytes, and its header goes on")
        return begin

    def number(self, form: str) -> int:
        found: int = struct.unpack_from(self.order + form, self.data, self.skip(struct.calcsize("=" + form)))[0]
        return found

    def text(self) -> bytes:
        size = self.number("Q")
        begin = self.skip(size)
        return self.data[begin : begin + size]

    def counted(self, count: int) -> range:
        self.values += count
        if self.values > MAX_VALUES:
            raise ValueError(f"its header has {self.values:,} keys, tensors and elements of arrays; at most {MAX_VALUES:,} are read")
        return range(count)

    def value(self, kind: int, deep: int = 0) -> None:
        if kind in SIZES:
            self.skip(SIZES[kind])
        elif kind == TEXT:
            self.text()
        elif kind == ARRAY and deep < DEEPEST:
            inner, elements = self.number("I"), self.counted(self.number("Q"))
            if inner in SIZES:
                self.skip(SIZES[inner] * len(elements))
            else:
                for _ in elements:
                    self.value(inner, deep + 1)
        else:
            raise ValueError(f"a value of its header is of type {kind}, which GGUF does not have there")
