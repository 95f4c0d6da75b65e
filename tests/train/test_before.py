"""What run file and file system tell is said before the base is loaded, all at once, and nothing is written."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from tests.train.common import METHODS, run_file
from trimtab.cli import main
from trimtab.errors import ConfigError, DataError, TrimtabError
from trimtab.train import RunConfig, train
from trimtab.train.check import check
from trimtab.train.sweep import sweep
from trimtab.train.trials import Sweep

V = METHODS["lora"] | {"data": "a"}
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(autouse=True)
def no_base_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        pytest.fail("the base was loaded")

    for where in ("trimtab.train.before", "trimtab.train.sweep", "trimtab.model"):
        monkeypatch.setattr(import_module(where), "load_base", load)


def content(folder: Path, base: Path, variants: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    return run_file(folder, variants or {"v": V}, base=str(base), dtype="float32") | keys


def refused(folder: Path, what: dict[str, Any]) -> TrimtabError:
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(TrimtabError) as caught:
        train(RunConfig.from_dict(what, root=folder))
    assert sorted(p.name for p in folder.iterdir()) == before
    return caught.value


def test_one_mistake_is_its_own_error(tmp_path: Path, tiny_llama_folder: Path) -> None:
    what = content(tmp_path, tiny_llama_folder)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "wrong.jsonl").write_text('{"question": "x", "reply": "y"}\n')
    (tmp_path / "file").touch()
    for change, kind, words in (
        ({"data": {"a": {"train": "absent.jsonl"}}}, DataError, "data.a.train: absent.jsonl does not exist"),
        ({"data": {"a": {"train": "a.jsonl", "valid": "empty.jsonl"}}}, DataError, "data.a.valid: empty.jsonl is empty"),
        ({"data": {"a": {"train": "a.jsonl", "test": "wrong.jsonl"}}}, DataError, "found in its columns: question, reply"),
        ({"data": {"a": {"train": {"path": "a.jsonl", "columns": {"prompt": "q"}}}}}, DataError, "prompt: 'q' does not exist"),
        ({"out": "file"}, ConfigError, "is not a folder"),
        ({"out": "file/deeper/still"}, ConfigError, "file is not a folder"),
        ({"out": "a.jsonl"}, ConfigError, "is not a folder"),
        ({"base": "no such base"}, TrimtabError, "there is no base 'no such base'"),
        ({"base": "file.gguf"}, TrimtabError, "there is no GGUF file"),
        ({"base": str(tmp_path / "file")}, TrimtabError, "is a file, not a base"),
        ({"dtype": "bf16"}, ConfigError, "write bfloat16"),
        ({"device": "tpu"}, ConfigError, "tpu"),
    ):
        error = refused(tmp_path, what | change)
        assert isinstance(error, kind) and words in str(error), error


def test_all_at_once(tmp_path: Path, tiny_llama_folder: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    variants = {
        "v": V | {"target_modules": ["q_porj"]},
        "w": V | {"target_modules": "q_proj", "data": "b"},
        "x": {"data": "a", "method": "prompt", "num_virtual_tokens": 900},
    }
    what = content(tmp_path, tiny_llama_folder, variants, dtype="floa32")
    what["data"] = {
        "a": {"train": "absent.jsonl", "test": "gone.csv"},
        "b": {"train": "b.jsonl", "valid": "lost.md"},
        "c": {"train": "unused"},
    }
    said = str(refused(tmp_path, what))
    for words in (
        "is not empty",
        "dtype 'floa32'",
        "data.a.train: absent.jsonl does not exist",
        "data.a.test: gone.csv does not exist",
        "data.b.valid: lost.md does not exist",
        "variants.v: cannot attach",
        "did you mean 'q_proj'?",
        "variants.w: cannot attach",
        "write a list: [q_proj]",
        "variants.x",
    ):
        assert words in said, words
    assert "unused" not in said  # no variant reads it


def test_a_sweep_too(tmp_path: Path, tiny_llama_folder: Path) -> None:
    what = content(tmp_path, tiny_llama_folder)
    del what["variants"]
    what["data"] = {"a": {"train": "a.jsonl", "valid": "absent.jsonl"}}
    what["sweep"] = {"variant": {"data": "a", "method": "lora"}, "search": {"target_modules": ["q_proj", ["v_proj"]], "r": [2, 64]}}
    with pytest.raises(ConfigError) as caught:
        sweep(Sweep.from_dict(what | {"out": "a.jsonl"}, root=str(tmp_path)))
    said = str(caught.value)
    assert all(
        w in said for w in ("is not a folder", "data.a.valid: absent.jsonl does not exist", "write a list: [q_proj]", "rank 64 is above")
    )
    # a sweep whose `sweep` cannot be read says what is wrong with the rest as well
    what["sweep"] = {"variant": {"data": "a", "method": "lora"}, "search": {"r": 3}}
    with pytest.raises(ConfigError) as caught:
        Sweep.from_dict(what | {"sede": 3}, root=tmp_path)
    said = str(caught.value)
    assert all(w in said for w in ("sweep.search.r: expected a list", "sede: unknown key", "absent.jsonl does not exist"))


def test_on_resume_too(tmp_path: Path, tiny_llama_folder: Path) -> None:
    what = content(tmp_path, tiny_llama_folder)
    what["data"]["a"]["train"] = "absent.jsonl"
    with pytest.raises(DataError, match=r"absent\.jsonl does not exist"):
        train(RunConfig.from_dict(what, root=tmp_path), resume=True)


# ---- check ------------------------------------------------------------


def call(folder: Path, what: dict[str, Any], *options: str) -> Result:
    (folder / "run.yaml").write_text(yaml.safe_dump(what))
    return CliRunner().invoke(main, ["check", str(folder / "run.yaml"), *options])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("absent.jsonl", "absent.jsonl does not exist"),
        ("empty.jsonl", "empty.jsonl is empty"),
        ("blank.csv", "blank.csv is empty"),
        ("header.csv", "header.csv holds no rows"),
        ("wrong.jsonl", "no training form found in its columns: question"),
        ({"path": "a.jsonl", "columns": {"prompt": "q"}}, "no training form found"),
        ("folder", "folder holds no .md"),
        ("a.unknown", "the suffix '.unknown' does not say"),
    ],
)
@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_check_reports_a_source_that_cannot_be_read_with_all_else(
    tmp_path: Path, tiny_llama_folder: Path, source: Any, words: str, split: str
) -> None:
    what = content(tmp_path, tiny_llama_folder, {"v": V, "bad": V | {"data": "b", "target_modules": ["q_porj"]}})
    for name, text in (("empty.jsonl", ""), ("blank.csv", " \n"), ("header.csv", "prompt,completion\n"), ("a.unknown", "x")):
        (tmp_path / name).write_text(text)
    (tmp_path / "wrong.jsonl").write_text('{"question": "x"}\n')
    (tmp_path / "folder").mkdir()
    what["data"]["a"] |= {split: source, "labels": "auto" if split == "train" else None}
    what["data"]["b"]["test"] = "gone.jsonl"
    (tmp_path / "taken").touch()
    shown = call(tmp_path, what | {"out": "taken"}, "--json")
    assert (shown.exit_code == 2 and shown.exception is None) or isinstance(shown.exception, SystemExit), shown.exception
    errors = {(f["where"], f["message"]) for f in json.loads(shown.stdout)["findings"] if f["level"] == "error"}
    assert any(where == f"data.a.{split}" and words in message for where, message in errors), errors
    assert {where for where, _ in errors} >= {"data.b.test", "variants.bad", "out"}
    assert "no row is left" not in {m for w, m in errors if w == f"data.a.{split}"}  # that follows from the other


def test_check_without_a_base_says_what_else_is_wrong(tmp_path: Path) -> None:
    what = content(tmp_path, tmp_path / "nowhere")
    what["data"]["a"]["train"] = "absent.jsonl"
    shown = call(tmp_path, what | {"out": "a.jsonl"})
    assert shown.exit_code == 2
    assert all(w in shown.output for w in ("nowhere", "absent.jsonl does not exist", "is not a folder"))
    with pytest.raises(TrimtabError, match="there is no base"):
        check(content(tmp_path, "no such") | {"data": {"a": {"train": str(tmp_path / "a.jsonl")}}})


def test_a_hub_base_that_is_not_here_is_not_looked_up_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it exists is for loading to find out; what else is wrong is said before."""
    what = content(tmp_path, Path("org/name"))
    what["data"]["a"]["train"] = "absent.jsonl"
    assert isinstance(refused(tmp_path, what), DataError)
