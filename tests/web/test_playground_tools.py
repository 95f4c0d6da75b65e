"""Tools in the playground: what is typed is what the ordinary chat route gets, and what its answers call is what the page shows.

What a model that knows tools would write is given to the engine's sampler as tokens (`saying`).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from tests.bases.test_tool_turns import WEATHER
from tests.http.common import Site, site
from tests.http.test_tools import PICK, base_with, saying
from tests.store.common import stirred
from tests.web.common import EVIL, Visit, is_harmless, refuse_overflow, serving
from tests.web.test_serve import ask, column
from trimtab.http.assemble import Asked
from trimtab.methods import LoraConfig

pytestmark = pytest.mark.slow
ODD = {
    "type": "function",
    "function": {
        "name": "odd",
        "parameters": {"type": "object", "properties": {"10": {"type": "integer"}, "2": {"type": "string"}, "list": {"type": "array"}}},
    },
}
LARGE = "12345678901234567891"
"""A number that JavaScript cannot hold."""


def as_text(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, str]]:
    """A base whose template knows tools, and an adapter of it."""
    base = base_with("qwen2_5")
    folder = stirred(base, LoraConfig(r=4), seed=1).save(tmp_path_factory.mktemp("adapter") / "adapter")
    with ExitStack() as stack:
        made = stack.enter_context(site(Asked(adapters={"acme/a": str(folder)}), base=base, kv_bytes=64 << 20))
        yield made, stack.enter_context(serving(made.app))


@pytest.fixture
def page(chromium: Any, served: tuple[Site, str]) -> Iterator[Any]:
    with Visit(chromium, served[1]) as opened:
        opened.get_by_label("acme/a", exact=True).wait_for()
        yield opened


def define(page: Any, tools: str) -> None:
    if page.get_by_label("Definitions").is_hidden():
        page.locator(".tools summary").click()
    page.get_by_label("Definitions").fill(tools)


def command(page: Any, model: str) -> dict[str, Any]:
    """The body that the shown command sends."""
    box = column(page, model).locator(".as-command")
    if not box.locator("code").is_visible():
        box.locator("summary").click()
    words = shlex.split(box.locator("code").inner_text())
    return json.loads(words[words.index("-d") + 1])


def test_a_call_is_a_card_and_its_result_goes_on(page: Any, served: tuple[Site, str]):
    made, url = served
    define(page, json.dumps([WEATHER, ODD], indent=2))
    page.get_by_text("May be called: get_weather, odd").wait_for()
    with saying(made, "I look.\n" + as_text("get_weather", '{"city": "Bern", "days": 3}')):
        ask(page, "How is the weather?", 200)
        for model in ("tiny", "acme/a"):
            column(page, model).get_by_text("ended: tool_calls").wait_for()
    card = column(page, "tiny").get_by_role("listitem", name="Call of get_weather")
    assert card.locator("dt").all_inner_texts() == ["city", "days"] and card.locator("dd").all_inner_texts() == ["Bern", "3"]
    assert column(page, "tiny").locator(".answer").first.inner_text().strip() == "I look."
    assert command(page, "tiny")["tools"] == [WEATHER, ODD]
    send = column(page, "tiny").get_by_role("button", name="Send the result and go on")
    assert send.is_disabled(), "nothing is typed yet"
    card.get_by_label("What get_weather returns").fill("sunny, 21 degrees")
    other = column(page, "acme/a").get_by_label("What get_weather returns")
    assert other.input_value() == "sunny, 21 degrees", "the same call of another model has the same result"
    with saying(made, "It is sunny.") as refused:
        page.get_by_role("button", name="Send the results of 2 models and go on").click()
        for model in ("tiny", "acme/a"):
            column(page, model).get_by_text("It is sunny.").wait_for()
            column(page, model).get_by_text("ended: stop").wait_for()
    assert refused == []
    body = command(page, "acme/a")
    assert [m["role"] for m in body["messages"]] == ["user", "assistant", "tool"]
    (call,) = body["messages"][1]["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Bern", "days": 3}'}
    assert body["messages"][2] == {"role": "tool", "tool_call_id": call["id"], "content": "sunny, 21 degrees"}
    with saying(made, "It is sunny."):  # the command asks what the page has asked
        again = httpx.post(f"{url}v1/chat/completions", json=body).raise_for_status().json()
    assert again["choices"][0]["message"]["content"] == "It is sunny."
    refuse_overflow(page)


def test_arguments_are_shown_as_they_were_written(page: Any, served: tuple[Site, str]):
    """In their order, with all digits; two calls need two results, and the tokens that spell them can be looked at."""
    define(page, json.dumps([ODD, WEATHER]))
    odd = f'{{"10": {LARGE}, "2": "7", "list": [1, {{"a": "}}, ]"}}]}}'
    with saying(served[0], as_text("odd", odd) + "\n" + as_text("get_weather", '{"city": "two\\nlines"}')):
        ask(page, "hi", 400)
        column(page, "tiny").get_by_text("ended: tool_calls").wait_for()
        column(page, "acme/a").get_by_text("ended: tool_calls").wait_for()
    card = column(page, "tiny").get_by_role("listitem", name="Call of odd")
    assert card.locator("dt").all_inner_texts() == ["10", "2", "list"]
    assert card.locator("dd").all_inner_texts() == [LARGE, "7", '[1, {"a": "}, ]"}]']
    assert column(page, "tiny").get_by_role("listitem", name="Call of get_weather").locator("dd").inner_text() == "two\nlines"
    card.get_by_label("What odd returns").fill("1")
    send = column(page, "tiny").get_by_role("button", name="Send 2 results and go on")
    assert send.is_disabled()
    column(page, "tiny").get_by_text("As the model wrote it").click()
    tokens = column(page, "tiny").locator(".token")
    assert "".join(tokens.all_text_contents()).startswith("<tool_call>")
    tokens.first.hover()
    column(page, "tiny").locator(".alternatives .share").first.wait_for()
    result = column(page, "tiny").get_by_label("What get_weather returns")
    result.fill("2")
    with saying(served[0], "Done."):
        result.press("Control+Enter")
        column(page, "tiny").get_by_text("Done.").wait_for()
        column(page, "tiny").get_by_text("ended: stop").wait_for()
    assert [m.get("content") for m in command(page, "tiny")["messages"]][2:] == ["1", "2"]
    assert column(page, "acme/a").locator(".turn").count() == 1, "the other model waits for its own results"


def test_a_forced_call_is_followed_by_a_free_answer(page: Any, served: tuple[Site, str]):
    define(page, json.dumps([WEATHER, PICK]))
    page.get_by_label("acme/a", exact=True).uncheck()
    page.get_by_label("Tool choice").select_option("name:pick")
    page.get_by_label("one call at most").check()
    assert command_before(page)["tool_choice"] == {"type": "function", "function": {"name": "pick"}}
    ask(page, "hi", 700)
    calls = column(page, "tiny").get_by_role("listitem", name="Call of pick")
    column(page, "tiny").get_by_text("ended: tool_calls").wait_for(timeout=30_000)
    assert calls.count() == 1, "a random base calls what it is forced to"
    assert command(page, "tiny")["parallel_tool_calls"] is False
    column(page, "tiny").get_by_label("What pick returns").fill("rain")
    with saying(served[0], "It rains."):
        column(page, "tiny").get_by_role("button", name="Send the result and go on").click()
        column(page, "tiny").get_by_text("It rains.").wait_for()
        column(page, "tiny").get_by_text("ended: stop").wait_for()
    assert "tool_choice" not in command(page, "tiny")
    define(page, json.dumps([ODD]))
    assert page.get_by_label("Tool choice").input_value() == "auto", "the tool that was to be called has gone"


def test_an_answer_to_a_result_that_failed_is_asked_for_again(chromium: Any, served: tuple[Site, str]):
    """By the keyboard alone: what was pressed goes away, and the focus goes to the answer."""
    visit = Visit(chromium, served[1])
    page = visit.page
    page.get_by_label("acme/a", exact=True).uncheck()
    define(page, json.dumps([WEATHER]))
    with saying(served[0], as_text("get_weather", '{"city": "Bern"}')):
        ask(page, "How is the weather?", 200)
        column(page, "tiny").get_by_text("ended: tool_calls").wait_for()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    column(page, "tiny").get_by_label("What get_weather returns").fill("sunny")
    column(page, "tiny").get_by_label("What get_weather returns").press("Control+Enter")
    column(page, "tiny").get_by_role("alert").wait_for()
    page.unroute("**/v1/chat/completions")
    with saying(served[0], "It is sunny."):
        column(page, "tiny").get_by_role("button", name="Try again").press("Enter")
        column(page, "tiny").get_by_text("It is sunny.").wait_for()
        column(page, "tiny").get_by_text("ended: stop").wait_for()
    assert page.evaluate("document.activeElement.ariaLabel") == "Answer 2" and column(page, "tiny").get_by_role("alert").count() == 0
    assert [m["content"] for m in command(page, "tiny")["messages"]][2:] == ["sunny"]
    visit.context.close()
    assert all("ERR_FAILED" in told for told in visit.wrong), visit.wrong


def command_before(page: Any) -> dict[str, Any]:
    page.get_by_label("Prompt").fill("hi")
    return command(page, "tiny")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[{"type": "function"', "not JSON yet"),
        (json.dumps(WEATHER), "put [ and ] around"),
        (json.dumps([WEATHER["function"]]), "Tool 1 needs the form"),
        (json.dumps([WEATHER, WEATHER]), "Tool 2: another tool is called get_weather too"),
        ('[{"type": "function", "function": {"name": "a b"}}]', "1 to 64 letters"),
        ('[{"type": "function", "function": {"name": "a", "parameters": []}}]', "(a): parameters must be a JSON Schema"),
    ],
)
def test_mistakes_are_told_as_they_are_typed(page: Any, text: str, told: str):
    page.get_by_label("Prompt").fill("hi")
    define(page, text)
    page.get_by_role("status").filter(has_text=told).wait_for()
    assert page.get_by_role("button", name="Ask").is_disabled()
    assert page.get_by_label("Definitions").get_attribute("aria-invalid") == "true"
    page.get_by_role("button", name="Clear").click()
    assert page.get_by_role("button", name="Ask").is_enabled() and "tools" not in command(page, "tiny")


def test_the_example_is_taken_by_the_server(page: Any, served: tuple[Site, str]):
    page.locator(".tools summary").click()
    page.get_by_role("button", name="Insert an example").click()
    assert "10428" in page.get_by_label("Prompt").input_value()
    page.get_by_text("May be called: get_order, cancel_order").wait_for()
    with saying(served[0], as_text("get_order", '{"order_id": "10428"}')):
        page.get_by_label("Tokens at most").fill("200")
        page.get_by_label("Prompt").press("Control+Enter")
        column(page, "tiny").get_by_role("listitem", name="Call of get_order").wait_for()
        column(page, "acme/a").get_by_text("ended: tool_calls").wait_for()


def test_markup_in_calls_is_dead(chromium: Any, served: tuple[Site, str]):
    """In arguments, their names, results, and in the name of a tool, where a server would let it through."""
    with Visit(chromium, served[1], width=390) as page:
        page.get_by_label("acme/a", exact=True).uncheck()
        event = {"index": 0, "id": "call_1", "type": "function", "function": {"name": EVIL, "arguments": json.dumps({EVIL: EVIL})}}
        half = {"index": 1, "id": "call_2", "type": "function", "function": {"name": EVIL, "arguments": EVIL}}
        chunk = {"choices": [{"delta": {"tool_calls": [event, half]}, "finish_reason": "tool_calls"}]}
        answer = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
        page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=answer))
        define(page, json.dumps([{"type": "function", "function": {"name": EVIL}}]))
        page.get_by_role("status").filter(has_text="1 to 64 letters").wait_for()
        define(page, json.dumps([WEATHER | {"function": WEATHER["function"] | {"description": EVIL}}]))
        ask(page, EVIL)
        cards = column(page, "tiny").get_by_role("listitem")
        cards.nth(1).wait_for()
        assert cards.nth(0).locator("dt").inner_text() == cards.nth(0).locator("dd").inner_text() == EVIL
        assert "no JSON object" in cards.nth(1).inner_text()
        cards.nth(0).get_by_label(f"What {EVIL} returns").fill(EVIL)
        cards.nth(1).get_by_label(f"What {EVIL} returns").fill(EVIL)
        column(page, "tiny").get_by_role("button", name="Send 2 results").click()
        column(page, "tiny").locator(".result").nth(1).wait_for()
        is_harmless(page, EVIL)
        refuse_overflow(page)
