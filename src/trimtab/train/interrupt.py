"""Ending a run early: on a signal the joint step finishes, a checkpoint is written, and the run says how to go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(BaseException):
    """A run has been ended early. signum: the signal that asked for it; the exit code is 128 more, as in shells.

    It is no subclass of Exception, for the same reason as KeyboardInterrupt: it is raised wherever the signal arrives, inside a library
    too, and code that catches a library's errors must not catch it.
    """

    def __init__(self, signum: int, where: str = ""):
        self.exit_code = 128 + signum
        super().__init__(f"interrupted{where}")


class Stop:
    """A request to end a run, handed to `train`. `ask` may be called from a signal handler. While steps run, the request is only noted, and
    the loop acts on it between two steps. At any other time it raises Interrupted at once."""

    def __init__(self) -> None:
        self.signum = 0
        self._stepping = False

    def ask(self, signum: int) -> None:
        self.signum = signum
        if not self._stepping:
            raise Interrupted(signum)

    @property
    def stepping(self) -> bool:
        """Whether a request is acted on after the step."""
        return self._stepping

    @contextmanager
    def held(self) -> Iterator[None]:
        """While steps run. A request that came too late for the last of them ends the run here."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False
        if self.signum:
            raise Interrupted(self.signum)
