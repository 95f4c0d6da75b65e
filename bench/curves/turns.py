"""Rows of many turns: our rendering with masks, and one plain rendering and tokenising of the same conversation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from curves.curve import Curve, Point, cpu_seconds


def conversation(turns: int) -> list[dict[str, str]]:
    text = "the quick brown fox jumps over the lazy dog and then it sleeps for a while under the old oak tree"
    return [{"role": ("user", "assistant")[i % 2], "content": f"{i} {text}"} for i in range(turns)]


def measured(one: Callable[[Any, list[dict[str, str]]], object], turns: int) -> list[float | str]:
    """Milliseconds of CPU a row, with the bundled base's tokenizer."""
    from transformers import AutoTokenizer

    from trimtab.bases.locate import locate

    tokenizer, messages = AutoTokenizer.from_pretrained(locate("smollm2-135m-instruct", lambda line: None)), conversation(turns)
    rows = max(1, 64 // turns)
    one(tokenizer, messages)
    return [1000 * cpu_seconds(lambda: [one(tokenizer, messages) for _ in range(rows)], 3) / rows]


def ours(turns: int) -> list[float | str]:
    from trimtab.data.render import encode_row
    from trimtab.data.rows import Row

    def one(tokenizer: Any, messages: list[dict[str, str]]) -> object:
        row = encode_row(Row(origin="", messages=tuple(messages)), tokenizer, 1 << 20)
        assert row.supervised.any(), row  # a row that was dropped costs nothing
        return row

    return measured(one, turns)


def plain(turns: int) -> list[float | str]:
    return measured(lambda tokenizer, messages: tokenizer.apply_chat_template(messages, tokenize=True), turns)


CURVE = Curve(
    what="a conversation of 20 words a turn, every answer supervised, the bundled base's tokenizer",
    grows="turns",
    points=[Point(str(n), n) for n in (2, 8, 32, 128, 512)],
    columns=["CPU ms a row"],
    ours=ours,
    peers={"apply_chat_template": plain},
    limit=lambda point: "3 times apply_chat_template",
)
