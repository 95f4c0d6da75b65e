"""What keeps a tenant that sends much from delaying others before their answers begin: turns on the event loop, and threads for work that
would block it. Tenants take turns, and each has one job at a time."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from trimtab.errors import OverloadedError

T = TypeVar("T")
PAUSE_S, RECENT_S = 0.003, 1.0
"""Seconds between two requests of a tenant, each of which takes about 1 ms, if another tenant was there within the latter."""
RETRY_S = 2.0
"""When a request may come again for which there was no thread."""
THREADS = 4
"""A tenant occupies one of them at a time, so another tenant finds a free one."""


class Work:
    """A pool of threads with a queue for each tenant. Any number of threads and event loops may use it."""

    def __init__(self, name: str, threads: int = THREADS):
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[Callable[[], None]]] = {}  # who has waited longest for a turn first
        self._busy: set[str] = set()

    async def run(self, tenant: str, job: Callable[[], T]) -> T:
        """What the job returns or raises. Where the caller is cancelled, a job that has not begun is dropped. OverloadedError where the
        system gives no thread."""
        future: Future[T] = Future()

        def carry_out() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:
                    future.set_exception(error)

        with self._lock:
            self._waiting.setdefault(tenant, deque()).append(carry_out)
        try:
            self._pool.submit(self._work)
        except RuntimeError as error:
            if future.cancel():  # no thread that is there has begun it
                raise OverloadedError(f"no thread for this request: {error}", fix="try again later", retry_after=RETRY_S) from error
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """End the threads, after the jobs that they have begun."""
        self._pool.shutdown(cancel_futures=True)

    def _work(self) -> None:
        """On a thread of the pool: jobs, as long as there are any of tenants that no other thread works for."""
        while (found := self._next()) is not None:
            tenant, job = found
            job()
            with self._lock:
                self._busy.discard(tenant)

    def _next(self) -> tuple[str, Callable[[], None]] | None:
        with self._lock:
            tenant = next((t for t in self._waiting if t not in self._busy), None)
            if tenant is None:
                return None
            queue = self._waiting.pop(tenant)
            job = queue.popleft()
            if queue:
                self._waiting[tenant] = queue  # behind all others
            self._busy.add(tenant)
            return tenant, job


class Turns:
    """Lets the requests of a tenant begin one at a time. Hundreds that come at once would otherwise all run before the event loop looks at
    another tenant's. And while the loop's thread computes, the engine's step hardly gets on, so where other tenants were there of late, a
    pause follows each. Used on event loops only."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # of tenants that have just had their turn
        self._seen: OrderedDict[str, float] = OrderedDict()  # when a tenant was last there; the latest last

    async def take(self, tenant: str) -> None:
        """Return when it is this request's turn; at once if no other of the tenant has just had its own."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._waiting, self._seen = loop, {}, OrderedDict()
        self._seen[tenant] = loop.time()
        self._seen.move_to_end(tenant)
        if (queue := self._waiting.get(tenant)) is not None:
            queue.append(turn := loop.create_future())
            await turn
        else:
            queue = self._waiting[tenant] = deque()
            self._call_next(loop, tenant, queue)

    def _call_next(self, loop: asyncio.AbstractEventLoop, tenant: str, queue: deque[asyncio.Future[None]]) -> None:
        while self._seen and loop.time() - next(iter(self._seen.values())) > RECENT_S:
            self._seen.popitem(last=False)
        others = len(self._seen) - (tenant in self._seen)
        loop.call_later(PAUSE_S if others else 0.0, self._next, loop, tenant, queue)

    def _next(self, loop: asyncio.AbstractEventLoop, tenant: str, queue: deque[asyncio.Future[None]]) -> None:
        while queue and queue[0].cancelled():
            queue.popleft()
        if queue:
            queue.popleft().set_result(None)
            self._call_next(loop, tenant, queue)
        else:
            self._waiting.pop(tenant, None)
