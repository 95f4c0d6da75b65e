"""Traffic: who asks which adapter when, with how long a prompt, for how long an answer. Made by chance, or read from a file of one's own.

The simulator and a client of a real server take the same trace, so that both can be compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trimtab.errors import ConfigError, DataError

LARGEST = 2**31 - 1
"""Number of an adapter or a tenant, or of tokens; sums of them are held in 64 bits."""
KEYS = ("at", "adapter", "tenant", "prompt", "answer")


class Asked(NamedTuple):
    """One request. at: seconds after the beginning. adapter, tenant: their numbers. prompt, answer: tokens."""

    at: float
    adapter: int
    tenant: int
    prompt: int
    answer: int


@dataclass(frozen=True)
class Traffic:
    """Requests that arrive at random (Poisson) at `rate` a second. Adapter number i is asked for with a probability in proportion to
    (i + 1)^-zipf, and belongs to tenant i modulo `tenants`. Prompts and answers have so many tokens on average; spread is the standard
    deviation of the logarithm of their lengths, which are lognormal; 0: all are equally long.
    """

    adapters: int = 1000
    tenants: int = 1
    zipf: float = 1.0
    rate: float = 1.0
    requests: int = 1000
    prompt_tokens: float = 128
    answer_tokens: float = 64
    spread: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"adapters": 1, "tenants": 1, "requests": 1, "prompt_tokens": 1, "answer_tokens": 1, "zipf": 0, "spread": 0, "seed": 0}
        problems = [f"{name} = {getattr(self, name)}: must be at least {n}" for name, n in least.items() if not getattr(self, name) >= n]
        if not 0 < self.rate < math.inf:
            problems.append(f"rate = {self.rate}: must be a number of requests a second above 0")
        if problems:
            raise ConfigError("there is no such traffic", problems=problems)

    @property
    def popularity(self) -> np.ndarray:
        """The probability of each adapter."""
        weights = np.arange(1, self.adapters + 1, dtype=np.float64) ** -self.zipf
        return weights / weights.sum()

    def trace(self) -> Trace:
        """Drawn anew from the seed: the same each time."""
        draw = np.random.default_rng(self.seed)
        at = np.cumsum(draw.exponential(1 / self.rate, self.requests))
        chosen = np.searchsorted(np.cumsum(self.popularity), draw.random(self.requests), side="right").clip(0, self.adapters - 1)
        prompt, answer = (self._lengths(draw, mean) for mean in (self.prompt_tokens, self.answer_tokens))
        return Trace(at, chosen.astype(np.int64), chosen % self.tenants, prompt, answer)

    def _lengths(self, draw: np.random.Generator, mean: float) -> np.ndarray:
        """A lognormal's mean is exp(μ + σ²/2)."""
        found = draw.lognormal(math.log(mean) - self.spread**2 / 2, self.spread, self.requests)
        return np.maximum(1, np.rint(found)).astype(np.int64)


@dataclass(frozen=True)
class Trace:
    """Requests in the order in which they arrive: see `Asked`."""

    at: np.ndarray
    adapter: np.ndarray
    tenant: np.ndarray
    prompt: np.ndarray
    answer: np.ndarray

    def __len__(self) -> int:
        return len(self.at)

    def __iter__(self) -> Iterator[Asked]:
        columns = (self.at, self.adapter, self.tenant, self.prompt, self.answer)
        return map(Asked._make, zip(*(c.tolist() for c in columns), strict=True))

    def lines(self) -> str:
        """A line of JSON for each request, as `read` takes them."""
        return "".join(json.dumps(asked._asdict()) + "\n" for asked in self)

    @classmethod
    def read(cls, path: Path) -> Trace:
        """DataError that names the lines that are no requests."""
        found, problems = list[Asked](), list[str]()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = f"the trace {str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}"
            raise DataError(why, fix="give a file of JSON lines") from error
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                asked = Asked(float(row["at"]), *(int(row[key]) for key in KEYS[1:]))
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                problems.append(f"{path}:{number}: {type(error).__name__}: {error}")
                continue
            if not math.isfinite(asked.at) or min(asked) < 0 or min(asked.prompt, asked.answer) < 1:
                problems.append(f"{path}:{number}: at, adapter and tenant must be at least 0, prompt and answer at least 1")
            elif max(asked[1:]) > LARGEST:
                problems.append(f"{path}:{number}: adapter, tenant, prompt and answer must be at most {LARGEST:,}")
            found.append(asked)
        if problems or not found:
            lines_like = json.dumps(Asked(0.5, 3, 0, 128, 64)._asdict())
            raise DataError(
                f"the trace {str(path)!r} cannot be used", problems=problems or ["it has no requests"], fix=f"lines like {lines_like}"
            )
        found.sort(key=lambda asked: asked.at)
        at, *whole = zip(*found, strict=True)
        return cls(np.array(at, dtype=np.float64), *(np.array(column, dtype=np.int64) for column in whole))
