"""Answers that a variant has drawn and learns from, for as many optimizer steps as its objective says; a checkpoint has them as tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.data import Example
from trimtab.data.examples import one_row
from trimtab.objectives import Counts
from trimtab.objectives.base import LEARNT, SAMPLE
from trimtab.train.samples import Sample

KNOWN = ("old_R", "base_R", "drawn_R")
"""What a sample has for each of its tokens, or has not."""


@dataclass(frozen=True)
class Drawn:
    """rows: samples of one prompt each; a prompt with many samples has several rows. counts: of all answers. left: steps on them."""

    rows: Sequence[Example]
    counts: Counts
    left: int

    def after_step(self) -> Drawn | None:
        """What is left after one step more."""
        return replace(self, left=self.left - 1) if self.left > 1 else None

    def remembering(self, rows: Sequence[Example], logps: Sequence[float]) -> Drawn:
        """With the log-probabilities of the answers in some of its rows, in order, as those that they were drawn with."""
        at, values = 0, np.array(logps, dtype=np.float32)
        found = {id(row): row for row in self.rows}
        for row in rows:
            known = []
            for s in row.segments:
                assert isinstance(s, Sample)
                known.append(replace(s, others=(), old_R=values[at : at + s.targets_here]))
                at += s.targets_here
            found[id(row)] = replace(known[0], others=tuple(known[1:]))
        return replace(self, rows=list(found.values()))

    def tensors(self) -> dict[str, Tensor]:
        """All of it, on the CPU; `of` makes the same of it."""
        segments = [s for row in self.rows for s in row.segments if isinstance(s, Sample)]
        c = self.counts
        counts = [c.rows, c.segments_of[SAMPLE], c.targets, c.targets_of[LEARNT], self.left]
        found = {
            "counts": np.array(counts, dtype=np.int64),
            "rows": np.array([len(row.segments) for row in self.rows], dtype=np.int64),
            "places": np.array([s.row for s in segments], dtype=np.int64).reshape(-1, 2),
            "lengths": np.array([len(s.ids) for s in segments], dtype=np.int64),
            "targets": np.array([s.targets_here for s in segments], dtype=np.int64),
            "ids": _joined([s.ids for s in segments], np.int32),
            "advantage": np.array([s.advantage for s in segments], dtype=np.float64),
        }
        found |= {
            k: _joined([getattr(s, k) for s in segments], np.float32) for k in KNOWN if segments and getattr(segments[0], k) is not None
        }
        return {k: torch.from_numpy(a) for k, a in found.items() if a.size}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Drawn:
        """From what `tensors` gave."""
        given = {k: t.numpy() for k, t in tensors.items()}
        prompts, answers, targets, learnt, left = given["counts"].tolist()
        if "ids" not in given:
            return cls([], counted(prompts, answers, targets, learnt), left)
        ids = np.split(given["ids"], np.cumsum(given["lengths"])[:-1])
        known = {k: np.split(given[k], np.cumsum(given["targets"])[:-1]) for k in KNOWN if k in given}
        segments = []
        for i, (place, n) in enumerate(zip(given["places"].tolist(), given["targets"].tolist(), strict=True)):
            supervised = np.arange(len(ids[i])) >= len(ids[i]) - n
            more: dict[str, Any] = {k: values[i] for k, values in known.items()}
            advantage = float(given["advantage"][i])
            segments.append(Sample(ids[i], supervised, origin_of(place[1]), (place[0], place[1]), SAMPLE, advantage=advantage, **more))
        at = iter(segments)
        rows = [one_row([next(at) for _ in range(n)]) for n in given["rows"].tolist()]
        return cls(rows, counted(prompts, answers, targets, learnt), left)


def counted(prompts: int, answers: int, targets: int, learnt: int) -> Counts:
    """The counts of a step. targets: tokens of answers that count. learnt: those that are computed."""
    return Counts(prompts, targets, {SAMPLE: answers}, {SAMPLE: targets, LEARNT: learnt})


def origin_of(row: int) -> str:
    """What messages call an answer by."""
    return f"an answer to row {row + 1}"


def in_rows(groups: Iterable[Sequence[Sample]], max_tokens: int) -> list[Example]:
    """The samples of each prompt as rows of at most max_tokens tokens, if a single one is not longer."""
    rows = []
    for group in groups:
        part, tokens = list[Sample](), 0
        for sample in group:
            more = len(sample.ids) if not part else sample.targets_here + 1
            if part and tokens + more > max_tokens:
                rows.append(one_row(part))
                part, tokens, more = [], 0, len(sample.ids)
            part.append(sample)
            tokens += more
        rows += [one_row(part)] if part else []
    return rows


def _joined(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=dtype)
