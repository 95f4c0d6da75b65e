"""The page of `trimtab serve` in a real browser: its answers are those of the ordinary routes, its figures those of /metrics."""

from __future__ import annotations

import json
import math
import re
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.http.common import Site, base_of, site
from tests.http.test_tools import saying
from tests.store.common import stirred
from tests.tiny import tiny_model, tiny_tokenizer
from tests.web.common import EVIL, Visit, is_harmless, refuse_overflow, serving
from trimtab.http.assemble import Asked
from trimtab.methods import IA3Config, LoraConfig
from trimtab.model import Base
from trimtab.serve.tenants import Tenants
from trimtab.store.registry import Store

pytestmark = pytest.mark.slow
HOSTILE_BASE = EVIL[:60]


@dataclass
class Served:
    site: Site
    url: str
    store: Store
    keys: dict[str, str]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """acme/support in two versions, bolt/billing, and acme/odd, whose files hold markup."""
    made = Store(tmp_path_factory.mktemp("store") / "store", create=True)
    base = base_of()
    made.publish(stirred(base, LoraConfig(r=4), seed=1), "acme/support", aliases=["prod"])
    made.publish(stirred(base, LoraConfig(r=4, lora_alpha=16), seed=2), "acme/support")
    made.publish(stirred(base, IA3Config(), seed=3), "bolt/billing")
    odd = stirred(Base(tiny_model("llama"), tiny_tokenizer(), name=HOSTILE_BASE, fingerprint=base.fingerprint), LoraConfig(r=4), seed=4)
    scores = {"metrics": {EVIL: 1.5, "loss": 0.5, "token_f1": 61.25}, "base_metrics": {"loss": 2.5, "token_f1": 20}}
    run = {"options": {EVIL: EVIL}, "data_digest": EVIL, **scores}
    folder = odd.save(tmp_path_factory.mktemp("odd") / "odd", run=run)
    made.publish(folder, "acme/odd")
    return made


@pytest.fixture(scope="module")
def local(store: Store) -> Iterator[Served]:
    with site(Asked(store=store)) as made, serving(made.app) as url:
        yield Served(made, url, store, {})


@pytest.fixture(scope="module")
def town(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Tenants(tmp_path_factory.mktemp("tenants") / "tenants.db", create=True) as tenants:
        tenants.add("acme")
        tenants.add("root", namespaces=["acme", "bolt"], admin=True)
        keys = {n: tenants.create_key(n)[1] for n in ("acme", "root")}
        with site(Asked(store=store, tenants=tenants)) as made, serving(made.app) as url:
            yield Served(made, url, store, keys)


def column(page: Any, model: str) -> Any:
    return page.get_by_role("region", name=f"Answer of {model}", exact=True)


def ask(page: Any, prompt: str, tokens: int = 8) -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Tokens at most").fill(str(tokens))
    page.get_by_label("Prompt").press("Control+Enter")


def test_no_screen_stands_below_the_form_that_wants_a_key(chromium: Any, town: Served):
    visit = Visit(chromium, town.url)
    page = visit.page
    page.get_by_role("heading", name="A key is needed").wait_for()
    assert page.get_by_label("Prompt").count() == 0 and page.get_by_role("alert").count() == 0
    page.get_by_label("Key", exact=True).fill(town.keys["acme"])
    page.get_by_role("button", name="Use this key").click()
    page.get_by_label("Prompt").wait_for()
    page.get_by_label("acme/support", exact=True).wait_for()
    visit.context.close()
    assert visit.wrong and all("401" in told for told in visit.wrong), visit.wrong


def test_an_adapter_may_be_called_constructor(chromium: Any, tmp_path: Path):
    """Every object has something under that name: it is no answer."""
    folder = stirred(base_of(), LoraConfig(r=4), seed=1).save(tmp_path / "adapter")
    with site(Asked(adapters={"constructor": str(folder)})) as made, serving(made.app) as url, Visit(chromium, url) as page:
        page.get_by_label("constructor", exact=True).check()
        column(page, "constructor").get_by_text("No answer yet.").wait_for()
        ask(page, "hello there")
        column(page, "constructor").get_by_text("ended: length").wait_for()


def test_answers_side_by_side_are_those_of_the_routes(chromium: Any, local: Served):
    with Visit(chromium, local.url) as page:
        for name in ("acme/odd", "acme/support"):
            page.get_by_label(name, exact=True).wait_for()
        page.get_by_label("acme/odd", exact=True).uncheck()
        page.get_by_label("bolt/billing", exact=True).check()
        page.get_by_placeholder("Find, or name one").fill("acme/support@1")
        page.get_by_role("button", name="Add").click()
        page.get_by_label("System message").fill("Be brief.")
        ask(page, "hello there")
        models = ("tiny", "acme/support", "acme/support@1", "bolt/billing")
        texts = {}
        for model in models:
            column(page, model).get_by_text("ended: length").wait_for()
            messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello there"}]
            body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 8, "logprobs": True, "top_logprobs": 5}
            (choice,) = httpx.post(f"{local.url}v1/chat/completions", json=body).raise_for_status().json()["choices"]
            texts[model] = choice["message"]["content"]
            assert column(page, model).locator(".answer").text_content() == texts[model]
            assert "8 tokens" in column(page, model).locator(".figures").inner_text()
            tokens = column(page, model).locator(".token")
            seen = next(i for i, text in enumerate(tokens.all_text_contents()) if text.strip())
            tokens.nth(seen).hover()
            told = choice["logprobs"]["content"][seen]["top_logprobs"]
            assert column(page, model).locator(".share").all_inner_texts() == [share(t["logprob"]) for t in told]
        assert len(set(texts.values())) == len(models), "base and adapters differ, so none is shown in another's place"
        column(page, "acme/support").get_by_text("As a command").click()
        command = shlex.split(column(page, "acme/support").locator("code").last.inner_text())
        assert command[0] == "curl" and command[1] == f"{local.url}v1/chat/completions"
        again = httpx.post(command[1], json=json.loads(command[command.index("-d") + 1])).raise_for_status().json()
        assert again["choices"][0]["message"]["content"] == texts["acme/support"]


def share(logprob: float) -> str:
    percent = 100 * math.exp(logprob)
    return f"{math.floor(percent * 10 + 0.5) / 10:.1f}%" if percent >= 0.1 else "<0.1%"


def test_keys_go_through_an_answers_tokens(chromium: Any, local: Served):
    with Visit(chromium, local.url) as page:
        ask(page, "hello there", 6)
        column(page, "tiny").get_by_text("ended: length").wait_for()
        answer = column(page, "tiny").locator(".answer")
        assert column(page, "tiny").locator(".token").count() > 2
        answer.focus()
        page.keyboard.press("End")
        last = column(page, "tiny").locator(".token").last
        assert "at" in last.get_attribute("class")
        page.keyboard.press("Home")
        assert "at" in column(page, "tiny").locator(".token").first.get_attribute("class") and "at" not in last.get_attribute("class")


def test_stop_ends_the_answers_at_the_server(chromium: Any, local: Served, monkeypatch: pytest.MonkeyPatch):
    sampler = type(local.site.engine.sampler)
    draw = sampler.__call__

    def slow(self: Any, logits: Any, draws: Any) -> Any:
        time.sleep(0.02)  # 8 s for 400 tokens: the answers do not end before they are stopped
        return draw(self, logits, draws)

    monkeypatch.setattr(sampler, "__call__", slow)
    with saying(local.site, "hello " * 400), Visit(chromium, local.url) as page:
        ask(page, "hello", 400)
        page.get_by_text("first after").first.wait_for()
        page.get_by_role("button", name="Stop").click()
        page.locator(".caret").first.wait_for(state="detached")
        page.get_by_text("ended: stopped here").first.wait_for()
        assert page.get_by_role("button", name=re.compile("^Ask")).is_enabled()
        page.get_by_role("link", name="Serving").click()
        page.get_by_text("ended: abort").wait_for()
    local.site.idle()


def test_an_error_is_shown_where_its_answer_would_be(chromium: Any, local: Served):
    visit = Visit(chromium, local.url)
    page = visit.page
    page.get_by_placeholder("Find, or name one").fill(EVIL)
    page.get_by_role("button", name="Add").click()
    ask(page, EVIL)
    column(page, EVIL).get_by_role("alert").wait_for()
    assert "does not exist" in column(page, EVIL).get_by_role("alert").inner_text()
    column(page, "tiny").get_by_text("ended:").wait_for()
    is_harmless(page, EVIL)
    refuse_overflow(page)
    visit.context.close()
    assert all("404" in told for told in visit.wrong), visit.wrong


def test_a_tenant_sees_its_own_and_an_administrator_all(chromium: Any, town: Served):
    for who, models in (("acme", {"tiny", "acme/odd", "acme/support"}), ("root", {"tiny", "acme/odd", "acme/support", "bolt/billing"})):
        visit = Visit(chromium, town.url, f"#key={town.keys[who]}")
        page = visit.page
        page.get_by_label("acme/support", exact=True).wait_for()
        assert {x.inner_text().strip() for x in page.locator(".models label").all()} == models
        assert town.keys[who] not in page.url and town.keys[who] not in page.content()
        page.get_by_placeholder("Find, or name one").fill("bolt/billing")
        page.get_by_role("button", name="Add").click()
        ask(page, "hi")
        found = column(page, "bolt/billing").get_by_text("ended:" if who == "root" else "does not exist")
        found.wait_for()
        page.get_by_role("link", name="Adapters").click()
        page.get_by_role("link", name="acme/support@2").wait_for()
        assert page.get_by_role("link", name="bolt/billing@1").count() == (who == "root")
        page.get_by_role("link", name="Serving").click()
        if who == "root":
            rows = page.get_by_role("region", name="All tenants").get_by_role("row")
            rows.nth(2).wait_for()
            assert any("root (admin)" in r.inner_text() for r in rows.all())
        else:
            page.get_by_text("Load is shown to administrators").wait_for()
        visit.context.close()
        assert all("40" in told for told in visit.wrong), visit.wrong


def test_versions_cards_and_differences(chromium: Any, local: Served):
    expected = local.store.diff("acme/support@1", "acme/support@2")
    with Visit(chromium, local.url, "#/adapters") as page:
        page.get_by_role("link", name="acme/support@2").click()
        page.get_by_role("heading", name="acme/support@2").wait_for()
        settings = page.get_by_role("region", name="Settings that differ")
        settings.wait_for()
        assert {x.inner_text() for x in settings.get_by_role("rowheader").all()} == {c.key for c in expected.config}
        most = max(expected.tensors, key=lambda n: expected.tensors[n])
        first = page.get_by_role("region", name="Tensors that changed most").get_by_role("row").nth(1)
        assert most in first.inner_text() and f"{expected.tensors[most]:.3g}" in first.inner_text()
        page.get_by_role("button", name="@1", exact=True).click()
        page.get_by_role("heading", name="acme/support@1").wait_for()
        assert local.store.resolve("acme/support@1").digest in page.locator(".pairs").inner_text()
        assert "trimtab adapters alias acme/support@1 prod" in page.get_by_role("region", name="Aliases").inner_text()
        page.get_by_label("Compare to").select_option("acme/support@1")
        page.get_by_text("adapter_config.json says the same.").wait_for()


def test_scores_have_the_names_that_a_runs_page_gives_them(chromium: Any, local: Served):
    with Visit(chromium, local.url, "#/adapters/acme%2Fodd") as page:
        table = page.get_by_role("region", name="Scores of this version")
        table.wait_for()
        rows = [row.locator("th, td").all_inner_texts() for row in table.locator("tbody tr").all()]
        assert rows[1:] == [["test loss", "2.5", "0.5"], ["F1, %", "20.0", "61.3"]], rows


@pytest.mark.parametrize(("width", "scheme"), [(1440, "dark"), (1024, "light"), (390, "dark")])
def test_screens_fit_and_hostile_files_are_texts(chromium: Any, local: Served, width: int, scheme: str):
    with Visit(chromium, local.url, "#/adapters/acme%2Fodd", width=width, scheme=scheme) as page:
        page.get_by_role("heading", name="Files").wait_for()
        is_harmless(page, EVIL)
        refuse_overflow(page)
        page.get_by_role("link", name="Adapters", exact=True).first.click()
        page.get_by_role("link", name="acme/odd@1").wait_for()
        is_harmless(page, HOSTILE_BASE)
        refuse_overflow(page)
        for screen, sign in (("Playground", "No answer yet."), ("Serving", "How requests ended")):
            page.get_by_role("link", name=screen).click()
            page.get_by_text(sign).first.wait_for()
            refuse_overflow(page)


def test_figures_are_those_of_the_metrics(chromium: Any, store: Store):
    with site(Asked(store=store)) as made, serving(made.app) as url:
        for n in range(1, 6):
            body = {"model": "acme/support", "prompt": "hello", "max_tokens": n, "temperature": 0, "ignore_eos": True}
            httpx.post(f"{url}v1/completions", json=body).raise_for_status()
        text = httpx.get(f"{url}metrics").text
        with Visit(chromium, url, "#/serving") as page:
            ends = page.get_by_role("region", name="Requests by how they ended")
            ends.wait_for()
            assert [x.inner_text() for x in ends.get_by_role("cell").all()] == ["5"]
            row = page.get_by_role("region", name="Latency quantiles").get_by_role("row").filter(has_text="whole answer")
            cells = [x.inner_text() for x in row.get_by_role("cell").all()]
            name = "trimtab_e2e_request_latency_seconds"
            mean, half, most = mean_of(text, name), edge(text, name, 0.5), edge(text, name, 0.9)
            assert cells[4:7] == [duration(mean), f"≤ {duration(half)}", f"≤ {duration(most)}"] and cells[-1] == "5"
            memory = page.get_by_role("region", name="Adapters in memory").inner_text().split("\n")
            facts = dict(zip(memory[1::2], memory[2::2], strict=False))
            assert facts["in memory"] == "1" and facts["loads"] == "1" and facts["used by requests"] == "0"


@pytest.mark.parametrize("prefix", ["trimtab_", "vllm:"])
def test_quantiles_and_rates_by_hand(chromium: Any, local: Served, prefix: str):
    """2 of 10 answers within 0.1 s, 6 within 0.5, all within 1: half of them were within 0.5, which is all that is known."""
    buckets = {"0.1": 2, "0.5": 6, "1.0": 10, "+Inf": 10}
    name = f"{prefix}e2e_request_latency_seconds"
    text = (
        "".join(f'{name}_bucket{{le="{edge}",model_name="a\\"b"}} {count}\n' for edge, count in buckets.items())
        + f'{name}_count{{model_name="m"}} 10\n{name}_sum{{model_name="m"}} 4.2\n'
    )
    tokens = iter(range(0, 10**6, 100))  # a hundred more with each reading, every two seconds
    visit = Visit(chromium, local.url)
    with visit as page:
        page.route(
            "**/metrics",
            lambda route: route.fulfill(body=f"{text}{prefix}generation_tokens_total {next(tokens)}\n", content_type="text/plain"),
        )
        page.get_by_role("link", name="Serving").click()
        row = page.get_by_role("region", name="Latency quantiles").get_by_role("row").filter(has_text="whole answer")
        row.wait_for()
        assert [x.inner_text() for x in row.get_by_role("cell").all()] == ["–", "–", "–", "–", "420 ms", "≤ 500 ms", "≤ 1 s", "≤ 1 s", "10"]
        page.get_by_role("application").nth(2).wait_for()
        rate = page.locator(".tiles > div").filter(has_text="new tokens/s").locator("dd").first
        page.wait_for_timeout(100)
        assert 0 < float(rate.inner_text()) <= 50.5, "a hundred in two seconds or, on a slow machine, in more"


def test_the_last_minute_is_by_the_clock_and_a_new_start_counts_from_nought(chromium: Any, local: Served):
    name = "trimtab_e2e_request_latency_seconds"
    counts = [0]

    def metrics(route: Any) -> None:
        n = counts[0]
        text = f'{name}_bucket{{le="0.1"}} {n}\n{name}_bucket{{le="+Inf"}} {n}\n{name}_count {n}\n{name}_sum {n / 20}\n'
        route.fulfill(body=text, content_type="text/plain")

    with Visit(chromium, local.url) as page:
        page.clock.install()
        page.route("**/metrics", metrics)
        page.get_by_role("link", name="Serving").click()
        row = page.get_by_role("region", name="Latency quantiles").get_by_role("row").filter(has_text="whole answer")
        row.wait_for()
        cells = lambda: [x.inner_text() for x in row.get_by_role("cell").all()]  # noqa: E731
        counts[0] = 10
        page.clock.fast_forward(600_000)  # as a page that was hidden for ten minutes
        page.wait_for_function("() => document.querySelector('#latency').closest('section').innerText.includes('50 ms')")
        assert cells()[:6] == ["–", "–", "–", "–", "50 ms", "≤ 100 ms"] and cells()[-1] == "10", "not of the last minute"
        counts[0] = 4
        page.clock.fast_forward(2500)
        page.wait_for_function("() => document.querySelectorAll('#latency').length")
        row.get_by_role("cell").last.filter(has_text="4").wait_for()
        assert cells()[:2] == ["50 ms", "≤ 100 ms"] and cells()[-1] == "4", "of the new server's own four"


def edge(text: str, name: str, q: float) -> float:
    """Of the first bucket that holds a share of all."""
    found = [(float(e), float(c)) for e, c in re.findall(rf'^{name}_bucket{{le="([^"]+)".*}} (\S+)$', text, re.MULTILINE)]
    return next(e for e, c in found if c >= q * found[-1][1])


def mean_of(text: str, name: str) -> float:
    whole, count = (float(re.findall(rf"^{name}_{what}{{.*}} (\S+)$", text, re.MULTILINE)[0]) for what in ("sum", "count"))
    return whole / count


def duration(seconds: float) -> str:
    return f"{math.floor(seconds * 1000 + 0.5)} ms" if seconds < 1 else f"{float(f'{seconds:.3g}'):g} s"
