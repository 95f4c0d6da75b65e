"""How long a server's steps and loads take: fitted to steps of a real engine on this machine, or as given."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trimtab.errors import ConfigError

KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Step:
    """What decides how long a step takes. rows: tokens that enter it, of prompts and of decoding. sequences: that are in it. adapters:
    distinct ones. context: tokens that are in the cache of all its sequences. mixed: whether the engine puts a mix of
    its adapters together, since the one that it has lacks some (`Runner`)."""

    rows: int
    sequences: int
    adapters: int
    context: int
    mixed: bool = False


@dataclass(frozen=True)
class Speed:
    """rows, seconds: of a step of so many rows, on straight lines between, and beyond the last. sequence_s, adapter_s, context_s: more
    for each sequence, distinct adapter, and token in the cache. mix_s: more for a mix of adapters that is put together. load_s: of
    reading and packing an adapter while nothing runs; busy_load_s: while steps run, None: the same. slowed: by how much longer a step
    takes while one is read. before_s, after_s: between client and engine, of a request and of its last token. source: where these figures
    come from."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    source: str
    sequence_s: float = 0.0
    adapter_s: float = 0.0
    context_s: float = 0.0
    mix_s: float = 0.0
    load_s: float = 0.0
    busy_load_s: float | None = None
    slowed: float = 0.0
    before_s: float = 0.0
    after_s: float = 0.0

    def __post_init__(self) -> None:
        names = ("sequence_s", "adapter_s", "context_s", "mix_s", "load_s", "busy_load_s", "slowed", "before_s", "after_s")
        each = {name: value for name in names if (value := getattr(self, name)) is not None}
        problems = [f"{name} = {value}: must be at least 0" for name, value in each.items() if not value >= 0]
        if not self.rows or len(self.rows) != len(self.seconds) or min(self.rows) < 1 or list(self.rows) != sorted(set(self.rows)):
            problems.append(f"rows = {self.rows}: must grow from at least 1, with a time for each")
        if not min(self.seconds, default=0) > 0:
            problems.append(f"seconds = {self.seconds}: must be above 0")
        if problems:
            raise ConfigError("no step takes so long", problems=problems)

    def __call__(self, step: Step, loading: bool = False) -> float:
        """Seconds of a step. loading: whether an adapter is read meanwhile."""
        took = self.of_rows(step.rows)
        took += self.sequence_s * step.sequences + self.adapter_s * step.adapters + self.context_s * step.context
        took += self.mix_s * step.mixed
        return took * (1 + self.slowed * loading)

    def of_load(self, busy: bool) -> float:
        """Seconds of a load. busy: whether steps run meanwhile."""
        return self.busy_load_s if busy and self.busy_load_s is not None else self.load_s

    def of_rows(self, rows: int) -> float:
        """Seconds of so many rows alone."""
        if len(self.rows) == 1:
            return self.seconds[0]
        at = min(max(bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        part = max(0.0, (rows - self.rows[at - 1]) / (self.rows[at] - self.rows[at - 1]))
        return (1 - part) * self.seconds[at - 1] + part * self.seconds[at]

    @classmethod
    def read(cls, path: Path) -> Speed:
        """As `trimtab simulate --write-speed` wrote it. ConfigError where it is none."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**content | {"rows": tuple(content["rows"]), "seconds": tuple(content["seconds"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            why = f"{type(error).__name__}: {error}"
            raise ConfigError(f"no speeds can be read from {str(path)!r}", problems=[why], fix="write it with --write-speed") from error

    @classmethod
    def given(cls, step_s: float, row_s: float, adapter_s: float, load_s: float) -> Speed:
        """Of a straight line: so much for a step of one row, more for each further row and for each adapter."""
        return cls((1, 2), (step_s, step_s + row_s), "as given", adapter_s=adapter_s, load_s=load_s)


def fit(steps: Sequence[tuple[Step, float]], source: str, **others: float) -> Speed:
    """The speed that steps of a real engine had: least squares of their relative errors. What comes out below 0 is taken for 0, and the
    rest fitted again. More rows never take less. others: further fields."""
    most = max(step.rows for step, _ in steps)
    knots = [k for k in KNOTS if k < most] + [most]
    knots = [k for i, k in enumerate(knots) if i == 0 or any(knots[i - 1] < s.rows <= k for s, _ in steps)] or [1]
    hats_KN = np.array([np.interp([s.rows for s, _ in steps], knots, row) for row in np.eye(len(knots))])
    more_4N = np.array([[s.sequences, s.adapters, s.context, s.mixed] for s, _ in steps], dtype=np.float64).T
    took_N = np.array([seconds for _, seconds in steps])
    kept = [i for i in range(4) if np.ptp(more_4N[i]) > 0]
    while True:
        scaled = more_4N[kept] / np.maximum(1, np.abs(more_4N[kept]).max(1, keepdims=True)) if kept else more_4N[:0]
        columns = np.concatenate([hats_KN, scaled]) / took_N
        found = np.linalg.lstsq(columns.T, np.ones_like(took_N), rcond=1e-6)[0]
        below = [i for i, x in zip(kept, found[len(knots) :], strict=True) if x < 0]
        if not below:
            break
        kept = [i for i in kept if i not in below]
    each = dict.fromkeys(range(4), 0.0)
    for i, x in zip(kept, found[len(knots) :], strict=True):
        each[i] = float(x / max(1.0, np.abs(more_4N[i]).max()))
    seconds = np.maximum.accumulate(np.maximum(found[: len(knots)], 1e-6))
    return Speed(
        tuple(knots),
        tuple(map(float, seconds)),
        source,
        sequence_s=each[0],
        adapter_s=each[1],
        context_s=each[2],
        **{"mix_s": each[3]} | others,
    )
