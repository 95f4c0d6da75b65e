"""Orders to a run, checked against what its folder says of it before they are written: for commands and the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.errors import ConfigError, DataError, nearest, printable
from trimtab.train.clone import ALONE, TOGETHER, cloned_from
from trimtab.train.control import Clone, Order, Orders, change_orders, read_orders
from trimtab.train.past import plan_of
from trimtab.train.run_folders import state

UNLIKE = (AttributeError, KeyError, TypeError, ValueError)
"""What comes of a run.json that has other things than trimtab writes."""


@dataclass(frozen=True)
class Asked:
    """An order that is written. runs: whether a process trains, which will read it; else the next one does. outcome: what became of it, or
    None as long as nothing has. It raises ConfigError where the run has refused."""

    runs: bool
    outcome: Callable[[], str | None]


@dataclass(frozen=True)
class Controlled:
    """What a run folder says. variants: what clones are made from, by name. paused, ended, refused: what became of earlier orders. in_step:
    whether its variants are compared at the same step, so that none may be paused or come later."""

    steps: Mapping[str, int]
    variants: Mapping[str, Any]
    paused: Sequence[str]
    ended: Mapping[str, str]
    refused: Mapping[str, str]
    in_step: bool

    @classmethod
    def of(cls, folder: Path, over: bool = False) -> Controlled:
        """ConfigError where no run that takes orders has begun in the folder, or (unless `over`) it has finished."""
        plan = plan_of(folder)
        shown = printable(str(folder))
        if not plan:
            raise ConfigError(f"{shown}: no run has begun in it", fix="name a folder that `trimtab train` writes to (a run file's `out`)")
        if not over and state(folder) == "finished":
            raise ConfigError(
                f"the run in {shown} has finished",
                fix="train on: `trimtab train RUN.yaml --resume --extend`; or write a run file of a variant: `trimtab runs clone --write`",
            )
        variants, control = plan.get("variants"), plan.get("control") or {}
        if not isinstance(variants, dict) or not isinstance(control, dict):
            raise ConfigError(f"the run in {shown} was begun by a trimtab that takes no orders", fix="resume it with this one")
        paused, ended, refused = (control.get(key) or kind() for key, kind in (("paused", list), ("ended", dict), ("refused", dict)))
        if not isinstance(paused, list) or not isinstance(ended, dict) or not isinstance(refused, dict):
            raise ConfigError(f"run.json in {shown} is not as trimtab writes it", fix="resume the run, which writes it anew")
        return cls(plan["steps"], variants, paused, ended, refused, control.get("in_step") is True)


def order(folder: Path, names: Sequence[str], what: Order | None) -> Asked:
    """Tell variants to stop or to pause, or (None) to go on. No names: all that have not ended. ConfigError where there is no such variant,
    or it was stopped and is to go on."""
    run = Controlled.of(folder)
    asked_for = _orders(folder).clones
    known = [*run.steps, *(n for n in asked_for if n not in run.steps and n not in run.refused)]
    problems = [f"{printable(n[:80])!r}: no variant of this run{nearest(n, known)}" for n in names if n not in known]
    if problems:
        raise ConfigError(f"the run in {printable(str(folder))} has other variants", problems=problems, fix=f"one of {', '.join(known)}")
    if what == "pause" and run.in_step:
        raise ConfigError(f"trials of a sweep that halves {TOGETHER}: none can be paused", fix="stop it, or let it train")
    wanted = list(names) or [n for n in known if n not in run.ended]
    if what != "stop" and (over := [f"{n}: {run.ended[n]}" for n in wanted if n in run.ended]):
        raise ConfigError("what was stopped stays so", problems=over, fix="clone it: `trimtab runs clone`")

    change_orders(folder, lambda orders: orders.with_order(wanted, what))

    def outcome() -> str | None:
        now = Controlled.of(folder, over=True)
        if what == "stop":
            return "; ".join(f"{n} {now.ended[n]}" for n in wanted) if all(n in now.ended for n in wanted) else None
        reached = [n for n in wanted if (n in now.paused) == (what == "pause") or n in now.ended]
        return f"{', '.join(wanted)}: {'paused' if what else 'training'}" if len(reached) == len(wanted) else None

    return Asked(state(folder) == "running", outcome)


def end(folder: Path) -> Asked:
    """Tell the run to end after its step, with a checkpoint, as Ctrl-C does. ConfigError where nothing trains."""
    Controlled.of(folder)
    if state(folder) != "running":
        raise ConfigError(f"no process trains into {printable(str(folder))}", fix="there is nothing to stop")
    change_orders(folder, lambda orders: replace(orders, end=True))
    going = f"`trimtab train RUN.yaml --resume` goes on with {printable(str(folder))}"
    return Asked(True, lambda: f"stopped, with a checkpoint: {going}" if state(folder) != "running" else None)


def clone(folder: Path, of: str, name: str, changes: Mapping[str, Any]) -> Asked:
    """Ask for a variant that is as `of` but for some settings. ConfigError that lists what is wrong with them, as far as the run folder
    tells; the run itself checks the rest when it makes the clone."""
    run = Controlled.of(folder)
    if run.in_step:
        raise ConfigError(f"trials of a sweep that halves {TOGETHER}, and a clone would be behind", fix=ALONE)
    fix = f"one of {', '.join(map(printable, run.variants))}"
    if of not in run.variants:
        raise ConfigError(f"{printable(of[:80])!r}: no variant of this run{nearest(of, run.variants)}", fix=fix)
    taken = _orders(folder).clones
    if name in run.steps or (name in taken and name not in run.refused):
        raise ConfigError(f"{printable(name[:80])!r} is a variant of this run already", fix="give the clone another name")
    try:
        cloned_from(name, run.variants[of], changes, dict.fromkeys(str(v["data"]) for v in run.variants.values()))
    except UNLIKE as error:
        what = f"run.json in {printable(str(folder))} is not as trimtab writes it ({type(error).__name__}: {error})"
        raise ConfigError(what, fix="resume the run, which writes it anew") from error
    before = run.refused.get(name)
    change_orders(folder, lambda orders: orders.with_clone(name, Clone(of, changes), run.refused))

    def outcome() -> str | None:
        now = Controlled.of(folder, over=True)
        if (why := now.refused.get(name)) is not None and why != before:
            raise ConfigError(f"the clone {name} does not join: {why}")
        return f"{name} trains: {now.steps[name]} steps" if name in now.steps else None

    return Asked(state(folder) == "running", outcome)


def _orders(folder: Path) -> Orders:
    try:
        return read_orders(folder)[0]
    except DataError as error:
        raise ConfigError(error.message, fix=error.fix) from None
