"""Rows become texts, in pieces of which each is supervised or not.

    row                 | text                                                      | supervised
    conversation        | rendered by the base's chat template                      | each assistant turn (or the last) through its end
    the same, where the | each assistant turn as it will be served: the prompt, the | the answer of each
    template rewrites   | answer and its end. These are segments of one row, and    |
    earlier turns       | the first tokens that two have in common are rows once    |
    prompt, completion  | a user and an assistant turn if there is a chat template, | the completion and its end
                        | else joined as they are, bos before, eos after            |
    text                | as it is, bos before, eos after                           | everything but the first token
    a prompt alone      | rendered up to where the answer begins                    | nothing
    read by a head      | as above, without eos behind a text; a conversation that  | the last token
                        | ends with a question as it is asked                       |
    the same, in steps  | a text, and each step with a line break                   | the last token of each step

If an answer was written with its end token, that one ends it. A row of a trusted source may have the text of control tokens in plain text:
it is read as the tokenizer reads it, and bos and eos are added only if the text does not have its own.

Where a row's text or what of it is supervised is not certain, `BadRow` says why, and the row is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from trimtab.bases.dialect import is_plain
from trimtab.bases.marks import Ids, Marks
from trimtab.bases.prompts import Rewrites
from trimtab.bases.remembered import remembered
from trimtab.bases.shaping import NONE
from trimtab.bases.skeleton import LONGEST, fill
from trimtab.bases.template import BadRow, Message, Template
from trimtab.bases.tool_turns import texts_in
from trimtab.data.rows import Row, answer_of
from trimtab.data.sheets import Pieces, Sheet, sheet_of


@dataclass(frozen=True)
class Rendered:
    """A row as text. pieces: (text, whether it is supervised) in order. bos before and eos after them are ids; eos is supervised. marks: of
    the places between the pieces, if they are known already; then no content forges a token. question: it is a prompt alone."""

    pieces: Pieces
    bos: Ids
    eos: Ids
    chat: bool
    trusted: bool = False
    marks: Marks | None = None
    question: bool = False

    @cached_property
    def whole(self) -> str:
        return "".join(text for text, _ in self.pieces)


def render(row: Row, template: Template, last_turn_only: bool) -> list[Rendered]:
    """The row as texts: one, or one for each turn to learn."""
    if row.asked is not None:
        return [_render_question(row, template)]
    if row.text is not None:
        whole = _render_text(row.text, ((row.text, True),), row.trusted, template)
        return [whole if row.read is None else replace(whole, eos=[])]
    if row.messages is None and not template.exists:
        return [render_plain(row, template)]
    if row.read is not None and (row.conversation or [{}])[-1].get("role") != "assistant":
        messages, variables = template.conversation(row.conversation or []), variables_of(row, template)
        return [Rendered(((template.prompt(messages, variables), False),), [], [], chat=True)]
    return _render_conversation(row, template, last_turn_only or row.read is not None)


def _render_question(row: Row, template: Template) -> Rendered:
    """A prompt alone, ready for the answer."""
    if not template.exists:
        if row.prompt is None or row.system is not None or row.tools or row.settings:
            raise BadRow("messages without a chat template: the base has none")
        return replace(_render_text(row.prompt, ((row.prompt, False),), row.trusted, template, ends=False), question=True)
    prompt = template.prompt(template.conversation(row.conversation or []), variables_of(row, template))
    return Rendered(((prompt, False),), [], [], chat=True, question=True)


def render_plain(row: Row, template: Template) -> Rendered:
    """A prompt and its completion, joined as they are: for bases without a chat template."""
    assert row.prompt is not None and row.completion is not None
    if row.system is not None:
        raise BadRow("system without a chat template: the base has none")
    if row.tools or row.settings:
        raise BadRow("tools without a chat template: the base has none")
    completion = row.completion if row.trusted else template.without_end(row.completion)
    if not row.trusted:
        template.refuse_specials(row.prompt, "prompt")
        template.refuse_specials(completion, "completion")
    pieces = ((row.prompt + row.separator, False), (completion, True))
    return _render_text(row.prompt + row.separator + completion, pieces, row.trusted, template)


def _render_text(text: str, pieces: tuple[tuple[str, bool], ...], trusted: bool, template: Template, ends: bool = True) -> Rendered:
    """Text without a template; trusted: it may begin and end with control tokens of its own. ends: nothing follows it."""
    if not text:
        raise BadRow("empty: the text has no characters")
    if not trusted:
        template.refuse_specials(text, "text")
    bos = [] if trusted and template.begins(text) else template.bos
    eos = [] if not ends or (trusted and template.ends_itself(text)) else _eos(template)
    return Rendered(tuple(p for p in pieces if p[0]), bos, eos, chat=False, trusted=trusted)


def _render_conversation(row: Row, template: Template, last_turn_only: bool) -> list[Rendered]:
    """Messages after the last turn that is learnt are left out, which changes no loss."""
    answers = row.answers[-1:] if last_turn_only else row.answers
    if not answers:
        raise BadRow("nothing supervised: the row has no assistant turn to learn from")
    messages = (row.conversation or [])[: answers[-1] + 1]
    if not row.tools and not row.settings and (known := _filled_in(messages, answers, template)) is not None:
        return [known]
    messages, variables = template.conversation(messages), variables_of(row, template)
    try:
        return [_chat(*_answered(messages, answers, variables, template), template)]
    except Rewrites:
        if row.role or len(answers) == 1:  # an objective reads the segments of a row by their roles
            raise
        return [_chat(*_answered(messages[: i + 1], [i], variables, template), template) for i in answers]


def _filled_in(messages: Sequence[Message], answers: Sequence[int], template: Template) -> Rendered | None:
    """A conversation whose pieces are known but for the contents; else None."""
    if len(messages) > LONGEST or not template.exists or not is_plain(messages):
        return None
    roles, contents = tuple([m["role"] for m in messages]), [m["content"] for m in messages]
    sheet: Sheet | None = remembered(template.sheets, (roles, tuple(answers)), lambda: _sheet(roles, answers, template))
    if sheet is None or any(map(template.specials.search, contents)):
        return None
    for beside in sheet.side_by_side:
        template.refuse_specials("".join(fill(beside, contents)), "contents side by side")
    marks = None if any(map(template.holds_added, contents)) else sheet.marks
    return Rendered(sheet.filled(contents), [], [], chat=True, marks=marks)


def _sheet(roles: Sequence[str], answers: Sequence[int], template: Template) -> Sheet | None:
    def find(talk: Sequence[Message], answers: Sequence[int]) -> tuple[Pieces, str | None]:
        pieces, rest, end = _answered(list(talk), answers, NONE, template)
        return tuple(_written([*pieces, (rest, False)])), end

    return sheet_of(template, roles, answers, find)


def variables_of(row: Row, template: Template) -> Mapping[str, Any]:
    """What the template gets beside the messages. BadRow where it does not read a setting, or content of the row would be read as control
    tokens."""
    if not row.tools and not row.settings:
        return NONE
    if unread := row.settings.keys() - template.reads:
        raise BadRow(f"chat_template_kwargs: the chat template does not read {', '.join(sorted(unread))}")
    for text in texts_in(row.variables):
        template.refuse_specials(text, "tools")
    return row.variables


def _answered(
    messages: list[Message], answers: Sequence[int], variables: Mapping[str, Any], template: Template
) -> tuple[list[tuple[str, bool]], str, str | None]:
    """A conversation in pieces, each of `answers` supervised, which ends with the last of them; what stands after that; and its end token.
    A last turn alone is rendered as it will be served."""
    if len(answers) > 1:
        return _all_turns(messages, answers, variables, template)
    turn = template.last_turn(messages, variables)
    return [(turn.prompt, False), (turn.answer, True)], turn.rest, turn.end


def _chat(pieces: Sequence[tuple[str, bool]], rest: str, end: str | None, template: Template) -> Rendered:
    if end is not None:
        return Rendered(tuple(_written([*pieces, (rest, False)])), [], [], chat=True)
    # No end-of-turn token of the template's own: without one the adapter would never learn to stop.
    return Rendered(tuple(_written(pieces)), [], _eos(template), chat=True)


def _written(pieces: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
    return [p for p in pieces if p[0]]


def _all_turns(
    messages: list[Message], turns: Sequence[int], variables: Mapping[str, Any], template: Template
) -> tuple[list[tuple[str, bool]], str, str | None]:
    """The finished conversation in pieces, each of `turns` supervised; what stands after the last of them; and its end token."""
    whole = template.whole(messages, turns, variables)
    text = whole.text
    pieces: list[tuple[str, bool]] = []
    done, end = 0, None
    for index in turns:
        start, stop, end = template.turn(whole, index)
        pieces += [(text[done:start], False), (text[start:stop], True)]
        done = stop
    return pieces, text[done:], end


def _eos(template: Template) -> Ids:
    return [] if template.eos is None else [template.eos]


def as_learnt(row: Row, template: Template) -> Row:
    """The row with its answers as they are learnt: without the end token that one may have been written with."""
    if not template.specials.search(answer_of(row) or ""):
        return row
    if row.completion is not None:
        return replace(row, completion=template.without_end(row.completion))
    turns = [{**m, "content": template.without_end(m["content"])} if m["role"] == "assistant" else m for m in row.messages or ()]
    return replace(row, messages=tuple(turns))
