"""Where the groups of a cluster stand, and a leaderboard of their variants while they train: what a display shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trimtab.train.options import lower_is_better


@dataclass
class GroupState:
    """state: "waiting" for a node, "starting", "training", or how it has ended. doing: the stage it is in. losses: nodes lost so far."""

    name: str
    variants: list[str]
    state: str = "waiting"
    node: str = ""
    doing: str = ""
    losses: int = 0


@dataclass
class VariantState:
    """total: 0 until training begins. valid: the best validation so far, by metric; None before the first. ended: why, if early."""

    group: str
    name: str
    step: int = 0
    total: int = 0
    loss: float | None = None
    metric: str = "loss"
    valid: float | None = None
    base: float | None = None
    ended: str = ""


@dataclass
class Board:
    """All of it. on_change: is told the group and what has happened; a display draws itself."""

    groups: dict[str, GroupState] = field(default_factory=dict)
    variants: dict[tuple[str, str], VariantState] = field(default_factory=dict)
    on_change: Callable[[str, str, tuple[Any, ...]], None] = lambda group, kind, values: None

    def begin(self, groups: Mapping[str, Iterable[str]]) -> None:
        """groups: name -> its variants."""
        self.groups = {g: GroupState(g, list(names)) for g, names in groups.items()}
        self.variants = {(g, n): VariantState(g, n) for g, state in self.groups.items() for n in state.variants}
        self.on_change("", "begin", ())

    def note(self, group: str, kind: str, *values: Any) -> None:
        """Something has happened in a group: what a Listener is told, or "placed" (the node), "lost" (the node, why), "ended" (how)."""
        state = self.groups[group]
        if kind == "placed":
            state.state, (state.node,) = "starting", values
        elif kind == "lost":
            state.state, state.losses, state.node = "waiting", state.losses + 1, ""
        elif kind == "ended":
            (state.state,) = values
        elif kind == "status":
            (state.doing,) = values
        elif kind == "begin":
            state.state = "training"
            for name, total in values[0].items():
                self.variants[group, name].total = total
        elif kind == "joined":
            self.variants[group, values[0]] = VariantState(group, values[0], total=values[1])
        elif kind in ("step", "valid"):
            self._line(self.variants[group, values[0]["variant"]], kind, values[0])
        elif kind == "stopped":
            self.variants[group, values[0]].ended = values[1]
        self.on_change(group, kind, values)

    def _line(self, v: VariantState, kind: str, line: Mapping[str, Any]) -> None:
        v.step = line["step"]
        if kind == "step":
            v.loss = line["loss"]
            return
        v.metric = line["metric"]
        value, v.base = line[f"valid_{v.metric}"], line[f"base_valid_{v.metric}"]
        better = v.valid is None or (value is not None and (value < v.valid) == lower_is_better(v.metric))
        v.valid = value if better else v.valid
        v.ended = line.get("finished_early") or v.ended

    def ranked(self) -> list[VariantState]:
        """All variants: where one metric ranks them, the best first and those without a figure last; else in the order of their groups."""
        found = list(self.variants.values())
        if len({v.metric for v in found if v.valid is not None}) != 1:
            return found
        sign = 1 if lower_is_better(next(v.metric for v in found if v.valid is not None)) else -1
        return sorted(found, key=lambda v: (v.valid is None, sign * (v.valid or 0.0)))
