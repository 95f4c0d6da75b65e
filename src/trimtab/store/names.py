"""Names of adapters in a store: `namespace/name@selector`. Knows text only, nothing of what a store holds.

A name is made of characters that mean nothing to a shell, a URL or a file system, and it never becomes a path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.errors import AdapterError, nearest

WORD = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
NUMBER = re.compile(r"[1-9][0-9]{0,8}")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
LATEST = "latest"
"""The alias that every name has: its newest version. It is computed, never stored, so it cannot go stale."""
RULE = "small letters, digits, '.', '_' and '-', at most 63, a letter or digit first"


class NoSuchAdapter(AdapterError):
    """A store does not hold what was asked for."""

    http_status = 404


@dataclass(frozen=True)
class Ref:
    """`acme/support@3`. selector: "" or "latest" for the newest, a version's number, an alias, or a manifest's "sha256:<hex>"."""

    namespace: str
    name: str
    selector: str = ""

    def __post_init__(self) -> None:
        problems = [f"{part!r} is no {what}" for what, part in (("namespace", self.namespace), ("name", self.name)) if not is_word(part)]
        if self.selector and not (is_word(self.selector) or DIGEST.fullmatch(self.selector)):
            problems.append(f"{self.selector!r} is no version, alias or digest")
        if self.selector.isdigit() and not NUMBER.fullmatch(self.selector):
            problems.append(f"{self.selector!r} is no version: they count from 1, without leading zeros")
        if problems:
            fix = f"write namespace/name or namespace/name@version, as in acme/support@3; each part: {RULE}"
            raise AdapterError(f"{short(str(self))} is not a name in a store", problems=[short(p, 160) for p in problems], fix=fix)

    @classmethod
    def parse(cls, text: str | Ref) -> Ref:
        """AdapterError if `text` has another form."""
        if isinstance(text, Ref):
            return text
        path, _, selector = text.partition("@")
        namespace, slash, name = path.partition("/")
        if not slash or text.endswith("@"):
            fix = "write namespace/name or namespace/name@version, as in acme/support@3"
            raise AdapterError(f"{short(text)} is not a name in a store", fix=fix)
        return cls(namespace, name, selector)

    def __str__(self) -> str:
        return f"{self.path}@{self.selector}" if self.selector else self.path

    @property
    def path(self) -> str:
        """The name without its selector: `acme/support`."""
        return f"{self.namespace}/{self.name}"

    @property
    def number(self) -> int | None:
        """The version's number where the selector is one."""
        return int(self.selector) if NUMBER.fullmatch(self.selector) else None

    def at(self, selector: str | int) -> Ref:
        """The same name with another selector."""
        return replace(self, selector=str(selector))


def parse_name(text: str | Ref) -> Ref:
    """A name without a selector. AdapterError if it has one, or another form."""
    ref = Ref.parse(text)
    if ref.selector:
        raise AdapterError(f"{ref}: a name without a version is expected here", fix=f"write {ref.path}: the store counts versions itself")
    return ref


def check_alias(alias: str) -> str:
    """The alias. AdapterError if it is none, all digits, or "latest", which moves by itself."""
    if alias == LATEST:
        raise AdapterError(
            f"the alias {LATEST!r} always stands for the newest version and cannot be set or removed",
            fix="choose another alias, such as prod",
        )
    if not is_word(alias) or alias.isdigit():
        raise AdapterError(f"{short(alias)} is no alias", fix=f"{RULE}; not digits alone, which are versions")
    return alias


def check_aliases(aliases: Sequence[str]) -> list[str]:
    """The aliases, each checked. AdapterError if they are one string, whose letters would be aliases of their own."""
    if isinstance(aliases, str):
        raise AdapterError(f"aliases = {aliases!r} is not a list", fix=f"write aliases=[{aliases!r}]")
    return [check_alias(a) for a in aliases]


def is_word(text: str) -> bool:
    return WORD.fullmatch(text) is not None


def is_reference(text: str | Path) -> bool:
    """Whether `text` names an adapter in a store, not a folder: it has the form `namespace/name[@selector]` and there is no such folder."""
    if not isinstance(text, str) or os.path.lexists(text):
        return False
    try:
        Ref.parse(text)
    except AdapterError:
        return False
    return True


def default_root() -> Path:
    """Where the store is unless told otherwise: `$TRIMTAB_STORE`, else `trimtab/store` in `$XDG_DATA_HOME` or `~/.local/share`."""
    named = os.environ.get("TRIMTAB_STORE")
    if named:
        return Path(named).expanduser().absolute()
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share").absolute() / "trimtab" / "store"


def missing(ref: Ref, known: Iterable[str], where: str) -> NoSuchAdapter:
    """The error for a name that is not among the `known` paths. It names the nearest of them, of those that share a part with it."""
    near = [p for p in known if p.startswith(f"{ref.namespace}/") or p.endswith(f"/{ref.name}") or p[:1] == ref.path[:1]][:1000]
    return NoSuchAdapter(
        f"no such adapter {str(ref)!r} in the store {where}{nearest(ref.path, near)}", fix="`trimtab adapters list` shows what there is"
    )


def short(text: str, most: int = 80) -> str:
    """Text from a stranger for a message: quoted if it is not plain, and cut if it is long."""
    shown = text if text.isprintable() and text == text.strip() else repr(text)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def short_repr(value: Any) -> str:
    """A value from a file for a message, cut if it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
