"""Law 12: a key to which a common format gives a meaning changes the row as it says, or the row is dropped with a reason that names it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.data.common import END, learnt, write_jsonl
from tests.tiny import tiny_tokenizer
from trimtab.data import Example, Row, Source, encode_row, load_examples, prompt_and_reference, read_source, rows
from trimtab.data.keys import MARKS, MASKS, ROW_KEYS, TURN_KEYS, WEIGHTS, is_empty
from trimtab.data.labels import label_examples
from trimtab.errors import DataError

TOKENIZER = tiny_tokenizer()
ASK, ANSWER = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}
TOOL = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALL = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]

# Written down from the formats' own documents, not from the table: an entry that is lost there fails here.
OF_ROWS: dict[str, list[Any]] = {
    "tools": [TOOL, json.dumps(TOOL)],
    "functions": [[{"name": "f"}]],
    "tool_choice": ["required", {"type": "function"}],
    "function_call": [{"name": "f"}],
    "parallel_tool_calls": [],  # both of its values say nothing of the rendering
    "image": ["a.png", {"bytes": "x"}],
    "images": [["a.png"]],
    "video": ["a.mp4"],
    "videos": [["a.mp4"]],
    "audio": ["a.wav"],
    "audios": [["a.wav"]],
    "documents": [[{"title": "t", "text": "x"}]],
    "reasoning_content": ["because"],
    "thinking": ["because"],
    "chat_template": ["{{ messages }}"],
    "chat_template_kwargs": [{"enable_thinking": False}, '{"enable_thinking": false}'],
    "chosen": ["good", [ANSWER]],
    "rejected": ["bad"],
    "preferred_output": [[ANSWER]],
    "non_preferred_output": [[ANSWER]],
    "weight": [0, 0.5, 2, "0", "x", False],
    "loss_weight": [0.0, 3],
    "sample_weight": [0.1],
    "train": [False, 0],
    "trainable": [False, 0, "false"],
    "training": [False],
    "train_on_inputs": [True],
    "kto_tag": [False, "false", 0],
    "label": [False, "False", 0, "0", -1, "-1", "undesirable"],
    "loss": [False, 0, "0"],
    "mask": [True, 1, "true"],
    "masked": [True],
    "tool_calls": [CALL],
    "tool_results": [[{"output": "x"}]],
    "objects": [{"ref": ["cat"], "bbox": [[1, 2, 3, 4]]}],
    "reasoning": ["because"],
    "enable_thinking": [True, False],
    "reasoning_effort": ["high"],
    "chosen_response": ["good"],
    "rejected_response": ["bad"],
    "rejected_messages": [[ANSWER]],
    "rejected_images": [["a.png"]],
    "input_ids": [[1, 2]],
    "attention_mask": [[1, 1]],
    "position_ids": [[0, 1]],
    "labels": [[-100, 2], [True, False], 1],
    "completion_mask": [[0, 1]],
    "assistant_masks": [[0, 1]],
    "loss_mask": [[0, 1], 0],
    "completions": [["a", "b"]],
    "history": [[["x?", "y"]]],
}
OF_TURNS: dict[str, list[Any]] = {
    "tool_calls": [CALL],
    "function_call": [{"name": "f", "arguments": "{}"}],
    "tool_call_id": ["1"],
    "tools": [TOOL],
    "functions": [[{"name": "f"}]],
    "name": ["alice"],
    "refusal": ["I will not"],
    "audio": [{"id": "a"}],
    "audios": [["a.wav"]],
    "image": ["a.png"],
    "images": [["a.png"]],
    "video": ["a.mp4"],
    "videos": [["a.mp4"]],
    "annotations": [[{"type": "url_citation"}]],
    "reasoning_content": ["because"],
    "reasoning": ["because"],
    "reasoning_details": [[{"text": "because"}]],
    "thinking": ["because"],
    "train_detail": [[{"begin_offset": 0, "end_offset": 1, "train": False}]],
    "training_detail": [[{"begin_offset": 0, "end_offset": 1, "train": False}]],
    "channel": ["analysis"],
    "recipient": ["functions.f"],
    "prefix": [True],
    "partial": [True],
    "end_turn": [False],
    "eot": [False],
    "tool_plan": ["look it up"],
    "tool_results": [[{"output": "x"}]],
    "tool_responses": [[{"output": "x"}]],
    "ipython": [True],
    "image_url": [{"url": "x"}],
    "input_audio": [{"data": "x"}],
    "file": [{"file_id": "x"}],
    "files": [["a.pdf"]],
    "thinking_blocks": [[{"thinking": "because"}]],
}
PASSED = {"tools", "functions", "chat_template_kwargs", "enable_thinking", "reasoning_effort"}
"""Of a row: passed to the chat template (test_tools.py), where there is a conversation."""
RENDERED = {"tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"}
"""Of a turn of the assistant: rendered (test_tools.py)."""
NEUTRAL = [None, "", [], {}, "[]", "null", float("nan"), {"enable_thinking": None}, [None]]
TRUE = {"parallel_tool_calls", "weight", "loss_weight", "sample_weight", "train", "training", "trainable", "loss", "kto_tag", "label"}


def to_row(record: dict[str, Any], columns: dict[str, str] | None = None, system: str | None = None) -> Row | str:
    """The row that a record becomes, or why it is dropped."""
    row = rows.to_row(json.loads(json.dumps(record)), "t.jsonl:1", columns or {}, system)
    return row if isinstance(row, Row) else row.reason


def supervised(row: Row | str) -> str:
    assert isinstance(row, Row), row
    example = encode_row(row, TOKENIZER, 512)
    assert isinstance(example, Example), example
    return str(learnt(example, TOKENIZER))


def test_every_key_of_the_table_is_tried() -> None:
    assert OF_ROWS.keys() == ROW_KEYS.keys() | {"label", "history"} and OF_TURNS.keys() == TURN_KEYS.keys()
    assert WEIGHTS == ("weight", "loss_weight", "sample_weight") and MASKS == ("mask", "masked")
    assert list(MARKS[len(WEIGHTS) :]) == ["train", "training", "trainable", "train_on_turn", "loss", "loss_mask", "loss_scale"]


@pytest.mark.parametrize("key", [k for k in OF_ROWS if k != "history"])
def test_keys_of_a_row(key) -> None:
    forms = ({"messages": [ASK, ANSWER]}, {"prompt": "a?", "completion": "b"}, {"instruction": "a?", "output": "b"}, {"text": "a b"})
    for form in forms:
        plain = to_row(form)
        for value in OF_ROWS[key] if key not in PASSED or "text" in form else []:
            reason = to_row(form | {key: value})
            assert isinstance(reason, str) and key in reason, (form, value, reason)
        for value in [v for v in NEUTRAL if not (key == "label" and v in ("[]", "null") and "text" in form)] + (
            [True, 1, "1", "true", *([False] if key == "parallel_tool_calls" else [])]
            if key in TRUE and not (key == "label" and "text" in form)
            else []
        ):
            assert to_row(form | {key: value}) == plain, (form, value)


@pytest.mark.parametrize("key", OF_TURNS)
def test_keys_of_a_turn(key) -> None:
    for place in (0, 1):
        for value in OF_TURNS[key] if key not in RENDERED or place == 0 else []:
            for talk in ([ASK, ANSWER], [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]):
                marked = [m | ({key: value} if i == place else {}) for i, m in enumerate(talk)]
                reason = to_row({"messages" if "role" in talk[0] else "conversations": marked})
                assert isinstance(reason, str) and key in reason and f"[{place}]" in reason, reason
        for value in NEUTRAL:
            marked = [m | ({key: value} if i == place else {}) for i, m in enumerate((ASK, ANSWER))]
            assert supervised(to_row({"messages": marked})) == f"b{END}"


@pytest.mark.parametrize("key", MARKS)
def test_marked_answers_are_not_learnt(key) -> None:
    bad, good = {"role": "assistant", "content": "BAD"}, {"role": "assistant", "content": "good"}
    for off in (0, 0.0, False, "0", "false"):
        row = to_row({"messages": [ASK, bad | {key: off}, ASK, good | {key: 1 if key in WEIGHTS else True}]})
        assert supervised(row) == f"good{END}" and "BAD" in str(row)
        assert supervised(to_row({"messages": [ASK, bad | {key: off}, ASK, good]}, system="S")) == f"good{END}"
        # the last answer is marked: what is asked in evaluation is the one before it
        row = to_row({"messages": [ASK, good, ASK, bad | {key: off}]})
        assert supervised(row) == f"good{END}" and isinstance(row, Row) and prompt_and_reference(row, TOKENIZER)[1] == "good"
        reason = to_row({"messages": [ASK, bad | {key: off}]})
        assert isinstance(reason, str) and key in reason
        row = to_row({"prompt": [ASK, good, ASK], "completion": [bad | {key: off}, ASK, good]})
        assert supervised(row) == f"good{END}"
    for marks in ({"weight": 0, key: True}, {key: True, "weight": 0}) if key != "weight" else ():
        assert isinstance(to_row({"messages": [ASK, bad | marks]}), str)
    for on in (None, 1, True, "true"):
        assert supervised(to_row({"messages": [ASK, good | {key: on}]})) == f"good{END}"
    assert isinstance(reason := to_row({"messages": [ASK, good | {key: 0.5}]}), str) and key in reason
    asked_for = to_row({"messages": [ASK | {key: True}, good]})
    assert isinstance(asked_for, Row) if key in WEIGHTS else key in str(asked_for), "a user's turn cannot be learnt"
    assert supervised(to_row({"messages": [ASK | {key: False}, good]})) == f"good{END}"


@pytest.mark.parametrize("as_text", [False, True])
def test_history_goes_before_the_prompt(as_text) -> None:
    history: Any = [["one?", "1"], ["two?", "2"]]
    talk = [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 3, ["one?", "1", "two?", "2", "a?", "b"], strict=True)]
    wanted = to_row({"messages": talk}, system="S")
    for form in ({"prompt": "a?", "completion": "b"}, {"instruction": "a?", "output": "b", "input": ""}):
        row = to_row(form | {"history": json.dumps(history) if as_text else history, "system": "S"})
        assert isinstance(row, Row) and isinstance(wanted, Row) and row.messages == wanted.messages
        assert supervised(row) == supervised(wanted) == f"1{END}2{END}b{END}"
        assert to_row(form | {"earlier": history}, columns={"history": "earlier"}, system="S") == wanted
    for bad in ("x", [["only"]], [["a", 1]], [["a", ""]], {"a": 1}):
        assert isinstance(to_row({"prompt": "a?", "completion": "b", "history": bad}), str)
    for form in ({"messages": talk}, {"text": "x"}, {"prompt": talk[:1], "completion": talk[1:2]}):
        assert str(to_row(form | {"history": history})).startswith("history: ")
    mixed = {"prompt": "a?", "completion": talk[1:2], "history": history}
    assert str(to_row(mixed)).startswith("history: the completion is a list of messages")


def test_a_column_that_is_mapped_is_what_the_run_file_says(tmp_path) -> None:
    """Preferred answers may be imitated; the other one is then an unused column, and said to be."""
    path = write_jsonl(tmp_path / "t.jsonl", [{"prompt": "a?", "chosen": "b", "rejected": "c"}] * 2)
    notes: list[str] = []
    found, _ = read_source(Source(path.name, columns={"prompt": "prompt", "completion": "chosen"}), tmp_path, 0, notes.append)
    assert [r.completion for r in found] == ["b", "b"] and notes == ["t.jsonl: not used: rejected (2 rows)"]
    with pytest.raises(DataError, match="completion: chosen"):
        read_source(Source(path.name), tmp_path)
    assert "label" in str(to_row({"q": "a?", "a": "b", "k": False}, columns={"prompt": "q", "completion": "a", "label": "k"}))


def test_labels(tmp_path) -> None:
    """A class without a label is no plain text, and a text with a label that nobody has mapped is not either."""
    for empty in (None, "", " ", float("nan")):
        for columns in ({"label": "label"}, {"text": "text", "label": "label"}):
            assert str(to_row({"text": "x", "label": empty}, columns=columns)).startswith("no label: ")
    for label, name in (("bug", "bug"), (0, "0"), (1, "1"), (True, "True")):
        row = to_row({"text": "x", "label": label}, columns={"label": "label"})
        assert isinstance(row, Row) and (row.prompt, row.completion) == ("x", name)
        assert str(to_row({"text": "x", "label": label})).startswith("text with a label: ")
        assert to_row({"text": "x", "label": label}, columns={"text": "text"}) == to_row({"text": "x"})
    write_jsonl(tmp_path / "l.jsonl", [{"text": f"x{i}", "label": "bug"} for i in range(9)])
    with pytest.raises(DataError, match=r"columns: \{label: label\}"):
        load_examples([Source("l.jsonl")], TOKENIZER, root=tmp_path, max_length=64)


def test_a_row_that_lacks_a_mapped_column_is_not_another_form() -> None:
    columns = {"prompt": "q", "completion": "a"}
    assert str(to_row({"q": "x", "a": None, "text": "y"}, columns=columns)).startswith("not text: completion")
    assert str(to_row({"text": "y"}, columns={"text": "body"})).startswith("no known form")


def test_unused_columns_are_said_once_a_source(tmp_path) -> None:
    talk = [ASK | {"id": 1, "date": None}, ANSWER]
    write_jsonl(tmp_path / "t.jsonl", [{"messages": talk, "ticket": i, "empty": None} for i in range(3)] + [{"messages": [ASK, ANSWER]}])
    data = load_examples([Source("t.jsonl"), Source("t.jsonl")], TOKENIZER, root=tmp_path, max_length=64)
    assert data.notes == ["t.jsonl: not used: messages[].id (3 rows), ticket (3 rows)"] * 2


def test_shapes_in_which_conversations_come() -> None:
    """As JSON text in a cell, with null columns of a table of mixed rows, beginning with the assistant."""
    talk = [ASK, ANSWER]
    wanted = to_row({"messages": talk})
    assert to_row({"messages": json.dumps(talk)}) == wanted
    mixed = [{"role": None, "content": None, "from": f, "value": v, "weight": None} for f, v in (("human", "a?"), ("gpt", "b"))]
    nulls = [m | {"from": None, "value": None, "tool_calls": None, "name": None} for m in talk]
    for messages in (mixed, nulls):
        assert to_row({"messages": messages, "prompt": None}) == wanted
    part = {"type": "text", "text": "a?", "image_url": None}
    assert to_row({"messages": [{"role": "user", "content": [part]}, ANSWER]}) == wanted
    for bad in (part | {"image_url": {"url": "x"}}, {"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": None}, "a?"):
        assert str(to_row({"messages": [{"role": "user", "content": [bad]}, ANSWER]})).startswith("not text: ")
    for both in ({"role": "user", "from": "gpt", "content": "x"}, {"role": "user", "content": "x", "value": "y"}):
        assert "differ" in str(to_row({"messages": [both, ANSWER]}))
    hello = {"from": "gpt", "value": "Hello"}
    row = to_row({"conversations": [hello, hello, *mixed]})
    assert row == wanted and supervised(row) == f"b{END}"
    assert str(to_row({"conversations": [hello]})).startswith("nothing supervised: ")
    row = to_row({"prompt": [ANSWER, ASK], "completion": [ANSWER]})
    assert supervised(row) == f"b{END}" and isinstance(row, Row) and len(row.messages or ()) == 2
    for text in ("[not json", '[{"role": "user", "role": "x"}]', "[" * 100_000):
        assert isinstance(to_row({"messages": text}), str)


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_empty_answers_are_dropped(empty) -> None:
    nothing = {"role": "assistant", "content": empty}
    for record in (
        {"messages": [ASK, nothing]},
        {"messages": [ASK, nothing, ASK, ANSWER]},
        {"prompt": "a?", "completion": empty},
        {"prompt": [ASK], "completion": [nothing]},
        {"instruction": "a?", "output": empty},
    ):
        assert str(to_row(record)).startswith("empty: "), record
    assert supervised(to_row({"messages": [ASK, nothing | {"weight": 0}, ASK, ANSWER]})) == f"b{END}"


def test_what_says_nothing() -> None:
    assert all(map(is_empty, NEUTRAL)) and not any(map(is_empty, (0, False, "0", "x", [0], {"a": 0}, 1.0)))


def test_content_that_looks_like_an_empty_list_is_content() -> None:
    """Only null, NaN and blank text are no content; `[]`, `{}` and `null` are asked about, are system prompts, and are classes."""
    for said in ("[]", "{}", "null", "None", "NaN", "N/A", " [ ] "):
        row = to_row({"instruction": "What type of JSON value is this?", "input": said, "output": "a"})
        assert isinstance(row, Row) and row.prompt == f"What type of JSON value is this?\n\n{said}"
        row = to_row({"prompt": "a?", "completion": said, "system": said}, system="other")
        assert isinstance(row, Row) and (row.system, row.completion) == (said, said)
        row = to_row({"text": "x", "label": said}, columns={"label": "label"})
        assert isinstance(row, Row) and row.completion == said.strip()
        assert str(to_row({"text": "x", "label": said})).startswith("text with a label: ")
    for nothing in (None, float("nan"), "", " \n"):
        row = to_row({"instruction": "a?", "input": nothing, "output": "b", "system": nothing}, system="S")
        assert isinstance(row, Row) and (row.prompt, row.system) == ("a?", "S")


def test_labels_are_trained_as_they_are_judged(tmp_path) -> None:
    (tmp_path / "l.csv").write_text("text, label\nx, bug\ny, idea \n", encoding="utf-8")
    found, _ = read_source(Source("l.csv", columns={"label": "label"}), tmp_path)
    assert [row.completion for row in found] == ["bug", "idea"]
    for row in (Row("r", prompt="Kind:", completion=" bug"), Row("r", messages=(ASK, {"role": "assistant", "content": " bug"}))):
        trained = encode_row(row, TOKENIZER, 512)
        judged = label_examples([row], ["bug", "idea"], TOKENIZER)[0]
        assert isinstance(trained, Example) and judged[0].ids.tolist() == trained.ids.tolist()
        assert learnt(judged[1], TOKENIZER) == f" idea{END}"


def test_a_label_is_a_mark_of_kto_where_an_answer_is_marked(tmp_path) -> None:
    """Beside columns that the run file names, a number is a class; words and booleans are the mark all the same. A text has no answer."""
    notes: list[str] = []
    write_jsonl(tmp_path / "t.jsonl", [{"text": f"x{i}", "label": label} for i, label in enumerate([0, 1, "0", False, True, "bug"])])
    found, dropped = read_source(Source("t.jsonl", columns={"text": "text"}), tmp_path, 0, notes.append)
    assert len(found) == 6 and not dropped and notes == ["t.jsonl: not used: label (6 rows)"]
    columns = {"prompt": "q", "completion": "a"}
    for label in (0, 1, 2, "0", -1):
        write_jsonl(tmp_path / "t.jsonl", [{"q": "x", "a": "y", "label": label}])
        found, dropped = read_source(Source("t.jsonl", columns=columns), tmp_path, 0, notes.append)
        assert len(found) == 1 and not dropped and notes[-1] == "t.jsonl: not used: label (1 row)"
    for unwanted in (False, "false", "undesirable"):
        assert str(to_row({"q": "x", "a": "y", "label": unwanted}, columns=columns)).startswith("label: ")
    for label in (0, -1):
        assert str(to_row({"q": "x", "a": "y", "label": label}, columns=columns | {"label": "label"})).startswith("label: ")
    assert isinstance(to_row({"prompt": "x", "completion": "y", "label": "desirable"}), Row)


@pytest.mark.parametrize("key", MASKS)
def test_masked_turns_are_not_learnt(key) -> None:
    bad, good = ANSWER | {"content": "bad"}, ANSWER | {"content": "good"}
    for on in (True, 1, "true"):
        row = to_row({"messages": [ASK | {key: on}, bad | {key: on}, ASK, good | {key: False}]})
        assert supervised(row) == f"good{END}" and isinstance(row, Row) and len(row.messages or ()) == 4
        assert key in str(to_row({"messages": [ASK, bad | {key: on}]}))
    assert key in str(to_row({"messages": [ASK | {key: False}, good]})) and key in str(to_row({"messages": [ASK, good | {key: "x"}]}))


def test_a_greeting_behind_the_system_turn_answers_nothing(tmp_path) -> None:
    system, hello = {"role": "system", "content": "S"}, {"role": "assistant", "content": "Hello"}
    wanted = to_row({"messages": [system, ASK, ANSWER]})
    notes: list[str] = []
    write_jsonl(
        tmp_path / "t.jsonl", [{"messages": [system, hello, ASK, ANSWER]}, {"prompt": [system, hello, ASK], "completion": [ANSWER]}]
    )
    for row in read_source(Source("t.jsonl"), tmp_path, 0, notes.append)[0]:
        assert isinstance(wanted, Row) and row.messages == wanted.messages and supervised(row) == f"b{END}"
    assert notes == ["t.jsonl: not used: an assistant turn before anything is asked (2 rows)"]
    row = to_row({"messages": [hello, ASK, ANSWER]}, system="S")
    assert isinstance(row, Row) and isinstance(wanted, Row) and row.messages == wanted.messages and row.answers == wanted.answers
    assert supervised(to_row({"messages": [system, hello]})) == f"Hello{END}", "the system turn asks"
    assert str(to_row({"messages": [system, hello, ASK]})).startswith("nothing supervised: ")
    marked = to_row({"messages": [system, hello, ASK, ANSWER | {"weight": 0}, ASK, ANSWER | {"content": ""}]})
    assert str(marked).startswith("empty: messages[5]")


def test_a_prompt_and_its_completion_may_be_text_and_messages(tmp_path) -> None:
    wanted = to_row({"prompt": [ASK], "completion": [ANSWER]})
    rows = [{"prompt": [ASK], "completion": ANSWER["content"]}, {"prompt": ASK["content"], "completion": [ANSWER]}]
    assert [to_row(row) for row in rows] == [wanted, wanted] and supervised(wanted) == f"b{END}"
    assert str(to_row({"prompt": [ASK], "completion": " "})).startswith("empty: completion has no text")
    assert isinstance(to_row({"prompt": [{"type": "text", "text": "a?"}], "completion": "b"}), Row), "parts of a text"
    notes: list[str] = []
    write_jsonl(tmp_path / "t.jsonl", rows)
    assert len(read_source(Source("t.jsonl"), tmp_path, 0, notes.append)[0]) == 2 and notes == []


def test_a_system_column_that_a_system_turn_overrides_is_said(tmp_path) -> None:
    notes: list[str] = []
    turn = {"role": "system", "content": "S"}
    rows = [{"system": said, "messages": [turn, ASK, ANSWER]} for said in ("S", "other", "", None)]
    write_jsonl(tmp_path / "t.jsonl", [*rows, {"system": "S", "messages": [ASK, ANSWER]}])
    for row in read_source(Source("t.jsonl"), tmp_path, 0, notes.append)[0]:
        assert isinstance(row, Row) and (row.messages or ())[0] == turn
    assert notes == ["t.jsonl: not used: system beside a system turn (1 row)"]


def test_prompts_and_completions_as_json_text_are_messages() -> None:
    prompt, completion = [ASK, ANSWER, ASK], [ANSWER | {"content": "c"}]
    wanted = to_row({"prompt": prompt, "completion": completion})
    assert to_row({"prompt": json.dumps(prompt), "completion": json.dumps(completion)}) == wanted and supervised(wanted) == f"c{END}"
    for text in ("[1, 2]", '[{"a": 1}]', "[not json", "[]"):  # is content
        row = to_row({"prompt": text, "completion": text})
        assert isinstance(row, Row) and (row.prompt, row.completion) == (text, text)
