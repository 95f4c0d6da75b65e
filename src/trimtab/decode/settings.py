"""How a row is drawn: what a sampler asks of settings, and what is wrong with them. No tensors, so that HTTP may read it."""

from __future__ import annotations

from typing import Protocol


class Settings(Protocol):
    """How one row is drawn. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...


def cut_problems(settings: Settings) -> list[str]:
    """What is wrong with the numbers that take tokens out of a distribution."""
    rules = (
        ("top_p", "must be in (0, 1]", 0.0 < settings.top_p <= 1.0),
        ("top_k", "must be 0 (off) or above", settings.top_k >= 0),
        ("min_p", "must be in [0, 1)", 0.0 <= settings.min_p < 1.0),
    )
    return [f"{name} = {getattr(settings, name)}: {rule}" for name, rule, good in rules if not good]
