"""The command line as a user meets it: help, exit codes, the fix in the message, JSON for machines."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import yaml
from click.testing import CliRunner, Result

from tests.train.common import METHODS, run_file
from trimtab import cli
from trimtab.cli import COMMANDS, main
from trimtab.store.staging import staged


def call(*arguments: str | Path, text: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], input=text)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """A run folder that `trimtab train` has made on the tiny base."""
    folder = tmp_path_factory.mktemp("run")
    content = run_file(folder, {n: METHODS[n] | {"data": "a", "max_steps": 2} for n in ("lora", "prompt")}) | {
        "base": str(tiny_llama_folder),
        "dtype": "float32",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    result = call("train", folder / "run.yaml", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["variants"]["lora"]["steps"] == 2
    return folder / "out"


def test_a_directory_that_is_gone_is_told_before_torch_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    result = call("plan", "smollm2-135m-instruct")
    assert result.exit_code == 2 and "the directory in which this runs is not there any more" in result.output
    assert "fix: cd into one that is." in result.output


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    result = call(name, "--help")
    assert result.exit_code == 0
    assert f"trimtab {name}" in result.output
    assert "Example" in result.output


@pytest.mark.parametrize("name", ["runs", "store", "tenants"])
def test_a_group_lists_its_commands_with_whole_sentences(name: str) -> None:
    listed = call(name, "--help").output.partition("\nCommands:\n")[2]
    described = re.findall(r"^  (\S+) +(\S.*(?:\n {3,}.*)*)", listed, re.MULTILINE)
    assert len(described) >= 4
    for command, text in described:
        sentence = " ".join(text.split())
        assert sentence.endswith(".") and not sentence.endswith("..."), sentence
        assert sentence in " ".join(call(name, command, "--help").output.split())


def test_a_mistake_exits_with_2_and_says_the_fix(tmp_path: Path) -> None:
    result = call("train", tmp_path / "absent.yaml")
    assert result.exit_code == 2
    assert "absent.yaml" in result.output
    (tmp_path / "run.yaml").write_text("bsae: x\n")
    result = call("train", tmp_path / "run.yaml")
    assert result.exit_code == 2
    assert "bsae: unknown key (did you mean 'base'?)" in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "runs").exists()


def test_an_unknown_base_is_a_mistake(tmp_path: Path) -> None:
    result = call("generate", "--base", tmp_path / "no-such-folder", "hello")
    assert result.exit_code == 2
    assert "no-such-folder" in result.output


def test_train_prints_the_table(tmp_path: Path, tiny_llama_folder: Path) -> None:
    content = run_file(tmp_path, {"v": METHODS["ia3"] | {"data": "a", "max_steps": 1}}) | {"base": str(tiny_llama_folder)}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    result = call("train", tmp_path / "run.yaml", "--out", tmp_path / "elsewhere")
    assert result.exit_code == 0, result.output
    assert "ia3" in result.output and "tokens/s" in result.output
    assert (tmp_path / "elsewhere" / "summary.json").is_file()
    again = call("train", tmp_path / "run.yaml", "--out", tmp_path / "elsewhere")
    assert again.exit_code == 2
    assert "not empty" in again.output


def test_generate_mixes_base_and_adapters(trained: Path, tiny_llama_folder: Path) -> None:
    adapters = [a for n in ("lora", "prompt") for a in ("--adapter", trained / "adapters" / n)]
    options = ["--base", tiny_llama_folder, "--max-new-tokens", "5", "--json"]
    together = call("generate", *options, "--adapter", "base", *adapters, "n 3")
    assert together.exit_code == 0, together.output
    rows = json.loads(together.stdout)
    assert [Path(r["adapter"]).name for r in rows] == ["base", "lora", "prompt"]
    alone = call("generate", *options, "--adapter", trained / "adapters" / "prompt", "n 3")
    assert json.loads(alone.stdout)[0]["text"] == rows[2]["text"]


def test_an_adapter_for_another_base_is_refused(trained: Path, tmp_path: Path) -> None:
    from tests.tiny import tiny_folder

    other = tiny_folder(tmp_path / "other", seed=5)
    result = call("generate", "--base", other, "--adapter", trained / "adapters" / "lora", "n 3")
    assert result.exit_code == 2
    assert "fingerprint" in result.output


def test_chat_streams_and_resets(trained: Path, tiny_llama_folder: Path) -> None:
    result = call(
        "chat", "--base", tiny_llama_folder, "--adapter", trained / "adapters" / "lora", "--max-new-tokens", "4", text="n 1\n/reset\nn 2\n"
    )
    assert result.exit_code == 0, result.output
    assert result.output.count("> ") >= 3


def test_merge_writes_a_model_and_prompts_refuse(trained: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    result = call("merge", trained / "adapters" / "lora", tmp_path / "merged", "--base", tiny_llama_folder, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "merged" / "config.json").is_file()
    assert "of the logits' standard deviation" in " ".join(result.output.split()) and "up to 0.01%" in result.output
    options = ["--base", tiny_llama_folder, "--dtype", "float32", "--json"]
    report = json.loads(call("merge", trained / "adapters" / "lora", tmp_path / "again", *options).stdout)
    assert report["folder"] == str(tmp_path / "again") and report["dtype"] == "float32" and report["untied"] is False
    assert 0 <= report["relative"] <= report["allowed"] == 1e-4 and 0 <= report["max_difference"] < 1e-3
    refused = call("merge", trained / "adapters" / "prompt", tmp_path / "not", "--base", tiny_llama_folder)
    assert refused.exit_code == 2
    assert not (tmp_path / "not").exists()


def test_doctor_speaks_json() -> None:
    result = call("doctor", "--json")
    assert {c["name"] for c in json.loads(result.stdout)} >= {"python", "torch", "device"}


EVIL = "a\x1b]0;owned\x07\x1b[2J\rb\x9b31m\u202eé 👩\u200d💻\u00a0ok"
SPELT = "a\\x1b]0;owned\\x07\\x1b[2J\\rb\\x9b31m\\u202eé 👩\u200d💻\u00a0ok"


@pytest.fixture
def says_evil(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base whose every answer tries to act on the terminal."""
    from trimtab.model import Base

    def evil(self: Base, sequences: list, adapters: object = None, sampling: object = None, on_token: object = None) -> list[list[int]]:
        ids = self.tokenizer.encode(EVIL, add_special_tokens=False)
        for token in ids if callable(on_token) else ():
            on_token(0, token)
        return [ids for _ in sequences]

    monkeypatch.setattr(Base, "generate_ids", evil)


def controls(text: str) -> set[str]:
    return {c for c in text if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 or 0x202A <= ord(c) <= 0x202E}


def test_answers_cannot_act_on_the_terminal(says_evil: None, tiny_llama_folder: Path) -> None:
    shown = call("generate", "--base", tiny_llama_folder, "Hi", f"Ho {EVIL}")
    assert shown.exit_code == 0 and SPELT in shown.output and f"base: Ho {SPELT}" in shown.output and not controls(shown.output)
    spoken = call("chat", "--base", tiny_llama_folder, text="Hi\n")
    assert spoken.exit_code == 0 and SPELT in spoken.output and not controls(spoken.output)
    exact = call("generate", "--base", tiny_llama_folder, "--json", "Hi")
    assert json.loads(exact.stdout)[0]["text"] == EVIL


def test_tables_lines_and_errors_cannot_act_on_the_terminal(tmp_path: Path, tiny_llama_folder: Path) -> None:
    from rich.table import Table

    from trimtab.cli import show
    from trimtab.errors import DataError

    console, table = show.console(), Table(title=EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL)
    with console.capture() as shown:
        console.print(table)
        console.print(EVIL, markup=False)
    assert not controls(shown.get()) and shown.get().count("owned") == 4
    assert SPELT in str(DataError("x", problems=[EVIL]))
    rows = tmp_path / "evil\x1b[31m.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n" + json.dumps({EVIL: 1}) + "\n")
    judged = call("eval", rows, "--base", tiny_llama_folder, "--no-generate")
    assert "evil\\x1b[31m" in judged.output and not controls(judged.output)


def test_an_answer_that_breaks_lines_with_two_characters(tiny_llama_folder: Path) -> None:
    from tests.tiny import tiny_tokenizer
    from trimtab.cli.chat import _Stream
    from trimtab.decode.text import Decoder

    with CliRunner().isolation() as (out, *_):
        stream = _Stream(Decoder(tiny_tokenizer()).stream())
        for token in tiny_tokenizer().encode("one\r\ntwo €\r", add_special_tokens=False):
            stream(0, token)
        stream.end()
        assert out.getvalue().decode() == "one\ntwo €\\r\n"


def test_sigterm_unwinds_what_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    @click.command()
    def merge() -> None:
        with staged(tmp_path / "merged") as work:
            (work / "half").write_text("written")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(merge=merge))
    before = signal.getsignal(signal.SIGTERM)
    ended = CliRunner().invoke(cli.main, ["merge"])
    assert ended.exit_code == 143 and list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_an_object_is_finalized_is_not_lost(
    number: signal.Signals, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Python goes on behind an error of `__del__`; what another error was is still said by the hook that was there."""

    class Closes:
        def __init__(self, close: Callable[[], None]):
            self.close = close

        def __del__(self) -> None:
            self.close()

    @click.command()
    def merge() -> None:
        with staged(tmp_path / "merged"):
            Closes(lambda: {}["key"])
            Closes(lambda: os.kill(os.getpid(), number))
            time.sleep(10)

    said: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", hook := lambda lost: said.append(lost.exc_type))
    monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(merge=merge))
    start = time.monotonic()
    ended = CliRunner().invoke(cli.main, ["merge"])
    assert ended.exit_code == code and list(tmp_path.iterdir()) == [] and time.monotonic() - start < 9
    assert said == [KeyError] and sys.unraisablehook is hook


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_that_is_lost_at_the_end_of_a_command_ends_the_command_and_nobody_else(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not come again when the command is over, in the program that has called it; lost several times, it comes once."""

    class Closes:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)

    @click.command()
    def merge() -> None:
        for _ in range(5):
            Closes()

    monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(merge=merge))
    later: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: later.append(number))
    try:
        ended = CliRunner().invoke(cli.main, ["merge"])
        time.sleep(2 * cli.LOST_S)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (ended.exit_code, later) == (code, [])
    assert "interrupted" in ended.output and "Aborted" not in ended.output
