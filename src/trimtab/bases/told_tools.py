"""Tools for a base whose chat template knows none: they are told in messages, in the words of Hermes and Qwen 2.5.

The tools stand in the system's turn (in the first user's where the template has no system), calls in the content of an assistant's turn,
and results in a user's turn. Answers write calls as JSON between <tool_call> tags. Serving alone uses this: training takes no rows that the
base's own template does not render.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.bases.calls import CallFormat
from trimtab.bases.template import Template
from trimtab.bases.tool_turns import REASONED, BadRow, Message, arguments_of, calls_of
from trimtab.bases.written import text_of

BEFORE, MIDDLE, AFTER = '<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>"
CALLS = CallFormat(BEFORE, MIDDLE, AFTER, f"{AFTER}\n{BEFORE}", "<tool_call>", anywhere=True)
"""How answers write calls then."""
HEAD = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""
TAIL = """
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""


class ToldTools:
    """For one chat template that knows no tools."""

    def __init__(self, template: Template):
        self._knows_calls, self._system = template.knows_calls, _has_system(template)

    def __call__(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> tuple[list[Message], Mapping[str, Any]]:
        """A conversation as the template takes it, and its variables without tools. Calls and results without tools stay as they are where
        the template writes calls itself. BadRow if a call's arguments are no JSON object."""
        tools, rest = variables.get("tools"), {name: value for name, value in variables.items() if name != "tools"}
        if tools or (not self._knows_calls and any(m["role"] == "tool" or calls_of(m) for m in messages)):
            return told(messages, tools or (), system=self._system), rest
        return list(messages), rest


def _has_system(template: Template) -> bool:
    """Whether the template writes a system's turn before a question."""
    try:
        template.prompt([{"role": "system", "content": "Zq0qZ"}, {"role": "user", "content": "Zq1qZ"}])
    except BadRow:
        return False
    return True


def told(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, system: bool) -> list[Message]:
    """The same conversation in messages of text alone. tools: as `tool_turns.tools_of` gives them. system: whether the template has a
    system's turn. BadRow if a call's arguments are no JSON object."""
    found: list[Message] = []
    for i, message in enumerate(messages):
        content = text_of(message["content"])
        if message["role"] == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            if i and messages[i - 1]["role"] == "tool":
                found[-1] = {**found[-1], "content": f"{found[-1]['content']}\n{content}"}
                continue
            found.append({"role": "user", "content": content})
            continue
        said = [*([content] if content else []), *map(_call, calls_of(message))]
        kept = {key: message[key] for key in ("name", REASONED) if key in message}
        found.append({"role": message["role"], "content": "\n".join(said), **kept})
    return _headed(found, HEAD + "\n".join(_json(tool) for tool in tools) + TAIL, system) if tools else found


def _headed(messages: list[Message], text: str, system: bool) -> list[Message]:
    """The messages with the tools told before the first question."""
    first = messages[0] if messages else {"role": "", "content": ""}
    if first["role"] in (("system", "developer") if system else ("system", "developer", "user")):
        joined = "\n\n".join(part for part in ((first["content"], text) if system else (text, first["content"])) if part)
        return [{**first, "content": joined}, *messages[1:]]
    return [{"role": "system" if system else "user", "content": text}, *messages]


def _call(call: Mapping[str, Any]) -> str:
    return f"{BEFORE}{_json(call['function']['name'])[1:-1]}{MIDDLE}{_json(arguments_of(call))}{AFTER}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
