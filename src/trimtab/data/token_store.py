"""Tokenised rows of a source in one file: written while the source is read. Each row is read from it when it is used.

    ids       int32, those of all segments, one after the other; ~id where the token is supervised. Tokens that a segment shares with the
              one before it are not repeated
    index     .npz: lengths (without them), shared, targets and roles of the segments; rows, their origins; contents, a hash of each row
              that was read, in order; what was dropped and noted
    the end   LAYOUT, where the index begins, and the CRC-32 of all bytes before it

Files lie in the cache under the digest of everything that decides their content, so that the next run, a run after a crash, or training
after `check` need neither read nor tokenise the rows again (LlamaFactory#3939). Origins are kept without the name of the source, since the
same rows may be in another file next time. A file that does not verify is ignored and written again. It is not mapped into memory: if
somebody cuts off a mapped file, the next look at it kills the process. Here that is an error which names the file.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, overload
from weakref import WeakValueDictionary, finalize

import numpy as np

from trimtab.bases.cache import cache_dir
from trimtab.data.examples import Example
from trimtab.data.rows import Dropped
from trimtab.errors import DataError

LAYOUT = b"tokens 3"
"""Another one where the file's parts change: files of other versions are not read."""
PLACE, CRC = struct.Struct("<8sQ"), struct.Struct("<I")
CHUNK = 1 << 20
Between = Callable[[int, int], bytes | memoryview]
"""Gives the bytes of a file from one place up to another."""


def token_file(digest: str) -> Path:
    """Where the tokens of a source with this "sha256:…" lie."""
    return cache_dir() / "tokens" / f"{digest.removeprefix('sha256:')}.tokens"


class TokenWriter:
    """Writes such a file, batch by batch. name: of the source, with which origins begin."""

    def __init__(self, out: BinaryIO, name: str):
        self._out, self._name, self._crc = out, name, 0
        self._numbers: dict[str, array[int]] = {
            key: array("q") for key in ("lengths", "shared", "targets", "roles", "segments", "rows", "origins")
        }
        self._origins = bytearray()
        self._contents = bytearray()
        self._roles: dict[str, int] = {}

    def add(self, examples: Sequence[Example]) -> None:
        """The next rows."""
        if not examples:
            return
        numbers, segments = self._numbers, [s for example in examples for s in example.segments]
        ids = np.concatenate([s.ids[s.shared :] for s in segments])
        supervised = np.concatenate([s.supervised[s.shared :] for s in segments])
        self._put(np.where(supervised, ~ids, ids).astype("<i4", copy=False).tobytes())
        lengths = [len(s.ids) - s.shared for s in segments]
        numbers["lengths"].extend(lengths)
        numbers["shared"].extend([s.shared for s in segments])
        counted = np.concatenate([[0], np.cumsum(supervised)])[np.cumsum([0, *lengths])]
        numbers["targets"].extend(np.diff(counted).tolist())
        numbers["roles"].extend([self._roles.setdefault(s.role, len(self._roles)) for s in segments])
        numbers["segments"].extend([len(example.segments) for example in examples])
        numbers["rows"].extend([example.row[1] for example in examples])
        origins = [self._behind_name(example.origin).encode("utf-8", "surrogatepass") for example in examples]
        numbers["origins"].extend(map(len, origins))
        self._origins += b"".join(origins)

    def read(self, contents: Sequence[bytes]) -> None:
        """Count a row that was read, whatever becomes of it. contents: of its segments."""
        self._contents += hashlib.blake2b(b"".join(contents), digest_size=8).digest()

    def finish(self, digest: str, key: str, dropped: Sequence[Dropped], said: Sequence[str]) -> None:
        """The index. digest: the file's. key: of the rows and all that decides their tokens. said: notes, without the source's name."""
        lost = [(self._behind_name(d.origin), d.reason) for d in dropped]
        notes = {"digest": digest, "key": key, "dropped": lost, "said": said, "roles": list(self._roles)}
        index = io.BytesIO()
        arrays: dict[str, Any] = {key: np.array(numbers, dtype=np.int64) for key, numbers in self._numbers.items()}
        arrays["contents"] = np.frombuffer(bytes(self._contents), dtype="<u8")
        arrays["names"] = np.array(self._origins, dtype=np.uint8)
        arrays["notes"] = np.frombuffer(json.dumps(notes).encode(), dtype=np.uint8)
        np.savez(index, **arrays)
        self._put(index.getbuffer())
        self._put(PLACE.pack(LAYOUT, 4 * sum(self._numbers["lengths"])))
        self._out.write(CRC.pack(self._crc))

    def _put(self, raw: bytes | memoryview) -> None:
        self._out.write(raw)
        self._crc = zlib.crc32(raw, self._crc)

    def _behind_name(self, origin: str) -> str:
        if not origin.startswith(self._name):
            raise AssertionError(f"{origin} does not begin with {self._name}")
        return origin.removeprefix(self._name)


@dataclass(eq=False)
class Tokens:
    """The rows of such a file. between: its bytes. index: its arrays. notes: as they were written. name, number: of the source."""

    between: Between
    index: dict[str, np.ndarray]
    notes: dict[str, Any]
    name: str
    number: int
    _made: WeakValueDictionary[int, Example] = field(default_factory=WeakValueDictionary)

    @classmethod
    def load(cls, digest: str, name: str, number: int) -> Tokens | None:
        """What lies there under the digest; None if there is nothing, or it does not verify (layout, CRC, the digest)."""
        file = token_file(digest)
        try:
            handle = os.open(file, os.O_RDONLY)
        except OSError:
            return None
        try:
            found = cls.read(_between(handle, file), os.fstat(handle).st_size, name, number)
        except (OSError, DataError):
            os.close(handle)
            return None
        finalize(found, os.close, handle)
        return found if found.notes["digest"] == digest else None

    @classmethod
    def read(cls, between: Between, size: int, name: str, number: int) -> Tokens:
        """Of a file of so many bytes. DataError where it is not one that a `TokenWriter` has finished."""
        end, crc = size - CRC.size, 0
        for start in range(0, end, CHUNK):
            crc = zlib.crc32(between(start, min(start + CHUNK, end)), crc)
        if end < PLACE.size or CRC.pack(crc) != between(end, size):
            raise DataError("tokens that are damaged or not finished")
        layout, at = PLACE.unpack(between(end - PLACE.size, end))
        if layout != LAYOUT:
            raise DataError("tokens in the layout of another version")
        with np.load(io.BytesIO(between(at, end - PLACE.size)), allow_pickle=False) as kept:
            index = dict(kept)
        return cls(between, index, json.loads(index.pop("notes").tobytes()), name, number)

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
        return self._over_segments(np.maximum, self.index["lengths"] + self.index["shared"])

    @cached_property
    def targets(self) -> np.ndarray:
        """[rows]: supervised tokens of all segments of each."""
        return self._over_segments(np.add, self.index["targets"])

    def targets_of(self, role: str) -> np.ndarray:
        """[rows]: supervised tokens of their segments with this role."""
        roles = self.notes["roles"]
        which = roles.index(role) if role in roles else -1
        return self._over_segments(np.add, np.where(self.index["roles"] == which, self.index["targets"], 0))

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
            found = list[Example]()
            for s in range(*self._firsts[row : row + 2]):
                found.append(self._segment(row, s, found[-1] if found else None))
            first, *others = found
            object.__setattr__(first, "others", tuple(others))
            made = self._made[row] = first
        return made

    def _segment(self, row: int, segment: int, before: Example | None) -> Example:
        a, b = (4 * self._starts[segment : segment + 2]).tolist()
        raw = np.frombuffer(self.between(a, b), dtype="<i4")
        supervised = raw < 0
        ids = np.where(supervised, ~raw, raw).astype(np.int32, copy=False)
        if before is not None and (shared := int(self.index["shared"][segment])):
            ids = np.concatenate([before.ids[:shared], ids])
            supervised = np.concatenate([np.zeros(shared, dtype=bool), supervised])
        else:
            shared = 0
        role = self.notes["roles"][self.index["roles"][segment]]
        return Example(ids, supervised, self.origin(row), (self.number, int(self.index["rows"][row])), role, shared=shared)


def _between(handle: int, file: Path) -> Between:
    """The bytes of an open file."""

    def between(start: int, stop: int) -> bytes:
        raw = os.pread(handle, stop - start, start)
        if len(raw) < stop - start:
            raise DataError(f"{file} was cut off while it was used", fix="start again: the file is written anew.")
        return raw

    return between


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

    @cached_property
    def roles(self) -> list[str]:
        """Of segments: each that some row has."""
        return list(dict.fromkeys(role for p in self.parts for role in p.notes["roles"]))

    def targets_of(self, role: str) -> np.ndarray:
        """int64 [n]: supervised tokens of each one's segments with this role."""
        return self._each([p.targets_of(role) for p in self.parts])

    def _each(self, values: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.empty(0, np.int64), *values])[self.places]
