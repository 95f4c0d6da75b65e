"""A rank that fails where others go on to talk: whatever it raises and wherever, all end, and say whose error it was. None waits for ever.

Each place in the code where ranks talk is found in a run that talks at all of them; then runs fail there, on one rank.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.places import forked
from tests.places.forked import in_ranks
from tests.places.test_lost import read
from tests.places.test_ranks import validated
from tests.train.common import METHODS, tiny_base
from tests.train.test_rollouts import GRPO
from tests.train.test_rollouts import config as sampled
from tests.train.test_steering import Hand, cloned, tell
from trimtab.errors import ConfigError
from trimtab.places import ranks
from trimtab.places.place import Place
from trimtab.places.ranks import Ranks, joined
from trimtab.places.shards import Shards
from trimtab.train import RunConfig, steering, train
from trimtab.train.interrupt import Stop
from trimtab.train.prepare import Prepared

LIMIT_S = 60.0
"""Ranks that take longer count as waiting for ever; all of a run takes two seconds."""
Site = tuple[str, str]
"""The function that calls a method of the place, and the method."""
Config = Callable[[Path], RunConfig]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked, "LONGEST_S", LIMIT_S)


def steered(folder: Path) -> RunConfig:
    """With validation, scores, checkpoints and orders."""
    variants = {"lora": METHODS["lora"] | {"data": "a", "max_steps": 3}, "ia3": METHODS["ia3"] | {"data": "b", "max_steps": 3}}
    return validated(folder, variants, eval_every=2, checkpoint_every=2)


def drawing(folder: Path) -> RunConfig:
    return sampled(folder, {"v": GRPO | {"beta": 0.1, "max_steps": 2}})


def sharing(folder: Path) -> RunConfig:
    return steered(folder).model_copy(update={"shard": True})


def orders(out: Path) -> Hand:
    return Hand(out, {("lora", 1): cloned("v2", "lora", lr=1e-3), ("lora", 2): tell("ia3", to="stop")})


def site() -> Site:
    """Who talks, as seen from inside of a `Ranks`."""
    frame: Any = sys._getframe(2)
    method = ""
    while frame.f_globals["__name__"] in ("trimtab.places.ranks", "contextlib", __name__):
        method, frame = frame.f_code.co_name, frame.f_back
    return f"{frame.f_globals['__name__'].rpartition('.')[2]}.{frame.f_code.co_qualname}", method


@contextmanager
def hearing(hear: Callable[[Site], None]) -> Iterator[None]:
    """Called in this process before each talk."""
    own = Ranks._together

    def together(self: Ranks, *args: Any, **kwargs: Any) -> Any:
        hear(site())
        return own(self, *args, **kwargs)

    Ranks._together = together  # type: ignore[method-assign]
    try:
        yield
    finally:
        Ranks._together = own  # type: ignore[method-assign]


def trained(run: RunConfig, place: Place, **how: Any) -> None:
    with place.told():
        train(run, base=tiny_base(), place=place, **{"listener": orders(run.out)} | how)


def sites_of(config: Config, folder: Path) -> list[Site]:
    """Of a whole run, in the order in which they come."""
    run = config(folder)

    def work(place: Place) -> None:
        found: dict[Site, None] = {}
        with hearing(lambda where: found.setdefault(where)):
            trained(run, place)
        (folder / f"{place.rank}.json").write_text(json.dumps(list(found)))

    assert in_ranks(2, work, folder / "log") == [0, 0], read(folder / "log")
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    return [tuple(where) for where in first]


ERRORS = (KeyError("planted"), MemoryError("planted"), RuntimeError("planted"), ConfigError("planted"), OSError(28, "planted"))


def check_ended(codes: list[int], log: Path, victim: int, error: Exception) -> None:
    """All ended, with the victim's name and error."""
    wanted = "memory ran out" if isinstance(error, MemoryError) and "memory ran out" in read(log) else "planted"
    assert all(code == 1 for code in codes), (codes, read(log))
    said = [(log / f"{rank}.txt").read_text() for rank in range(len(codes))]
    speaking = [text for text in said if "SystemExit" not in text.splitlines()[-1]]
    assert speaking and all(wanted in text for text in speaking), read(log)
    others = [text for rank, text in enumerate(said) if rank != victim and text in speaking]
    assert all(f"rank {victim} of {len(codes)}" in text for text in others), read(log)


@pytest.mark.slow
@pytest.mark.parametrize("config", [steered, drawing, sharing])
def test_an_error_before_any_talk_ends_all(config: Config, tmp_path: Path) -> None:
    sites = sites_of(config, tmp_path / "whole")
    assert len(sites) > 10, sites
    for i, where in enumerate(sites):
        victim, error, folder = i % 2, ERRORS[i % len(ERRORS)], tmp_path / str(i)
        run = config(folder)

        def work(place: Place, run: RunConfig = run, where: Site = where, victim: int = victim, error: Exception = error) -> None:
            def fail(here: Site) -> None:
                if here == where:
                    raise error

            with hearing(fail) if place.rank == victim else nullcontext():
                trained(run, place)

        codes = in_ranks(2, work, folder / "log")
        check_ended(codes, folder / "log", victim, error)


def planted(*_: object, **__: object) -> None:
    raise KeyError("planted")


@pytest.mark.slow
@pytest.mark.parametrize("talk", ["all_reduce", "broadcast_object_list", "all_gather_object"])
def test_an_error_while_ranks_talk_ends_all(talk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = steered(tmp_path)

    def work(place: Place) -> None:
        if not place.first:
            monkeypatch.setattr(dist, talk, planted)
        trained(run, place)

    check_ended(in_ranks(2, work, tmp_path / "log"), tmp_path / "log", 1, KeyError())


@pytest.mark.slow
def test_what_fails_between_two_parts_of_a_base_is_no_reason_to_refuse_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start of a clone reads the base, of which the others then wait for this rank's part: the run cannot go on without it."""
    run, made = sharing(tmp_path), steering.make_variant
    clone = cloned("v2", "lora", lora_dropout=0.0, init_lora_weights="pissa")

    def work(place: Place) -> None:
        def without_parts(*args: Any) -> Any:
            monkeypatch.setattr(Shards, "_send", planted)
            return made(*args)

        if not place.first:
            monkeypatch.setattr(steering, "make_variant", without_parts)
        trained(run, place, listener=Hand(run.out, {("lora", 1): clone}))

    check_ended(in_ranks(2, work, tmp_path / "log"), tmp_path / "log", 1, KeyError())


@pytest.mark.slow
def test_a_signal_to_one_rank_after_the_last_step_is_told(tmp_path: Path) -> None:
    run = steered(tmp_path)

    def work(place: Place) -> None:
        stop = Stop()

        @contextmanager
        def late(prepared: Prepared) -> Iterator[Callable[[], None]]:
            yield lambda: None
            stop.ask(signal.SIGTERM)

        trained(run, place, stop=stop, **{"beside": late} if not place.first else {})

    assert in_ranks(2, work, tmp_path / "log") == [1, 1]
    first, second = ((tmp_path / "log" / f"{rank}.txt").read_text() for rank in range(2))
    assert "Interrupted" in second and "rank 1 of 2" in first and "has ended: interrupted" in first, first


@pytest.mark.slow
@pytest.mark.parametrize("where", ["here", "there"])
def test_a_run_that_has_ended_on_one_machine_alone(where: str, tmp_path: Path) -> None:
    """`out` is not shared: the first machine's folder, or the second's, has the whole run."""
    runs = [steered(tmp_path / name) for name in ("here", "there")]
    train(runs[("here", "there").index(where)], base=tiny_base())

    def work(place: Place) -> None:
        trained(runs[place.rank], place, resume=True)

    assert in_ranks(2, work, tmp_path / "log") == [1, 1]
    said = read(tmp_path / "log").split("Traceback")[0]
    assert f"whether `out` has a summary.json: {where == 'there'} on rank 1" in said and "an `out` that they share" in said, said


@pytest.mark.parametrize("things", [("'once' of 0", "'most' of 1"), ("'add_gradients' of 1", "'add_gradients' of 2")])
def test_ranks_that_have_come_for_different_things_do_not_wait(things: tuple[str, str], tmp_path: Path) -> None:
    def work(place: Place) -> None:
        with place.told():
            if "gradients" in things[0]:
                place.add_gradients([[torch.ones(3, requires_grad=True)] * (1 + place.rank)])
            else:
                place.once(lambda: None) if place.first else place.most(1)

    assert in_ranks(2, work, tmp_path / "log") == [1, 1]
    said = read(tmp_path / "log").split("Traceback")[0]
    assert "the ranks do not do the same any more: rank 0" in said and all(f"at {thing}" in said for thing in things), said


def test_ranks_have_restarted_where_torchrun_of_any_machine_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts restarts on the machine whose rank has failed, and on no other."""

    @contextmanager
    def counted() -> Iterator[Place]:
        os.environ["TORCHELASTIC_RESTART_COUNT"] = os.environ["RANK"]
        with joined() as place:
            yield place

    monkeypatch.setattr(forked, "joined", counted)

    def work(place: Place) -> None:
        assert place.restarted
        with place.told():
            place.once(planted if place.first else lambda: None)

    check_ended(in_ranks(2, work, tmp_path / "log"), tmp_path / "log", 0, KeyError())
    assert "KeyError" in (tmp_path / "log" / "0.txt").read_text()


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[Place]]:
    """`joined` where each rank is on a machine of its own."""

    @contextmanager
    def join() -> Iterator[Place]:
        monkeypatch.setattr(socket, "gethostname", lambda: f"machine-{os.environ['RANK']}")
        with joined() as place:
            yield place

    return join


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room for 2.00 GiB"), RuntimeError("out of memory"), NotImplementedError("no room")]
)
def test_an_error_of_this_rank_is_not_taken_for_a_machine_that_is_gone(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such errors are RuntimeErrors, as that of a connection that is gone. The other machine waits, and gives no sign."""

    monkeypatch.setattr(forked, "joined", elsewhere(monkeypatch))
    monkeypatch.setattr(ranks, "SIGN_S", 0.5)

    def fail(tensor: torch.Tensor) -> None:
        raise error

    def work(place: Place) -> None:
        if place.first:
            monkeypatch.setattr(dist, "all_reduce", fail)
        with place.told():
            place.add(torch.ones(3))

    assert in_ranks(2, work, tmp_path / "log") == [1, 1]
    first, second = ((tmp_path / "log" / f"{rank}.txt").read_text().partition("\n")[0] for rank in range(2))
    assert "rank 0 of 2 (machine-0, process" in first and f"cannot go on with the others: {type(error).__name__}" in first, first
    assert "rank 0 of 2 (machine-0, process" in second and f"has ended: {type(error).__name__}: {error}" in second, second


@pytest.mark.slow
def test_a_machine_that_tells_nothing_is_not_said_to_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its process has ended cannot be seen from here."""
    monkeypatch.setattr(forked, "joined", elsewhere(monkeypatch))
    monkeypatch.setattr(ranks, "SIGN_S", 0.5)

    def work(place: Place) -> None:
        if not place.first:
            os.kill(os.getpid(), signal.SIGKILL)
        with place.told():
            place.add(torch.ones(3))

    assert in_ranks(2, work, tmp_path / "log") == [1, -signal.SIGKILL]
    said = (tmp_path / "log" / "0.txt").read_text()
    assert "rank 1 of 2 (machine-1, process" in said and "gives no sign" in said and "has ended" not in said.split("Traceback")[0], said
