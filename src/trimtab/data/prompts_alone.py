"""Records that ask without an answer to imitate: the prompt of a row, its own answer where it has one, and all columns for rewards.

| columns                                  | prompt                              | the row's own answer                  |
|------------------------------------------|-------------------------------------|---------------------------------------|
| prompt, text or messages                 | it, behind the history              | completion, if there is one           |
| messages or conversations                | all before the last assistant turns | the last of these, or its calls       |
| instruction, optional input              | as an instruction's, with history   | output, if there is one               |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.bases.template import BadRow
from trimtab.data.keys import is_blank, is_empty
from trimtab.data.turns import ROLES, earlier, kind_of, listed, talk_in, text_of

OWN = ("prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What rewards get under these names is the sampled answer's or the run's, so that columns of these names are not handed on."""
TALKS = ("messages", "conversations")


@dataclass(frozen=True)
class Asked:
    """prompt: text, or messages as the record has them. reference: the own answer of the row, or None. record: all its columns."""

    prompt: Any
    reference: Any
    record: Mapping[str, Any]

    @property
    def reference_text(self) -> str:
        """The reference for people: as text."""
        if self.reference is None or isinstance(self.reference, str):
            return self.reference or ""
        return json.dumps(self.reference, ensure_ascii=False, default=str)

    @property
    def columns(self) -> dict[str, Any]:
        """What a reward gets beside the prompt and the sampled answer."""
        return {k: v for k, v in self.record.items() if k not in OWN}


def prompt_alone(record: Mapping[str, Any]) -> dict[str, Any]:
    """{"": the record as a prompt}. BadRow where there is no prompt."""
    if not is_empty(record.get("prompt")):
        prompt, answer = talk_in(record["prompt"]), _said(talk_in(record.get("completion")))
        return {"": Asked(_after(record.get("history"), prompt), answer, record)}
    for name in TALKS:
        if not is_empty(record.get(name)):
            turns = listed(record[name], name)
            if not isinstance(turns, list):
                raise BadRow(f"no prompt: {name} is {kind_of(turns)}, not a list of messages")
            asked = [i for i, turn in enumerate(turns) if _role(turn) != "assistant"]
            end = asked[-1] + 1 if asked else 0
            if turns and not asked:
                raise BadRow(f"no prompt: nothing is asked before the answer in {name}")
            return {"": Asked(turns[:end], _said(turns[end:]), record)}
    if not is_blank(record.get("instruction")):
        parts = [text_of(record[name], name) for name in ("instruction", "input") if not is_blank(record.get(name))]
        return {"": Asked(_after(record.get("history"), "\n\n".join(parts)), _said(record.get("output")), record)}
    raise BadRow("no prompt: understood: prompt | messages | conversations | instruction (+ input)")


def _after(history: Any, prompt: Any) -> Any:
    """A prompt behind the turns of its history, as a conversation."""
    if is_empty(history):
        return prompt
    if not isinstance(prompt, str):
        raise BadRow("history: the prompt is a list of messages, which holds what was before")
    return [*earlier(history), {"role": "user", "content": prompt}]


def _said(answer: Any) -> Any:
    """The text of an answer, or its calls."""
    if not isinstance(answer, list):
        return None if answer is None or answer == "" else answer
    turn = answer[-1] if answer else {}
    calls = turn.get("tool_calls") or turn.get("function_call") if isinstance(turn, dict) else None
    if not is_empty(calls):
        return calls
    return (turn.get("content") or turn.get("value")) if isinstance(turn, dict) else None


def _role(turn: Any) -> str | None:
    return ROLES.get(str(turn.get("role") or turn.get("from"))) if isinstance(turn, dict) else None
