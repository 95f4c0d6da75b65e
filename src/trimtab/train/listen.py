"""Who hears a run, and who uses its base and its variants between two steps. Nothing in `train/` prints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from trimtab.train.ahead import Ahead
    from trimtab.train.prepare import Prepared


class Listener(Protocol):
    """Hears a run. status: a stage begins. begin: the steps begin, of each variant so many, and what comes beside them. step: a variant has
    stepped (the line of metrics.jsonl). valid: a variant has been validated (its line). stopped: a variant has given up, and why. warning:
    the run goes on, but somebody should know."""

    def status(self, text: str) -> None: ...
    def begin(self, steps: Mapping[str, int], ahead: Ahead) -> None: ...
    def step(self, line: Mapping[str, Any]) -> None: ...
    def valid(self, line: Mapping[str, Any]) -> None: ...
    def stopped(self, variant: str, reason: str) -> None: ...
    def warning(self, text: str) -> None: ...


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

    def warning(self, text: str) -> None:
        """Logged: a run that had to fall back, or cannot write, is never silent."""
        logging.getLogger("trimtab").warning(text)


Beside = Callable[["Prepared"], AbstractContextManager[Callable[[], None]]]
"""What goes on beside a run: entered before the first step and left after the last one, however it ends; what it gives is called after each
joint step, on the thread that trains. It may read the variants and run forwards of the base, and changes neither."""


@contextmanager
def alone(prepared: Prepared) -> Iterator[Callable[[], None]]:
    """Nothing goes on beside the run."""
    yield lambda: None
