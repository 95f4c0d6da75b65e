"""Who hears a run. Nothing in `train/` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Listener(Protocol):
    """Hears a run. status: a stage begins. step: a variant has stepped (the line of metrics.jsonl). stopped: a variant has given up, and
    why."""

    def status(self, text: str) -> None: ...
    def begin(self, steps: Mapping[str, int]) -> None: ...
    def step(self, line: Mapping[str, Any]) -> None: ...
    def stopped(self, variant: str, reason: str) -> None: ...


class Silent:
    """The listener of a library call."""

    def status(self, text: str) -> None:
        """Not shown."""

    def begin(self, steps: Mapping[str, int]) -> None:
        """Not shown."""

    def step(self, line: Mapping[str, Any]) -> None:
        """Not shown; metrics.jsonl has it."""

    def stopped(self, variant: str, reason: str) -> None:
        """Not shown; summary.json has it."""
