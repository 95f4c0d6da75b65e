"""Classification: the answer that a row should get, the labels of a data set, and a row's tokens under each label."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from trimtab.data.encode import encode_rows
from trimtab.data.examples import Example
from trimtab.data.rows import Dropped, Row, answer_of
from trimtab.errors import DataError

MAX_LABELS = 100
UNLIMITED = 1 << 30
"""No max_length: whether a row fits is the forward's to say."""


def find_labels(rows: Iterable[Row], where: str) -> list[str]:
    """The distinct answers of rows, sorted. DataError if they are more than MAX_LABELS, or fewer than two: then they are no labels."""
    return labels_among((a for row in rows if (a := answer_of(row)) is not None), where)


def labels_among(answers: Iterable[str], where: str) -> list[str]:
    """`find_labels` in answers."""
    labels = sorted({a.strip() for a in answers})
    if 2 <= len(labels) <= MAX_LABELS:
        return labels
    raise DataError(
        f"{where}: labels: auto found {len(labels)} distinct answers, and labels are 2 to {MAX_LABELS}",
        fix="name the labels in a list, or leave `labels` out if the answers are free text",
    )


def label_examples(rows: Sequence[Row], labels: Sequence[str], tokenizer: Any, vocab_size: int | None = None) -> list[list[Example]]:
    """For each row, its example under each label: tokenised as in training, only the label and its end of turn supervised. vocab_size:
    rows of the base's embedding.

    DataError that lists every row and label that cannot be rendered.
    """
    variants = [_answered(row, label) for row in rows for label in labels]
    encoded = encode_rows(variants, tokenizer, UNLIMITED, last_turn_only=True, vocab_size=vocab_size)
    good = [e for e in encoded if isinstance(e, Example)]
    if len(good) < len(encoded):
        lost = [f"{e.origin} with label {labels[i % len(labels)]!r}: {e.reason}" for i, e in enumerate(encoded) if isinstance(e, Dropped)]
        raise DataError("labels cannot be put in the place of these rows' answers", problems=lost[:20])
    return [good[i : i + len(labels)] for i in range(0, len(good), len(labels))]


def _answered(row: Row, label: str) -> Row:
    """The row with another answer, between the blanks that its own has, as it is trained; turns after the answer are left out."""
    own = answer_of(row)
    if own is None:
        raise DataError(f"{row.origin}: nothing to compare with: the row has no assistant turn")
    said = own.replace(own.strip(), label, 1) if own.strip() else label
    if row.completion is not None:
        return replace(row, completion=said)
    assert row.messages is not None
    return replace(row, messages=(*row.messages[: row.answers[-1]], {"role": "assistant", "content": said}))
