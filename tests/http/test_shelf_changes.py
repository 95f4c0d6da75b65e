"""What the page changes in the store: who may, with which names, and that commands get names as names and never as options."""

from __future__ import annotations

import asyncio
import contextlib
import io
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.http.common import base_of, call, site
from tests.store.common import stirred
from tests.train.past import run_folder, variant
from trimtab.http import send
from trimtab.http.assemble import Asked
from trimtab.http.commands import Commands
from trimtab.http.studio import create_studio
from trimtab.http.studio_auth import Shown
from trimtab.methods import LoraConfig
from trimtab.store.registry import Store
from trimtab.train.follow import RunFolders

KEY = {"authorization": "Bearer k"}


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[Shown]:
    store = Store(tmp_path / "store", create=True)
    for seed in (1, 2):
        store.publish(stirred(base_of(), LoraConfig(r=4), seed=seed), "acme/support")
    run = run_folder(tmp_path / "root" / "done", {"v": variant()})
    stirred(base_of(), LoraConfig(r=4), seed=3).save(run / "adapters" / "v")
    made = Shown(RunFolders(tmp_path / "root"), store, key="k")
    yield made
    made.close()


def ask(shown: Shown, path: str, body: Any, **headers: str) -> Any:
    return call(create_studio(shown), "POST", f"/studio/{path}", body, headers={**KEY, **headers})


def ended(commands: Commands, key: str) -> dict[str, Any]:
    for _ in range(600):
        if (told := commands.told(key))["state"] != "running":
            return told
        time.sleep(0.05)
    raise AssertionError(told)


def test_nobody_else_changes_the_store(shown: Shown):
    assert shown.store is not None
    for path, body in (
        ("alias", {"ref": "acme/support@1", "alias": "prod"}),
        ("publish", {"run": "x", "variant": "v", "name": "acme/other"}),
        ("export", {"ref": "acme/support@1", "format": "peft", "folder": "f"}),
        ("push", {"ref": "acme/support@1", "url": "file:///tmp/x"}),
        ("adapter.zip", {"ref": "acme/support@1"}),
    ):
        for headers, status in (
            ({"origin": "http://evil.example"}, 403),
            ({"content-type": "text/plain"}, 415),
            ({"authorization": "Bearer x"}, 401),
        ):
            assert ask(shown, path, body, **headers).status_code == status, (path, headers)
    assert shown.store.resolve("acme/support@1").aliases == () and not shown.commands._jobs


def test_an_alias_moves_and_goes(shown: Shown):
    assert shown.store is not None
    assert ask(shown, "alias", {"ref": "acme/support@1", "alias": "prod"}).json()["aliases"] == ["prod"]
    assert ask(shown, "alias", {"ref": "acme/support@2", "alias": "prod"}).status_code == 200
    assert shown.store.resolve("acme/support@prod").version == 2
    assert ask(shown, "alias", {"ref": "acme/support@2", "alias": "prod", "take": True}).status_code == 200
    assert "prod" not in shown.store.resolve("acme/support@2").aliases
    for body in ({"ref": "acme/support@1", "alias": "latest"}, {"ref": "acme/support@1", "alias": "7"}, {"ref": "../x", "alias": "a"}):
        assert ask(shown, "alias", body).status_code == 400, body


def test_the_download_is_the_folder_as_it_is_stored(shown: Shown):
    assert shown.store is not None
    found = ask(shown, "adapter.zip", {"ref": "acme/support@1"})
    version = shown.store.resolve("acme/support@1")
    with zipfile.ZipFile(io.BytesIO(found.content)) as zipped:
        assert set(zipped.namelist()) == set(version.files) and zipped.testzip() is None
        for name, blob in version.files.items():
            assert zipped.read(name) == shown.store.blob_path(blob.digest).read_bytes()


def test_a_download_is_in_memory_a_piece_at_a_time(shown: Shown, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(send, "PIECE", 1000)
    app, sizes = create_studio(shown), list[int]()

    async def take(broken: bool) -> None:
        async def hear(message: Any) -> None:
            if broken and message["type"] == "http.response.body":
                raise OSError("the client has gone")
            sizes.append(len(message.get("body", b"")))

        asked = {"type": "http.request", "body": b'{"ref": "acme/support@1"}'}
        headers = [(b"authorization", b"Bearer k"), (b"content-type", b"application/json"), (b"host", b"test")]
        scope = {"type": "http", "method": "POST", "path": "/studio/adapter.zip", "headers": headers, "query_string": b""}
        received = iter([asked])

        async def receive() -> Any:
            return next(received, {"type": "http.disconnect"})

        with contextlib.suppress(OSError):
            await app(scope, receive, hear)

    for broken in (True, True, True, False):
        asyncio.run(take(broken))
    assert len(sizes) > 10 and max(sizes) == 1000, "and those that went left their place to others"


def test_few_are_sent_at_once(shown: Shown):
    assert shown.downloads.acquire() and shown.downloads.acquire()
    answer = ask(shown, "adapter.zip", {"ref": "acme/support@1"})
    assert answer.status_code == 503 and "being sent" in answer.text
    shown.downloads.release()
    assert [ask(shown, "adapter.zip", {"ref": f"acme/{name}@1"}).status_code for name in ("absent", "support", "absent", "support")] == [
        404,
        200,
        404,
        200,
    ]


def test_a_damaged_adapter_is_not_sent(shown: Shown):
    assert shown.store is not None
    blob = max(shown.store.resolve("acme/support@1").files.values(), key=lambda b: b.size)
    path = shown.store.blob_path(blob.digest)
    path.chmod(0o644)
    path.write_bytes(b"x" + path.read_bytes()[1:])
    answer = ask(shown, "adapter.zip", {"ref": "acme/support@1"})
    assert answer.status_code == 400 and "is refused" in answer.text


def test_names_are_checked_before_a_command_runs(shown: Shown):
    (key,) = shown.runs.found()
    for path, body, status in (
        ("publish", {"run": key, "variant": "absent", "name": "acme/other"}, 404),
        ("publish", {"run": key, "variant": "../../x", "name": "acme/other"}, 404),
        ("publish", {"run": "nothing", "variant": "v", "name": "acme/other"}, 404),
        ("publish", {"run": key, "variant": "v", "name": "--help"}, 400),
        ("publish", {"run": key, "variant": "v", "name": "acme/other", "aliases": ["--store"]}, 400),
        ("export", {"ref": "acme/support@1", "format": "exe", "folder": "f"}, 400),
        ("export", {"ref": "acme/support@1", "format": "peft", "folder": "../f"}, 400),
        ("export", {"ref": "acme/support@1", "format": "peft", "folder": "done"}, 400),
        ("push", {"ref": "acme/absent@1", "url": "file:///tmp/x"}, 404),
    ):
        assert ask(shown, path, body).status_code == status, body
    assert not shown.commands._jobs


@pytest.mark.slow
def test_the_first_adapter_makes_the_store(shown: Shown, tmp_path: Path):
    """A newcomer has none yet, and publishes from the page."""
    new = tmp_path / "new" / "store"
    made = Shown(shown.runs, key="k", new_store=new)
    try:
        app = create_studio(made)
        assert call(app, "GET", "/studio/about").json()["store"] is True
        assert call(app, "GET", "/studio/adapters").json() == {"adapters": [], "more": False, "after": ""} and not new.exists()
        assert ask(made, "alias", {"ref": "acme/first@1", "alias": "prod", "take": False}).status_code == 404
        (key,) = shown.runs.found()
        job = ask(made, "publish", {"run": key, "variant": "v", "name": "acme/first", "aliases": ["prod"]}).json()
        assert ended(made.commands, job["key"])["state"] == "done"
        (listed,) = call(app, "GET", "/studio/adapters").json()["adapters"]
        assert listed["ref"] == "acme/first@1" and Store(new).resolve("acme/first@prod").version == 1
        assert ask(made, "alias", {"ref": "acme/first@1", "alias": "best", "take": False}).status_code == 200
    finally:
        made.close()
    without = create_studio(Shown(shown.runs, new_store=new.parent / "other"))
    assert call(without, "GET", "/studio/about").json()["store"] is False, "nothing can be published without a key"


def test_publish_and_push_are_the_commands_that_are_shown(shown: Shown, tmp_path: Path):
    assert shown.store is not None
    (key,) = shown.runs.found()
    assert call(create_studio(shown), "GET", f"/studio/run-adapters?id={key}").json() == {"adapters": ["v"]}
    job = ask(shown, "publish", {"run": key, "variant": "v", "name": "acme/other", "aliases": ["prod"]}).json()
    told = ended(shown.commands, job["key"])
    assert told["state"] == "done" and told["result"]["ref"] == "acme/other@1", told
    assert shown.store.resolve("acme/other@prod").version == 1
    assert job["command"].startswith("trimtab adapters publish --alias prod --store ") and "--json" not in job["command"]
    job = ask(shown, "push", {"ref": "acme/other@1", "url": f"file://{tmp_path}/remote"}).json()
    assert ended(shown.commands, job["key"])["state"] == "done" and (tmp_path / "remote").is_dir()
    job = ask(shown, "push", {"ref": "acme/other@1", "url": "--help"}).json()
    told = ended(shown.commands, job["key"])
    assert told["state"] == "failed" and "--help" in told["said"] and "Usage" not in told["said"], "an address, not an option"


def test_on_a_server_an_administrator_moves_aliases(tmp_path: Path):
    store = Store(tmp_path / "store", create=True)
    store.publish(stirred(base_of(), LoraConfig(r=4), seed=1), "acme/support")
    with site(Asked(store=store)) as made:  # local mode, whose only caller may administer
        body = {"ref": "acme/support@1", "alias": "prod"}
        assert call(made.app, "POST", "/studio/alias", body, headers={"origin": "http://evil.example"}).status_code == 403
        assert store.resolve("acme/support@1").aliases == ("latest",)
        assert call(made.app, "POST", "/studio/alias", body).json()["aliases"] == ["prod", "latest"]
        for path in ("publish", "export", "push", "adapter.zip"):
            assert call(made.app, "POST", f"/studio/{path}", body).status_code == 404


def test_a_word_that_no_process_can_be_given_ends_the_command(shown: Shown):
    """Else it would keep its place among the few that run at once for ever."""
    job = ask(shown, "push", {"ref": "acme/support@1", "url": "file:///a\0b"}).json()
    told = ended(shown.commands, job["key"])
    assert told["state"] == "failed" and "null byte" in told["said"]
