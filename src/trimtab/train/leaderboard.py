"""The leaderboard of a sweep: its trials, best first, from the summaries of the runs in which they trained.

A trial's figure is that of the tensors that are saved: its best validation, or its last where keep_best is off. Those that trained to their
end come first; then those that were halved, the later the better, since each lost to all that went on; those that diverged come last. Of
equal ones that with the lower loss comes first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trimtab.tables import Cell, Table
from trimtab.train.halving import HALVED
from trimtab.train.options import lower_is_better
from trimtab.train.trials import Sweep, Trial

STATES = ("finished", "halved", "diverged")


def rank(sweep: Sweep, trained: Mapping[str, tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """metric, the base's figure on it, the trials, and the best of those that finished (None where none did), as plain JSON.

    trained: trial -> the folder of its run within `out`, and its entry in that run's summary.json.
    """
    metric = sweep.options.metric
    entries = [_entry(t, metric, *trained[t.name]) for t in sweep.trials]
    losses = {t.name: _figure(trained[t.name][1], "loss") for t in sweep.trials}
    entries.sort(key=lambda e: (*_order(e, lower_is_better(metric)), math.inf if (x := losses[e["trial"]]) is None else x))
    rows = [{"rank": i} | e for i, e in enumerate(entries, 1)]
    first = rows[0]
    base = next((v["valid"]["base"].get(metric) for _, v in trained.values() if "valid" in v), None)
    best = None
    if first["state"] == "finished" and first["valid"] is not None:
        name = first["trial"]
        best = {k: first[k] for k in ("trial", "values", "valid", "adapter")}
        best |= {"run_file": sweep.run_file(name), "why_no_run_file": sweep.why_no_run_file(name), "test": None}
    return {"metric": metric, "ranked_by": "valid rows", "base_valid": base, "best": best, "trials": rows}


def _entry(trial: Trial, metric: str, folder: str, v: Mapping[str, Any]) -> dict[str, Any]:
    """One trial. valid: its figure, None where there is none. step: whose tensors are saved; None, as adapter, where they could not be.
    why: it ended before its time."""
    valid = v.get("valid", {})
    early = valid.get("finished_early")
    state = "diverged" if v["stopped"] else "halved" if (early or "").startswith(HALVED) else "finished"
    return {
        "trial": trial.name,
        "values": trial.values,
        "method": v["method"],
        "state": state,
        "why": v["stopped"] or early,
        "valid": _figure(v, metric),
        "step": v["saved_step"],
        "steps": v["steps"],
        "seconds": v["seconds"],
        "parameters": v["trainable"],
        "adapter": None if v["saved_step"] is None else f"{folder}/adapters/{trial.name}",
    }


def _figure(v: Mapping[str, Any], metric: str) -> float | None:
    """What the valid rows say of the tensors that are saved."""
    return next((x[metric] for x in v.get("valid", {}).get("history", ()) if x["step"] == v["saved_step"]), None)


def _order(entry: Mapping[str, Any], lower: bool) -> tuple[int, int, bool, float]:
    value = entry["valid"]
    later = -entry["steps"] if entry["state"] == "halved" else 0
    return STATES.index(entry["state"]), later, value is None, 0.0 if value is None else value if lower else -value


def table_of(board: Mapping[str, Any]) -> Table:
    """A row for each trial, best first."""
    searched = list(dict.fromkeys(k for t in board["trials"] for k in t["values"]))
    headings = ["", "trial", *searched, f"valid {_title(board)}", "step", "steps", "s", "trainable", "state"]
    rows: list[list[Cell]] = []
    for t in board["trials"]:
        values = [_value(t["values"][k]) if k in t["values"] else "–" for k in searched]
        costs = ("–" if t["step"] is None else str(t["step"]), f"{t['steps']}", f"{t['seconds']:.0f}", f"{t['parameters']:,}")
        rows.append([str(t["rank"]), t["trial"], *values, _number(t["valid"]), *costs, t["state"]])
    return Table("", headings, rows, frozenset(("", "trial", "state", *searched)))


def told(board: Mapping[str, Any], out: Path) -> Iterator[str]:
    """What to know of a leaderboard, and its best trial, line by line. out: the sweep's folder."""
    yield f"ranked by {_title(board)} of the valid rows alone; the base has {_number(board['base_valid'])}"
    yield from (f"note: {note}" for note in board["notes"])
    best = board["best"]
    if best is None:
        yield "no trial has finished with a figure, so none is the best; metrics.jsonl says what happened"
        return
    yield f"best: {best['trial']}, saved in {out / best['adapter']}"
    if why := best.get("why_no_run_file"):
        yield f"no run file trains it alone: {why}"
    if best["test"] is not None:
        yield f"on the test rows, which played no part in the choice: {_tested(best)}"


def _title(board: Mapping[str, Any]) -> str:
    return str(board["metric"]).replace("_", " ")


def _tested(best: Mapping[str, Any]) -> str:
    """The scores of base and winner, as "loss 2.310→1.204, …"."""
    before, after = best["test"]["base"], best["test"][best["trial"]]
    return ", ".join(
        f"{k.replace('_', ' ')} {_number(before.get(k))}→{_number(x)}" for k, x in after.items() if k not in ("rows", "perplexity")
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
