"""`trimtab sweep`: the table, the JSON, an interrupted one, and mistakes."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from tests.train.test_sweep import FOUR, content
from trimtab.cli import main
from trimtab.train.variant import Variant


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["sweep", *map(str, arguments)])


def sweep_file(folder: Path, base: Path, **keys: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content(folder, FOUR) | {"base": str(base), "dtype": "float32"} | keys, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> tuple[Path, Result]:
    """A sweep file, and what the command printed of it."""
    path = sweep_file(tmp_path_factory.mktemp("sweep"), tiny_llama_folder)
    return path, call(path)


def test_the_table_names_every_trial_best_first(swept: tuple[Path, Result]) -> None:
    path, result = swept
    assert result.exit_code == 0, result.output
    board = json.loads((path.parent / "out" / "leaderboard.json").read_text(encoding="utf-8"))
    rows = [line.split() for line in result.stdout.splitlines() if line.split()[:1] and line.split()[0].isdigit()]
    assert [r[1] for r in rows] == [t["trial"] for t in board["trials"]]
    for row, t in zip(rows, board["trials"], strict=True):
        figures = (f"{t['values']['lr']:g}", f"{t['valid']:.4g}", str(t["step"]), str(t["steps"]))
        assert row[2:] == [*figures, f"{t['seconds']:.0f}", f"{t['parameters']:,}", t["state"]]
    for words in (
        "ranked by loss of the valid rows alone",
        f"best: {board['best']['trial']}, saved in {path.parent / 'out' / 'group-1' / 'adapters'}",
        "on the test rows, which played no part in the choice: loss",
        "the run file that trains it alone",
        "leaderboard.json, report.html, group-1/",
    ):
        assert words in result.stdout, words
    assert board["best"]["run_file"] in result.stdout, "printed as it is, to be copied"
    assert "group 1 of 1, 4 trials, about" in result.stderr


def test_its_run_file_trains(swept: tuple[Path, Result]) -> None:
    path, result = swept
    text = result.stdout.partition("to stand beside this one:\n\n")[2].partition("\nsaved in")[0]
    (path.parent / "winner.yaml").write_text(text)
    again = CliRunner().invoke(main, ["train", str(path.parent / "winner.yaml"), "--json"])
    assert again.exit_code == 0, again.output
    (name,) = json.loads(again.stdout)["variants"]
    assert name in text and (path.parent / f"out-{name}" / "adapters" / name).is_dir()


def test_json_and_resume_of_a_finished_sweep(swept: tuple[Path, Result]) -> None:
    path, _ = swept
    result = call(path, "--resume", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((path.parent / "out" / "leaderboard.json").read_text(encoding="utf-8"))
    again = call(path)
    assert again.exit_code == 2 and "is not empty" in again.output and "--resume" in again.output


def test_an_interrupted_sweep_says_how_to_go_on(tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, original = sweep_file(tmp_path, tiny_llama_folder), Variant.step

    def interrupted(self: Variant, *rest: Any) -> dict[str, float]:
        if self.progress.step == 3 and self.name == "lr0.01":  # a second signal would end the process, as it should
            signal.raise_signal(signal.SIGTERM)
        return original(self, *rest)

    monkeypatch.setattr(Variant, "step", interrupted)
    elsewhere = tmp_path / "else where"
    result = call(path, "--out", elsewhere)
    assert result.exit_code == 143, result.output
    assert f"go on with: trimtab sweep {path} --out '{elsewhere}' --resume" in result.stderr
    assert not (tmp_path / "out").exists() and not (elsewhere / "leaderboard.json").exists()
    monkeypatch.undo()
    resumed = call(path, "--out", elsewhere, "--resume", "--json")
    assert resumed.exit_code == 0, resumed.output
    board = json.loads(resumed.stdout)
    assert [t["steps"] for t in board["trials"]] == [6, 4, 2, 2]
    assert yaml.safe_load(board["best"]["run_file"])["out"] == f"{elsewhere}-{board['best']['trial']}"


def test_mistakes_exit_with_2_and_are_all_listed(tmp_path: Path, tiny_llama_folder: Path) -> None:
    bad = FOUR | {"search": {"lrr": [1.0], "r": 3}, "metric": "los"}
    result = call(sweep_file(tmp_path, tiny_llama_folder, sweep=bad))
    assert result.exit_code == 2 and "sweep.metric" in result.output
    bad["metric"] = "loss"
    result = call(sweep_file(tmp_path, tiny_llama_folder, sweep=bad))
    assert result.exit_code == 2
    for words in ("sweep.search.lrr: unknown key (did you mean 'lr'?)", "sweep.search.r: expected a list of values, found 3"):
        assert words in result.output, words
    assert not (tmp_path / "out").exists()


def test_the_example_can_be_read() -> None:
    from trimtab.train.trials import Sweep

    what = Sweep.load(Path(__file__).parents[2] / "examples" / "sweep.yaml")
    assert [t.name for t in what.trials] == [f"lr{lr}-r{r}" for lr in ("0.0003", "0.001", "0.003") for r in (8, 16)]
    assert what.options.halving is not None and what.options.memory_gb == 8
