"""Kills and full disks: nothing lost, nothing corrupt accepted, and what was resumed equals what was never interrupted, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.kill_harness import Server, Tally, fill_disk_at_calls, kill_at_calls, kill_at_random, server, trace


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("server"), tiny_llama_folder) as found:
        yield found


@pytest.fixture
def trainings(process: Server, tmp_path: Path) -> Server:
    """Of the long run."""
    process.take(tmp_path / "run", short=False)
    return process


@pytest.fixture
def short_ones(process: Server, tmp_path: Path) -> Server:
    process.take(tmp_path / "run", short=True)
    return process


def clean(tally: Tally, kills: int) -> None:
    assert tally.kills >= kills
    assert tally.finished > 0
    assert tally.clean, tally


@pytest.mark.slow
def test_killed_at_fifty_random_moments(trainings: Server, tmp_path: Path) -> None:
    tally = kill_at_random(trainings, tmp_path, kills=50, seed=1)
    print(f"\n{tally.report}")
    clean(tally, kills=50)
    assert tally.resumable > 15 and tally.finished > 5


@pytest.mark.slow
def test_killed_at_every_call(short_ones: Server, tmp_path: Path) -> None:
    tally, calls = kill_at_calls(short_ones, tmp_path)
    clean(tally, kills=calls)
    assert calls > 50


@pytest.mark.slow
def test_full_disk_at_every_call(short_ones: Server, tmp_path: Path) -> None:
    tally, codes = fill_disk_at_calls(short_ones, tmp_path)
    clean(tally, kills=0)
    assert {0, 2} == set(codes) and min(map(codes.count, (0, 2))) > 20  # some strike a checkpoint, and the run goes on; some the results


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed: apt-get install strace")
@pytest.mark.parametrize(
    ("call", "fault", "most"),
    [
        ("rename", "signal=KILL", 99),
        ("fsync", "signal=KILL", 99),
        ("rename", "error=ENOSPC", 99),
        ("fsync", "error=ENOSPC", 30),
        ("write", "error=ENOSPC", 99),
        ("mkdir", "error=ENOSPC", 30),
    ],
)
def test_faults_in_the_system(short_ones: Server, tmp_path: Path, call: str, fault: str, most: int) -> None:
    tally = trace(short_ones, tmp_path, call, fault, most)
    clean(tally, kills=tally.finished if fault == "signal=KILL" else 0)
