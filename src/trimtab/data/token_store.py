"""Tokenised rows of a source in one file: written while they are read, and mapped when they are used.

    ids       int32, those of all segments, one after the other; ~id where the token is supervised
    index     .npz: lengths, targets and roles of the segments; rows, their origins; what was dropped and noted
    the end   8 bytes: where the index begins

Files lie in the cache under the digest of everything that decides their content, so that the next run, a run after a crash, or training
after `check` need neither read nor tokenise the rows again (LlamaFactory#3939). Origins are kept without the name of the source, since the
same rows may be in another file next time. A file that does not verify is ignored and written again.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, overload
from weakref import WeakValueDictionary

import numpy as np

from trimtab.bases.cache import cache_dir
from trimtab.data.render import Example
from trimtab.data.rows import Dropped

CHUNK = 1 << 20


def token_file(digest: str) -> Path:
    """Where the tokens of a source with this "sha256:…" lie."""
    return cache_dir() / "tokens" / f"{digest.removeprefix('sha256:')}.tokens"


class TokenWriter:
    """Writes such a file, row by row. name: of the source, with which origins begin."""

    def __init__(self, out: BinaryIO, name: str):
        self._out, self._name, self._crc = out, name, 0
        self._numbers: dict[str, array[int]] = {key: array("q") for key in ("lengths", "targets", "roles", "segments", "rows", "origins")}
        self._origins = bytearray()
        self._roles: dict[str, int] = {}

    def add(self, example: Example) -> None:
        numbers = self._numbers
        for s in example.segments if example.others else (example,):
            raw = np.where(s.supervised, ~s.ids, s.ids).astype("<i4", copy=False).tobytes()
            self._out.write(raw)
            self._crc = zlib.crc32(raw, self._crc)
            numbers["lengths"].append(len(s.ids))
            numbers["targets"].append(int(np.count_nonzero(s.supervised)))
            numbers["roles"].append(self._roles.setdefault(s.role, len(self._roles)))
        numbers["segments"].append(1 + len(example.others))
        numbers["rows"].append(example.row[1])
        origin = self._behind_name(example.origin).encode("utf-8", "surrogatepass")
        numbers["origins"].append(len(origin))
        self._origins += origin

    def finish(self, digest: str, key: str, dropped: Sequence[Dropped], said: Sequence[str]) -> None:
        """The index. digest: the file's. key: of the rows and all that decides their tokens. said: notes, without the source's name."""
        lost = [(self._behind_name(d.origin), d.reason) for d in dropped]
        notes = {"digest": digest, "key": key, "crc": self._crc, "dropped": lost, "said": said, "roles": list(self._roles)}
        index = io.BytesIO()
        arrays: dict[str, Any] = {key: np.array(numbers, dtype=np.int64) for key, numbers in self._numbers.items()}
        arrays["names"] = np.array(self._origins, dtype=np.uint8)
        arrays["notes"] = np.frombuffer(json.dumps(notes).encode(), dtype=np.uint8)
        np.savez(index, **arrays)
        at = 4 * sum(self._numbers["lengths"])
        self._out.write(index.getvalue() + at.to_bytes(8, "little"))

    def _behind_name(self, origin: str) -> str:
        if not origin.startswith(self._name):
            raise AssertionError(f"{origin} does not begin with {self._name}")
        return origin.removeprefix(self._name)


@dataclass(eq=False)
class Tokens:
    """The rows of such a file. raw: its ids. index: its arrays. notes: as they were written. name, number: of the source."""

    raw: np.ndarray
    index: dict[str, np.ndarray]
    notes: dict[str, Any]
    name: str
    number: int
    _made: WeakValueDictionary[int, Example] = field(default_factory=WeakValueDictionary)

    @classmethod
    def load(cls, digest: str, name: str, number: int) -> Tokens | None:
        """What lies there under the digest; None if there is nothing, or it does not verify (CRCs, counts, the digest)."""
        try:
            with token_file(digest).open("rb") as file:
                found = cls._read(file, name, number)
                ids = np.memmap(file, dtype="<i4", mode="r", shape=found.raw.shape) if len(found.raw) else found.raw
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        found.raw = ids
        return found if found.notes.get("digest") == digest else None

    @classmethod
    def held(cls, raw: bytes | memoryview, name: str, number: int) -> Tokens:
        """Of a file that was written into memory."""
        found = cls._read(io.BytesIO(raw), name, number)
        found.raw = np.frombuffer(raw, dtype=np.uint8)[: found.raw.nbytes].view("<i4")
        return found

    @classmethod
    def _read(cls, file: Any, name: str, number: int) -> Tokens:
        """All but the ids, which are compared with their CRC. ValueError and others where something is wrong."""
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        at = int.from_bytes(file.read(8), "little")
        if not 0 <= at <= size - 8:
            raise ValueError("cut off")
        file.seek(at)
        with np.load(io.BytesIO(file.read(size - 8 - at)), allow_pickle=False) as kept:
            index = {key: kept[key] for key in kept.files}
        notes = json.loads(index.pop("notes").tobytes())
        names = index.pop("names")
        if any(a.dtype != np.int64 or a.ndim != 1 for a in index.values()) or index["lengths"].sum() * 4 != at:
            raise ValueError("not such an index")
        if index["segments"].sum() != len(index["lengths"]) or index["origins"].sum() != len(names):
            raise ValueError("not such an index")
        file.seek(0)
        crc, left = 0, at
        while left:
            chunk = file.read(min(CHUNK, left))
            crc, left = zlib.crc32(chunk, crc), left - len(chunk)
        if crc != notes["crc"]:
            raise ValueError("damaged")
        return cls(np.empty(at // 4, dtype="<i4"), index | {"names": names}, notes, name, number)

    def __len__(self) -> int:
        return len(self.index["rows"])

    @cached_property
    def dropped(self) -> list[Dropped]:
        return [Dropped(self.name + origin, reason) for origin, reason in self.notes["dropped"]]

    @cached_property
    def tokens(self) -> np.ndarray:
        """[rows]: of all segments of each."""
        return self._over_segments(np.add, self.index["lengths"])

    @cached_property
    def longest(self) -> np.ndarray:
        """[rows]: of each one's longest segment."""
        return self._over_segments(np.maximum, self.index["lengths"])

    @cached_property
    def targets(self) -> np.ndarray:
        """[rows]: supervised tokens of all segments of each."""
        return self._over_segments(np.add, self.index["targets"])

    def _over_segments(self, ufunc: np.ufunc, values: np.ndarray) -> np.ndarray:
        return ufunc.reduceat(values, self._firsts[:-1]) if len(self) else np.empty(0, np.int64)

    @cached_property
    def _firsts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.index["segments"])])

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.index["lengths"])])

    @cached_property
    def _origin_starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.index["origins"])])

    def origin(self, row: int) -> str:
        a, b = self._origin_starts[row : row + 2]
        return self.name + self.index["names"][a:b].tobytes().decode("utf-8", "surrogatepass")

    def example(self, row: int) -> Example:
        """The same object as long as anybody holds it: what is known of a row is looked up by it."""
        if (made := self._made.get(row)) is None:
            first, *others = (self._segment(row, s) for s in range(*self._firsts[row : row + 2]))
            object.__setattr__(first, "others", tuple(others))
            made = self._made[row] = first
        return made

    def _segment(self, row: int, segment: int) -> Example:
        a, b = self._starts[segment : segment + 2]
        raw = self.raw[a:b]
        supervised = raw < 0
        ids = np.where(supervised, ~raw, raw).astype(np.int32, copy=False)
        role = self.notes["roles"][self.index["roles"][segment]]
        return Example(ids, supervised, self.origin(row), (self.number, int(self.index["rows"][row])), role)


class Examples(Sequence[Example]):
    """Examples of several sources, in any order and number; each is made when it is asked for.

    parts: the sources' rows. places: int64 [n], the rows, counted over all parts. tokens, longest, targets: int64 [n], as of `Example`.
    """

    def __init__(self, parts: Sequence[Tokens], places: np.ndarray | None = None):
        self.parts = tuple(parts)
        self._stops = np.cumsum([len(p) for p in self.parts], dtype=np.int64)
        self.places = np.arange(self._stops[-1] if len(self.parts) else 0) if places is None else places

    @classmethod
    def joined(cls, several: Sequence[Examples]) -> Examples:
        """One after the other."""
        places, n = [np.empty(0, np.int64)], 0
        for one in several:
            places.append(one.places + n)
            n += sum(map(len, one.parts))
        return cls([p for one in several for p in one.parts], np.concatenate(places))

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> Examples: ...
    def __getitem__(self, at: int | slice) -> Example | Examples:
        if isinstance(at, slice):
            return Examples(self.parts, self.places[at])
        part, row = self._found(at)
        return part.example(row)

    def __iter__(self) -> Iterator[Example]:
        return map(self.__getitem__, range(len(self)))

    def origin(self, at: int) -> str:
        part, row = self._found(at)
        return part.origin(row)

    def _found(self, at: int) -> tuple[Tokens, int]:
        place = int(self.places[at])
        n = int(np.searchsorted(self._stops, place, side="right"))
        return self.parts[n], place - (int(self._stops[n - 1]) if n else 0)

    @cached_property
    def tokens(self) -> np.ndarray:
        return self._each([p.tokens for p in self.parts])

    @cached_property
    def longest(self) -> np.ndarray:
        return self._each([p.longest for p in self.parts])

    @cached_property
    def targets(self) -> np.ndarray:
        return self._each([p.targets for p in self.parts])

    def _each(self, values: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.empty(0, np.int64), *values])[self.places]
