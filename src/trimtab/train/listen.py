"""Listeners are told of a run's stages and steps. Nothing in `train/` prints."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from trimtab.train.ahead import Ahead


class Listener(Protocol):
    """Is told of a run. status: a stage begins. begin: training begins, with the steps of each variant, and what else the run will do.
    step: a variant has made a step (the line of metrics.jsonl). valid: a variant has been validated (its line). stopped: a variant has
    stopped, and why. joined: a variant has come into the run, with its steps. saved: a checkpoint has been written after this joint step.
    warning: the run goes on, but the user should know. note: what `trimtab check` calls so: nothing is wrong, and it may not be what was
    meant."""

    def status(self, text: str) -> None: ...
    def begin(self, steps: Mapping[str, int], ahead: Ahead) -> None: ...
    def step(self, line: Mapping[str, Any]) -> None: ...
    def valid(self, line: Mapping[str, Any]) -> None: ...
    def stopped(self, variant: str, reason: str) -> None: ...
    def joined(self, variant: str, steps: int, ahead: Ahead) -> None: ...
    def saved(self, step: int, folder: Path) -> None: ...
    def warning(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...


class Silent:
    """The listener of a library call."""

    def status(self, text: str) -> None:
        """Not shown."""

    def begin(self, steps: Mapping[str, int], ahead: Ahead) -> None:
        """Not shown."""

    def step(self, line: Mapping[str, Any]) -> None:
        """Not shown; metrics.jsonl has it."""

    def valid(self, line: Mapping[str, Any]) -> None:
        """Not shown; metrics.jsonl has it."""

    def stopped(self, variant: str, reason: str) -> None:
        """Not shown; summary.json has it."""

    def joined(self, variant: str, steps: int, ahead: Ahead) -> None:
        """Not shown; run.json has it."""

    def saved(self, step: int, folder: Path) -> None:
        """Not shown."""

    def warning(self, text: str) -> None:
        """Logged: a run that had to fall back, or cannot write, is never silent."""
        logging.getLogger("trimtab").warning(text)

    def note(self, text: str) -> None:
        """Logged too: what rows hold and nothing uses is never passed over."""
        logging.getLogger("trimtab").warning("note: %s", text)


class Deaf(Silent):
    """The listener of a rank that is not the first, whose own is told the same."""

    def warning(self, text: str) -> None:
        """The first rank's listener has it."""

    def note(self, text: str) -> None:
        """The first rank's listener has it."""
