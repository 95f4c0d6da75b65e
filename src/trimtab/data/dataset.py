"""From sources to the examples of one variant: weights, counts of what was dropped, a digest of all, the order of each epoch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.bases.template_report import template_warnings
from trimtab.data.reading import Hear, Reading
from trimtab.data.rows import Dropped, Parts, Row, whole
from trimtab.data.sources import Source
from trimtab.data.token_store import Examples
from trimtab.errors import DataError


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


def load_examples(
    sources: Sequence[Source],
    tokenizer: Any,
    *,
    root: Path,
    max_length: int,
    last_turn_only: bool = False,
    seed: int = 0,
    keep_rows: bool = False,
    hear: Hear | None = None,
    vocab_size: int | None = None,
    parts: Parts = whole,
    state: Sequence[Any] = (),
) -> Dataset:
    """Read and tokenise all sources. root: where relative paths start. max_length: in tokens. seed: chooses the rows of sources with a
    fractional weight. keep_rows: keep the rows beside their tokens. hear: gets each of them instead, if they are not kept. vocab_size:
    rows of the base's embedding; rows with a token id beyond it are dropped. parts: how a record becomes segments. state:
    `tokenizer_state`, if it is known.

    Raises DataError if a source cannot be read, if more of its rows were dropped than its `max_dropped` allows (the message counts the
    reasons and names the first ten), or if nothing is left to train on.
    """
    reading = Reading(tokenizer, root, max_length, last_turn_only, seed, vocab_size, parts, state)
    examples: list[Examples] = []
    dropped: list[Dropped] = []
    kept: list[Row] = []
    notes: list[str] = []
    digest = hashlib.sha256()
    for index, source in enumerate(sources):
        found = reading.read(source, index, notes.append, kept.append if keep_rows else hear)
        if (error := found.refusal()) is not None:
            raise error
        examples.append(found.epoch)
        dropped += found.dropped
        held = [source.held, source.held_out] if source.held else []  # others keep the digests that they had
        digest.update(json.dumps([found.key, source.weight, seed if source.weight % 1 else None, *held]).encode())
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
