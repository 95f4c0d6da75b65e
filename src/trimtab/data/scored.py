"""Texts as a head reads them, to be scored: the ids that the same row has in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.data.encode import encode_row
from trimtab.data.examples import Example
from trimtab.data.labels import UNLIMITED
from trimtab.data.rows import Row
from trimtab.errors import DataError


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
    as it is asked. DataError where it cannot be read.
    """
    if messages is not None:
        row = Row(where, messages=tuple(dict(m) for m in messages), read=())
    elif prompt is not None:
        row = Row(where, prompt=prompt, completion=text, read=())
    else:
        row = Row(where, text=text, read=tuple(steps))
    found = encode_row(row, tokenizer, UNLIMITED)
    if not isinstance(found, Example):
        raise DataError(f"{where} cannot be scored: {found.reason}")
    return found.ids.tolist(), found.supervised.nonzero()[0].tolist()
