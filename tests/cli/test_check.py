"""`trimtab check` as a user meets it: exit codes, marks, bars, JSON, hostile text, the examples."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from tests.tiny import bundled_base
from tests.train.common import METHODS, run_file
from trimtab.cli import main
from trimtab.cli.check import MAX_RUN
from trimtab.errors import DataError, printable

EXAMPLES = Path(__file__).parents[2] / "examples"


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["check", *(str(a) for a in arguments)])


@pytest.fixture
def run_yaml(tmp_path: Path, tiny_llama_folder: Path) -> Path:
    """A run without fault, in a folder of its own: its test rows do not stand in train."""
    content = run_file(tmp_path, {"v": METHODS["lora"] | {"data": "a"}}) | {"base": str(tiny_llama_folder), "dtype": "float32"}
    content["data"] = {"a": {"train": "a.jsonl", "test": "b-test.jsonl"}}
    write(tmp_path / "b-test.jsonl", pair("never seen", "yes"))
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def pair(prompt: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def write(path: Path, *rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_good_run(run_yaml: Path) -> None:
    result = call(run_yaml)
    assert result.exit_code == 0, result.output
    assert "⟦a 0<|im_end|>⟧" in result.stdout and "⟦a 2" not in result.stdout
    assert "█" in result.stdout and "0 errors, 0 warnings" in result.stdout
    assert "trimtab: reading data.a.train" in result.stderr
    assert not (run_yaml.parent / "out").exists()
    more = call(run_yaml, "--rows", "3").stdout
    assert "⟦a 2<|im_end|>⟧" in more and "⟦" not in call(run_yaml, "--rows", "0").stdout


def test_memory_that_rounds_to_one_number_is_said_once(run_yaml: Path) -> None:
    least, most = json.loads(call(run_yaml, "--json").stdout)["estimate"]["memory_bytes"]
    assert f"{least / 1e9:.1f}" == f"{most / 1e9:.1f}", "the case is of two that round alike"
    assert f"memory: {least / 1e9:.1f} GB for forwards of" in call(run_yaml).stdout


def test_warnings_exit_with_0_and_strictly_with_2(run_yaml: Path) -> None:
    write(run_yaml.parent / "b-test.jsonl", pair("n 0 ", "a 0"))
    result = call(run_yaml)
    assert result.exit_code == 0
    assert "warning: data.a.test: 1 of 1 row stands with its answer in data.a.train\n  - b-test.jsonl:1: as a.jsonl:1\n" in result.stdout
    assert call(run_yaml, "--strict").exit_code == 2


def test_a_note_is_no_warning(run_yaml: Path) -> None:
    (run_yaml.parent / "out").mkdir()
    (run_yaml.parent / "out" / "x").touch()
    result = call(run_yaml, "--strict")
    assert result.exit_code == 0 and "note: out: " in result.stdout


def test_errors_exit_with_2_and_name_file_and_line(run_yaml: Path) -> None:
    write(run_yaml.parent / "a.jsonl", *({"messages": [{"role": "user", "content": f"q{i}"}]} for i in range(12)))
    result = call(run_yaml)
    assert result.exit_code == 2
    assert (
        "error: data.a.train: 12 rows dropped: nothing supervised\n  - a.jsonl:1: nothing supervised: the row has no assistant"
        in result.stdout
    )
    assert "  - and 2 more\n  fix: give each row an answer" in result.stdout
    assert "3 errors, 0 warnings" in result.stdout


def test_one_error_is_one_and_names_its_key_once(run_yaml: Path) -> None:
    rewarded = ("objective=grpo", "rewards={reward: 'gone.py:f', trusted: true}")
    result = call(run_yaml, *(part for pair in rewarded for part in ("--set", f"variants.v.{pair}")))
    assert result.exit_code == 2
    assert result.stdout.count("variants.v.rewards") == 1 and "gone.py is not there" in result.stdout
    assert "\n1 error, 0 warnings; " in result.stdout


def test_a_run_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("bsae: x\n")
    result = call(tmp_path / "run.yaml")
    assert result.exit_code == 2 and "bsae: unknown key (did you mean 'base'?)" in result.stderr


def test_json(run_yaml: Path) -> None:
    good = json.loads(call(run_yaml, "--json").stdout)
    assert good["ok"] and good["findings"] == [] and good["variants"][0]["steps"] == 5
    assert good["splits"][0]["sources"][0]["path"] == "a.jsonl" and good["rendered"][0]["runs"][1] == ["a 0<|im_end|>", True]
    write(run_yaml.parent / "a.jsonl", {"messages": [{"role": "user", "content": "q"}]})
    result = call(run_yaml, "--json")
    bad = json.loads(result.stdout)
    assert result.exit_code == 2 and result.stderr == ""
    assert not bad["ok"] and bad["findings"][0]["level"] == "error" and bad["estimate"] is None


def test_rows_cannot_write_on_the_terminal(run_yaml: Path) -> None:
    write(run_yaml.parent / "a.jsonl", pair("\x9b2Jq [red]x[/]", "a"), {"\x1b[31mcolumn": 1}, *(pair(f"q{i}", "a") for i in range(9)))
    result = call(run_yaml)
    assert result.exit_code == 0 and "\x1b" not in result.stdout and "\x9b" not in result.stdout
    assert "\\x9b2Jq [red]x[/]" in result.stdout and "no known form: the columns are \\x1b[31mcolumn" in result.stdout
    assert printable("a\tb\nc\u202e\x07") == "a\tb\nc\\u202e\\x07"
    assert str(DataError("a\x1b[2J", problems=["b\x07"], fix="c\nd")) == "a\\x1b[2J\n  - b\\x07\nfix: c\nd"


def test_long_rows_are_cut_in_the_middle(run_yaml: Path) -> None:
    content = yaml.safe_load(run_yaml.read_text())
    content["defaults"]["max_length"] = 1024
    content["data"]["a"]["train"] = "long.txt"
    run_yaml.write_text(yaml.safe_dump(content))
    (run_yaml.parent / "long.txt").write_text("begin " + "x" * 300 + "é" * 10 + "y" * 160 + " end")
    assert "[…]" not in call(run_yaml).stdout
    (run_yaml.parent / "long.txt").write_text("begin " + "x" * 800 + " end")
    shown = call(run_yaml).stdout
    assert "⟦egin " in shown and " […] " in shown and "x end<|im_end|>⟧" in shown and "x" * MAX_RUN not in shown


@pytest.mark.slow
def test_colours_on_a_terminal(run_yaml: Path) -> None:
    """A real terminal: no marks, the supervised run in a background colour."""
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"}
    environment.pop("NO_COLOR", None)
    command = [sys.executable, "-m", "trimtab", "check", str(run_yaml), "--rows", "1"]
    with subprocess.Popen(command, stdout=slave, stderr=subprocess.DEVNULL, env=environment) as process:
        os.close(slave)
        shown = b""
        while True:
            try:
                chunk = os.read(master, 4096)
            except OSError:
                break
            if not chunk:
                break
            shown += chunk
    os.close(master)
    assert process.returncode == 0
    text = shown.decode()
    assert "⟦" not in text and "\x1b[30;42ma 0<|im_end|>\x1b[0m" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["desks", "halyard"])
def test_the_examples_are_without_fault(name: str) -> None:
    bundled_base()
    result = call(EXAMPLES / f"{name}.yaml", "--strict", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0, report["findings"]
    assert all(s["dropped"] == 0 and s["read"] for split in report["splits"] for s in split["sources"])
    if name == "halyard":
        first = report["splits"][0]["sources"][0]
        assert (first["path"], first["read"]) == ("halyard/tickets.csv", 68)
        assert report["splits"][1]["sources"][0]["read"] == 12
