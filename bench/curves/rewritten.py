"""Rows of many turns on a template that rewrites earlier turns (Qwen3's, as TRL ships it): each answer as it will be served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from curves.curve import Curve, Point, bundled_tokenizer, cpu_seconds
from curves.turns import conversation, encoded


def measured(many: Callable[[Any, list[list[dict[str, str]]]], int], turns: int) -> list[float | str]:
    """Milliseconds of CPU a row, and rows of the forward for each token of the conversation."""
    import trl

    tokenizer = bundled_tokenizer()
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    rows = [conversation(turns)] * max(1, 128 // turns)
    length = len(tokenizer.apply_chat_template(rows[0], tokenize=True, return_dict=False))
    computed = many(tokenizer, rows[:1])
    return [1000 * cpu_seconds(lambda: many(tokenizer, rows), 3) / len(rows), computed / length]


def ours(turns: int) -> list[float | str]:
    def many(tokenizer: Any, rows: list[list[dict[str, str]]]) -> int:
        found = encoded(tokenizer, rows)
        assert all(len(row.segments) == turns // 2 for row in found), found
        return found[0].tokens

    return measured(many, turns)


def plain(turns: int) -> list[float | str]:
    """A sample a turn: transformers renders and tokenises each of them, and nothing is shared."""

    def many(tokenizer: Any, rows: list[list[dict[str, str]]]) -> int:
        tokens = 0
        for messages in rows:
            for j in range(2, turns + 1, 2):
                tokens += len(tokenizer.apply_chat_template(messages[:j], tokenize=True, return_dict=False))
        return tokens // len(rows)

    return measured(many, turns)


CURVE = Curve(
    what="a conversation of 20 words a turn on Qwen3's template, every answer supervised as it will be served",
    grows="turns",
    points=[Point(str(n), n) for n in (2, 8, 32, 128)],
    columns=["CPU ms a row", "rows of the forward for each token"],
    ours=ours,
    peers={"apply_chat_template for each turn": plain},
    limit=lambda point: "rows of the forward: 1.6 for each token",
)
