"""`trimtab.json`: what an adapter folder knows beside peft's two files, and whether it fits the base at hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from trimtab.errors import AdapterError
from trimtab.methods import METHODS, Head, Method
from trimtab.store.config_read import type_problems
from trimtab.version import __version__

if TYPE_CHECKING:
    from trimtab.model import Base

FORMAT = 1
_TOKENIZERS: WeakKeyDictionary[Any, tuple[int, str]] = WeakKeyDictionary()
"""tokenizer -> (its size, its digest): hashing a large vocabulary takes longer than loading an adapter."""


def make_note(
    method: Method, base: Base, files: Mapping[str, str], run: Mapping[str, Any] | None, head: Head | None = None
) -> dict[str, Any]:
    """files: name -> "sha256:…". run: settings, metrics, the data's digest; whatever JSON can hold."""
    return {
        "format": FORMAT,
        "trimtab": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "method": method.name,
        "peft_type": method.peft_type,
        "fields": method.to_dict(),
        "base": {"name": base.name or None, "fingerprint": base.fingerprint or None}
        | ({"quantized": found} if (found := base.packed_as) else {}),
        **({"head": head.to_dict()} if head else {}),
        **_digests(base),
        "files": dict(files),
        "run": _plain(run or {}),
    }


def _digests(base: Base) -> dict[str, str | None]:
    from trimtab.bases import template_digest, tokenizer_digest

    if base.tokenizer is None:
        return {"tokenizer": None, "chat_template": None}
    known = _TOKENIZERS.get(base.tokenizer)
    if known is None or known[0] != len(base.tokenizer):
        known = _TOKENIZERS[base.tokenizer] = len(base.tokenizer), tokenizer_digest(base.tokenizer)
    return {"tokenizer": known[1], "chat_template": template_digest(base.tokenizer)}


def _plain(value: Any) -> Any:
    """JSON values; numbers that JSON lacks become null, so that a loss that was not finite does not lose the adapter."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    raise AdapterError(f"run information of type {type(value).__name__} cannot be saved", fix="pass numbers, strings, lists and dicts")


def method_of(note: Mapping[str, Any], where: str) -> Method:
    """The method that a note describes. AdapterError if trimtab has none like it."""
    kind, fields = note.get("peft_type"), note.get("fields")
    if note.get("format") != FORMAT:
        raise AdapterError(f"{where}: trimtab.json has format {note.get('format')!r}; this version reads {FORMAT}", fix="update trimtab")
    if not isinstance(kind, str) or kind not in METHODS or not isinstance(fields, dict):
        raise AdapterError(
            f"{where}: trimtab.json names no method that trimtab has (peft_type = {kind!r})", fix=f"methods there are: {', '.join(METHODS)}"
        )
    if problems := type_problems(METHODS[kind], fields):
        raise AdapterError(f"{where}: trimtab.json cannot be used", problems=problems, fix="fetch or copy the adapter anew")
    return METHODS[kind].from_dict(fields, where=f"{where}: trimtab.json")


def head_of(note: Mapping[str, Any], where: str) -> Head | None:
    """The head that a note describes; None where it has none. AdapterError if it cannot be read."""
    if note.get("head") is None:
        return None
    head = Head.from_dict(note["head"])
    if head is None:
        raise AdapterError(f"{where}: trimtab.json describes a head that cannot be read", fix="fetch or copy the adapter anew")
    return head


def fit_problems(note: Mapping[str, Any], base: Base) -> list[str]:
    """What says that an adapter was made for another base, tokenizer or chat template; only what both sides know is compared."""
    problems = [] if base.base_differs else other_base(note, base)
    mine = _digests(base)
    consequences = {"tokenizer": "the same text would give other tokens", "chat_template": "prompts would not look as they did in training"}
    for key, consequence in consequences.items():
        if note.get(key) and mine[key] and note[key] != mine[key]:
            problems.append(f"{key}: it was trained with {note[key]}; this base has {mine[key]}, so {consequence}")
    return problems


def other_base(note: Mapping[str, Any], base: Base) -> list[str]:
    """That an adapter was trained on a base of another fingerprint, in one line; no line where it was not, or one side does not know."""
    recorded, here, then = recorded_fingerprint(note), base.fingerprint or None, note.get("base") or {}
    if not (recorded and here and recorded != here):
        return []
    was, now = (f" in {form}" if form else "" for form in (then.get("quantized"), base.packed_as))
    trained = f"base: it was trained on {then.get('name') or 'a base'}{was} with fingerprint {recorded}"
    return [f"{trained}; this one, {base.name or 'unnamed'}{now}, has {here}"]


def recorded_fingerprint(note: Mapping[str, Any]) -> str | None:
    base = note.get("base")
    found = base.get("fingerprint") if isinstance(base, dict) else None
    return found if isinstance(found, str) else None
