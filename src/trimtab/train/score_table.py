"""A finished run as a table: what each variant costs beside the base, and the measure that fits its data before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.data import valid_json
from trimtab.tables import Cell, Table

TITLES = {"exact_match": "exact match", "token_f1": "F1"}
OWN = ("reward", "rewards/accuracies", "rewards/margins", "accuracy", "macro_f1", "margin")
"""Measures of objectives. They fit where there are some."""
LONG_WORDS = 8
"""Answers of more words, half of them, are free text: two that mean the same hardly ever have the same words."""


def fitting_measure(references: Sequence[str]) -> str:
    """The score that says how good answers are: of free text the words that they share with the reference, else whether they are equal."""
    lengths = sorted(len(r.split()) for r in references)
    is_free = lengths[len(lengths) // 2] > LONG_WORDS and valid_json(references, references) < 100.0
    return "token_f1" if is_free else "exact_match"


def measures_of(summary: Mapping[str, Any], data: str) -> list[str]:
    """The scores by which the variants of a data set are shown: those of their objective, else the one that fits its answers; both where
    an older summary does not name that; none where it has no test rows."""
    judged = {k for v in summary["variants"].values() if v["data"] == data for k in v["scores"]}
    if not judged:
        return []
    own = [k for k in OWN if k in judged]
    if own and not judged & TITLES.keys():
        return own
    said = (summary.get("measures") or {}).get(data)
    return own + ([said] if said else [k for k in TITLES if k in judged or not own])


def score_table(summary: Mapping[str, Any]) -> Table:
    """One row a variant. Loss and scores are "base → adapter"; a score that does not fit a variant's data is left out; summary.json holds
    all of them. A run without test rows has no columns for them."""
    shown = {data: measures_of(summary, data) for data in dict.fromkeys(v["data"] for v in summary["variants"].values())}
    columns = [k for k in (*OWN, *TITLES) if any(k in keys for keys in shown.values())]
    has_loss = any(v["scores"].get("loss") is not None for v in summary["variants"].values())
    headings = ["variant", "method", "trainable", "MB", *(["loss"] if has_loss else [])]
    headings += [f"{TITLES[k]}, %" if k in TITLES else k.replace("rewards/", "reward ") for k in columns]
    rows: list[list[Cell]] = []
    for name, v in summary["variants"].items():
        before, after = summary["base_scores"].get(v["data"], {}), v["scores"]
        share = v["trainable"] / summary["base_parameters"]
        trainable = f"{v['trainable']:,} ({f'{100 * share:.2g}%' if share < 1 else 'all'})"
        cells: list[Cell] = [
            name,
            v["method"],
            trainable,
            f"{v['adapter_bytes'] / 1e6:.1f}",
        ]
        if has_loss:
            cells.append(_change(before.get("loss"), after.get("loss"), 2))
        for k in columns:
            fits = k in shown[v["data"]]
            cells.append(_change(before.get(k), after.get(k) if fits else None, 1 if k in TITLES else 3))
        rows.append(cells)
    title = f"{summary['base']}: {summary['base_parameters']:,} parameters, {summary['base_bytes'] / 1e6:.0f} MB"
    return Table(title, headings, rows, frozenset(("variant", "method")))


def gain(summary: Mapping[str, Any]) -> str:
    """What a run has gained and at what cost, in one sentence; "" where nothing was scored. Of several variants of a data set, the best."""
    variants, gained = summary["variants"], []
    for data in dict.fromkeys(v["data"] for v in variants.values()):
        before = summary["base_scores"].get(data, {})
        mine = {name: v["scores"] for name, v in variants.items() if v["data"] == data}
        known = [k for k in measures_of(summary, data) if before.get(k) is not None and any(s.get(k) is not None for s in mine.values())]
        if not known:
            continue
        k, *_ = known
        best, scores = max(((n, s) for n, s in mine.items() if s.get(k) is not None), key=lambda x: x[1][k])
        others = f", the best of {len(mine)} on {data}," if len(mine) > 1 else ""
        digits, unit = (0, "%") if k in TITLES else (2, "")
        first, last = (f"{x:.{digits}f}" for x in (before[k], scores[k]))
        change = f"stayed at {last}{unit}" if first == last else f"went from {first} to {last}{unit}"
        gained.append(f"{TITLES.get(k, k.replace('rewards/', 'reward ').replace('_', ' '))} of {best}{others} {change}")
    if not gained:
        return ""
    trained = sum(v["trainable"] for v in variants.values())
    size = sum(v["adapter_bytes"] for v in variants.values()) / 1e6
    share = 100 * trained / summary["base_parameters"]
    listed = f"{', '.join(gained[:-1])} and {gained[-1]}" if len(gained) > 1 else gained[0]
    cost = f"{summary['seconds']:.0f} s of training and {size:.1f} MB of adapters, {share:.2g}% of the base's parameters"
    return f"On the test rows, {listed}; that took {cost}."


def _change(before: float | None, after: float | None, digits: int) -> Cell:
    if after is None:
        return "–"
    return f"{after:.{digits}f}" if before is None else (f"{before:.{digits}f}", f"{after:.{digits}f}")
