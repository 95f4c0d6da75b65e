"""Where the groups of a sweep train: one after the other in this process, unless something else takes them (`cluster/sweeping.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trimtab.bases.shapes import Architecture
from trimtab.cost.room import at_most
from trimtab.model import Base
from trimtab.train.before import refuse_too_much
from trimtab.train.config import RunConfig
from trimtab.train.groups import Group, plan_groups
from trimtab.train.halving import Halving
from trimtab.train.interrupt import Stop
from trimtab.train.listen import Listener
from trimtab.train.loop import train
from trimtab.train.trials import Sweep


@dataclass(frozen=True)
class Part:
    """A group's run. resume: it has been begun."""

    group: Group
    run: RunConfig
    resume: bool


class Spread(Protocol):
    """refuse: raises TrimtabError where the sweep has no room, before its base is loaded. groups: which trials train together. train: all
    groups, each with its summary.json, in any order."""

    def refuse(self, what: Sweep, shape: Architecture | None, listener: Listener, *, loaded: bool) -> None: ...
    def groups(self, what: Sweep, base: Base, longest: int) -> list[Group]: ...
    def train(
        self, parts: Sequence[Part], base: Base, listener: Listener, stop: Stop, halving: Halving | None
    ) -> Iterator[tuple[Part, dict[str, Any]]]: ...


class Here:
    """One after the other in this process, on the base that is loaded."""

    def refuse(self, what: Sweep, shape: Architecture | None, listener: Listener, *, loaded: bool) -> None:
        together = what.run if what.options.memory_gb is None or shape is None else _greediest(what.run, shape)
        refuse_too_much(together, shape, listener.warning, loaded=loaded)

    def groups(self, what: Sweep, base: Base, longest: int) -> list[Group]:
        return plan_groups(what.run, base, longest, what.options.memory_gb)

    def train(
        self, parts: Sequence[Part], base: Base, listener: Listener, stop: Stop, halving: Halving | None
    ) -> Iterator[tuple[Part, dict[str, Any]]]:
        for n, part in enumerate(parts, 1):
            group = part.group
            listener.status(f"group {n} of {len(parts)}, {len(group.trials)} trials, about {group.estimated_bytes / 1e9:.1f} GB")
            report = train(part.run, base=base, listener=listener, resume=part.resume, stop=stop, halving=halving)
            yield part, report.summary


def part_of(run: RunConfig, group: Group) -> RunConfig:
    """A group's run. It has no test rows: whoever is scored on them, and how often, is the leaderboard's business. It publishes nothing:
    `store` stands in the winner's run file."""
    variants = [v for v in run.variants if v.name in group.trials]
    data = {n: d.model_copy(update={"test": []}) for n, d in run.data.items()}
    own = run.writing_to(f"{run.url.rstrip('/')}/{group.folder}" if run.url else run.out / group.folder)
    return own.model_copy(update={"data": data, "variants": variants, "store": None})


def _greediest(run: RunConfig, shape: Architecture) -> RunConfig:
    """The run of the trial that could need most memory alone. With `memory_gb` trials train in groups, each of which asks for itself."""
    alone = [part_of(run, Group("", [v.name], 0)) for v in run.variants]
    return max(alone, key=lambda one: at_most(one, shape).bytes()[1])
