"""The routes that change runs: who may use them, what they refuse, and what they begin."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from fastapi import FastAPI

from tests.http.common import call
from tests.train.common import run_file
from tests.train.past import run_folder, variant
from trimtab.http.studio import create_studio
from trimtab.http.studio_auth import Shown
from trimtab.methods import LoraConfig
from trimtab.train.beginning import log_of
from trimtab.train.clone import described
from trimtab.train.control import CONTROL
from trimtab.train.follow import RunFolders
from trimtab.train.options import TrainOptions, VariantConfig

KEY = "k" * 32


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = run_folder(tmp_path / "r", {"v": variant()}, summary=False)
    told = described(VariantConfig(name="v", data="a", method=LoraConfig(r=4), options=TrainOptions(lr=1e-3)))
    (folder / "run.json").write_text(json.dumps({"steps": {"v": 100}, "variants": {"v": told}, "settings": {}}))
    return folder


@pytest.fixture
def app(run: Path) -> FastAPI:
    return create_studio(Shown(RunFolders(run.parent), key=KEY, hosts=frozenset({"testserver"})))


def post(app: FastAPI, path: str, body: Any, **headers: str) -> httpx.Response:
    return call(app, "POST", f"/studio/{path}", body, headers={"host": "testserver", "authorization": f"Bearer {KEY}"} | headers)


def get(app: FastAPI, path: str) -> httpx.Response:
    return call(app, "GET", f"/studio/{path}", headers={"host": "testserver"})


@pytest.fixture
def key(app: FastAPI) -> str:
    found: str = get(app, "runs").json()["runs"][0]["id"]
    return found


def test_orders_are_written_as_the_commands_write_them(app: FastAPI, run: Path, key: str):
    assert post(app, "order", {"id": key, "do": "pause", "variants": ["v"]}).json() == {"runs": False}
    assert json.loads((run / CONTROL).read_text())["variants"] == {"v": "pause"}
    control = get(app, f"run?id={key}").json()["control"]
    assert control == {"takes": True, "paused": [], "ended": {}, "refused": {}, "asked": {"v": "pause"}, "clones": []}
    assert post(app, "clone", {"id": key, "of": "v", "name": "v2", "changes": ["lr=1e-4", "r=8"]}).status_code == 200
    assert json.loads((run / CONTROL).read_text())["clones"] == {"v2": {"of": "v", "set": {"lr": 1e-4, "r": 8}}}
    assert post(app, "order", {"id": key, "do": "resume", "variants": ["v"]}).status_code == 200
    assert json.loads((run / CONTROL).read_text())["variants"] == {}
    assert post(app, "order", {"id": key, "do": "stop", "variants": ["v"]}).status_code == 200
    assert json.loads((run / CONTROL).read_text())["variants"] == {"v": "stop"}


def test_what_a_killed_writer_has_left_goes_with_the_next_order(app: FastAPI, run: Path, key: str):
    left, others = run / f".{CONTROL}.0123456789ab.new", run / ".summary.json.0123456789ab.new"
    for path in (left, others):
        path.write_text("{")
    assert post(app, "order", {"id": key, "do": "pause", "variants": ["v"]}).status_code == 200
    assert not left.exists() and others.exists(), "the others may be written now, by the run"


def test_a_clone_that_is_asked_for_again_comes_after_what_it_is_made_of(app: FastAPI, run: Path, key: str):
    """A run that is resumed lets clones join in the order of the file."""
    assert post(app, "clone", {"id": key, "of": "v", "name": "again"}).status_code == 200
    plan = json.loads((run / "run.json").read_text())
    joined = {"steps": plan["steps"] | {"v2": 100}, "variants": plan["variants"] | {"v2": plan["variants"]["v"]}}
    assert post(app, "clone", {"id": key, "of": "v", "name": "v2"}).status_code == 200
    (run / "run.json").write_text(json.dumps(plan | joined | {"control": {"refused": {"again": "it could not"}}}))
    assert post(app, "clone", {"id": key, "of": "v2", "name": "again"}).status_code == 200
    clones = json.loads((run / CONTROL).read_text())["clones"]
    assert [*clones] == ["v2", "again"] and clones["again"]["of"] == "v2"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": ""}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://testserver:81"}, 403),
        ({"origin": "http://["}, 403),
        ({"origin": "http://[::1"}, 403),
        ({"origin": "ftp://testserver"}, 403),
        ({"origin": "http://testserver/"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"host": "evil.example"}, 403),
    ],
)
@pytest.mark.parametrize(
    ("path", "body"), [("order", {"do": "pause"}), ("clone", {"of": "v", "name": "v2"}), ("begin", {"file": "run.yaml"})]
)
def test_only_the_page_with_the_key_may(
    app: FastAPI, run: Path, key: str, path: str, body: dict[str, Any], headers: dict[str, str], status: int
):
    sent = body if path == "begin" else body | {"id": key}
    assert post(app, path, sent, **headers).status_code == status
    assert not (run / CONTROL).exists()


def test_a_page_that_has_no_key_changes_nothing(run: Path):
    app = create_studio(Shown(RunFolders(run.parent)))
    found = call(app, "GET", "/studio/runs").json()["runs"][0]["id"]
    assert call(app, "GET", "/studio/about").json()["changes"] is False
    answer = call(app, "POST", "/studio/order", {"id": found, "do": "pause"}, headers={"authorization": "Bearer "})
    assert answer.status_code == 403 and not (run / CONTROL).exists()


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("order", {"id": "0" * 16, "do": "pause"}, 404, "no such run"),
        ("order", {"id": "../..", "do": "pause"}, 404, "no such run"),
        ("order", {"do": "kill"}, 400, "do: "),
        ("order", {"do": "pause", "variants": ["x"]}, 400, "no variant of this run"),
        ("order", {"do": "pause", "more": 1}, 400, "more"),
        ("order", {"do": "end"}, 400, "no process trains"),
        ("clone", {"of": "v", "name": "../x"}, 400, "is not a name"),
        ("clone", {"of": "v", "name": "x", "changes": ["lr=much"]}, 400, "variants.x.lr: Input should be a valid number"),
        ("clone", {"of": "v", "name": "x", "changes": ["lr"]}, 400, "write KEY=VALUE"),
        ("clone", {"of": "v", "name": "x", "changes": ["eval_every=.inf"]}, 400, "a whole number of steps"),
        ("clone", {"of": "v", "name": "x", "changes": ["target_modules=2026-01-31"]}, 400, "neither a number"),
        ("begin", {"file": "/etc/passwd"}, 404, "no such run file"),
        ("begin", {"file": "../run.yaml"}, 404, "no such run file"),
        ("begin", {"file": "outside.yaml"}, 400, "lies outside of"),
        ("begin", {"file": "taken.yaml"}, 400, "is not empty"),
        ("begin", {"file": "wrong.yaml"}, 400, "seeds: unknown key"),
        ("begin", {"file": "long.yaml"}, 400, "out with .log, to which it prints, = "),
        ("begin", {"file": "longest.yaml"}, 400, "out with .log, to which it prints, = "),
        ("begin", {"file": "ring.yaml"}, 400, "ring': a link to itself"),
        ("begin", {"file": "inring.yaml"}, 400, "ring/x': a link to itself"),
    ],
)
def test_what_is_refused(app: FastAPI, run: Path, key: str, path: str, body: dict[str, Any], status: int, said: str):
    content = run_file(run.parent, {"v": {"method": "lora", "data": "a"}})
    (run.parent / "ring").symlink_to("ring")
    outs = {"outside": "../elsewhere", "taken": "r", "ring": "ring", "inring": "ring/x", "long": "b" * 252, "longest": "a" * 255}
    for name, changed in [("wrong", {"seeds": 3}), *((name, {"out": out}) for name, out in outs.items())]:
        (run.parent / f"{name}.yaml").write_text(yaml.safe_dump(content | changed))
    answer = post(app, path, {"id": key} | body if path != "begin" else body)
    assert answer.status_code == status and said in answer.json()["error"]["message"], answer.text
    assert not (run / CONTROL).exists() and not list(run.parent.glob("*.log"))


def test_which_run_files_there_are(app: FastAPI, run: Path):
    root = run.parent
    content = run_file(root, {"v": {"method": "lora", "data": "a"}})
    (root / "inner").mkdir()
    for name in ("b.yaml", "inner/a.yml", "r/inside.yaml", ".hidden.yaml"):
        (root / name).write_text(yaml.safe_dump(content))
    (root / "sweep.yaml").write_text("base: x\nsweep: {}\n")
    (root / "bomb.yaml").write_text("a: &a [x]\n" + "".join(f"{c}: &{c} [{', '.join(['*a'] * 9)}]\n" for c in "bcdef") + "base: *f\n")
    (root / "deep.yaml").write_text("[" * 5_000)
    (root / "huge.yaml").write_text("base: x\n" * 20_000)
    os.mkfifo(root / "pipe.yaml")
    (root / "link").symlink_to(root)
    with open(os.fsencode(root) + b"/\xff.yaml", "w") as file:  # noqa: PTH123 (a name that is no text)
        file.write(yaml.safe_dump(content))
    assert get(app, "run-files").json() == {"files": ["b.yaml", "inner/a.yml"]}


def test_a_run_file_that_was_just_saved_can_be_begun(app: FastAPI, run: Path):
    """Though the list is of a moment ago."""
    assert get(app, "run-files").json() == {"files": []}
    (run.parent / "new.yaml").write_text(yaml.safe_dump(run_file(run.parent, {"v": {"method": "lora", "data": "a"}}) | {"out": "r"}))
    assert "is not empty" in post(app, "begin", {"file": "new.yaml"}).text


@pytest.mark.parametrize(
    "out", ["", ".", "..", "../x", "/etc", "nothing", "r/../..", "%00", "a" * 4000, "a" * 300, "a" * 255, "a" * 252, "ring", "ring/x"]
)
def test_logs_are_of_runs_here_alone(app: FastAPI, run: Path, out: str):
    log_of(run.parent).write_text("not for the page")
    (run.parent / "ring").symlink_to("ring")
    try:
        assert get(app, f"log?out={out}").status_code == 404
    finally:
        log_of(run.parent).unlink()


def test_a_log_is_text_and_its_end(app: FastAPI, run: Path, key: str):
    assert get(app, f"log?id={key}").status_code == 404
    log_of(run).write_bytes(b"x" * 100_000 + b"\n10%\r20%\r\n\x1b[31mred\xff\n")
    told = get(app, f"log?id={key}").json()
    assert told["text"].endswith("\n20%\n\\x1b[31mred\ufffd") or told["text"].endswith("\\x1b[31mred\ufffd")
    assert len(told["text"]) < 20_000 and told["cut"] is True
    assert get(app, f"run?id={key}").json()["logged"] is True
    log_of(run).unlink()
    for elsewhere in ("/dev/zero", "/etc/hostname"):
        log_of(run).symlink_to(elsewhere)
        assert get(app, f"log?id={key}").status_code == 404
        log_of(run).unlink()


def test_a_folder_with_the_longest_of_names_has_no_log(run: Path):
    folder = run.rename(run.with_name("n" * 255))
    app = create_studio(Shown(RunFolders(folder.parent), key=KEY))
    (line,) = get(app, "runs").json()["runs"]
    assert get(app, f"log?id={line['id']}").status_code == 404 and get(app, f"run?id={line['id']}").json()["logged"] is False


@pytest.mark.slow
def test_what_is_begun_trains_and_outlives_the_page(tmp_path: Path, tiny_llama_folder: Path):
    content = run_file(
        tmp_path, {"v": {"method": "lora", "r": 2, "data": "a", "max_steps": 3}}, base=str(tiny_llama_folder), out="runs/live"
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    shown = Shown(RunFolders(tmp_path), key=KEY, hosts=frozenset({"testserver"}))
    begun = post(create_studio(shown), "begin", {"file": "run.yaml"}).json()
    assert begun["out"] == "runs/live" and begun["command"] == f"trimtab train {tmp_path}/run.yaml"
    (child,) = shown.beginner._children
    try:
        assert os.getsid(child.pid) == child.pid != os.getsid(0), "a signal to the page's terminal does not reach it"
        app = create_studio(Shown(RunFolders(tmp_path), hosts=frozenset({"testserver"})))  # a page that knows nothing of it
        deadline = time.monotonic() + 60
        while not (tmp_path / "runs" / "live" / "report.html").exists():
            assert time.monotonic() < deadline and child.poll() in (None, 0), get(app, "log?out=runs/live").text
            time.sleep(0.2)
        assert child.wait(30) == 0
    finally:
        child.kill()
        child.wait(10)
    (line,) = get(app, "runs").json()["runs"]
    assert line["state"] == "finished" and "training v (3 steps)" in get(app, f"log?id={line['id']}").json()["text"]
