"""A name of the store: its versions and aliases, and the lines that say so in `index.json`. Knows no disk and no other names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple
from zlib import crc32

from trimtab.errors import nearest
from trimtab.store.manifest import MANIFEST_TYPE
from trimtab.store.names import LATEST, NoSuchAdapter, Ref

REF_NAME = "org.opencontainers.image.ref.name"
ALIAS_OF = "io.trimtab.version"
CHECK = "io.trimtab.check"
LAST = "io.trimtab.last/"
"""Before a name's path: an annotation of the index, the highest number that the name has had and a check."""
NAME = "io.trimtab.name/"
"""Before "support/acme": an annotation of the index, there is acme/support. Its value is a check."""


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
