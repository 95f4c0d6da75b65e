"""Text from files cannot act on the terminal: it is spelt out where it is said."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from click.testing import CliRunner

import trimtab.cli
from trimtab.cli import main
from trimtab.train.runfile import read_yaml

EXACT = {"__init__.py": 2, "terminal.py": 1, "import_config.py": 1, "adapters_list.py": 1, "completion.py": 1}
"""Files with calls of `click.echo` that print no JSON: those that `say` stands on, the run file itself, a shell's script, and brackets of
JSON."""


def test_commands_say_texts_and_echo_json_alone() -> None:
    for path in sorted(Path(trimtab.cli.__file__).parent.glob("*.py")):
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        raw = [c for c in calls if ast.unparse(c.func) in ("click.echo", "click.secho") and "json.dumps" not in ast.unparse(c)]
        assert len(raw) == EXACT.get(path.name, 0), [f"{path.name}:{c.lineno}" for c in raw]


@pytest.mark.parametrize("written", [False, True])
def test_settings_of_another_program_with_control_characters(tmp_path: Path, written: bool) -> None:
    settings = 'base_model: x\nadapter: lora\n"odd\\e[31mkey": 1\ndatasets: [{path: "a\\e[2J.jsonl", type: alpaca}]\n'
    (tmp_path / "axolotl.yaml").write_text(settings)
    out = tmp_path / "run.yaml"
    command = ["import-config", str(tmp_path / "axolotl.yaml"), *(["--out", str(out)] if written else [])]
    result = CliRunner().invoke(main, command, color=True)
    assert "odd\\x1b[31mkey" in result.stderr and "\x1b[31m" not in result.output + result.stderr
    text = out.read_text() if written else result.stdout
    assert "\x1b" not in text and "odd\\x1b[31mkey" in text
    if written:
        assert read_yaml(out, "run file")["base"] == "x"
