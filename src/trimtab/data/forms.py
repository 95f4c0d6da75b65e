"""Which form a record has, by its columns; the keys that it may not have; what of it nothing uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from trimtab.bases.template import BadRow
from trimtab.data.keys import PAIRS, ROW_KEYS, is_blank, is_empty, wanted
from trimtab.data.turns import ROLES, listed, talk_in, unasked, unused_keys
from trimtab.errors import DataError, nearest

FORMS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "label": ("text", "label"),
    "text": ("text",),
}
OPTIONAL: dict[str, tuple[str, ...]] = {"prompt": ("history",), "instruction": ("input", "history")}
"""Columns that a form takes beside `system`."""
COLUMNS = tuple(dict.fromkeys([*(n for needed in [*FORMS.values(), *OPTIONAL.values()] for n in needed), "system"]))
UNDERSTOOD = "messages | conversations | prompt + completion | instruction (+ input) + output | text | text + label (named in `columns`)"
STARTS = "an assistant turn before anything is asked"


def form_of(record: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """The form that a record has: by order of `FORMS`, filled before null columns. Where `columns` names a column of some form, only such
    forms count, the one that it names most of first: a row that lacks them is not another thing."""
    forms = _forms(frozenset(columns))
    for is_there in (lambda c: record.get(c) is not None and record[c] != [], lambda c: c in record):
        for form in forms:
            if all(is_there(columns.get(name, name)) for name in FORMS[form]):
                return form
    return None


@cache
def _forms(columns: frozenset[str]) -> list[str]:
    """The forms that count where a source names these columns, by order."""
    named = {form: sum(name in columns for name in needed) for form, needed in FORMS.items()}
    if "label" not in columns:
        return sorted((f for f in FORMS if f != "label" and (named[f] or not any(named.values()))), key=lambda f: -named[f])
    return sorted((f for f in FORMS if f != "text" and named[f]), key=lambda f: -named[f])


def used_columns(form: str | None, columns: Mapping[str, str]) -> set[str]:
    """The file's names of the columns that rows of a form are made of; of all forms that they may have where it is None."""
    forms = _forms(frozenset(columns)) if form is None else [form]
    return {columns.get(n, n) for f in forms for n in (*FORMS[f], *OPTIONAL.get(f, ()), "system")}


def unused(record: Mapping[str, Any], columns: Mapping[str, str], form: str) -> set[str]:
    """What a record of a form holds that its row does not say: columns, keys of messages, turns that answer nothing."""
    used = used_columns(form, columns)
    said = {key for key in record.keys() - used if not is_empty(record[key])}
    found = {c or "a column without a name" for c in said if not (c in ROW_KEYS and ROW_KEYS[c].neutral(record[c]))}
    if _kto(record, columns, form) is True:
        found.discard(columns.get("label", "label"))
    talk: list[Any] = []
    for name in FORMS[form]:
        column = columns.get(name, name)
        turns = listed(record[column], column) if form in ("messages", "conversations") else talk_in(record[column])
        found |= unused_keys(turns, column)
        talk += turns if isinstance(turns, list) else []
    return found | {STARTS} if unasked([_role(turn) for turn in talk]) else found


def _kto(record: Mapping[str, Any], columns: Mapping[str, str], form: str | None) -> bool | None:
    """What the row's `label` says as the mark of KTO: whether the answer is wanted; None if it is no such mark. A text has no answer.
    Where `columns` names all that the row is made of and not the label, a number is the id of a class: only words and booleans count."""
    label = record.get(columns.get("label", "" if "label" in columns.values() else "label"))
    if form in (None, "text", "label"):
        return None
    if "label" not in columns and all(name in columns for name in FORMS[form]) and not isinstance(label, bool) and _is_number(label):
        return None
    return wanted(label)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _role(turn: Any) -> str | None:
    return ROLES.get(str(turn.get("role") or turn.get("from"))) if isinstance(turn, dict) else None


def check_columns(seen: Iterable[str], columns: Mapping[str, str], where: str, *, any_form: bool) -> None:
    """Raise DataError if `columns` names what is not there, or no record had a known form. seen: the columns that exist."""
    seen = list(seen)
    problems = [f"columns: {name!r} is not one of ours{nearest(name, COLUMNS)}" for name in columns if name not in COLUMNS]
    problems += [
        f"columns: {name}: {c!r} does not exist{nearest(c, seen)}" for name, c in columns.items() if name in COLUMNS and c not in seen
    ]
    if not problems and any_form:
        return
    if not problems:
        problems = [f"column {c!r}{hint}" for c in seen if c not in COLUMNS and (hint := nearest(c, COLUMNS))]
        problems += [f"column {c!r}: {ROW_KEYS[c].why}" for c in seen if c in PAIRS]
    raise DataError(
        f"{where}: no training form found in its columns: {', '.join(seen) or 'none'}",
        problems=[*problems, f"understood: {UNDERSTOOD}"],
        fix="rename the columns, or map them, such as `columns: {prompt: question, completion: answer}` (our name: the file's name).",
    )


def refuse_keys(record: Mapping[str, Any], columns: Mapping[str, str], form: str | None) -> None:
    """BadRow if a key says something that cannot be honoured. A column that `columns` names is what the run file says it is."""
    mapped = set(columns.values())
    for key in record:
        if key not in ROW_KEYS or key in mapped or (key in PAIRS and not mapped.isdisjoint(PAIRS)):  # the other of a pair is unused
            continue
        if not ROW_KEYS[key].neutral(record[key]):
            raise BadRow(f"{key}: {ROW_KEYS[key].why}")
    label = record.get("label") if "label" not in mapped else None
    if form == "text" and "text" not in columns and isinstance(label, str | int | float) and not is_blank(label):
        raise BadRow("text with a label: `columns` does not say that the label is the answer")
    if _kto(record, columns, form) is False:
        raise BadRow(f"label: {ROW_KEYS['kto_tag'].why}")
    if form not in OPTIONAL and not is_empty(record.get("history")) and "history" not in mapped:
        raise BadRow("history: it goes before a prompt or an instruction, and the row has neither")
