"""Tools and calls of them as messages carry them, and how a chat template takes them. Training and serving both use this.

A row or a request has OpenAI's forms: `tools` is a list of {type: function, function: {name, description, parameters}}. An assistant turn
has tool_calls: [{id, type: function, function: {name, arguments}}], its arguments an object or JSON text, its content text or null. A turn
of the role `tool` has content, and the tool_call_id or the name of what it answers.

Templates differ in what they take: arguments as an object or as JSON text, no content as "" or null, ids of any kind or of nine letters and
digits. `way_of` finds that by rendering a call.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Shape = tuple[tuple[str, tuple[int, ...], int, bool], ...]
"""Of each message: its role, the numbers of the calls that it makes, that of the call that it answers, or -1; whether it has reasoning."""
REASONED = "reasoning_content"
"""The key of a message under which its reasoning stands beside its content."""

SHORT_ID = 9
"""Characters of an id that Mistral's templates take."""


class BadRow(Exception):
    """This conversation or row cannot be used; the text is the reason ("kind: particulars"). Becomes a DataError or a dropped row."""


@dataclass(frozen=True)
class CallWay:
    """How a template takes calls. as_text: arguments as JSON text. empty: the content of a turn that has none. short_ids: ids have nine
    letters and digits. single: a turn has one call at most."""

    as_text: bool = False
    empty: str | None = ""
    short_ids: bool = False
    single: bool = False


PROBE_VALUE, PROBE_NUMBER = "zqvalz", 70707


def probe_name(number: int) -> str:
    return f"zqname{number}z"


def probe_call(number: int) -> Message:
    """A call whose name, keys and values are found in any text."""
    arguments = {"zqkeya": f"{PROBE_VALUE}{number}z", "zqkeyb": PROBE_NUMBER}
    return {"id": f"zqcall_{number:03}", "type": "function", "function": {"name": probe_name(number), "arguments": arguments}}


def probe_tool(number: int) -> Message:
    properties = {"zqkeya": {"type": "string", "description": "zqdesca"}, "zqkeyb": {"type": "integer", "description": "zqdescb"}}
    parameters = {"type": "object", "properties": properties, "required": ["zqkeya"]}
    return {"type": "function", "function": {"name": probe_name(number), "description": "zqdesc", "parameters": parameters}}


PROBE_TOOLS = [probe_tool(0), probe_tool(1)]
BARE_TOOL: Message = {"type": "function", "function": {"name": probe_name(0)}}
BARE_FUNCTION: Message = {"name": "", "description": "", "parameters": {"type": "object", "properties": {}}}


def way_of(render: Callable[[list[Message]], str]) -> CallWay | BadRow:
    """How a template takes calls; why not, if it writes none. render: messages with `PROBE_TOOLS`; BadRow if the template refuses them."""
    question = {"role": "user", "content": "Zq0qZ"}
    refused: list[BadRow] = []

    def holds(way: CallWay, numbers: Sequence[int]) -> bool:
        turn = shaped_turn({"role": "assistant", "content": "", "tool_calls": [probe_call(n) for n in numbers]}, way)
        try:
            text = render([question, turn])
        except BadRow as bad:
            refused.append(bad)
            return False
        said = text[text.rfind("Zq0qZ") :]
        parts = [part for n in numbers for part in (probe_name(n), f"{PROBE_VALUE}{n}z")]
        # an object that is written as Python does it was to be JSON text
        return all(part in said for part in parts) and "'zqkeya':" not in said and '\\"zqkeya' not in said

    ways = [CallWay(as_text, empty, short) for short in (False, True) for as_text in (False, True) for empty in ("", None)]
    found = next((way for way in ways if holds(way, (0,))), None)
    if found is None:
        return BadRow(f"tool calls: {refused[0] if len(refused) == len(ways) else 'the chat template does not render them'}")
    return CallWay(found.as_text, found.empty, found.short_ids, single=not holds(found, (0, 1)))


def shaped_turn(message: Message, way: CallWay) -> Message:
    """A message with its calls and ids as the template takes them."""
    shaped = dict(message)
    if "tool_call_id" in message:
        shaped["tool_call_id"] = _id(message["tool_call_id"], way)
    calls = calls_of(message)
    if not calls:
        shaped.pop("tool_calls", None)  # templates ask whether the key is there
        return shaped
    shaped["tool_calls"] = [_shaped_call(call, way) for call in calls]
    if not message.get("content"):
        shaped["content"] = way.empty
    return shaped


def _shaped_call(call: Mapping[str, Any], way: CallWay) -> Message:
    arguments: Any = arguments_of(call)
    if way.as_text:
        given = call["function"]["arguments"]
        arguments = given if isinstance(given, str) and given.strip() else json.dumps(arguments, ensure_ascii=False)
    shaped = {"type": "function", "function": {"name": call["function"]["name"], "arguments": arguments}}
    return {"id": _id(call["id"], way), **shaped} if call.get("id") is not None else shaped


def _id(given: Any, way: CallWay) -> Any:
    """An id as it is; else, where the template takes only short ones, one that is computed from it."""
    if not way.short_ids or not isinstance(given, str) or (len(given) == SHORT_ID and given.isascii() and given.isalnum()):
        return given
    return hashlib.sha256(given.encode()).hexdigest()[:SHORT_ID]


def calls_of(message: Mapping[str, Any]) -> list[Any]:
    """The calls that an assistant turn makes."""
    return list(message.get("tool_calls") or ())


def arguments_of(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """A call's arguments as an object. BadRow if they are something else."""
    given = call["function"].get("arguments")
    if isinstance(given, str) and given.strip():
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"tool calls: the arguments of {call['function'].get('name')!r} are no JSON: {error}") from None
    if given is None or given == "":
        return {}
    if not isinstance(given, Mapping):
        raise BadRow(f"tool calls: the arguments of {call['function'].get('name')!r} are {type(given).__name__}, not an object")
    return given


def tools_of(tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Tools as templates take them: each {type, function}. What says nothing about the tool itself is left out: `strict`, and nulls."""
    functions = [tool["function"] if isinstance(tool.get("function"), Mapping) else tool for tool in tools]
    return [
        {"type": "function", "function": {k: v for k, v in f.items() if v is not None and k not in ("strict", "type")}} for f in functions
    ]


def with_names(messages: Sequence[Message]) -> list[Message]:
    """The messages; a result without a name gets that of what was called, which some templates write: of the call with its id, or of the
    next call without one."""
    if not any("tool_calls" in message for message in messages):
        return list(messages)
    names: dict[Any, str] = {}
    waiting: list[str] = []
    found = []
    for message in messages:
        if calls := calls_of(message):
            names |= {call["id"]: call["function"]["name"] for call in calls if call.get("id") is not None}
            waiting = [call["function"]["name"] for call in calls if call.get("id") is None]
        if message["role"] == "tool" and not message.get("name"):
            name = names.get(message.get("tool_call_id")) or (waiting.pop(0) if waiting else None)
            message = {**message, "name": name} if name else message
        found.append(message)
    return found


def texts_in(value: Any) -> Iterator[str]:
    """All texts in a value of JSON, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from texts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_in(item)


def called(message: Mapping[str, Any]) -> list[str]:
    """The texts of a turn's calls that a rendering must have: names, keys of arguments, and texts among their values."""
    if not (calls := message.get("tool_calls")):
        return []
    return [text for call in calls for text in (call["function"]["name"], *texts_in(arguments_of(call))) if text.strip()]


def size_of(message: Mapping[str, Any]) -> int:
    """Characters of a message."""
    size = len(message.get("content") or "")
    return size + sum(map(len, texts_in(message["tool_calls"]))) if message.get("tool_calls") else size


def shape_of(messages: Sequence[Mapping[str, Any]]) -> Shape:
    """What decides how a template frames the contents. Ids are numbered in the order in which they occur."""
    if not any("tool_calls" in m or "tool_call_id" in m or m.get(REASONED) for m in messages):
        return plain_shape([message["role"] for message in messages])
    numbers: dict[Any, int] = {}
    shape = []
    for message in messages:
        made = []
        for call in calls_of(message):
            made.append(number := len(numbers))
            numbers[call.get("id") if call.get("id") is not None else object()] = number
        answered = numbers.get(message["tool_call_id"], -1) if "tool_call_id" in message else -1
        shape.append((message["role"], tuple(made), answered, bool(message.get(REASONED))))
    return tuple(shape)


def plain_shape(roles: Sequence[str]) -> Shape:
    return tuple((role, (), -1, False) for role in roles)


def marked(shape: Shape) -> list[Message]:
    """Messages of this shape whose contents and reasoning are found in any text."""
    found: list[Message] = []
    for i, (role, made, answered, reasoned) in enumerate(shape):
        message: Message = {"role": role, "content": f"Zq{i}qZ"}
        if made:
            message["tool_calls"] = [probe_call(n) for n in made]
        if answered >= 0:
            message["tool_call_id"] = probe_call(answered)["id"]
        if reasoned:
            message[REASONED] = f"Zr{i}rZ"
        found.append(message)
    return found
