"""Which form a record has, by its columns; the keys that it may not have; what of it nothing uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from trimtab.bases.template import BadRow
from trimtab.data.keys import PAIRS, ROW_KEYS, flag, is_empty
from trimtab.data.turns import ROLES, listed, unused_keys
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
    found = {c or "a column without a name" for c in record.keys() - used if not (is_empty(record[c]) or _is_neutral(c, record[c]))}
    for name in FORMS[form]:
        column = columns.get(name, name)
        turns = listed(record[column], column) if form in ("messages", "conversations") else record[column]
        found |= unused_keys(turns, column)
        if name == FORMS[form][0] and isinstance(turns, list) and turns and _role(turns[0]) == "assistant":
            found.add(STARTS)
    return found


def _is_neutral(key: str, value: Any) -> bool:
    return ROW_KEYS[key].neutral(value) if key in ROW_KEYS else key == "label" and flag(value) is True


def _role(turn: Any) -> str | None:
    return ROLES.get(str(turn.get("role") or turn.get("from"))) if isinstance(turn, dict) else None


def check_columns(seen: Iterable[str], columns: Mapping[str, str], where: str, *, any_form: bool) -> None:
    """Raise DataError where `columns` names what is not there, or no record had a known form. seen: the columns that exist."""
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
    """BadRow where a key says something that cannot be honoured. A column that `columns` names is what the run file says it is."""
    mapped = set(columns.values())
    for key in record:
        if key not in ROW_KEYS or key in mapped or (key in PAIRS and not mapped.isdisjoint(PAIRS)):  # the other of a pair is unused
            continue
        if not ROW_KEYS[key].neutral(record[key]):
            raise BadRow(f"{key}: {ROW_KEYS[key].why}")
    label = record.get(columns.get("label", "" if "label" in mapped else "label"))
    if form == "text" and "text" not in columns and isinstance(label, str | int | float) and not is_empty(label):
        raise BadRow("text with a label: `columns` does not say that the label is the answer")
    if form != "label" and flag(label) is False:
        raise BadRow(f"label: {ROW_KEYS['kto_tag'].why}")
    if form not in OPTIONAL and not is_empty(record.get("history")) and "history" not in mapped:
        raise BadRow("history: it goes before a prompt or an instruction, and the row has neither")
