"""Rewards before a run: whether their files are there, and what they say of the rows' own answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from trimtab.bases.template import BadRow
from trimtab.data.calls import canonical, read_calls
from trimtab.data.prompts_alone import Asked
from trimtab.errors import ConfigError
from trimtab.objectives.grpo import Grpo
from trimtab.rewards.asked import Call, Rewarded, file_of
from trimtab.train.findings import Finding
from trimtab.train.options import VariantConfig

DRY = 4
"""Rows that rewards are tried on."""


def unrewarded(variant: VariantConfig, root: Path, where: str) -> ConfigError | None:
    """What is wrong with the files of a variant's rewards."""
    if not isinstance(variant.objective, Grpo):
        return None
    for reward in variant.objective.rewards:
        try:
            file_of(reward, root)
        except ConfigError as e:
            return ConfigError(f"{where}.rewards: {e.message}", fix=e.fix)
    return None


def reward_findings(root: Path, rows: Sequence[Asked], variants: Sequence[VariantConfig]) -> Iterator[Finding]:
    """What each variant's rewards give the own answers of a few rows, an empty answer where a row has none; what fails in that."""
    said = list[str]()
    with Rewarded(root, said.append) as rewarded:
        for v in variants:
            if not isinstance(v.objective, Grpo) or not rows:
                continue
            where = f"variants.{v.name}.rewards"
            if (error := unrewarded(v, root, f"variants.{v.name}")) is not None:
                yield Finding("error", where, error.message.removeprefix(f"{where}: "), fix=error.fix)
                continue
            columns = dict.fromkeys(k for row in rows for k in row.columns)
            for reward in v.objective.rewards:
                if reward.column is not None and reward.column not in columns:
                    text = f"{reward.label}: the rows have no column {reward.column!r}: they have {', '.join(columns)}"
                    yield Finding("error", where, text, fix="name one of these in `column`.")
            found = rewarded.ask(v.objective.rewards, _call(rows, list(columns)), v.objective.reward_time_limit)
            for text in said:
                yield Finding("warning", where, text, fix="mend it: a reward that fails is left out of the sum.")
            said.clear()
            for reward, values in zip(v.objective.rewards, found, strict=True):
                told = ", ".join("none" if math.isnan(x) else f"{x:g}" for x in values)
                what = f"{reward.label} of the own answers of {len(rows)} rows: {told}"
                if all(map(math.isnan, values)):
                    yield Finding("warning", where, f"{what}; nothing is learnt from it", fix="name the column that it compares with.")
                else:
                    yield Finding("note", where, what)


def _call(rows: Sequence[Asked], columns: Sequence[str]) -> Call:
    answers = [row.reference if isinstance(row.reference, str) else "" for row in rows]
    by_name = {name: [row.columns.get(name) for row in rows] for name in columns}
    calls = [_calls(row) for row in rows]
    return Call([row.prompt for row in rows], answers, [[] for _ in rows], by_name, [row.reference for row in rows], calls, 0)


def _calls(row: Asked) -> list[str]:
    if row.reference is None or isinstance(row.reference, str):
        return []
    try:
        return canonical(read_calls(row.reference, "the reference"))
    except BadRow:
        return []
