"""`trimtab rows`: what is printed for a file, a run file and dropped rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from trimtab.cli import main

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def base(tmp_path: Path, tiny_llama_folder: Path) -> list[str]:
    rows = [{"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i} z"}]} for i in range(4)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    return ["--base", str(tiny_llama_folder)]


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, ["rows", *map(str, arguments)])


def test_rows_of_a_file(tmp_path: Path, base: list[str]):
    found = run(tmp_path / "a.jsonl", *base, "--start", "1", "--count", "2")
    assert found.exit_code == 0, found.output
    assert "data.a.train: rows 2 to 3 of 4" in found.stdout
    assert "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n⟦a1 z<|im_end|>⟧" in found.stdout
    assert "a.jsonl:3, 5 of" in found.stdout and "q0" not in found.stdout and "q3" not in found.stdout


def test_dropped_rows_and_json(tmp_path: Path, base: list[str]):
    found = run(tmp_path / "a.jsonl", *base, "--dropped")
    assert found.exit_code == 0 and "a.jsonl:5: not JSON" in found.stdout
    told = json.loads(run(tmp_path / "a.jsonl", *base, "--json", "--order", "longest", "--count", "1").stdout)
    assert (told["data"], told["split"], told["total"], len(told["rows"])) == ("a", "train", 4, 1)


def test_rows_of_a_run_file_and_what_is_not_there(tmp_path: Path, base: list[str]):
    content = {"base": base[1], "out": "o", "data": {"d": {"train": "a.jsonl"}}, "variants": {"v": {"method": "lora", "max_length": 20}}}
    (tmp_path / "run.yaml").write_text(json.dumps(content))
    found = run(tmp_path / "run.yaml")
    assert found.exit_code == 0 and "data.d.train: 0 rows" in found.stdout
    assert "4 of 5 rows cannot be trained on" in found.stderr or "5 of 5 rows cannot be trained on" in found.stderr
    for arguments, text in (
        ([tmp_path / "run.yaml", "--split", "valid"], "there are: data.d.train"),
        ([tmp_path / "absent.jsonl"], "does not exist"),
    ):
        found = run(*arguments)
        assert found.exit_code == 2 and text in found.stderr, found.stderr
