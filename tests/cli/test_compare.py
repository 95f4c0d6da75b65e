"""`trimtab compare`, and the progress that a run shows."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from tests.train.past import run_folder, variant
from trimtab.cli import main, show
from trimtab.train.ahead import Ahead, validations


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


def scored(exact: float, loss: float = 0.5, **keys: object) -> dict:
    return variant(scores=variant()["scores"] | {"exact_match": exact, "loss": loss}, **keys)


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    first = run_folder(
        tmp_path / "first", {"x": scored(20, 0.1, seconds=9.0), "y": scored(80, 0.9, fields=variant()["fields"] | {"r": 8}, seconds=1.0)}
    )
    return [first, run_folder(tmp_path / "second", {"x": scored(50, 0.4, lr=5e-4, seconds=3.0)}, peak_memory_gb=1.25)]


def order(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    return [f"{v['run']}/{v['variant']}" for v in json.loads(result.stdout)["variants"]]


def test_the_table(two: list[Path]) -> None:
    result = call(*two)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [line.split()[0] for line in lines if "first/" in line or "second/" in line] == ["first/y", "second/x", "first/x"]
    assert "by exact match" in lines[0]
    (row,) = [line for line in lines if "second/x" in line]
    assert all(word in row for word in ("lora", "1,000", "50.0", "0.400", "1.25", "r=4 lr=0.0005"))
    assert "rank_pattern" not in result.output  # nothing differs there
    assert "note" not in result.output


def test_the_base_stands_last_with_its_own_scores(two: list[Path]) -> None:
    assert next(line for line in reversed(call(*two).output.splitlines()) if line.strip()).split()[:4] == ["base", "–", "3.000", "10.0"]
    file = two[0] / "summary.json"
    summary = json.loads(file.read_text())
    summary["base_scores"]["a"]["exact_match"] = 7.0
    file.write_text(json.dumps(summary))
    rows = {line.split()[0]: line for line in call(*two).output.splitlines() if "/base" in line}
    assert list(rows) == ["first/base", "second/base"]
    assert " 7.0 " in rows["first/base"] and " 7.0 " not in rows["second/base"]


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("exact_match", ["first/y", "second/x", "first/x"]),
        ("loss", ["first/x", "second/x", "first/y"]),
        ("seconds", ["first/y", "second/x", "first/x"]),
    ],
)
def test_sorted_best_first(two: list[Path], by: str, expected: list[str]) -> None:
    assert order(call(*two, "--by", by, "--json")) == expected


def test_metrics_of_an_objective_are_not_what_is_sorted_by(tmp_path: Path) -> None:
    """Nobody says which way is better, and data sets of other objectives have none."""
    scores = {"loss": 0.5, "reward": 3.1416}
    entries = {"x": variant(scores=scores, losses={"first": 4.0, "last": 0.9}), "y": variant("b", scores={"loss": 0.5, "perplexity": 1.6})}
    result = call(run_folder(tmp_path / "r", entries))
    assert "a, by train loss" in result.output and "b, by train loss" in result.output and "3.142" in result.output
    entries["y"]["scores"] = {"loss": 0.5, "exact_match": 50.0}
    assert "a, by exact match" in call(run_folder(tmp_path / "s", entries)).output


def test_sorted_by_what_fits_the_answers(tmp_path: Path) -> None:
    scores = [{"loss": 0.5, "exact_match": 0.0, "token_f1": f1} for f1 in (30.0, 40.0)]
    folder = run_folder(tmp_path / "r", {"x": variant(scores=scores[0]), "y": variant(scores=scores[1])})
    assert "a, by exact match" in call(folder).output
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"measures": {"a": "token_f1"}}))
    assert order(call(folder, "--json")) == ["r/y", "r/x"] and "a, by F1" in call(folder).output


def test_an_unknown_score_lists_what_there_is(two: list[Path]) -> None:
    result = call(*two, "--by", "exact_mach")
    assert result.exit_code == 2
    assert "did you mean 'exact_match'?" in result.output and "token_f1" in result.output


def test_folders_that_are_no_runs_are_all_named(two: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    result = call(two[0], tmp_path / "absent", tmp_path / "file", tmp_path / "empty")
    assert result.exit_code == 2
    for words in ("absent: there is no such folder", "file: a file", "empty: neither summary.json nor metrics.jsonl"):
        assert words in result.output


def test_an_unfinished_run_shows_what_it_has(two: list[Path], tmp_path: Path) -> None:
    going = run_folder(tmp_path / "going", {"z": variant()}, steps=40, summary=False)
    result = call(*two, going, "--json")
    content = json.loads(result.stdout)
    (z,) = [v for v in content["variants"] if v["run"] == "going"]
    assert content["variants"][-1] == z  # without a score it stands last
    assert (z["finished"], z["fields"]["steps"], z["tokens_per_s"], z["scores"]) == (False, 40, 50.0, {})
    assert any("going has not finished" in note for note in content["notes"])
    assert "(not finished)" in call(*two, going).output


def test_runs_that_do_not_compare_are_said_so(two: list[Path], tmp_path: Path) -> None:
    other = run_folder(tmp_path / "other", {"x": variant()}, base_fingerprint={"before": "sha256:zz", "after": "sha256:zz"})
    output = " ".join(call(*two, other).output.split())
    assert "note: the runs stand on different bases" in output and "sha256:zz: other" in output


def test_equal_names_are_told_apart(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / n / "out", {"v": variant()}) for n in "ab"]
    names = {v["run"] for v in json.loads(call(*folders, folders[0], "--json").stdout)["variants"]}
    assert names == {str(f) for f in folders}


def test_the_page_of_several_runs(two: list[Path], tmp_path: Path) -> None:
    result = call(*two, "--html", tmp_path / "c.html")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert all(f'"name":"{name}"' in text for name in ("first", "second", "x", "y"))
    for target in (tmp_path / "not" / "there.html", tmp_path / "c.html" / "x.html"):
        result = call(*two, "--html", target)
        assert result.exit_code == 2 and f"error: {target} cannot be written: No" in result.output.replace("\n", ""), result.output
    os.mkfifo(tmp_path / "pipe")
    for target, why in ((tmp_path / "pipe", "It is no regular file"), ("", "Is a directory")):
        result = call(*two, "--html", target)
        assert result.exit_code == 2 and f"cannot be written: {why}" in result.output.replace("\n", ""), result.output
    assert (tmp_path / "pipe").is_fifo()


def line(name: str, step: int, tokens: int, **keys: object) -> dict:
    return {"variant": name, "step": step, "loss": 1.5, "tokens": tokens, "tokens_per_s": 100.0, **keys}


def test_time_to_go_by_hand() -> None:
    """a: 10 steps of 100 tokens at 100 tokens/s; b: 100 steps of 300."""
    pace = show.Pace({"a": 10, "b": 100})
    pace.step(line("a", 1, 100))
    assert pace.left == ""  # nobody knows yet what b costs
    pace.step(line("b", 1, 300))
    assert pace.left == show.clock(9 * 1 + 99 * 3)
    pace.end("b")
    assert pace.left == "9 s" and not pace.over
    pace.step(line("a", 10, 100))
    assert pace.over and pace.left == "0 s"
    assert [show.clock(s) for s in (0, 59.6, 61, 3723)] == ["0 s", "1 min 0 s", "1 min 1 s", "1 h 2 min"]


def test_steps_that_learn_nothing_take_their_seconds() -> None:
    """All answers drawn have the same reward: no token enters a forward."""
    pace = show.Pace({"a": 3, "b": 3})
    for name in "ab":
        pace.step(line(name, 1, 0, seconds=4.0) | {"tokens_per_s": 0.0})
    assert pace.left == show.clock(2 * 4)


def test_validation_and_scores_count_as_time_to_go() -> None:
    """a: 10 steps of 100 tokens at 100 tokens/s, validated after 4, 8 and 10; what judging costs is told from the first validation."""
    ahead = Ahead(every={"a": 4}, valid={"a": 200.0}, first=100.0, scoring=1000.0)
    pace = show.Pace({"a": 10, "b": 10}, ahead)
    pace.step(line("a", 1, 100))
    pace.step(line("b", 1, 100))
    forwards = (3 * 200 + 100 + 1000) / 100 / 3  # a forward is taken for a third of a step
    assert pace.left == show.clock(2 * 9 + forwards)
    pace.step(line("a", 4, 100))
    pace.step(line("b", 4, 100))
    pace.valid({"variant": "a", "step": 4, "seconds": 60.0})  # 300 of work: 0.2 s each
    assert pace.left == show.clock(2 * 6 + 0.2 * (2 * 200 + 1000))
    pace.step(line("a", 8, 100))
    pace.valid({"variant": "a", "step": 8, "seconds": 40.0})
    assert pace.left == show.clock(2 + 6 + 0.2 * (200 + 1000))
    pace.end("a")
    assert pace.left == show.clock(6 + 0.2 * 1000)


def test_validations_that_share_a_pass_share_its_time() -> None:
    pace = show.Pace({"a": 2, "b": 2}, Ahead({"a": 1, "b": 1}, {"a": 10.0, "b": 30.0}, 0.0, 0.0))
    for name in "ab":
        pace.step(line(name, 1, 100))
    for name in "ab":
        pace.valid({"variant": name, "step": 1, "seconds": 20.0})
    assert pace.left == show.clock(2 + 20)


@pytest.mark.parametrize(
    ("done", "total", "every", "left"), [(0, 10, 4, 3), (4, 10, 4, 2), (8, 10, 4, 1), (10, 10, 4, 0), (0, 8, 4, 2), (3, 8, 4, 2)]
)
def test_validations_to_go(done: int, total: int, every: int, left: int) -> None:
    due = [s for s in range(done + 1, total + 1) if s % every == 0 or s == total]
    assert Ahead({"a": every}, {}, 0.0, 0.0).to_go("a", done, total) == left == len(due)
    assert Ahead({}, {}, 0.0, 0.0).to_go("a", done, total) == 0
    assert validations(total, every) == len([s for s in range(1, total + 1) if s % every == 0 or s == total])


def test_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show, "PLAIN_EVERY_S", 0.0)
    lines = show.Lines()
    lines.begin({"a": 2, "b": 4})
    for step in (1, 2):
        lines.step(line("a", step, 100))
        lines.step(line("b", step, 100))
    lines.stopped("b", "step 3: nan")
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "training a (2 steps), b (4 steps)"
    assert said[-2] == "step 2/4  100 tokens/s  about 2 s to go  loss: a 1.500  b 1.500"
    assert said[-1] == "warning: b has stopped: step 3: nan"
    assert lines.pace.over


def test_json_mode_is_silent_but_for_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    lines = show.Lines(quiet=True)
    lines.status("loading")
    lines.begin({"a": 1})
    lines.step(line("a", 1, 10))
    assert capsys.readouterr() == ("", "")
    lines.warning("the disk is full")
    assert capsys.readouterr().err == "warning: the disk is full\n"


def test_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a terminal of 80 columns shows them, names with brackets included."""
    bars = show.Bars()
    screen = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    bars.begin({"a": 2, "b[bold]": 4})
    for step in (1, 2):
        bars.step(line("a", step, 100))
        bars.step(line("b[bold]", step, 100))
    bars.stopped("b[bold]", "nan")
    bars.status("scoring [x]")
    screen.print(bars.progress.get_renderable())
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    for words in ("a ", "2/2", "b[bold]", "stopped", "all ", "2/4 ", "100 tokens/s  about 2 s to go", "scoring [x]"):
        assert words in shown
    assert all(len(row) <= 80 for row in shown.splitlines())
