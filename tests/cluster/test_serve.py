"""The application on Ray Serve: two replicas of a tiny base, the routes of `trimtab serve`, requests that meet their adapter."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from openai import OpenAI
from peft import PeftModel
from starlette.requests import Request
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.store.remote_servers import free_port
from trimtab.cluster.arguments import Args, read
from trimtab.cluster.ingress import Ingress
from trimtab.cluster.relayed import MAX_MODEL, Relayed, model_of
from trimtab.cluster.serve import _refuse
from trimtab.errors import ConfigError
from trimtab.methods import LoraConfig
from trimtab.model import Base, load_base
from trimtab.store import Adapter
from trimtab.store.registry import Store

ADAPTERS = 6
HOST = """
import json, sys
import ray
from ray import serve
from trimtab.cluster.serve import app
ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=80_000_000)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
serve.run(app(json.loads(sys.argv[2])))
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""


def test_a_body_names_its_model() -> None:
    assert model_of(b'{"model": "acme/support", "prompt": "x"}') == "acme/support"
    for body in (
        b"",
        b'{"prompt": "model"}',
        b'{"model": 3}',
        b'["model"]',
        b'{"model',
        b'"model"',
        b'{"model": "%s"}' % (b"a" * (MAX_MODEL + 1)),
    ):
        assert model_of(body) == ""
    assert model_of(b'{"model": "a", "x": ' + b"[" * 200_000) == ""


def test_arguments_that_do_not_go_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.cluster.serve.find_spec", lambda name: True)
    with pytest.raises(ConfigError, match="cannot be made like this") as refused:
        _refuse(Args(store=tmp_path))
    assert len(refused.value.problems) == 2 and str(tmp_path) in refused.value.problems[1]
    with pytest.raises(ConfigError, match="cannot be made like this"):
        _refuse(Args(local=True, tenants="tenants.db"))
    monkeypatch.setattr("trimtab.cluster.serve.find_spec", lambda name: None if name == "ray" else True)
    with pytest.raises(ConfigError, match=r"trimtab\[ray-serve\]"):
        _refuse(Args(local=True))


def test_arguments_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("BASE", "some-base"), ("STORE", "/s"), ("LOCAL", "true"), ("TENANTS", "")):
        monkeypatch.setenv(f"TRIMTAB_{name}", value)
    found = Args()
    assert (found.base, found.store, found.local, found.tenants, found.name) == ("some-base", Path("/s"), True, None, "some-base")
    assert Args(base="other").base == "other"


def test_arguments_come_as_texts_and_wrong_ones_are_named() -> None:
    found = read({"base": "b", "local": "true", "replicas": "3", "kv_gb": "0.5", "store": "/s"})
    assert (found.local, found.replicas, found.kv_gb, found.store) == (True, 3, 0.5, Path("/s"))
    with pytest.raises(ConfigError) as refused:
        read({"replica": "3", "max_running": 0})
    assert refused.value.problems[1] == "replica: there is no such argument (did you mean 'replicas'?)"
    assert refused.value.problems[0].startswith("max_running = 0: ")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> tuple[Base, Path]:
    """The base, and a store with adapters that answer differently."""
    base, root = load_base(str(tiny_llama_folder), dtype="float32", device="cpu"), tmp_path_factory.mktemp("served") / "store"
    store = Store(root, create=True)
    for i in range(ADAPTERS):
        made = Adapter.create(base, LoraConfig(r=4, target_modules="all-linear"), seed=i)
        generator = torch.Generator().manual_seed(i)
        for tensor in made.params.values():
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
        made.save(root.parent / f"a{i}")
        store.publish(made, f"acme/a{i}", base=base)
    return base, root


@pytest.fixture(scope="module")
def url(stored: tuple[Base, Path], environment: dict[str, str]) -> Iterator[str]:
    """Where the application answers, with two replicas."""
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'trimtab[ray-serve]'")
    base, root = stored
    args = {"base": base.name, "base_name": "tiny", "store": str(root), "local": True, "replicas": 2, "max_running": 4, "kv_gb": 0.01}
    port = free_port()
    command = [sys.executable, "-c", HOST, str(port), json.dumps(args | {"dtype": "float32", "adapters_gb": 0.01})]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            assert any(line == b"ready\n" for line in process.stdout), "the application has not started"
            yield f"http://127.0.0.1:{port}"
            process.stdin.close()
            process.wait(60)
        finally:
            process.kill()


def ask(url: str, model: str, **more: Any) -> httpx.Response:
    body = {"model": model, "prompt": "n 1 x", "max_tokens": 6, "temperature": 0} | more
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


@pytest.mark.slow
def test_answers_are_those_of_peft(url: str, stored: tuple[Base, Path]) -> None:
    base, root = stored
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base.name), AutoTokenizer.from_pretrained(base.name)
    ids = torch.tensor([tokenizer.encode("n 1 x", add_special_tokens=False)])

    def greedy(model: Any) -> str:
        tokens = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
        return str(tokenizer.decode(tokens))

    with torch.no_grad():
        expected = {"tiny": greedy(model)}
        tuned = PeftModel.from_pretrained(model, root.parent / "a0")
        expected["acme/a0"] = greedy(tuned)
    assert expected["tiny"] != expected["acme/a0"]
    for name, text in expected.items():
        assert ask(url, name, ignore_eos=True).json()["choices"][0]["text"] == text


@pytest.mark.slow
def test_a_request_meets_a_replica_that_has_its_adapter(url: str) -> None:
    """Replicas tell ten times a second what they hold, which may come late on a busy machine: so a few may go astray."""
    homes: dict[str, set[str]] = {}
    for turn in range(9):
        for i in range(ADAPTERS):
            homes.setdefault(f"acme/a{i}", set()).add(ask(url, f"acme/a{i}").headers["x-trimtab-replica"])
            time.sleep(0 if turn else 0.5)
    both = set.union(*homes.values())
    assert len(both) == 2, "new adapters go where fewer are held"
    assert sum(map(len, homes.values())) <= ADAPTERS + 2, "by chance nearly all would have been everywhere"
    assert {ask(url, "tiny").headers["x-trimtab-replica"] for _ in range(24)} == both, "the base is everywhere"


@pytest.mark.slow
def test_the_routes_and_errors_are_those_of_the_server(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert {m.id for m in client.models.list()} == {"tiny", *(f"acme/a{i}" for i in range(ADAPTERS))}
    streamed = client.chat.completions.create(
        model="acme/a1", messages=[{"role": "user", "content": "hello"}], stream=True, max_tokens=8, temperature=0
    )
    parts = [c.choices[0].delta.content or "" for c in streamed if c.choices]
    whole = client.chat.completions.create(model="acme/a1", messages=[{"role": "user", "content": "hello"}], max_tokens=8, temperature=0)
    assert "".join(parts) == whole.choices[0].message.content and len(parts) > 2, "it comes in parts"
    numbered = httpx.get(f"{url}/v1/models", headers={"x-request-id": "mine"}).headers.get_list("x-request-id")
    assert numbered == ["mine"], "Serve's proxy says it too"
    unknown = ask(url, "acme/none")
    assert unknown.status_code == 404 and "acme/none" in unknown.json()["error"]["message"]
    large = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "x" * (5 << 20)}, timeout=60)
    assert large.status_code == 413
    loading = httpx.post(f"{url}/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/x"})
    assert loading.status_code == 400 and "publish it" in loading.json()["error"]["message"]
    assert httpx.get(f"{url}/readyz").status_code == 200 and httpx.get(f"{url}/nothing").status_code == 404


@pytest.mark.slow
def test_a_client_that_goes_away_frees_its_place(url: str) -> None:
    """Four answers run at a time on a replica. Forty clients leave long answers, and the next one is answered all the same."""

    def leave() -> None:
        body = {"model": "acme/a2", "prompt": "n", "max_tokens": 450, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            next(response.iter_lines())

    threads = [threading.Thread(target=leave) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    def running() -> float:
        text = httpx.get(f"{url}/metrics").text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("trimtab_num_requests_running{"))

    end = time.monotonic() + 60
    while any(running() for _ in range(8)):  # each call is answered by one of the replicas
        assert time.monotonic() < end, "answers that nobody reads still run"
        time.sleep(0.2)
    assert ask(url, "acme/a2").status_code == 200


@pytest.mark.slow
def test_a_replica_that_dies_costs_honest_errors(url: str) -> None:
    """One of two is killed under load: each request is answered or told, and another replica takes its place."""
    statuses, end = list[int](), threading.Event()

    def keep_asking(n: int) -> None:
        while not end.is_set():
            answer = ask(url, f"acme/a{n % ADAPTERS}", max_tokens=64, ignore_eos=True)
            statuses.append(answer.status_code)
            if answer.status_code != 200:
                assert answer.json()["error"]["code"] == "replica_lost" and "retry-after" in answer.headers
                time.sleep(0.1)

    with ThreadPoolExecutor(8) as threads:
        asking = [threads.submit(keep_asking, n) for n in range(8)]
        time.sleep(1)
        (killed, *_) = [
            p for p in psutil.process_iter(["cmdline"]) if any("ServeReplica:default:Replica" in a for a in p.info["cmdline"] or [])
        ]
        killed.kill()
        count = len(statuses)
        deadline = time.monotonic() + 60
        while len(statuses) < count + 40 and time.monotonic() < deadline:
            time.sleep(0.1)
        end.set()
        for future in asking:
            future.result()
    assert set(statuses) <= {200, 503} and statuses[-1] == 200 and len(statuses) >= count + 40


class Dying:
    """A handle of replicas, as Serve's: the one that answers says what it is given and dies behind it."""

    def __init__(self, *messages: dict[str, Any]):
        self.messages = messages

    def options(self, **_: Any) -> Dying:
        return self

    def remote(self, asked: Relayed) -> Dying:
        return self

    def cancel(self) -> None: ...

    def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        return self

    async def __anext__(self) -> dict[str, Any]:
        messages, self.messages = self.messages, self.messages[1:]
        if not messages:
            raise OSError("the actor died")
        return messages[0]


@pytest.mark.parametrize("headers", [[(b"content-length", b"7")], []], ids=["of known length", "a stream"])
def test_a_replica_that_dies_behind_its_headers_is_told_where_it_can_be(headers: list[tuple[bytes, bytes]]) -> None:
    """An answer of known length is none until it is whole. A stream has begun, and is cut off."""
    replicas = Dying({"type": "http.response.start", "status": 200, "headers": headers}, {"type": "http.response.body", "body": b"{"})
    ingress = Ingress(replicas, "tiny")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await (await ingress(Request(scope, receive)))(scope, receive, send)

    client = TestClient(app)
    if headers:
        answer = client.post("/v1/completions", json={"model": "acme/a0"})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "replica_lost" and "retry-after" in answer.headers
    else:
        with pytest.raises(OSError, match="the actor died"):
            client.post("/v1/completions", json={"model": "acme/a0"})


def test_what_goes_between_processes_is_plain() -> None:
    scope = {"type": "http", "path": "/v1/models", "headers": [(b"a", b"b")], "app": object(), "state": {}, "method": "GET"}
    found = Relayed.of(scope, b"")
    assert found.scope["path"] == "/v1/models" and "app" not in found.scope and "state" not in found.scope
