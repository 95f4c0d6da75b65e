"""Texts as a head reads them, to be scored: the ids that the same row has in training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from trimtab.bases.control_tokens import SPELT
from trimtab.bases.template import Message, Template
from trimtab.bases.tool_turns import BadRow, texts_in
from trimtab.data.characters import bad_character
from trimtab.data.encode import STEP_END, encode_row
from trimtab.data.examples import Example
from trimtab.data.labels import UNLIMITED
from trimtab.data.render import render
from trimtab.data.rows import Row
from trimtab.errors import DataError

SURROGATE = re.compile("[\ud800-\udfff]")


def read_ids(
    tokenizer: Any,
    text: str | None = None,
    *,
    prompt: str | None = None,
    messages: Sequence[Mapping[str, Any]] | None = None,
    steps: Sequence[str] = (),
    where: str = "the text",
) -> tuple[list[int], list[int]]:
    """(ids, places in them at which a head is read: the last one, or the end of each step behind a text).

    One of: a text as it is; a prompt with its answer, rendered as training does; a conversation, whole where it ends with an answer, else
    as it is asked. What it spells out is text: none of it becomes a control token. (Training leaves out rows that spell one out.) DataError
    where it cannot be read.
    """
    if messages is not None:
        row = Row(where, messages=tuple(dict(m) for m in messages), read=())
    elif prompt is not None:
        row = Row(where, prompt=prompt, completion=text, read=())
    else:
        row = Row(where, text=text, read=tuple(steps))
    given = (row.text, row.prompt, row.completion, row.messages, row.read)
    if bad := next((text for text in texts_in(given) if SURROGATE.search(text)), None):  # no tokenizer takes them
        raise DataError(f"{where} cannot be scored: {bad_character(bad)}", fix="send it as UTF-8")
    found = encode_row(row, tokenizer, UNLIMITED)
    if isinstance(found, Example):
        return found.ids.tolist(), found.supervised.nonzero()[0].tolist()
    try:
        if found.reason.startswith(SPELT):
            return _characters(row, Template(tokenizer))
    except BadRow as bad:
        raise DataError(f"{where} cannot be scored: {bad}") from None
    raise DataError(f"{where} cannot be scored: {found.reason}")


def _characters(row: Row, template: Template) -> tuple[list[int], list[int]]:
    """The same of a row of which some text spells out a control token. An end token that an answer was written with still ends it."""
    plain = template.plain
    hidden = replace(
        row,
        text=row.text and plain.hidden(row.text),
        prompt=row.prompt and plain.hidden(row.prompt),
        completion=row.completion and plain.hidden(template.without_end(row.completion)),
        messages=row.messages and tuple(plain.hidden_in(_without_end(m, template)) for m in row.messages),
    )
    (rendered,) = render(hidden, template, True)
    ids = [*rendered.bos, *plain.ids(plain.shown(rendered.whole)), *rendered.eos]
    if not row.read:
        return ids, [len(ids) - 1]
    places = []
    for step in row.read:
        ids += [*plain.ids(plain.shown(plain.hidden(step))), *template.ids_of([STEP_END])[0]]
        places.append(len(ids) - 1)
    return ids, places


def _without_end(message: Message, template: Template) -> Message:
    content = message.get("content")
    return (
        message | {"content": template.without_end(content)} if message.get("role") == "assistant" and isinstance(content, str) else message
    )
