"""Every form of row in every format, what is dropped with file and line, and the errors that say what a file holds."""

import csv
import json
import os
import sys
import types

import pytest

from tests.data.common import TALK, write_jsonl
from trimtab.data import Source, opened, parse_sources, read_source
from trimtab.data.source_rows import content_of
from trimtab.errors import ConfigError, DataError

PAIR = {"prompt": "Q", "completion": "A"}
ROWS = {
    "messages": {"messages": TALK},
    "sharegpt": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "pair": PAIR,
    "lists": {"prompt": TALK[:2], "completion": TALK[2:3]},
    "alpaca": {"instruction": "Add", "input": "1 2", "output": "3"},
    "text": {"text": "Once."},
}


def read(path, root=None, **source):
    return read_source(Source(str(path), **source), root or path.parent)


def one(tmp_path, record, **source):
    rows, dropped = read(write_jsonl(tmp_path / "rows.jsonl", [record]), **source)
    assert not dropped, dropped
    return rows[0]


def reasons(dropped):
    return {d.origin: d.reason for d in dropped}


def test_each_form(tmp_path):
    rows = {name: one(tmp_path, record) for name, record in ROWS.items()}
    assert list(rows["messages"].messages) == TALK and rows["messages"].origin == "rows.jsonl:1"
    assert [(m["role"], m["content"]) for m in rows["sharegpt"].messages] == [("user", "Q"), ("assistant", "A")]
    assert (rows["pair"].prompt, rows["pair"].completion, rows["pair"].separator) == ("Q", "A", "")
    assert list(rows["lists"].messages) == TALK[:3] and rows["lists"].first_supervised == 2
    assert (rows["alpaca"].prompt, rows["alpaca"].completion, rows["alpaca"].separator) == ("Add\n\n1 2", "3", "\n\n")
    assert rows["text"].text == "Once."
    assert one(tmp_path, {"instruction": "Add", "input": "", "output": "3"}).prompt == "Add"


def test_text_parts_are_joined_and_null_columns_do_not_count(tmp_path):
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None}, TALK[2]]
    assert one(tmp_path, {"messages": parts}).messages[0]["content"] == "a\nb"  # as in serving
    assert one(tmp_path, {"messages": None, **PAIR}).prompt == "Q"


def test_columns_map_names_and_win_over_what_is_there(tmp_path):
    record = {"messages": TALK, "question": "Q", "answer": "A"}
    assert one(tmp_path, record, columns={"prompt": "question", "completion": "answer"}).prompt == "Q"
    row = one(tmp_path, {"text": "great", "label": 1}, columns={"label": "label"})
    assert (row.prompt, row.completion, row.separator) == ("great", "1", "\n")
    assert one(tmp_path, {"text": "great", "label": 1}, columns={"text": "text"}).text == "great"
    assert one(tmp_path, {"review": "great", "mood": "good"}, columns={"text": "review", "label": "mood"}).completion == "good"


def test_system_goes_before_rows_that_have_none(tmp_path):
    assert one(tmp_path, PAIR, system="S").conversation[0] == {"role": "system", "content": "S"}
    assert one(tmp_path, {**PAIR, "system": "own"}, system="S").system == "own"
    assert list(one(tmp_path, {"messages": TALK}, system="S").messages) == TALK
    row = one(tmp_path, ROWS["lists"] | {"prompt": TALK[1:2]}, system="S")
    assert [m["role"] for m in row.messages] == ["system", "user", "assistant"] and row.first_supervised == 2
    assert read(write_jsonl(tmp_path / "t.jsonl", [ROWS["text"]]), system="S")[1][0].kind == "system with plain text"


BAD = {
    "bad messages": [{"messages": []}, {"messages": "x"}, {"messages": ["x"]}],
    "unknown role": [{"messages": [{"role": "asistant", "content": "x"}]}, {"messages": [{"content": "x"}]}],
    "not text": [{"messages": [{"role": "user", "content": None}]}, {"prompt": 3, "completion": "A"}, {"prompt": "Q", "completion": None}],
    "tool calls": [{"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}],
    "empty": [{"prompt": "Q", "completion": " "}, {"text": ""}],
    "not an object": [[1], "x", None],
    "no known form": [{"question": "Q"}],
    "not Unicode": [{"prompt": "\ud83d", "completion": "A"}],
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_rows_are_dropped_by_line(tmp_path, kind):
    rows, dropped = read(write_jsonl(tmp_path / "rows.jsonl", [PAIR, *BAD[kind]]))
    assert len(rows) == 1
    assert [(d.origin, d.kind) for d in dropped] == [(f"rows.jsonl:{i + 2}", kind) for i in range(len(BAD[kind]))]


def test_unknown_role_is_named_with_the_nearest(tmp_path):
    _, dropped = read(write_jsonl(tmp_path / "rows.jsonl", [PAIR, BAD["unknown role"][0]]))
    assert dropped[0].reason == "unknown role: messages[0] has role 'asistant' (did you mean 'assistant'?)"


def test_jsonl_with_bom_crlf_blank_lines_broken_lines_and_other_encodings(tmp_path):
    good = json.dumps({"prompt": "é\u2028", "completion": "A"}, ensure_ascii=False).encode()
    lines = [b"\xef\xbb\xbf" + good + b"\r", b"", b'{"prompt": "Q"', '{"prompt": "é"}'.encode("latin-1"), b"[" * 100_000, good]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    rows, dropped = read(tmp_path / "rows.jsonl")
    assert [r.origin for r in rows] == ["rows.jsonl:1", "rows.jsonl:6"] and rows[0].prompt == "é\u2028"
    found = reasons(dropped)
    assert found["rows.jsonl:3"].startswith("not JSON: ")
    assert found["rows.jsonl:4"] == "not UTF-8: byte 0xe9 at column 13"
    assert found["rows.jsonl:5"].startswith("not JSON: ")


def test_json_array_counts_lines(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([PAIR, {"prompt": "Q"}, PAIR], indent=1), encoding="utf-8")
    rows, dropped = read(path)
    assert [r.origin for r in rows] == ["rows.json:2", "rows.json:9"] and [d.origin for d in dropped] == ["rows.json:6"]
    path.write_text(json.dumps(PAIR) + "\n" + json.dumps(PAIR) + "\n", encoding="utf-8")
    assert [r.origin for r in read(path)[0]] == ["rows.json:1", "rows.json:2"]
    path.write_bytes(b'[{"prompt": "caf\xe9", "completion": "A"},\n ' + json.dumps(PAIR).encode() + b"]")
    rows, dropped = read(path)
    assert len(rows) == 1 and reasons(dropped) == {"rows.json:1": "not UTF-8: byte 0xe9 in prompt"}


@pytest.mark.parametrize("text", ['[{"prompt": "Q"},\n {"prompt: 1}]', '[{"a": 1}\n {"a": 1}]', "[{}", '[{"a": 1}, '])
def test_broken_json_array_is_an_error_with_its_line(tmp_path, text):
    (tmp_path / "rows.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.json:\d is not JSON"):
        read(tmp_path / "rows.json")


def test_all_that_stands_behind_a_json_array_is_read_or_refused(tmp_path):
    path = tmp_path / "rows.json"
    first, second, third = (json.dumps({"prompt": q, "completion": "A"}) for q in "xyz")
    for text in (
        f"[{first}]\n[{second},\n{third}]",
        f"[{first}][{second}]\n\ufeff\n[{third}]\n ",
        f"[{first}]\n{second}\n{third}",
        f"[]\n[{first},{second},{third}]",
    ):
        path.write_text(text, encoding="utf-8")
        assert [row.prompt for row in read(path)[0]] == ["x", "y", "z"], text
    path.write_text(f"[{first}]\n\n[\n{second}]", encoding="utf-8")
    assert [row.origin for row in read(path)[0]] == ["rows.json:1", "rows.json:4"]
    for rest in ("garbage", "]", ", [1]", '"x"', "[", f"[{second} {third}]", f"{{{second}"):
        path.write_text(f"[{first}]\n{rest}", encoding="utf-8")
        with pytest.raises(DataError, match=r"rows\.json:2 is "):
            read(path)


def test_json_object_is_not_an_array(tmp_path):
    (tmp_path / "rows.json").write_text('{"data": []}', encoding="utf-8")
    with pytest.raises(DataError, match="does not hold a JSON array"):
        read(tmp_path / "rows.json")


@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ","), ("t.csv", ";"), ("t.tsv", "\t")])
def test_csv(tmp_path, name, delimiter):
    with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter).writerows([["prompt", "completion"], ["a\nb, c; d", "é"], ["", ""], ["Q"], ["Q", "A"]])
    rows, dropped = read(tmp_path / name)
    assert [(r.origin, r.prompt, r.completion) for r in rows] == [(f"{name}:2", "a\nb, c; d", "é"), (f"{name}:6", "Q", "A")]
    assert reasons(dropped) == {f"{name}:5": "empty: completion has no text"}


def test_csv_that_is_broken_or_not_utf8(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b'prompt,completion\ncaf\xe9,A\n"a"b,A\nQ,A\n')
    rows, dropped = read(path)
    assert [r.origin for r in rows] == ["t.csv:4"]
    assert reasons(dropped)["t.csv:2"] == "not UTF-8: byte 0xe9 in prompt" and reasons(dropped)["t.csv:3"].startswith("not CSV: ")
    path.write_text('prompt,completion\nQ,A\n"never closed,A\nQ,A\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"t\.csv:3 opens a quote that is never closed"):
        read(path)
    path.write_text("prompt,prompt\nQ,A\n", encoding="utf-8")
    with pytest.raises(DataError, match="names a column twice"):
        read(path)


def test_wrong_columns_list_what_exists_and_what_is_understood(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("id,promt,answer\n1,Q,A\n", encoding="utf-8")
    with pytest.raises(DataError) as found:
        read(path)
    assert "id, promt, answer" in str(found.value) and "did you mean 'prompt'?" in str(found.value) and "instruction" in str(found.value)
    with pytest.raises(DataError, match=r"completion: 'answr' does not exist \(did you mean 'answer'\?\)"):
        read(path, columns={"prompt": "promt", "completion": "answr"})
    with pytest.raises(DataError, match=r"'promp' is not one of ours \(did you mean 'prompt'\?\)"):
        read(path, columns={"promp": "promt", "completion": "answer"})


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist([{"messages": TALK}, {"messages": TALK[:1]}]), tmp_path / "t.parquet")
    rows, dropped = read(tmp_path / "t.parquet")
    assert list(rows[0].messages) == TALK and rows[1].origin == "t.parquet:2" and not dropped
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read(tmp_path / "t.parquet")


@pytest.mark.parametrize(("path", "module", "package"), [("t.parquet", "pyarrow.parquet", "pyarrow"), ("hf:a/b", "datasets", "datasets")])
def test_missing_packages_are_named(tmp_path, monkeypatch, path, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=f"pip install {package}"):
        read_source(Source(path), tmp_path)


class ClassLabel:
    def int2str(self, number):
        return ["bad", "good"][number]


def test_hub_dataset(tmp_path, monkeypatch):
    class Data(list):
        features = types.MappingProxyType({"text": object(), "label": ClassLabel()})

    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return Data([{"text": "great", "label": 1}, {"text": "meh", "label": -1}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, ClassLabel=ClassLabel))
    rows, _ = read_source(Source("hf:org/name:config", split="test", columns={"label": "label"}), tmp_path)
    assert [(r.origin, r.completion) for r in rows] == [("hf:org/name:config:1", "good"), ("hf:org/name:config:2", "-1")]
    assert asked == [("org/name", "config", "test")]


LOCAL = ["/etc", "./x", "../x", ".", "..", "a/..", "~/x", "a/b/c", "a//b", "file:///etc", "https://a/b", "hf://a/b", "a\\b", "a b", "x.py"]


@pytest.mark.parametrize("name", [*LOCAL, "\0", "a/.b", "é", "x" * 97, ":config"])
def test_what_is_here_is_no_hub_dataset(name):
    with pytest.raises(ConfigError, match="without hf:"):
        Source(f"hf:{name}")
    with pytest.raises(ConfigError, match="without hf:"):
        parse_sources([{"path": f"hf:{name}", "weight": 2}])


def test_datasets_is_given_no_name_of_what_is_here(tmp_path, monkeypatch):
    """It takes a folder that is here before the hub, and reads files of the current folder where it has a reader of that name."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **named: pytest.fail(f"asked for {given}"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "rows").write_text("secret")
    for name in ("org/name", "org/name:config", "rows", "json", "text", "csv", "parquet", "imagefolder"):
        with pytest.raises(DataError, match="without hf:"):
            read_source(Source(f"hf:{name}"), tmp_path / "elsewhere")


def test_hub_dataset_offline(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="hf:no-such-org/no-such-name cannot be loaded"):
        read_source(Source("hf:no-such-org/no-such-name"), tmp_path)


def test_only_regular_files_of_bounded_lines_and_sizes_are_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.csv").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "zero.csv"):
        with pytest.raises(DataError, match=f"{name} is not a regular file"):
            read(tmp_path / name)
    for name in ("one.jsonl", "one.csv", "one.json", "one.txt"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 40)  # sparse: nothing may read it through
        with pytest.raises(DataError, match="has more than"):
            read(tmp_path / name)
        assert content_of(Source(name), tmp_path) is None
    for name in ("one.parquet", "one.dat"):
        os.link(tmp_path / "one.txt", tmp_path / name)
        assert content_of(Source(name), tmp_path) is None
    with pytest.raises(DataError, match="status is empty"):  # the kernel makes it up as it is read: such a file may have no end
        read_source(Source("/proc/self/status", format="text"), tmp_path)
    monkeypatch.setattr(opened, "MAX_LINE", 100)
    write_jsonl(tmp_path / "long.jsonl", [PAIR, {"prompt": "x" * 100, "completion": "A"}])
    with pytest.raises(DataError, match=r"long\.jsonl:2 has more than"):
        read(tmp_path / "long.jsonl")


def test_marks_of_byte_order_in_the_middle_and_keys_that_stand_twice(tmp_path):
    line, mark = json.dumps(PAIR).encode(), b"\xef\xbb\xbf"
    (tmp_path / "t.jsonl").write_bytes(mark + line + b"\n" + mark + line + b"\n" + mark + b"\n")
    assert len(read(tmp_path / "t.jsonl")[0]) == 2
    (tmp_path / "t.csv").write_bytes(b"prompt,completion\nQ,A\n" + mark + b'prompt,completion\n"x",y\n')
    rows, dropped = read(tmp_path / "t.csv")
    assert [r.prompt for r in rows] == ["Q", "x"] and reasons(dropped) == {"t.csv:3": "not CSV: the header stands here again"}
    (tmp_path / "t.csv").write_bytes(b"prompt,completion\nQ,A\n" + mark + b'"x",y\n')
    assert [r.prompt for r in read(tmp_path / "t.csv")[0]] == ["Q", "x"]
    twice = ['{"prompt": "a", "completion": "b", "completion": "c"}', '{"messages": [{"role": "user", "role": "system", "content": "x"}]}']
    (tmp_path / "t.jsonl").write_text("\n".join([json.dumps(PAIR), *twice]), encoding="utf-8")
    (tmp_path / "t.json").write_text(f"[{json.dumps(PAIR)},\n{twice[0]},\n{twice[1]}]", encoding="utf-8")
    for name in ("t.jsonl", "t.json"):
        rows, dropped = read(tmp_path / name)
        assert len(rows) == 1 and [(d.origin, d.kind) for d in dropped] == [(f"{name}:2", "duplicate key"), (f"{name}:3", "duplicate key")]
        assert "'completion'" in dropped[0].reason and "'role'" in dropped[1].reason
    (tmp_path / "t.json").write_text(twice[0], encoding="utf-8")
    assert [d.kind for d in read(tmp_path / "t.json")[1]] == ["duplicate key"]


def test_a_key_that_stands_twice_drops_its_row_alone(tmp_path):
    good, twice, path = json.dumps(PAIR), '{"prompt": "a", "completion": "b", "completion": "c"}', tmp_path / "t.json"
    deep = '{"messages": [{"role": "user", "role": "system", "content": "x"}]}'
    for text, kept, lost in (
        (f'{{"version": 1, "data": [{good}, {twice}, {deep}]}}', ["t.json:data[0]"], ["t.json:data[1]", "t.json:data[2]"]),
        (f"{twice}\n{good}\n{deep}\n{good}", ["t.json:2", "t.json:4"], ["t.json:1", "t.json:3"]),
        (deep, [], ["t.json:1"]),
        (f'{{"data": [{good}], "data": [{good}]}}', [], ["t.json:1"]),
        (f'{{"more": {{"data": [{good}], "data": [{good}]}}, "data": [{good}]}}', [], ["t.json:1"]),
    ):
        path.write_text(text, encoding="utf-8")
        rows, dropped = read(path)
        assert [row.origin for row in rows] == kept and [d.origin for d in dropped] == lost, text
        assert {d.kind for d in dropped} == {"duplicate key"}


@pytest.mark.parametrize("key", ["data", "rows", "examples"])
def test_json_objects_that_hold_the_rows(tmp_path, key):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"version": "1", "tags": ["x"], key: [PAIR, {"prompt": "Q"}, PAIR]}, indent=1), encoding="utf-8")
    rows, dropped = read(path)
    assert [r.origin for r in rows] == [f"t.json:{key}[0]", f"t.json:{key}[2]"] and [d.origin for d in dropped] == [f"t.json:{key}[1]"]
    path.write_text(json.dumps({"result": {key: [PAIR], "tags": []}}), encoding="utf-8")
    assert [r.origin for r in read(path)[0]] == [f"t.json:result.{key}[0]"]
    path.write_text(json.dumps({key: [PAIR], "more": [PAIR]}), encoding="utf-8")
    with pytest.raises(DataError, match=f"2 lists of them: {key}, more"):
        read(path)


def test_json_objects_that_are_a_row(tmp_path):
    path = tmp_path / "t.json"
    for record in (PAIR, {"messages": TALK}, {"messages": TALK, "tags": [{"a": 1}]}, {"conversations": [{"from": "human", "value": "x"}]}):
        path.write_text(json.dumps(record, indent=2), encoding="utf-8")
        assert [r.origin for r in read(path)[0]] == ["t.json:1"]
    for record, columns in (({"chat": TALK}, {"messages": "chat"}), ({"q": "x", "a": "y"}, {"prompt": "q", "completion": "a"})):
        path.write_text(json.dumps(record), encoding="utf-8")
        assert len(read(path, columns=columns)[0]) == 1


def test_missing_empty_unknown_and_utf16_files(tmp_path):
    write_jsonl(tmp_path / "tickets.jsonl", [PAIR])
    with pytest.raises(DataError, match=r"tickts\.jsonl does not exist \(did you mean 'tickets\.jsonl'\?\)"):
        read(tmp_path / "tickts.jsonl")
    for content in (b"", b"\xef\xbb\xbf\n \n"):
        (tmp_path / "e.jsonl").write_bytes(content)
        with pytest.raises(DataError, match="is empty"):
            read(tmp_path / "e.jsonl")
    for name, content in (("e.csv", "prompt,completion\n"), ("e.json", "[]")):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match="holds no rows"):
            read(tmp_path / name)
    (tmp_path / "e.jsonl").write_text(json.dumps(PAIR), encoding="utf-16")
    with pytest.raises(DataError, match="is UTF-16"):
        read(tmp_path / "e.jsonl")
    (tmp_path / "rows.dat").write_text(json.dumps(PAIR), encoding="utf-8")
    with pytest.raises(DataError, match="add `format:`"):
        read(tmp_path / "rows.dat")
    assert len(read(tmp_path / "rows.dat", format="jsonl")[0]) == 1


def test_parse_sources_as_a_run_file_writes_them():
    assert parse_sources("a.jsonl") == [Source("a.jsonl")]
    assert parse_sources(["a.jsonl", {"path": "docs", "weight": 2}]) == [Source("a.jsonl"), Source("docs", weight=2)]
    with pytest.raises(ConfigError, match=r"train\[0\]: unknown key 'wieght' \(did you mean 'weight'\?\)"):
        parse_sources([{"path": "a", "wieght": 1}], where="train")
    for bad in ([], 3, {"weight": 1}):
        with pytest.raises(ConfigError):
            parse_sources(bad)
    for fields in ({"weight": 0}, {"weight": float("inf")}, {"format": "jsonll"}, {"columns": {"prompt": 1}}, {"system": 1}):
        with pytest.raises(ConfigError, match=next(iter(fields))):
            Source("a", **fields)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ({"path": "a.jsonl", "split": "test"}, "split = 'test': a file or folder has no splits by name"),
        ({"path": "guides", "split": "validation"}, "split = 'validation': a file or folder has no splits by name"),
        ({"path": "hf:org/name", "format": "csv"}, "format = 'csv': of files"),
        ({"path": "a.jsonl", "max_dropped": 30}, "max_dropped = 30: not a part of the rows, 0 to 1"),
        ({"path": "a.jsonl", "max_dropped": True}, "max_dropped = True: not a part"),
        ({"path": "a.jsonl", "split": "train"}, None),
        ({"path": "a.jsonl", "split": 0.1, "format": "csv"}, None),
        ({"path": "hf:org/name", "split": "test"}, None),
    ],
)
def test_keys_of_other_sources_and_wrong_values_are_refused(source, problem):
    if problem is None:
        assert parse_sources(source)
        return
    with pytest.raises(ConfigError, match=problem):
        parse_sources(source)
