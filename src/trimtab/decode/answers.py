"""An answer's text as its parts: reasoning, content and calls of tools, while it comes.

What is no valid call is content. A call whose name has been read is told at once where `eager`, its arguments as they come; else when it is
complete, so that a broken one can still become content. Nothing is held back but what may begin a tag.
"""

from __future__ import annotations

from trimtab.bases.call_grammar import Schemas
from trimtab.bases.calls import AnswerFormat
from trimtab.decode.call_reader import CallReader
from trimtab.decode.harmony import Harmony
from trimtab.decode.pieces import Piece, Reader, fed, joined
from trimtab.decode.response import ResponseReader

__all__ = ["Piece", "Reader", "fed", "joined", "reader_of"]


def reader_of(form: AnswerFormat, tools: Schemas, *, prompt: str, eager: bool) -> Reader | None:
    """The reader of one answer; None if its text is its content. tools: schemas of those that may be called. prompt: how it ends."""
    if form.response is not None:
        return ResponseReader(form.response, tools, prompt)
    if form.calls is not None and form.calls.harmony:
        return Harmony(tools)
    calls = form.calls if tools else None
    if calls is None and form.reasoning is None:
        return None
    opened = form.reasoning is not None and prompt.rstrip().endswith(form.reasoning[0])
    return CallReader(calls, tools, form.reasoning, opened=opened, eager=eager)
