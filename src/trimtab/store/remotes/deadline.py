"""A time limit for a whole transfer. A server that sends a byte a minute never exceeds the limit of a single read.

The work runs on a thread of its own and checks the clock between two pieces. If it is blocked in a library's read when its time is up, the
thread is abandoned. It can no longer commit anything then, and ends with its connection or the process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from trimtab.errors import AdapterError

PULL_SECONDS = 3600.0
LATE_SECONDS = 1.0
"""How long the work is given to notice by itself that its time is up."""
T = TypeVar("T")


class Deadline(Generic[T]):
    """seconds: from now on. where: what the error calls the other side."""

    def __init__(self, seconds: float, where: str):
        self.seconds, self.where = seconds, where
        self._end, self._committing = time.monotonic() + seconds, threading.Lock()

    @property
    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def check(self) -> None:
        """AdapterError if the time is up."""
        if self.left <= 0:
            raise AdapterError(
                f"{self.where}: not done within {self.seconds:g} seconds",
                fix="run the command again: it goes on where it stopped; --timeout gives it more time",
            )

    @contextmanager
    def committing(self) -> Iterator[None]:
        """What must not be left behind half-way: it begins in time or not at all, and is waited for."""
        with self._committing:
            self.check()
            yield

    def run(self, work: Callable[[], T]) -> T:
        """work's result or error; AdapterError if it is not done in time."""
        done: list[T] = []
        failed: list[BaseException] = []

        def call() -> None:
            try:
                done.append(work())
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=call, name="transfer", daemon=True)
        thread.start()
        thread.join(self.left + LATE_SECONDS)
        if thread.is_alive():
            with self._committing:  # a commit that has begun is waited for; none can begin any more
                pass
            thread.join(LATE_SECONDS)
        if failed:
            raise failed[0]
        if not done:
            self.check()
        return done[0]
