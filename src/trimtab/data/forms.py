"""Which form a record has, by its columns; the keys that it may not have; what of it nothing uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache, lru_cache
from typing import Any

from trimtab.bases.template import BadRow
from trimtab.data.keys import PAIRS, ROW_KEYS, SETTING_KEYS, TOOL_KEYS, is_blank, is_empty, wanted
from trimtab.data.turns import BEFORE_ANY, ROLES, listed, talk_in, unasked, unused_keys
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
COLUMNS = tuple(dict.fromkeys([*(n for needed in [*FORMS.values(), *OPTIONAL.values()] for n in needed), "system", "tools"]))
FIELDS = {form: (*needed, *OPTIONAL.get(form, ()), "system", "tools") for form, needed in FORMS.items()}
"""Columns that rows of a form are made of."""
UNDERSTOOD = "messages | conversations | prompt + completion | instruction (+ input) + output | text | text + label (named in `columns`)"
PASSED = frozenset((*TOOL_KEYS, *SETTING_KEYS))
"""Keys of a row that a chat template gets."""
STARTS = "an assistant turn before anything is asked"


def form_of(record: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """The form that a record has: by order of `FORMS`, filled before null columns. Where `columns` names a column of some form, only such
    forms count, the one that it names most of first: a row that lacks them is not another thing."""
    if (form := plain_form(record, columns)) is not None:
        return form
    forms = _forms(frozenset(columns))
    for is_there in (lambda c: record.get(c) is not None and record[c] != [], lambda c: c in record):
        for form in forms:
            if all(is_there(columns.get(name, name)) for name in FORMS[form]):
                return form
    return None


def plain_form(record: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """The form of records with such keys, where only one is possible and each key is a column of it; else None."""
    return _plain(tuple(record), tuple(columns.items()))


@lru_cache(4096)
def _plain(keys: tuple[str, ...], named: tuple[tuple[str, str], ...]) -> str | None:
    columns = dict(named)
    forms = [form for form in _forms(frozenset(columns)) if all(columns.get(name, name) in keys for name in FORMS[form])]
    if len(forms) != 1 or "label" in columns or not ROW_KEYS.keys().isdisjoint(keys):
        return None
    return forms[0] if used_columns(forms[0], columns).issuperset(keys) else None


@cache
def _forms(columns: frozenset[str]) -> list[str]:
    """The forms that count where a source names these columns, by order."""
    named = {form: sum(name in columns for name in needed) for form, needed in FORMS.items()}
    if "label" not in columns:
        return sorted((f for f in FORMS if f != "label" and (named[f] or not any(named.values()))), key=lambda f: -named[f])
    return sorted((f for f in FORMS if f != "text" and named[f]), key=lambda f: -named[f])


def used_columns(form: str | None, columns: Mapping[str, str]) -> frozenset[str]:
    """The file's names of the columns that rows of a form are made of; of all forms that they may have where it is None."""
    return _used(form, tuple(columns.items()))


@cache
def _used(form: str | None, named: tuple[tuple[str, str], ...]) -> frozenset[str]:
    columns = dict(named)
    forms = _forms(frozenset(columns)) if form is None else [form]
    return frozenset(columns.get(n, n) for f in forms for n in FIELDS[f])


def unused(record: Mapping[str, Any], columns: Mapping[str, str], form: str) -> set[str]:
    """What a record of a form holds that its row does not say: columns, keys of messages, turns that answer nothing."""
    if plain_form(record, columns) is not None:
        return _unused_turns(record, columns, form)
    said = {key for key in record.keys() - used_columns(form, columns) if not is_empty(record[key])}
    passed = frozenset[str]() if form in ("text", "label") else PASSED
    found = {c or "a column without a name" for c in said if c not in passed and not (c in ROW_KEYS and ROW_KEYS[c].neutral(record[c]))}
    if _kto(record, columns, form) is True:
        found.discard(columns.get("label", "label"))
    return found | _unused_turns(record, columns, form)


def _unused_turns(record: Mapping[str, Any], columns: Mapping[str, str], form: str) -> set[str]:
    found, talk = set[str](), list[Any]()
    for name in FORMS[form]:
        column = columns.get(name, name)
        turns = listed(record[column], column) if form in ("messages", "conversations") else talk_in(record[column])
        found |= unused_keys(turns, column)
        talk += turns if isinstance(turns, list) else [{"role": "user"}] if name == "prompt" else []
    first = _role(talk[0]) if talk else None
    if talk and first not in BEFORE_ANY:
        return found
    own = columns.get("system", "system")
    if first in ("system", "developer") and not is_blank(said := record.get(own)):
        found |= {f"{own} beside a system turn"} if said != (talk[0].get("content") or talk[0].get("value")) else set()
    return found | {STARTS} if unasked([_role(turn) for turn in talk]) else found


def _kto(record: Mapping[str, Any], columns: Mapping[str, str], form: str | None) -> bool | None:
    """What the row's `label` says as the mark of KTO: whether the answer is wanted; None if it is no such mark. A text has no answer.
    Where `columns` names all that the row is made of and not the label, a number is the id of a class: only words and booleans count."""
    label = record.get(columns.get("label", "" if "label" in columns.values() else "label"))
    if label is None or form in (None, "text", "label"):
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


def check_columns(
    seen: Iterable[str], columns: Mapping[str, str], where: str, *, any_form: bool, more: Iterable[str] = (), why: str = ""
) -> None:
    """Raise DataError if `columns` names what is not there, or no record had a known form. seen: the columns that exist. more: what an
    objective reads beside the columns of the forms. why: it could not read the first record."""
    seen, ours = list(seen), (*COLUMNS, *more)
    problems = [f"columns: {name!r} is not one of ours{nearest(name, ours)}" for name in columns if name not in ours]
    problems += [
        f"columns: {name}: {c!r} does not exist{nearest(c, seen)}" for name, c in columns.items() if name in ours and c not in seen
    ]
    if not problems and any_form:
        return
    if not problems and why:
        raise DataError(
            f"{where}: no training form found in its columns: {', '.join(seen) or 'none'}",
            problems=[why],
            fix="rename the columns, or map them (our name: the file's name), in a run file with "
            "`columns: {chosen: better, rejected: worse}`, for `trimtab eval` with `--column chosen=better --column rejected=worse`.",
        )
    if not problems:
        problems = [f"column {c!r}{hint}" for c in seen if c not in COLUMNS and (hint := nearest(c, COLUMNS))]
        problems += [f"column {c!r}: {ROW_KEYS[c].why}" for c in seen if c in PAIRS]
    raise DataError(
        f"{where}: no training form found in its columns: {', '.join(seen) or 'none'}",
        problems=[*problems, f"understood: {UNDERSTOOD}"],
        fix="rename the columns, or map them (our name: the file's name), in a run file with "
        "`columns: {prompt: question, completion: answer}`, for `trimtab eval` with `--column prompt=question --column completion=answer`.",
    )


def refuse_keys(record: Mapping[str, Any], columns: Mapping[str, str], form: str | None) -> None:
    """BadRow if a key says something that cannot be honoured. A column that `columns` names is what the run file says it is."""
    if plain_form(record, columns) is not None:
        return
    mapped = set(columns.values())
    honoured = () if form in (None, "text", "label") else (*TOOL_KEYS, *SETTING_KEYS)
    for key in record:
        if (
            key not in ROW_KEYS or key in mapped or key in honoured or (key in PAIRS and not mapped.isdisjoint(PAIRS))
        ):  # the other of a pair is unused
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
