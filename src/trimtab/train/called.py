"""Calls of tools in generated answers, compared with those that a row's own answer makes: by name and arguments, in any order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trimtab.bases.calls import AnswerFormat, answer_format
from trimtab.bases.template import Template
from trimtab.bases.tool_turns import BadRow, Message, calls_of
from trimtab.data import Row
from trimtab.data.calls import canonical
from trimtab.decode.answers import fed, reader_of

TAIL = 256
"""Tokens at the end of a prompt in which it is seen what the template has begun of the answer."""


@dataclass(frozen=True)
class Called:
    """What a row with tools asks for. wanted: the calls of its answer, as `canonical` gives them. schemas: of the tools' arguments."""

    wanted: Sequence[str]
    schemas: Mapping[str, dict[str, Any]]

    @classmethod
    def of(cls, row: Row) -> Called | None:
        """None where the row has no tools."""
        if not row.tools or not row.conversation or not row.answers:
            return None
        functions = [tool["function"] for tool in row.tools]
        schemas = {f["name"]: dict(f.get("parameters") or {}) for f in functions}
        return cls(canonical(calls_of(row.conversation[row.answers[-1]])), schemas)


@dataclass(frozen=True)
class Caller:
    """Reads the calls out of a base's answers."""

    tokenizer: Any

    @cached_property
    def _template(self) -> Template:
        return Template(self.tokenizer)

    @cached_property
    def _form(self) -> AnswerFormat:
        return answer_format(self._template)

    @cached_property
    def stop_ids(self) -> set[int]:
        """Of the control token behind calls, where it is not the one behind plain answers."""
        end = self._form.calls.end if self._form.calls else None
        return {int(self.tokenizer.convert_tokens_to_ids(end))} if end else set()

    def is_right(self, called: Called, prompt: Sequence[int], answer: Sequence[int]) -> bool:
        """Whether an answer makes the calls that are wanted and no others. prompt, answer: ids."""
        return self.made(called.schemas, prompt, answer) == list(called.wanted)

    def made(self, schemas: Mapping[str, dict[str, Any]], prompt: Sequence[int], answer: Sequence[int]) -> list[str]:
        """The calls of an answer, as `canonical` gives them; none where its calls are not whole."""
        before = str(self.tokenizer.decode(list(prompt[-TAIL:]), skip_special_tokens=False))
        reader = reader_of(self._form, schemas, prompt=before, eager=False)
        if reader is None:
            return []
        text = self._template.without_end(self._template.text_of(answer))
        calls: dict[int, Message] = {}
        for piece in [*fed(reader, text), *reader.finish(False)]:
            if piece.kind == "call":
                calls[piece.index] = {"function": {"name": piece.text, "arguments": ""}}
            elif piece.kind == "arguments":
                calls[piece.index]["function"]["arguments"] += piece.text
        try:
            return canonical(list(calls.values()))
        except BadRow:
            return []
