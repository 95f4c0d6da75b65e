"""The app of `trimtab studio`: what a browser may run, who may read, and that a route gives what `RunFolders` gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fastapi import FastAPI

from tests.http.common import call
from tests.train.past import HOSTILE, run_folder, variant
from trimtab.http.page import POLICY
from trimtab.http.studio import create_studio
from trimtab.http.studio_auth import Shown
from trimtab.train.follow import RunFolders

PAGE = Path(__file__).parent.parent.parent / "src" / "trimtab" / "web" / "page"


@pytest.fixture
def runs(tmp_path: Path) -> RunFolders:
    run_folder(tmp_path / "r", {HOSTILE: variant()})
    return RunFolders(tmp_path)


def app_of(runs: RunFolders, **more) -> FastAPI:
    return create_studio(Shown(runs, **more))


def test_the_page_comes_with_a_policy_that_lets_nothing_else_run(runs: RunFolders):
    app = app_of(runs)
    page = call(app, "GET", "/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.content == (PAGE / "index.html").read_bytes()
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'" and "unsafe" not in POLICY
    assert page.headers["x-content-type-options"] == "nosniff" and page.headers["referrer-policy"] == "no-referrer"
    named = re.findall(r'(?:src|href)="(?!data:)(.*?)"', page.text)
    assert sorted(named) == ["./page/page.css", "./page/page.js"]
    for name in named:
        file = call(app, "GET", name.removeprefix("."))
        assert file.status_code == 200 and file.content == (PAGE / name).read_bytes() and "content-security-policy" in file.headers
        assert call(app, "GET", name.removeprefix("."), headers={"if-none-match": file.headers["etag"]}).status_code == 304


def test_the_built_page_needs_no_network_and_no_markup():
    """Nothing in it can call elsewhere or turn text into markup; the policy would stop it too, and then nothing would be shown."""
    for path in PAGE.rglob("*"):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        found = set(re.findall(r"https?://[\w.-]+", text)) - {"http://www.w3.org"}  # names of XML's namespaces
        assert found == set(), path
        assert not re.search(r"\beval\(|new Function|document\.write|importScripts", text), path
    assert "<script>" not in (PAGE / "index.html").read_text() and " style=" not in (PAGE / "index.html").read_text()


@pytest.mark.parametrize("name", ["nothing.js", "..%2freport%2freport.js", "%2e%2e%2freport.js", "page", "index.html%00"])
def test_no_other_file_is_given(runs: RunFolders, name: str):
    assert call(app_of(runs), "GET", f"/page/{name}").status_code == 404


def test_routes_give_what_the_folders_give(runs: RunFolders):
    app = app_of(runs)
    listed = call(app, "GET", "/studio/runs").json()
    assert listed["root"] == str(runs.root) and [r["name"] for r in listed["runs"]] == ["r"]
    key = listed["runs"][0]["id"]
    assert call(app, "GET", f"/studio/run?id={key}").json()["variants"][0]["name"] == HOSTILE
    assert call(app, "GET", f"/studio/metrics?id={key}").json()["variants"].keys() == {HOSTILE}
    assert call(app, "GET", f"/studio/doubts?ids={key}%2B{key}").json() == {"doubts": []} and listed["cut"] is False
    for path, status in (
        ("run?id=nothing", 404),
        ("metrics?id=..", 404),
        (f"doubts?ids={key}%2Bnothing", 404),
        (f"metrics?id={key}&start=-1", 400),
        (f"answers?id={key}&data=a", 404),
        (f"answers?id={key}&data=a&count=1000", 400),
        ("run", 400),
    ):
        answer = call(app, "GET", f"/studio/{path}")
        assert answer.status_code == status and answer.json()["error"]["message"], path
    assert call(app, "POST", "/studio/runs").status_code == 405


def test_elsewhere_than_here_a_token_is_needed(runs: RunFolders):
    app = app_of(runs, token="right")
    about = call(app, "GET", "/studio/about").json()
    assert about["keyed"] and about["runs"] and str(runs.root) not in str(about)
    for path in ("runs", "run?id=x", "doubts?ids=x", "metrics?id=x", "answers?id=x&data=a"):
        for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer "}, {"authorization": "Basic right"}):
            answer = call(app, "GET", f"/studio/{path}", headers=given)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer", (path, given)
    assert call(app, "GET", "/studio/runs", headers={"authorization": "Bearer right"}).status_code == 200
    assert not call(app_of(runs), "GET", "/studio/about").json()["keyed"]


def test_a_page_whose_name_was_pointed_here_reads_nothing(runs: RunFolders):
    app = app_of(runs, hosts=frozenset({"127.0.0.1:8050", "localhost:8050"}))
    for host, status in (("127.0.0.1:8050", 200), ("LOCALHOST:8050", 200), ("evil.example", 403), ("127.0.0.1:8051", 403)):
        for path in ("/", "/studio/runs"):
            assert call(app, "GET", path, headers={"host": host}).status_code == status, (host, path)


def test_a_run_that_holds_what_cannot_be_sent_is_sent_and_hides_no_other(tmp_path: Path):
    run_folder(tmp_path / "good", {"v": variant()})
    for name, text in (("half", '{"variants": {"\\ud800": {}}, "base": "\\ud800"}'), ("bad", '{"variants": [1]}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(text)
    app = app_of(RunFolders(tmp_path))
    runs = {r["name"]: r for r in call(app, "GET", "/studio/runs").json()["runs"]}
    assert {name: r["error"] for name, r in runs.items()} == {"good": None, "half": None, "bad": "cannot be read"}
    assert call(app, "GET", f"/studio/run?id={runs['half']['id']}").json()["base"] == "\\ud800"
    assert call(app, "GET", f"/studio/run?id={runs['bad']['id']}").status_code == 400
