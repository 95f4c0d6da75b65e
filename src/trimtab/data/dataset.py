"""From sources to the examples of one variant: read, tokenise (or take from the cache), weigh, count what was dropped, order each epoch."""

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

from trimtab.atomic import atomic_write
from trimtab.bases import template_digest, tokenizer_digest
from trimtab.bases.dialect import LOST
from trimtab.bases.template import Template
from trimtab.bases.template_report import template_warnings, writes_the_date
from trimtab.data.keys import ROW_KEYS, TURN_KEYS
from trimtab.data.render import RENDER_VERSION, Example, as_learnt, encode_rows
from trimtab.data.rows import Dropped, Parts, Row, whole
from trimtab.data.sources import Source, content_of, rows_of
from trimtab.data.token_store import Examples, Tokens, TokenWriter, token_file
from trimtab.errors import DataError
from trimtab.version import __version__

Hear = Callable[[Row], None]

BATCH_ROWS, BATCH_BYTES = 2000, 4 << 20
"""What is tokenised at once: enough to keep the tokenizer's threads busy, little enough to hold as Python lists."""
SHOWN = 10
MAX_DROPPED_SHARE = 0.1
"""If more of a source's rows are dropped than this fraction, the run stops: the rest would not be the data that was meant."""

FIXES = {
    "over-long": "raise max_length, or shorten the rows; nothing is cut silently.",
    "the chat template rewrites earlier turns": "supervise the last turn only (last_turn_only), or use another base.",
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
class Dataset:
    """The examples of one variant or one split.

    examples: what one epoch draws; a row of a source with weight 2 occurs twice (the same object). rows: the rows that became examples,
    each once, if they are kept. dropped: rows that are not trained on. digest: "sha256:…" of rows, tokenizer, template, options and
    weights, wherever the files are. tokens, supervised_tokens: over `examples`. warnings: properties of the base's template that may spoil
    training. notes: what the sources have and no row uses.
    """

    examples: Examples
    dropped: list[Dropped]
    digest: str
    tokens: int
    supervised_tokens: int
    warnings: list[str]
    rows: list[Row]
    notes: list[str]


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

    def refusal(self, allowed: float = MAX_DROPPED_SHARE) -> DataError | None:
        """Why the source cannot be trained on, where more than this share of its rows were dropped; None if it can."""
        good, lost = len(self.examples), len(self.dropped)
        total = good + lost
        if good and lost <= allowed * total:
            return None
        common = Counter(d.kind for d in self.dropped).most_common(1)[0][0]
        return DataError(
            f"{self.source.path}: {lost} of {total} rows cannot be trained on ({lost / total:.0%}; allowed are {allowed:.0%})",
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
        if tokens is None:
            tokens = self._written(source, index, name, digest, hear)
        elif hear is not None:
            kept = iter(tokens.index["rows"].tolist())
            waited = next(kept, -1)
            for row in rows_of(source, self.root, index, parts=self.parts):
                if isinstance(row, Row) and row.id[1] == waited:
                    hear(as_learnt(row, self._template))
                    waited = next(kept, -1)
        for text in tokens.notes["said"]:
            note(source.path + text)
        epoch = Examples([tokens], drawn(len(tokens), source.weight, self.seed, index))
        return SourceRows(source, Examples([tokens]), tokens.dropped, epoch, tokens.notes["key"])

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
                token_file(digest).parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(token_file(digest)) as out:
                    self._write(out, source, index, name, digest, once)
                    if self._identity(source) != (name, digest):
                        raise DataError(f"{source.path} changed while it was read", fix="start again when nothing writes to it.")
                if (tokens := Tokens.load(digest, name, index)) is not None:
                    return tokens
        memory = io.BytesIO()
        self._write(memory, source, index, name, digest, once and once.again())
        return Tokens.held(memory.getbuffer(), name, index)

    def _write(self, out: BinaryIO, source: Source, index: int, name: str, digest: str, hear: Hear | None) -> None:
        sha, said = hashlib.sha256(self._options), list[str]()
        unread, lost = list[Dropped](), list[Dropped]()
        writer, found = TokenWriter(out, name), rows_of(source, self.root, index, said.append, self.parts)
        for batch in _batches(found, unread.append, sha.update):
            try:
                results = self._encoded(batch)
            except DataError as error:
                deque(found, maxlen=0)  # what is wrong with the source is said first
                raise DataError(f"{source.path}: {error.message}", problems=error.problems, fix=error.fix) from error
            for row, result in zip(batch, results, strict=True):
                if isinstance(result, Dropped):
                    lost.append(result)
                    continue
                writer.add(result)
                if hear is not None:
                    hear(as_learnt(row, self._template))
        key = "sha256:" + sha.hexdigest()
        writer.finish(digest, key, unread + lost, [text.removeprefix(source.path) for text in said])

    def _encoded(self, rows: Sequence[Row]) -> list[Example | Dropped]:
        return encode_rows(rows, self.tokenizer, self.max_length, last_turn_only=self.last_turn_only, vocab_size=self.vocab_size)

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


def load_examples(
    sources: Sequence[Source],
    tokenizer: Any,
    *,
    root: Path,
    max_length: int,
    max_dropped_share: float = MAX_DROPPED_SHARE,
    last_turn_only: bool = False,
    seed: int = 0,
    keep_rows: bool = False,
    vocab_size: int | None = None,
    parts: Parts = whole,
    state: Sequence[Any] = (),
) -> Dataset:
    """Read and tokenise all sources. root: where relative paths start. max_length: in tokens. seed: chooses the rows of sources with a
    fractional weight. keep_rows: keep the rows beside their tokens. vocab_size: rows of the base's embedding; rows with a token id beyond
    it are dropped. parts: how a record becomes segments. state: `tokenizer_state`, if it is known.

    Raises DataError if a source cannot be read, if more than `max_dropped_share` of a source's rows were dropped (the message counts the
    reasons and names the first ten), or if nothing is left to train on.
    """
    reading = Reading(tokenizer, root, max_length, last_turn_only, seed, vocab_size, parts, state)
    examples: list[Examples] = []
    dropped: list[Dropped] = []
    kept: list[Row] = []
    notes: list[str] = []
    digest = hashlib.sha256()
    for index, source in enumerate(sources):
        found = reading.read(source, index, notes.append, kept.append if keep_rows else None)
        if (error := found.refusal(max_dropped_share)) is not None:
            raise error
        examples.append(found.epoch)
        dropped += found.dropped
        digest.update(json.dumps([found.key, source.weight, seed if source.weight % 1 else None]).encode())
    if not examples:
        raise DataError("there are no sources to train on", fix="name at least one.")
    joined = Examples.joined(examples)
    return Dataset(
        examples=joined,
        dropped=dropped,
        digest="sha256:" + digest.hexdigest(),
        tokens=int(joined.tokens.sum()),
        supervised_tokens=int(joined.targets.sum()),
        warnings=template_warnings(tokenizer),
        rows=kept,
        notes=notes,
    )


def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order (int64 [n], a permutation of 0..n-1) in which `epoch` visits n examples; seed and epoch at least 0.

    Depends on its arguments alone: the raw 64-bit stream of Philox keyed by SeedSequence([seed, epoch]), argsorted. NumPy promises that
    stream for all machines and versions (NEP 19), which it does not for `Generator.permutation`.
    """
    draws = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(draws, kind="stable").astype(np.int64)


def summarise_dropped(dropped: Sequence[Dropped]) -> list[str]:
    """Counts by kind of reason, most frequent first, then the first ten by name; empty if nothing was dropped."""
    counts = Counter(d.kind for d in dropped)
    lines = [f"{count} x {kind}" for kind, count in counts.most_common()]
    lines += [f"{d.origin}: {d.reason}" for d in dropped[:SHOWN]]
    return lines + ([f"and {len(dropped) - SHOWN} more"] if len(dropped) > SHOWN else [])


def _batches(found: Iterable[Row | Dropped], lost: Callable[[Dropped], None], key: Callable[[bytes], None]) -> Iterator[list[Row]]:
    """Rows to tokenise at once. lost: gets those that could not be read. key: gets the content of each segment."""
    batch, size = list[Row](), 0
    for row in found:
        if isinstance(row, Dropped):
            lost(row)
            continue
        batch.append(row)
        for segment in row.segments:
            content = segment.content_key() + b"\n"
            key(content)
            size += len(content)
        if len(batch) >= BATCH_ROWS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def drawn(n: int, weight: float, seed: int, source: int) -> np.ndarray:
    """Which of a source's n rows an epoch draws: all of them floor(weight) times, and a seeded sample for the fraction; at least one."""
    whole = int(weight)
    part = round((weight - whole) * n)
    if not whole:
        part = max(part, 1)
    sample = np.argsort(np.random.Philox(np.random.SeedSequence([seed, source])).random_raw(n), kind="stable")[:part]
    return np.concatenate([np.tile(np.arange(n), whole), np.sort(sample)])
