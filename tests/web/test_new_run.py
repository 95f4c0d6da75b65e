"""A guided new run in a real browser: from rows to a valid run file, saved and downloaded; errors at their fields; hostile names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.web.common import EVIL, Visit, is_harmless, refuse_overflow, serving
from trimtab.http.studio import create_studio
from trimtab.http.studio_auth import Shown
from trimtab.train import RunConfig
from trimtab.train.follow import RunFolders

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new")
    rows = [{"question": f"question {i} {EVIL}", "answer": f"answer {i}"} for i in range(40)]
    (folder / "tickets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hostile = EVIL.replace("/", "")
    pairs = [{"prompt": f"p {i}", "chosen": "yes", "rejected": "no", hostile: 1} for i in range(30)]
    (folder / f"{hostile}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder


@pytest.fixture(scope="module")
def site(root: Path, tiny_llama_folder: Path) -> Iterator[str]:
    made = Shown(RunFolders(root), base=str(tiny_llama_folder), key="k")
    with serving(create_studio(made)) as url:
        yield url
    made.close()
    for child in made.beginner._children:
        child.wait(60)


def formed(page: Any) -> str:
    page.get_by_text("Nothing is wrong with it.").wait_for(timeout=60_000)
    text: str = page.get_by_role("region", name="Text of the run file").text_content()
    return text


def test_from_rows_to_a_run_file(chromium: Any, site: str, root: Path):
    with Visit(chromium, site, "#key=k") as page:
        page.get_by_role("link", name="Data").click()
        page.get_by_role("button", name="tickets.jsonl").click()
        page.get_by_role("link", name="Train on it").click()
        first = yaml.safe_load(formed(page))
        assert first["data"]["tickets"]["train"]["columns"] == {"prompt": "question", "completion": "answer"}
        page.get_by_label("max_steps").fill("2")
        page.get_by_role("button", name="Add a variant").click()
        page.get_by_label("Method").nth(1).select_option("ia3")
        page.get_by_label("Name", exact=True).nth(1).fill("small")
        page.get_by_label("r", exact=True).fill("8")
        page.get_by_label("use_dora").press("Space")
        page.get_by_role("region", name="Text of the run file").get_by_text("small:").wait_for()
        # an error stands at its field, in the list, and nowhere else
        rate = page.get_by_label("lr", exact=True).nth(1)
        rate.fill("fast")
        page.get_by_text("One thing is wrong with it").wait_for()
        assert rate.get_attribute("aria-invalid") == "true" and page.locator("[aria-invalid=true]").count() == 1
        said = page.locator(f"#{rate.get_attribute('aria-describedby')}").inner_text()
        assert "valid number" in said and page.get_by_role("button", name="Save the run file").is_disabled()
        rate.fill("1e-3")
        page.get_by_text("One thing is wrong with it").wait_for(state="detached")
        text = formed(page)
        content = yaml.safe_load(text)
        assert content["defaults"]["max_steps"] == 2
        assert content["variants"] == {
            "tickets-lora": {"data": "tickets", "method": "lora", "r": 8, "use_dora": True},
            "small": {"data": "tickets", "method": "ia3", "lr": 1e-3},
        }
        page.get_by_role("button", name="Read the rows and estimate").click()
        page.get_by_text("GB are free").wait_for(timeout=60_000)
        assert page.get_by_role("region", name="Cost of each variant").get_by_role("row").count() == 3
        with page.expect_download() as download:
            page.get_by_role("button", name="Download").click()
        assert download.value.suggested_filename == "tickets.yaml" and download.value.path().read_text() == text
        page.get_by_role("button", name="Save the run file").click()
        page.get_by_text(f"Saved: {root / 'tickets.yaml'}").wait_for()
        assert (root / "tickets.yaml").read_text() == text
        page.get_by_role("button", name="Save and begin").click()
        page.get_by_text("It has begun").wait_for(timeout=30_000)
        page.get_by_role("link", name="Follow it among the runs").click()
        page.get_by_role("row", name="tickets finished").wait_for(timeout=60_000)
        run = RunConfig.load(root / "tickets.yaml")
        assert [v.method.name for v in run.variants] == ["lora", "ia3"] and run.out == root / "tickets"


def test_objectives_with_rewards_and_a_teacher(chromium: Any, site: str, root: Path):
    (root / "mine.py").write_text("def close(completions, **_):\n    return [1.0] * len(completions)\n")
    with Visit(chromium, site, "#/new/tickets.jsonl") as page:
        formed(page)
        objective = page.get_by_label("Objective")
        assert set(objective.locator("option").all_inner_texts()) == {"sft", "distil", "grpo"}
        objective.select_option("distil")
        teacher = page.get_by_label("teacher", exact=True)
        page.get_by_text("name a base or an adapter").first.wait_for()
        assert teacher.get_attribute("aria-invalid") == "true"
        teacher.fill("smollm2-135m-instruct")
        formed(page)
        page.get_by_role("button", name="Add a variant").click()
        page.get_by_label("Objective").nth(1).select_option("grpo")
        formed(page)
        page.get_by_role("button", name="Add a reward").click()
        second = page.get_by_role("group", name="Reward 2")
        second.get_by_label("Reward", exact=True).select_option("regex")
        page.get_by_text("rewards[1]: pattern: reward regex needs it").first.wait_for()
        second.get_by_label("pattern").fill("^answer")
        second.get_by_label("weight").fill("0.2")
        formed(page)
        page.get_by_role("button", name="Add a reward").click()
        third = page.get_by_role("group", name="Reward 3")
        third.get_by_label("Reward", exact=True).select_option("a function in a file")
        third.get_by_label("File and function").fill("mine.py:close")
        page.get_by_text("runs code of that file").first.wait_for()
        third.get_by_label("training may run this code").check()
        formed(page)
        page.get_by_text("More settings of grpo").click()
        page.get_by_label("beta", exact=True).fill("0.1")
        page.get_by_role("region", name="Text of the run file").get_by_text("beta: 0.1").wait_for()
        content = yaml.safe_load(formed(page))
        assert list(content["data"]) == ["tickets", "tickets-grpo"]
        assert content["data"]["tickets"]["train"] == content["data"]["tickets-grpo"]["train"]
        first, other = content["variants"].values()
        assert first | {"method": "lora"} == {
            "data": "tickets",
            "method": "lora",
            "r": 16,
            "objective": "distil",
            "teacher": "smollm2-135m-instruct",
        }
        assert other["data"] == "tickets-grpo" and other["beta"] == 0.1
        assert other["rewards"] == [
            {"reward": "exact_match"},
            {"reward": "regex", "pattern": "^answer", "weight": 0.2},
            {"reward": "mine.py:close", "trusted": True},
        ]
        page.get_by_role("button", name="Read the rows and estimate").click()
        page.get_by_text("GB are free").wait_for(timeout=60_000)
        assert page.get_by_role("region", name="Cost of each variant").get_by_role("row").count() == 3
        # another objective takes the fields of the old one away
        page.get_by_label("Objective").nth(1).select_option("sft")
        page.get_by_role("region", name="Text of the run file").get_by_text("tickets-grpo").wait_for(state="detached")
        assert "rewards" not in formed(page)


def test_labels_offer_a_classifier_that_trains(chromium: Any, site: str, root: Path):
    hostile = "<img src=x onerror=window.hacked=3>"  # as short as a label must be to be taken for one
    rows = [{"text": f"{('card', 'bank')[i % 2]} {i} {EVIL}", "label": ("card", hostile)[i % 2]} for i in range(40)]
    (root / "intents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Visit(chromium, site, "#key=k") as page:
        page.get_by_role("link", name="Data").wait_for()  # by then the key has been taken out of the address
        page.goto(f"{site}#/new/intents.jsonl")
        first = yaml.safe_load(formed(page))
        assert first["data"]["intents"]["labels"] == "auto" and first["variants"]["intents-lora"]["valid_metric"] == "label_accuracy"
        page.get_by_label("Objective").select_option("classify")
        page.get_by_label("classes", exact=True).fill("card")
        page.get_by_text("at least two, and each once").first.wait_for()
        page.get_by_label("classes", exact=True).fill("")
        page.get_by_label("max_steps").fill("2")
        page.get_by_role("region", name="Text of the run file").get_by_text("max_steps: 2").wait_for()
        content = yaml.safe_load(formed(page))
        assert "labels" not in content["data"]["intents"] and "valid_metric" not in content["variants"]["intents-lora"]
        is_harmless(page, "intents.jsonl")
        page.get_by_role("button", name="Save and begin").click()
        page.get_by_text("It has begun").wait_for(timeout=30_000)
        page.get_by_role("link", name="Follow it among the runs").click()
        page.get_by_role("row", name="intents finished").wait_for(timeout=60_000)
        page.get_by_role("link", name="intents", exact=True).click()
        page.get_by_text("accuracy").first.wait_for()
        assert page.evaluate("window.hacked") is None


def test_variants_keep_their_order_whatever_their_names(chromium: Any, site: str):
    with Visit(chromium, site, "#/new/tickets.jsonl") as page:
        formed(page)
        for n, name in ((0, "b"), (1, "10"), (2, "2")):
            if n:
                page.get_by_role("button", name="Add a variant").click()
            page.get_by_label("Name", exact=True).nth(n).fill(name)
        page.get_by_role("region", name="Text of the run file").get_by_text("'2':").wait_for()
        assert list(yaml.safe_load(formed(page))["variants"]) == ["b", "10", "2"]


def test_a_run_file_that_could_not_be_formed_is_asked_for_again(chromium: Any, site: str):
    visit = Visit(chromium, site, "#/new/tickets.jsonl")
    page = visit.page
    formed(page)
    page.route("**/studio/new/form", lambda route: route.abort())
    page.get_by_label("max_steps").fill("7")
    page.get_by_role("alert").get_by_text("the server does not answer").wait_for()
    assert page.get_by_role("button", name="Read the rows and estimate").is_disabled()
    page.unroute("**/studio/new/form")
    page.get_by_role("button", name="Try again").click()
    page.get_by_role("region", name="Text of the run file").get_by_text("max_steps: 7").wait_for()
    page.get_by_role("alert").wait_for(state="detached")
    formed(page)
    visit.context.close()
    assert all("ERR_FAILED" in told for told in visit.wrong), visit.wrong


def test_the_focus_stays_where_the_pressed_button_was(chromium: Any, site: str):
    with Visit(chromium, site, "#/new") as page:
        page.get_by_role("button", name="tickets.jsonl").focus()
        page.keyboard.press("Enter")
        formed(page)
        assert page.evaluate("document.activeElement.textContent") == "1. Data"


def test_a_list_of_losses(chromium: Any, site: str, root: Path):
    pairs = [{"prompt": f"p {i}", "chosen": "yes", "rejected": "no"} for i in range(30)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    with Visit(chromium, site, "#/new/pairs.jsonl") as page:
        formed(page)
        page.get_by_label("loss_type", exact=True).select_option("ipo")
        text = page.get_by_role("region", name="Text of the run file")
        text.get_by_text("loss_type: ipo").wait_for()
        page.get_by_role("button", name="Add another loss_type").click()
        page.get_by_label("loss_type 2").select_option("sft")
        page.get_by_label("loss_weights").fill("1, 0.2, 3")
        page.get_by_text("one for each of the 2 loss types").first.wait_for()
        page.get_by_label("loss_weights").fill("1, 0.2")
        text.get_by_text("0.2").wait_for()
        (variant,) = yaml.safe_load(formed(page))["variants"].values()
        assert (variant["loss_type"], variant["loss_weights"]) == (["ipo", "sft"], [1, 0.2])
        page.get_by_role("button", name="Take sft away").click()
        page.get_by_label("loss_weights").fill("")
        text.get_by_text("loss_weights").wait_for(state="detached")
        (variant,) = yaml.safe_load(formed(page))["variants"].values()
        assert variant["loss_type"] == "ipo" and "loss_weights" not in variant


def test_two_variants_of_one_name_are_told(chromium: Any, site: str):
    with Visit(chromium, site, "#/new/tickets.jsonl") as page:
        formed(page)
        page.get_by_role("button", name="Add a variant").click()
        page.get_by_label("Name", exact=True).nth(1).fill("tickets-lora")
        page.get_by_text("two variants are called tickets-lora").first.wait_for()
        page.get_by_role("button", name="Take tickets-lora away").first.click()
        formed(page)


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (1024, "dark"), (390, "light"), (390, "dark")])
def test_markup_in_names_and_errors_stays_text(chromium: Any, site: str, width: int, scheme: str):
    with Visit(chromium, site, "#/new", width=width, scheme=scheme) as page:
        page.locator(".file").first.click()
        content = yaml.safe_load(formed(page))
        assert next(iter(content["variants"].values()))["objective"] == "dpo"
        is_harmless(page, EVIL.replace("/", "") + ".jsonl")
        refuse_overflow(page)
        page.get_by_label("Name", exact=True).fill(EVIL)
        page.get_by_label("Name of the run").fill(EVIL)
        page.get_by_label("r", exact=True).fill(EVIL)
        page.get_by_text("wrong with it:").wait_for()
        is_harmless(page, EVIL)
        refuse_overflow(page)
        page.get_by_label("Name", exact=True).fill("v")  # of a variant without a right name nothing else is told
        page.get_by_label("Objective").select_option("grpo")
        page.get_by_role("button", name="Add a reward").click()
        reward = page.get_by_role("group", name="Reward 2")
        reward.get_by_label("Reward", exact=True).select_option("a function in a file")
        reward.get_by_label("File and function").fill(EVIL)
        page.get_by_text("a function is named FILE.py:FUNCTION").first.wait_for()
        page.get_by_role("group", name="Reward 1").get_by_label("Reward", exact=True).select_option("json_schema")
        page.get_by_label("schema", exact=True).fill(EVIL)
        page.get_by_text("This is no JSON object yet").wait_for()
        is_harmless(page, EVIL)
        refuse_overflow(page)


def test_a_number_is_typed_key_by_key(chromium: Any, site: str):
    with Visit(chromium, site, "#/new/tickets.jsonl") as page:
        formed(page)
        for typed, value in (("0.0002", 0.0002), ("1.50e-4", 0.00015)):
            page.get_by_label("lr", exact=True).fill("")
            page.get_by_label("lr", exact=True).press_sequentially(typed)
            page.get_by_role("region", name="Text of the run file").get_by_text(f"lr: {value}").wait_for()
            assert page.get_by_label("lr", exact=True).input_value() == typed
            assert next(iter(yaml.safe_load(formed(page))["variants"].values()))["lr"] == value


def test_what_is_taken_away_takes_its_text_along(chromium: Any, site: str):
    with Visit(chromium, site, "#/new/tickets.jsonl") as page:
        formed(page)
        page.get_by_label("Objective").select_option("grpo")
        page.get_by_role("button", name="Add a reward").click()
        for number, schema in ((1, '{"type": "array"}'), (2, '{"type": "object"}')):
            page.get_by_role("group", name=f"Reward {number}").get_by_label("Reward", exact=True).select_option("json_schema")
            page.get_by_label("schema", exact=True).nth(number - 1).fill(schema)
        text = page.get_by_role("region", name="Text of the run file")
        text.get_by_text("type: object").wait_for()
        page.get_by_role("button", name="Take reward 1 away").click()
        assert json.loads(page.get_by_label("schema", exact=True).input_value()) == {"type": "object"}
        text.get_by_text("type: array").wait_for(state="detached")
        (variant,) = yaml.safe_load(formed(page))["variants"].values()
        assert variant["rewards"] == [{"reward": "json_schema", "schema": {"type": "object"}}]


def test_nothing_is_saved_before_the_file_has_what_the_fields_say(chromium: Any, site: str):
    with Visit(chromium, site, "#key=k") as page:
        page.get_by_role("link", name="Data").wait_for()  # by then the key has been taken out of the address
        page.goto(f"{site}#/new/tickets.jsonl")
        formed(page)
        buttons = [page.get_by_role("button", name=name) for name in ("Read the rows and estimate", "Save and begin", "Save the run file")]
        assert all(button.is_enabled() for button in buttons)
        held: list[Any] = []
        page.route("**/studio/new/form", lambda route: held.append(route))
        with page.expect_request("**/studio/new/form"):
            page.get_by_label("max_steps").fill("3")
        assert not any(button.is_enabled() for button in buttons)
        while not held:
            page.wait_for_timeout(20)
        held[0].continue_()
        page.get_by_role("region", name="Text of the run file").get_by_text("max_steps: 3").wait_for()
        assert all(button.is_enabled() for button in buttons)
