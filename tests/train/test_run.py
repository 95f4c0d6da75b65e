"""A run from its run file to its run folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.train.common import METHODS, metrics, run, run_file, tiny_base
from trimtab.errors import BaseError, ConfigError, DataError
from trimtab.store import Adapter
from trimtab.train import RunConfig, train
from trimtab.train.listen import Silent
from trimtab.train.variant import Variant


def test_the_run_folder(tmp_path: Path) -> None:
    variants = {n: f | {"data": "a"} for n, f in METHODS.items()}
    report = run(tmp_path, variants)
    summary = json.loads((report.out / "summary.json").read_text())
    assert summary["base_fingerprint"]["before"] == summary["base_fingerprint"]["after"]
    assert set(summary["variants"]) == set(variants)
    base = tiny_base()
    for name, entry in summary["variants"].items():
        assert entry["steps"] == 5
        assert entry["tokens"] > entry["supervised_tokens"] > 0
        assert entry["adapter_bytes"] > 0
        assert set(entry["scores"]) >= {"loss", "exact_match", "token_f1", "rouge_l"}
        assert len(metrics(report)[name]) == 5
        if name != "full":
            loaded = Adapter.load(report.out / "adapters" / name, base)
            for key, tensor in report.adapters[name].params.items():
                assert torch.equal(loaded.params[key], tensor)
    full = AutoModelForCausalLM.from_pretrained(report.out / "adapters" / "full")
    assert not torch.equal(full.lm_head.weight, base.model.lm_head.weight)


def test_train_by_its_public_name(tmp_path: Path) -> None:
    """`trimtab.train` is a package and a function; it must be callable whatever was imported first."""
    import trimtab.train.config

    content = run_file(tmp_path, {"v": {"data": "a", "method": "ia3", "max_steps": 1}})
    report = trimtab.train(trimtab.RunConfig.from_dict(content, root=tmp_path), base=tiny_base())
    assert report.summary["variants"]["v"]["steps"] == 1
    assert trimtab.train.config.RunConfig is trimtab.RunConfig


def test_the_loss_is_the_mean_over_the_targets_of_the_step(tmp_path: Path) -> None:
    """Computed plainly: all rows of an optimizer step, one by one, through the model's own logits."""
    base = tiny_base()
    content = run_file(tmp_path, {"v": {"data": "a", "method": "ia3", "max_steps": 1, "batch_size": 2, "gradient_accumulation_steps": 3}})
    seen: list[tuple[list[int], list[bool]]] = []
    original = Variant.next_batch

    def spy(self: Variant):
        batch = original(self)
        seen.extend((e.ids.tolist(), e.supervised.tolist()) for m in batch.micro_batches for e in m.examples)
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Variant, "next_batch", spy)
        report = train(RunConfig.from_dict(content, root=tmp_path), base=base)
    assert len(seen) == 6
    nll = []
    for ids, mask in seen:
        log_p = torch.log_softmax(base.logits([ids])[0].double(), -1)
        nll += [-log_p[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t]]
    assert metrics(report)["v"][0]["loss"] == pytest.approx(sum(nll) / len(nll), rel=1e-5)


def test_a_variant_that_diverges_stops_alone(tmp_path: Path) -> None:
    """Its tensors stay at the last good step, its rows are named, the others go on to where they would have come alone."""
    variants = {"good": METHODS["lora"] | {"data": "a"}, "bad": METHODS["ia3"] | {"data": "b"}}
    original = Variant.pack

    def poisoned(self: Variant):
        packed = original(self)
        if self.name == "bad" and self.progress.step == 2:
            next(iter(packed.edits.values())).tensors["g"].data.fill_(math.inf)
        return packed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Variant, "pack", poisoned)
        report = run(tmp_path / "joint", variants)
    entries = report.summary["variants"]
    assert entries["bad"]["steps"] == 2
    assert "b.jsonl:" in entries["bad"]["stopped"]
    assert all(torch.isfinite(t).all() for t in report.adapters["bad"].params.values())
    lines = (report.out / "metrics.jsonl").read_text(encoding="utf-8")
    assert "NaN" not in lines and "Infinity" not in lines, "these are not JSON"
    alone = run(tmp_path / "solo", {"good": variants["good"]})
    assert [e["loss"] for e in metrics(report)["good"]] == pytest.approx([e["loss"] for e in metrics(alone)["good"]], rel=1e-4)


def test_a_variant_that_cannot_be_saved_costs_the_others_nothing(tmp_path: Path) -> None:
    """Though nobody saw it before the end; the finished run is resumed too."""
    original = Variant.trained

    def broken(self: Variant):
        return {k: t * math.nan if self.name == "bad" else t for k, t in original(self).items()}

    content = {"good": METHODS["lora"] | {"data": "a"}, "bad": METHODS["ia3"] | {"data": "b"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Variant, "trained", broken)
        report = run(tmp_path, content)
    entries = report.summary["variants"]
    assert "cannot be saved" in entries["bad"]["stopped"] and entries["good"]["stopped"] is None
    assert set(report.adapters) == {"good"} and entries["good"]["scores"]["loss"] > 0
    assert (entries["bad"]["adapter_bytes"], entries["bad"]["saved_step"]) == (0, None)
    assert not (report.out / "adapters" / "bad").exists()
    again = RunConfig.from_dict(run_file(tmp_path, content), root=tmp_path)
    assert set(train(again, resume=True, base=tiny_base()).adapters) == {"good"}


def test_a_fine_tuned_model_that_cannot_be_saved_costs_the_others_nothing(tmp_path: Path) -> None:
    original = Variant.step

    def broken(self: Variant, *rest: Any) -> dict[str, float]:
        logged = original(self, *rest)
        if self.name == "bad" and self.progress.step == self.total_steps:
            self.params["model.norm.weight"].data[3] = math.nan
        return logged

    content = {n: METHODS["full"] | {"data": "a", "max_steps": 2} for n in ("good", "bad")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Variant, "step", broken)
        report = run(tmp_path, content)
    entries = report.summary["variants"]
    assert entries["bad"]["stopped"] == "cannot be saved: values that are not finite in model.norm.weight"
    assert (entries["bad"]["adapter_bytes"], entries["bad"]["saved_step"], entries["bad"]["scores"]) == (0, None, {})
    assert not (report.out / "adapters" / "bad").exists()
    assert entries["good"]["stopped"] is None and entries["good"]["scores"]["loss"] > 0
    model = AutoModelForCausalLM.from_pretrained(report.out / "adapters" / "good")
    assert all(bool(torch.isfinite(w).all()) for w in model.parameters())
    again = RunConfig.from_dict(run_file(tmp_path, content), root=tmp_path)
    assert train(again, resume=True, base=tiny_base()).summary["variants"]["bad"]["saved_step"] is None


def test_a_run_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "something").touch()
    with pytest.raises(ConfigError, match="not empty"):
        run(tmp_path, {"v": {"data": "a", "method": "lora"}})
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["something"]


@pytest.mark.parametrize("name", ["target", "rows"])
def test_nothing_is_written_before_everything_is_checked(tmp_path: Path, name: str) -> None:
    content = run_file(
        tmp_path, {"v": {"data": "a", "method": "lora", "r": 2, "target_modules": ["q_proj", "v_porj" if name == "target" else "v_proj"]}}
    )
    if name == "rows":
        (tmp_path / "a.jsonl").write_text('{"question": "x"}\n')
    with pytest.raises(ConfigError if name == "target" else DataError):
        train(RunConfig.from_dict(content, root=tmp_path), base=tiny_base())
    assert not (tmp_path / "out").exists()


def test_labels_that_do_not_fit_the_test_rows_stop_a_run_at_its_start(tmp_path: Path) -> None:
    content = run_file(tmp_path, {"v": {"data": "a", "method": "ia3"}})
    content["data"]["a"]["labels"] = ["yes", "no"]
    with pytest.raises(DataError, match="label"):
        train(RunConfig.from_dict(content, root=tmp_path), base=tiny_base())
    assert not (tmp_path / "out").exists()


def test_rows_longer_than_the_positions_stop_a_run_at_its_start(tmp_path: Path) -> None:
    content = run_file(tmp_path, {"v": {"data": "a", "method": "prompt", "num_virtual_tokens": 490, "max_steps": 1}})
    with pytest.raises(DataError, match=r"v: a.jsonl:\d+ has \d+ tokens, room is for 22"):
        train(RunConfig.from_dict(content, root=tmp_path), base=tiny_base())
    assert not (tmp_path / "out").exists()


def test_adapters_are_saved_before_they_are_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("scoring fell over")

    monkeypatch.setattr("trimtab.train.loop.evaluate", broken)
    with pytest.raises(RuntimeError, match="fell over"):
        run(tmp_path, {"v": METHODS["lora"] | {"data": "a"}})
    assert Adapter.load(tmp_path / "out" / "adapters" / "v", tiny_base()).info


def test_left_out_rows_are_told(tmp_path: Path) -> None:
    content = run_file(tmp_path, {"v": {"data": "a", "method": "ia3", "max_steps": 1}})
    with (tmp_path / "a.jsonl").open("a") as f:
        f.write('{"messages": [{"role": "user", "content": "no answer"}]}\n')
    heard: list[str] = []

    class Ear(Silent):
        def warning(self, text: str) -> None:
            heard.append(text)

    train(RunConfig.from_dict(content, root=tmp_path), base=tiny_base(), listener=Ear())
    assert any("data.a.train: left out" in text and "a.jsonl:12" in text for text in heard)


def test_a_base_that_changes_during_a_run_is_told_and_nothing_is_lost(tmp_path: Path) -> None:
    """Something else in the process writes to a weight: the adapters are on disk all the same, and the error says where."""
    base = tiny_base()

    class Writes(Silent):
        def step(self, line) -> None:
            base.model.lm_head.weight.data[0, 0] += 1.0

    content = run_file(tmp_path, {n: METHODS[n] | {"data": "a", "max_steps": 2} for n in ("lora", "full")})
    with pytest.raises(BaseError, match=r"(?s)'tiny-llama' has changed during training: sha256:.*fix: find") as told:
        train(RunConfig.from_dict(content, root=tmp_path), base=base, listener=Writes())
    assert str(tmp_path / "out" / "adapters") in str(told.value)
    assert Adapter.load(tmp_path / "out" / "adapters" / "lora", tiny_base()).info["run"]
    assert (tmp_path / "out" / "adapters" / "full" / "model.safetensors").exists() and not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize("tested", [True, False])
def test_a_run_says_that_it_scores_only_where_there_are_test_rows(tmp_path: Path, tested: bool) -> None:
    said: list[str] = []

    class Ear(Silent):
        def status(self, text: str) -> None:
            said.append(text)

    content = run_file(tmp_path, {"v": {"data": "a", "method": "lora", "r": 2, "max_steps": 1}})
    if not tested:
        content["data"] = {"a": {"train": "a.jsonl"}}
    report = train(RunConfig.from_dict(content, root=tmp_path), base=tiny_base(), listener=Ear())
    assert ("scoring on held-out rows" in said) == tested == ("loss" in report.table().headings)
    assert ("no `test` rows, so nothing is scored" in said) != tested
