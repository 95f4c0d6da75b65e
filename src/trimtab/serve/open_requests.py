"""The requests that are open: how they come in from any thread, what is asked of the step loop meanwhile, and whose time is up."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from threading import Condition, Event

from trimtab.errors import OverloadedError
from trimtab.serve.sequence import Live


class OpenRequests:
    """From `enter` to `leave`. `enter`, `post`, `close` and `wait` may be called from any thread, all else by whoever steps.

    by_id: request id -> its state; read anywhere, changed here alone. wake: set when there is something to do for the step loop. closing:
    nobody comes in any more.
    """

    def __init__(self, max_queued: int):
        self.max_queued = max_queued
        self.by_id: dict[str, Live] = {}
        self.wake = Event()
        self.closing = False
        self._inbox: deque[Callable[[], None]] = deque()
        self._changed = Condition()  # guards by_id, closing and _serial; notified when a request has ended
        self._serial = 0
        self._deadlines: list[tuple[float, int, str]] = []

    def __len__(self) -> int:
        return len(self.by_id)

    def __iter__(self) -> Iterator[Live]:
        """Those of this moment, whoever ends meanwhile."""
        return iter(list(self.by_id.values()))

    def enter(self, live: Live, running: Sequence[Live], begin: Callable[[], None]) -> None:
        """Have the next step call `begin`. running: those that wait no longer. OverloadedError if too many wait or it is closing,
        ValueError if its id is in use."""
        with self._changed:
            if self.closing:
                raise OverloadedError("the server is shutting down", fix="ask another one, or again later", retry_after=10.0)
            if len(self.by_id) - len(running) >= self.max_queued:
                raise OverloadedError(f"{self.max_queued} requests are waiting already", fix="try again later", retry_after=2.0)
            if live.request.id in self.by_id:
                raise ValueError(f"a request with the id {live.request.id!r} is running")
            self._serial += 1
            live.serial = self._serial
            self.by_id[live.request.id] = live
            self._inbox.append(begin)
        self.wake.set()

    def leave(self, live: Live) -> None:
        """It has ended."""
        with self._changed:
            del self.by_id[live.request.id]
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self.closing = True

    def wait(self, done: Callable[[], bool], seconds: float) -> None:
        """Until `done`, asked again whenever a request has ended, or for so many seconds."""
        with self._changed:
            self._changed.wait_for(done, seconds)

    # ---- what the step loop is asked to do ----

    def post(self, what: Callable[[], None]) -> None:
        """Have the next step call it."""
        self._inbox.append(what)
        self.wake.set()

    def take_in(self) -> None:
        """Do what has been posted, and begin what has come in."""
        while self._inbox:
            self._inbox.popleft()()

    def watch(self, live: Live) -> None:
        """Mind its deadline from now on, if it has one."""
        if live.request.deadline is not None:
            heapq.heappush(self._deadlines, (live.request.deadline, live.serial, live.request.id))

    def overdue(self, clock: Callable[[], float]) -> Iterator[Live]:
        """Open requests whose deadline has passed, each once."""
        now = clock() if self._deadlines else 0.0
        while self._deadlines and self._deadlines[0][0] <= now:
            _, serial, request_id = heapq.heappop(self._deadlines)
            live = self.by_id.get(request_id)
            if live is not None and live.serial == serial:
                yield live
