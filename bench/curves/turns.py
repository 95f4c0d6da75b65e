"""Rows of many turns: our rendering with masks, and one plain rendering and tokenising of the same conversation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from curves.curve import Curve, Point, bundled_tokenizer, cpu_seconds


def conversation(turns: int) -> list[dict[str, str]]:
    text = "the quick brown fox jumps over the lazy dog and then it sleeps for a while under the old oak tree"
    return [{"role": ("user", "assistant")[i % 2], "content": f"{i} {text}"} for i in range(turns)]


def measured(many: Callable[[Any, list[list[dict[str, str]]]], object], turns: int) -> list[float | str]:
    """Milliseconds of CPU a row, with the bundled base's tokenizer."""
    tokenizer = bundled_tokenizer()
    rows = [conversation(turns)] * max(1, 256 // turns)
    many(tokenizer, rows[:1])
    return [1000 * cpu_seconds(lambda: many(tokenizer, rows), 3) / len(rows)]


def encoded(tokenizer: Any, rows: list[list[dict[str, str]]]) -> list[Any]:
    from trimtab.data.encode import encode_rows
    from trimtab.data.rows import Row

    return encode_rows([Row(origin="", messages=tuple(messages)) for messages in rows], tokenizer, 1 << 20)


def ours(turns: int) -> list[float | str]:
    def many(tokenizer: Any, rows: list[list[dict[str, str]]]) -> object:
        found = encoded(tokenizer, rows)
        assert all(row.supervised.any() for row in found), found  # a row that was dropped costs nothing
        return found

    return measured(many, turns)


def plain(turns: int) -> list[float | str]:
    return measured(lambda tokenizer, rows: tokenizer.apply_chat_template(rows, tokenize=True), turns)


CURVE = Curve(
    what="a conversation of 20 words a turn, every answer supervised, the bundled base's tokenizer",
    grows="turns",
    points=[Point(str(n), n) for n in (2, 8, 32, 128, 512)],
    columns=["CPU ms a row"],
    ours=ours,
    peers={"apply_chat_template": plain},
    limit=lambda point: "3 times apply_chat_template",
)
