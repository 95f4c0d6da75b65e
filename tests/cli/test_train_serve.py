"""`trimtab train --serve`: asked over a real socket while it trains, a run answers with its snapshots, and trains as if nobody asked."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from click.testing import CliRunner

from tests.laws.common import one_thread  # noqa: F401
from tests.train.common import METHODS, metrics, run_file, tiny_base
from trimtab.cli import main, train_serve
from trimtab.cli.train import train as command
from trimtab.cli.train_serve import LiveServer, serving
from trimtab.decode.generate import Sampling
from trimtab.serve.live import Snapshot
from trimtab.train import Report, RunConfig, train
from trimtab.train.interrupt import Interrupted, Stop
from trimtab.train.listen import Silent
from trimtab.train.prepare import Prepared

PROMPT = list(b"n 7 xx")
MODELS = ["tiny-llama", "dora", "projected", "ia3"]


class Ear(Silent):
    """A listener that takes its time, so that there is some for questions, and remembers warnings. on_step: called with each line."""

    def __init__(self, pause_s: float = 0.0, on_step: Callable[[Mapping[str, Any]], None] = lambda line: None):
        self.pause_s, self.on_step, self.warnings = pause_s, on_step, list[str]()

    def step(self, line: Mapping[str, Any]) -> None:
        time.sleep(self.pause_s)
        self.on_step(line)

    def warning(self, text: str) -> None:
        self.warnings.append(text)


class Asked:
    """A run that is served while it trains. ask: what a client does meanwhile, on a thread of its own, given the server's URL. live: the
    server. asked: what `ask` gave."""

    def __init__(self, folder: Path, variants: dict[str, Any], ask: Callable[[str], Any], ear: Ear, stop: Stop | None = None, **keys: Any):
        self.folder, self.content, self.ask, self.ear, self.stop = folder, run_file(folder, variants, **keys), ask, ear, stop
        self.live: LiveServer | None = None
        self.asked: Any = None
        self.url = ""

    def run(self) -> Report:
        client = threading.Thread(target=self._client)

        @contextmanager
        def beside(prepared: Prepared) -> Iterator[Callable[[], None]]:
            with inner(prepared) as turn:
                self.live = turn.__self__  # type: ignore[attr-defined]
                self.url = "http://{}:{}".format(*self.live.sock.getsockname())
                client.start()
                yield turn

        with serving(0, self.ear) as inner:
            try:
                run = RunConfig.from_dict(self.content, root=self.folder)
                return train(run, base=tiny_base(), listener=self.ear, beside=beside, stop=self.stop)
            finally:
                client.join(30)
                assert not client.is_alive()

    def _client(self) -> None:
        self.asked = self.ask(self.url)


def post(url: str, model: str, **body: Any) -> httpx.Response:
    asked = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0} | body
    with httpx.Client(trust_env=False, timeout=30) as client:
        return client.post(f"{url}/v1/completions", json=asked)


def ask_until_it_ends(url: str) -> list[tuple[str, httpx.Response]]:
    """Every model in turn, for as long as there is a server."""
    found = []
    while True:
        for model in MODELS:
            try:
                response = post(url, model)
            except httpx.TransportError:
                return found
            if response.status_code == 503:
                return found
            found.append((model, response))


@pytest.mark.slow
def test_a_run_that_is_asked_gives_the_same_numbers_and_answers_with_its_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    taken: dict[str, Snapshot] = {}
    original = train_serve.snapshot

    def remembered(*what: Any) -> Snapshot:
        new = original(*what)
        return taken.setdefault(new.digest, new)

    monkeypatch.setattr(train_serve, "snapshot", remembered)
    variants = {n: METHODS[n] | {"data": "a", "max_steps": 30} for n in ("dora", "projected", "full")} | {
        "ia3": METHODS["ia3"] | {"data": "b", "max_steps": 10}
    }
    data = {n: {"train": f"{n}.jsonl", "valid": f"{n}-test.jsonl", "test": f"{n}-test.jsonl"} for n in "ab"}
    alone = train(RunConfig.from_dict(run_file(tmp_path / "alone", variants, data=data), root=tmp_path / "alone"), base=tiny_base())
    asked = Asked(tmp_path / "asked", variants, ask_until_it_ends, ear := Ear(0.01), data=data)
    report = asked.run()

    lines = [metrics(r) for r in (report, alone)]
    for line in (line for by_name in lines for found in by_name.values() for line in found):
        for clock in ("seconds", "tokens_per_s"):
            line.pop(clock, None)
    assert lines[0] == lines[1] and len(lines[0]["dora"]) > 30
    for name, adapter in alone.adapters.items():
        assert all(torch.equal(report.adapters[name].params[k], t) for k, t in adapter.params.items())
    assert report.summary["base_fingerprint"] == alone.summary["base_fingerprint"]
    assert report.summary["base_scores"] == alone.summary["base_scores"]

    base = tiny_base()
    digests: dict[str, set[str]] = {m: set() for m in MODELS}
    for model, response in asked.asked:
        assert response.status_code == 200, response.text
        header = response.headers.get("x-trimtab-adapter", "")
        adapter = None
        if model != "tiny-llama":
            assert re.fullmatch(rf"{model} after step \d+ sha256:[0-9a-f]{{64}}", header)
            adapter = taken[header.rpartition(" ")[2]].load()
            digests[model].add(header)
        ids = base.generate_ids([PROMPT], [adapter], Sampling(8))[0]
        choice = response.json()["choices"][0]
        assert choice["text"] == base.tokenizer.decode(ids, skip_special_tokens=True)
        assert response.json()["usage"]["completion_tokens"] == len(ids) + (choice["finish_reason"] == "stop")
    assert len(digests["dora"]) > 3 and len(digests["projected"]) > 3 and len(digests["ia3"]) > 1, digests
    assert ear.warnings == ["not served, as they train models of their own: full"]
    assert asked.live is not None
    asked.live.engine.idle_check()
    current = {s.digest for _, s in asked.live.shown.values()}
    assert asked.live.engine.stats().adapters_resident <= len(current), "snapshots that nobody can ask for any more are kept"
    assert len(set(taken) - current) > 10


def test_training_and_answers_take_turns_and_a_running_answer_is_finished(tmp_path: Path):
    """An answer that takes longer than the training: it neither holds up the steps, nor is it cut off."""
    generated: list[int] = []

    def on_step(line: Mapping[str, Any]) -> None:
        assert asked.live is not None
        if line["step"] == 1:
            deadline = time.monotonic() + 10
            while not asked.live.engine.stats().waiting and time.monotonic() < deadline:
                time.sleep(0.002)
        generated.append(asked.live.engine.stats().generation_tokens)

    def ask(url: str) -> list[httpx.Response]:
        return [post(url, "v", max_tokens=480, ignore_eos=True)]

    asked = Asked(tmp_path, {"v": METHODS["ia3"] | {"data": "a", "max_steps": 4}}, ask, Ear(0.0, on_step))
    asked.run()
    body = asked.asked[0].json()
    assert body["choices"][0]["finish_reason"] == "length" and body["usage"]["completion_tokens"] == 480
    assert generated[0] == 0 < generated[1] < generated[3] < 480
    with pytest.raises(httpx.TransportError):
        post(asked.url, "v")


@pytest.mark.slow
def test_its_page_shows_the_run(tmp_path: Path):
    def ask(url: str) -> tuple[Any, ...]:
        with httpx.Client(trust_env=False, timeout=30, base_url=url) as client:
            about, runs = client.get("/studio/about").json(), client.get("/studio/runs").json()
            foreign = client.get("/studio/runs", headers={"host": "evil.example"})
            return about, runs["runs"], foreign.status_code, client.get("/studio/run", params={"id": runs["runs"][0]["id"]}).json()

    asked = Asked(tmp_path, {"ia3": METHODS["ia3"] | {"data": "a"}}, ask, Ear(0.2))
    asked.run()
    about, runs, foreign, shown = asked.asked
    assert about["runs"] and about["serves"] and not about["keyed"] and foreign == 403
    assert [(r["name"], r["state"]) for r in runs] == [("out", "running")]
    assert [(v["name"], v["total_steps"]) for v in shown["variants"]] == [("ia3", 5)]


def test_other_pages_and_full_fine_tuning_are_not_served(tmp_path: Path):
    def ask(url: str) -> tuple[httpx.Response, ...]:
        with httpx.Client(trust_env=False, timeout=30, base_url=url) as client:
            foreign = client.get("/v1/models", headers={"host": "evil.example"})
            return foreign, client.get("/v1/models"), client.get("/readyz"), post(url, "full")

    variants = {"full": METHODS["full"] | {"data": "a", "max_steps": 20}, "v": METHODS["ia3"] | {"data": "a", "max_steps": 20}}
    asked = Asked(tmp_path, variants, ask, Ear(0.02))
    asked.run()
    foreign, models, ready, full = asked.asked
    assert foreign.status_code == 403
    assert [m["id"] for m in models.json()["data"]] == ["tiny-llama", "v"]
    assert (ready.status_code, full.status_code) == (200, 404)


def test_a_failure_of_serving_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(self: object) -> bool:
        raise RuntimeError("planted")

    monkeypatch.setattr(train_serve.Engine, "step", broken)
    asked = Asked(tmp_path, {"v": METHODS["ia3"] | {"data": "a", "max_steps": 3}}, lambda url: None, ear := Ear())
    assert asked.run().summary["variants"]["v"]["steps"] == 3
    assert ear.warnings == ["serving has failed and ends, the run goes on: RuntimeError: planted"]
    with pytest.raises(httpx.TransportError):
        post(asked.url, "v")


def test_an_interrupted_run_ends_its_server(tmp_path: Path):
    stop = Stop()
    ear = Ear(0.0, lambda line: stop.ask(2) if line["step"] == 2 else None)
    asked = Asked(tmp_path, {"v": METHODS["ia3"] | {"data": "a", "max_steps": 5}}, lambda url: None, ear, stop)
    with pytest.raises(Interrupted):
        asked.run()
    with pytest.raises(httpx.TransportError):
        post(asked.url, "v")


def test_the_command(tmp_path: Path, tiny_llama_folder: Path):
    content = run_file(tmp_path, {"v": METHODS["ia3"] | {"data": "a", "max_steps": 1}}) | {
        "base": str(tiny_llama_folder),
        "dtype": "float32",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    result = CliRunner().invoke(main, ["train", str(tmp_path / "run.yaml"), "--json", "--serve", "0"])
    assert result.exit_code == 0, result.output
    assert re.search(r"serving .*\btiny-llama, v at http://127\.0\.0\.1:\d+ for this machine only", result.stderr)
    assert "serving" not in result.stdout
    assert command.make_context("train", ["run.yaml", "--serve"]).params["port"] == 8000
    with train_serve.server.bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        refused = CliRunner().invoke(main, ["train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "b"), "--serve", str(port)])
    assert refused.exit_code == 2 and f"cannot listen on 127.0.0.1:{port}" in refused.output
    assert not (tmp_path / "b").exists()
