"""The names of a store as they are now: those of `index.json`, and over them `changes/`, where the last changes of a large store wait.

In a small store each change writes `index.json` anew. In a large one (SMALL_BYTES) it writes `changes/NAMESPACE@NAME.json`, an OCI image
index of that name alone, which counts instead of what index.json says of the name. When MOST of them wait, they are written into index.json
in one step and then removed: `fold`. So a change costs the same in a store of any size, and tools that know OCI layouts alone see the last
changes of a large store after the fold.

A reader looks for a name among the changes first, and then in index.json, which has a change before it is removed from there.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from heapq import merge
from itertools import islice
from threading import Lock

from trimtab.atomic import sync, take_name
from trimtab.store import index as index_module
from trimtab.store.blobs import Missing, open_regular, read_whole
from trimtab.store.files import Refusal, read_exactly
from trimtab.store.index import LINE, MAX_INDEX_BYTES, Index, is_sorted, parse_index
from trimtab.store.layout import Layout, Mark
from trimtab.store.name import Name
from trimtab.store.names import Ref, is_word, missing
from trimtab.store.sorted_index import SortedIndex

log = logging.getLogger(__name__)
WHOLE_BYTES = 2**16
"""An index of at most so many bytes is read and checked whole, which takes 2 ms."""
SMALL_BYTES = 2**21
"""An index of at most so many bytes, 6,000 names, is written with each change, which takes 3 ms."""
MOST = 512
"""Changes that wait at most."""
NEAR = 500
"""Paths from each of the places where a name that is missing may have been meant."""
END_OF_PATHS = "~"


def change_file(path: str) -> str:
    """Where the change of a name waits, beneath the root; `changed_path` gives its path by the file's name."""
    return f"changes/{path.replace('/', '@')}.json"


def changed_path(file: str) -> str | None:
    namespace, _, name = file.removesuffix(".json").partition("@")
    return f"{namespace}/{name}" if file.endswith(".json") and is_word(namespace) and is_word(name) else None


class Refs:
    """Any number of threads. What reads raises Refusal where something there cannot be."""

    def __init__(self, layout: Layout):
        self._layout, self._lock = layout, Lock()
        self._known: tuple[Mark, SortedIndex, bool] | None = None

    def get(self, path: str) -> Name | None:
        """A name, or what is left of one that has no version: its highest number."""
        changed = self.change(path)
        return self._index().get(path) if changed is None else changed

    def find(self, ref: Ref, where: str) -> Name:
        """The name that a reference means. NoSuchAdapter, with the nearest name, where there is none."""
        name = self.get(ref.path)
        if name is None or not name.versions:
            raise missing(ref, self._near(ref), where)
        return name

    def names(self, after: str = "", before: str = END_OF_PATHS) -> Iterator[Name]:
        """Names that have a version, of the paths between the two, in their order. Their highest numbers are not looked up."""
        waiting = {p for p in self.waiting() if after < p < before}
        known = ((n.path, n) for n in self._index().names(after, before))
        for path, name in merge(((p, None) for p in sorted(waiting)), known, key=lambda found: found[0]):
            if name is None:
                name = self.get(path)
            elif path in waiting:
                continue
            if name is not None and name.versions:
                yield name

    def namespaces(self) -> list[str]:
        waiting = {p.partition("/")[0] for p in self.waiting()}
        there = sorted({*waiting, *self._index().namespaces()})
        return [n for n in there if n not in waiting or next(self.names(f"{n}/", f"{n}0"), None)]

    def namespaces_of(self, name: str) -> list[str]:
        """The namespaces that have a name."""
        waiting = [namespace for namespace, _, other in (p.partition("/") for p in self.waiting()) if other == name]
        there = sorted({*waiting, *self._index().namespaces_of(name)})
        return [n for n in there if n not in waiting or ((found := self.get(f"{n}/{name}")) and found.versions)]

    def change(self, path: str) -> Name | None:
        """A name whose change waits."""
        file = change_file(path)
        try:
            data = read_whole(self._layout.root / file, MAX_INDEX_BYTES, file)
        except Missing:
            return None
        index, problems = parse_index(data, file, of=path)
        if problems:
            raise Refusal("\n".join(problems))
        return index.names[path]

    def waiting(self) -> list[str]:
        """The paths whose changes wait."""
        try:
            found = os.listdir(self._layout.changes)  # noqa: PTH208 - names
        except FileNotFoundError:
            return []
        return [path for name in found if (path := changed_path(name))]

    # ---- changing; under the lock of the layout ----

    def write(self, name: Name) -> None:
        """Commit a changed name."""
        if name == (self.get(name.path) or Name(name.path)):
            return
        waiting, (_, index, ours) = self.waiting(), self._opened()
        small = index.size <= SMALL_BYTES
        if small and not waiting:
            self._replace([name])
            return
        if not self._layout.changes.exists():
            self._layout.changes.mkdir()
            sync(self._layout.root)
        with self._layout.blobs.staging() as stage:
            take_name(stage.write([Index({name.path: name}).to_bytes()]).path, self._layout.root / change_file(name.path))
        if small or not ours or len({*waiting, name.path}) > MOST:
            try:
                self.fold()
            except (OSError, Refusal) as error:  # the change is made all the same
                log.warning("%s: the last changes cannot be written into index.json: %s", self._layout.root, error)

    def fold(self) -> None:
        """Write the changes that wait into index.json, and remove them."""
        if not self._layout.changes.exists():
            return
        waiting = self.waiting()
        self._replace([name for path in waiting if (name := self.change(path))])
        for path in waiting:
            (self._layout.root / change_file(path)).unlink()
        with suppress(OSError):
            self._layout.changes.rmdir()  # else there is something strange in it, which `verify` names
        # a change that came back after a power cut would count instead of what is written into index.json next
        sync(self._layout.changes if self._layout.changes.exists() else self._layout.root)

    def _replace(self, names: Sequence[Name]) -> None:
        with self._layout.blobs.staging() as stage:
            self._layout.write_index(self._index().changed(names), stage)

    # ---- index.json ----

    def _index(self) -> SortedIndex:
        return self._opened()[1]

    def _opened(self) -> tuple[Mark, SortedIndex, bool]:
        """The index as it is now, opened anew only where it has changed; and whether its lines are sorted on disk as well."""
        known, mark = self._known, self._layout.mark()
        if known is not None and known[0] == mark:
            return known
        with self._lock:
            if self._known is None or self._known[0] != self._layout.mark():
                self._layout.check_parts()
                self._known = self._open()
            return self._known

    def _open(self) -> tuple[Mark, SortedIndex, bool]:
        with open_regular(self._layout.index, "index.json") as (file, size):
            if size > MAX_INDEX_BYTES:
                raise Refusal(f"index.json has {size:,} bytes; at most {MAX_INDEX_BYTES:,} are read")
            mark, ours = Mark.of(os.fstat(file)), is_sorted(os.pread(file, LINE, 0), size)
            if size > WHOLE_BYTES and ours:
                return mark, SortedIndex.of(_File(file, size).read, size), ours
            if size > SMALL_BYTES:
                return mark, _sorted_elsewhere(file), ours
            data = read_exactly(file, size, "index.json")
        index, problems = parse_index(data)
        if problems:
            raise Refusal("\n".join(problems))
        data = data if ours else index.to_bytes()
        return mark, SortedIndex.of(lambda at, count: data[at : at + count], len(data)), ours

    def _near(self, ref: Ref) -> Iterator[str]:
        """Paths among which the nearest to one that is missing is looked for."""
        letter = ref.path[:1]
        ranges = (
            (f"{ref.namespace}/{ref.name[:1]}", f"{ref.namespace}0"),
            (f"{ref.namespace}/", f"{ref.namespace}0"),
            (letter, f"{letter}~"),
        )
        for after, before in ranges:
            yield from (name.path for name in islice(self.names(after, before), NEAR))
        yield from (f"{namespace}/{ref.name}" for namespace in self.namespaces_of(ref.name))


class _File:
    """A file that stays open, whatever its name means meanwhile, until nobody reads it any more."""

    def __init__(self, file: int, size: int):
        self._file, self._size = os.dup(file), size
        weakref.finalize(self, os.close, self._file)

    def read(self, at: int, count: int) -> bytes:
        data = os.pread(self._file, count, at)
        if len(data) < min(count, self._size - at):
            raise Refusal("index.json was changed while it was read")
        return data


def _sorted_elsewhere(file: int) -> SortedIndex:
    """A large index that another tool has written, sorted in a process of its own: in this one, other threads would wait for a second."""
    target = os.memfd_create("index", os.MFD_CLOEXEC)
    try:
        done = subprocess.run([sys.executable, "-m", index_module.__name__], stdin=file, stdout=target, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise Refusal(done.stderr.strip() or "index.json cannot be read")
        size = os.fstat(target).st_size
        return SortedIndex.of(_File(target, size).read, size)
    finally:
        os.close(target)
