"""`trimtab adapters push` and `pull`: what they print, as people and as machines read it, and how they fail."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.store.hub_server import fake_hub
from tests.store.remote_servers import contents, filled
from trimtab.cli import main, transfer
from trimtab.store.registry import Store, Version

Filled = tuple[Store, Version, Version]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    """Do not change it."""
    return filled(tmp_path_factory.mktemp("source"))


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["adapters", *map(str, words)])


def test_there_and_back(source, tmp_path):
    store, _, _ = source
    url, here = f"file://{tmp_path}/shared", tmp_path / "here"
    sent = run("push", "acme/support@1", url, "--store", store.root)
    assert sent.exit_code == 0, sent.output
    assert sent.stdout == f"acme/support@1 is at {url} as acme/support@1\n32 kB sent, 0 bytes were there already\n"
    assert "adapter_model.safetensors: 28 kB to move\n" in sent.stderr
    again = run("push", "acme/support@1", url, "--store", store.root)
    assert "0 bytes sent, 32 kB were there already" in again.stdout
    assert "adapter_model.safetensors: is there already\n" in again.stderr
    got = run("pull", url, "acme/support", "--store", here, "--alias", "prod")
    assert got.stdout == f"acme/support@1 (prod, latest) holds what is at {url}\n32 kB fetched, 2 bytes were here already\n"
    assert contents(Store(here), "acme/support@prod", tmp_path) == contents(store, "acme/support@1", tmp_path)


def test_machines_get_one_object_and_no_progress(source, tmp_path):
    store, _, second = source
    url, here = f"file://{tmp_path}/shared", tmp_path / "here"
    sent = run("push", "acme/support", url, "--store", store.root, "--json")
    assert sent.stderr == "" and json.loads(sent.stdout) == {
        "ref": "acme/support@2",
        "digest": second.digest,
        "url": url,
        "there": ["acme/support@2", "acme/support@prod"],
        "bytes_moved": second.size + 2,
        "bytes_skipped": 0,
    }
    got = run("pull", url, "team/support", "--store", here, "--json")
    assert got.exit_code == 2
    got = run("pull", f"{url}#acme/support", "team/support", "--store", here, "--json")
    assert got.stderr == "" and json.loads(got.stdout) == {
        "ref": "team/support@1",
        "digest": second.digest,
        "aliases": ["latest"],
        "verified": True,
        "url": f"{url}#acme/support",
        "there": [second.digest],
        "bytes_moved": second.size,
        "bytes_skipped": 2,
    }


def test_the_store_of_the_environment_is_used(source, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_STORE", str(tmp_path / "own"))
    assert run("pull", f"file://{source[0].root}", "acme/legal").exit_code == 0
    assert Store(tmp_path / "own").resolve("acme/legal").digest == source[0].resolve("acme/legal").digest


def test_a_plain_peft_folder_is_said_to_be_unverified(source, tmp_path, monkeypatch):
    files = contents(source[0], "acme/support@1", tmp_path)
    with fake_hub(monkeypatch) as hub:
        hub.add("them/plain", {n: files[n] for n in ("adapter_config.json", "adapter_model.safetensors")})
        got = run("pull", "hf://them/plain", "them/plain", "--store", tmp_path / "here")
        assert "unverified: its files do not say which base" in got.stdout
        got = run("pull", "hf://them/plain", "them/plain", "--store", tmp_path / "here", "--json")
        assert json.loads(got.stdout)["verified"] is False


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["push", "acme/suport", "memory://x"], "did you mean 'acme/support'?"),
        (["push", "acme/support", "s3://id:key@bucket/x"], "carries a user name or password"),
        (["pull", "s3://id:key@bucket/x", "acme/support"], "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        (["pull", "ftps://host/x", "acme/support"], "ftps:// is not known"),
        (["pull", "memory://x", "acme/support"], "holds no acme/support"),
        (["pull", "memory://x", "Support"], "is not a name in a store"),
        (["pull", "memory://x", "acme/support", "--alias", "latest"], "always stands for the newest version"),
    ],
)
def test_mistakes_exit_with_2_and_say_what_to_do(source, words, said, tmp_path):
    root = source[0].root if words[0] == "push" else tmp_path / "here"
    found = run(*words, "--store", root)
    assert found.exit_code == 2 and said in found.stderr and "fix: " in found.stderr and found.stdout == ""
    assert "key@" not in found.stderr


def test_pushing_from_no_store_says_so(tmp_path):
    found = run("push", "acme/support", "memory://x", "--store", tmp_path / "none")
    assert found.exit_code == 2 and "there is no store in" in found.stderr and not (tmp_path / "none").exists()


@pytest.mark.parametrize("command", ["push", "pull"])
def test_help_has_an_example(command):
    shown = run(command, "--help")
    assert shown.exit_code == 0 and f"trimtab adapters {command} " in shown.output and "s3://bucket/adapters" in shown.output


def test_a_terminal_gets_bars(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with transfer.showing(quiet=False) as begin:
        assert begin is not None
        moved = begin("adapter_model.safetensors", 2_000_000, 500_000)
        moved(1_500_000)
        begin("", 2, 0)(2)
    assert "adapter_model.safetensors" in screen.getvalue() and "2.0/2.0 MB" in screen.getvalue()


@pytest.mark.parametrize(("count", "shown"), [(0, "0 bytes"), (9_999, "9999 bytes"), (10_000, "10 kB"), (19_540_000, "19.5 MB")])
def test_bytes_are_shown_short(count, shown):
    assert transfer.megabytes(count) == shown
