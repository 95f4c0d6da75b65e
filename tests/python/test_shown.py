"""What notebooks show: tables and progress, in a real kernel where there is one; and that no text of a row or an error acts on the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import trimtab
from tests.tiny import tiny_folder
from trimtab.tables import Table
from trimtab.train.score_table import fitting_measure, gain, measures_of, score_table

ROOT = Path(__file__).parent.parent.parent
EVIL = "<script>alert(1)</script>\x1b[31m"

CELL = """
import sys
sys.path[:0] = {paths!r}
import trimtab
rows = [{{"prompt": f"n {{i}}", "completion": f"a {{i % 3}}"}} for i in range(8)]
report = trimtab.train(
    base={base!r}, data={{"train": rows, "valid": rows[:2], "test": rows[:2]}}, variants={{"v": trimtab.LoraConfig(r=2)}},
    defaults={{"max_steps": 3}}, evaluate={{"max_new_tokens": 2}}, out={out!r},
)
"""
STOPPED = """
class Broken(trimtab.Callback):
    def on_step(self, line):
        raise ValueError("<b>mine</b>")
try:
    trimtab.train(base=report.base, data=rows, variants={{"v": trimtab.LoraConfig(r=2)}}, out={out!r}, callbacks=[Broken()])
except ValueError as error:
    print(error)
"""


def test_a_table_in_html_text_and_on_a_terminal() -> None:
    table = Table(EVIL, ["name", "%"], [[EVIL, ("1.0", "<b>2</b>")], ["[red]x", "–"]], frozenset(["name"]))
    page = table.html()
    assert "<script" not in page and "&lt;script&gt;" in page and "\x1b" not in page
    assert "1.0 → <b>&lt;b&gt;2&lt;/b&gt;</b>" in page
    assert "\x1b" not in str(table) and str(table).splitlines()[1].split() == ["name", "%"]
    assert [c.header for c in table.rich().columns] == ["name", "%"]


def summary(scores: dict[str, tuple[dict[str, float], dict[str, float]]], **more: Any) -> dict[str, Any]:
    """A run whose variants are named as their data sets; scores: the base's and the variant's."""
    one = {"method": "lora", "trainable": 1000, "adapter_bytes": 4_000_000}
    return {
        "base": "b",
        "base_parameters": 100_000,
        "base_bytes": 10**6,
        "seconds": 61.4,
        "base_scores": {n: before for n, (before, _) in scores.items()},
        "variants": {n: one | {"data": n, "scores": after} for n, (_, after) in scores.items()},
    } | more


def test_each_data_set_shows_the_measure_that_fits_it() -> None:
    both = {"exact_match": 0.0, "token_f1": 8.0}, {"exact_match": 0.0, "token_f1": 46.2}
    run = summary({"support": both, "legal": ({"exact_match": 0.0, "token_f1": 20.0}, {"exact_match": 97.5, "token_f1": 99.0})})
    run["measures"] = {"support": "token_f1", "legal": "exact_match"}
    table = score_table(run)
    assert table.headings[-2:] == ["exact match, %", "F1, %"]
    assert [list(row[-2:]) for row in table.rows] == [["–", ("8.0", "46.2")], [("0.0", "97.5"), "–"]]
    told = gain(run)
    assert told == (
        "On the test rows, F1 of support went from 8 to 46% and exact match of legal went from 0 to 98%; "
        "that took 61 s of training and 8.0 MB of adapters, 2% of the base's parameters."
    )
    run["variants"]["other"] = run["variants"]["support"] | {"scores": {"exact_match": 0.0, "token_f1": 8.3}}
    assert "F1 of support, the best of 2 on support, went from 8 to 46% and" in gain(run)
    run["variants"]["support"]["scores"] = {"token_f1": 7.0}
    assert "F1 of other, the best of 2 on support, stayed at 8% and" in gain(run)
    del run["measures"]  # a summary of an older run: both are shown
    assert measures_of(run, "support") == ["exact_match", "token_f1"]
    assert gain(summary({"v": ({}, {})})) == ""
    rewarded = summary({"v": ({"margin": 0.1}, {"margin": 0.5, "accuracy": 0.75})})
    assert measures_of(rewarded, "v") == ["accuracy", "margin"] and "margin of v went from 0.10 to 0.50;" in gain(rewarded)


def test_what_was_not_scored_has_no_columns() -> None:
    run = summary({"v": ({}, {}), "w": ({}, {})})
    assert score_table(run).headings == ["variant", "method", "trainable", "MB"]
    assert [list(row) for row in score_table(run).rows] == [[n, "lora", "1,000 (1%)", "4.0"] for n in "vw"]
    mixed = score_table(
        summary(
            {"v": ({"loss": 2.0, "exact_match": 0.0}, {"loss": 1.0, "exact_match": 50.0}), "w": ({}, {})}, measures={"v": "exact_match"}
        )
    )
    assert mixed.headings[4:] == ["loss", "exact match, %"]
    assert [list(row[4:]) for row in mixed.rows] == [[("2.00", "1.00"), ("0.0", "50.0")], ["–", "–"]]


def test_which_measure_fits_answers() -> None:
    free = ["Email the receipt number to Billing within 30 days of the charge.", "Upload a PNG under 1 MB in Settings, then save it there."]
    assert fitting_measure(free) == "token_f1"
    assert fitting_measure(["LIABILITY | risk: low", "WARRANTY | risk: high"]) == "exact_match"
    assert fitting_measure([json.dumps({"note": text, "n": 1}) for text in free]) == "exact_match"
    desks = {}
    for desk in ("support", "legal", "finance"):
        lines = (ROOT / "examples" / "desks" / desk / "test.jsonl").read_text(encoding="utf-8").splitlines()
        desks[desk] = fitting_measure([json.loads(line)["messages"][-1]["content"] for line in lines])
    assert desks == {"support": "token_f1", "legal": "exact_match", "finance": "exact_match"}


def test_results_show_themselves(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    rows = [{"prompt": f"n {i}", "completion": f"a {i % 3}"} for i in range(8)]
    given: dict[str, Any] = {
        "base": str(folder),
        "data": {"train": rows, "valid": rows[:2], "test": rows[:2]},
        "defaults": {"max_steps": 2},
    }
    report = trimtab.train(**given, variants={"v": trimtab.LoraConfig(r=2)}, evaluate={"max_new_tokens": 2}, out=tmp_path / "out")
    assert "<td" in report._repr_html_() and f"saved in {tmp_path}" in str(report)
    assert report.summary["measures"] == {"data": "exact_match"}
    found = trimtab.check(**given, variants={"v": trimtab.LoraConfig(r=2)}, out=tmp_path / "out")
    assert "is not empty" in str(found) and found._repr_html_().count("<table>") == 3
    swept = trimtab.sweep(**given, sweep={"variant": {"method": "lora"}, "search": {"r": [2, 3]}}, out=tmp_path / "sweep")
    assert swept._repr_html_().count("<tr>") == 3 and "ranked by loss" in str(swept)


@pytest.mark.slow
def test_a_notebook_shows_how_far_a_run_is_and_its_table(tmp_path: Path) -> None:
    """In a kernel of its own, as Jupyter runs it."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    folder = tiny_folder(tmp_path / "base")
    run = CELL.format(paths=[str(ROOT / "src"), str(ROOT)], base=str(folder), out=str(tmp_path / "out"))
    failing = STOPPED.format(out=str(tmp_path / "stopped"))
    cells = [nbformat.v4.new_code_cell(source) for source in (run + "\nreport", failing)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    progress, table = (o for o in notebook.cells[0].outputs if o.output_type in ("display_data", "execute_result"))
    assert "3/3" in progress["data"]["text/html"] and "<progress value='3' max='3'>" in progress["data"]["text/html"]
    assert "valid loss" in progress["data"]["text/html"] and "<div>finished</div>" in progress["data"]["text/html"]
    assert "<table>" in table["data"]["text/html"] and table["data"]["text/html"].count("<tr>") == 2
    assert "<b>mine</b>" in "".join(o.get("text", "") for o in notebook.cells[1].outputs)
    (stopped,) = (o for o in notebook.cells[1].outputs if o.output_type == "display_data")
    assert "<div>ended</div>" in stopped["data"]["text/html"]
