"""Rows become token ids, with a mask of the supervised tokens.

    row                 | text                                                      | supervised
    conversation        | rendered by the base's chat template                      | each assistant turn (or the last) through its end
    prompt, completion  | a user and an assistant turn if there is a chat template, | the completion and its end
                        | else joined as they are, bos before, eos after            |
    text                | as it is, bos before, eos after                           | everything but the first token

If an answer was written with its end token, that one ends it. A row of a trusted source may have the text of control tokens in plain text:
it is read as the tokenizer reads it, and bos and eos are added only if the text does not have its own.

A tokenizer may merge the text on both sides of a boundary of supervision into one token. Three ways are tried, in this order:

- The whole text is tokenised. If that gives the tokens of each part (prompt, answer, …) one after the other, the mask is exact. This holds
  for nearly every row of nearly every base. Where a template's added tokens show that it holds, the parts are not tokenised
  (`ControlTokens.ends_in`).
- If the tokens of each text up to a boundary begin the tokens of the whole, the boundary is after them. This is for tokenizers that add or
  remove blanks.
- If a token crosses a boundary, the parts' own tokens are used, provided that together they spell the same text. A server does the same: it
  tokenises the prompt and lets the model continue. If the parts spell another text, the row is dropped.

A row that is not certain is dropped with a reason. No row is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain
from typing import Any

import numpy as np

from trimtab.bases.template import BadRow, Ids, Message, Template
from trimtab.data.rows import Dropped, Row, RowId, answer_of

RENDER_VERSION = 3
"""Counts up when the same row would give other ids or another mask; part of every digest."""


@dataclass(frozen=True, eq=False)
class Example:
    """A tokenised row. ids: int32 [T]. supervised: bool [T], True for a target: the loss of predicting ids[t] from ids[:t] counts.

    supervised[0] is always False. Tokens after the last supervised one affect no loss. origin: for messages. row: the row's identity.
    role: which of its row's segments this is, to an objective that reads several. others: the other segments of the row, which enter every
    forward and every loss with this one.
    """

    ids: np.ndarray
    supervised: np.ndarray
    origin: str
    row: RowId
    role: str = ""
    others: tuple[Example, ...] = ()

    @property
    def segments(self) -> tuple[Example, ...]:
        """The row's segments, this one first."""
        return (self, *self.others)

    @property
    def tokens(self) -> int:
        """Of all segments."""
        return sum(len(s.ids) for s in self.segments)

    @property
    def longest(self) -> int:
        """Tokens of the longest segment."""
        return max(len(s.ids) for s in self.segments)

    @property
    def targets(self) -> int:
        """Supervised tokens of all segments."""
        return sum(int(s.supervised.sum()) for s in self.segments)


@dataclass(frozen=True)
class _Rendered:
    """A row as text. pieces: (text, whether it is supervised) in order. bos before and eos after them are ids; eos is supervised."""

    pieces: tuple[tuple[str, bool], ...]
    bos: Ids
    eos: Ids
    chat: bool
    trusted: bool = False

    @cached_property
    def whole(self) -> str:
        return "".join(text for text, _ in self.pieces)


def encode_row(
    row: Row, tokenizer: Any, max_length: int, *, last_turn_only: bool = False, vocab_size: int | None = None
) -> Example | Dropped:
    """One row's ids and mask, or why it cannot be trained on. `encode_rows` is faster for many.

    max_length: in tokens; a longer row is dropped. last_turn_only: supervise only the last assistant turn of a conversation. vocab_size:
    rows of the base's embedding, which may be fewer than the tokenizer's tokens; a row with an id beyond is dropped.
    Raises DataError if the row is a conversation and the base has no chat template.
    """
    return encode_rows([row], tokenizer, max_length, last_turn_only=last_turn_only, vocab_size=vocab_size)[0]


def encode_rows(
    rows: Sequence[Row], tokenizer: Any, max_length: int, *, last_turn_only: bool = False, vocab_size: int | None = None
) -> list[Example | Dropped]:
    """As `encode_row`, for many rows at once: result i belongs to row i. The tokenizer's own threads share the work."""
    segments = [s for row in rows for s in row.segments]
    return joined(rows, _encode(segments, tokenizer, max_length, last_turn_only, vocab_size))


def joined(rows: Sequence[Row], results: Sequence[Example | Dropped]) -> list[Example | Dropped]:
    """What became of each row, from what became of each of their segments, in order: a row is dropped with any of its segments."""
    rest = iter(results)
    return [_joined(row, [next(rest) for _ in row.segments]) for row in rows]


def _joined(row: Row, results: Sequence[Example | Dropped]) -> Example | Dropped:
    kept = [e for e in results if isinstance(e, Example)]
    if len(kept) < len(results):
        return next(r for r in results if isinstance(r, Dropped))
    if not row.role and not row.others:
        return kept[0]
    segments = [replace(e, role=r.role) for e, r in zip(kept, row.segments, strict=True)]
    return replace(segments[0], others=tuple(segments[1:]))


def _encode(rows: Sequence[Row], tokenizer: Any, max_length: int, last_turn_only: bool, vocab_size: int | None) -> list[Example | Dropped]:
    template = Template(tokenizer)
    rendered: list[_Rendered | str] = []
    for row in rows:
        try:
            rendered.append(_render(row, template, last_turn_only))
        except BadRow as bad:
            rendered.append(str(bad))
    good = [r for r in rendered if isinstance(r, _Rendered)]
    wholes = template.ids_of([r.whole for r in good])
    ends = [_ends(r, whole, template) for r, whole in zip(good, wholes, strict=True)]
    pieces = iter(template.ids_of([text for r, known in zip(good, ends, strict=True) if known is None for text, _ in r.pieces]))
    parts = [[next(pieces) for _ in r.pieces] if known is None else None for r, known in zip(good, ends, strict=True)]
    found = iter(zip(wholes, ends, parts, strict=True))
    results: list[Example | Dropped] = []
    for row, r in zip(rows, rendered, strict=True):
        if isinstance(r, str):
            results.append(Dropped(row.origin, r))
            continue
        try:
            ids, mask = _join(r, *next(found), template)
            _check_ids(ids, vocab_size, template)
            results.append(_example(row, ids, mask, r.chat, max_length))
        except BadRow as bad:
            results.append(Dropped(row.origin, str(bad)))
    return results


def _ends(r: _Rendered, whole: Ids, template: Template) -> list[int] | None:
    """Where each piece ends within `whole`, if that is seen without tokenising the pieces."""
    if len(r.pieces) == 1:
        return [len(whole)]
    cuts = list(accumulate(len(text) for text, _ in r.pieces))[:-1]
    found = template.ends_in(r.whole, cuts, whole)
    return None if found is None else [*found, len(whole)]


def as_learnt(row: Row, template: Template) -> Row:
    """The row with its answers as they are learnt: without the end token that one may have been written with."""
    if not template.specials.search(answer_of(row) or ""):
        return row
    if row.completion is not None:
        return replace(row, completion=template.without_end(row.completion))
    turns = [{**m, "content": template.without_end(m["content"])} if m["role"] == "assistant" else m for m in row.messages or ()]
    return replace(row, messages=tuple(turns))


def _render(row: Row, template: Template, last_turn_only: bool) -> _Rendered:
    if row.text is not None:
        return _render_text(row.text, ((row.text, True),), row.trusted, template)
    if row.messages is None and not template.exists:
        return render_plain(row, template)
    return _render_conversation(row, template, last_turn_only)


def render_plain(row: Row, template: Template) -> _Rendered:
    """A prompt and its completion, joined as they are: for bases without a chat template."""
    assert row.prompt is not None and row.completion is not None
    if row.system is not None:
        raise BadRow("system without a chat template: the base has none")
    completion = row.completion if row.trusted else template.without_end(row.completion)
    if not row.trusted:
        template.refuse_specials(row.prompt, "prompt")
        template.refuse_specials(completion, "completion")
    pieces = ((row.prompt + row.separator, False), (completion, True))
    return _render_text(row.prompt + row.separator + completion, pieces, row.trusted, template)


def _render_text(text: str, pieces: tuple[tuple[str, bool], ...], trusted: bool, template: Template) -> _Rendered:
    """Text without a template; trusted: it may begin and end with control tokens of its own."""
    if not trusted:
        template.refuse_specials(text, "text")
    bos = [] if trusted and template.begins(text) else template.bos
    eos = [] if trusted and template.ends_itself(text) else _eos(template)
    return _Rendered(tuple(p for p in pieces if p[0]), bos, eos, chat=False, trusted=trusted)


def _render_conversation(row: Row, template: Template, last_turn_only: bool) -> _Rendered:
    """Messages after the last turn that is learnt are left out, which changes no loss."""
    answers = row.answers
    last = answers[-1] if answers else None
    messages = (row.conversation or [])[: 0 if last is None else last + 1]
    if last is None:
        raise BadRow("nothing supervised: the row has no assistant turn to learn from")
    messages = template.conversation(messages)
    if last_turn_only or len(answers) == 1:
        turn = template.last_turn(messages)
        pieces, rest, end = [(turn.prompt, False), (turn.answer, True)], turn.rest, turn.end
    else:
        pieces, rest, end = _all_turns(messages, answers, template)
    if end is not None:
        return _Rendered(tuple(p for p in [*pieces, (rest, False)] if p[0]), [], [], chat=True)
    # No end-of-turn token of the template's own: without one the adapter would never learn to stop.
    return _Rendered(tuple(p for p in pieces if p[0]), [], _eos(template), chat=True)


def _all_turns(messages: list[Message], turns: Sequence[int], template: Template) -> tuple[list[tuple[str, bool]], str, str | None]:
    """The finished conversation in pieces, each of `turns` supervised; what stands after the last of them; and its end token."""
    whole = template.whole(messages, turns)
    text = whole.text
    pieces: list[tuple[str, bool]] = []
    done, end = 0, None
    for index in turns:
        start, stop, end = template.turn(whole, index)
        pieces += [(text[done:start], False), (text[start:stop], True)]
        done = stop
    return pieces, text[done:], end


def _join(r: _Rendered, whole: Ids, ends: list[int] | None, parts: list[Ids] | None, template: Template) -> tuple[Ids, list[bool]]:
    """The row's ids and mask by the first of the three ways that holds. ends: of the pieces within `whole`; else parts: their ids."""
    ids = whole
    if ends is None:
        assert parts is not None
        ids, ends = list(chain.from_iterable(parts)), list(accumulate(map(len, parts)))
        if ids != whole:
            if (found := _prefix_ends(r, whole, template)) is not None:
                ids, ends = whole, found
            elif template.text_of(ids) != template.text_of(whole):
                raise BadRow("the tokenizer merges prompt and answer: the pieces alone spell another text")
    if not r.trusted and template.is_forged(r.whole, ids):
        raise BadRow("special token in the content: look-alike characters turn into a control token when tokenised")
    mask: list[bool] = []
    for end, (_, flag) in zip(ends, r.pieces, strict=True):
        mask += [flag] * (end - len(mask))
    return [*r.bos, *ids, *r.eos], [False] * len(r.bos) + mask + [True] * len(r.eos)


def _prefix_ends(r: _Rendered, whole: Ids, template: Template) -> list[int] | None:
    """Where each piece ends within `whole`, if the tokens of the text so far start it; None if a token straddles a boundary."""
    so_far = list(accumulate(text for text, _ in r.pieces))
    encoded = template.ids_of(so_far[:-1])
    if any(whole[: len(ids)] != ids for ids in encoded):
        return None
    return [*map(len, encoded), len(whole)]


def _check_ids(ids: Ids, vocab_size: int | None, template: Template) -> None:
    """BadRow if a token has no row in the base's embedding: a tokenizer that was given tokens, for a base that was not resized."""
    if vocab_size is not None and (large := max(ids, default=0)) >= vocab_size:
        token = template.tokenizer.convert_ids_to_tokens(large)
        raise BadRow(f"token outside the base: {token!r} has id {large}, and the base's embedding has {vocab_size} rows")


def _example(row: Row, ids: Ids, mask: list[bool], chat: bool, max_length: int) -> Example:
    if len(ids) > max_length:
        raise BadRow(f"over-long: {len(ids)} tokens, max_length is {max_length}")
    if chat and all(mask):
        raise BadRow("everything supervised: the chat template writes nothing before the answer")
    supervised = np.array(mask, dtype=bool)
    supervised[:1] = False  # nothing stands before the first token to predict it from
    if not supervised.any():
        raise BadRow("nothing supervised: no token is left to learn")
    return Example(np.array(ids, dtype=np.int32), supervised, row.origin, row.id)


def _eos(template: Template) -> Ids:
    return [] if template.eos is None else [template.eos]
