"""Answers as token ids become numbers: decoded, told to the rewards of an objective, weighted and added up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from trimtab.bases.tool_turns import tools_of
from trimtab.data import Example
from trimtab.data.prompts_alone import Asked
from trimtab.model import Base
from trimtab.objectives.grpo import Grpo, mean
from trimtab.rewards.asked import Call, Rewarded
from trimtab.train.called import Caller


class Rewarding:
    """Rewards the answers of a base's adapters."""

    def __init__(self, base: Base, rewarded: Rewarded):
        self._base, self._rewarded = base, rewarded
        self._caller = Caller(base.tokenizer)

    @cached_property
    def stop_ids(self) -> set[int]:
        """Tokens that end an answer."""
        return self._base.stop_ids | (self._caller.stop_ids if getattr(self._base.tokenizer, "chat_template", None) else set())

    def ask(
        self, objective: Grpo, rows: Sequence[Asked], prompts: Sequence[Example], answers: Sequence[Sequence[int]], step: int
    ) -> np.ndarray:
        """[K, N]: what each reward gives each answer, NaN where it gives nothing. rows, prompts, answers: N of each."""
        names = dict.fromkeys(k for row in rows for k in row.columns)
        columns = {name: [row.columns.get(name) for row in rows] for name in names}
        decode: Any = self._base.tokenizer.decode
        calls: list[list[str]] = [[] for _ in rows]
        if any(r.reward == "tool_call" for r in objective.rewards):
            calls = [self._calls(row, e, ids) for row, e, ids in zip(rows, prompts, answers, strict=True)]
        texts = [str(decode(list(ids), skip_special_tokens=True)) for ids in answers]
        call = Call([r.prompt for r in rows], texts, [list(a) for a in answers], columns, [r.reference for r in rows], calls, step)
        return np.array(self._rewarded.ask(objective.rewards, call, objective.reward_time_limit), dtype=np.float64)

    def scores(
        self, objective: Grpo, rows: Sequence[Asked], prompts: Sequence[Example], answers: Sequence[Sequence[int]]
    ) -> tuple[dict[str, float | None], list[float | None]]:
        """(the scores of held-out rows, the reward of each), None where there is no number. These have no loss."""
        rewards_KN = self.ask(objective, rows, prompts, answers, 0)
        reward_N = total(objective, rewards_KN)
        means = [mean(reward_N, 0), *(mean(values, 0) for values in rewards_KN)]
        names = ["reward", *(f"rewards/{r.label}/mean" for r in objective.rewards)]
        found = {name: _number(value) for name, value in zip(names, means, strict=True)}
        return {"loss": None, **found}, [_number(r) for r in reward_N]

    def _calls(self, row: Asked, prompt: Example, answer: Sequence[int]) -> list[str]:
        tools = row.record.get("tools")
        functions = [t["function"] for t in tools_of(tools)] if isinstance(tools, list) else []
        schemas = {f["name"]: dict(f.get("parameters") or {}) for f in functions}
        return self._caller.made(schemas, prompt.ids.tolist(), [i for i in answer if i not in self._base.stop_ids])


def _number(value: Any) -> float | None:
    plain = float(np.asarray(value).reshape(-1)[0])
    return plain if math.isfinite(plain) else None


def total(objective: Grpo, rewards_KN: np.ndarray) -> np.ndarray:
    """[N]: the weighted sum over the rewards that have a number; NaN where none has."""
    weights = np.array([r.weight for r in objective.rewards])[:, None]
    summed = np.nansum(rewards_KN * weights, 0)
    return np.where(np.isnan(rewards_KN).all(0), np.nan, summed)
