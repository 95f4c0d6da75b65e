"""Messages as a base's chat template takes them; what it takes is found by rendering some.

- Content is text. Parts of text ({type: text, text}) are joined with line breaks. Some templates write nothing for a text but the text of a
  list of parts; for such a role each content is passed as one part. Some write a list as code or JSON; that does not count as its text.
- `developer` is rendered as the system turn, unless the template treats that role otherwise than a role that it cannot know.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.bases.remembered import remembered
from trimtab.bases.sandbox import Program, TooMuch
from trimtab.bases.tool_turns import (
    BARE_FUNCTION,
    BARE_TOOL,
    PROBE_TOOLS,
    REASONED,
    BadRow,
    CallWay,
    Message,
    marked,
    plain_shape,
    shaped_turn,
    way_of,
    with_names,
)
from trimtab.bases.written import text_of
from trimtab.errors import DataError

REASONED_NAMES = (REASONED, "reasoning", "thinking")
"""What templates call it."""
NONE: Mapping[str, Any] = {}
"""No variables."""
OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""Those that a rendering sets itself."""


class Shaper:
    """A compiled template, and how it takes messages. variables: what it sees beside them. name: of its base, for errors."""

    def __init__(self, text: str, variables: Mapping[str, Any], name: str = ""):
        self._text, self._variables, self._name = text, variables, name
        self._parts: dict[str, bool] = {}
        try:
            self._program = Program(text)
        except TooMuch as error:
            raise self._stopped(error) from None
        except Exception as error:  # not jinja, or blocks that transformers has not
            raise BadRow(f"the chat template cannot be read: {error}") from None

    @property
    def reads(self) -> frozenset[str]:
        """The variables that a caller may set and the template looks at (enable_thinking)."""
        return self._program.names - OWN_VARIABLES - set(self._variables)

    def tools(self, tools: Sequence[Message]) -> list[Message]:
        """Tools as the template takes them: what each must have is there, empty."""
        if not self._wants_whole_tools:
            return list(tools)
        return [tool | {"function": BARE_FUNCTION | tool["function"]} for tool in tools]

    @functools.cached_property
    def knows_tools(self) -> bool:
        """Whether the template writes the tools that a conversation may use."""
        text = self._asked_with(PROBE_TOOLS)
        return text is not None and all(tool["function"]["name"] in text for tool in PROBE_TOOLS)

    @functools.cached_property
    def _wants_whole_tools(self) -> bool:
        """Whether the template refuses a tool that has nothing but a name."""
        return self._asked_with([BARE_TOOL]) is None

    def _asked_with(self, tools: Sequence[Message]) -> str | None:
        """A question beside these tools as text; None where the template refuses it."""
        try:
            return self._render([self._shaped({"role": "user", "content": "Zq0qZ"})], True, variables={"tools": tools})
        except BadRow:
            return None

    @functools.cached_property
    def call_way(self) -> CallWay | BadRow:
        """How the template takes an assistant turn's calls; why not, if it writes none."""

        def render(messages: list[Message]) -> str:
            shaped = [m if "tool_calls" in m else self._shaped(m) for m in messages]
            return self._render(shaped, False, variables={"tools": PROBE_TOOLS})

        return way_of(render)

    @functools.cached_property
    def reasoned_name(self) -> str | None:
        """Under which name the template reads the reasoning of an answer; None if it writes none."""
        talk = [self._shaped(m) for m in marked(plain_shape(["user", "assistant"]))]
        for name in REASONED_NAMES:
            try:
                text = self._render([talk[0], {**talk[1], name: "Zr0rZ"}], False)
            except BadRow:
                continue
            if "Zr0rZ" in text:
                return name
        return None

    def takes_parts(self, role: str) -> bool:
        """Whether a role's contents must be lists of parts: as texts they vanish, or are refused."""
        user, assistant = self._talk
        if role in ("user", "assistant"):
            return user if role == "user" else assistant
        return remembered(self._parts, role, lambda: not self._holds_beside_talk(role, False) and self._holds_beside_talk(role, True))

    def _holds_beside_talk(self, role: str, parts: bool) -> bool:
        """Whether a turn of this role is written before, within or after a question and its answer."""
        talk = [*zip(("user", "assistant"), self._talk, strict=True)]
        return any(self._holds([*talk[:i], (role, parts), *talk[j:]]) for i, j in ((0, 0), (1, 1), (2, 1)))

    @functools.cached_property
    def _talk(self) -> tuple[bool, bool]:
        """Whether the user's and the assistant's contents must be parts; texts where no way holds both."""
        ways = ((False, False), (True, True), (True, False), (False, True))
        return next((way for way in ways if self._holds([*zip(("user", "assistant"), way, strict=True)])), (False, False))

    @functools.cached_property
    def knows_developer(self) -> bool:
        """Whether `developer` is a role of its own: it is written, and a role that no template knows is not."""
        known, unknown = ([(role, self.takes_parts(role)) for role in (first, "user")] for first in ("developer", "no such role"))
        return self._holds(known) and not self._holds(unknown)

    def _holds(self, turns: Sequence[tuple[str, bool]]) -> bool:
        """Whether turns of (role, whether its content is a list of parts) are written as their texts: a part's other values are not."""
        talk = marked(plain_shape([role for role, _ in turns]))
        shown = [
            {**m, "content": [{"a": "Zp0pZ", "type": "text", "text": m["content"]}]} if parts else m
            for m, (_, parts) in zip(talk, turns, strict=True)
        ]
        try:
            text = self._render(shown, generate=False)
        except BadRow:
            return False
        return all(m["content"] in text for m in talk) and "Zp0pZ" not in text

    def _shaped_all(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> list[dict[str, Any]]:
        if variables.get("tools") and not self.knows_tools:
            raise BadRow("tools: the chat template does not render them; this base knows no tools")
        return [self._shaped(m) for m in with_names(messages)]

    def _shaped(self, message: Message) -> dict[str, Any]:
        role = "system" if message["role"] == "developer" and not self.knows_developer else message["role"]
        text = text_of(message["content"])
        shaped = {**message, "role": role, "content": [{"type": "text", "text": text}] if self.takes_parts(role) else text}
        if (thought := shaped.pop(REASONED, None)) is not None and (name := self.reasoned_name):
            shaped[name] = thought
        if "tool_calls" not in message and "tool_call_id" not in message:
            return shaped
        way = self.call_way
        if message.get("tool_calls"):
            if isinstance(way, BadRow):
                raise way
            if way.single and len(message["tool_calls"]) > 1:
                raise BadRow("tool calls: the chat template renders one call in a turn, and this one has several")
        return shaped_turn(shaped if text else {**shaped, "content": ""}, CallWay() if isinstance(way, BadRow) else way)

    def _render(self, messages: list[dict[str, Any]], generate: bool, size: int = 0, variables: Mapping[str, Any] = NONE) -> str:
        try:
            return self._program.render(self._given(messages, generate, variables), size)
        except TooMuch as error:
            raise self._stopped(error) from None
        except Exception as error:  # what a template does to a conversation can go wrong in any way
            raise BadRow(f"the chat template refuses it: {error}") from None

    def _given(self, messages: list[dict[str, Any]], generate: bool, variables: Mapping[str, Any]) -> dict[str, Any]:
        own = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": generate}
        if variables.get("tools") and variables["tools"] != [BARE_TOOL]:
            variables = {**variables, "tools": self.tools(variables["tools"])}
        return {**own, **self._variables, **variables}

    def _stopped(self, error: TooMuch) -> DataError:
        of = f" of {self._name!r}" if self._name else ""
        return DataError(f"the chat template{of} was stopped: {error}", fix="use another base, or mend its chat template.")
