"""What ranks are refused for: one error that names the cause, heard once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

from tests.places.forked import in_ranks
from tests.train.common import METHODS, run_file, tiny_base, write_rows
from trimtab.cli import main
from trimtab.errors import ConfigError
from trimtab.places.launch import launch
from trimtab.places.place import Place
from trimtab.places.ranks import Ranks, joined
from trimtab.train import RunConfig, train


def refused(folder: Path, config: RunConfig, other: RunConfig | None = None) -> str:
    """What two ranks say, of which the second may have another run file."""

    def work(place: Place) -> None:
        with place.told():
            train(config if place.first else other or config, base=tiny_base(), place=place)

    assert in_ranks(2, work, folder / "log") == [1, 1]
    return "\n".join((folder / "log" / f"{r}.txt").read_text().split("Traceback")[0] for r in (0, 1))


def test_more_ranks_than_rows_is_one_error(tmp_path: Path) -> None:
    variants = {"v": METHODS["lora"] | {"data": "a", "batch_size": 1}}
    said = refused(tmp_path, RunConfig.from_dict(run_file(tmp_path, variants), root=tmp_path))
    assert said.count("2 ranks share the rows of a step, and a step of this run has 1") == 1
    assert "gradient_accumulation_steps" in said and not (tmp_path / "out").exists()


def test_fewer_rows_than_a_batch_are_counted_once_they_are_read(tmp_path: Path) -> None:
    content = run_file(tmp_path, {"v": METHODS["lora"] | {"data": "a", "batch_size": 4}})
    write_rows(tmp_path / "a.jsonl", 1, "a")
    said = refused(tmp_path, RunConfig.from_dict(content, root=tmp_path))
    assert said.count("2 ranks share the rows of a step, and a step of this run has 1") == 1


def test_too_many_ranks_are_told_before_any_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    monkeypatch.setattr("trimtab.places.launch.launch", lambda arguments, ranks, restarts: started.append(ranks) or 0)
    variants = {n: METHODS["lora"] | {"data": "a", "batch_size": 1, "gradient_accumulation_steps": 2} for n in ("v", "w")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_file(tmp_path, variants)))
    said = CliRunner().invoke(main, ["train", str(tmp_path / "run.yaml"), "--ranks", "5"])
    assert said.exit_code == 2 and "5 ranks share the rows of a step, and a step of this run has 4" in said.output and not started
    assert CliRunner().invoke(main, ["train", str(tmp_path / "run.yaml"), "--ranks", "4"]).exit_code == 0 and started == [4]


def test_ranks_that_differ_are_told_apart(tmp_path: Path) -> None:
    variants = {"v": METHODS["lora"] | {"data": "a"}}
    content = run_file(tmp_path, variants)
    other = RunConfig.from_dict(content | {"variants": {"v": variants["v"] | {"lr": 0.5}}}, root=tmp_path)
    said = refused(tmp_path, RunConfig.from_dict(content, root=tmp_path), other)
    assert said.count("variants.v.lr: 0.5 on rank 1") == 1


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [({"RANK": "1"}, "WORLD_SIZE is not set"), ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'")],
)
def test_ranks_without_torchrun(environment: dict[str, str], wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=wanted), joined():
        pass


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = object.__new__(Ranks)
    ranks._local, ranks.here, ranks.ranks = 1, 2, 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ranks.device(None) == ranks.device("cuda") == "cuda:1" and ranks.device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="cannot share one GPU"):
        ranks.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"2 ranks on .* which has 1 GPUs"):
        ranks.device(None)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="leave --ranks out"):
        launch(["train", "run.yaml"], 2)
    monkeypatch.delenv("RANK")
    (tmp_path / "run.yaml").write_text("bases: x\n")
    said = CliRunner().invoke(main, ["train", str(tmp_path / "run.yaml"), "--ranks", "2"])
    assert said.exit_code == 2 and "did you mean 'base'" in said.output
    said = CliRunner().invoke(main, ["train", str(tmp_path / "run.yaml"), "--max-restarts", "2"])
    assert said.exit_code == 2 and "of no use without --ranks" in said.output
