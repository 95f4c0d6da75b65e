"""Any sequence of publishing, aliasing, removing, collecting, exporting, reopening and crashing, beside a dict that does the same."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.store.stores import Crash, adapter_folder, blobs_there, crashing, files_of, names_of, needed_blobs
from trimtab.errors import AdapterError
from trimtab.store.index import parse_index
from trimtab.store.manifest import EMPTY_DESCRIPTOR
from trimtab.store.names import NoSuchAdapter
from trimtab.store.registry import Store

NAMES, ALIASES, CONTENTS = ("acme/a", "beta/a"), ("prod", "test"), range(4)
names, aliases, contents, numbers = st.sampled_from(NAMES), st.sampled_from(ALIASES), st.sampled_from(CONTENTS), st.integers(1, 4)


@dataclass
class Known:
    """What a name should hold: the content of each version, the version of each alias, the highest number so far."""

    versions: dict[int, int] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)
    last: int = 0


Model = dict[str, Known]
EMPTY = {EMPTY_DESCRIPTOR.digest}


def with_version(model: Model, name: str, content: int, moved: list[str]) -> None:
    known = model.setdefault(name, Known())
    if not known.versions or known.versions[max(known.versions)] != content:
        known.last += 1
        known.versions[known.last] = content
    known.aliases |= dict.fromkeys(moved, max(known.versions))


class StoreMachine(RuleBasedStateMachine):
    """Contents 0 and 2 share their weights, and so do 1 and 3; 0 and 1 share their config, and so do 2 and 3."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="trimtab-states-"))
        self.files: dict[int, dict[str, bytes]] = {}
        for n in CONTENTS:
            folder = adapter_folder(self.folder / str(n), n % 2, {"revision": str(n // 2)})
            self.files[n] = {p.name: p.read_bytes() for p in folder.iterdir()}
        self.model: Model = {}
        self.crash_at, self.monkeypatch = 0, pytest.MonkeyPatch()
        with crashing(0, self.monkeypatch):
            self.store = Store(self.folder / "store", create=True)

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def do(self, change: Callable[[], object], model: Model | None) -> None:
        """Make a change. model: what is there afterwards; None where it must be refused. A crash that was planned strikes now."""
        at, self.crash_at = self.crash_at, 0
        before = names_of(self.store)
        try:
            with crashing(at, self.monkeypatch):
                change()
        except Crash:
            self.store = Store(self.folder / "store")
            assert self.store.verify().problems == ()
            if model is not None and names_of(self.store) == self.listed(model):
                self.model = model
            assert names_of(self.store) in (before, self.listed(model or self.model))
            return
        except AdapterError:
            assert model is None and names_of(self.store) == before
            return
        assert model is not None, "it should have been refused"
        self.model = model

    def listed(self, model: Model) -> dict[str, tuple[dict[int, str], dict[str, int]]]:
        """What `names_of` should give."""
        return {
            name: (
                {n: self.digests[c] for n, c in known.versions.items()},
                {**known.aliases, "latest": max(known.versions)},
            )
            for name, known in model.items()
            if known.versions
        }

    @property
    def changed(self) -> Model:
        return copy.deepcopy(self.model)

    @initialize()
    def learn_digests(self) -> None:
        """A manifest's digest depends on the files alone."""
        with crashing(0, self.monkeypatch):
            other = Store(self.folder / "other", create=True)
            self.digests = {n: other.publish(self.folder / str(n), f"x/c{n}").digest for n in CONTENTS}
        assert len(set(self.digests.values())) == len(CONTENTS)

    @rule(at=st.integers(1, 8))
    def plan_a_crash(self, at: int) -> None:
        self.crash_at = at

    @rule(at=st.integers(9, 24))
    def plan_a_late_crash(self, at: int) -> None:
        """Only a publish gets that far."""
        self.crash_at = at
        self.publish("acme/a", at % len(CONTENTS), ["prod"])

    @rule(name=names, content=contents, moved=st.lists(aliases, unique=True, max_size=2))
    def publish(self, name: str, content: int, moved: list[str]) -> None:
        model = self.changed
        with_version(model, name, content, moved)
        self.do(lambda: self.store.publish(self.folder / str(content), name, aliases=moved), model)

    @rule(name=names, number=numbers, alias=aliases)
    def alias(self, name: str, number: int, alias: str) -> None:
        model = self.changed
        there = name in model and number in model[name].versions
        if there:
            model[name].aliases[alias] = number
        self.do(lambda: self.store.alias(f"{name}@{number}", alias), model if there else None)

    @rule(name=names, alias=aliases)
    def unalias(self, name: str, alias: str) -> None:
        model = self.changed
        there = name in model and model[name].aliases.pop(alias, None) is not None
        self.do(lambda: self.store.unalias(name, alias), model if there else None)

    @rule(name=names, number=numbers)
    def remove(self, name: str, number: int) -> None:
        model = self.changed
        free = name in model and number in model[name].versions and number not in model[name].aliases.values()
        if free:
            del model[name].versions[number]
        self.do(lambda: self.store.remove(f"{name}@{number}"), model if free else None)

    @rule(name=names)
    def remove_all(self, name: str) -> None:
        model = self.changed
        there = name in model and bool(model[name].versions)
        if there:
            model[name] = Known(last=model[name].last)
        self.do(lambda: self.store.remove(name, all=True), model if there else None)

    @rule()
    def collect(self) -> None:
        crash = self.crash_at
        self.do(lambda: self.store.gc(grace_seconds=-1), self.changed)
        if not crash:
            assert blobs_there(self.store) | EMPTY == needed_blobs(self.store)
            assert list((self.store.root / "tmp").iterdir()) == []

    @precondition(lambda self: any(k.versions for k in self.model.values()))
    @rule(data=st.data())
    def export(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([n for n in NAMES if n in self.model and self.model[n].versions]))
        number = data.draw(st.sampled_from(sorted(self.model[name].versions)))
        target, crash = self.folder / "out", self.crash_at
        shutil.rmtree(target, ignore_errors=True)
        self.do(lambda: self.store.export(f"{name}@{number}", target), self.changed)
        if target.exists() or not crash:
            assert {p.name: p.read_bytes() for p in target.iterdir()} == self.files[self.model[name].versions[number]]

    @rule()
    def reopen(self) -> None:
        self.store = Store(self.folder / "store")

    @invariant()
    def it_holds_what_it_should(self) -> None:
        if not hasattr(self, "digests"):
            return
        assert names_of(self.store) == names_of(Store(self.folder / "store")) == self.listed(self.model)
        for name, known in self.model.items():
            for number, content in known.versions.items():
                assert files_of(self.store, f"{name}@{number}") == self.files[content]
            if not known.versions:
                with pytest.raises(NoSuchAdapter):
                    self.store.resolve(name)
        assert self.store.verify().problems == ()
        data = (self.store.root / "index.json").read_bytes()
        index, problems = parse_index(data)
        assert not problems and index.to_bytes() == data
        assert {p: n.last for p, n in index.names.items()} == {p: k.last for p, k in self.model.items() if k.last}


StoreMachine.TestCase.settings = settings(
    max_examples=30, stateful_step_count=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
TestStore = StoreMachine.TestCase


@pytest.mark.slow
def test_many_more_states():
    from hypothesis.stateful import run_state_machine_as_test

    longer = settings(max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    run_state_machine_as_test(StoreMachine, settings=longer)
