"""Ending a run early: on a signal the joint step finishes, a checkpoint is written, and the run says how to go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(BaseException):
    """A run has ended before its end. signum: the signal that asked for it; the exit code is 128 more, as shells have it.

    No Exception, for the reason that KeyboardInterrupt is none: it is raised wherever the signal comes, inside a library too, and code that
    expects a library's errors must not take it for one.
    """

    def __init__(self, signum: int, where: str = ""):
        self.exit_code = 128 + signum
        super().__init__(f"interrupted{where}")


class Stop:
    """A wish to end a run, handed to `train`. `ask` may be called from a signal handler: while steps run it is only noted, for the loop to
    act on between two steps; at any other time it raises Interrupted there and then."""

    def __init__(self) -> None:
        self.signum = 0
        self._stepping = False

    def ask(self, signum: int) -> None:
        self.signum = signum
        if not self._stepping:
            raise Interrupted(signum)

    @property
    def stepping(self) -> bool:
        """Whether a wish is acted on after the step."""
        return self._stepping

    @contextmanager
    def held(self) -> Iterator[None]:
        """While steps run. A wish that came too late for the last of them ends the run here."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False
        if self.signum:
            raise Interrupted(self.signum)
