"""Rows for the page, read by a process of their own (`train/rows_process.py`), so that no file can hurt the page.

Reading takes seconds to minutes. `begin` starts it on a thread and returns; `told` says how far it is. One thing is read at a time. A
process that is not asked for a while is ended, and begun again when it is needed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from trimtab.errors import NotFoundError, OverloadedError
from trimtab.http.errors import Fault
from trimtab.train.rows_process import GONE

KEPT = 16
"""Readings of which it is known how they ended."""
READ_S, ROWS_S, WAIT_S, IDLE_S = 1800.0, 30.0, 20.0, 600.0
"""Seconds for a reading, for a page of rows, for another one's to end, and until an idle process is ended."""
MAX_ANSWER = 64 << 20
"""Characters of an answer."""


@dataclass
class Reading:
    """state: "reading", "ready" or "failed". message: how to begin it again, where the process that had its rows has gone."""

    message: dict[str, Any]
    state: str = "reading"
    status: str = "waiting for its turn"
    began: float = field(default_factory=time.monotonic)
    report: Any = None
    error: str = ""

    def told(self) -> dict[str, Any]:
        seconds = time.monotonic() - self.began
        return {"state": self.state, "status": self.status, "seconds": seconds, "report": self.report, "error": self.error or None}


class Reader:
    """Safe for any number of threads. `close` ends the process."""

    def __init__(self, idle_s: float = IDLE_S) -> None:
        self._turn, self._guard = threading.Lock(), threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._readings: OrderedDict[str, Reading] = OrderedDict()
        self._timer: threading.Timer | None = None
        self._idle_s, self._closed = idle_s, False

    def begin(self, key: str, message: dict[str, Any]) -> dict[str, Any]:
        """Start to read, unless the same is being read. key: names it from now on."""
        with self._guard:
            known = self._readings.get(key)
            if known is not None and known.state == "reading":
                return known.told()
            if sum(r.state == "reading" for r in self._readings.values()) >= KEPT:
                raise OverloadedError("too much is being read at a time", fix="wait until some of it is there")
            reading = self._readings[key] = Reading({**message, "key": key})
            self._readings.move_to_end(key)
            for old in [k for k, r in self._readings.items() if r.state != "reading"][: max(0, len(self._readings) - KEPT)]:
                del self._readings[old]
        threading.Thread(target=self._read, args=(key, reading), daemon=True).start()
        return reading.told()

    def told(self, key: str) -> dict[str, Any]:
        """How far a reading is, and what it has found. NotFoundError where there is none."""
        return self._known(key).told()

    def ask(self, key: str, message: dict[str, Any]) -> Any:
        """A page of rows of what was read."""
        reading = self._known(key)
        if reading.state != "ready":
            raise Fault("these rows are not read yet", status=409, code="not_ready")
        wanted = {**message, "key": key}
        with self._taken(WAIT_S):
            try:
                return self._call(wanted, ROWS_S)
            except Fault as fault:
                if fault.http_status != GONE:
                    raise
            self._call(reading.message, READ_S)  # the process has ended meanwhile, or has read others
            return self._call(wanted, ROWS_S)

    def at_once(self, message: dict[str, Any]) -> Any:
        """An answer that takes a moment, where nothing is being read for long."""
        with self._taken(WAIT_S):
            return self._call(message, ROWS_S)

    def close(self) -> None:
        self._closed = True
        self._end()

    def _known(self, key: str) -> Reading:
        with self._guard:
            if key not in self._readings:
                raise NotFoundError("nothing of that name has been read", fix="open it again")
            return self._readings[key]

    def _read(self, key: str, reading: Reading) -> None:
        def hear(text: str) -> None:
            reading.status = text

        try:
            with self._taken(READ_S):
                reading.report = self._call(reading.message, READ_S, hear)
            reading.state = "ready"
        except Exception as error:
            reading.error, reading.state = str(error), "failed"

    @contextmanager
    def _taken(self, wait_s: float) -> Iterator[None]:
        """The process to oneself."""
        if not self._turn.acquire(timeout=wait_s):
            raise OverloadedError("other rows are being read", fix="try again when they are there")
        try:
            if self._timer is not None:
                self._timer.cancel()
            yield
        finally:
            self._timer = threading.Timer(self._idle_s, self._end_idle)
            self._timer.daemon = True
            self._timer.start()
            self._turn.release()

    def _call(self, message: dict[str, Any], limit_s: float, hear: Callable[[str], None] = lambda text: None) -> Any:
        """One message and its answer. The process is ended where it takes too long."""
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        guard = threading.Timer(limit_s, process.kill)
        guard.daemon = True
        guard.start()
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            while (line := process.stdout.readline(MAX_ANSWER)).endswith("\n"):
                told = json.loads(line)
                if "status" in told:
                    hear(told["status"])
                elif "error" in told:
                    raise Fault(told["error"]["message"], status=told["error"]["status"], code="not_read")
                else:
                    return told["answer"]
        except OSError:
            pass  # it has ended: said below
        finally:
            guard.cancel()
        code = self._end()
        raise Fault(f"the process that reads rows has ended ({code}): they take too much memory, or longer than {limit_s:.0f} s")

    def _running(self) -> subprocess.Popen[str]:
        if self._closed:
            raise Fault("the page is closing", status=503)
        if self._process is None or self._process.poll() is not None:
            self._end()
            command = [sys.executable, "-m", "trimtab.train.rows_process"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        return self._process

    def _end_idle(self) -> None:
        if self._turn.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._turn.release()

    def _end(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    pass  # what was not sent any more
        return process.wait()
