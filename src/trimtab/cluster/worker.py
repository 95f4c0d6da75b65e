"""What runs on a node: an actor that trains one group in a thread of its own, and says what it has come to when it is asked.

The driver asks `where` first: a node with another trimtab must not be sent anything that it would read otherwise.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trimtab.errors import Mistakes, TrimtabError
from trimtab.version import __version__

if TYPE_CHECKING:
    from trimtab.cluster.job import Job
    from trimtab.train.ahead import Ahead
    from trimtab.train.config import RunConfig

OCCUPIED_S = 150.0
"""After a node was lost, its processes may live for a moment and hold the run folder; a server of NFS keeps the locks of a machine that is
gone for 90 s."""


@dataclass(frozen=True)
class Ended:
    """How a group has ended. summary: of one that has finished. text, problems, fix: of one that was refused or has failed."""

    how: Literal["finished", "interrupted", "refused", "failed"]
    summary: dict[str, Any] | None = None
    text: str = ""
    problems: tuple[str, ...] = ()
    fix: str = ""


@dataclass(frozen=True)
class Told:
    """What has happened since the worker was last asked: calls of a Listener's methods, and the end, once it has come."""

    events: list[tuple[str, tuple[Any, ...]]]
    ended: Ended | None


class Worker:
    """The actor. folder: the driver's current one, from which relative paths are taken."""

    def __init__(self, folder: str):
        with suppress(OSError):  # what cannot be read then is named by `problems`
            os.chdir(folder)
        self._events: list[tuple[str, tuple[Any, ...]]] = []
        self._ended: Ended | None = None
        self._news = threading.Condition()
        self._stop: Any = None

    def where(self) -> dict[str, Any]:
        """Plain values, for any version of the driver."""
        import ray

        return {"node": ray.get_runtime_context().get_node_id(), "host": socket.gethostname(), "pid": os.getpid(), "version": __version__}

    def problems(self, run: RunConfig, marker: str, dtype: str | None) -> list[str]:
        """What keeps this node from training the run: files that it does not see, a device that it does not have. marker: a file that the
        driver has written beside the run folder. dtype: what it must compute in, None where that does not matter."""
        from trimtab.bases import resolve_device, resolve_dtype
        from trimtab.cluster.marker import unseen
        from trimtab.train.before import note_mistakes

        mistakes, found = Mistakes(), list[str]()
        if (reason := unseen(marker)) is not None:
            found.append(reason)
        note_mistakes(run, None, mistakes)
        with suppress(TrimtabError):  # noted already
            own = str(resolve_dtype(run.dtype, resolve_device(run.device))).removeprefix("torch.")
            if dtype not in (None, own):
                found.append(f"it computes in {own} and the driver in {dtype}: set `dtype` in the file, so that all trials do the same")
        return found + [line for error in mistakes.errors for line in error.among_others()]

    def start(self, job: Job) -> None:
        """Begin to train, in a thread."""
        from trimtab.train.interrupt import Stop

        self._stop = Stop()
        threading.Thread(target=self._run, args=(job,), daemon=True).start()

    def told(self, wait_s: float) -> Told:
        """What is new; waits for something, but not longer than asked."""
        with self._news:
            self._news.wait_for(lambda: self._events or self._ended, wait_s)
            events, self._events = self._events, []
            return Told(events, self._ended)

    def stop(self, signum: int) -> None:
        """Ask the run to end with a checkpoint. One that takes no steps at the moment has nothing to save, and ends at once."""
        from trimtab.train.interrupt import Interrupted

        try:
            if self._stop is not None:
                self._stop.ask(signum)
        except Interrupted:
            self._end(Ended("interrupted"))

    def _run(self, job: Job) -> None:
        from trimtab.train.interrupt import Interrupted

        try:
            self._end(Ended("finished", self._trained(job)))
        except Interrupted:
            self._end(Ended("interrupted"))
        except TrimtabError as error:
            self._end(Ended("failed", text=error.message, problems=error.problems, fix=error.fix))
        except BaseException:  # a bug, of which the driver must hear too
            self._end(Ended("failed", text="this is a bug in trimtab or in a library:\n" + traceback.format_exc()))

    def _trained(self, job: Job) -> dict[str, Any]:
        from trimtab.train.hold import Occupied
        from trimtab.train.loop import train

        listener, deadline = _Teller(self._tell), time.monotonic() + OCCUPIED_S
        while True:
            try:
                return train(
                    job.run,
                    listener=listener,
                    resume=job.resume,
                    extend=job.extend,
                    stop=self._stop,
                    halving=job.halving,
                    store=job.store,
                ).summary
            except Occupied:
                if not job.resume or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def _tell(self, kind: str, *values: Any) -> None:
        with self._news:
            self._events.append((kind, values))
            self._news.notify()

    def _end(self, ended: Ended) -> None:
        with self._news:
            self._ended = self._ended or ended
            self._news.notify()


class _Teller:
    """A Listener that hands on what it is told."""

    def __init__(self, tell: Callable[..., None]):
        self._tell = tell

    def status(self, text: str) -> None:
        self._tell("status", text)

    def begin(self, steps: Mapping[str, int], ahead: Ahead) -> None:
        self._tell("begin", dict(steps))

    def step(self, line: Mapping[str, Any]) -> None:
        self._tell("step", dict(line))

    def valid(self, line: Mapping[str, Any]) -> None:
        self._tell("valid", dict(line))

    def stopped(self, variant: str, reason: str) -> None:
        self._tell("stopped", variant, reason)

    def joined(self, variant: str, steps: int, ahead: Ahead) -> None:
        self._tell("joined", variant, steps)

    def saved(self, step: int, folder: Path) -> None:
        """The driver sees the folder."""

    def warning(self, text: str) -> None:
        self._tell("warning", text)

    def note(self, text: str) -> None:
        self._tell("note", text)
