"""A rank that dies: the others end with a checkpoint and its name, and the run goes on from it with any number of ranks."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.places.forked import in_ranks
from tests.places.test_ranks import CASES, check_equal, quick
from tests.train.common import tiny_base
from trimtab.places.place import Place
from trimtab.train import Report, RunConfig, train
from trimtab.train.beside import Beside
from trimtab.train.prepare import Prepared

Config = Callable[[Path], RunConfig]
methods = CASES["methods"]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying(at: int) -> Beside:
    """A rank that is killed between two steps."""

    @contextmanager
    def beside(prepared: Prepared) -> Iterator[Callable[[], None]]:
        yield lambda: die() if prepared.variants[0].progress.step == at else None

    return beside


def read(log: Path) -> str:
    return "\n".join(p.read_text() for p in sorted(log.iterdir()))


def check_resumed(config: Config, folder: Path, one: Report, ranks: int) -> None:
    """The run goes on in so many ranks, and ends as the one that was never interrupted."""

    run = config(folder)

    def work(place: Place) -> None:
        many = train(run, base=tiny_base(), place=place, resume=True)
        for name, adapter in one.adapters.items():
            check_equal(many.adapters[name].params, adapter.params, name)

    assert in_ranks(ranks, work, folder / "log" / "resumed") == [0] * ranks, read(folder / "log" / "resumed")


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "victim", "again"), [(3, 1, 2), (2, 1, 1), (3, 0, 3)])
def test_a_lost_rank_is_named_and_the_run_goes_on(ranks: int, victim: int, again: int, tmp_path: Path) -> None:
    one, run = train(quick(tmp_path / "one"), base=tiny_base()), quick(tmp_path)

    def work(place: Place) -> None:
        with place.told():
            train(run, base=tiny_base(), place=place, **{"beside": dying(3)} if place.rank == victim else {})

    codes = in_ranks(ranks, work, tmp_path / "log" / "killed")
    assert codes[victim] == -signal.SIGKILL and all(code == 1 for i, code in enumerate(codes) if i != victim)
    logs = [(tmp_path / "log" / "killed" / f"{r}.txt").read_text() for r in range(ranks)]
    speaker = 0 if victim else 1
    assert f"rank {victim} of {ranks}" in logs[speaker] and "has ended" in logs[speaker] and "--resume" in logs[speaker]
    assert all("has ended" not in log for r, log in enumerate(logs) if r not in (speaker, victim))
    assert "safe in" in logs[speaker] and "step-00000003" in logs[speaker]
    check_resumed(quick, tmp_path, one, again)


@pytest.mark.slow
def test_ranks_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    """Moments are told in the killed rank's processor time, so that what else the machine does moves none."""
    one, drawn, killed, finished = train(methods(tmp_path / "one"), base=tiny_base()), random.Random(4), 0, 0

    def uninterrupted(place: Place) -> None:
        begun = time.process_time()
        train(
            methods(tmp_path / "timed" / str(place.rank)).model_copy(update={"out": tmp_path / "timed" / "out"}),
            base=tiny_base(),
            place=place,
        )
        (tmp_path / f"{place.rank}.txt").write_text(str(time.process_time() - begun))

    assert in_ranks(2, uninterrupted, tmp_path / "log" / "timed") == [0, 0], read(tmp_path / "log" / "timed")
    whole = [float((tmp_path / f"{rank}.txt").read_text()) for rank in range(2)]
    while killed < 20:
        folder, ended = tmp_path / f"run-{finished}", False
        run = methods(folder)
        while not ended and killed < 20:
            victim = killed % 2
            moment_s = drawn.uniform(0.0, 1.2 * whole[victim])

            def work(place: Place, run: RunConfig = run, victim: int = victim, moment_s: float = moment_s) -> None:
                if place.rank == victim:
                    signal.signal(signal.SIGPROF, lambda *_: die())
                    signal.setitimer(signal.ITIMER_PROF, max(moment_s, 1e-3))
                with place.told():
                    train(run, base=tiny_base(), place=place, resume=True)

            codes = in_ranks(2, work, tmp_path / "log" / f"{finished}-{killed}")
            killed += -signal.SIGKILL in codes
            ended = codes == [0, 0]
        check_resumed(methods, folder, one, 2)
        finished += 1
    assert finished > 1
