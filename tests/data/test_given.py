"""Rows that a program gives, compared with the same rows read by plain Python: what is supervised, what is dropped, what is refused."""

from __future__ import annotations

import datetime
import decimal
import gc
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.common import write_jsonl
from tests.tiny import tiny_tokenizer
from trimtab.data import Source, load_examples, parse_sources, read_source
from trimtab.data.given import GivenRows
from trimtab.data.keys import ROW_KEYS, SETTING_KEYS, TURN_KEYS
from trimtab.errors import ConfigError, DataError
from trimtab.train import RunConfig

TALKS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": f"n {i} " + "xé🙂"[: i % 4]}, {"role": "assistant", "content": f"a {i}\n"}] for i in range(7)
]
ROWS: list[dict[str, Any]] = [{"messages": talk, "topic": None if n % 2 else "x"} for n, talk in enumerate(TALKS)]


ODD: list[Any] = [None, "", [], 0, 1, 0.5, True, False, "x", ["x"], {"x": 1}, [{"x": None}]]
"""Values of keys: empty ones, and some of each kind."""


def generator(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield from rows


def frame(rows: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("pandas").DataFrame(rows)


def dataset(rows: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(rows)


def table(rows: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("pyarrow").Table.from_pylist(rows)


CONTAINERS: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "list": list,
    "generator": generator,
    "DataFrame": frame,
    "Dataset": dataset,
    "arrow": table,
    "polars": lambda rows: pytest.importorskip("polars").DataFrame(rows),
    "in torch's format": lambda rows: dataset(rows).with_format("torch"),
    "streamed": lambda rows: dataset(rows).to_iterable_dataset(),
    "arrays in a frame": lambda rows: frame(rows).assign(messages=[np.array(r["messages"], dtype=object) for r in rows]),
}


def by_hand(talk: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, and which are the answer's: by transformers' own template and tokenizer."""
    tokenizer = tiny_tokenizer()
    asked = tokenizer.apply_chat_template(talk[:-1], add_generation_prompt=True, tokenize=False)
    parts = (asked, talk[-1]["content"] + "<|im_end|>", "\n")  # what the template writes behind an answer is not the answer's
    assert "".join(parts) == tokenizer.apply_chat_template(talk, tokenize=False)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in parts]
    return [i for part in ids for i in part], [n == 1 for n, part in enumerate(ids) for _ in part]


def only(value: Any, **keys: Any) -> Source:
    (source,) = parse_sources({"rows": value, **keys} if keys else value)
    return source


@pytest.mark.parametrize("container", CONTAINERS)
def test_each_container_gives_the_tokens_that_its_rows_have(container: str, own_cache: Path) -> None:
    source = only(CONTAINERS[container](ROWS))
    found = load_examples([source], tiny_tokenizer(), root=Path(), max_length=64)
    assert [(e.ids.tolist(), e.supervised.tolist()) for e in found.examples] == [by_hand(talk) for talk in TALKS]
    assert [(e.origin, e.row) for e in found.examples] == [(f"rows[{n}]", (0, n)) for n in range(len(TALKS))]
    assert found.notes == ["rows: not used: topic (4 rows)"]  # reported, as of a file


def test_a_row_that_cannot_be_used_is_named_and_the_others_stay(own_cache: Path) -> None:
    recursive: dict[str, Any] = {"prompt": "a"}
    recursive["completion"] = recursive
    rows: list[Any] = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": ""},
        "a text",
        recursive,
        {1: "x", "1": "y", "prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": object()},
        {"prompt": "a", "completion": "b", "weight": 0.5},
    ]
    used, dropped = read_source(only(r for r in rows), Path())
    assert [r.origin for r in used] == ["rows[0]"]
    reasons = {d.origin: d.reason for d in dropped}
    assert list(reasons) == [f"rows[{n}]" for n in range(1, 7)]
    for origin, words in (
        ("rows[1]", "empty"),
        ("rows[3]", "Circular reference"),
        ("rows[4]", "'1' stands twice"),
        ("rows[6]", "weight: "),
    ):
        assert words in reasons[origin], reasons[origin]


def test_values_that_json_lacks_are_what_tables_mean_by_them() -> None:
    pandas = pytest.importorskip("pandas")
    rows: list[dict[Any, Any]] = [
        {"a": float("nan"), "b": np.float32(1.5), "c": np.int64(3), "d": np.array([[1, 2]]), "e": pandas.NA, "f": pandas.NaT},
        {"a": datetime.date(2026, 1, 2), "b": decimal.Decimal("1.10"), "c": (1, float("inf")), "d": Path("x"), "e": b"\xff", 5: True},
    ]
    read = [record for _, record in GivenRows(rows).records("rows")]  # type: ignore[misc]
    assert read[0] == {"a": None, "b": 1.5, "c": 3, "d": [[1, 2]], "e": None, "f": None}
    assert read[1] == {"a": "2026-01-02", "b": "1.10", "c": [1, None], "d": "x", "e": {"a value of type": "builtins.bytes"}, "5": True}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.datetime64("2026-01-02T03:04:05", "ns"), "2026-01-02T03:04:05"),
        (np.datetime64("2026-01-02T03:04:05.000000007", "ns"), "2026-01-02T03:04:05.000000007"),
        (np.datetime64("2026-01-02T03:04:05.25", "ms"), "2026-01-02T03:04:05.250000"),
        (np.datetime64("2026-01-02", "D"), "2026-01-02"),
        (np.datetime64("20260-01-02", "D"), "20260-01-02"),
        (np.datetime64("NaT", "ns"), None),
        (np.array(["2026-01-02", "NaT"], dtype="datetime64[ns]"), ["2026-01-02T00:00:00", None]),
    ],
)
def test_dates_of_numpy_are_texts(value: Any, text: Any) -> None:
    ((_, record),) = GivenRows([{"a": value}]).records("rows")  # type: ignore[misc]
    assert record == {"a": text}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.timedelta64(93784, "s"), "1 day, 2:03:04"),
        (np.timedelta64(93784, "s").astype("timedelta64[ns]"), "1 day, 2:03:04"),
        (np.timedelta64(7, "ns"), "7 nanoseconds"),
        (np.timedelta64(3, "Y"), "3 years"),
        (np.timedelta64("NaT", "ns"), None),
        (np.array([1, "NaT"], dtype="timedelta64[m]"), ["0:01:00", None]),
        (datetime.timedelta(seconds=0.25), "0:00:00.250000"),
    ],
)
def test_durations_are_texts(value: Any, text: Any) -> None:
    ((_, record),) = GivenRows([{"a": value}]).records("rows")  # type: ignore[misc]
    assert record == {"a": text}


def test_durations_of_a_frame_are_texts_as_pandas_writes_them() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"prompt": ["q", "r"], "completion": [pandas.Timedelta("26h"), pandas.NaT]})
    assert [r for _, r in GivenRows(frame).records("rows")] == [  # type: ignore[misc]
        {"prompt": "q", "completion": "1 days 02:00:00"},
        {"prompt": "r", "completion": None},
    ]


def test_labels_of_a_dataset_come_by_name() -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]))
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    assert [r[1]["label"] for r in GivenRows(data).records("x")] == ["yes", "no", -1]  # type: ignore[index]


def test_rows_are_taken_once_and_stay_as_they_were_given(own_cache: Path) -> None:
    asked: list[int] = []

    def counted() -> Iterator[dict[str, Any]]:
        for n in range(5):
            asked.append(n)
            yield {"prompt": "a", "completion": f"b {n}"}

    source = only(counted())
    assert asked == [0, 1, 2, 3, 4]
    rows = [{"prompt": "a", "completion": "b 0"}]
    kept = only(rows)
    rows[0]["completion"] = "changed"
    rows.append({"prompt": "more", "completion": "rows"})
    assert [r.completion for r in read_source(kept, Path())[0]] == ["b 0"]
    for _ in range(2):
        assert [r.completion for r in read_source(source, Path())[0]] == [f"b {n}" for n in range(5)]
    assert asked == [0, 1, 2, 3, 4]


def test_a_generator_without_end_is_read_as_far_as_its_limit() -> None:
    def endless() -> Iterator[dict[str, str]]:
        while True:
            yield {"prompt": "a", "completion": "b"}

    assert len(read_source(only(endless(), limit=3), Path())[0]) == 3


def test_many_rows_are_read_back_whole_by_several_at_a_time() -> None:
    rows = [{"text": f"{n} " + "y" * (n * 37 % 5000)} for n in range(2000)]  # lines that lie across the pieces that are read
    held = GivenRows(rows)
    one, other = held.records("a"), held.records("b")
    pairs = list(zip(one, other, strict=True))
    assert [a[1] for a, _ in pairs] == rows and [b[1] for _, b in pairs] == rows  # type: ignore[index]


def test_the_cache_goes_by_content(own_cache: Path) -> None:
    def files() -> set[str]:
        return {p.name for p in (own_cache / "tokens").glob("*.tokens")}

    def load(rows: Any, **keys: Any) -> None:
        load_examples([only(rows, **keys)], tiny_tokenizer(), root=Path(), max_length=64)

    load(ROWS)
    first = files()
    load(generator(ROWS))
    assert files() == first and len(first) == 1
    load([*ROWS[:-1], {"messages": TALKS[0]}])
    load(ROWS, system="Be brief.")
    assert len(files()) == 3


def test_the_file_of_rows_is_closed_with_them() -> None:
    before = set(Path("/proc/self/fd").iterdir())
    held = GivenRows(ROWS)
    assert set(Path("/proc/self/fd").iterdir()) - before
    del held
    gc.collect()
    assert not set(Path("/proc/self/fd").iterdir()) - before


def test_lists_mix_and_options_hold(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "more.jsonl", [{"prompt": "f", "completion": "g"}])
    pairs = [{"question": "a", "reply": "b"}]
    mapped = {"rows": pairs, "columns": {"prompt": "question", "completion": "reply"}, "weight": 2, "system": "S"}
    sources = parse_sources([mapped, str(path), {"rows": generator(ROWS)}])
    assert [s.path for s in sources] == ["rows", str(path), "rows 2"]
    (row,), _ = read_source(sources[0], Path())
    assert (row.prompt, row.completion, row.system, sources[0].weight) == ("a", "b", "S", 2)
    assert read_source(sources[2], Path(), 2)[0][3].origin == "rows 2[3]"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"prompt": "a", "completion": "b"}, "one row: rows stand in a list"),
        ([{"pth": "x.jsonl"}], "neither a path, nor rows.*'pth' \\(did you mean 'path'"),
        ({"path": "x", "rows": [{"text": "a"}]}, "`path` and `rows` are both given"),
        ({"rows": [{"text": "a"}], "format": "csv"}, "format: of files"),
        ({"rows": [{"text": "a"}], "wieght": 2}, "'wieght' \\(did you mean 'weight'"),
        ({"rows": 5}, "rows = 5: not a list of dicts"),
        ({"rows": GivenRows([{"text": "a"}]), "format": "csv"}, "format: of files"),
        ({"rows": GivenRows([{"text": "a"}]), "split": "train"}, "split: of files"),
        ({"train": (x for x in ()), "test": (x for x in ())}, "several splits, train, test: give one of them"),
    ],
)
def test_what_is_no_source_is_refused_by_name(value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_sources(value)


def test_no_rows_and_columns_that_nothing_reads_are_said() -> None:
    with pytest.raises(DataError, match="rows holds no rows"):
        read_source(only(generator([])), Path())
    with pytest.raises(DataError, match=r"rows: no training form found in its columns: question, answer"):
        read_source(only([{"question": "a", "answer": "b"}]), Path())
    pandas = pytest.importorskip("pandas")
    with pytest.raises(ConfigError, match="names a column twice: text"):
        parse_sources(pandas.DataFrame([["a", "b"]], columns=["text", "text"]))


def test_rows_with_a_column_path_are_told_once_where_they_stand() -> None:
    rows = [{"path": "a.py", "text": "x"}, {"path": "b.py", "text": "y"}, {"text": "z"}]
    with pytest.raises(ConfigError) as refused:
        parse_sources(rows)
    (problem,) = refused.value.problems
    assert "'text' beside `path`" in problem and "{'rows': [...]}" in problem
    assert [r.text for r in read_source(only({"rows": rows}), Path())[0]] == ["x", "y", "z"]
    with pytest.raises(ConfigError) as refused:
        parse_sources({"path": "a.jsonl", "chosen": "better", "wieght": 2})
    assert "'chosen' beside `path`" in refused.value.problems[0] and "`columns`" in refused.value.problems[0]


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_one_column_is_no_table(library: str) -> None:
    column = pytest.importorskip(library).DataFrame({"words": ["a", "b"]})["words"]
    for value in (column, {"rows": column}):
        with pytest.raises(ConfigError) as refused:
            parse_sources(value)
        assert "one column (Series), not a table" in str(refused.value.among_others())
        assert "df[['words']]" in str(refused.value.among_others())


def test_an_error_of_a_generator_is_the_users_own() -> None:
    def broken() -> Iterator[dict[str, str]]:
        yield {"text": "a"}
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        parse_sources(broken())


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr("tempfile.TemporaryFile", lambda: full)
        with pytest.raises(DataError, match=r"the rows cannot be kept in .*: No space left on device"):
            GivenRows(ROWS)


def test_splits_of_the_hub_are_a_data_set() -> None:
    datasets = pytest.importorskip("datasets")
    splits = datasets.DatasetDict({"train": dataset(ROWS), "test": dataset(ROWS[:2])})
    run = {"base": "b", "out": "o", "data": splits, "variants": {"v": {"method": "lora"}}}
    found = RunConfig.from_dict(run).data["data"].splits
    assert {n: len(read_source(s[0], Path())[0]) for n, s in found.items()} == {"train": 7, "test": 2}
    with pytest.raises(ConfigError, match=r"data\.data\.validation: unknown key: write valid"):
        RunConfig.from_dict(run | {"data": datasets.DatasetDict({"train": dataset(ROWS), "validation": dataset(ROWS)})})


def test_messages_as_json_text_are_read_as_in_files() -> None:
    (row,), _ = read_source(only([{"messages": json.dumps(TALKS[0])}]), Path())
    assert list(row.messages or ()) == TALKS[0]


def values() -> st.SearchStrategy[Any]:
    """What JSON holds, as tables have it: numpy's numbers and tuples among them."""
    plain = (
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**63 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=8)
    )
    odd = st.integers(-(2**31), 2**31 - 1).map(np.int64) | st.floats(-1e6, 1e6, width=32).map(np.float32) | st.booleans().map(np.bool_)
    return st.recursive(
        plain | odd, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=8
    )


def as_json(value: Any) -> Any:
    """By `json` alone, numpy's numbers by their own `item`."""
    return json.loads(json.dumps(value, default=lambda x: x.item()))


@given(st.lists(st.dictionaries(st.text(max_size=6), values(), max_size=4), max_size=5))
@settings(max_examples=60, deadline=None)
def test_any_rows_come_back_as_json_has_them(rows: list[dict[str, Any]]) -> None:
    assert [record for _, record in GivenRows(rows).records("rows")] == [as_json(row) for row in rows]  # type: ignore[misc]


def test_each_key_means_in_memory_what_it_means_in_a_file(tmp_path: Path) -> None:
    """Law 12: each key of a row and of a turn that any reader knows, neutral and not, alone and in a table where other rows lack it."""
    row_keys = [
        {"prompt": "a", "completion": "b", key: value} for key in (*ROW_KEYS, *SETTING_KEYS, "tools", "history", "system") for value in ODD
    ]
    turns = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", key: value}]}
        for key in TURN_KEYS
        for value in ODD
    ]
    for rows in (row_keys, turns):
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        notes: tuple[list[str], list[str]] = [], []
        by_file = read_source(Source(path.name), tmp_path, 0, notes[0].append)
        in_memory = read_source(only(list(rows)), tmp_path, 0, notes[1].append)
        told = [
            ([(r.id, r.content_key) for r in used], [(re.sub(r"^\D+\d+\]?", "", d.origin), d.reason) for d in dropped])
            for used, dropped in (by_file, in_memory)
        ]
        assert told[0] == told[1] and told[0][0] and told[0][1]
        assert [int(re.findall(r"\d+", d.origin)[0]) - 1 for d in by_file[1]] == [
            int(re.findall(r"\d+", d.origin)[0]) for d in in_memory[1]
        ]
        assert [n.partition(": ")[2] for n in notes[0]] == [n.partition(": ")[2] for n in notes[1]]
