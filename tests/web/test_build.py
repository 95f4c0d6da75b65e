"""What is shipped is what the sources give, and axe has nothing against it. Both need npm and its registry."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.http.common import base_of, site
from tests.http.test_tools import PICK, base_with, saying
from tests.store.common import stirred
from tests.train.common import locked
from tests.train.past import predictions, run_folder, variant
from tests.web.common import ROOT, Visit, browser, serving
from tests.web.test_control import KEY, planned
from tests.web.test_control import site as control
from trimtab.http.assemble import Asked
from trimtab.http.studio import create_studio
from trimtab.http.studio_auth import Shown
from trimtab.methods import LoraConfig
from trimtab.store.registry import Store
from trimtab.train.follow import RunFolders
from trimtab.train.page import write_page

WEB, BUILT = ROOT / "web", ROOT / "src" / "trimtab" / "web"
OWN = ("src", "index.html", "package.json", "package-lock.json", "tsconfig.json", "vite.config.ts", "report.config.ts")


@pytest.fixture(scope="module")
def front_end(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of web/ with what it depends on."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("front") / "web"
    folder.mkdir()
    for name in OWN:
        (shutil.copytree if (WEB / name).is_dir() else shutil.copy)(WEB / name, folder / name)
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("npm does not reach its registry")
    if done.returncode != 0 and re.search(r"ENOTFOUND|ECONNREFUSED|ETIMEDOUT|EAI_AGAIN|E40[34]", done.stderr):
        pytest.skip("npm does not reach its registry")
    assert done.returncode == 0, done.stderr
    return folder


def test_versions_are_pinned_and_no_registry_is_named():
    package, lock = (json.loads((WEB / name).read_text()) for name in ("package.json", "package-lock.json"))
    wanted = package["dependencies"] | package["devDependencies"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in wanted.values()), wanted
    assert {name: lock["packages"][f"node_modules/{name}"]["version"] for name in wanted} == wanted
    assert all("integrity" in p for path, p in lock["packages"].items() if path)
    assert not re.search(r"resolved|https?://(?!opencollective|github|paulmillr|feross|tidelift)", (WEB / "package-lock.json").read_text())


@pytest.mark.slow
def test_what_is_shipped_is_what_the_sources_give(front_end: Path, tmp_path: Path):
    vite = ["node", "node_modules/vite/bin/vite.js", "build"]
    for command in (
        ["node", "node_modules/typescript/bin/tsc", "--noEmit"],
        [*vite, "--outDir", str(tmp_path / "page"), "--emptyOutDir"],
        [*vite, "--config", "report.config.ts", "--outDir", str(tmp_path / "report"), "--emptyOutDir"],
    ):
        done = subprocess.run(command, cwd=front_end, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    made, kept = ({str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()} for root in (tmp_path, BUILT))
    assert made.keys() == kept.keys()
    assert [name for name in made if made[name] != kept[name]] == [], "run `make page`"


@pytest.mark.slow
def test_axe_finds_nothing_with_runs(front_end: Path, tmp_path: Path):
    run_folder(tmp_path / "done", {"v": variant(), "w": variant(stopped="the loss is nan")})
    run_folder(tmp_path / "live", {"v": variant()}, summary=False)
    source = (front_end / "node_modules" / "axe-core" / "axe.min.js").read_text()
    found: dict[str, Any] = {}
    with browser() as chromium, serving(create_studio(Shown(RunFolders(tmp_path)))) as url:
        for scheme, width in (("light", 1280), ("dark", 390)):
            with Visit(chromium, url, scheme=scheme, width=width, bypass_csp=True) as page:
                page.get_by_role("link", name="done").wait_for()
                found[f"list {scheme}"] = faults(page, source)
                page.get_by_role("link", name="done").click()
                page.get_by_role("heading", name="Settings").wait_for()
                found[f"run {scheme}"] = faults(page, source)
    assert {k: v for k, v in found.items() if v} == {}


@pytest.mark.slow
def test_axe_finds_nothing_in_a_report(front_end: Path, tmp_path: Path):
    run = run_folder(tmp_path / "r", {"v": variant(), "w": variant(trainable=5, scores=variant()["scores"] | {"exact_match": 9.0})})
    said = [{"prompt": "p", "reference": r, "answer": a, "correct": r == a} for r, a in (("bug", "bug"), ("bug", "wish"), ("wish", "x"))]
    predictions(run, "a", base=said * 3, v=said * 3)
    write_page([run], tmp_path / "report.html")
    source = (front_end / "node_modules" / "axe-core" / "axe.min.js").read_text()
    found: dict[str, Any] = {}
    with browser() as chromium:
        for scheme, width in (("light", 1280), ("dark", 390)):
            with Visit(chromium, f"file://{tmp_path}/", "report.html", scheme=scheme, width=width, bypass_csp=True) as page:
                page.locator(".matrix").wait_for()
                found[scheme] = faults(page, source)
    assert {k: v for k, v in found.items() if v} == {}


@pytest.mark.slow
def test_axe_finds_nothing_with_a_server(front_end: Path, tmp_path: Path):
    store = Store(tmp_path / "store", create=True)
    for seed in (1, 2):
        store.publish(stirred(base_of(), LoraConfig(r=4), seed=seed), "acme/support")
    source = (front_end / "node_modules" / "axe-core" / "axe.min.js").read_text()
    found: dict[str, Any] = {}
    with browser() as chromium, site(Asked(store=store)) as made, serving(made.app) as url:
        for scheme, width in (("light", 1280), ("dark", 390)):
            with Visit(chromium, url, scheme=scheme, width=width, bypass_csp=True) as page:
                page.get_by_label("acme/support", exact=True).wait_for()
                page.get_by_label("Prompt").fill("hello there")
                page.get_by_label("Tokens at most").fill("8")
                page.get_by_label("Prompt").press("Control+Enter")
                page.get_by_text("ended:").nth(1).wait_for()
                found[f"playground {scheme}"] = faults(page, source)
                page.get_by_role("link", name="Adapters").click()
                page.get_by_role("link", name="acme/support@2").wait_for()
                found[f"adapters {scheme}"] = faults(page, source)
                page.get_by_role("link", name="acme/support@2").click()
                page.get_by_role("heading", name="Files").wait_for()
                found[f"adapter {scheme}"] = faults(page, source)
                page.get_by_role("link", name="Serving").click()
                page.get_by_role("application").nth(2).wait_for()
                found[f"serving {scheme}"] = faults(page, source)
    assert {k: v for k, v in found.items() if v} == {}


@pytest.mark.slow
def test_axe_finds_nothing_with_tools(front_end: Path):
    source = (front_end / "node_modules" / "axe-core" / "axe.min.js").read_text()
    found: dict[str, Any] = {}
    with browser() as chromium, site(base=base_with("qwen2_5"), kv_bytes=64 << 20) as made, serving(made.app) as url:
        for scheme, width in (("light", 1280), ("dark", 390)):
            with Visit(chromium, url, scheme=scheme, width=width, bypass_csp=True) as page:
                page.locator(".tools summary").click()
                page.get_by_label("Definitions").fill("[1]")
                page.get_by_text("Tool 1 is no object").wait_for()
                found[f"mistake {scheme}"] = faults(page, source)
                page.get_by_label("Definitions").fill(json.dumps([PICK]))
                page.get_by_label("Tokens at most").fill("60")
                with saying(made, '<tool_call>\n{"name": "pick", "arguments": {"n": 7, "kind": "a"}}\n</tool_call>'):
                    page.get_by_label("Prompt").fill("hello there")
                    page.get_by_label("Prompt").press("Control+Enter")
                    page.get_by_text("ended: tool_calls").wait_for()
                found[f"call {scheme}"] = faults(page, source)
                page.get_by_label("What pick returns").fill("42")
                page.get_by_role("button", name="Send the result").click()
                page.get_by_text("ended:").nth(1).wait_for()
                page.get_by_text("As the model wrote it").click()
                found[f"result {scheme}"] = faults(page, source)
    assert {k: v for k, v in found.items() if v} == {}


@pytest.mark.slow
def test_axe_finds_nothing_with_rows(front_end: Path, tmp_path: Path, tiny_llama_folder: Path):
    rows = [{"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": f"a {i}"}]} for i in range(30)]
    (tmp_path / "tickets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]) + "{broken\n")
    source = (front_end / "node_modules" / "axe-core" / "axe.min.js").read_text()
    shown = Shown(RunFolders(tmp_path), base=str(tiny_llama_folder))
    found: dict[str, Any] = {}
    with browser() as chromium, serving(create_studio(shown)) as url:
        for scheme, width in (("light", 1280), ("dark", 390)):
            with Visit(chromium, url, "#/data", scheme=scheme, width=width, bypass_csp=True) as page:
                page.get_by_role("button", name="tickets.jsonl").wait_for()
                found[f"files {scheme}"] = faults(page, source)
                page.get_by_role("button", name="tickets.jsonl").click()
                page.get_by_role("article").first.wait_for(timeout=60_000)
                page.get_by_role("button", name="1 not JSON").click()
                page.get_by_text("tickets.jsonl:32").wait_for()
                found[f"rows {scheme}"] = faults(page, source)
                page.get_by_role("link", name="Train on it").click()
                page.get_by_text("Nothing is wrong with it.").wait_for(timeout=60_000)
                page.get_by_label("batch_size").fill("none")
                page.get_by_text("One thing is wrong with it").wait_for()
                found[f"new run {scheme}"] = faults(page, source)
                page.get_by_label("batch_size").fill("4")
                page.get_by_role("button", name="Read the rows and estimate").click()
                page.get_by_text("GB are free").wait_for(timeout=60_000)
                found[f"cost {scheme}"] = faults(page, source)
                page.get_by_label("Objective").select_option("grpo")
                page.get_by_role("button", name="Add a reward").click()
                page.get_by_role("group", name="Reward 1").get_by_label("Reward", exact=True).select_option("json_schema")
                page.get_by_role("group", name="Reward 2").get_by_label("Reward", exact=True).select_option("a function in a file")
                page.get_by_text("More settings of grpo").click()
                page.get_by_text("wrong with it:").wait_for()
                found[f"rewards {scheme}"] = faults(page, source)
    shown.close()
    assert {k: v for k, v in found.items() if v} == {}


@pytest.mark.slow
def test_axe_finds_nothing_with_what_changes_the_store(front_end: Path, tmp_path: Path):
    run = run_folder(tmp_path / "runs" / "done", {"v": variant()})
    stirred(base_of(), LoraConfig(r=4), seed=1).save(run / "adapters" / "v")
    store = Store(tmp_path / "store", create=True)
    for seed in (1, 2):
        store.publish(stirred(base_of(), LoraConfig(r=4), seed=seed), "acme/support")
    source = (front_end / "node_modules" / "axe-core" / "axe.min.js").read_text()
    shown = Shown(RunFolders(tmp_path / "runs"), store, key="k")
    found: dict[str, Any] = {}
    with browser() as chromium, serving(create_studio(shown)) as url:
        for scheme, width in (("light", 1280), ("dark", 390)):
            with Visit(chromium, url, "#key=k", scheme=scheme, width=width, bypass_csp=True) as page:
                page.get_by_role("link", name="Adapters").click()
                page.get_by_role("button", name="Publish", exact=True).wait_for()
                found[f"publish {scheme}"] = faults(page, source)
                page.get_by_role("link", name="acme/support@2").click()
                page.get_by_role("textbox", name="Alias for acme/support@2").fill("prod")
                page.get_by_role("heading", name="Files").wait_for()
                found[f"changes {scheme}"] = faults(page, source)
    shown.close()
    assert {k: v for k, v in found.items() if v} == {}


@pytest.mark.slow
def test_axe_finds_nothing_with_what_controls_runs(front_end: Path, tmp_path: Path):
    run = planned(tmp_path / "r", "v", "w", "x", paused=["w"], ended={"x": "stopped by hand at step 3"}, refused={"y": "no room"})
    (tmp_path / "r.log").write_text("training\n")
    (tmp_path / "run.yaml").write_text("{base: b, out: o, data: {}, variants: {}}")
    source = (front_end / "node_modules" / "axe-core" / "axe.min.js").read_text()
    found: dict[str, Any] = {}
    with browser() as chromium, control(tmp_path) as (url, _), locked(run):
        for scheme, width in (("light", 1280), ("dark", 390)):
            with Visit(chromium, url, f"#key={KEY}", scheme=scheme, width=width, bypass_csp=True) as page:
                page.get_by_label("Run file").wait_for()
                found[f"begin {scheme}"] = faults(page, source)
                page.get_by_role("link", name="r", exact=True).click()
                page.get_by_role("button", name="Clone v").click()
                page.get_by_text("What r prints").click()
                page.get_by_label("Name of the clone").wait_for()
                found[f"clone {scheme}"] = faults(page, source)
                page.get_by_role("button", name="Stop v").click()
                page.get_by_role("alertdialog").wait_for()
                found[f"stop {scheme}"] = faults(page, source)
    assert {k: v for k, v in found.items() if v} == {}


def faults(page: Any, axe: str) -> list[str]:
    """What axe finds on a page, by its rules of WCAG 2.2 A and AA and of good practice."""
    page.evaluate(f"() => {{ {axe} }}")
    result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [f"{v['id']}: {n['html'][:160]} {n['failureSummary'][-200:]}" for v in result["violations"] for n in v["nodes"]]
