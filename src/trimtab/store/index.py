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
from typing import Any

from trimtab.store.files import Refusal, parse_json
from trimtab.store.manifest import ARTIFACT_TYPE, INDEX_TYPE, MANIFEST_TYPE, parse_descriptor
from trimtab.store.name import ALIAS_OF, CHECK, LAST, NAME, REF_NAME, Entry, Name, check, turned
from trimtab.store.names import LATEST, NUMBER, WORD, Ref, missing, short

SIZE = "io.trimtab.size"
MAX_INDEX_BYTES = 2**30
REF = re.compile(rf"({WORD.pattern}/{WORD.pattern})@({WORD.pattern})")
HEAD = f'{{"schemaVersion":2,"mediaType":"{INDEX_TYPE}","annotations":{{"{SIZE}":"'
DIGITS, LINE = 15, 2**10
"""Of the size, which stands behind HEAD. No line but the first, which has other tools' annotations, is longer than LINE bytes."""
MIDDLE, END = '},"manifests":[\n', "]}\n"


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


def parse_index(data: bytes, what: str = "index.json", *, of: str | None = None) -> tuple[Index, list[str]]:
    """The index, and everything in it that cannot be. Where there is any, the index must not be trusted, and never be written back.

    of: the path of the one name that it must have, where it is a change of that name (`refs.py`).
    """
    index, problems = _parse(data)
    if not problems and is_sorted(data[:LINE], len(data)) and index.to_bytes() != data:
        problems.append("index.json is damaged: its lines are not as they were written")
    if not problems and of is not None and index.names.keys() != {of}:
        problems.append(f"index.json is not of {of}")
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
