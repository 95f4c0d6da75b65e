"""A server in the background of a program, asked over HTTP; its answers are those of `Base.generate`, which computes without a server."""

from __future__ import annotations

import json
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab
from tests.train.common import tiny_base
from trimtab.errors import ConfigError, TrimtabError

PROMPT = "n 7"


def ask(url: str, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "max_tokens": 6}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return str(json.load(reply)["choices"][0]["message"]["content"])


def adapter_on(base: trimtab.Base, seed: int) -> trimtab.Adapter:
    adapter = trimtab.Adapter.create(base, trimtab.LoraConfig(r=4), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    adapter.params = {k: t + 0.2 * torch.randn(t.shape, generator=generator) for k, t in adapter.params.items()}
    return adapter


def test_it_answers_as_base_and_adapters_do_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_STORE", str(tmp_path / "store"))
    base = tiny_base()
    mine, other = adapter_on(base, 1), adapter_on(base, 2)
    other.save(tmp_path / "other")
    store = trimtab.Store(create=True)
    store.publish(tmp_path / "other", "acme/other")
    expected = base.generate([PROMPT] * 3, [None, mine, other], max_new_tokens=6)
    assert len(set(expected)) == 3
    before = set(threading.enumerate())
    with trimtab.serve(base, adapters={"mine": mine, "other": tmp_path / "other"}, base_name="tiny", kv_gb=0.01) as server:
        assert server.running and server.models == ["tiny", "mine", "other"] and server.url in repr(server)
        assert [ask(server.url, name) for name in ("tiny", "mine", "other")] == expected
        assert ask(server.url, "acme/other") == ask(server.url, "other")
        # the base may be used beside the server
        assert base.generate([PROMPT], [mine], max_new_tokens=6) == expected[1:2]
        with pytest.raises(urllib.error.HTTPError, match="404"):
            ask(server.url, "nobody")
    assert not server.running and "(stopped)" in repr(server)
    server.stop()  # once more does nothing
    with pytest.raises(OSError):
        ask(server.url, "tiny")
    assert {t for t in threading.enumerate() if t.name.startswith("trimtab")} <= before
    with trimtab.serve(base, kv_gb=0.01) as again:  # a notebook's cell runs more than once
        assert ask(again.url, again.models[0]) == expected[0]


def test_what_cannot_be_served_leaves_nothing_behind(tmp_path: Path) -> None:
    base = tiny_base()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="cannot listen"):
            trimtab.serve(base, port=taken.getsockname()[1])
    before = {t.name for t in threading.enumerate()}
    wrong: list[dict[str, Any]] = [{"adapters": {"a": tmp_path / "absent"}}, {"adapters": {"a/b/c d": adapter_on(base, 1)}, "kv_gb": 1e-9}]
    for given in wrong:
        with pytest.raises(TrimtabError):
            trimtab.serve(base, **given)
    assert {t.name for t in threading.enumerate()} == before
    with pytest.raises(TypeError, match=r"adapter: unknown \(did you mean 'adapters'"):
        trimtab.serve(base, adapter={})  # type: ignore[call-arg]


def test_the_package_serve_can_be_called_and_has_its_files() -> None:
    import inspect

    from trimtab.python import serving
    from trimtab.serve.engine import Engine

    assert inspect.signature(trimtab.serve) == inspect.signature(serving.serve)
    assert trimtab.serve.engine.Engine is Engine  # type: ignore[attr-defined]
