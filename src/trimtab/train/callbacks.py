"""Callbacks: code of the user's that a run calls as it goes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.train.interrupt import Stop
from trimtab.train.listen import Listener

if TYPE_CHECKING:
    from trimtab.train.ahead import Ahead
    from trimtab.train.loop import Report


class Callback:
    """Base class of callbacks: override what you need, the other methods do nothing.

    They are called in order, on the thread that trains, between steps. If one raises an exception, no callback is called any more; the run
    ends after the current step with a checkpoint, and the exception is raised from `trimtab.train`. `resume=True` then goes on. In
    `on_start` there is no step to finish: the run ends at once.
    """

    def on_start(self, steps: Mapping[str, int]) -> None:
        """Training begins. steps: of each variant, in all."""

    def on_step(self, line: Mapping[str, Any]) -> None:
        """A variant has made a step. line: what metrics.jsonl says of it: variant, step, epoch, loss, lr, grad_norm, tokens, …"""

    def on_eval(self, line: Mapping[str, Any]) -> None:
        """A variant has been validated. line: what metrics.jsonl says of it: variant, step, valid_loss, base_valid_loss, best, …"""

    def on_stopped(self, variant: str, reason: str) -> None:
        """A variant has stopped before its end: its loss was no number, or it was stopped by hand."""

    def on_joined(self, variant: str, steps: int) -> None:
        """A clone has come into the run while it trained. steps: that it is to make."""

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """A checkpoint has been written. step: of all variants together."""

    def on_end(self, report: Report) -> None:
        """The run has finished: its adapters are saved and scored."""


class Calling:
    """The listener of a run with callbacks: tells another listener first, then them. error: what one of them has raised."""

    def __init__(self, listener: Listener, callbacks: Sequence[Callback], stop: Stop):
        self._listener, self._callbacks, self._stop = listener, callbacks, stop
        self.error: Exception | None = None

    def _call(self, tell: Callable[[Callback], None]) -> None:
        if self.error is not None:
            return
        try:
            for callback in self._callbacks:
                tell(callback)
        except Exception as error:
            self.error = error
            self._stop.ask(signal.SIGINT)

    def status(self, text: str) -> None:
        self._listener.status(text)

    def begin(self, steps: Mapping[str, int], ahead: Ahead) -> None:
        self._listener.begin(steps, ahead)
        self._call(lambda c: c.on_start(steps))

    def step(self, line: Mapping[str, Any]) -> None:
        self._listener.step(line)
        self._call(lambda c: c.on_step(line))

    def valid(self, line: Mapping[str, Any]) -> None:
        self._listener.valid(line)
        self._call(lambda c: c.on_eval(line))

    def stopped(self, variant: str, reason: str) -> None:
        self._listener.stopped(variant, reason)
        self._call(lambda c: c.on_stopped(variant, reason))

    def joined(self, variant: str, steps: int, ahead: Ahead) -> None:
        self._listener.joined(variant, steps, ahead)
        self._call(lambda c: c.on_joined(variant, steps))

    def saved(self, step: int, folder: Path) -> None:
        self._listener.saved(step, folder)
        self._call(lambda c: c.on_checkpoint(step, folder))

    def warning(self, text: str) -> None:
        self._listener.warning(text)

    def note(self, text: str) -> None:
        self._listener.note(text)
