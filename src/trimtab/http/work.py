"""Threads for work of requests that would block the event loop. Tenants take turns, and each has one job at a time, so a tenant that sends
much delays only itself."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
THREADS = 4
"""A tenant occupies one of them at a time, so another tenant finds a free one."""


class Work:
    """A pool of threads with a queue for each tenant. Any number of threads and event loops may use it."""

    def __init__(self, name: str, threads: int = THREADS):
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[Callable[[], None]]] = {}  # who has waited longest for a turn first
        self._busy: set[str] = set()

    async def run(self, tenant: str, job: Callable[[], T]) -> T:
        """What the job returns or raises. Where the caller is cancelled, a job that has not begun is dropped."""
        future: Future[T] = Future()

        def carry_out() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:
                    future.set_exception(error)

        with self._lock:
            self._waiting.setdefault(tenant, deque()).append(carry_out)
            self._begin()
        return await asyncio.wrap_future(future)

    def _begin(self) -> None:
        """Under the lock: start what may start."""
        for tenant in [t for t in self._waiting if t not in self._busy][: self._threads - len(self._busy)]:
            queue = self._waiting.pop(tenant)
            job = queue.popleft()
            if queue:
                self._waiting[tenant] = queue  # behind all others
            self._busy.add(tenant)
            self._pool.submit(self._one, tenant, job)

    def _one(self, tenant: str, job: Callable[[], Any]) -> None:
        job()
        with self._lock:
            self._busy.discard(tenant)
            self._begin()
