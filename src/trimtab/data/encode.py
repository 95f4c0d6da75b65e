"""Rows become token ids, with a mask of the supervised tokens.

A tokenizer may merge the text on both sides of a boundary of supervision into one token. Three ways are tried, in this order:

- The whole text is tokenised. If that gives the tokens of each part (prompt, answer, …) one after the other, the mask is exact. This holds
  for nearly every row of nearly every base. Where a template's added tokens show that it holds, the parts are not tokenised
  (`bases.marks`).
- If the tokens of each text up to a boundary begin the tokens of the whole, the boundary is after them. This is for tokenizers that add or
  remove blanks.
- If a token crosses a boundary, the parts' own tokens are used, provided that together they spell the same text. A server does the same: it
  tokenises the prompt and lets the model continue. If the parts spell another text, the row is dropped.

A row that is not certain is dropped with a reason. No row is cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate, chain, pairwise
from typing import Any

from trimtab.bases.control_tokens import SPELT
from trimtab.bases.marks import Ids
from trimtab.bases.template import BadRow, Template
from trimtab.data.examples import Arrays, Example, Joined, Run, arrays_of, one_row
from trimtab.data.render import Rendered, render
from trimtab.data.rows import Dropped, Row

STEP_END = "\n"
"""Stands behind each step; TRL's `step_separator`."""
RENDER_VERSION = 7
"""Counts up when the same row would give other ids or another mask; part of every digest."""


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
    batch = _Batch(rows, Template(tokenizer), last_turn_only)
    return batch.results(_ids_of(batch.samples, batch.template), max_length, vocab_size)


def encode_batches(
    batches: Iterable[Sequence[Row]], tokenizer: Any, max_length: int, *, last_turn_only: bool = False, vocab_size: int | None = None
) -> Iterator[tuple[Sequence[Row], list[Example | Dropped]]]:
    """(rows, `encode_rows` of them) for each batch. While the tokenizer works on one, which takes no lock of the interpreter's, the next is
    read and rendered. An error is raised behind the results of all batches before it."""
    template = Template(tokenizer)
    waiting: tuple[_Batch, Future[list[Ids]]] | None = None

    def ready() -> Iterator[tuple[Sequence[Row], list[Example | Dropped]]]:
        nonlocal waiting
        if waiting is not None:
            (batch, ids), waiting = waiting, None
            yield batch.rows, batch.results(ids.result(), max_length, vocab_size)

    with ThreadPoolExecutor(1, thread_name_prefix="trimtab-tokenize") as beside:
        try:
            for rows in batches:
                batch = _Batch(rows, template, last_turn_only)
                begun = beside.submit(_ids_of, batch.samples, template)
                if not template.shared:
                    begun.exception()  # no two threads may use such a tokenizer
                yield from ready()
                waiting = batch, begun
        except Exception:
            yield from ready()
            raise
        yield from ready()


class _Batch:
    """Rows that are rendered, to become examples when their texts have ids. samples: the texts of each row that can be used."""

    def __init__(self, rows: Sequence[Row], template: Template, last_turn_only: bool):
        self.rows, self.template = rows, template
        self._segments = [s for row in rows for s in row.segments]
        self._rendered: list[list[Rendered] | str] = []
        for segment in self._segments:
            try:
                self._rendered.append(render(segment, template, last_turn_only))
            except BadRow as bad:
                self._rendered.append(str(bad))
        self.samples = [group for group in self._rendered if isinstance(group, list)]

    def results(self, wholes: list[Ids], max_length: int, vocab_size: int | None) -> list[Example | Dropped]:
        """Of each row. wholes: the ids of all texts, in order."""
        good, template = [r for group in self.samples for r in group], self.template
        ends = [_ends(r, ids, template) for r, ids in zip(good, wholes, strict=True)]
        pieces = iter(template.ids_of([text for r, known in zip(good, ends, strict=True) if known is None for text, _ in r.pieces]))
        parts = [[next(pieces) for _ in r.pieces] if known is None else None for r, known in zip(good, ends, strict=True)]
        owners = [s for s, group in zip(self._segments, self._rendered, strict=True) if isinstance(group, list) for _ in group]
        joined: list[Joined | str] = []
        for segment, r, whole, known, of_pieces in zip(owners, good, wholes, ends, parts, strict=True):
            try:
                ids, runs = _join(r, whole, known, of_pieces, template)
                if segment.read is not None:
                    ids, runs = _read(segment, ids, template)
                joined.append(Joined(ids, runs, r.chat, r.question, segment.read is not None))
            except BadRow as bad:
                joined.append(str(bad))
        made = iter(arrays_of(joined, max_length, vocab_size, template.tokenizer))
        results = []
        for segment, group in zip(self._segments, self._rendered, strict=True):
            results.append(_example(segment, [group] if isinstance(group, str) else [next(made) for _ in group]))
        each = iter(results)
        return [_joined(row, [next(each) for _ in row.segments]) for row in self.rows]


def _example(segment: Row, several: Sequence[Arrays | str]) -> Example | Dropped:
    """What became of a segment, from what became of its texts: it is dropped with any of them."""
    found = list[Example]()
    for arrays in several:
        if isinstance(arrays, str):
            return Dropped(segment.origin, arrays)
        found.append(Example(*arrays, segment.origin, segment.id))
    return one_row(found) if len(found) > 1 else found[0]


def _joined(row: Row, results: Sequence[Example | Dropped]) -> Example | Dropped:
    """What became of a row, from what became of its segments, in order: it is dropped with any of them."""
    kept = [e for e in results if isinstance(e, Example)]
    if len(kept) < len(results):
        return next(r for r in results if isinstance(r, Dropped))
    if not row.role and not row.others:
        return kept[0]
    return one_row([replace(e, role=r.role) for e, r in zip(kept, row.segments, strict=True)])


def _ids_of(samples: Sequence[Sequence[Rendered]], template: Template) -> list[Ids]:
    """The ids of all texts. Of the second and later texts of a row only what follows their common beginning with the text before is
    tokenised, from the last added token on: what stands before an added token does not depend on what stands behind it."""
    heads = template.ids_of([group[0].whole for group in samples])
    cuts = [[template.parted(a.whole, b.whole) for a, b in pairwise(group)] for group in samples]
    rests = iter(template.ids_of([cut.rest for row in cuts for cut in row]))
    found: list[Ids] = []
    for head, group, row in zip(heads, samples, cuts, strict=True):
        found.append(head)
        for r, cut in zip(group[1:], row, strict=True):
            ids = template.continued(found[-1], cut, next(rests))
            found.append(template.ids_of([r.whole])[0] if ids is None else ids)
    return found


def _ends(r: Rendered, whole: Ids, template: Template) -> list[int] | None:
    """Where each piece ends within `whole`, if that is seen without tokenising the pieces."""
    if len(r.pieces) == 1:
        return [len(whole)]
    marks = r.marks or template.marks(r.whole, list(accumulate(len(text) for text, _ in r.pieces))[:-1])
    found = None if marks is None else marks.ends_in(whole, template.added_in(whole))
    return None if found is None else [*found, len(whole)]


def _join(r: Rendered, whole: Ids, ends: list[int] | None, parts: list[Ids] | None, template: Template) -> tuple[Ids, list[Run]]:
    """The row's ids and which of them are supervised, by the first of the three ways that holds. ends: of the pieces within `whole`; else
    parts: their ids."""
    ids, sure = whole, r.trusted or (ends is not None and r.marks is not None)
    if ends is None:
        assert parts is not None
        ids, ends = list(chain.from_iterable(parts)), list(accumulate(map(len, parts)))
        if ids != whole:
            if (found := _prefix_ends(r, whole, template)) is not None:
                ids, ends = whole, found
            elif template.text_of(ids) != template.text_of(whole):
                raise BadRow("the tokenizer merges prompt and answer: the pieces alone spell another text")
    if not sure and template.is_forged(r.whole, ids):
        raise BadRow(f"{SPELT}: look-alike characters turn into a control token when tokenised")
    runs = [(b - a, flag) for (a, b), (_, flag) in zip(pairwise([0, *ends]), r.pieces, strict=True)]
    if r.bos or r.eos:
        return [*r.bos, *ids, *r.eos], [(len(r.bos), False), *runs, (len(r.eos), True)]
    return ids, runs


def _read(row: Row, ids: Ids, template: Template) -> tuple[Ids, list[Run]]:
    """The row's ids with those of its steps, and where a head reads them. Each step is tokenised alone, so that its end is a token's."""
    assert row.read is not None
    found, ends = list(ids), [] if row.read else [len(ids)]
    for step in row.read:
        if not row.trusted:
            template.refuse_specials(step, "completions")
        found += chain.from_iterable(template.ids_of([step, STEP_END]))
        ends.append(len(found))
    if any(a == b for a, b in pairwise([0, *ends])):
        raise BadRow("empty: the tokenizer makes no tokens of a text that is to be scored")
    runs = [run for a, b in pairwise([0, *ends]) for run in ((b - a - 1, False), (1, True))]
    return found, runs


def _prefix_ends(r: Rendered, whole: Ids, template: Template) -> list[int] | None:
    """Where each piece ends within `whole`, if the tokens of the text so far start it; None if a token straddles a boundary."""
    so_far = list(accumulate(text for text, _ in r.pieces))
    encoded = template.ids_of(so_far[:-1])
    if any(whole[: len(ids)] != ids for ids in encoded):
        return None
    return [*map(len, encoded), len(whole)]
