"""A sweep whose groups train on the nodes of a Ray cluster. The driver reads the rows, plans the groups and scores the best trial."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from trimtab.bases.shapes import Architecture
from trimtab.cluster.board import Board
from trimtab.cluster.drive import drive
from trimtab.cluster.job import Asks, Job, asks, need_of, part_of_need, refuse_unplaceable
from trimtab.cluster.nodes import Cluster
from trimtab.cost.room import Need
from trimtab.errors import TrimtabError
from trimtab.model import Base
from trimtab.train.config import RunConfig
from trimtab.train.groups import Group, plan_groups
from trimtab.train.halving import Halving
from trimtab.train.interrupt import Stop
from trimtab.train.listen import Listener
from trimtab.train.mirror import mirror_of
from trimtab.train.spread import Part, part_of
from trimtab.train.sweep import WHAT
from trimtab.train.trials import Sweep


class OnRay:
    """A `Spread` over a cluster. cpus: of a group, see `job.asks`."""

    def __init__(self, cluster: Cluster, board: Board, cpus: int | None = None):
        self.cluster, self.board, self.cpus = cluster, board, cpus
        self._need: Need | None = None

    def refuse(self, what: Sweep, shape: Architecture | None, listener: Listener, *, loaded: bool) -> None:
        """Whether nodes have room is asked when the groups are known; that of this machine counts for nothing."""
        self._need = need_of(what.run, shape)

    def groups(self, what: Sweep, base: Base, longest: int) -> list[Group]:
        """As `_grouped`; ConfigError where no node can take one of them."""
        found = self._grouped(what, base, longest)
        refuse_unplaceable({g.folder: self._asks(part_of(what.run, g)) for g in found}, self.cluster.nodes())
        return found

    def _grouped(self, what: Sweep, base: Base, longest: int) -> list[Group]:
        """Of a sweep that goes on, its groups. Of a new one without `memory_gb`, one for each place of the cluster; more where a node's
        memory is too little for that. With halving, which compares the trials of a group, they stay together as long as memory allows."""
        run, memory_gb = what.run, what.options.memory_gb
        if (known := _begun(what)) is not None:
            alone = [(folder, part_of(run, Group("", trials, 0))) for folder, trials in known.items()]
            return [Group(f, known[f], plan_groups(one, base, longest, None)[0].estimated_bytes) for f, one in alone]
        if memory_gb is not None:
            return plan_groups(run, base, longest, memory_gb)
        smallest = self._asks(part_of(run, Group("", [run.variants[0].name], 0)))
        wanted = 1 if what.options.halving else max(1, min(len(run.variants), self._places(smallest)))
        nodes, found = self.cluster.nodes(), list[Group]()
        for at_least in range(wanted, len(run.variants) + 1):
            found = plan_groups(run, base, longest, None, at_least)
            if all(any(self._asks(part_of(run, g)).fits(n) for n in nodes) for g in found):
                break
        return found

    def train(
        self, parts: Sequence[Part], base: Base, listener: Listener, stop: Stop, halving: Halving | None
    ) -> Iterator[tuple[Part, dict[str, Any]]]:
        by_name = {part.group.folder: part for part in parts}
        dtype = str(base.dtype).removeprefix("torch.")
        jobs = [Job(n, p.run, self._asks(p.run), resume=p.resume, halving=halving, dtype=dtype) for n, p in by_name.items()]
        for job, summary in drive(self.cluster, jobs, self.board, stop):
            if (mirror := mirror_of(job.run, listener)) is not None:  # the node's adapters, to be scored here
                mirror.fetch(resume=True)
            yield by_name[job.name], summary

    def _asks(self, run: RunConfig) -> Asks:
        assert self._need is not None, "refuse comes first"
        return asks(part_of_need(self._need, run), self.cluster.nodes(), self.cpus)

    def _places(self, one: Asks) -> int:
        """How many groups could train at the same time."""
        return sum(_room(one, n.cpus, n.gpus) for n in self.cluster.nodes() if one.fits(n))


def _room(one: Asks, cpus: float, gpus: float) -> int:
    return int(min(cpus // one.cpus, gpus // one.gpus if one.gpus else cpus // one.cpus))


def _begun(what: Sweep) -> dict[str, list[str]] | None:
    """The groups of a sweep that goes on: the cluster may have changed since, and what was trained stays where it is."""
    path = what.run.out / WHAT
    if not path.exists():
        return None
    try:
        groups: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))["groups"]
    except (ValueError, KeyError) as error:
        raise TrimtabError(f"{path} cannot be read: {error}", fix="start anew with another `out`") from error
    trials = {v.name for v in what.run.variants}
    return groups if {n for names in groups.values() for n in names} == trials else None
