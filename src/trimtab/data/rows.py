"""One row of training data, whatever form it was written in: a conversation, a prompt with its completion, or plain text.

A record (a dict of columns) becomes a `Row` by the first form whose columns it has. Nothing here knows files, templates or tokens.

| form            | columns                                        | becomes                                                        |
|-----------------|------------------------------------------------|----------------------------------------------------------------|
| `messages`      | messages: [{role, content}, ...]               | a conversation                                                 |
| `conversations` | conversations: [{from, value}, ...] (sharegpt) | a conversation                                                 |
| `prompt`        | prompt, completion: both text                  | a prompt and its completion                                    |
|                 | prompt, completion: both lists of messages     | a conversation; only the completion's turns are supervised     |
| `instruction`   | instruction, output, optional input (alpaca)   | a prompt (instruction, blank line, input) and its completion   |
| `label`         | text, label; only where `columns` names label  | a prompt and its completion                                    |
| `text`          | text                                           | plain text                                                     |

Any of them but `text` may have a `system` column.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from trimtab.bases.template import BadRow, Message
from trimtab.errors import DataError, nearest

FORMS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "label": ("text", "label"),
    "text": ("text",),
}
COLUMNS = tuple(dict.fromkeys([*(name for needed in FORMS.values() for name in needed), "input", "system"]))
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}
UNDERSTOOD = "messages | conversations | prompt + completion | instruction (+ input) + output | text | text + label (named in `columns`)"

RowId = tuple[int, int]
"""Which row it is: the number of its source among those that are read together, and its own number among the source's rows."""
_unread = itertools.count()


@dataclass(frozen=True)
class Row:
    """One training row: exactly one of `messages`, `prompt` with `completion`, or `text`.

    origin: "file:line", for people only: rows may share it. id: what the row is found by; a row of no source gets one that no other has.
    system: a system turn that goes before prompt. separator: stands between prompt and completion where there is no
    chat template (alpaca and label rows; prompt/completion rows are joined as they are). first_supervised: index of the first message that
    may be supervised.
    """

    origin: str
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    system: str | None = None
    separator: str = ""
    first_supervised: int = 0
    id: RowId = field(default_factory=lambda: (-1, next(_unread)), compare=False)

    @property
    def conversation(self) -> list[Message] | None:
        """The row as messages (a prompt is a user turn, its completion an assistant turn); None for plain text."""
        if self.messages is not None:
            return list(self.messages)
        if self.prompt is None or self.completion is None:
            return None
        turns = [("system", self.system), ("user", self.prompt), ("assistant", self.completion)]
        return [{"role": role, "content": content} for role, content in turns if content is not None]

    def content_key(self) -> bytes:
        """All that decides the row's tokens, as canonical JSON: two rows with the same key tokenise alike. Origin and id are left out."""
        parts = [self.messages, self.prompt, self.completion, self.text, self.system, self.separator, self.first_supervised]
        return json.dumps(parts, sort_keys=True).encode()


@dataclass(frozen=True)
class Dropped:
    """A row that is not trained on. reason: "kind: particulars"; the kind, up to the first colon, is what is counted."""

    origin: str
    reason: str

    @property
    def kind(self) -> str:
        return self.reason.partition(":")[0]


def to_row(record: Any, origin: str, columns: Mapping[str, str], system: str | None) -> Row | Dropped:
    """Convert one record. columns: our name -> the file's name. system: put before rows that have no system turn of their own."""
    try:
        if not isinstance(record, dict):
            raise BadRow(f"not an object: the row is {_kind_of(record)}")
        form = form_of(record, columns)
        if form is None:
            raise BadRow(f"no known form: the columns are {', '.join(map(str, record)) or 'none'}")
        fields = {name: record.get(columns.get(name, name)) for name in COLUMNS}
        own_system = None if fields["system"] in (None, "") else _text(fields["system"], "system")
        row = _MAKERS[form](fields, origin)
        return _with_system(row, own_system or system)
    except BadRow as bad:
        return Dropped(origin, str(bad))


def form_of(record: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """The form that a record has: those with columns named in `columns` first, then by order of `FORMS`; filled before null columns."""
    forms = sorted(FORMS, key=lambda f: -sum(name in columns for name in FORMS[f]))
    if "label" not in columns:
        forms.remove("label")
    for is_there in (lambda c: record.get(c) is not None, lambda c: c in record):
        for form in forms:
            if all(is_there(columns.get(name, name)) for name in FORMS[form]):
                return form
    return None


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
    raise DataError(
        f"{where}: no training form found in its columns: {', '.join(seen) or 'none'}",
        problems=[*problems, f"understood: {UNDERSTOOD}"],
        fix="rename the columns, or map them, such as `columns: {prompt: question, completion: answer}` (our name: the file's name).",
    )


def bad_character(text: str) -> str | None:
    """What keeps `text` from being Unicode, or None. Bytes that were not UTF-8 arrive as surrogates (PEP 383) and are named as bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        return f"not UTF-8: byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"not Unicode: lone surrogate U+{code:04X}"
    return None


def _from_messages(fields: Mapping[str, Any], origin: str) -> Row:
    return Row(origin, messages=_messages(fields["messages"], "messages"))


def _from_conversations(fields: Mapping[str, Any], origin: str) -> Row:
    return Row(origin, messages=_messages(fields["conversations"], "conversations"))


def _from_prompt(fields: Mapping[str, Any], origin: str) -> Row:
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before, after = _messages(prompt, "prompt"), _messages(completion, "completion")
        return Row(origin, messages=before + after, first_supervised=len(before))
    return Row(origin, prompt=_text(prompt, "prompt"), completion=_filled(completion, "completion"))


def _from_instruction(fields: Mapping[str, Any], origin: str) -> Row:
    parts = [_text(fields["instruction"], "instruction")]
    if fields["input"] not in (None, ""):
        parts.append(_text(fields["input"], "input"))
    return Row(origin, prompt="\n\n".join(parts), completion=_filled(fields["output"], "output"), separator="\n\n")


def _from_label(fields: Mapping[str, Any], origin: str) -> Row:
    label = fields["label"]
    name = str(label) if isinstance(label, int) else _filled(label, "label")
    return Row(origin, prompt=_text(fields["text"], "text"), completion=name, separator="\n")


def _from_text(fields: Mapping[str, Any], origin: str) -> Row:
    return Row(origin, text=_filled(fields["text"], "text"))


_MAKERS = {
    "messages": _from_messages,
    "conversations": _from_conversations,
    "prompt": _from_prompt,
    "instruction": _from_instruction,
    "label": _from_label,
    "text": _from_text,
}


def _with_system(row: Row, system: str | None) -> Row:
    if system is None:
        return row
    if row.text is not None:
        raise BadRow("system with plain text: a system prompt needs a conversation or a prompt with its completion")
    if row.messages is None:
        return replace(row, system=system)
    if row.messages and row.messages[0]["role"] in ("system", "developer"):
        return row
    turn = {"role": "system", "content": system}
    return replace(row, messages=(turn, *row.messages), first_supervised=row.first_supervised + 1)


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    """Check a list of messages in either spelling (role/content, from/value); unknown roles and tool calls are refused, never guessed."""
    if not isinstance(value, list) or not value:
        raise BadRow(f"bad messages: {where} is {_kind_of(value)}, not a list of messages")
    return tuple(_message(turn, f"{where}[{i}]") for i, turn in enumerate(value))


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"bad messages: {where} is {_kind_of(turn)}, not an object with role and content")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise BadRow(f"tool calls: {where} calls a tool, which is not supported")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow(f"unknown role: {where} has role {role!r}{nearest(str(role), ROLES)}")
    return {"role": ROLES[role], "content": _text(turn.get("content", turn.get("value")), f"{where}.content")}


def _text(value: Any, where: str) -> str:
    """`value` as text; a list of text parts, as OpenAI writes content, is joined."""
    if isinstance(value, list) and value and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in value):
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise BadRow(f"not text: {where} is {_kind_of(value)}")
    if (found := bad_character(value)) is not None:
        raise BadRow(f"{found} in {where}")
    return value


def _filled(value: Any, where: str) -> str:
    text = _text(value, where)
    if not text.strip():
        raise BadRow(f"empty: {where} has no text")
    return text


def _kind_of(value: Any) -> str:
    kinds = {type(None): "null", dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "an empty list" if value == [] else kinds.get(type(value), type(value).__name__)
