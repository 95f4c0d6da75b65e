"""Rows over HTTP: who may ask, for which files, and that nothing in a file or a run hurts the studio."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from tests.http.common import call
from tests.train.past import run_folder, variant
from trimtab.http.studio import create_studio
from trimtab.http.studio_auth import Shown
from trimtab.train.follow import RunFolders
from trimtab.train.rows_process import Answering, answer

ROW = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[Shown]:
    (tmp_path / "root").mkdir()
    made = Shown(RunFolders(tmp_path / "root"))
    yield made
    made.close()


def open_rows(app: FastAPI, body: Any, **headers: str) -> Any:
    return call(app, "POST", "/studio/rows/open", body, headers=headers)


def until_read(app: FastAPI, key: str) -> dict[str, Any]:
    for _ in range(600):
        told = call(app, "GET", f"/studio/rows/state?key={key}").json()
        if told["state"] != "reading":
            return told
        time.sleep(0.05)
    raise AssertionError(told)


def test_another_page_can_start_no_reading(shown: Shown):
    app = create_studio(shown)
    (shown.runs.root / "a.jsonl").write_text(json.dumps(ROW))
    for headers, status in (
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://test.evil.example"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": ""}, 415),
    ):
        assert open_rows(app, {"path": "a.jsonl"}, **headers).status_code == status, headers
    assert shown.reader._process is None and not shown.reader._readings


def test_bodies_have_a_limit_and_a_shape(shown: Shown):
    app = create_studio(shown)
    for body, status in (
        (b"{", 400),
        (b"[]", 400),
        (b'{"path": 1}', 400),
        (b'{"path": "a", "file": "b"}', 400),
        (b'{"path": "a", "run": "b"}', 400),
        (b"{}", 400),
        (b'{"path": ' + b"[" * 2000 + b"]" * 2000 + b"}", 400),
        (b'{"path": "' + b"x" * (1 << 20) + b'"}', 413),
    ):
        found = open_rows(app, body)
        assert found.status_code == status and found.json()["error"]["message"], body[:40]


def test_elsewhere_than_here_a_token_is_needed(tmp_path: Path):
    made = Shown(RunFolders(tmp_path), token="right")
    app = create_studio(made)
    for path in ("files", "rows/state?key=k", "rows?key=k&data=d&split=s", "rows/dropped?key=k&data=d&split=s"):
        assert call(app, "GET", f"/studio/{path}").status_code == 401, path
    assert open_rows(app, {"path": "a"}).status_code == 401
    assert open_rows(app, {"path": "a"}, authorization="Bearer right").status_code == 404


def test_no_path_leads_out_of_the_shown_folders(shown: Shown, tmp_path: Path):
    (tmp_path / "secret.jsonl").write_text(json.dumps(ROW))
    (shown.runs.root / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    app = create_studio(shown)
    told = set()
    for path in ("../secret.jsonl", str(tmp_path / "secret.jsonl"), "link.jsonl", "/etc/passwd", "\x00", "x" * 5000, "~root", "absent"):
        found = open_rows(app, {"path": path})
        assert found.status_code == 404, path
        told.add(found.json()["error"]["message"].partition("is not in")[2])
    assert len(told) == 1, "a file that is there and one that is not are told alike"
    assert open_rows(app, {"run": "nothing"}).status_code == 404


def test_files_are_listed_with_the_folders_that_are_shown(tmp_path: Path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.csv").write_text("text\n")
    (tmp_path / "runs" / "a.jsonl").write_text("{}")
    found = call(create_studio(Shown(RunFolders(tmp_path / "runs"), data=(tmp_path / "more",))), "GET", "/studio/files").json()
    assert [f["path"] for f in found["files"]] == [str(tmp_path / "more" / "b.csv"), "a.jsonl"] and not found["cut"]
    assert found["folders"] == [str(tmp_path / "runs"), str(tmp_path / "more")]


def test_whatever_is_asked_of_the_process_is_answered(tmp_path: Path):
    """In this process: each line has one answer, and none of them is an exception."""
    answering = Answering(lambda text: None)
    for line in (
        "no json",
        "[]",
        "{}",
        json.dumps({"do": "nothing"}),
        json.dumps({"do": "rows", "key": "k", "data": "d", "split": "s", "start": 0, "count": 1}),
        json.dumps({"do": "check", "key": "k", "text": "a: [", "root": str(tmp_path), "allowed": [str(tmp_path)]}),
        json.dumps({"do": "check", "key": "k", "text": "- a", "root": str(tmp_path), "allowed": [str(tmp_path)]}),
        json.dumps({"do": "open", "key": "k", "subject": str(tmp_path / "absent.csv"), "base": "b", "allowed": [str(tmp_path)]}),
        json.dumps({"do": "open", "key": "k", "subject": str(tmp_path), "base": "b", "allowed": [str(tmp_path)]}),
    ):
        found = answer(answering, line)
        assert found.keys() == {"error"} and found["error"]["message"] and found["error"]["status"] in (400, 404, 410), line
    assert answer(answering, json.dumps({"do": "rows", "key": "k"}))["error"]["status"] == 410


@pytest.mark.slow
def test_rows_are_read_by_a_process_that_may_be_killed(shown: Shown, tiny_llama_folder: Path, own_cache: Path, tmp_path: Path):
    shown = replace(shown, base=str(tiny_llama_folder))
    root = shown.runs.root
    (root / "a.jsonl").write_text("".join(json.dumps(ROW).replace("one", f"one {i}") + "\n" for i in range(30)) + "{broken\n")
    app = create_studio(shown)
    opened = open_rows(app, {"path": "a.jsonl", "base": str(tiny_llama_folder)}, origin="http://test").json()
    told = until_read(app, opened["key"])
    assert told["state"] == "ready", told["error"]
    train = next(s for s in told["report"]["data"][0]["splits"] if s["name"] == "train")
    assert train["dropped"] == [{"kind": "not JSON", "count": 1, "fix": ""}]
    page = f"/studio/rows?key={opened['key']}&data={told['report']['data'][0]['name']}&split=train&count=2"
    rows = call(app, "GET", page).json()
    assert rows["total"] == train["rows"] and ["two<|im_end|>", 1] not in rows["rows"][0]["segments"][0]["runs"]
    assert ["two", 1] in rows["rows"][0]["segments"][0]["runs"]
    lost = call(app, "GET", page.replace("rows?", "rows/dropped?")).json()
    assert lost["rows"][0]["origin"] == "a.jsonl:31"
    process = shown.reader._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)  # as the system does where memory is short
    process.wait()
    assert call(app, "GET", page).json() == rows, "it is read anew"
    for bad, status in (("&count=51", 400), ("&start=-1", 400), ("&order=best", 400), ("&split=valids", 404), ("&key=other", 404)):
        assert call(app, "GET", f"{page}{bad}").status_code == status, bad
    # a run that names files elsewhere, as anybody's run folder may
    (tmp_path / "secret.jsonl").write_text(json.dumps({"text": "s3cret"}))
    run_folder(root / "evil", {"v": variant()}, settings={"base": str(tiny_llama_folder), "data.a.train": [{"path": "../secret.jsonl"}]})
    key = next(k for k, folder in shown.runs.found().items() if folder.name == "evil")
    told = until_read(app, open_rows(app, {"run": key}).json()["key"])
    assert told["state"] == "failed" and "outside of the folders" in told["error"] and "s3cret" not in told["error"]
    shown.close()
    assert call(app, "GET", page).status_code == 503
