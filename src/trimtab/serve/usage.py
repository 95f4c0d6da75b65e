"""Who used how much: tokens and requests per tenant, day (UTC) and adapter digest, for bills and for looking back.

Requests add to counters in memory; a thread writes them every few seconds. A failed writing is tried again with what came since, so only a
killed process (not SIGTERM, where the server closes) loses counts, those of the last seconds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.serve.database import Connection, Database

FLUSH_SECONDS = 2.0
log = logging.getLogger(__name__)
Counts = tuple[int, int, int]
"""(requests, prompt tokens, completion tokens)"""


@dataclass(frozen=True)
class UsageRow:
    """tenant: its name. day: YYYY-MM-DD in UTC. adapter: a digest, "" for the base."""

    tenant: str
    day: str
    adapter: str
    requests: int
    prompt_tokens: int
    completion_tokens: int


class UsageBook:
    """Adds up in memory and writes in batches. Any number of threads, and of processes on one database."""

    def __init__(self, database: Database[Any], *, flush_seconds: float = FLUSH_SECONDS, clock: Callable[[], float] = time.time):
        self.flush_seconds, self.clock = flush_seconds, clock
        self.problem = ""
        self._database, self._handle = database, database.handle()
        self._pending: dict[tuple[str, str, str], Counts] = {}
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, tenant_id: str, adapter: str, prompt: int, completion: int, *, requests: int = 1) -> None:
        """Count; microseconds, never waits for the disk. adapter: the digest, "" for the base."""
        key = (tenant_id, datetime.fromtimestamp(self.clock(), UTC).strftime("%Y-%m-%d"), adapter)
        with self._lock:
            self._pending[key] = _plus(self._pending.get(key, (0, 0, 0)), (requests, prompt, completion))
            if self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(target=self._write_now_and_then, name="trimtab-usage", daemon=True)
                self._thread.start()

    def flush(self) -> None:
        """Write what is pending. DatabaseError if that fails; the counts are kept for the next time."""
        with self._writing:
            with self._lock:
                taken, self._pending = self._pending, {}
            if not taken:
                return
            try:
                with self._database.writing(self._handle) as db:
                    for key, counts in taken.items():
                        _write(db, key, counts)
            except BaseException:
                with self._lock:
                    for key, counts in taken.items():
                        self._pending[key] = _plus(self._pending.get(key, (0, 0, 0)), counts)
                raise

    def report(self, tenant: str = "", since: str = "", until: str = "") -> list[UsageRow]:
        """Everything written so far, with what this process had pending. tenant: a name, "" for all; since, until: days, both included."""
        self.flush()
        query = """SELECT t.name, u.day, u.adapter, u.requests, u.prompt_tokens, u.completion_tokens
            FROM usage u JOIN tenants t ON t.id = u.tenant
            WHERE (? = '' OR t.name = ?) AND u.day >= ? AND (? = '' OR u.day <= ?) ORDER BY t.name, t.id, u.day, u.adapter"""
        with self._writing, self._database.reading(self._handle) as db:
            return [UsageRow(*row) for row in db.execute(query, (tenant, tenant, since, until, until))]

    def close(self) -> None:
        """Write what is left and stop. DatabaseError, naming how much, where it cannot be written."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            self.flush()
        finally:
            with self._writing:
                self._database.close(self._handle)

    def _write_now_and_then(self) -> None:
        while not self._stop.wait(self.flush_seconds):
            try:
                self._database.follow()  # soon, also where nobody asks: side files of a replaced file must not stay
                self.flush()
                self.problem = ""
            except TrimtabError as error:
                if not self.problem:  # once, not every two seconds of an outage
                    log.error("usage cannot be written, it is kept in memory: %s", error.message)
                self.problem = error.message


def _write(db: Connection, key: tuple[str, str, str], counts: Counts) -> None:
    written = db.execute(
        """INSERT INTO usage SELECT ?, ?, ?, ?, ?, ? WHERE EXISTS (SELECT 1 FROM tenants WHERE id = ?)
        ON CONFLICT (tenant, day, adapter) DO UPDATE SET
        requests = usage.requests + excluded.requests,
        prompt_tokens = usage.prompt_tokens + excluded.prompt_tokens,
        completion_tokens = usage.completion_tokens + excluded.completion_tokens""",
        (*key, *counts, key[0]),
    ).rowcount
    if not written:  # one bad row must not hold up all others for ever
        log.error("usage of an unknown tenant is not kept", extra={"told": {"tenant": key[0]}})


def _plus(a: Counts, b: Counts) -> Counts:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]
