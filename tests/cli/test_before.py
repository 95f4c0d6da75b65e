"""What commands can know without a base is said before one is loaded, all at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import trimtab.model
from trimtab.cli import main


@pytest.fixture(autouse=True)
def no_base_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trimtab.model, "load_base", lambda *_, **__: pytest.fail("the base was loaded"))


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "file").write_text("x")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "a", "adapter": str(tmp_path / "gone")}) + "\n")
    for variant in ("a", "b"):
        (tmp_path / "run" / "adapters" / variant).mkdir(parents=True)
        (tmp_path / "run" / "adapters" / variant / "adapter_config.json").write_text("{}")
    (tmp_path / "wrong.jsonl").write_text('{"question": "a"}\n')
    return tmp_path


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["serve", "--local", "--port", "0", "--store", "gone"], ["gone"]),
        (["serve", "--local", "--port", "0", "--store", "empty"], ["empty"]),
        (
            ["serve", "--local", "--port", "0", "--adapter", "a=gone", "--adapter", "b=empty", "--dtype", "bf16"],
            ["gone'", "adapter_config.json", "bfloat16"],
        ),
        (["serve", "--tenants", "gone.db", "--port", "0"], ["gone.db"]),
        (["generate", "--adapter", "gone", "--adapter", "base", "--adapter", "empty", "hi"], ["gone'", "adapter_config.json"]),
        (["generate", "--adapter", "acme/support@2", "--store", "gone", "hi"], ["acme/support@2", "no such folder"]),
        (["generate", "--adapter", "gone+0.5*base", "hi"], ["gone'", "'base' is the base itself"]),
        (["generate", "--file", "gone.jsonl", "--out", "x"], ["gone.jsonl"]),
        (["generate", "--adapter", "run", "hi"], ["'run'", "holds adapters", "run/adapters/a, ", "run/adapters/b"]),
        (["adapters", "publish", "run", "acme/a", "--store", "new"], ["'run'", "holds adapters", "run/adapters/a, "]),
        (["merge", "run/adapters", "new"], ["'run/adapters'", "holds adapters", "run/adapters/a, "]),
        (["score", "--adapter", "base", "hi"], ["'base' is the base itself"]),
        (["generate", "--file", "prompts.jsonl", "--out", "gone/x"], ["adapter '", "gone'", "--out", "cannot be written"]),
        (["generate", "--file", "prompts.jsonl", "--out", "full"], ["--out", "cannot be written"]),
        (["chat", "--adapter", "gone"], ["gone'"]),
        (["eval", "gone.jsonl", "--adapter", "gone", "--out", "full"], ["gone.jsonl does not exist", "gone'", "'full' is not empty"]),
        (["eval", "wrong.jsonl", "--out", "file"], ["no training form found in its columns: question", "'file' is not a folder"]),
        (["eval", "wrong.jsonl", "--labels", "a"], ["--labels"]),
        (["merge", "gone", "full"], ["gone'", "already holds mine"]),
        (["merge", "gone", "file/deeper"], ["gone'", "file is a file"]),
        (["export", "gone", "file", "--format", "vlm"], ["gone'", "is a file", "did you mean 'vllm'?"]),
        (["generate", "--base", "no such", "--adapter", "gone", "hi"], ["there is no base 'no such'", "gone'"]),
    ],
)
def test_all_of_it_at_once(place: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], words: list[str]) -> None:
    monkeypatch.chdir(place)
    before = sorted(p.name for p in place.rglob("*"))
    shown = call(*command)
    assert shown.exit_code == 2, shown.output
    assert all(word in shown.output for word in words), shown.output
    assert "Traceback" not in shown.output
    assert sorted(p.name for p in place.rglob("*")) == before


def test_a_run_file_after_serve_is_no_port() -> None:
    shown = call("train", "--serve", "run.yaml")
    assert shown.exit_code == 2 and "trimtab train run.yaml --serve" in shown.output


@pytest.mark.parametrize(
    ("command", "word"),
    [
        (["generat"], "did you mean 'generate'?"),
        (["adapters", "publsh"], "did you mean 'publish'?"),
        (["adapters", "xyzzy"], "No such command 'xyzzy'."),
        (["sweep", "gone.yaml"], "examples/sweep.yaml"),
        (["train", "gone.yaml"], "`trimtab init` writes a first one"),
    ],
)
def test_what_there_is_not_is_told_with_what_there_is(command: list[str], word: str) -> None:
    shown = call(*command)
    assert shown.exit_code == 2 and word in shown.output, shown.output


def test_an_interrupt_exits_as_the_signal_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trimtab.model, "load_base", interrupt)
    shown = call("generate", "hi")
    assert shown.exit_code == 130 and "interrupted" in shown.output
