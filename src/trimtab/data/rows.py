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

Any of them but `text` may have a `system` column, and any of them but `text` and `label` the `tools` that it may use, and settings for the
chat template (`chat_template_kwargs`). Prompts and instructions may have a `history` of [user, assistant] pairs, which makes a conversation
of them. Every other key that common formats give a meaning stands in `keys`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

from trimtab.bases.template import BadRow, Message
from trimtab.bases.tool_turns import calls_of
from trimtab.data.calls import read_tools, refuse_no_json, said_by, settings_in
from trimtab.data.forms import FIELDS, PASSED, form_of, refuse_keys
from trimtab.data.keys import MARKS, MASKS, MEDIA, SETTING_KEYS, flag, is_blank, is_empty
from trimtab.data.pairs import REJECTED, UNDESIRABLE
from trimtab.data.prompts_alone import Asked
from trimtab.data.turns import Turn, earlier, filled, is_talk, kind_of, read_turns, talk_in, text_of, unasked

RowId = tuple[int, int]
"""Which row it is: the number of its source among those that are read together, and its own number among the source's rows."""
_unread = itertools.count()
_CANONICAL = json.JSONEncoder(sort_keys=True, default=str)
Record = Mapping[str, Any]


class Read(dict[str, Any]):
    """A record of which a head says something: at its last token, or after a prompt at the last token of each of the `steps`."""

    steps: tuple[str, ...] = ()


Parts = Callable[[Record], Mapping[str, Record | Asked]]
"""How a record becomes the segments of a row: role -> a record of one of the forms, or a prompt without an answer. BadRow or KeyError where
it lacks a column."""


def whole(record: Record) -> Mapping[str, Record]:
    """One segment: the record as it is."""
    return {"": record}


@dataclass(frozen=True)
class Row:
    """One training row: exactly one of `messages`, `prompt` with `completion`, or `text`. If it is `asked`, it is a prompt alone: messages,
    or a text.

    origin: "file:line", for people only: rows may share it. id: what the row is found by; a row of no source gets one that no other has.
    system: a system turn that goes before prompt. separator: stands between prompt and completion where there is no chat template (alpaca
    and label rows; prompt/completion rows are joined as they are). first_supervised: index of the first message that may be supervised.
    unsupervised: indexes of later assistant messages that may not, because their author marked them so. tools: that the conversation may
    use. settings: variables of the chat template. trusted: control tokens in its plain text are read as such. role: what the row is to its
    objective, where that reads several segments from a record; the first of them is the row, and holds the others. read: where a head reads
    the row instead of an answer being learnt: (), at its last token; texts that follow it, at the last token of each.
    """

    origin: str
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    system: str | None = None
    separator: str = ""
    first_supervised: int = 0
    unsupervised: tuple[int, ...] = ()
    tools: tuple[Message, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    trusted: bool = False
    asked: Asked | None = None
    id: RowId = field(default_factory=lambda: (-1, next(_unread)), compare=False)
    role: str = ""
    others: tuple[Row, ...] = ()
    read: tuple[str, ...] | None = None

    @property
    def segments(self) -> tuple[Row, ...]:
        """The row and the others of its record, each alone."""
        return (replace(self, others=()), *self.others) if self.others else (self,)

    @property
    def conversation(self) -> list[Message] | None:
        """The row as messages (a prompt is a user turn, its completion an assistant turn); None for plain text."""
        if self.messages is not None:
            return list(self.messages)
        if self.prompt is None:
            return None
        turns = [("system", self.system), ("user", self.prompt), ("assistant", self.completion)]
        return [{"role": role, "content": content} for role, content in turns if content is not None]

    @property
    def variables(self) -> dict[str, Any]:
        """What the chat template gets beside the messages."""
        return {**self.settings, **({"tools": list(self.tools)} if self.tools else {})}

    @cached_property
    def answers(self) -> list[int]:
        """Indexes in `conversation` of the assistant turns to train on; empty for plain text."""
        turns = self.conversation if self.messages is None else self.messages
        found = [i for i, m in enumerate(turns or ()) if m["role"] == "assistant" and i >= self.first_supervised]
        return [i for i in found if i not in self.unsupervised] if self.unsupervised else found

    @cached_property
    def content_key(self) -> bytes:
        """All that decides the row's tokens, as canonical JSON: two rows with the same key tokenise alike. Origin and id are left out."""
        parts: list[Any] = [self.messages, self.prompt, self.completion, self.text, self.system, self.separator, self.first_supervised]
        parts += [self.unsupervised] if self.unsupervised else []
        parts += [{"tools": self.tools, "settings": self.settings}] if self.tools or self.settings else []
        parts += [{"trusted": True}] if self.trusted else []
        parts += [{"asked": [self.asked.reference, self.asked.record]}] if self.asked else []
        parts += [] if self.read is None else [{"read": self.read}]
        parts += [{"role": self.role}] if self.role else []  # rows without any of these keep the digests that they had
        return _CANONICAL.encode(parts).encode()


UNWANTED = frozenset((REJECTED, UNDESIRABLE))
"""Roles of segments whose answers are not to be given."""


def answer_of(row: Row) -> str | None:
    """The text that a model should answer with: the last assistant turn to learn from, such as the completion; None if there is none. Calls
    are JSON."""
    if row.role in UNWANTED or row.read is not None:
        return None
    return said_by(row.conversation[row.answers[-1]]) if row.conversation and row.answers else None


@dataclass(frozen=True)
class Dropped:
    """A row that is not trained on. reason: "kind: particulars". Reports count the kinds, the part up to the first colon."""

    origin: str
    reason: str

    @property
    def kind(self) -> str:
        return self.reason.partition(":")[0]


Records: TypeAlias = Iterator[tuple[str, Any] | Dropped]
"""What readers of files give: (origin, record), or what could not be read."""


def to_row(record: Any, origin: str, columns: Mapping[str, str], system: str | None) -> Row | Dropped:
    """Convert one record. columns: our name -> the file's name. system: put before rows that have no system turn of their own."""
    try:
        if not isinstance(record, dict):
            raise BadRow(f"not an object: the row is {kind_of(record)}")
        form = form_of(record, columns)
        refuse_keys(record, columns, form)
        if form is None:
            raise BadRow(f"no known form: the columns are {', '.join(map(str, record)) or 'none'}")
        fields = {name: record.get(columns.get(name, name)) for name in FIELDS[form]}
        own_system = None if is_blank(fields["system"]) else text_of(fields["system"], "system")
        return _with_system(_equipped(_MAKERS[form](fields, origin), record, fields["tools"]), own_system or system)
    except BadRow as bad:
        return Dropped(origin, str(bad))


def named_as_ours(record: Record, columns: Mapping[str, str]) -> Record:
    """The record with our names of the columns that `columns` names; the file's own columns of these names are left out."""
    theirs = set(columns.values())
    rest = {k: v for k, v in record.items() if k not in theirs and k not in columns}
    return rest | {ours: record[name] for ours, name in columns.items() if name in record} if columns else record


def to_segments(record: Any, origin: str, columns: Mapping[str, str], system: str | None, parts: Parts) -> Row | Dropped:
    """A record as the row of an objective that reads several segments from it; if one cannot be read, the record is dropped."""
    try:
        named = parts(named_as_ours(record, columns)) if isinstance(record, dict) and parts is not whole else whole(record)
    except (BadRow, KeyError) as bad:
        return Dropped(origin, f"no column {bad}: the objective reads it" if isinstance(bad, KeyError) else str(bad))
    rows: list[Row] = []
    for role, part in named.items():
        if isinstance(part, Asked):
            row = _to_prompt(part, origin, system)
        else:
            row = to_row(part, origin, columns if parts is whole else {}, system)
        if isinstance(row, Dropped):
            return Dropped(origin, f"{row.reason} ({role})") if role else row
        object.__setattr__(row, "role", role)  # nobody else has it yet
        object.__setattr__(row, "read", part.steps if isinstance(part, Read) else None)
        rows.append(row)
    if not rows:
        return Dropped(origin, "nothing supervised: the objective reads no segment from this row")
    object.__setattr__(rows[0], "others", tuple(rows[1:]))
    return rows[0]


def _to_prompt(asked: Asked, origin: str, system: str | None) -> Row | Dropped:
    """A prompt alone."""
    try:
        refuse_keys({k: v for k, v in asked.record.items() if k in MEDIA}, {}, None)
        own = None if is_blank(asked.record.get("system")) else text_of(asked.record["system"], "system")
        if isinstance(asked.prompt, list):
            messages = tuple(m for m, _ in read_turns(asked.prompt, "prompt"))
            if not messages or messages[-1]["role"] not in ("user", "tool"):
                raise BadRow("no prompt: the messages do not end with a question")
            row = Row(origin, messages=messages, first_supervised=len(messages), asked=asked)
        else:
            row = Row(origin, prompt=filled(asked.prompt, "prompt"), asked=asked)
        return _with_system(_equipped(row, asked.record, asked.record.get("tools")), own or system)
    except BadRow as bad:
        return Dropped(origin, str(bad))


def _from_messages(fields: Mapping[str, Any], origin: str) -> Row:
    return _talk(origin, read_turns(fields["messages"], "messages"), "messages")


def _from_conversations(fields: Mapping[str, Any], origin: str) -> Row:
    return _talk(origin, read_turns(fields["conversations"], "conversations"), "conversations")


def _from_prompt(fields: Mapping[str, Any], origin: str) -> Row:
    prompt, completion = fields["prompt"], fields["completion"]
    asked, answered = talk_in(prompt), talk_in(completion)
    if is_talk(asked) and isinstance(answered, str):
        answered = [{"role": "assistant", "content": filled(answered, "completion")}]
    elif isinstance(asked, str) and is_talk(answered):
        if not is_empty(fields["history"]):
            raise BadRow("history: the completion is a list of messages; write the prompt as one too, with what was before")
        asked = [{"role": "user", "content": asked}]
    if isinstance(asked, list) and isinstance(answered, list):
        if not is_empty(fields["history"]):
            raise BadRow("history: the prompt is a list of messages, which holds what was before")
        before, after = read_turns(asked, "prompt"), read_turns(answered, "completion")
        return _talk(origin, before + after, "prompt and completion", first=len(before))
    row = Row(origin, prompt=text_of(prompt, "prompt"), completion=filled(completion, "completion"))
    return _with_history(row, fields["history"])


def _from_instruction(fields: Mapping[str, Any], origin: str) -> Row:
    parts = [text_of(fields["instruction"], "instruction")]
    if not is_blank(fields["input"]):
        parts.append(text_of(fields["input"], "input"))
    row = Row(origin, prompt="\n\n".join(parts), completion=filled(fields["output"], "output"), separator="\n\n")
    return _with_history(row, fields["history"])


def _from_label(fields: Mapping[str, Any], origin: str) -> Row:
    label = fields["label"]
    if is_blank(label):
        raise BadRow("no label: label is empty")
    name = str(label) if isinstance(label, int) else filled(label, "label").strip()  # as it is judged
    return Row(origin, prompt=text_of(fields["text"], "text"), completion=name, separator="\n")


def _from_text(fields: Mapping[str, Any], origin: str) -> Row:
    return Row(origin, text=filled(fields["text"], "text"))


_MAKERS = {
    "messages": _from_messages,
    "conversations": _from_conversations,
    "prompt": _from_prompt,
    "instruction": _from_instruction,
    "label": _from_label,
    "text": _from_text,
}


def _talk(origin: str, turns: Sequence[Turn], where: str, first: int = 0) -> Row:
    """A conversation. Assistant turns before anything is asked are left out; what is learnt has text."""
    skipped = unasked([m["role"] for m, _ in turns])
    kept = [i for i in range(len(turns)) if i not in skipped]
    messages = tuple([turns[i][0] for i in kept])
    marked = tuple([n for n, i in enumerate(kept) if not turns[i][1] and turns[i][0]["role"] == "assistant"])
    first_kept = sum([i < first for i in kept]) if first else 0
    row = Row(origin, messages=messages, first_supervised=first_kept, unsupervised=marked)
    answers = row.answers
    if skipped and not answers:
        raise BadRow(f"nothing supervised: {where} begins with the assistant, and nothing is asked before its turns")
    if marked and not answers:
        raise BadRow(f"weight: every answer in {where} is marked as not to be learnt ({', '.join((*MARKS, *MASKS))})")
    for i in answers:
        if not messages[i]["content"].strip() and not calls_of(messages[i]):
            raise BadRow(f"empty: {where}[{kept[i]}] has no text")
    return row


def _equipped(row: Row, record: Record, tools: Any) -> Row:
    """The row with the tools and the settings of its record."""
    if row.text is not None or (tools is None and PASSED.isdisjoint(record)):
        return row
    found = read_tools(tools, "tools") or read_tools(record.get("functions"), "functions")
    settings: dict[str, Any] = {}
    for key in SETTING_KEYS:
        if is_empty(value := record.get(key)):
            continue
        if key == "chat_template_kwargs":
            settings |= {k: v for k, v in settings_in(value).items() if v is not None}
            continue
        settings[key] = flag(value) if key == "enable_thinking" else value
        if settings[key] is None:
            raise BadRow(f"{key}: {value!r} is neither true nor false")
    refuse_no_json(settings, "the settings of the chat template")
    return replace(row, tools=found, settings=settings) if found or settings else row


def _with_history(row: Row, history: Any) -> Row:
    """The row with its earlier turns before it, as a conversation."""
    if is_empty(history):
        return row
    turns = [(m, True) for m in (*earlier(history), *(row.conversation or ()))]
    return _talk(row.origin, turns, "history with its prompt")


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
    marked = tuple(i + 1 for i in row.unsupervised)
    return replace(row, messages=(turn, *row.messages), first_supervised=row.first_supervised + 1, unsupervised=marked)
