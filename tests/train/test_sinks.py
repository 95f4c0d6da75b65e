"""TensorBoard and Weights & Biases: fed the lines of metrics.jsonl, and never in training's way."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.train.common import METHODS, metrics, run, run_file, tiny_base
from trimtab.errors import ConfigError
from trimtab.train import RunConfig, train
from trimtab.train.listen import Silent
from trimtab.train.sinks import PACKAGES, tracking, values

STEP = {"variant": "v", "step": 3, "epoch": 0, "loss": 1.5, "grad_norm": float("inf"), "lr": 1e-3}
VALID = {"event": "valid", "variant": "v", "step": 3, "metric": "loss", "best": True, "valid_loss": 0.5, "base_valid_loss": None}


class Heard(Silent):
    """A listener that keeps warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)


class Kept:
    """metrics.jsonl's stand-in."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A module named wandb that records what is asked of it; `fail` makes every log raise."""
    calls: dict[str, Any] = {"log": [], "define": [], "finish": 0, "fail": False}

    class Run:
        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            calls["define"].append((name, step_metric))

        def log(self, content: dict[str, float]) -> None:
            if calls["fail"]:
                raise ConnectionError("the network is down")
            calls["log"].append(content)

        def finish(self) -> None:
            calls["finish"] += 1

    module: Any = ModuleType("wandb")
    module.__spec__ = type(sys.__spec__)("wandb", None)
    settings = type("Settings", (), {"project": None})()
    module.setup = lambda: type("Session", (), {"settings": settings})()
    module.init = lambda **keys: calls.update(init=keys) or Run()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_values_by_hand() -> None:
    assert values(STEP) == {"train/epoch": 0, "train/loss": 1.5, "train/lr": 1e-3}
    assert values(VALID) == {"valid/loss": 0.5}
    assert values(VALID | {"base_valid_loss": 4, "valid_exact_match": 7}) == {
        "valid/loss": 0.5,
        "base_valid/loss": 4,
        "valid/exact_match": 7,
    }


def test_tensorboard_has_what_metrics_has(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is an option: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = run(tmp_path, {n: METHODS[n] | {"data": "a"} for n in ("lora", "ia3")}, track=["tensorboard"])
    for name, lines in metrics(report).items():
        events = EventAccumulator(str(report.out / "tensorboard" / name)).Reload()
        seen = [(e.step, e.value) for e in events.Scalars("train/loss")]
        assert [s for s, _ in seen] == [line["step"] for line in lines]
        assert [v for _, v in seen] == pytest.approx([line["loss"] for line in lines])
        assert {"train/grad_norm", "train/lr", "train/tokens_per_s"} <= set(events.Tags()["scalars"])


def test_wandb_gets_each_variant_on_its_own_axis(tmp_path: Path, stub: dict[str, Any]) -> None:
    report = run(tmp_path, {"v": METHODS["ia3"] | {"data": "a", "max_steps": 2}}, track=["wandb"])
    assert (stub["init"]["project"], stub["init"]["name"], stub["init"]["dir"]) == ("trimtab", "out", str(report.out))
    assert stub["init"]["config"]["variants.v.method"] == "ia3"
    assert stub["define"] == [("v/step", None), ("v/*", "v/step")]
    assert [c["v/step"] for c in stub["log"]] == [1, 2]
    assert [c["v/train/loss"] for c in stub["log"]] == [line["loss"] for line in metrics(report)["v"]]
    assert stub["finish"] == 1


def test_wandb_itself_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="Weights & Biases is an option: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    heard = Heard()
    with tracking(["wandb"], tmp_path, {"seed": 0}, Kept(), heard.warning) as sink:
        sink.write(STEP)
    assert heard.warnings == []
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_a_failing_sink_is_left_out_and_said_once(tmp_path: Path, stub: dict[str, Any]) -> None:
    stub["fail"] = True
    heard = Heard()
    content = run_file(tmp_path, {"v": METHODS["ia3"] | {"data": "a"}}, track=["wandb"])
    report = train(RunConfig.from_dict(content, root=tmp_path), base=tiny_base(), listener=heard)
    assert report.summary["variants"]["v"]["steps"] == 5 == len(metrics(report)["v"])
    assert heard.warnings == ["wandb is left out from here on, the run goes on: ConnectionError: the network is down"]


def test_a_sink_that_cannot_open_stops_nothing(tmp_path: Path, stub: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("not logged in")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    kept, heard = Kept(), Heard()
    with tracking(["wandb"], tmp_path, {}, kept, heard.warning) as sink:
        sink.write(STEP)
        sink.write(VALID)
    assert kept.lines == [STEP, VALID]
    assert len(heard.warnings) == 1 and "not logged in" in heard.warnings[0]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("trimtab.train.sinks.find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=f"pip install {name}"):
        RunConfig.from_dict(run_file(tmp_path, {"v": METHODS["ia3"] | {"data": "a"}}, track=[name]), root=tmp_path)


def test_an_unknown_sink_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"track.*'tensorboard' or 'wandb'.*'tensorbord'"):
        RunConfig.from_dict(run_file(tmp_path, {"v": METHODS["ia3"] | {"data": "a"}}, track=["tensorbord"]), root=tmp_path)


def test_a_run_without_track_writes_no_sink(tmp_path: Path) -> None:
    report = run(tmp_path, {"v": METHODS["ia3"] | {"data": "a", "max_steps": 1}})
    assert {p.name for p in report.out.iterdir()} >= {"adapters", "metrics.jsonl", "summary.json", "report.html"}
    assert not (report.out / "tensorboard").exists() and not (report.out / "wandb").exists()
    assert json.loads((report.out / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
