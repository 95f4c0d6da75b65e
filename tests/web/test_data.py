"""The screen of rows in a real browser: marks, dropped rows, pages, hostile texts, keys, every width, both schemes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.train.past import run_folder, variant
from tests.web.common import EVIL, Visit, is_harmless, refuse_overflow, serving
from trimtab.http.studio import create_studio
from trimtab.http.studio_auth import Shown
from trimtab.train.follow import RunFolders

pytestmark = pytest.mark.slow


def talk(prompt: str, answer: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}) + "\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="module")
def site(root: Path, tiny_llama_folder: Path) -> Iterator[str]:
    rows = [talk(f"question {i}", f"answer {i}") for i in range(25)]
    rows[2:2] = [talk(EVIL, EVIL), json.dumps({"messages": [{"role": "user", "content": "alone"}]}) + "\n", "{broken\n"]
    (root / "tickets.jsonl").write_text("".join(rows))
    (root / "tickets-valid.jsonl").write_text(rows[0] + talk("another", "one"))
    (root / (EVIL.replace("/", "") + ".jsonl")).write_text(talk("a", "b") * 2)
    settings = {"base": str(tiny_llama_folder), "data.a.train": [{"path": "tickets.jsonl"}], "order of variants": ["v"]}
    run_folder(root / "done", {"v": variant()}, settings=settings | {"variants.v.data": "a", "variants.v.max_length": 100})
    made = Shown(RunFolders(root), base=str(tiny_llama_folder))
    with serving(create_studio(made)) as url:
        yield url
    made.close()


def read(page: Any) -> None:
    page.get_by_role("article").first.wait_for(timeout=60_000)


def test_rows_of_a_file(chromium: Any, site: str):
    with Visit(chromium, site, "#/data") as page:
        page.get_by_role("button", name="tickets.jsonl").focus()
        page.keyboard.press("Enter")
        read(page)
        first = page.get_by_role("article", name="Row 1", exact=True)
        assert [mark.inner_text() for mark in first.locator("mark").all()] == ["answer 0", "<|im_end|>"]
        assert "user\n" in first.locator(".template").nth(0).text_content() + first.locator(".template").nth(1).text_content()
        assert page.get_by_text("2 of 2 rows").count() == 0 and page.get_by_role("button", name="valid 2").count() == 1
        page.get_by_text("1 of 2 rows stands with its answer in data.tickets.train").wait_for()
        dropped = page.get_by_role("region", name="Dropped rows")
        dropped.get_by_role("button", name="1 not JSON").click()
        dropped.get_by_text("tickets.jsonl:5").wait_for()
        dropped.get_by_role("button", name="1 nothing supervised").press("Enter")
        dropped.get_by_text("tickets.jsonl:4").wait_for()
        assert dropped.get_by_text("tickets.jsonl:5").count() == 0
        page.get_by_role("group", name="Pages of rows", exact=True).get_by_role("button", name="Next").click()
        page.get_by_role("article", name="Row 11").wait_for()
        assert page.get_by_text("--start 10 --count 10").count() == 1
        page.get_by_label("Go to").fill("26")
        page.get_by_label("Go to").press("Enter")
        page.get_by_role("article", name="Row 26").wait_for()
        assert page.get_by_role("article").count() == 1
        page.get_by_label("Order").select_option("longest")
        read(page)
        page.locator("article:first-of-type", has_text="hacked").first.wait_for()
        page.get_by_role("button", name="valid 2").click()
        page.get_by_text("question 0").wait_for()
        assert page.get_by_role("article").count() == 2 and page.get_by_text("--split valid --count").count() == 1


def test_rows_of_a_run_as_it_has_read_them(chromium: Any, site: str):
    with Visit(chromium, site, "#/data") as page:
        page.get_by_role("link", name="done").click()
        read(page)
        page.get_by_text("over-long").wait_for()  # by the run's own max_length
        assert page.get_by_role("img", name="rows of at most 100 tokens").count() == 1
        page.get_by_role("link", name="Curves and scores").click()
        page.get_by_role("heading", name="done finished").wait_for()


def test_what_cannot_be_read_says_why(chromium: Any, site: str):
    visit = Visit(chromium, site, "#/data")
    page = visit.page
    page.get_by_label("Find a file").fill("../secret.jsonl")
    page.get_by_label("Find a file").press("Enter")
    page.get_by_text("is not in a folder that this page may show").wait_for()
    visit.context.close()
    assert all("404" in told for told in visit.wrong), visit.wrong


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (1024, "dark"), (390, "light"), (390, "dark")])
def test_markup_in_rows_and_names_stays_text(chromium: Any, site: str, width: int, scheme: str):
    with Visit(chromium, site, "#/data", width=width, scheme=scheme) as page:
        page.locator(".file").first.wait_for()
        is_harmless(page, EVIL.replace("/", "") + ".jsonl")
        refuse_overflow(page)
        page.get_by_role("button", name="tickets.jsonl").click()
        read(page)
        is_harmless(page, EVIL)
        refuse_overflow(page)
        page.go_back()
        page.locator(".file").first.click()
        page.get_by_role("heading", name="onerror").wait_for()
        is_harmless(page, EVIL.replace("/", ""))
        refuse_overflow(page)
