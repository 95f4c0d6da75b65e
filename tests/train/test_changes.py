"""What one call may change of a run: `--set`, more epochs on `--resume`, warm-up as a part of the steps, rows held out by `split`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from tests.train.common import METHODS, run_file, tiny_base
from trimtab.cli import main
from trimtab.data import load_examples, parse_sources
from trimtab.errors import ConfigError, DataError
from trimtab.store import Adapter
from trimtab.train import RunConfig, train
from trimtab.train.changes import with_changes
from trimtab.train.options import DataConfig, TrainOptions

FILE = {"base": "b", "data": {"a": {"train": ["x.jsonl", {"path": "y"}]}}, "variants": {"v.2": {"lr": 1e-3}, "v": {}}}


@pytest.mark.parametrize(
    ("change", "path", "value"),
    [
        ("variants.v.2.lr=2e-4", ("variants", "v.2", "lr"), 2e-4),
        ("variants.v.lr=1", ("variants", "v", "lr"), 1),
        ("defaults.epochs=3", ("defaults", "epochs"), 3),
        ("data.a.train.1.weight=0.5", ("data", "a", "train", 1, "weight"), 0.5),
        ("variants.v.target_modules=[q_proj, v_proj]", ("variants", "v", "target_modules"), ["q_proj", "v_proj"]),
        ("base=other=name", ("base",), "other=name"),
        ("out=null", ("out",), None),
    ],
)
def test_a_value_is_set(change: str, path: tuple[Any, ...], value: Any) -> None:
    before = json.dumps(FILE)
    found: Any = with_changes(FILE, [change], "run.yaml")
    for key in path:
        found = found[key]
    assert found == value and type(found) is type(value)
    assert json.dumps(FILE) == before


def test_all_changes_that_cannot_be_made_are_named() -> None:
    wrong = ["variants.w.lr=1", "data.a.train.5.weight=1", "data.a.train.0.weight=1", "lr", "base={", f"base={'[' * 3000}"]
    with pytest.raises(ConfigError) as e:
        with_changes(FILE, wrong, "run.yaml")
    said = "\n".join(e.value.problems)
    assert len(e.value.problems) == len(wrong)
    for word in ("there is no 'variants.w'", "counted from 0", "set it whole", "KEY=VALUE", "nested too deeply"):
        assert word in said


def test_check_reads_the_changed_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_file(tmp_path, {"v": {"data": "a", **METHODS["lora"]}})))
    result = CliRunner().invoke(main, ["check", str(tmp_path / "run.yaml"), "--set", "variants.v.lr=high", "--set", "variants.v.rr=8"])
    assert result.exit_code == 2
    assert "variants.v.lr" in result.output and "variants.v.rr: unknown key" in result.output


def test_warm_up_may_be_a_part_of_all_steps() -> None:
    assert [TrainOptions(warmup_steps=w).warmup(50) for w in (0, 0.1, 0.11, 7, 7.0)] == [0, 5, 6, 7, 7]
    with pytest.raises(ValueError, match="whole number of steps"):
        TrainOptions(warmup_steps=1.5)


def _long(steps: int, folder: Path, **options: Any) -> RunConfig:
    content = run_file(folder, {"v": {"data": "a", **METHODS["lora"], **options}})
    return RunConfig.from_dict(content | {"defaults": content["defaults"] | {"schedule": "constant", "max_steps": steps}}, root=folder)


def test_a_finished_run_is_trained_on(tmp_path: Path) -> None:
    """With a constant rate the extended run equals one that was longer from the start."""
    whole = train(_long(9, tmp_path / "whole"), base=tiny_base())
    part = tmp_path / "part"
    train(_long(5, part), base=tiny_base())
    with pytest.raises(ConfigError, match="finished") as e:
        train(_long(9, part), base=tiny_base(), resume=True)
    assert "--extend" in e.value.fix
    longer = train(_long(9, part), base=tiny_base(), resume=True, extend=True)
    a, b = (Adapter.load(r.out / "adapters" / "v", tiny_base()).params for r in (whole, longer))
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)
    assert longer.summary["variants"]["v"]["steps"] == 9
    assert [json.loads(x)["step"] for x in (part / "out" / "metrics.jsonl").read_text().splitlines()] == list(range(1, 10))
    assert "without --resume" in CliRunner().invoke(main, ["train", "run.yaml", "--extend"]).output
    with pytest.raises(ConfigError, match="extended, not cut"):
        train(_long(4, part), base=tiny_base(), resume=True, extend=True)
    with pytest.raises(ConfigError, match="has changed"):
        train(_long(12, part, r=2), base=tiny_base(), resume=True, extend=True)


def _held(folder: Path, **keys: Any) -> tuple[list[str], list[str]]:
    """(training rows, valid rows) by their texts."""
    data = DataConfig(**keys)
    return tuple(  # type: ignore[return-value]
        sorted(row.text or "" for row in load_examples(s, tiny_base().tokenizer, root=folder, max_length=64, keep_rows=True, seed=3).rows)
        for s in (data.train, data.valid)
    )


def test_rows_are_held_out(tmp_path: Path) -> None:
    texts = [f"row number {i}" for i in range(40)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    from trimtab.data import Source

    train_rows, valid_rows = _held(tmp_path, train=[Source("t.jsonl", split=0.25)])
    assert len(valid_rows) == 10 and sorted(train_rows + valid_rows) == sorted(texts)
    assert _held(tmp_path, train=[Source("t.jsonl", weight=2)], split=10) == (train_rows, valid_rows)
    more = [*texts, "another row", *valid_rows[:1]]  # one more, and one twice: both of it stay on one side
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in more))
    now_train, now_valid = _held(tmp_path, train=[Source("t.jsonl")], split=0.25)
    assert not set(now_train) & set(now_valid)
    assert len(set(valid_rows) - set(now_valid)) <= 1
    for split, word in ((40, "none is left"), (0.999, "none is left")):
        with pytest.raises(DataError, match=word):
            _held(tmp_path, train=[Source("t.jsonl", limit=3, split=split)])


def test_held_out_rows_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    source = {"path": "t.jsonl", "split": 1}
    refused = 0
    for i in range(6):  # of three rows one is held out: at times the one that is too long
        rows = [f"{i} {'long ' * 99}", "row 0", "row 1"]
        (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in rows))
        data = DataConfig(train=parse_sources(source))
        try:
            found = load_examples(data.valid, tiny_base().tokenizer, root=tmp_path, max_length=64)
            assert len(found.examples) == 1
        except DataError as error:
            assert "none of the rows that are held out can be used" in str(error)
            refused += 1
    assert 0 < refused < 6


def test_only_the_first_rows_are_read(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(9)) + "not JSON\n")
    content = {"train": [{"path": "t.jsonl", "limit": 4}]}
    from trimtab.data import read_source

    rows, dropped = read_source(parse_sources(content["train"])[0], tmp_path)
    assert [r.text for r in rows] == [f"row {i}" for i in range(4)] and not dropped


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ({"train": "a.jsonl", "split": 1.5}, "split = 1.5"),
        ({"train": "a.jsonl", "split": 0.1, "valid": "a-test.jsonl"}, "take one of them away"),
        ({"train": "a.jsonl", "test": {"path": "a-test.jsonl", "split": 0.1}}, "belongs to training sources"),
        ({"train": {"path": "a.jsonl", "limit": 0}}, "limit = 0"),
        ({"train": {"path": "a.jsonl", "held": 1}}, "unknown key 'held'"),
    ],
)
def test_wrong_parts_are_refused(tmp_path: Path, data: dict[str, Any], word: str) -> None:
    content = run_file(tmp_path, {"v": {"data": "a", **METHODS["lora"]}}) | {"data": {"a": data}}
    with pytest.raises(ConfigError) as e:
        RunConfig.from_dict(content, root=tmp_path)
    assert word in str(e.value)


def test_a_run_validates_on_what_it_holds_out(tmp_path: Path) -> None:
    content = run_file(tmp_path, {"v": {"data": "a", **METHODS["lora"], "eval_every": 5}}) | {
        "data": {"a": {"train": "a.jsonl", "split": 3}}
    }
    report = train(RunConfig.from_dict(content, root=tmp_path), base=tiny_base())
    assert [x["step"] for x in report.summary["variants"]["v"]["valid"]["history"]] == [5]
    assert report.summary["settings"]["data.a.valid"][0]["held_out"]
