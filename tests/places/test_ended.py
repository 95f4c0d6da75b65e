"""A run of ranks that is ended, by an order or a signal, ends with a checkpoint: `--max-restarts` starts nothing again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from tests.train.common import METHODS, run_file
from trimtab.cli import main
from trimtab.cli import train as command_of_train
from trimtab.places.place import ONE_PROCESS, Place
from trimtab.train import ordering
from trimtab.train.checkpoint import steps_of
from trimtab.train.interrupt import Interrupted

pytestmark = pytest.mark.slow
LONG = METHODS["lora"] | {"data": "a", "max_steps": 100_000}


def rank_of(launcher: int) -> int:
    """The process of the second rank."""
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (entry / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError, IndexError):
            continue
        if parent == launcher and b"RANK=1" in environment:
            return int(entry.name)
    raise AssertionError("there is no second rank")


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        (lambda pid, out: ordering.end(out), 130),
        (lambda pid, out: os.kill(pid, signal.SIGINT), 130),
        (lambda pid, out: os.kill(pid, signal.SIGTERM), 143),
        (lambda pid, out: os.kill(rank_of(pid), signal.SIGTERM), 143),
    ],
    ids=["order", "SIGINT", "SIGTERM", "SIGTERM of a rank"],
)
def test_ranks_that_are_ended_are_not_started_again(
    ends: Callable[[int, Path], object], code: int, tmp_path: Path, tiny_llama_folder: Path
) -> None:
    content = run_file(tmp_path, {"v": LONG}, checkpoint_every=10, evaluate={"generate": False}) | {"base": str(tiny_llama_folder)}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    out, said = tmp_path / "out", tmp_path / "said"
    command = [sys.executable, "-m", "trimtab", "train", str(tmp_path / "run.yaml"), "--ranks", "2", "--max-restarts", "3"]
    with said.open("wb") as file:
        launcher = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        while not steps_of(out):
            assert launcher.poll() is None, said.read_text()
            time.sleep(0.05)
        ends(launcher.pid, out)
        assert launcher.wait(120) == code, said.read_text()
    finally:
        launcher.kill()
        launcher.wait()
    newest = steps_of(out)[0]
    lines = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, len(lines) + 1)) and newest.name == f"step-{lines[-1]:08d}", (
        "after the last step, and none was made twice"
    )
    assert "saved in" in said.read_text() and "--resume" in said.read_text() and not (out / "summary.json").exists()


def test_a_rank_that_is_interrupted_leaves_the_others_before_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ended with gloo's threads was aborted now and then, which torchrun takes for a failure: it started the ranks again."""
    seen = []

    @contextmanager
    def joined() -> Iterator[Place]:
        yield ONE_PROCESS
        seen.append("left")

    def interrupted(*_: object, **__: object) -> None:
        seen.append("trained")
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(command_of_train, "_place", joined)
    monkeypatch.setattr("trimtab.train.train", interrupted)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_file(tmp_path, {"v": LONG})))
    result = CliRunner().invoke(main, ["train", str(tmp_path / "run.yaml")])
    assert (result.exit_code, seen) == (143, ["trained", "left"]), result.output
