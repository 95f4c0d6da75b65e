"""`trimtab serve`: what it refuses before it begins, and that its options reach the server."""

import json
import signal
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from tests.http.common import TEXT, adapter_folders, base_of
from tests.http.process import serving
from tests.store.common import stirred
from trimtab.cli import main
from trimtab.http import server
from trimtab.methods import LoraConfig
from trimtab.model import load_base
from trimtab.store import Adapter
from trimtab.store.registry import Store


def refused(*options: str | Path) -> str:
    """What is said, on any free port: the usual one may be in use."""
    result = CliRunner().invoke(main, ["serve", "--port", "0", *map(str, options)])
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--local", "--host", "0.0.0.0"], "--local listens on this machine only, not on --host 0.0.0.0"),
        (["--local", "--tenants", "x.db"], "--local knows no tenants"),
        (["--adapter", "a=b"], "--adapter is for --local"),
        (["--local", "--adapter", "ab"], "--adapter ab: must be NAME=FOLDER"),
        (["--local", "--adapter", "=b", "--adapter", "a="], "--adapter =b"),
        (["--local", "--adapter", "a=b", "--adapter", "a=c"], "--adapter a: is given twice"),
        (["--tenants", "/nowhere/t.db"], "there is no tenants database /nowhere/t.db"),
        (["--local", "--store", "/nowhere"], "/nowhere"),
        (["--local", "--max-running", "0"], "--max-running"),
        (["--local", "--kv-gb", "0"], "--kv-gb"),
        (["--local", "--adapters-from", "/nowhere"], "--adapters-from"),
        (["--local", "--port", "70000"], "--port"),
    ],
)
def test_options_that_cannot_be(options: list[str], words: str):
    assert words in refused(*options)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    from trimtab.cli import serve

    monkeypatch.setattr(serve, "find_spec", lambda name: None if name in ("uvicorn", "prometheus_client") else True)
    said = refused("--local")
    assert "serving needs uvicorn, prometheus-client" in said and "pip install 'trimtab[serve]'" in said


def test_a_taken_port_is_told_before_the_base_is_loaded():
    with server.bind("127.0.0.1", 0) as taken:
        said = refused("--tenants", "/nowhere/t.db", "--base", "/no/such/base", "--port", str(taken.getsockname()[1]))
    assert (
        "cannot listen on" in said and "there is no base '/no/such/base'" in said and "there is no tenants database /nowhere/t.db" in said
    )


def test_an_adapter_that_is_refused_ends_it(tiny_llama_folder: Path, tmp_path: Path):
    base = base_of()  # of another fingerprint
    path = stirred(base, LoraConfig(r=2), seed=1).save(tmp_path / "foreign")
    options = ("--local", "--base", tiny_llama_folder, "--dtype", "float32", "--port", "0", "--kv-gb", "0.01", "--adapters-gb", "0.01")
    assert "does not fit this base" in refused(*options, "--adapter", f"foreign={path}")
    assert "adapter '/no/such/folder': there is no such folder" in refused(*options, "--adapter", "a=/no/such/folder")


@pytest.mark.slow
def test_options_reach_the_server(tiny_llama_folder: Path, tmp_path: Path):
    base = load_base(str(tiny_llama_folder), dtype="float32")
    paths = adapter_folders(tmp_path / "drop" / "acme", base)
    store = Store(tmp_path / "store", create=True)
    store.publish(Adapter.load(paths["lora"], base), "acme/support")
    options = (
        "--local",
        "--store",
        store.root,
        "--adapter",
        "s=acme/support",
        "--adapters-from",
        tmp_path / "drop",
        "--request-seconds",
        "1",
    )
    with serving(tiny_llama_folder, tmp_path, *options, "--host", "localhost") as served, httpx.Client(base_url=served.url) as c:
        assert served.told == {"url": served.url, "base": "tiny", "local": True, "adapters": ["s"]}
        assert [m["id"] for m in c.get("/v1/models").json()["data"]] == ["tiny", "s", "acme/support"]
        loaded = c.post("/v1/load_lora_adapter", json={"lora_name": "more", "lora_path": paths["ia3"]})
        assert loaded.status_code == 200, loaded.text
        texts = {
            m: c.post("/v1/completions", json=TEXT | {"model": m}).json()["choices"][0]["text"] for m in ("s", "support", "more", "tiny")
        }
        assert texts["s"] == texts["support"] and len(set(texts.values())) == 3
        late = c.post("/v1/completions", json=TEXT | {"prompt": ["hi"] * 4, "max_tokens": 500, "ignore_eos": True, "n": 16})
        assert late.status_code == 504 and json.loads(late.text)["error"]["code"] == "deadline"
        assert served.stop(signal.SIGTERM) == 0


def test_tenants_must_be_a_database(tmp_path: Path):
    (tmp_path / "t.db").write_text("no database")
    assert "t.db" in refused("--tenants", tmp_path / "t.db")
