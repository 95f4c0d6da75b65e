"""SIGKILL and a full disk at every call by which a store's writers change the disk: nothing is lost, nothing is half there."""

from __future__ import annotations

import signal

import pytest

from tests.store.kill_harness import Tally, count_as_large, server, strike, template
from tests.store.stores import adapter_folder
from trimtab.store import refs
from trimtab.store.names import NoSuchAdapter
from trimtab.store.registry import Store

pytestmark = pytest.mark.slow


@pytest.fixture
def workers(request, monkeypatch):
    most = getattr(request, "param", None)
    for name in ("WHOLE_BYTES", "SMALL_BYTES", "MOST"):
        monkeypatch.setattr(refs, name, getattr(refs, name))  # what is set here is taken back
    count_as_large(most)
    with server(most) as found:
        yield found


@pytest.mark.parametrize("workers", [None, 0, 99], ids=["small", "large, folded each time", "large"], indirect=True)
@pytest.mark.parametrize("kind", ["kill", "enospc"])
def test_a_fault_at_every_call_of_every_change(workers, tmp_path, kind, capsys):
    tallies = {what: strike(workers, tmp_path, change, kind) for what, change in template(tmp_path).items()}
    total = sum(tallies.values(), Tally())
    with capsys.disabled():
        print(f"\n{kind}: {total.cases} cases, {total.committed} of them committed, {len(total.bad)} bad")
        print("  " + "; ".join(f"{what}: {t.cases}" for what, t in tallies.items()))
    assert total.bad == []
    assert all(t.cases >= 4 for what, t in tallies.items() if kind == "kill")
    assert all(t.committed for what, t in tallies.items() if kind == "kill" and what != "collect")


def test_a_store_that_is_killed_in_the_making(workers, tmp_path):
    """There is no store, or a whole one; making it again makes it whole."""
    folder, at, states = adapter_folder(tmp_path / "f"), 0, set()
    while True:
        at += 1
        root = tmp_path / f"store-{at}"
        outcome = workers.run(root, ["create"], "kill", at)
        if outcome.code == 0:
            break
        assert outcome.code == -signal.SIGKILL
        try:
            states.add(Store(root).verify().problems)
        except NoSuchAdapter:
            states.add(None)
        assert workers.run(root, ["create"]).code == 0
        assert Store(root).publish(folder, "acme/a").version == 1 and Store(root).verify().problems == ()
    assert states == {None, ()} and at > 10
