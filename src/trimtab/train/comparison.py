"""Variants of several runs beside each other, with what each cost: `trimtab compare` and `trimtab.compare`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import ConfigError, nearest
from trimtab.tables import Cell, Table
from trimtab.train.past import LOWER_IS_BETTER, PERCENT, PastVariant, doubts, numbers, read_runs, title

COSTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "train_loss": ("train loss", "{:.3f}".format),
    "trainable": ("trainable", "{:,}".format),
    "adapter_mb": ("MB", "{:.1f}".format),
    "seconds": ("s", "{:.0f}".format),
    "tokens_per_s": ("tokens/s", "{:.0f}".format),
    "peak_memory_gb": ("peak GB", "{:.2f}".format),
}
"""Key of a row -> heading and format."""
SMALLER_FIRST = {*COSTS} - {"tokens_per_s"}


@dataclass(frozen=True)
class Comparison:
    """by: what the variants are sorted by, best first. notes: what to know before comparing. variants: one mapping each, with run, variant,
    data, method, fields, scores and costs. base_scores: run -> data set -> the base's scores."""

    by: str
    notes: Sequence[str]
    variants: Sequence[Mapping[str, Any]]
    base_scores: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As `trimtab compare --json` prints it."""
        return {"sorted_by": self.by, "notes": list(self.notes), "variants": list(self.variants), "base_scores": self.base_scores}

    def tables(self) -> list[Table]:
        """One for each data set, the base's own scores last. Only fields are shown in which its variants of one method differ."""
        return [self._table(data) for data in dict.fromkeys(r["data"] for r in self.variants)]

    def _table(self, data: str) -> Table:
        rows = [r for r in self.variants if r["data"] == data]
        measured = list(dict.fromkeys(s for v in self.variants for s in v["scores"] if any(s in r["scores"] for r in rows)))
        headings = ["run/variant", "method", *("test loss" if s == "loss" else title(s) for s in measured)]
        headings += [*(h for h, _ in COSTS.values()), "differs in"]
        cells: list[list[Cell]] = []
        for r in rows:
            name = f"{r['run']}/{r['variant']}" + (" (stopped)" if r["stopped"] else "" if r["finished"] else " (not finished)")
            costs = [form(r[k]) if r[k] is not None else "–" for k, (_, form) in COSTS.items()]
            cells.append([name, r["method"] or "–", *(_score(s, r["scores"].get(s)) for s in measured), *costs, _differing(r, rows)])
        for name, scores in self._bases(data):
            cells.append([name, "–", *(_score(s, scores.get(s)) for s in measured), *["–"] * len(COSTS), ""])
        return Table(f"{data}, by {title(self.by)}", headings, cells, frozenset(("run/variant", "method", "differs in")))

    def _bases(self, data: str) -> list[tuple[str, dict[str, float]]]:
        """What the base itself scores on a data set: one row, or one for each run where the runs have measured different scores."""
        scored = {run: found for run, of_data in self.base_scores.items() if (found := numbers(of_data.get(data)))}
        one = len({tuple(sorted(found.items())) for found in scored.values()}) == 1
        return [("base", next(iter(scored.values())))] if one else [(f"{run}/base", found) for run, found in scored.items()]

    def __str__(self) -> str:
        return "\n\n".join([*map(str, self.tables()), *(f"note: {n}" for n in self.notes)])

    def _repr_html_(self) -> str:
        notes = Table("", ["note"], [[n] for n in self.notes], frozenset(["note"])).html() if self.notes else ""
        return "".join(t.html() for t in self.tables()) + notes


def compare(folders: Sequence[Path], by: str | None = None) -> Comparison:
    """Every variant of several run folders. by: a score or a cost. ConfigError if a folder is no run's, or no variant has that score."""
    past = read_runs(folders)
    variants = [v for run in past for v in run.variants]
    by = _order(by, list(dict.fromkeys(s for v in variants for s in v.scores)), [m for run in past for m in fitting(run.summary)])
    rows = sorted((_row(v) for v in variants), key=lambda r: _rank(r, by, by in SMALLER_FIRST | LOWER_IS_BETTER))
    return Comparison(by, doubts(past), rows, {run.name: run.summary.get("base_scores", {}) for run in past})


def fitting(summary: Mapping[str, Any]) -> list[str]:
    """The scores that fit the answers of a run's data sets, as its summary names them."""
    named = summary.get("measures")
    return [m for m in named.values() if isinstance(m, str)] if isinstance(named, Mapping) else []


def _order(by: str | None, scores: Sequence[str], fits: Sequence[str]) -> str:
    """What to sort by: by default the first score that fits the answers of a data set. ConfigError if no variant has it."""
    known = [*scores, *COSTS]
    if by is None:
        return next((s for s in (*fits, *scores) if s in PERCENT and s in scores), "train_loss")
    if by not in known:
        raise ConfigError(f"by = {by}: no variant has that score{nearest(by, known)}", fix=f"use one of {', '.join(known)}")
    return by


def _row(v: PastVariant) -> dict[str, Any]:
    """A variant as --json gives it; what is not known is None."""
    f = v.facts
    size = None if f.get("saved_step", 0) is None else f.get("adapter_bytes")  # it could not be saved: it has no size to sort by
    return {
        "run": v.run.name,
        "variant": v.name,
        "finished": v.run.finished,
        "data": v.data,
        "method": f.get("method"),
        "fields": {**(f.get("fields") or {}), "lr": f.get("lr"), "steps": f.get("steps")},
        "trainable": f.get("trainable"),
        "adapter_mb": size / 1e6 if size is not None else None,
        "tokens_per_s": f.get("tokens_per_s"),
        "seconds": f.get("seconds"),
        "peak_memory_gb": v.run.summary.get("peak_memory_gb"),
        "train_loss": (f.get("losses") or {}).get("last"),
        "stopped": f.get("stopped"),
        "scores": v.scores,
    }


def _rank(row: Mapping[str, Any], by: str, smaller_first: bool) -> tuple[bool, float]:
    """Sorts best first, rows without a value last."""
    value = row["scores"].get(by, row.get(by))
    return (value is None, 0.0 if value is None else value if smaller_first else -value)


def _score(name: str, value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}" if name in PERCENT else f"{value:.3f}"


def _differing(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The fields of a row that not every row of the same method shares."""
    own, alike = row["fields"], [r["fields"] for r in rows if r["method"] == row["method"]]
    keys = [k for k in own if any(other.get(k) != own[k] for other in alike)]
    return " ".join(f"{k}={own[k]:g}" if isinstance(own[k], float) else f"{k}={own[k]}" for k in keys)
