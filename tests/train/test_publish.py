"""A run that publishes: every variant in the store under its name, nothing lost where the store fails, nothing published twice."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from tests.train.common import METHODS, run_file, tiny_base
from trimtab.cli import main
from trimtab.cli.stopping import tell_how_to_resume
from trimtab.errors import AdapterError, ConfigError, TrimtabError
from trimtab.store import Adapter
from trimtab.store.registry import Store
from trimtab.train import Report, RunConfig, train
from trimtab.train.sweep import sweep
from trimtab.train.trials import Sweep
from trimtab.train.variant import Variant

TWO = {"one": METHODS["lora"] | {"data": "a"}, "two": METHODS["ia3"] | {"data": "b"}}


def go(folder: Path, variants: dict[str, dict[str, Any]], *, resume: bool = False, root: str = "store", **keys: Any) -> Report:
    content = run_file(folder, variants) | {"store": "acme", "defaults": {"max_steps": 2, "batch_size": 3}} | keys
    return train(RunConfig.from_dict(content, root=folder), base=tiny_base(), resume=resume, store=folder / root)


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "summary.json").read_text())


def test_each_variant_is_published_with_its_scores(tmp_path: Path) -> None:
    report = go(tmp_path, TWO | {"all": METHODS["full"] | {"data": "a"}})
    store, base = Store(tmp_path / "store"), tiny_base()
    assert [v.ref for v in store.list()] == ["acme/one@1", "acme/two@1"]
    assert report.summary == summary(tmp_path)
    assert {n: v.get("published") for n, v in report.summary["variants"].items()} == {"one": "acme/one@1", "two": "acme/two@1", "all": None}
    loaded = Adapter.load("acme/one", base, store=store)
    assert all(torch.equal(loaded.params[k], t) for k, t in report.adapters["one"].params.items())
    told = loaded.info["run"]
    assert told["metrics"]["loss"] == report.summary["variants"]["one"]["scores"]["loss"]
    assert told["base_metrics"]["loss"] == report.summary["base_scores"]["a"]["loss"]
    exported = store.export("acme/one", tmp_path / "exported") / "README.md"
    assert f"| `loss` | {told['base_metrics']['loss']:.6g} | {told['metrics']['loss']:.6g} |" in exported.read_text()


def test_a_run_without_the_key_publishes_nothing(tmp_path: Path) -> None:
    report = go(tmp_path, {"one": TWO["one"]}, store=None)
    assert not (tmp_path / "store").exists() and "published" not in report.summary["variants"]["one"]


def test_the_next_run_is_the_next_version(tmp_path: Path) -> None:
    go(tmp_path / "first", {"one": TWO["one"]}, root="../store")
    report = go(tmp_path / "second", {"one": TWO["one"] | {"seed": 5}}, root="../store")
    assert report.summary["variants"]["one"]["published"] == "acme/one@2"


@pytest.mark.parametrize("name", ["Acme", "a/b", "", "..", "x" * 64, 3])
def test_a_wrong_namespace_is_found_with_the_run_file(tmp_path: Path, name: Any) -> None:
    with pytest.raises(ConfigError, match="store"):
        go(tmp_path, TWO, store=name)
    assert not (tmp_path / "out").exists() and not (tmp_path / "store").exists()


def test_a_store_that_cannot_be_is_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir(parents=True)
    (tmp_path / "store" / "thesis.tex").write_text("mine")
    with pytest.raises(AdapterError, match=r"thesis\.tex"):
        go(tmp_path, TWO)
    assert not (tmp_path / "out").exists()


def test_a_store_that_takes_no_blob_is_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise AdapterError("cannot write a blob: No space left on device")

    monkeypatch.setattr(Store, "put_blob", full)
    with pytest.raises(AdapterError, match="No space"):
        go(tmp_path, TWO)
    assert not (tmp_path / "out").exists()


def test_full_fine_tuning_alone_has_nothing_to_publish(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="every variant is full fine-tuning"):
        go(tmp_path, {"all": METHODS["full"] | {"data": "a"}})
    assert not (tmp_path / "out").exists()


def test_a_failing_publish_loses_nothing_and_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two fails: the other is published, the run folder is whole, and both ways that the message names lead to the end."""
    original = Store.publish

    def failing(self: Store, source: Any, name: str, **options: Any) -> Any:
        if name == "acme/one":
            raise AdapterError("cannot publish acme/one: No space left on device", fix="make room")
        return original(self, source, name, **options)

    with monkeypatch.context() as patch, pytest.raises(TrimtabError) as caught:
        patch.setattr(Store, "publish", failing)
        go(tmp_path, TWO)
    said = str(caught.value)
    assert "is finished and saved in" in said and "No space left" in said and "acme/two" not in said
    assert {n: v.get("published") for n, v in summary(tmp_path)["variants"].items()} == {"one": None, "two": "acme/two@1"}
    assert (tmp_path / "out" / "report.html").is_file() and Adapter.load(tmp_path / "out" / "adapters" / "one", tiny_base()).info
    resumed = go(tmp_path, TWO, resume=True)
    assert resumed.summary["variants"]["one"]["published"] == "acme/one@1"
    assert summary(tmp_path) == resumed.summary
    assert [v.ref for v in Store(tmp_path / "store").list()] == ["acme/one@1", "acme/two@1"], "two was not published again"
    words = shlex.split(said.split("publish it with: ")[1].splitlines()[0])
    assert words[:4] == ["trimtab", "adapters", "publish", str(tmp_path / "out" / "adapters" / "one")]
    by_hand = CliRunner().invoke(main, words[1:])
    assert by_hand.exit_code == 0 and "acme/one@1" in by_hand.output, "what the newest version holds is that version"


def test_a_run_that_is_finished_can_still_be_published(tmp_path: Path) -> None:
    go(tmp_path, TWO, store=None)
    assert go(tmp_path, TWO, resume=True).summary["variants"]["two"]["published"] == "acme/two@1"
    assert go(tmp_path, TWO, resume=True, store="beta").summary["variants"]["two"]["published"] == "beta/two@1"


def test_what_has_diverged_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Variant.pack

    def poisoned(self: Variant) -> Any:
        packed = original(self)
        if self.name == "two" and self.progress.step == 1:
            next(iter(packed.edits.values())).tensors["g"].data.fill_(math.inf)
        return packed

    monkeypatch.setattr(Variant, "pack", poisoned)
    report = go(tmp_path, TWO)
    assert "published" not in report.summary["variants"]["two"]
    assert [v.ref for v in Store(tmp_path / "store").list()] == ["acme/one@1"]


def test_a_sweep_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_STORE", str(tmp_path / "store"))
    content = run_file(tmp_path, {}) | {"store": "acme", "defaults": {"max_steps": 2, "batch_size": 3}}
    content["data"]["a"]["valid"] = "a-test.jsonl"
    content["sweep"] = {"variant": {"data": "a", "method": "ia3"}, "search": {"lr": [1e-3, 2e-2]}}
    del content["variants"]
    board = sweep(Sweep.from_dict(content, root=tmp_path), base=tiny_base()).leaderboard
    assert not (tmp_path / "store").exists()
    assert yaml.safe_load(board["best"]["run_file"])["store"] == "acme", "the winner's own run does"


def test_on_the_command_line(tmp_path: Path, tiny_llama_folder: Path) -> None:
    content = run_file(tmp_path, {"one": TWO["one"]}) | {"store": "acme", "base": str(tiny_llama_folder), "dtype": "float32"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    arguments = ["train", str(tmp_path / "run.yaml"), "--store", str(tmp_path / "store")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "published: acme/one@1" in done.output
    options = ["--base", str(tiny_llama_folder), "--store", str(tmp_path / "store"), "--max-new-tokens", "3", "--json"]
    answers = [
        json.loads(CliRunner().invoke(main, ["generate", *options, "--adapter", a, "n 3"]).stdout)[0]["text"]
        for a in ("acme/one", "acme/one@latest", str(tmp_path / "out" / "adapters" / "one"))
    ]
    assert len(set(answers)) == 1


def test_an_interrupted_run_goes_on_with_the_same_store(capsys: pytest.CaptureFixture[str]) -> None:
    tell_how_to_resume("train", [Path("run.yaml")], None, Path("my store"))
    assert capsys.readouterr().err == "go on with: trimtab train run.yaml --store 'my store' --resume\n"
