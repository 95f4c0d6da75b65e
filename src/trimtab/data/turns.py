"""Texts and lists of messages in rows: read in either spelling and checked, with the marks that say which turns are trained on.

Raises `BadRow` for a value that is not of the expected kind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.bases.template import BadRow, Message
from trimtab.bases.tool_turns import REASONED
from trimtab.data.calls import as_result, read_calls
from trimtab.data.characters import bad_character
from trimtab.data.keys import MARKS, MASKS, REASONING_KEYS, TURN_KEYS, WEIGHTS, flag, is_blank, is_empty
from trimtab.errors import nearest

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool"),
}
CALLING = ("function_call", "tool_call")
"""Roles of turns whose content is a call, or several, as JSON."""
HONOURED: Mapping[str, Sequence[str]] = {
    "assistant": ("tool_calls", "function_call", *REASONING_KEYS),
    "tool": ("tool_call_id", "name"),
}
"""Keys of turns of these roles that are rendered; elsewhere they are not."""
BEFORE_ANY = ("assistant", "system", "developer")
"""Roles that ask nothing."""
_KNOWN = frozenset(("role", "content", "from", "value", *MARKS, *MASKS, *TURN_KEYS))
_TEXT_PARTS = (None, "text", "input_text", "output_text")

Turn = tuple[Message, bool]
"""A message, and whether it may be learnt: False where its author marked it so."""


class TwiceError(ValueError):
    """An object has a key twice: which of the two values is meant is not known."""


def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise TwiceError(f"duplicate key: {next(k for k in found if keys.count(k) > 1)!r} stands twice in one object")
    return found


STRICT_JSON = json.JSONDecoder(object_pairs_hook=unique)
JSON_ERRORS = (ValueError, RecursionError)  # a JSONDecodeError, a number of 5,000 digits, a thousand open brackets


def read_turns(value: Any, where: str) -> list[Turn]:
    """A list of messages in either spelling (role/content, from/value), also as JSON text; roles that are not known are refused."""
    value = listed(value, where)
    if not isinstance(value, list) or not value:
        raise BadRow(f"bad messages: {where} is {kind_of(value)}, not a list of messages")
    return [_turn(turn, f"{where}[{i}]") for i, turn in enumerate(value)]


def listed(value: Any, where: str) -> Any:
    """`value`, or what it spells where it is a list written as JSON text: the cell of a CSV."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return STRICT_JSON.decode(value)
    except TwiceError as error:
        raise BadRow(f"{error} of {where}") from None
    except JSON_ERRORS as error:
        raise BadRow(f"bad messages: {where} is text that is not JSON: {error}") from None


def talk_in(value: Any) -> Any:
    """`value`, or the messages that it spells where it is a list of them as JSON text. Other text that begins with [ is what it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = STRICT_JSON.decode(value)
    except JSON_ERRORS:
        return value
    return found if is_talk(found) else value


def is_talk(value: Any) -> bool:
    """Whether a value is a list of messages, rather than one of parts of a text."""
    listed = isinstance(value, list) and bool(value)
    return listed and all(isinstance(turn, dict) and not {"role", "from"}.isdisjoint(turn) for turn in value)


def unasked(roles: Sequence[str | None]) -> set[int]:
    """Indexes of the assistant turns before anything is asked: those that begin a conversation, also behind its system turn. A system
    turn that no user follows asks itself."""
    if roles and roles[0] not in BEFORE_ANY:
        return set()
    asks = (i for i, role in enumerate(roles) if role not in BEFORE_ANY)
    begin = next((i for i, role in enumerate(roles) if role != "assistant"), len(roles))
    return {i for i, role in enumerate(roles[: next(asks, begin)]) if role == "assistant"}


def unused_keys(value: Any, where: str) -> set[str]:
    """Keys of messages to which no format gives a meaning, as reports name them."""
    found = set[str]()
    for turn in value if isinstance(value, list) else ():
        if isinstance(turn, dict) and not _KNOWN.issuperset(turn):
            found |= {f"{where}[].{k}" for k in turn if k not in _KNOWN and not is_empty(turn[k])}
    return found


def _turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, dict):
        raise BadRow(f"bad messages: {where} is {kind_of(turn)}, not an object with role and content")
    plain = len(turn) == 2 and "role" in turn and "content" in turn
    said = turn["role"] if plain else _either(turn, "role", "from", where)
    if not isinstance(said, str) or said not in ROLES:
        raise BadRow(f"unknown role: {where} has role {said!r}{nearest(str(said), ROLES)}")
    role = ROLES[said]
    if plain and said not in CALLING and role != "tool":
        return {"role": role, "content": text_of(turn["content"], f"{where}.content")}, True
    _refuse_keys(turn, where, role)
    learnt = _learnt(turn, role, where)
    message: Message = {"role": role, "content": ""}
    calls, content = _calls(turn, said, where), _either(turn, "content", "value", where)
    if said not in CALLING and not (calls and is_blank(content)):
        message["content"] = text_of(as_result(content, where) if role == "tool" else content, f"{where}.content")
    if calls:
        message["tool_calls"] = calls
    for key in ("tool_call_id", "name") if role == "tool" else ():
        if not is_empty(turn.get(key)):
            message[key] = text_of(turn[key], f"{where}.{key}")
    keys = [key for key in REASONING_KEYS if role == "assistant" and not is_empty(turn.get(key))]
    thoughts = {text_of(turn[key], f"{where}.{key}") for key in keys}
    if len(thoughts) > 1:
        raise BadRow(f"reasoning: {where} has {' and '.join(keys)}, and they differ")
    return (message | {REASONED: thoughts.pop()} if thoughts else message), learnt


def _calls(turn: Mapping[str, Any], said: str, where: str) -> list[Message]:
    """The calls that a turn makes, however they are written."""
    if said in CALLING:
        return read_calls(_either(turn, "content", "value", where), where)
    keys = [k for k in ("tool_calls", "function_call") if ROLES[said] == "assistant" and not is_empty(turn.get(k))]
    if len(keys) > 1:
        raise BadRow(f"tool calls: {where} has both {' and '.join(keys)}")
    return [call for k in keys for call in read_calls(turn[k], f"{where}.{k}")]


def _refuse_keys(turn: Mapping[str, Any], where: str, role: str) -> None:
    """BadRow if a key says something that cannot be honoured."""
    for key in turn:
        if key in TURN_KEYS and key not in HONOURED.get(role, ()) and not TURN_KEYS[key].neutral(turn[key]):
            raise BadRow(f"{'tool calls' if key in ('tool_calls', 'function_call') else key}: {where} has {key}: {TURN_KEYS[key].why}")


def _either(turn: Mapping[str, Any], name: str, other: str, where: str) -> Any:
    """The value of a key in either spelling; tables of mixed rows have both, one of them null."""
    a, b = turn.get(name), turn.get(other)
    if a is not None and b is not None and a != b:
        raise BadRow(f"bad messages: {where} has both {name} and {other}, and they differ")
    return b if a is None else a


def _learnt(turn: Mapping[str, Any], role: str, where: str) -> bool:
    """Whether a turn may be learnt, by its marks. Only answers are ever learnt: a mark that asks for more cannot be honoured."""
    learnt = True
    for key, value in turn.items():
        if key not in (*MARKS, *MASKS) or is_empty(value):
            continue
        if (mark := flag(value)) is None:
            raise BadRow(f"{key}: {where} has {key} {value!r}, and only 0 and 1 can be honoured")
        mark = mark != (key in MASKS)
        if mark and role != "assistant" and key not in WEIGHTS:
            raise BadRow(f"{key}: {where} is a turn of the {role} that is marked to be learnt; only answers are")
        learnt = learnt and mark
    return learnt


def text_of(value: Any, where: str) -> str:
    """`value` as text; a list of text parts, as OpenAI writes content, is joined with line breaks, as in serving."""
    if isinstance(value, list) and value:
        if (other := next((part for part in value if not isinstance(part, dict)), value)) is not value:
            raise BadRow(f"not text: {where} is a list that holds {kind_of(other)}; parts are objects with type and text")
        value = "\n".join(_part(part, f"{where}[{i}]") for i, part in enumerate(value))
    if not isinstance(value, str):
        raise BadRow(f"not text: {where} is {kind_of(value)}")
    if (found := bad_character(value)) is not None:
        raise BadRow(f"{found} in {where}")
    return value


def _part(part: dict[str, Any], where: str) -> str:
    """The text of a part; all that it may have besides is null."""
    if part.get("type") not in _TEXT_PARTS:
        raise BadRow(f"not text: {where} is a part of type {part['type']!r}")
    if not isinstance(part.get("text"), str):
        raise BadRow(f"not text: the text of {where} is {kind_of(part.get('text'))}")
    more = [key for key, v in part.items() if key not in ("type", "text", "cache_control") and not is_empty(v)]
    if more:
        raise BadRow(f"not text: {where} has {', '.join(map(str, more))} beside its text")
    return str(part["text"])


def filled(value: Any, where: str) -> str:
    """`value` as text that is more than blanks."""
    text = text_of(value, where)
    if not text.strip():
        raise BadRow(f"empty: {where} has no text")
    return text


def kind_of(value: Any) -> str:
    """What a value is, in a reader's words."""
    kinds = {type(None): "null", dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "an empty list" if value == [] else kinds.get(type(value), type(value).__name__)


def earlier(history: Any) -> list[Message]:
    """The turns of a row's history, a list of pairs [user, assistant]."""
    value = listed(history, "history")
    if not isinstance(value, list) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in value):
        raise BadRow(f"history: {kind_of(value)} that is no list of pairs [user, assistant]")
    roles = ("user", "assistant")
    sides = [(i, j, side) for i, pair in enumerate(value) for j, side in enumerate(pair)]
    return [{"role": roles[j], "content": text_of(side, f"history[{i}][{j}]")} for i, j, side in sides]
