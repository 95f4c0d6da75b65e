"""report.html in a real browser: it asks for nothing, shows what the run left at every width, and markup in data stays text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.train.past import predictions, run_folder, variant
from tests.web.common import EVIL, Visit, refuse_overflow, serving
from trimtab.http.studio import create_studio
from trimtab.http.studio_auth import Shown
from trimtab.train.follow import RunFolders
from trimtab.train.page import write_page

pytestmark = pytest.mark.slow

ASKED = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQuestion {}<|im_end|>\n<|im_start|>assistant\n"


def report(tmp_path: Path, *folders: Path) -> str:
    write_page(folders, tmp_path / "report.html")
    return f"file://{tmp_path}/"


def line(reference: str, answer: str, n: int = 0) -> dict[str, Any]:
    return {"prompt": ASKED.format(n), "reference": reference, "answer": answer, "correct": answer == reference}


def labelled(folder: Path, labels: int, variants: int = 2) -> Path:
    """A run whose answers are labels: `w` mistakes label 0 for 1 twice, and says for label 2 once what is no label."""
    more = {"perplexity": 1051.5, "rouge_l": 63.12, "bleu": 57.82, "label_accuracy": 75.0}
    scores = [variant()["scores"] | more | {"exact_match": 50.0 + i} for i in range(variants)]
    made = run_folder(folder, {n: variant(trainable=10**i, scores=s) for n, i, s in zip("vwxyz", range(variants), scores, strict=False)})
    names = [f"label-{i:02}" for i in range(labels)] * 3
    mistakes = {0: names[1], labels: names[1], 2: "who knows"}
    predictions(
        made,
        "a",
        base=[line(name, name, n) for n, name in enumerate(names)],
        w=[line(name, mistakes.get(n, name), n) for n, name in enumerate(names)],
    )
    return made


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (1280, "light"), (1024, "dark"), (390, "light")])
def test_a_report_at_every_width(chromium: Any, tmp_path: Path, width: int, scheme: str):
    url = report(tmp_path, labelled(tmp_path / "r", 4))
    with Visit(chromium, url, "report.html", width=width, scheme=scheme) as page:
        page.get_by_role("heading", name="Scores and costs").wait_for()
        refuse_overflow(page)
        table = page.get_by_role("region", name="Scores on a")
        if width >= 1280:
            for one in (table, page.get_by_role("region", name="Costs on a")):
                assert one.evaluate("e => e.scrollWidth - e.clientWidth") <= 0, "all scores and costs are in sight"
        assert "51.0" in table.get_by_role("row", name=re.compile("^w ")).inner_text()
        assert page.get_by_role("img", name="exact match, % over trainable parameters").count() == 1
        page.get_by_role("article").first.wait_for()
        first = page.get_by_role("article").first
        assert first.locator(".who").all_inner_texts() == ["system", "user"] and "im_start" not in first.inner_text()
        assert "✗ differs" in first.inner_text(), "wrong ones come first"
        page.get_by_label("Answers of").select_option("w")
        page.get_by_text("Wrong: w 3.").wait_for()


def test_nothing_is_weighed_or_best_where_there_is_no_choice(chromium: Any, tmp_path: Path):
    """One variant alone; and two that have the same score, or cost the same."""
    alone = run_folder(tmp_path / "one", {"v": variant()})
    same = run_folder(tmp_path / "same", {"v": variant(trainable=10), "w": variant(trainable=20)})
    for folder in (alone, same):
        with Visit(chromium, report(tmp_path, folder), "report.html") as page:
            page.get_by_role("region", name="Scores on a").wait_for()
            assert page.locator("td.best").count() == 0 or folder != alone
            assert page.get_by_role("heading", name="What a score costs").count() == 0


def test_losses_of_several_objectives_are_not_weighed(chromium: Any, tmp_path: Path):
    """Nor is one of them the best."""
    for kinds, best in ((("sft", "dpo"), 0), (("dpo", "dpo"), 1)):
        losses = [{"loss": 1.0, "rows": 3}, {"loss": 2.0, "rows": 3}]
        entries = {f"v{i}": variant(trainable=i + 1, scores=s, fields={"objective": kinds[i]}) for i, s in enumerate(losses)}
        with Visit(chromium, report(tmp_path, run_folder(tmp_path / kinds[0], entries)), "report.html") as page:
            page.get_by_role("region", name="Scores on a").wait_for()
            assert page.locator("td.best").count() == best
            assert page.get_by_role("heading", name="What a score costs").count() == best


def test_the_last_value_of_a_short_run_is_told(chromium: Any, tmp_path: Path):
    run = run_folder(tmp_path / "r", {"v": variant()}, steps=0)
    losses = [4.0, 2.0, 1.0, 0.25]
    (run / "metrics.jsonl").write_text("".join(f'{{"variant": "v", "step": {n + 1}, "loss": {x}}}\n' for n, x in enumerate(losses)))
    with Visit(chromium, report(tmp_path, run), "report.html") as page:
        chart = page.get_by_role("application", name="Loss, nats a target")
        assert "v ends at 0.25." in chart.get_attribute("aria-label")
        page.wait_for_function("document.querySelector('canvas')")
        chart.focus()
        page.keyboard.press("End")
        assert "0.25" in page.locator(".tip").inner_text() and "step 4" in page.locator(".tip").inner_text()
        page.get_by_label("Smoothing").fill("0.9")
        assert "v ends at 0.25." in chart.get_attribute("aria-label")


def test_twelve_variants_are_told_apart(chromium: Any, tmp_path: Path):
    """By colour, or where colours come again by dash."""
    run = run_folder(tmp_path / "r", {f"v{i}": variant(trainable=i + 1, scores={"loss": 1 + i, "rows": 3}) for i in range(12)})
    with Visit(chromium, report(tmp_path, run), "report.html") as page:
        lines = page.locator(".legend .swatch line")
        page.locator(".legend button").nth(11).wait_for()
        looks = lines.evaluate_all("all => all.map((e) => e.getAttribute('stroke') + ' ' + e.getAttribute('stroke-dasharray'))")
        assert len(looks) == len(set(looks)) == 12
        page.get_by_role("button", name="v3", exact=True).click()
        assert page.get_by_role("region", name="Scores on a").get_by_role("row", name=re.compile("^v3 ")).count() == 0


def test_mistaken_labels(chromium: Any, tmp_path: Path):
    with Visit(chromium, report(tmp_path, labelled(tmp_path / "r", 4)), "report.html") as page:
        page.get_by_text("w gives 9 of 12 rows their label.").wait_for()
        assert [" ".join(item.split()) for item in page.locator(".mistakes li").all_inner_texts()] == [
            "2× label-00 taken for label-01",
            "1× label-02 taken for something that is no label",
        ]
        rows = [" ".join(row.split()) for row in page.locator(".matrix tbody tr").all_inner_texts()]
        assert [row.split()[1] for row in rows] == ["label-00", "label-01", "label-02", "label-03"]
        assert rows[0].split() == ["1", "label-00", "1", "of", "3", "1", "2"]
        assert rows[2].split() == ["3", "label-02", "2", "of", "3", "2", "1"], "the last column counts what is no label"
        page.get_by_label("Labels of a: of").select_option("base")
        page.get_by_text("base gives 12 of 12 rows their label. None is mistaken.").wait_for()


def test_77_labels_those_with_mistakes_first(chromium: Any, tmp_path: Path):
    labelled(tmp_path / "r", 77)
    with serving(create_studio(Shown(RunFolders(tmp_path)))) as url, Visit(chromium, url, width=390) as page:
        page.get_by_role("link", name="r", exact=True).click()
        rows = page.locator(".matrix tbody tr")
        rows.nth(14).wait_for()
        assert rows.count() == 15
        assert [rows.nth(i).inner_text().split()[1] for i in range(4)] == ["label-00", "label-01", "label-02", "label-03"]
        page.get_by_role("button", name="All 77 labels").click()
        rows.nth(76).wait_for()
        refuse_overflow(page)


@pytest.mark.parametrize("width", [1440, 390])
def test_hostile_texts_are_texts(chromium: Any, tmp_path: Path, width: int):
    hostile = EVIL + "</script><!--<script>"
    made = variant(stopped=hostile, method=hostile, fields={hostile: hostile})
    run = run_folder(tmp_path / hostile.replace("/", ""), {hostile: made, "w": variant()}, base=hostile, settings={hostile: hostile})
    said = [{"prompt": hostile, "reference": hostile, "answer": hostile, "label": hostile}, line("b", "c")] * 3
    predictions(run, "a", base=said, **{hostile: said})
    with Visit(chromium, report(tmp_path, run), "report.html", width=width) as page:
        page.get_by_role("article").first.wait_for()
        page.locator(".matrix").wait_for()
        page.get_by_role("application").first.hover()
        assert page.evaluate("document.querySelectorAll('img, iframe, object, embed').length") == 0
        assert page.evaluate("document.scripts.length") == 2 and page.evaluate("window.hacked") is None
        for where in ("article .said", "article dd", ".matrix th", ".mistakes, .run-head", "h1"):
            wanted = hostile.replace("/", "") if where == "h1" else hostile
            assert any(wanted.strip() in text for text in page.locator(where).evaluate_all("all => all.map((e) => e.textContent)")), where
        refuse_overflow(page)


def test_names_that_every_object_has(chromium: Any, tmp_path: Path):
    """A variant, and a role in a prompt, that are called `constructor`: of a row that the variant has not answered it has no answer."""
    run = run_folder(tmp_path / "r", {"constructor": variant(), "w": variant()})
    told = line("yes", "yes") | {"prompt": "<|im_start|>constructor\nBuild it.<|im_end|>\n"}
    predictions(run, "a", base=[told, line("b", "c", 1)], constructor=[told])
    with Visit(chromium, report(tmp_path, run), "report.html") as page:
        page.get_by_label("Answers of").select_option("constructor")
        page.get_by_text("Wrong: constructor 0.").wait_for()
        (shown,) = page.get_by_role("article").all()
        assert shown.locator(".who").all_inner_texts() == ["constructor"] and "✓ equal" in shown.inner_text()
