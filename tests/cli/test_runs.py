"""`trimtab runs`: what each command writes, waits for and refuses; and a real run that obeys them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from tests.train.common import run_file
from trimtab.cli import main
from trimtab.methods import LoraConfig
from trimtab.train import RunConfig
from trimtab.train.clone import described
from trimtab.train.control import CONTROL
from trimtab.train.options import TrainOptions, VariantConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that nobody trains at present."""
    out = tmp_path / "out"
    out.mkdir()
    v = VariantConfig(name="v", data="a", method=LoraConfig(r=4), options=TrainOptions(lr=1e-3))
    plan = {"steps": {"v": 10, "w": 10}, "variants": {"v": described(v), "w": described(v)}, "settings": {}}
    plan["control"] = {"paused": [], "ended": {"w": "stopped by hand at step 2"}, "refused": {}}
    (out / "run.json").write_text(json.dumps(plan))
    (out / "metrics.jsonl").write_text("")
    return out


def runs(*words: str | Path) -> Any:
    return CliRunner().invoke(main, ["runs", *map(str, words)])


def orders(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / CONTROL).read_text())
    assert found.pop("format") == 1
    return found


def test_orders_to_a_run_that_does_not_train_hold_for_when_it_does(folder: Path) -> None:
    result = runs("pause", folder, "v")
    assert result.exit_code == 0 and "holds when the run is resumed" in result.output
    assert orders(folder) == {"end": False, "variants": {"v": "pause"}, "clones": {}}
    assert runs("clone", folder, "v", "--name", "v2", "--set", "lr=1e-4", "--set", "r=8").exit_code == 0
    assert orders(folder)["clones"] == {"v2": {"of": "v", "set": {"lr": 1e-4, "r": 8}}}
    assert runs("pause", folder).exit_code == 0, "of what has not ended"
    assert orders(folder)["variants"] == {"v": "pause", "v2": "pause"}
    assert runs("resume", folder, "v").exit_code == 0 and orders(folder)["variants"] == {"v2": "pause"}
    assert runs("stop", folder, "v").exit_code == 0 and runs("resume", folder).exit_code == 0
    assert orders(folder)["variants"] == {"v": "stop"}, "a stop is final"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pause", "x"], "no variant of this run"),
        (["resume", "w"], "stopped by hand at step 2"),
        (["stop"], "no process trains"),
        (["clone", "x", "--name", "y"], "no variant of this run"),
        (["clone", "v", "--name", "w"], "is a variant of this run already"),
        (["clone", "v", "--name", "../x"], "is not a name"),
        (["clone", "v", "--name", "y", "--set", "lr"], "write KEY=VALUE"),
        (["clone", "v", "--name", "y", "--set", "lr=-1"], "greater than 0"),
        (["clone", "v", "--name", "y", "--set", "rank=3"], "unknown key"),
        (["clone", "v", "--name", "y", "--set", "data=b"], "one of a"),
        (["clone", "v", "--name", "y", "--set", "method=ia3", "--set", "r=3"], "belongs to method"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_written(folder: Path, words: list[str], said: str) -> None:
    result = runs(words[0], folder, *words[1:])
    assert result.exit_code == 2 and said in result.output, result.output
    assert not (folder / CONTROL).exists()


def test_a_clone_is_written_as_a_run_file(folder: Path) -> None:
    plan = json.loads((folder / "run.json").read_text())
    rows = [{"path": "a.jsonl"}]
    plan |= {
        "base": "b",
        "root": str(folder.parent),
        "settings": {"base": "b", "data.a.train": rows, "data.a.valid": None, "data.a.test": None},
    }
    (folder / "run.json").write_text(json.dumps(plan))
    (folder / "summary.json").write_text(json.dumps(plan))  # a finished run has clones of this kind too
    file = folder.parent / "v2.yaml"
    result = runs("clone", folder, "v", "--name", "v2", "--set", "max_length=64", "--write", file)
    assert result.exit_code == 0 and f"trimtab check {file}" in result.output
    (made,) = RunConfig.load(file).variants
    assert (made.name, made.options.max_length, made.lr, made.method) == ("v2", 64, 1e-3, LoraConfig(r=4))
    assert "exists" in runs("clone", folder, "v", "--name", "v2", "--write", file).output
    assert not (folder / CONTROL).exists()


def test_folders_that_take_no_orders(tmp_path: Path, folder: Path) -> None:
    assert "no run has begun" in runs("pause", tmp_path).output
    (folder / "summary.json").write_text("{}")
    assert "has finished" in runs("pause", folder, "v").output
    (folder / "summary.json").unlink()
    plan = json.loads((folder / "run.json").read_text())
    for wrong, said in (
        ({"variants": None}, "takes no orders"),
        ({"variants": {"v": 3}}, "not as trimtab writes"),
        ({"control": 3}, "takes no"),
    ):
        (folder / "run.json").write_text(json.dumps(plan | wrong))
        result = runs("clone", folder, "v", "--name", "y")
        assert result.exit_code == 2 and said in result.output, result.output
    (folder / "run.json").write_text(json.dumps(plan))
    (folder / CONTROL).symlink_to("/etc/hostname")
    assert runs("pause", folder, "v").exit_code == 2
    (folder / CONTROL).unlink()
    (folder / CONTROL).write_text("{")
    assert "is not JSON" in runs("pause", folder, "v").output


@pytest.mark.slow
def test_a_real_run_obeys(tmp_path: Path, tiny_llama_folder: Path) -> None:
    variants = {n: {"method": "lora", "r": 2, "data": d, "max_steps": 100_000} for n, d in (("v", "a"), ("w", "b"))}
    content = run_file(tmp_path, variants, base=str(tiny_llama_folder))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-m", "trimtab", "train", str(tmp_path / "run.yaml")]
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            out = tmp_path / "out"
            deadline = time.monotonic() + 60
            while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.1)
            assert runs("pause", out, "v").output == "v: paused\n"
            assert runs("clone", out, "v", "--name", "v2", "--set", "max_steps=3").output == "v2 trains: 3 steps\n"
            assert "were read for other values" in runs("clone", out, "v", "--name", "v3", "--set", "max_length=64").output
            assert json.loads(runs("resume", out, "--json").output) == {"runs": True, "done": True, "outcome": "v, w, v2: training"}
            assert runs("stop", out, "v").output.startswith("v stopped by hand at step ")
            assert runs("stop", out).output.startswith("stopped, with a checkpoint")
            assert process.wait(60) == 130
        finally:
            process.kill()
            process.wait(10)
    told = json.loads((out / "run.json").read_text())
    assert told["steps"]["v2"] == 3 and "v" in told["control"]["ended"]
    made = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in made if x["variant"] == "v2"][:3] == [1, 2, 3]
