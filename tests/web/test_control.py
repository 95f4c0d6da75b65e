"""Runs are begun, paused, resumed, cloned and stopped from the page, in a real browser, with real training."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.train.common import locked, run_file
from tests.train.past import run_folder, variant
from tests.web.common import EVIL, Visit, is_harmless, refuse_overflow, serving
from trimtab.http.studio import create_studio
from trimtab.http.studio_auth import Shown
from trimtab.methods import LoraConfig
from trimtab.train.clone import described
from trimtab.train.control import CONTROL
from trimtab.train.follow import RunFolders
from trimtab.train.options import TrainOptions, VariantConfig
from trimtab.train.run_folders import state

pytestmark = pytest.mark.slow
KEY = "a-key-of-this-test"


@contextmanager
def site(folder: Path) -> Iterator[tuple[str, Shown]]:
    shown = Shown(RunFolders(folder), key=KEY)
    with serving(create_studio(shown)) as url:
        try:
            yield url, shown
        finally:
            for child in shown.beginner._children:
                if child.poll() is None:
                    os.kill(child.pid, signal.SIGKILL)
                child.wait(20)


def planned(folder: Path, *names: str, **control: Any) -> Path:
    """A run that takes orders, as far as its folder tells."""
    run = run_folder(folder, {n: variant() for n in names}, summary=False)
    told = described(VariantConfig(name="v", data="a", method=LoraConfig(r=4), options=TrainOptions(lr=1e-3)))
    settings = {f"variants.{n}.{k}": x for n in names for k, x in {"method": "lora", "r": 4, "data": "a", "lr": 1e-3}.items()}
    plan = {"base": "tiny", "steps": dict.fromkeys(names, 200), "variants": dict.fromkeys(names, told), "settings": settings}
    (run / "run.json").write_text(json.dumps(plan | {"control": {"paused": [], "ended": {}, "refused": {}} | control}))
    return run


def forgive(visit: Visit, refusals: int) -> None:
    """So many requests were to be refused, which the browser notes on its console."""
    assert len(visit.wrong) == refusals and all("status of 400" in text for text in visit.wrong), visit.wrong
    visit.wrong.clear()


def steps_done(page: Any) -> int:
    found = re.search(r"([\d,]+) of [\d,]+ steps", page.locator(".progress-line").inner_text())
    assert found
    return int(found[1].replace(",", ""))


def test_a_run_from_its_beginning_to_its_end(chromium: Any, tmp_path: Path, tiny_llama_folder: Path):
    variants = {n: {"method": "lora", "r": 2, "data": d, "max_steps": 50_000} for n, d in (("support", "a"), ("intents", "b"))}
    content = run_file(tmp_path, variants, base=str(tiny_llama_folder), out="desk")
    (tmp_path / "desk.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(content | {"seeds": 3}))
    with site(tmp_path) as (url, shown), (visit := Visit(chromium, url, f"#key={KEY}")) as page:
        assert page.evaluate("location.hash") == ""
        page.get_by_label("Run file").select_option("wrong.yaml")
        page.get_by_role("button", name="Begin").click()
        page.get_by_role("alert").filter(has_text="seeds: unknown key (did you mean 'seed'?)").wait_for()
        page.get_by_label("Run file").select_option("desk.yaml")
        page.get_by_text("trimtab train desk.yaml", exact=True).wait_for()
        page.get_by_role("button", name="Begin").click()
        page.get_by_text("Begun: desk.").wait_for()
        page.get_by_label("What desk prints").filter(has_text="loading").wait_for(timeout=60_000)
        page.get_by_role("link", name="desk", exact=True).click(timeout=60_000)
        page.get_by_role("heading", name="desk running").wait_for()
        page.get_by_role("button", name="Pause support").wait_for()
        before = steps_done(page)
        page.wait_for_function("n => +document.querySelector('progress').value > n", arg=before)  # a curve moves
        page.get_by_role("button", name="Pause support").click()
        page.get_by_role("row", name="support").get_by_text("paused").wait_for()
        page.get_by_text(f"trimtab runs pause {tmp_path}/desk support").wait_for()
        page.get_by_role("button", name="Resume support").click()
        page.get_by_role("row", name="support").get_by_text("training").wait_for()

        page.get_by_role("button", name="Clone support").click()
        page.get_by_label("Name of the clone").fill("quick")
        page.get_by_label("Value", exact=True).fill("much")
        page.get_by_role("button", name="Clone it").click()
        page.get_by_role("alert").filter(has_text="variants.quick.lr: Input should be a valid number").wait_for()
        page.get_by_label("Value", exact=True).fill("1e-4")
        page.get_by_role("button", name="Another setting").click()
        page.get_by_label("Setting", exact=True).nth(1).fill("max_steps")
        page.get_by_label("Value", exact=True).nth(1).fill("7")
        page.get_by_text(f"trimtab runs clone {tmp_path}/desk support --name quick --set lr=1e-4 --set max_steps=7").wait_for()
        page.get_by_role("button", name="Clone it").click()
        page.get_by_role("button", name="Pause quick").wait_for()
        page.locator("[aria-label='Clone support']:focus").wait_for()  # the keyboard is where it was

        page.get_by_role("button", name="Stop support").click()
        page.locator("button:focus").filter(has_text="Let it train").wait_for()
        page.keyboard.press("Escape")
        page.get_by_role("alertdialog").wait_for(state="detached")
        page.get_by_role("button", name="Stop support").click()
        page.get_by_role("alertdialog", name="Stop support for good?").get_by_role("button", name="Stop support").click()
        page.get_by_text("stopped by hand at step").first.wait_for()
        assert page.get_by_role("button", name="Pause support").is_disabled()
        page.get_by_role("button", name="Stop the run…").click()
        page.get_by_role("alertdialog").get_by_role("button", name="Stop the run").click()
        page.get_by_role("heading", name="desk stopped").wait_for(timeout=60_000)
        page.get_by_text("What desk prints").click()
        page.get_by_label("What desk prints").filter(has_text="interrupted after step").wait_for()
        (child,) = shown.beginner._children
        forgive(visit, 2)
        assert child.wait(30) == 130 and state(tmp_path / "desk") == "stopped"
    steps = [json.loads(line) for line in (tmp_path / "desk" / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in steps if x["variant"] == "quick"] == list(range(1, 8))


def test_a_run_that_is_paused_says_so(chromium: Any, tmp_path: Path):
    some, every = (
        planned(tmp_path / "some", "v", "w", paused=["w"]),
        planned(tmp_path / "every", "v", "w", "x", paused=["v", "w"], ended={"x": "by hand"}, waits=True),
    )
    with site(tmp_path) as (url, _), locked(some), locked(every), Visit(chromium, url, f"#key={KEY}") as page:
        for name, word in (("some", "running"), ("every", "paused")):
            page.get_by_role("row").filter(has=page.get_by_role("link", name=name, exact=True)).get_by_text(word, exact=True).wait_for()
        page.get_by_role("link", name="some", exact=True).click()
        page.get_by_text("1 of 2 variants paused").wait_for()
        assert page.get_by_role("heading", level=1).inner_text().split() == ["some", "running"]
        page.get_by_role("link", name="Runs", exact=True).first.click()
        page.get_by_role("link", name="every", exact=True).click()
        page.get_by_text("All variants are paused: the run waits").wait_for()
        assert page.get_by_role("heading", level=1).inner_text().split() == ["every", "paused"]
        page.get_by_text(f"trimtab runs resume {every}", exact=True).wait_for()
        assert page.get_by_text("of steps to go").count() == 0


def test_a_variant_may_be_called_constructor(chromium: Any, tmp_path: Path):
    """Every object has something under that name: it is neither ended nor answered for that."""
    run = planned(tmp_path / "r", "constructor", "w", paused=["w"])
    with site(tmp_path) as (url, _), locked(run), Visit(chromium, url, f"#key={KEY}") as page:
        page.get_by_role("link", name="r", exact=True).click()
        page.get_by_text("1 of 2 variants paused").wait_for()
        assert page.get_by_role("heading", level=1).inner_text().split() == ["r", "running"]
        control = page.get_by_role("region", name="Control")
        assert control.get_by_role("row", name="constructor").get_by_text("training", exact=True).count() == 1
        assert control.get_by_role("button", name="Stop constructor").is_enabled()


def test_without_the_key_nothing_is_done(chromium: Any, tmp_path: Path):
    run = planned(tmp_path / "r", "v", "w")
    with site(tmp_path) as (url, _), locked(run), (visit := Visit(chromium, url)) as page:
        page.get_by_role("link", name="r", exact=True).click()
        page.get_by_role("button", name="Pause v").click()
        page.get_by_role("heading", name="A key is needed").wait_for()
        assert not (run / CONTROL).exists()
        assert len(visit.wrong) == 1 and "401" in visit.wrong[0]
        visit.wrong.clear()
        page.get_by_label("Key", exact=True).fill(KEY)
        page.get_by_role("button", name="Use this key").click()
        page.get_by_role("button", name="Pause v").click()
        page.get_by_text("Asked: pause v.").wait_for()
        assert json.loads((run / CONTROL).read_text())["variants"] == {"v": "pause"}
        page.get_by_role("row", name="v").get_by_text("pausing").wait_for()


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (1024, "dark"), (390, "light")])
def test_hostile_texts_on_every_width(chromium: Any, tmp_path: Path, width: int, scheme: str):
    refused = {"clone": f"because {EVIL}"}
    run = planned(tmp_path / "r", EVIL, "w", paused=["w"], ended={EVIL: EVIL}, refused=refused)
    (run / CONTROL).write_text(json.dumps({"format": 1, "variants": {"w": "pause", EVIL: "stop"}}))
    (tmp_path / "r.log").write_text(EVIL + "\n")
    with site(tmp_path) as (url, _), locked(run), (visit := Visit(chromium, url, f"#key={KEY}", width=width, scheme=scheme)) as page:
        page.get_by_role("link", name="r", exact=True).click()
        page.get_by_role("button", name="Resume w").wait_for()
        page.get_by_text("What r prints").click()
        page.locator(".log pre").filter(has_text="<script>").wait_for()
        page.get_by_role("button", name=re.compile("^Clone <img")).click()
        page.get_by_role("heading", name=re.compile("^Clone <img")).wait_for()
        is_harmless(page, EVIL)
        page.get_by_label("Name of the clone").fill("../x")  # what does not fit into a field can be scrolled to
        refuse_overflow(page)
        page.get_by_role("button", name="Clone it").click()
        page.get_by_role("alert").filter(has_text="is not a name").wait_for()
        is_harmless(page, EVIL)
        forgive(visit, 1)
