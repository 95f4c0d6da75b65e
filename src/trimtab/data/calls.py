"""Tools, and calls of them, as rows have them: OpenAI's forms, its older functions, ShareGPT's function_call, bare functions.

They become what chat templates and `bases.tool_turns` take. Raises `BadRow` for a value that is not of the expected kind.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.bases.tool_turns import BadRow, Message, arguments_of, calls_of, tools_of
from trimtab.data.characters import bad_character
from trimtab.data.keys import is_empty

DEEPEST = 100
"""Levels of objects and lists in a tool, a call or a setting: whatever walks through them later calls itself for each."""


def read_tools(value: Any, where: str) -> tuple[Message, ...]:
    """The tools that a conversation may use: a list of {type: function, function} or of bare functions, also as JSON text."""
    if is_empty(value):
        return ()
    tools = _decoded(value, where)
    tools = [tools] if isinstance(tools, Mapping) else tools
    if not isinstance(tools, list) or not all(isinstance(t, Mapping) for t in tools):
        raise BadRow(f"{where}: not a list of tools")
    for i, tool in enumerate(tools):
        if tool.get("type") not in (None, "function", "object") or not isinstance(_function(tool).get("name"), str):
            raise BadRow(f"{where}: {where}[{i}] is no function with a name")
    refuse_no_json(tools, where)
    return tuple(tools_of([_without_nulls(t) for t in tools]))


def read_calls(value: Any, where: str) -> list[Message]:
    """Calls as {type, function: {name, arguments}}, arguments an object; ids are kept. value: one or several, also as JSON text."""
    calls = _decoded(value, where)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list) or not calls:
        raise BadRow(f"tool calls: {where} is no call and no list of calls")
    return [_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]


def settings_in(value: Any) -> Mapping[str, Any]:
    """Settings of a chat template: an object, also as JSON text."""
    found = _decoded(value, "chat_template_kwargs")
    if not isinstance(found, Mapping):
        raise BadRow("chat_template_kwargs: not an object")
    return found


def refuse_no_json(value: Any, where: str, levels: int = DEEPEST) -> None:
    """BadRow where a value is none of JSON, holds text that cannot be trained on, or is nested too deeply."""
    if isinstance(value, str):
        if (found := bad_character(value)) is not None:
            raise BadRow(f"{found} in {where}")
    elif isinstance(value, Mapping | list | tuple):
        if not levels:
            raise BadRow(f"nested too deeply: {where} has more than {DEEPEST} levels")
        for item in [*value, *value.values()] if isinstance(value, Mapping) else value:
            refuse_no_json(item, where, levels - 1)
    elif not isinstance(value, int | float | None) or (isinstance(value, float) and not math.isfinite(value)):
        raise BadRow(f"not JSON: {where} holds {value if isinstance(value, float) else type(value).__name__}")


def canonical(calls: Sequence[Mapping[str, Any]]) -> list[str]:
    """Calls to compare: each as JSON of its name and arguments, sorted, whatever the order of calls and of keys. 1 and 1.0 are equal."""
    return sorted(json.dumps(_plain([c["function"]["name"], arguments_of(c)]), sort_keys=True, ensure_ascii=False) for c in calls)


def said_by(message: Mapping[str, Any]) -> str:
    """What a turn says, as text: its content, and the calls that it makes as JSON."""
    content, calls = message["content"], calls_of(message)
    return "\n".join([*filter(None, [content]), *canonical(calls)]) if calls else content or ""


def as_result(value: Any, where: str) -> Any:
    """The content of a tool's turn: an object is written as JSON."""
    is_parts = isinstance(value, list) and all(isinstance(p, Mapping) and "type" in p for p in value)
    if is_parts or not isinstance(value, dict | list):
        return value
    refuse_no_json(value, where)
    return json.dumps(value, ensure_ascii=False)


def _call(given: Any, where: str) -> Message:
    if not isinstance(given, Mapping) or given.get("type") not in (None, "function"):
        raise BadRow(f"tool calls: {where} is no call of a function")
    function = _function(given)
    name, arguments = function.get("name"), function.get("arguments", function.get("parameters"))
    if not isinstance(name, str) or not name.strip():
        raise BadRow(f"tool calls: {where} has no name")
    found: Message = {"type": "function", "function": {"name": name, "arguments": arguments}}
    plain = dict(arguments_of(found))
    refuse_no_json([name, plain, given.get("id")], where)
    found["function"]["arguments"] = plain if isinstance(arguments, str) else _without_nulls(plain)
    return {"id": given["id"], **found} if isinstance(given.get("id"), str) else found


def _function(given: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = given.get("function")
    return inner if isinstance(inner, Mapping) else given


def _decoded(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{where}: text that is not JSON: {error}") from None


def _without_nulls(value: Any) -> Any:
    """Arrow gives every object of a column all keys that any of them has."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
