"""N ranks obey orders as one process does: the first reads them, and all stop, pause and clone at the same step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.places.forked import in_ranks
from tests.train.common import tiny_base
from tests.train.test_steering import IA3, LORA, PLAIN, Hand, cloned, config, tell
from trimtab.places.place import ONE_PROCESS, Place
from trimtab.store import Adapter
from trimtab.train import RunConfig, steering, train
from trimtab.train.control import change_orders
from trimtab.train.interrupt import Interrupted

pytestmark = pytest.mark.slow
VARIANTS = {"lora": LORA | PLAIN, "ia3": IA3}


def obey(run: RunConfig, said: list[str], place: Place) -> None:
    """Pause, stop, clone, refuse a clone, wait while all are paused, then end as on Ctrl-C."""
    orders = {
        ("lora", 2): tell("lora", to="pause"),
        ("ia3", 3): cloned("v2", "lora", lr=1e-3),
        ("v2", 1): cloned("no", "lora", max_length=64),
        ("v2", 2): tell("ia3", to="stop"),
        ("v2", 3): tell("v2", to="pause"),
        ("lora", 4): lambda o: type(o)(True, o.variants, o.clones),
    }
    told = Hand(run.out, orders, lambda: (change_orders(run.out, tell("lora", "v2", to=None)), None)[1])
    try:
        train(run, base=tiny_base(), listener=told, place=place)
    except Interrupted as e:
        assert e.exit_code == 130
    else:
        raise AssertionError("it was not ended")
    said += told.said
    place.once(lambda: None)  # the first rank has written its checkpoint
    train(run, base=tiny_base(), listener=told, place=place, resume=True)


def test_ranks_obey_as_one_process_does(tmp_path: Path) -> None:
    one_run, two_run = (config(tmp_path / name, VARIANTS) for name in ("one", "two"))  # their rows are written before there are ranks
    alone: list[str] = []
    obey(one_run, alone, ONE_PROCESS)
    assert len(alone) == 7 and any("does not join" in text for text in alone)

    def rank(place: Place) -> None:
        said: list[str] = []
        obey(two_run, said, place)
        assert said == ([s.replace("/one/", "/two/") for s in alone] if place.first else [])

    codes = in_ranks(2, rank, tmp_path / "log")
    assert codes == [0, 0], "\n".join(p.read_text() for p in (tmp_path / "log").iterdir())
    base = tiny_base()
    for name in ("lora", "ia3", "v2"):
        one, two = (Adapter.load(tmp_path / n / "out" / "adapters" / name, base) for n in ("one", "two"))
        for key, tensor in one.params.items():
            assert (tensor - two.params[key]).abs().max() < 1e-5, (name, key)


@pytest.mark.parametrize("part", ["with_clone", "make_variant"], ids=["at once", "at last"])
def test_a_clone_that_fails_on_one_rank_joins_on_none(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may be short on one rank alone. All train on without the clone, and say why."""
    run = config(tmp_path, {"lora": LORA | PLAIN})

    def rank(place: Place) -> None:
        def short(*_: object, **__: object) -> None:
            raise MemoryError("no room here")

        if not place.first:
            monkeypatch.setattr(steering, part, short)
        told = Hand(run.out, {("lora", 2): cloned("v2", "lora", lr=1e-3)})
        report = train(run, base=tiny_base(), listener=told, place=place)
        assert list(report.adapters) == ["lora"] and report.summary["variants"]["lora"]["steps"] == 6
        (said,) = [text for text in told.said if "v2" in text] if place.first else [""]
        assert not place.first or "does not join: rank 1 cannot take it: memory ran out while making the clone v2" in said, said

    codes = in_ranks(2, rank, tmp_path / "log")
    assert codes == [0, 0], "\n".join(p.read_text() for p in (tmp_path / "log").iterdir())
    refused = json.loads((tmp_path / "out" / "run.json").read_text())["control"]["refused"]
    assert list(refused) == ["v2"] and refused["v2"].startswith("rank 1 cannot take it: memory ran out")
