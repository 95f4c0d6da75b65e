"""`index.json` as it is written here, searched by halving: a name or a range of names is read without the others.

Each line has a key, and keys grow from line to line. A line is compared with its own check whenever it is looked at, so a damaged line is
refused and cannot lead the search astray.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile
from typing import NamedTuple

from trimtab.store.files import Refusal
from trimtab.store.index import DIGITS, END, HEAD, LINE, MIDDLE
from trimtab.store.manifest import MANIFEST_TYPE
from trimtab.store.name import ALIAS_OF, CHECK, LAST, NAME, REF_NAME, Entry, Name, check, turned

BLOCK, COPY = 2**16, 2**20
"""At most so much is read at once where lines are read one after the other, and where they are copied."""
ANNOTATION = re.compile(rf',"({re.escape(LAST)}|{re.escape(NAME)})([^"]+)":"(?:([0-9]+) )?([0-9a-f]{{8}})"')
ENTRY = re.compile(
    rf'[ ,]{{"mediaType":"{re.escape(MANIFEST_TYPE)}","digest":"(sha256:[0-9a-f]{{64}})","size":([0-9]+),"annotations":'
    rf'{{"{REF_NAME}":"([^"@]+)@([^"]+)",(?:"{ALIAS_OF}":"([0-9]+)",)?"{CHECK}":"([0-9a-f]{{8}})"}}}}'
)
LASTS, NAMES, ENTRIES, BEHIND = "1", "2", "4", "5"
"""A line's key begins with one of the first three, and a path follows. "3" is MIDDLE, "6" is END."""


class Line(NamedTuple):
    """One line. begin: its offset. last: of LASTS. The rest is of ENTRIES; alias_of: 0 for a version."""

    begin: int
    key: str
    last: int = 0
    selector: str = ""
    entry: Entry = Entry("", 0)
    alias_of: int = 0


class SortedIndex(NamedTuple):
    """read: (offset, count) -> bytes. size: of all. begin: of the second line; from there on a line has at most LINE bytes."""

    read: Callable[[int, int], bytes]
    size: int
    begin: int

    @classmethod
    def of(cls, read: Callable[[int, int], bytes], size: int) -> SortedIndex:
        begin = next((i for n in range(10, 31) if (i := read(0, min(2**n, size)).find(b"\n") + 1)), size)
        return cls(read, size, begin)

    def get(self, path: str) -> Name | None:
        """A name, or what is left of one that has no version: its highest number."""
        last = max((line.last for line in self._of(LASTS + path)), default=0)
        name = _name(path, list(self._of(ENTRIES + path)), last)
        return name if name.last else None

    def names(self, after: str, before: str) -> Iterator[Name]:
        """Names that have a version, of the paths between the two. Their highest numbers are not looked up."""
        found: list[Line] = []
        for line in self._lines(self._find(f"{ENTRIES}{after}\0")):
            if found and found[0].key != line.key:
                yield _name(found[0].key[1:], found)
                found = []
            if line.key >= ENTRIES + before:
                return
            found.append(line)

    def namespaces_of(self, name: str) -> list[str]:
        """The namespaces that have a name."""
        key = f"{NAMES}{name}/"
        return [line.key[len(key) :] for line in takewhile(lambda x: x.key.startswith(key), self._lines(self._find(key)))]

    def namespaces(self) -> Iterator[str]:
        """All, each found by a search behind the one before."""
        key = ENTRIES
        while (line := next(self._lines(self._find(key)))).key < BEHIND:
            yield (namespace := line.key[1:].partition("/")[0])
            key = f"{ENTRIES}{namespace}0"  # behind all of "namespace/…"

    def changed(self, names: Iterable[Name]) -> Iterator[bytes]:
        """The bytes of an index.json that says this of these names, and of all others what is said here."""
        edits = [(ENTRIES, ""), (BEHIND, "")]  # cuts: no piece that is copied has both entries and other lines
        for n in names:
            edits += (LASTS + n.path, n.last_line), (NAMES + turned(n.path), n.name_line), (ENTRIES + n.path, n.entries)
        pieces: list[tuple[str, tuple[int, int] | str]] = []  # (key, new lines, or old ones from one offset to another)
        at, before = len(HEAD) + DIGITS, ""
        for key, text in sorted(edits):
            begin = self._find(key)
            pieces += (before, (at, begin)), (key, text)
            at, before = next(line.begin for line in self._lines(begin) if line.key != key), key
        pieces.append((before, (at, self.size)))
        size = sum(len(p) if isinstance(p, str) else p[1] - p[0] for _, p in pieces)
        yield f"{HEAD}{len(HEAD) + DIGITS + size:0{DIGITS}}".encode()
        comma = b" "  # the first entry has none
        for key, piece in pieces:
            for i, chunk in enumerate(self._copied(*piece) if isinstance(piece, tuple) else [piece.encode()] if piece else []):
                if key.startswith(ENTRIES) and not i:
                    yield comma
                    yield chunk[1:]
                    comma = b","
                else:
                    yield chunk

    # ---- lines ----

    def _find(self, key: str) -> int:
        """Where the first line begins whose key is not less."""
        low, high = self.begin, self.size  # the line at low is the first, or one behind a line whose key is less
        while high - low > 2 * LINE:
            middle = (low + high) // 2
            block = self.read(middle, 2 * LINE)
            begin = block.find(b"\n") + 1
            end = block.find(b"\n", begin)
            if not 0 < begin < end:
                raise Refusal(f"index.json has no line behind byte {middle:,}")
            if middle + begin < high and _line(middle + begin, block[begin:end]).key < key:
                low = middle + end + 1
            else:
                high = middle
        return next(line.begin for line in self._lines(low, 2 * LINE) if line.key >= key)

    def _of(self, key: str) -> Iterator[Line]:
        return takewhile(lambda line: line.key == key, self._lines(self._find(key), LINE))

    def _lines(self, at: int, block: int = BLOCK) -> Iterator[Line]:
        """Lines from one that begins at an offset to the last."""
        rest, begin = b"", at
        while at < self.size:
            data = rest + self.read(at, min(block, self.size - at))
            at += len(data) - len(rest)
            *lines, rest = data.split(b"\n")
            for text in lines:
                yield _line(begin, text)
                begin += len(text) + 1
        raise Refusal("index.json has no end")

    def _copied(self, begin: int, end: int) -> Iterator[bytes]:
        for at in range(begin, end, COPY):
            yield self.read(at, min(COPY, end - at))


def _line(begin: int, data: bytes) -> Line:
    """Refusal if it is not as it was written."""
    text = data.decode("ascii", "replace")
    if found := ENTRY.fullmatch(text):
        digest, size, path, selector, alias_of, told = found.groups()
        if told == check(f"{path}@{selector}", digest, size, alias_of or ""):
            return Line(begin, ENTRIES + path, 0, selector, Entry(digest, int(size)), int(alias_of or 0))
    elif found := ANNOTATION.fullmatch(text):
        kind, path, last, told = found.groups()
        if told == (check(path, last) if last else check(path)) and (kind == LAST) == bool(last):
            return Line(begin, (LASTS if last else NAMES) + path, int(last or 0))
    elif text in (MIDDLE[:-1], END[:-1]):
        return Line(begin, "3" if text == MIDDLE[:-1] else "6")
    raise Refusal(f"index.json: the line at byte {begin:,} is damaged: it does not agree with its own check")


def _name(path: str, lines: Iterable[Line], last: int = 0) -> Name:
    versions = {int(x.selector): x.entry for x in lines if not x.alias_of}
    aliases = {x.selector: x.alias_of for x in lines if x.alias_of}
    if wrong := [a for a, n in aliases.items() if n not in versions]:
        raise Refusal(f"index.json: {path}@{wrong[0]} stands for no version of {path}")
    return Name(path, versions, aliases, max([last, *versions]))
