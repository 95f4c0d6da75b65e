"""A sweep from its file to its leaderboard: all trials train together on one frozen base, in as few runs as memory allows.

    out/sweep.json          what the sweep is: settings, base, rows, groups; a resumed one must be the same
    out/group-1/ …          a run folder each
    out/leaderboard.json    the trials, best first; written last

Trials are ranked by the valid rows alone. The test rows play no part until the winner is known; it and the base are then scored on them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from trimtab import bases
from trimtab.atomic import clear_unfinished, is_unfinished
from trimtab.errors import ConfigError, Mistakes, TrimtabError
from trimtab.forward.batch import BASE
from trimtab.forward.packs import Mix
from trimtab.methods import FullConfig
from trimtab.model import Base, load_base
from trimtab.store import Adapter
from trimtab.tables import Table
from trimtab.train.before import NOT_SHARED, note_mistakes
from trimtab.train.config import RunConfig
from trimtab.train.evaluate import Contestant, Judge, write_predictions
from trimtab.train.finish import held_out
from trimtab.train.groups import Group
from trimtab.train.interrupt import Stop
from trimtab.train.leaderboard import rank, table_of, told
from trimtab.train.listen import Listener, Silent
from trimtab.train.mirror import Mirror, mirror_of
from trimtab.train.page import write_page
from trimtab.train.prepare import Prepared, Splits, read_splits, refuse_long
from trimtab.train.report import write_json
from trimtab.train.resume import identity, refuse_changes, refuse_no_folder, refuse_other_content, settings
from trimtab.train.spread import Here, Part, Spread, part_of
from trimtab.train.teachers import references_of
from trimtab.train.trials import Sweep

WHAT, BOARD = "sweep.json", "leaderboard.json"


@dataclass
class SweepReport:
    """A finished sweep. leaderboard: what leaderboard.json holds."""

    out: Path
    leaderboard: dict[str, Any]

    def table(self) -> Table:
        """A row for each trial, best first."""
        return table_of(self.leaderboard)

    def __str__(self) -> str:
        return "\n".join([str(self.table()), *told(self.leaderboard, self.out)])

    def _repr_html_(self) -> str:
        return self.table().html() + "".join(f"<p>{escape(line)}</p>" for line in told(self.leaderboard, self.out))


def sweep(
    what: Sweep | str | Path,
    *,
    base: Base | None = None,
    listener: Listener | None = None,
    resume: bool = False,
    stop: Stop | None = None,
    spread: Spread | None = None,
) -> SweepReport:
    """Train all trials of a sweep, rank them, score the best on the test rows.

    what: a Sweep, or a sweep file's path. spread: where its groups train, by default here. The other arguments are those of `train`; what
    has finished is not repeated on resume.
    TrimtabError where the file, the data, the base or the disk is at fault, or a trial does not fit the base or the memory; nothing is
    written before all that has been checked.
    """
    what = what if isinstance(what, Sweep) else Sweep.load(what)
    run, listener, stop, spread = what.run, listener or Silent(), stop or Stop(), spread or Here()
    mirror = mirror_of(run, listener)
    if mirror is not None:
        mirror.fetch(resume)
    if resume and (run.out / BOARD).exists():
        return _finished(what, base, listener, mirror)
    mistakes = Mistakes()
    with mistakes.noted():
        _refuse_occupied(run.out, resume)
    shape = note_mistakes(run, base, mistakes, "trial {}")
    mistakes.refuse("this sweep cannot start")
    spread.refuse(what, shape, listener, loaded=base is not None)
    listener.status(f"loading {run.base}" if base is None else f"using {base.name or run.base}")
    if run.shard:
        listener.warning(NOT_SHARED)
    base = base or load_base(run.base, dtype=run.dtype, device=run.device, quantize=run.quantize)
    data = {run.variants[0].data: read_splits(run, run.variants[0].data, run.data[run.variants[0].data], base)}
    refuse_long(run, base, data)
    longest = max(int(s.train.examples.tokens.max()) for s in data.values())
    notes = [*_rungs(what, data), *_doubts(what)]
    groups = spread.groups(what, base, longest)
    if len(groups) > 1 and what.options.halving:
        notes.append("trials are halved among those of their group, which need not be the worst of all")
    _agree(what, base, data, groups)
    if mirror is not None:
        mirror.begin()
    trained, costs = _train(what, spread, groups, base, listener, resume, stop)
    board = {"base": base.name or run.base, "notes": notes, "groups": costs} | rank(what, trained)
    with _explained():
        if board["best"] is not None:
            listener.status("scoring the best trial on test rows")
            board["best"]["test"] = _test(run, base, data, board["best"]["trial"], run.out / board["best"]["adapter"])
        write_page([run.out / g.folder for g in groups], run.out / "report.html")
        write_json(run.out / BOARD, board)
    if mirror is not None:
        mirror.finish()
    return SweepReport(run.out, board)


def _train(
    what: Sweep, spread: Spread, groups: Sequence[Group], base: Base, listener: Listener, resume: bool, stop: Stop
) -> tuple[dict[str, tuple[str, dict[str, Any]]], list[dict[str, Any]]]:
    """Train all groups: (trial -> its group's folder and its entry in that one's summary.json, what each group cost)."""
    trained, costs = dict[str, tuple[str, dict[str, Any]]](), dict[str, dict[str, Any]]()
    runs = [(group, part_of(what.run, group)) for group in groups]
    parts = [Part(group, run, resume and (run.out.exists() or run.url is not None)) for group, run in runs]
    for part, summary in spread.train(parts, base, listener, stop, what.options.halving):
        group = part.group
        trained |= {n: (group.folder, v) for n, v in summary["variants"].items()}
        costs[group.folder] = _group(group, summary)
    return trained, [costs[group.folder] for group in groups]


# ---- before training ------------------------------------------------------------


def _refuse_occupied(out: Path, resume: bool) -> None:
    """ConfigError where `out` holds anything but this sweep, begun."""
    refuse_no_folder(out)
    names = [p.name for p in out.iterdir() if not is_unfinished(p.name)] if out.exists() else []
    if names and not (resume and WHAT in names):
        going = ", or go on with it: --resume" if WHAT in names else ""
        raise ConfigError(
            f"out = {str(out)!r} is not empty: a sweep never overwrites anything",
            fix=f"name another folder in `out`, or remove this one{going}",
        )


def _rungs(what: Sweep, data: Mapping[str, Splits]) -> Iterator[str]:
    """What to know of how trials compare at rungs. ConfigError where no rung comes before a trial's end."""
    halving = what.options.halving
    if halving is None:
        return
    steps = {v.name: v.options.total_steps(len(data[v.data].train.examples), v.objective.steps_on_rows) for v in what.run.variants}
    if max(steps.values()) <= halving.every:
        raise ConfigError(
            f"sweep.halving.every = {halving.every}: no trial has more than {max(steps.values())} steps, so none would be stopped",
            fix="lower it, train for longer, or leave `halving` away",
        )
    if len(set(steps.values())) > 1:
        few, many = min(steps.values()), max(steps.values())
        yield f"trials have {few} to {many} steps: rungs compare them at equal steps, wherever each is in its schedule"
    if len({(v.options.batch_size, v.options.gradient_accumulation_steps) for v in what.run.variants}) > 1:
        yield "trials take different numbers of rows a step: rungs compare them at equal steps, not at equal rows"


def _doubts(what: Sweep) -> Iterator[str]:
    if what.left_out:
        yield f"{what.left_out} combinations mean the same as another one and were left out"
    wanted = what.options.trials or 0
    if len(what.trials) + what.left_out < wanted:
        yield f"the search has no more than {len(what.trials)} distinct trials, fewer than trials = {wanted}"
    if what.options.metric == "loss" and len({v.objective for v in what.run.variants}) > 1:
        yield "trials differ in their objective, and losses of different objectives do not compare: name another sweep.metric"


def _agree(what: Sweep, base: Base, data: dict[str, Splits], groups: Sequence[Group]) -> None:
    """Write down what the sweep is, or refuse to go on with another one."""
    run = what.run
    said = identity(Prepared(run, base, data, []), bases.fingerprint_model(base.model))
    now = {"settings": _settings(what), "content": said["content"], "groups": {g.folder: g.trials for g in groups}}
    clear_unfinished(run.out)
    path = run.out / WHAT
    if path.exists():
        then = json.loads(path.read_text(encoding="utf-8"))
        refuse_changes(then["settings"], now["settings"], "the sweep file has changed since this sweep began")
        refuse_changes(then["content"], now["content"], "the base or the data have changed since this sweep began")
        refuse_changes(then["groups"], now["groups"], "trials would be grouped otherwise than when this sweep began")
        return
    with _explained():
        run.out.mkdir(parents=True, exist_ok=True)
        write_json(path, now)


def _settings(what: Sweep) -> dict[str, Any]:
    o = what.options
    halving = o.halving.model_dump() if o.halving else None
    return settings(what.run) | {"sweep.metric": o.metric, "sweep.halving": halving, "sweep.memory_gb": o.memory_gb}


# ---- after it ------------------------------------------------------------


def _finished(what: Sweep, base: Base | None, listener: Listener, mirror: Mirror | None) -> SweepReport:
    """The report of a sweep that has nothing left to do. ConfigError where its file, the data or the base have changed since."""
    out = what.run.out
    then = json.loads((out / WHAT).read_text(encoding="utf-8"))
    refuse_changes(then["settings"], _settings(what), f"the sweep in {out} is finished, and its file has changed since")
    base = base or load_base(
        what.run.base, dtype=what.run.dtype or then["content"].get("dtype"), device=what.run.device, quantize=what.run.quantize
    )
    changed = f"the sweep in {out} is finished, and its base or its data have changed since"
    refuse_other_content(what.run, base, then["content"], changed, listener)
    listener.status(f"the sweep in {out} is finished, there is nothing left to do")
    if mirror is not None:
        mirror.claim_and_finish()
    return SweepReport(out, json.loads((out / BOARD).read_text(encoding="utf-8")))


def _group(group: Group, summary: Mapping[str, Any]) -> dict[str, Any]:
    found = {k: summary[k] for k in ("seconds", "tokens_per_s", "peak_memory_gb")}
    return {"folder": group.folder, "trials": group.trials, "estimated_gb": round(group.estimated_bytes / 1e9, 3)} | found


def _test(run: RunConfig, base: Base, data: dict[str, Splits], name: str, folder: Path) -> dict[str, Any] | None:
    """Scores of the base and the winner on the test rows, None where there are none; their predictions go into `out`."""
    (winner,) = (v for v in run.variants if v.name == name)
    if (rows := data[winner.data].test) is None:
        return None
    said = references_of(run.model_copy(update={"variants": [winner]}), base, {winner.data: {"test": rows}})
    held = {winner.data: held_out(Prepared(run, base, data, [], said), winner.data, "test")}
    judge = Judge(base.tokenizer, base.stop_ids, run.evaluate.max_new_tokens, run.max_tokens, base=base.attached)
    generates, objective, full = run.evaluate.generate, winner.objective, isinstance(winner.method, FullConfig)
    field = [Contestant("base", BASE, generates, objective=objective)]
    mix, members = base.mix([] if full else [Adapter.load(folder, base)])
    field += [Contestant(name, m, generates, objective=objective) for m in members]
    results = judge.judge(base.attached, mix, {winner.data: field}, held)
    if full:
        own = load_base(str(folder), dtype=base.dtype, device=base.device)
        alone = {winner.data: [Contestant(name, BASE, generates, objective=objective)]}
        results[winner.data] |= judge.judge(own.attached, Mix([]), alone, held)[winner.data]
    write_predictions(run.out / "predictions", results)
    return {who: result.scores for who, result in results[winner.data].items()}


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        fix = "make room, then `trimtab sweep FILE --resume`"
        raise TrimtabError(f"the results of the sweep cannot be written: {error}; what was trained is safe", fix=fix) from error
