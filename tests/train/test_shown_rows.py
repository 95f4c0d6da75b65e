"""Rows for people: their text, mask and lengths against what the tokenizer itself gives, by hand; which files may be shown."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_tokenizer
from tests.train.common import METHODS
from trimtab.errors import ConfigError, DataError, NotFoundError
from trimtab.train import RunConfig
from trimtab.train.data_files import data_files
from trimtab.train.shown_rows import LEARNT, MAX_TEXT, TEMPLATE, Decoder, RowsOfRun, _shortened
from trimtab.train.subject import content_of, of_folder, refuse_outside, run_of

pytestmark = pytest.mark.usefixtures("own_cache")


def talk(*turns: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, _, text in (turn.partition(":") for turn in turns)]}


ROWS = [
    talk("user:one", "assistant:ä ö 語"),
    talk("system:be brief", "user:two", "assistant:a", "user:three", "assistant:b"),
    talk("user:no answer"),
    talk("user:" + "x" * 300, "assistant:long"),
    talk("user:" + "y" * 40, "assistant:short"),
]


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def read(tmp_path: Path, tiny_llama_folder: Path) -> RowsOfRun:
    lines(tmp_path / "a.jsonl", ROWS)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("{broken\n")
    variant = METHODS["lora"] | {"max_length": 120}
    content = {
        "base": str(tiny_llama_folder),
        "dtype": "float32",
        "out": "out",
        "data": {"a": {"train": "a.jsonl"}},
        "variants": {"v": variant},
    }
    return RowsOfRun(RunConfig.from_dict(content, root=tmp_path))


def test_rows_are_what_the_template_writes_with_answers_marked(read: RowsOfRun):
    found = read.rows("a", "train", 0, 50)
    assert found["total"] == 3
    for row, source in zip(found["rows"], (ROWS[0], ROWS[1], ROWS[4]), strict=True):
        (segment,) = row["segments"]
        written = tiny_tokenizer().apply_chat_template(source["messages"], tokenize=False)
        assert "".join(text for text, _ in segment["runs"]) == written
        answers = [m["content"] for m in source["messages"] if m["role"] == "assistant"]
        learnt = "".join(text for text, bits in segment["runs"] if bits & LEARNT)
        assert learnt == "".join(answer + "<|im_end|>" for answer in answers)
        contents = "".join(text for text, bits in segment["runs"] if not bits & TEMPLATE)
        assert contents == "".join(m["content"] for m in source["messages"]), "all else is the template's"
        assert row["tokens"] == len(tiny_tokenizer()(written, add_special_tokens=False)["input_ids"])
        assert row["targets"] == sum(len(answer.encode()) + 1 for answer in answers)
    assert [row["origin"] for row in found["rows"]] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:5"]


def test_rows_come_in_pages_and_orders(read: RowsOfRun):
    sizes = [row["tokens"] for row in read.rows("a", "train", 0, 50)["rows"]]
    for order, sign in (("longest", -1), ("shortest", 1)):
        expected = sorted(range(3), key=lambda i: sign * sizes[i])
        assert [read.rows("a", "train", n, 1, order)["rows"][0]["number"] for n in range(3)] == expected
    assert read.rows("a", "train", 2, 50)["rows"][0]["number"] == 2 and read.rows("a", "train", 3, 50)["rows"] == []
    with pytest.raises(DataError, match="one of file, longest, shortest"):
        read.rows("a", "train", 0, 1, "best")
    with pytest.raises(NotFoundError, match=r"there are: data\.a\.train"):
        read.rows("a", "valid", 0, 1)


def test_dropped_rows_are_told_with_file_line_and_reason(read: RowsOfRun):
    split = read.overview()["data"][0]["splits"][0]
    assert {d["kind"]: d["count"] for d in split["dropped"]} == {"nothing supervised": 1, "over-long": 1, "not JSON": 1}
    assert "raise max_length" in next(d["fix"] for d in split["dropped"] if d["kind"] == "over-long")
    assert [d["origin"] for d in read.dropped("a", "train", "over-long", 0, 9)["rows"]] == ["a.jsonl:4"]
    assert read.dropped("a", "train", "", 0, 9)["total"] == 3 and len(read.dropped("a", "train", "", 1, 1)["rows"]) == 1


def test_lengths_count_every_row_and_those_beyond_the_cut(read: RowsOfRun):
    tokenizer = tiny_tokenizer()
    sizes = [len(tokenizer.apply_chat_template(row["messages"], return_dict=False)) for row in ROWS]
    facts = read.overview()["data"][0]["splits"][0]["lengths"]
    assert facts["cut"] == 120 and sum(facts["kept"]) == 3 and sum(facts["over"]) == 1
    for i in (0, 1, 4):
        assert facts["kept"][(sizes[i] - 1) // facts["width"]] >= 1
    assert len(facts["kept"]) * facts["width"] >= 2 * 120 and facts["over"][-1] == 1, "what lies far beyond is in the last bin"


def test_a_row_of_a_megabyte_is_shown_from_both_ends():
    runs = _shortened([("a" * 10, TEMPLATE), ("b" * 500_000, 0), ("c" * 500_000, LEARNT), ("d" * 10, TEMPLATE)])
    text = "".join(text for text, _ in runs)
    assert len(text) < MAX_TEXT + 100 and text.startswith("a" * 10 + "b") and text.endswith("c" + "d" * 10)
    assert "characters …]" in text and [bits for _, bits in runs] == [TEMPLATE, 0, TEMPLATE, LEARNT, TEMPLATE]
    assert _shortened([("\x1b[31m\ud800", 0)]) == [("\\x1b[31m\\ud800", 0)], "what a browser cannot be sent is spelt out"


def test_a_base_without_a_template_has_no_template_text():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    assert Decoder(tokenizer)._written == {}


# ---- what is looked at ------------------------------------------------------------


@pytest.mark.parametrize("told", [True, False])
def test_a_run_folder_names_its_rows_wherever_it_lies(tmp_path: Path, tiny_llama_folder: Path, told: bool):
    """What a run writes is made by a run itself (tests/train/test_run.py); here its settings as they come out of it."""
    from trimtab.train.resume import settings

    lines(tmp_path / "a.jsonl", ROWS * 3)
    content = {
        "base": str(tiny_llama_folder),
        "out": "runs/one",
        "data": {"a": {"train": {"path": "a.jsonl", "split": 2, "system": "sys"}}, "b": {"train": "a.jsonl"}},
        "variants": {
            "v.1": METHODS["lora"] | {"data": "a", "max_length": 77, "last_turn_only": True},
            "w": METHODS["ia3"] | {"data": "b", "max_length": 88},
        },
    }
    run = RunConfig.from_dict(content, root=tmp_path)
    run.out.mkdir(parents=True)
    plan = {"steps": {"v.1": 1}, "settings": settings(run)} | ({"root": str(tmp_path)} if told else {})
    (run.out / "run.json").write_text(json.dumps(plan))
    (run.out / "metrics.jsonl").touch()
    again = run_of(run.out, "another base")
    assert again.base == run.base and again.root == tmp_path
    assert [(s.path, s.held, s.system) for s in again.data["a"].train] == [("a.jsonl", 2, "sys")] and len(again.data["a"].valid) == 1
    assert {v.name: (v.data, v.options.max_length, v.options.last_turn_only) for v in again.variants} == {
        "v.1": ("a", 77, True),
        "w": ("b", 88, False),
    }


def test_a_run_folder_that_names_no_rows_says_so(tmp_path: Path):
    (tmp_path / "summary.json").write_text("[1]")
    with pytest.raises(ConfigError, match="does not say which rows"):
        of_folder(tmp_path)


def test_data_alone_is_read_as_init_guesses_it(tmp_path: Path):
    path = lines(tmp_path / "tickets.jsonl", [{"question": "q", "answer": "a"}] * 3)
    content, root = content_of(path, "some-base")
    assert root == tmp_path and content["base"] == "some-base"
    assert content["data"]["tickets"]["train"] == {"path": "tickets.jsonl", "columns": {"prompt": "question", "completion": "answer"}}


def test_rows_outside_of_the_shown_folders_are_refused_before_they_are_read(tmp_path: Path):
    shown, secret = tmp_path / "shown", tmp_path / "secret.jsonl"
    shown.mkdir()
    lines(secret, [{"text": "s3cret"}])
    lines(shown / "own.jsonl", [{"text": "own"}])
    (shown / "link.jsonl").symlink_to(secret)
    refuse_outside({"data": {"d": {"train": ["own.jsonl"]}}}, shown, [shown])
    refuse_outside({"data": {"d": {"train": "own.jsonl", "valid": {"path": str(shown / "own.jsonl")}}}}, shown, [shown])
    for source in (str(secret), "../secret.jsonl", "link.jsonl", {"path": "link.jsonl"}, ["own.jsonl", "../secret.jsonl"]):
        for split in ("train", "valid", "test"):
            with pytest.raises(DataError, match=r"outside of the folders(?s:.*)--data FOLDER"):
                refuse_outside({"data": {"d": {"train": "own.jsonl", split: source}}}, shown, [shown])
    with pytest.raises(DataError, match="outside"):
        refuse_outside({"data": {"train": "../secret.jsonl"}}, shown, [shown])  # a data set without a name


def test_files_of_rows_are_listed_and_those_of_runs_are_not(tmp_path: Path):
    for name in ("a.jsonl", "deep/b.csv", "deep/notes.md", "run/metrics.jsonl", "run/predictions/p.jsonl", ".hidden/c.jsonl", "x.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    (tmp_path / "out").symlink_to("/etc")
    os.mkfifo(tmp_path / "pipe.jsonl")
    found, cut = data_files([tmp_path, tmp_path / "deep"])
    assert [str(p.relative_to(tmp_path)) for p, *_ in found] == ["a.jsonl", "deep/b.csv"] and not cut
