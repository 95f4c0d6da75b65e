"""Rows that are prompts alone: every form, their own answers, and ids as transformers renders them for generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny import tiny_tokenizer
from trimtab.data import Source, load_examples
from trimtab.data.rows import Dropped, Row, to_segments
from trimtab.objectives import OBJECTIVES

PARTS = OBJECTIVES["grpo"].parts
USER, SYSTEM, SAID = {"role": "user", "content": "a?"}, {"role": "system", "content": "s"}, {"role": "assistant", "content": "b"}
CALL = [{"type": "function", "function": {"name": "f", "arguments": {}}}]


@pytest.mark.parametrize(
    ("record", "messages", "reference"),
    [
        ({"prompt": "a?"}, [USER], None),
        ({"prompt": "a?", "completion": "b", "system": "s"}, [SYSTEM, USER], "b"),
        ({"prompt": [USER], "answer": 4}, [USER], None),
        ({"prompt": [USER], "completion": [SAID]}, [USER], "b"),
        ({"messages": [SYSTEM, USER, SAID]}, [SYSTEM, USER], "b"),
        ({"messages": [USER, SAID, USER, SAID]}, [USER, SAID, USER], "b"),
        ({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": CALL}]}, [USER], CALL),
        ({"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]}, [USER], "b"),
        ({"instruction": "a", "input": "?", "output": "b"}, [{"role": "user", "content": "a\n\n?"}], "b"),
        ({"instruction": "a?", "history": [["a?", "b"]], "output": "c"}, [USER, SAID, USER], "c"),
        ({"prompt": "a?", "history": '[["a?", "b"]]'}, [USER, SAID, USER], None),
    ],
)
def test_forms(record: dict[str, Any], messages: list[dict[str, str]], reference: Any) -> None:
    row = to_segments(record, "r", {}, None, PARTS)
    assert isinstance(row, Row) and row.asked is not None and row.answers == []
    assert row.conversation == messages and row.asked.reference == reference
    assert row.asked.columns == {k: v for k, v in record.items() if k not in ("prompt", "completion")}


def test_columns_that_a_reward_gets_from_the_run_are_not_the_row_s() -> None:
    """`completions` of a row of steps would be given twice, and the call would fail each time."""
    row = to_segments({"prompt": "a?", "completions": ["x"], "completion_ids": [1], "trainer_state": 2, "answer": 4}, "r", {}, None, PARTS)
    assert isinstance(row, Row) and row.asked is not None and row.asked.columns == {"answer": 4}


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"answer": "b"}, "no prompt"),
        ({"messages": [SAID]}, "nothing is asked before the answer in messages"),
        ({"instruction": ["a"], "output": "b"}, "not text: instruction is a list that holds text"),
        ({"instruction": "a", "input": 5}, "not text: input is a number"),
        ({"prompt": [USER], "history": [["q", "r"]]}, "history: the prompt is a list of messages"),
        ({"instruction": "a", "history": [["q"]]}, "no list of pairs"),
        ({"prompt": [USER, SAID]}, "do not end with a question"),
        ({"prompt": "a?", "images": ["x"]}, "images"),
    ],
)
def test_rows_that_are_dropped(record: dict[str, Any], why: str) -> None:
    row = to_segments(record, "r", {}, None, PARTS)
    assert isinstance(row, Dropped) and why in row.reason


def test_ids_are_those_for_generation(tmp_path: Path) -> None:
    talks = [[USER], [SYSTEM, USER, SAID, USER]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": t, "n": i}) + "\n" for i, t in enumerate(talks)))
    tokenizer, heard = tiny_tokenizer(), list[Row]()
    for _ in range(2):  # the second time from the cache
        heard.clear()
        found = load_examples([Source("rows.jsonl")], tokenizer, root=tmp_path, max_length=64, parts=PARTS, hear=heard.append).examples
        assert [r.asked and r.asked.columns["n"] for r in heard] == [0, 1]
        for example, talk in zip(found, talks, strict=True):
            want = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)["input_ids"]
            assert example.ids.tolist() == list(want) and not np.any(example.supervised)
