"""`index.json`: which names a store has, their versions and aliases. Text to tables and back; knows no disk and no blobs.

It is a flat OCI image index: one descriptor for each version, with org.opencontainers.image.ref.name "acme/support@3", and one for each
alias, "acme/support@prod", so that `skopeo copy oci:STORE:acme/support@prod …` finds both. Annotations of our own say more: which version
an alias stands for (two versions may hold the same files); the highest number that a name has had, where that version is gone, since
numbers are never used again; which namespaces have a name; and a check of each entry, so that a flipped bit does not make one name another.
Entries that other tools have written have no check.

Each annotation and each entry is a line, and the lines are sorted, so that `sorted_index` finds a name without reading the others. The
first line says how long the file is: where that is wrong, somebody else has changed the file, and it is read whole.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from zlib import crc32

from trimtab.errors import nearest
from trimtab.store.files import Refusal, parse_json
from trimtab.store.manifest import ARTIFACT_TYPE, INDEX_TYPE, MANIFEST_TYPE, parse_descriptor
from trimtab.store.names import LATEST, NUMBER, WORD, NoSuchAdapter, Ref, missing, short

REF_NAME = "org.opencontainers.image.ref.name"
ALIAS_OF = "io.trimtab.version"
CHECK = "io.trimtab.check"
SIZE = "io.trimtab.size"
LAST = "io.trimtab.last/"
"""Before a name's path: an annotation of the index, the highest number that the name has had and a check."""
NAME = "io.trimtab.name/"
"""Before "support/acme": an annotation of the index, there is acme/support. Its value is a check."""
MAX_INDEX_BYTES = 2**30
REF = re.compile(rf"({WORD.pattern}/{WORD.pattern})@({WORD.pattern})")
HEAD = f'{{"schemaVersion":2,"mediaType":"{INDEX_TYPE}","annotations":{{"{SIZE}":"'
DIGITS, LINE = 15, 2**11
"""Of the size, which stands behind HEAD. No line but the first, which has other tools' annotations, is longer than LINE bytes."""
MIDDLE, END = '},"manifests":[\n', "]}\n"


class Entry(NamedTuple):
    """The blob of a version's manifest."""

    digest: str
    size: int


@dataclass(frozen=True)
class Name:
    """versions: by number. aliases: to numbers; "latest" is not among them. last: the highest number that was ever given."""

    path: str
    versions: Mapping[int, Entry] = field(default_factory=dict)
    aliases: Mapping[str, int] = field(default_factory=dict)
    last: int = 0

    @property
    def newest(self) -> int:
        return max(self.versions)

    def aliases_of(self, number: int) -> tuple[str, ...]:
        """The aliases of a version, "latest" last."""
        own = tuple(sorted(a for a, n in self.aliases.items() if n == number))
        return (*own, LATEST) if number == self.newest else own

    def number(self, ref: Ref) -> int:
        """The version that a selector means. NoSuchAdapter if there is none."""
        selector = ref.selector
        if selector in ("", LATEST):
            return self.newest
        if ref.number is not None:
            found = ref.number if ref.number in self.versions else None
        elif selector.startswith("sha256:"):
            found = max((n for n, e in self.versions.items() if e.digest == selector), default=None)
        else:
            found = self.aliases.get(selector)
        if found is None:
            here = ", ".join(map(str, sorted(self.versions)[-20:]))
            hint = nearest(selector, self.aliases)
            raise NoSuchAdapter(f"no such version {str(ref)!r}{hint}", fix=f"versions there are: {here}; aliases: {self._shown_aliases}")
        return found

    def published(self, entry: Entry) -> Name:
        """With one more version, unless the newest is the same already. A number that was removed does not come again."""
        if self.versions and self.versions[self.newest] == entry:
            return self
        return replace(self, versions={**self.versions, self.last + 1: entry}, last=self.last + 1)

    def aliased(self, alias: str, number: int) -> Name:
        return replace(self, aliases={**self.aliases, alias: number})

    def without_alias(self, alias: str) -> Name:
        return replace(self, aliases={a: n for a, n in self.aliases.items() if a != alias})

    def without(self, number: int) -> Name:
        return replace(self, versions={n: e for n, e in self.versions.items() if n != number})

    @property
    def _shown_aliases(self) -> str:
        return ", ".join([*sorted(self.aliases), LATEST])

    @property
    def entries(self) -> str:
        """Its lines among the entries of index.json. Names, digests and numbers hold nothing that JSON would escape."""
        found = [_line(e, f"{self.path}@{n}", "") for n, e in sorted(self.versions.items())]
        return "".join(found + [_line(self.versions[n], f"{self.path}@{a}", str(n)) for a, n in sorted(self.aliases.items())])

    @property
    def last_line(self) -> str:
        """Its line among the highest numbers, which it has if that version is gone."""
        gone = self.last > max(self.versions, default=0)
        return f',"{LAST}{self.path}":"{self.last} {check(self.path, self.last)}"\n' if gone else ""

    @property
    def name_line(self) -> str:
        """Its line among the names, by which namespaces are found."""
        return f',"{NAME}{turned(self.path)}":"{check(turned(self.path))}"\n' if self.versions else ""


def turned(path: str) -> str:
    """`support/acme` of `acme/support`, and back."""
    one, _, other = path.partition("/")
    return f"{other}/{one}"


def _line(entry: Entry, ref: str, alias_of: str) -> str:
    """With the comma before it."""
    annotations = f'"{REF_NAME}":"{ref}",' + (f'"{ALIAS_OF}":"{alias_of}",' if alias_of else "")
    annotations += f'"{CHECK}":"{check(ref, *entry, alias_of)}"'
    return f',{{"mediaType":"{MANIFEST_TYPE}","digest":"{entry.digest}","size":{entry.size},"annotations":{{{annotations}}}}}\n'


def check(*facts: str | int) -> str:
    """Against accidents only: whoever can write the index can compute it."""
    return f"{crc32(' '.join(map(str, facts)).encode()):08x}"


@dataclass(frozen=True)
class Index:
    """names: by path, those without a version included, of which only the last number is kept. annotations: those that are not ours."""

    names: Mapping[str, Name] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)

    def find(self, ref: Ref, where: str) -> Name:
        """The name that a reference means. NoSuchAdapter, with the nearest name, where there is none."""
        name = self.names.get(ref.path)
        if name is None or not name.versions:
            raise missing(ref, (p for p, n in self.names.items() if n.versions), where)
        return name

    def with_name(self, name: Name) -> Index:
        return replace(self, names={**self.names, name.path: name})

    @property
    def live(self) -> list[Name]:
        """Names that have a version, in the order of their paths."""
        return [self.names[path] for path in sorted(self.names) if self.names[path].versions]

    def to_bytes(self) -> bytes:
        names = [self.names[path] for path in sorted(self.names)]
        own = "".join(f",{json.dumps(k)}:{json.dumps(v)}" for k, v in self.annotations.items())
        by_name = sorted(names, key=lambda n: turned(n.path))
        annotations = "".join([*(n.last_line for n in names), *(n.name_line for n in by_name)])
        entries = "".join(n.entries for n in names)
        text = f'"{own}\n{annotations}{MIDDLE}{f" {entries[1:]}" if entries else ""}{END}'
        return f"{HEAD}{len(HEAD) + DIGITS + len(text):0{DIGITS}}{text}".encode()


def is_sorted(head: bytes, size: int) -> bool:
    """Whether a file of that size, which begins like this, is as it was written here: its lines are sorted."""
    return head.startswith(f'{HEAD}{size:0{DIGITS}}"'.encode())


def parse_index(data: bytes, what: str = "index.json") -> tuple[Index, list[str]]:
    """The index, and everything in it that cannot be. Where there is any, the index must not be trusted, and never be written back."""
    index, problems = _parse(data)
    if not problems and is_sorted(data[:LINE], len(data)) and index.to_bytes() != data:
        problems.append("index.json is damaged: its lines are not as they were written")
    return index, [p.replace("index.json", what, 1) for p in problems]


def _parse(data: bytes) -> tuple[Index, list[str]]:
    try:
        document = parse_json(data, "index.json")
    except Refusal as reason:
        return Index(), [str(reason)]
    problems = [
        f"index.json has the unknown key {short(k)}"
        for k in document
        if k not in ("schemaVersion", "mediaType", "annotations", "manifests")
    ]
    if document.get("schemaVersion") != 2 or document.get("mediaType", INDEX_TYPE) != INDEX_TYPE:
        problems.append("index.json is not an OCI image index of schema version 2")
    entries, annotations = document.get("manifests"), document.get("annotations", {})
    if not isinstance(entries, list):
        return Index(), [*problems, "index.json has no list of manifests"]
    if not isinstance(annotations, dict) or not all(isinstance(v, str) for v in annotations.values()):
        return Index(), [*problems, "index.json: annotations are not a map of strings"]
    versions: dict[str, dict[int, Entry]] = {}
    aliases: dict[str, dict[str, tuple[Entry, str | None]]] = {}
    for value in entries:
        found = _read_entry(value)
        if isinstance(found, str):
            problems.append(f"index.json: {found}")
            continue
        path, selector, entry, alias_of = found
        numbered = NUMBER.fullmatch(selector) is not None
        known: dict[Any, Any] = versions.setdefault(path, {}) if numbered else aliases.setdefault(path, {})
        key: Any = int(selector) if numbered else selector
        if key in known:
            problems.append(f"index.json has {path}@{selector} twice")
        known[key] = entry if numbered else (entry, alias_of)
    last, own = _read_last(annotations, problems)
    names = {}
    for path in sorted({*versions, *aliases, *last}):
        mine = versions.get(path, {})
        meant = {a: _alias(path, a, e, n, mine, problems) for a, (e, n) in aliases.get(path, {}).items()}
        highest = max([last.get(path, 0), *mine])
        names[path] = Name(path, mine, {a: n for a, n in meant.items() if n is not None}, highest)
    return Index(names, own), problems


def _read_entry(value: Any) -> tuple[str, str, Entry, str | None] | str:
    """(path, selector, entry, what an alias says it stands for), or what is wrong."""
    plain = {k: v for k, v in value.items() if k != "artifactType"} if isinstance(value, dict) else value
    found = parse_descriptor(plain)
    if isinstance(found, str):
        return f"an entry's {found}"
    ref = found.annotations.get(REF_NAME)
    if ref is None:
        return f"the entry {found.digest} has no name: copy it again to oci:FOLDER:namespace/name@1"
    match = REF.fullmatch(ref)
    if match is None or (match[2].isdigit() and not NUMBER.fullmatch(match[2])):
        return f"{short(repr(ref))} is not namespace/name@version or namespace/name@alias"
    if match[2] == LATEST:
        return f"{ref} is an entry, but {LATEST} is always computed"
    if found.media_type != MANIFEST_TYPE or value.get("artifactType", ARTIFACT_TYPE) != ARTIFACT_TYPE:
        return f"{ref} is not a manifest of an adapter"
    entry, alias_of = Entry(found.digest, found.size), found.annotations.get(ALIAS_OF)
    if found.annotations.get(CHECK) not in (None, check(ref, *entry, alias_of or "")):
        return f"the entry {ref} is damaged: it does not agree with its own check"
    return match[1], match[2], entry, alias_of


def _read_last(annotations: Mapping[str, str], problems: list[str]) -> tuple[dict[str, int], dict[str, str]]:
    """(the highest number by path, annotations that are not ours)."""
    last: dict[str, int] = {}
    own: dict[str, str] = {}
    for key, value in annotations.items():
        path = key.removeprefix(LAST)
        if key.startswith(NAME):
            if value != check(key.removeprefix(NAME)):
                problems.append(f"index.json: the annotation {short(repr(key))} = {short(repr(value))} is damaged")
        elif path == key:
            own |= {} if key == SIZE else {key: value}
        elif NUMBER.fullmatch(number := value.partition(" ")[0]) is None or value != f"{number} {check(path, number)}":
            problems.append(f"index.json: the annotation {short(repr(key))} = {short(repr(value))} is damaged")
        else:
            last[path] = int(number)
    return last, own


def _alias(path: str, alias: str, entry: Entry, said: str | None, versions: Mapping[int, Entry], problems: list[str]) -> int | None:
    """The number of the version that an alias stands for: what it says, if it says so; else the newest that holds the same."""
    same = [n for n, e in versions.items() if e == entry]
    if said is None and same:
        return max(same)
    if said is not None and NUMBER.fullmatch(said) and int(said) in same:
        return int(said)
    problems.append(f"index.json: {path}@{alias} stands for {said or ''} {entry.digest}, which is no version of {path}".replace("  ", " "))
    return None


def main() -> None:
    """index.json from standard input, with its lines sorted to standard output; what is wrong with it to standard error."""
    index, problems = parse_index(sys.stdin.buffer.read())
    if problems:
        sys.exit("\n".join(problems))
    sys.stdout.buffer.write(index.to_bytes())


if __name__ == "__main__":
    main()
