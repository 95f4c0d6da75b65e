"""The screen of runs in a real browser: curves that grow, zoom and keys, hostile texts, every width, both schemes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.train.common import locked
from tests.train.past import run_folder, variant
from tests.web.common import EVIL, Visit, is_harmless, refuse_overflow, serving
from trimtab.http.studio import create_studio
from trimtab.http.studio_auth import Shown
from trimtab.train.follow import RunFolders

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def site(folder: Path) -> Iterator[str]:
    folder.mkdir()
    with serving(create_studio(Shown(RunFolders(folder)))) as url:
        yield url


def answers(folder: Path, rows: int, **said: str) -> None:
    """Files of answers of base and variants to `rows` rows, and where summary.json names them; said: name -> what it answers."""
    (folder / "predictions").mkdir()
    summary = json.loads((folder / "summary.json").read_text())
    for n, (name, text) in enumerate(said.items()):
        prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQuestion {}<|im_end|>\n<|im_start|>assistant\n"
        lines = [{"prompt": prompt.format(i), "reference": "4", "answer": text, "correct": text == "4"} for i in range(rows)]
        path = folder / "predictions" / f"{n}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        scores = summary["base_scores"]["a"] if name == "base" else summary["variants"][name]["scores"]
        scores["predictions"] = f"predictions/{n}.jsonl"
    (folder / "summary.json").write_text(json.dumps(summary))


def lines(name: str, steps: range, loss: float) -> str:
    made = [
        {
            "variant": name,
            "step": s,
            "epoch": 0,
            "loss": loss,
            "grad_norm": 1.0,
            "lr": 1e-3,
            "tokens": 7,
            "seconds": 2.0,
            "tokens_per_s": 3.5,
        }
        for s in steps
    ]
    return "".join(json.dumps(line) + "\n" for line in made)


def told_at(page: Any, key: str, begins: str | tuple[str, ...]) -> str:
    """What the loss chart says of the point that a key goes to, once it is that. A chart that is drawn anew has lost the keyboard."""
    chart, tip = page.get_by_role("application", name="Loss, nats a target"), page.locator(".tip")
    for _ in range(100):
        chart.focus()
        page.keyboard.press(key)
        text: str = tip.first.inner_text() if tip.count() else ""
        if text.startswith(begins):
            return text
        page.wait_for_timeout(100)
    raise AssertionError(f"{text!r} does not begin with {begins!r}")


def test_a_running_run_is_followed(chromium: Any, folder: Path, site: str):
    run = run_folder(folder / "live", {"v": variant()}, steps=40, summary=False)
    plan = {
        "base": "tiny",
        "steps": {"v": 200},
        "settings": {"seed": 3, "variants.v.method": "lora", "variants.v.r": 4, "variants.v.data": "a"},
    }
    (run / "run.json").write_text(json.dumps(plan))
    with locked(run), Visit(chromium, site) as page:
        page.get_by_role("link", name="live").click()
        page.get_by_role("heading", name="live running").wait_for()
        page.get_by_text("40 of 200 steps").wait_for()
        chart = page.get_by_role("application", name="Loss, nats a target")
        assert "1 line: v ends at" in chart.get_attribute("aria-label")
        with (run / "metrics.jsonl").open("a") as file:
            file.write(lines("v", range(41, 61), 0.125))
        page.get_by_text("60 of 200 steps").wait_for()
        page.get_by_label("Smoothing").fill("0")
        assert "0.125" in told_at(page, "End", "step 60\n")
        assert "0.7413" in told_at(page, "ArrowLeft", "step 40\n")
        page.get_by_role("button", name="tokens", exact=True).click()
        told_at(page, "End", f"tokens {40 * 10 + 20 * 7}")  # the tokens of all its steps
        page.get_by_role("button", name="seconds", exact=True).click()
        assert page.get_by_role("cell", name="lora").count() == 2, "in scores and in settings, from run.json"
        (run / "metrics.jsonl").write_text(lines("v", range(1, 6), 3.5))  # a resume from an early checkpoint
        page.get_by_text("5 of 200 steps").wait_for()
        plan["steps"]["v"] = 300
        (run / "run.json").write_text(json.dumps(plan | {"base": "another"}))  # an extended run, of the same state
        page.get_by_text("5 of 300 steps").wait_for()
        page.get_by_text("another").wait_for()


def test_a_page_that_nobody_is_at_is_read_less_often(chromium: Any, folder: Path, site: str):
    """And at once when somebody comes back. The page's clock is the test's."""
    run = run_folder(folder / "live", {"v": variant()}, steps=40, summary=False)
    with locked(run), Visit(chromium, site) as page:
        page.clock.install()
        page.get_by_role("link", name="live").click()
        page.get_by_text("tokens/s, all variants").wait_for()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))

        def readings(seconds: int) -> int:
            asked.clear()
            for _ in range(4 * seconds):
                page.clock.run_for(250)
                page.wait_for_timeout(15)  # for the answer, which the clock does not hold
            return len(asked)

        page.mouse.move(5, 5)
        assert 6 <= readings(16) <= 9
        readings(12)
        assert 4 <= readings(30) <= 6
        asked.clear()
        page.mouse.move(9, 9)
        page.wait_for_timeout(300)
        assert len(asked) == 1


def test_a_line_counts_for_the_steps_that_it_stands_for(chromium: Any, folder: Path, site: str):
    """log_every: 10. The first line too, which stands for ten steps as the others do."""
    run = run_folder(folder / "r", {"v": variant()}, summary=False)
    (run / "metrics.jsonl").write_text(lines("v", range(10, 61, 10), 3.5))
    with Visit(chromium, site) as page:
        page.get_by_role("link", name="r", exact=True).click()
        page.get_by_role("button", name="tokens", exact=True).click()
        for key, steps in (("Home", 10), ("End", 60)):
            told_at(page, key, f"tokens {steps * 7}")


@pytest.mark.parametrize("differ", [False, True])
def test_nothing_is_the_best_where_scores_do_not_compare(chromium: Any, folder: Path, site: str, differ: bool):
    for name, loss in (("one", 0.5), ("two", 0.25)):
        content = {"data.a.test": name if differ else "same", "data.a.train": "t"}
        run_folder(folder / name, {"v": variant(scores={"loss": loss, "rows": 3})}, content=content)
    with Visit(chromium, site) as page:
        for name in ("one", "two"):
            page.get_by_label(f"Compare {name}").check()
        page.get_by_role("link", name="Compare 2 runs").click()
        page.get_by_role("region", name="Scores on a").wait_for()
        assert page.get_by_text("different test rows").count() == differ
        assert page.locator("td.best").count() == (not differ)


@pytest.mark.parametrize(("keep_best", "saved", "marked"), [(False, ..., False), (True, ..., True), (True, None, False), (True, 30, True)])
def test_the_step_that_is_kept_is_marked(chromium: Any, folder: Path, site: str, keep_best: bool, saved: Any, marked: bool):
    """saved: what the run says at its end; while it goes on, the best step so far is the one, unless the last one is kept."""
    run = run_folder(folder / "r", {"v": variant() if saved is ... else variant(saved_step=saved)}, summary=saved is not ...)
    settings = {"variants.v.method": "lora", "variants.v.keep_best": keep_best}
    (run / "run.json").write_text(json.dumps({"base": "tiny", "steps": {"v": 60}, "settings": settings}))
    with Visit(chromium, site) as page:
        page.evaluate(
            """() => {
                 const canvas = CanvasRenderingContext2D.prototype, close = canvas.closePath;
                 window.diamonds = 0;
                 canvas.closePath = function () { window.diamonds++; close.call(this); };
               }"""
        )
        page.get_by_role("link", name="r", exact=True).click()
        told_at(page, "End", "step ")
        assert (page.evaluate("window.diamonds") > 0) == marked, "of all that is drawn the diamond alone is closed"


def test_a_late_answer_to_an_earlier_question_is_not_shown(chromium: Any, folder: Path, site: str):
    run_folder(folder / "r", {"v": variant(), "w": variant()})
    answers(folder / "r", 3, base="five", v="4", w="nine")
    with Visit(chromium, site) as page:
        page.get_by_role("link", name="r", exact=True).click()
        page.get_by_role("article").first.wait_for()
        waiting: list[Any] = []
        page.route("**/studio/answers?*who=w*", lambda route: waiting.append(route))
        page.get_by_label("Answers of").select_option("w")
        page.wait_for_timeout(100)
        page.get_by_label("Answers of").select_option("v")
        page.get_by_text("Wrong: v 0.").wait_for()
        (late,) = waiting
        with page.expect_response("**/studio/answers?*who=w*"):
            late.continue_()
        page.wait_for_timeout(300)
        assert page.get_by_text("Wrong: v 0.").count() == 1 and page.get_by_text("Wrong: w").count() == 0


def test_settings_differ_by_their_last_digit(chromium: Any, folder: Path, site: str):
    for name, seed in (("one", 20240101), ("two", 20240102)):
        settings = {"seed": seed, "lr": 0.1, "variants.v.method": "lora", "variants.v.lr": 0.12345678 + (name == "two") * 1e-8}
        run_folder(folder / name, {"v": variant()}, settings=settings)
    with Visit(chromium, site) as page:
        for name in ("one", "two"):
            page.get_by_label(f"Compare {name}").check()
        page.get_by_role("link", name="Compare 2 runs").click()
        for table, values in (("Settings of runs", ["20240101", "20240102"]), ("Settings of variants", ["0.12345678", "0.12345679"])):
            region = page.get_by_role("region", name=table)
            region.wait_for()
            assert sorted(x.inner_text() for x in region.get_by_role("cell").all()) == values


def standing(part: Any) -> dict[str, float]:
    """Where a part of the page is, once it has stayed there: what is drawn above it and around it may still move it."""
    seen = []
    while len(seen) < 3 or seen[-1] != seen[-3]:
        part.page.wait_for_timeout(100)
        seen.append(part.bounding_box())
        assert len(seen) < 100, seen[-5:]
    return seen[-1]


def test_the_kept_step_and_the_zoom(chromium: Any, folder: Path, site: str):
    run_folder(folder / "done", {"v": variant(saved_step=30), "w": variant(saved_step=60)})
    with Visit(chromium, site) as page:
        page.get_by_role("link", name="done").click()
        chart = page.get_by_role("application", name="Loss, nats a target")
        chart.scroll_into_view_if_needed()
        everything = page.get_by_role("button", name="Show all")
        assert everything.is_disabled()
        over = standing(chart.locator(".u-over"))
        y = over["y"] + over["height"] / 2
        page.mouse.move(over["x"] + over["width"] * 0.25, y)
        page.mouse.down()
        page.mouse.move(over["x"] + over["width"] * 0.5, y, steps=4)
        page.mouse.up()
        page.locator(".controls button:enabled", has_text="Show all").wait_for()
        told_at(page, "Home", ("step 15", "step 16", "step 17"))
        told_at(page, "End", ("step 29", "step 30", "step 31"))
        page.keyboard.press("Escape")
        page.locator(".controls button:disabled", has_text="Show all").wait_for()
        told_at(page, "End", "step 60")
        kept = page.get_by_role("region", name="Scores on a").get_by_role("row").filter(has_text="30 of 60")
        assert kept.count() == 1 and "v" in kept.inner_text()
        page.get_by_role("button", name="w", exact=True).click()
        assert page.get_by_role("rowheader", name="w", exact=True).count() == 0, "the legend hides a variant everywhere"


def test_runs_are_compared_by_what_differs(chromium: Any, folder: Path, site: str):
    for name, r in (("one", 4), ("two", 8)):
        settings = {"seed": 0, "variants.v.method": "lora", "variants.v.r": r, "variants.v.data": "a", "max_tokens": 64 * r}
        run_folder(folder / name, {"v": variant()}, settings=settings)
    with Visit(chromium, site) as page:
        for name in ("one", "two"):
            page.get_by_label(f"Compare {name}").check()
        assert (
            page.locator("code").inner_text() == f"trimtab compare {folder / 'one'} {folder / 'two'}"
            or "two" in page.locator("code").inner_text()
        )
        page.get_by_role("link", name="Compare 2 runs").click()
        table = page.get_by_role("region", name="Settings of variants")
        table.wait_for()
        assert [x.inner_text() for x in table.get_by_role("rowheader").all()] == ["r"]
        assert sorted(x.inner_text() for x in table.get_by_role("cell").all()) == ["4", "8"]
        ofruns = page.get_by_role("region", name="Settings of runs")
        assert [x.inner_text() for x in ofruns.get_by_role("rowheader").all()] == ["max_tokens"]
        page.get_by_label("those that are equal too").check()
        assert {"r", "method", "data"} <= {x.inner_text() for x in table.get_by_role("rowheader").all()}
        assert page.get_by_role("region", name="Scores on a").get_by_role("row", name="base").count() == 1, "they measured the same base"


def test_many_variants_are_found_by_name_and_leave_the_curves_in_sight(chromium: Any, folder: Path, site: str):
    run_folder(folder / "many", {f"v-{n}": variant() for n in range(260)}, steps=2)
    with Visit(chromium, site) as page:
        page.get_by_role("link", name="many", exact=True).click()
        page.get_by_role("heading", name="Curves").wait_for()
        legend = page.get_by_role("group", name="Variants: press one")
        assert legend.bounding_box()["height"] <= 270, "260 buttons would push the curves from the screen"
        scores = page.get_by_role("region", name="Scores on a")
        more = scores.get_by_role("button", name="Show the other 61")  # the base has a row too
        more.wait_for()
        assert scores.locator("tbody tr").count() == 200
        more.click()
        scores.locator("tbody tr").nth(260).wait_for()
        assert page.evaluate("document.activeElement.ariaLabel") == "Scores on a", "where the pressed button was"
        legend.get_by_role("button", name="Hide all").click()
        legend.get_by_label("Find variants").fill("v-25")
        legend.get_by_role("button", name="Show 11").click()
        legend.get_by_label("Find variants").fill("")
        assert legend.locator("[aria-pressed=true]").all_inner_texts() == ["v-25", *(f"v-25{n}" for n in range(10))]


def test_answers_stand_in_the_order_of_the_variants(chromium: Any, folder: Path, site: str):
    run_folder(folder / "numbers", {"10": variant(), "2": variant()})
    answers(folder / "numbers", 2, **{"base": "five", "10": "4", "2": "nine"})
    with Visit(chromium, site) as page:
        page.get_by_role("link", name="numbers", exact=True).click()
        row = page.get_by_role("article", name="Row 1", exact=True)
        row.wait_for()
        assert [text.split()[0] for text in row.locator("dt").all_inner_texts()] == ["reference", "base", "10", "2"]
        page.get_by_text("Wrong: base 2, 10 0, 2 2.").wait_for()


def test_answers_are_bubbles_and_come_page_by_page(chromium: Any, folder: Path, site: str):
    run_folder(folder / "r", {"v": variant(), "w": variant()})
    answers(folder / "r", 13, base="five", v="4", w="nine")
    with Visit(chromium, site) as page:
        page.get_by_role("link", name="r", exact=True).click()
        rows = page.get_by_role("article")
        rows.first.wait_for()
        assert rows.count() == 10
        assert rows.first.locator(".who").all_inner_texts() == ["system", "user"]
        assert "im_start" not in rows.first.inner_text() and "✓ equal" in rows.first.inner_text() and "✗ differs" in rows.first.inner_text()
        page.get_by_role("button", name="3 more of 3").click()
        rows.nth(12).wait_for()
        page.get_by_label("Answers of").select_option("v")
        page.get_by_text("Wrong: v 0.").wait_for()
        assert page.locator("article dt").count() == 20
        assert page.get_by_text("Wrong: v 0.").count() == 1


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (1024, "dark"), (390, "light")])
def test_hostile_texts_are_texts_at_every_width(chromium: Any, folder: Path, site: str, width: int, scheme: str):
    made = variant(data="a", stopped=EVIL, method=EVIL, fields={EVIL: EVIL})
    run = run_folder(
        folder / EVIL.replace("/", ""), {EVIL: made, "w": variant()}, base=EVIL, settings={EVIL: EVIL, f"variants.{EVIL}.x": EVIL}
    )
    answers(run, 2, base=EVIL, **{EVIL: EVIL, "w": "w" * 300})
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"variant": EVIL, "step": 61, "loss": 1.0, EVIL: 2.0}) + "\n")
    with Visit(chromium, site, width=width, scheme=scheme) as page:
        page.locator("tbody tr").wait_for()
        is_harmless(page, EVIL.replace("/", ""))
        refuse_overflow(page)
        page.locator("tbody a").click()
        page.get_by_role("article").first.wait_for()
        page.get_by_label("those that are equal too").check()
        page.get_by_role("application").first.hover()
        page.locator(".tip").wait_for()
        is_harmless(page, EVIL)
        refuse_overflow(page)


def test_the_token_stays_in_memory(chromium: Any, folder: Path, tmp_path: Path):
    run_folder(folder / "r", {"v": variant()})
    with serving(create_studio(Shown(RunFolders(folder), token="s3cret"))) as url:
        with Visit(chromium, url, "#key=s3cret") as page:
            page.get_by_role("link", name="r", exact=True).wait_for()
            assert "s3cret" not in page.url
            kept = page.evaluate("[JSON.stringify(localStorage), JSON.stringify(sessionStorage), document.cookie, history.length]")
            assert kept[:3] == ["{}", "{}", ""]
        visit = Visit(chromium, url)
        page = visit.page
        page.get_by_role("heading", name="A key is needed").wait_for()
        page.get_by_label("Key", exact=True).fill("s3cret")
        page.get_by_role("button", name="Use this key").click()
        page.get_by_role("link", name="r", exact=True).wait_for()
        page.reload()
        page.get_by_role("heading", name="A key is needed").wait_for()
        visit.context.close()
        assert all("401" in told for told in visit.wrong), visit.wrong


def test_a_key_is_taken_from_an_address_put_into_an_open_page(chromium: Any, folder: Path):
    run_folder(folder / "r", {"v": variant()})
    with serving(create_studio(Shown(RunFolders(folder), token="s3%cret"))) as url:
        visit = Visit(chromium, url, "#key=%")
        page = visit.page
        page.get_by_role("heading", name="A key is needed").wait_for()
        page.goto(url + "#key=s3%25cret")  # changes the part behind # alone, so the page stays
        page.get_by_role("link", name="r", exact=True).wait_for()
        assert "cret" not in page.url and page.get_by_role("heading", name="A key is needed").count() == 0
        visit.context.close()
        assert all("401" in told for told in visit.wrong), visit.wrong
