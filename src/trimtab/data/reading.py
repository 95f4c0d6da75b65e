"""One source: read and tokenised, or taken from the cache; what was dropped, and whether the rest may be trained on."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trimtab.atomic import atomic_write, clear_unfinished
from trimtab.bases import template_digest, tokenizer_digest
from trimtab.bases.template import Template
from trimtab.bases.template_report import writes_the_date
from trimtab.bases.written import LOST
from trimtab.data.encode import RENDER_VERSION, encode_batches
from trimtab.data.examples import Example
from trimtab.data.keys import ROW_KEYS, TURN_KEYS
from trimtab.data.render import as_learnt
from trimtab.data.rows import Dropped, Parts, Row, whole
from trimtab.data.source_rows import content_of, rows_of
from trimtab.data.sources import MAX_DROPPED, Source
from trimtab.data.token_store import Examples, Tokens, TokenWriter, token_file
from trimtab.errors import DataError
from trimtab.memory import without_full_collections
from trimtab.version import __version__

Hear = Callable[[Row], None]

BATCH_ROWS, BATCH_BYTES = 2000, 4 << 20
"""What is tokenised at once: enough to keep the tokenizer's threads busy, little enough to hold as Python lists."""
ABANDONED_S = 3600
"""A file of tokens to which nobody has written for so long is one whose writer was killed: writers write every second or so."""
SHOWN = 10

FIXES = {
    "over-long": "raise max_length, shorten the rows, or let more be left out with `max_dropped`; nothing is cut silently.",
    "the chat template rewrites earlier turns": "its prompt does not stand before these answers: use another base.",
    "special token in the content": "take them out: conversations belong in `messages`, and the end token is added for you. Plain text "
    "that is meant to hold them is read with `trusted: true` on its source.",
    LOST: "use roles that the base's chat template knows, take these turns out, or use another base.",
    "the chat template takes the reasoning out of the answer": "take it out of the rows, or use a base whose chat template keeps it.",
    "token outside the base": "use the base's own tokenizer, or resize the base's embedding to the tokenizer and save both.",
    "starts with an assistant turn": "begin each conversation with a user or system turn.",
    "nothing supervised": "give each row an answer that is not empty, or take it out of the file.",
    "text with a label": "map them: `columns: {label: label}`, or `columns: {text: text}` to train on the text alone.",
    "empty": "give each row an answer, or take it out of the file.",
    **dict.fromkeys((*ROW_KEYS, *TURN_KEYS, "label"), "take these rows out; a column that means something else must have another name."),
    "system without a chat template": "put the system text into the prompt, or use a base with a chat template.",
}


@dataclass(frozen=True, eq=False)
class SourceRows:
    """What became of the rows of one source: examples of those that can be trained on, and the dropped ones.

    epoch: the examples that one epoch draws, by the source's weight. key: digest of the rows and all that decides their tokens.
    """

    source: Source
    examples: Examples
    dropped: list[Dropped]
    epoch: Examples
    key: str

    def refusal(self) -> DataError | None:
        """Why the source cannot be trained on, where more of its rows were dropped than it allows; None if it can."""
        good, lost = len(self.examples), len(self.dropped)
        allowed = MAX_DROPPED if self.source.max_dropped is None else self.source.max_dropped
        total = good + lost
        if good and lost / total <= allowed:  # 29 of 100 are 0.29, and 0.29 * 100 is a little below 29
            return None
        if not total:
            return DataError(
                f"{self.source.path}: split: none of the rows that are held out can be used", fix="mend the rows, or hold out more."
            )
        common = Counter(d.kind for d in self.dropped).most_common(1)[0][0]
        shares = f" ({100 * lost / total:.3g}%; allowed are {100 * allowed:.3g}%)" if lost / total > allowed else ""
        return DataError(
            f"{self.source.path}: {lost} of {total} rows cannot be trained on{shares}",
            problems=summarise_dropped(self.dropped),
            fix=FIXES.get(common, "mend the rows, or take them out of the file."),
        )


class _Once:
    """Lets each row be heard once, though the source may be read again from its beginning."""

    def __init__(self, hear: Hear):
        self._hear, self._heard, self._known = hear, 0, 0

    def __call__(self, row: Row) -> None:
        self._heard += 1
        if self._heard > self._known:
            self._hear(row)

    def again(self) -> _Once:
        self._heard, self._known = 0, max(self._heard, self._known)
        return self


@dataclass(frozen=True)
class Reading:
    """How rows are read: what training, validation and `check` do alike. The fields are as in `load_examples`; state: `tokenizer_state`, if
    it is known."""

    tokenizer: Any
    root: Path
    max_length: int
    last_turn_only: bool = False
    seed: int = 0
    vocab_size: int | None = None
    parts: Parts = whole
    state: Sequence[Any] = ()

    def read(self, source: Source, index: int, note: Callable[[str], None], hear: Hear | None = None) -> SourceRows:
        """Read and tokenise one source, or take it from the cache. index: its place among its split's. note: hears what it holds and no row
        uses. hear: gets each row that becomes an example, in order, with its answers as they are learnt.

        Raises DataError if it cannot be read, or holds conversations and the base has no chat template.
        """
        name, digest = self._identity(source)
        tokens = Tokens.load(digest, name, index) if digest else None
        later = hear
        if tokens is None:
            at_once = None if source.held else hear  # which rows are held out is known when all have been read
            tokens, later = self._written(source, index, name, digest, at_once), None if at_once else hear
        places = chosen(tokens, source)
        if later is not None:
            kept = iter(tokens.index["rows"][places].tolist())
            waited = next(kept, -1)
            with without_full_collections() as collect:
                for row in rows_of(source, self.root, index, parts=self.parts):
                    if isinstance(row, Row) and row.id[1] == waited:
                        later(as_learnt(row, self._template))
                        waited = next(kept, -1)
                    collect()
            self._refuse_change(source, name, digest)
        for text in tokens.notes["said"]:
            note(source.path + text)
        epoch = Examples([tokens], places[drawn(len(places), source.weight, self.seed, index)])
        dropped = [] if source.held_out else tokens.dropped  # said with the training rows, of which they are a part
        return SourceRows(source, Examples([tokens], places), dropped, epoch, tokens.notes["key"])

    def _identity(self, source: Source) -> tuple[str, str]:
        """(the source's name, with which its rows' origins begin; the digest of all that decides what becomes of them, empty where that is
        not known: a template reads the clock, or a record is read by code that is not ours)."""
        known = content_of(source, self.root)
        name, content = known or ("", b"")
        module = getattr(self.parts, "__module__", "")
        if known is None or writes_the_date(self.tokenizer) or not module.startswith("trimtab."):
            return name, ""
        code = [__version__, version("transformers"), version("tokenizers"), module, self.parts.__qualname__]
        return name, "sha256:" + hashlib.sha256(self._options + json.dumps(code).encode() + content).hexdigest()

    def _written(self, source: Source, index: int, name: str, digest: str, hear: Hear | None) -> Tokens:
        """Read and tokenised, in a file of the cache, or in memory where there can be none."""
        once = _Once(hear) if hear else None
        if digest:
            with suppress(OSError):
                file = token_file(digest)
                file.parent.mkdir(parents=True, exist_ok=True)
                clear_unfinished(file.parent, idle_s=ABANDONED_S)
                with atomic_write(file) as out:
                    self._write(out, source, index, name, digest, once)
                    self._refuse_change(source, name, digest)
                if (tokens := Tokens.load(digest, name, index)) is not None:
                    return tokens
        memory = io.BytesIO()
        self._write(memory, source, index, name, digest, once and once.again())
        held = memory.getbuffer()
        return Tokens.read(lambda start, stop: held[start:stop], len(held), name, index)

    def _refuse_change(self, source: Source, name: str, digest: str) -> None:
        if self._identity(source) != (name, digest):
            raise DataError(f"{source.path} changed while it was read", fix="start again when nothing writes to it.")

    def _write(self, out: BinaryIO, source: Source, index: int, name: str, digest: str, hear: Hear | None) -> None:
        sha, said = hashlib.sha256(self._options), list[str]()
        unread, lost = list[Dropped](), list[Dropped]()
        writer, found = TokenWriter(out, name), rows_of(source, self.root, index, said.append, self.parts)

        def content(of_segments: Sequence[bytes]) -> None:
            writer.read(of_segments)
            for part in of_segments:
                sha.update(part)

        with without_full_collections() as collect:
            for batch, results in self._encoded(source, found, unread.append, content):
                lost += [result for result in results if isinstance(result, Dropped)]
                writer.add([result for result in results if isinstance(result, Example)])
                if hear is not None:
                    for row, result in zip(batch, results, strict=True):
                        if isinstance(result, Example):
                            hear(as_learnt(row, self._template))
                collect()
        key = "sha256:" + sha.hexdigest()
        writer.finish(digest, key, unread + lost, [text.removeprefix(source.path) for text in said])

    def _encoded(
        self, source: Source, found: Iterator[Row | Dropped], lost: Callable[[Dropped], None], content: Callable[[Sequence[bytes]], None]
    ) -> Iterator[tuple[Sequence[Row], list[Example | Dropped]]]:
        """(rows, what became of them), batch by batch. What is wrong with the source is said before what is wrong with a text."""
        unreadable: list[DataError] = []

        def batches() -> Iterator[list[Row]]:
            try:
                yield from _batches(found, lost, content)
            except DataError as error:
                unreadable.append(error)
                raise

        try:
            yield from encode_batches(
                batches(), self.tokenizer, self.max_length, last_turn_only=self.last_turn_only, vocab_size=self.vocab_size
            )
        except DataError as error:
            if unreadable:
                raise unreadable[0] from None
            deque(found, maxlen=0)
            raise DataError(f"{source.path}: {error.message}", problems=error.problems, fix=error.fix) from error

    @cached_property
    def _template(self) -> Template:
        return Template(self.tokenizer)

    @cached_property
    def _options(self) -> bytes:
        """All but the rows that decides ids and masks."""
        state = self.state or tokenizer_state(self.tokenizer)
        return json.dumps([RENDER_VERSION, *state, self.max_length, self.last_turn_only, self.vocab_size]).encode() + b"\n"


def tokenizer_state(tokenizer: Any) -> list[Any]:
    """What decides a tokenizer's ids. Its digest does not say which tokens begin and end a text; we do. Takes half a second, so that those
    who read several splits find it out once."""
    ends = [
        list(tokenizer("", add_special_tokens=True)["input_ids"]),
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.unk_token_id,
    ]
    return [tokenizer_digest(tokenizer), template_digest(tokenizer), ends]


def _batches(
    found: Iterable[Row | Dropped], lost: Callable[[Dropped], None], content: Callable[[Sequence[bytes]], None]
) -> Iterator[list[Row]]:
    """Rows to tokenise at once. lost: gets those that could not be read. content: gets that of each row, segment by segment."""
    batch, size = list[Row](), 0
    for row in found:
        if isinstance(row, Dropped):
            lost(row)
            continue
        batch.append(row)
        of_segments = [segment.content_key + b"\n" for segment in row.segments]
        content(of_segments)
        size += sum(map(len, of_segments))
        if len(batch) >= BATCH_ROWS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def summarise_dropped(dropped: Sequence[Dropped]) -> list[str]:
    """Counts by kind of reason, most frequent first, then the first ten by name; empty if nothing was dropped."""
    counts = Counter(d.kind for d in dropped)
    lines = [f"{count} x {kind}" for kind, count in counts.most_common()]
    lines += [f"{d.origin}: {d.reason}" for d in dropped[:SHOWN]]
    return lines + ([f"and {len(dropped) - SHOWN} more"] if len(dropped) > SHOWN else [])


def chosen(tokens: Tokens, source: Source) -> np.ndarray:
    """Which of a file's examples belong to a source: all; or, where it has a `split`, those that it holds out, or the others.

    Rows are held out in the order of a hash of their content. So they are the same whatever the seed, rows of equal content stay together,
    and new rows hardly move others. DataError where there are too few rows.
    """
    if not source.held:
        return np.arange(len(tokens))
    contents = tokens.index["contents"]
    n = max(1, round(source.held * len(contents))) if source.held < 1 else int(source.held)
    held = contents <= np.sort(contents)[n - 1] if n < len(contents) else np.ones(len(contents), bool)
    if held.all():
        raise DataError(
            f"{source.path}: split: {n} of {len(contents)} rows are to be held out, and none is left to train on",
            fix="hold out fewer, or give valid rows in a file of their own.",
        )
    return np.flatnonzero(held[tokens.index["rows"]] == source.held_out)


def drawn(n: int, weight: float, seed: int, source: int) -> np.ndarray:
    """Which of a source's n rows an epoch draws: all of them floor(weight) times, and a seeded sample for the fraction; at least one."""
    whole = int(weight)
    part = round((weight - whole) * n)
    if not whole:
        part = max(part, 1)
    sample = np.argsort(np.random.Philox(np.random.SeedSequence([seed, source])).random_raw(n), kind="stable")[:part]
    return np.concatenate([np.tile(np.arange(n), whole), np.sort(sample)])
