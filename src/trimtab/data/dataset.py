"""From sources to the examples of one variant: read, tokenise (or take from the cache), weigh, count what was dropped, order each epoch."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.bases import template_digest, tokenizer_digest
from trimtab.bases.dialect import LOST
from trimtab.bases.template_report import template_warnings, writes_the_date
from trimtab.data.keys import ROW_KEYS, TURN_KEYS
from trimtab.data.render import RENDER_VERSION, Example, as_learnt, encode_rows, joined
from trimtab.data.rows import Dropped, Parts, Row, whole
from trimtab.data.sources import Source, read_source
from trimtab.data.token_cache import load_tokens, save_tokens
from trimtab.errors import DataError

BATCH_ROWS = 2000  # rows tokenised at once: enough to keep the tokenizer's threads busy, little enough to hold as Python lists
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

    examples: list[Example]
    dropped: list[Dropped]
    digest: str
    tokens: int
    supervised_tokens: int
    warnings: list[str]
    rows: list[Row]
    notes: list[str]


@dataclass(frozen=True, eq=False)
class SourceRows:
    """What became of the rows of one source: rows and examples, pair by pair, of those that can be trained on, and the dropped ones.

    epoch: the examples that one epoch draws, by the source's weight. key: digest of the rows and all that decides their tokens, where it
    was asked for.
    """

    source: Source
    rows: list[Row]
    examples: list[Example]
    dropped: list[Dropped]
    epoch: list[Example]
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


@dataclass(frozen=True)
class Reading:
    """How rows are read: what training, validation and `check` do alike. The fields are as in `load_examples`."""

    tokenizer: Any
    root: Path
    max_length: int
    last_turn_only: bool = False
    seed: int = 0
    vocab_size: int | None = None
    parts: Parts = whole

    def read(self, source: Source, index: int, note: Callable[[str], None], *, keep: bool) -> SourceRows:
        """Read and tokenise one source. index: its place among its split's. note: hears what it holds and no row uses. keep: look for the
        tokens in the cache, and keep them there.

        Raises DataError if it cannot be read, or holds conversations and the base has no chat template.
        """
        rows, dropped = read_source(source, self.root, index, note, self.parts)
        segments = [s for row in rows for s in row.segments]
        try:
            key, encoded = self._cached(segments) if keep else ("", self._encoded(segments))
        except DataError as error:
            raise DataError(f"{source.path}: {error.message}", problems=error.problems, fix=error.fix) from error
        results = joined(rows, encoded)
        kept = [(row, r) for row, r in zip(rows, results, strict=True) if isinstance(r, Example)]
        dropped += [r for r in results if isinstance(r, Dropped)]
        examples = [e for _, e in kept]
        epoch = [examples[i] for i in drawn(len(examples), source.weight, self.seed, index)]
        return SourceRows(source, [row for row, _ in kept], examples, dropped, epoch, key)

    def _cached(self, rows: Sequence[Row]) -> tuple[str, list[Example | Dropped]]:
        """(digest of the rows and all that decides their tokens, what became of each row), from the cache where it is there."""
        sha = hashlib.sha256(self._options)
        for row in rows:
            sha.update(row.content_key() + b"\n")
        digest = "sha256:" + sha.hexdigest()
        if writes_the_date(self.tokenizer):
            return digest, self._encoded(rows)
        if (kept := load_tokens(digest, rows)) is not None:
            return digest, kept
        results = self._encoded(rows)
        save_tokens(digest, results)
        return digest, results

    def _encoded(self, rows: Sequence[Row]) -> list[Example | Dropped]:
        results: list[Example | Dropped] = []
        for start in range(0, len(rows), BATCH_ROWS):
            batch = rows[start : start + BATCH_ROWS]
            results += encode_rows(batch, self.tokenizer, self.max_length, last_turn_only=self.last_turn_only, vocab_size=self.vocab_size)
        return results

    @cached_property
    def _options(self) -> bytes:
        """All but the rows that decides ids and masks. The tokenizer's digest does not say which tokens begin and end a text; we do."""
        tokenizer = self.tokenizer
        ends = [
            list(tokenizer("", add_special_tokens=True)["input_ids"]),
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.unk_token_id,
        ]
        digests = tokenizer_digest(tokenizer), template_digest(tokenizer)
        parts = [RENDER_VERSION, *digests, ends, self.max_length, self.last_turn_only, self.vocab_size]
        return json.dumps(parts).encode() + b"\n"


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
) -> Dataset:
    """Read and tokenise all sources. root: where relative paths start. max_length: in tokens. seed: chooses the rows of sources with a
    fractional weight. keep_rows: keep the rows beside their tokens. vocab_size: rows of the base's embedding; rows with a token id beyond
    it are dropped. parts: how a record becomes segments.

    Raises DataError if a source cannot be read, if more than `max_dropped_share` of a source's rows were dropped (the message counts the
    reasons and names the first ten), or if nothing is left to train on.
    """
    reading = Reading(tokenizer, root, max_length, last_turn_only, seed, vocab_size, parts)
    examples: list[Example] = []
    dropped: list[Dropped] = []
    kept: list[Row] = []
    notes: list[str] = []
    digest = hashlib.sha256()
    for index, source in enumerate(sources):
        found = reading.read(source, index, notes.append, keep=True)
        if (error := found.refusal(max_dropped_share)) is not None:
            raise error
        examples += found.epoch
        dropped += found.dropped
        if keep_rows:
            kept += as_learnt(found.rows, tokenizer)
        digest.update(json.dumps([found.key, source.weight, seed if source.weight % 1 else None]).encode())
    if not examples:
        raise DataError("there are no sources to train on", fix="name at least one.")
    return Dataset(
        examples=examples,
        dropped=dropped,
        digest="sha256:" + digest.hexdigest(),
        tokens=sum(e.tokens for e in examples),
        supervised_tokens=sum(e.targets for e in examples),
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


def drawn(n: int, weight: float, seed: int, source: int) -> list[int]:
    """Which of a source's n rows an epoch draws: all of them floor(weight) times, and a seeded sample for the fraction; at least one."""
    whole = int(weight)
    part = round((weight - whole) * n)
    if not whole:
        part = max(part, 1)
    sample = np.argsort(np.random.Philox(np.random.SeedSequence([seed, source])).random_raw(n), kind="stable")[:part]
    return [*range(n)] * whole + sorted(sample.tolist())
