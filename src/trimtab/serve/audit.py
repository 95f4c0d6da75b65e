"""The audit log: what administrators did, and what the server refused. One JSON line each; the file is only appended to.

It never has prompts, answers or keys. Its fields are those below, and texts are cut. The two kinds of lines have two guarantees:

- An administrator's action is on the disk (fsync) before it is carried out. If that fails, the action is refused. A second line says how it
  ended.
- Refused requests are written by a thread, in batches, without fsync. A power cut may lose the last ones. Many at once are written as a
  count.

If the disk is full, serving goes on. The server's log says so once, lost lines are counted, `problem` reports it, and every further line is
tried again. Several processes may append to one file. If the file is moved away (logrotate), a new one is begun.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from trimtab.errors import TrimtabError
from trimtab.serve.database import default_path, is_url
from trimtab.serve.keys import redacted, redacted_in

log = logging.getLogger(__name__)
MAX_TEXT = 200
WRITE_SECONDS = 1.0
MAX_LINES = 50
"""Refusals of one batch that have a line of their own; the rest are counted in one line for each kind."""


class AuditError(TrimtabError):
    """An administrator's act cannot be written down, so it is not carried out."""

    http_status = 503


def audit_path(database: str | Path) -> Path:
    """Where the audit log of a tenants database is: beside the file; of a database by URL each machine has its own, where the file would
    be."""
    if is_url(database):
        database = default_path()
        database.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return Path(database).with_suffix(".audit.jsonl")


class Audit:
    """An audit log, open for appending. A context manager, or `close()`: what is pending is then written."""

    def __init__(self, path: str | Path, *, write_seconds: float = WRITE_SECONDS, clock: Callable[[], float] = time.time):
        """AuditError if the file cannot be opened; it is made (mode 0600) where there is none."""
        self.path, self._write_seconds, self._clock = Path(path), write_seconds, clock
        self.problem = ""
        """Why the last line could not be written, "" while all is well."""
        self.lost = 0
        """Lines that could not be written since the start."""
        try:
            self._file = self._open()
        except OSError as error:
            raise AuditError(
                f"the audit log {path} cannot be opened: {error.strerror}", fix="let it be a file that can be written"
            ) from error
        self._writing, self._lock, self._stop = threading.Lock(), threading.Lock(), threading.Event()
        self._lines: list[str] = []
        self._more: Counter[tuple[str, str]] = Counter()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Audit:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def act(self, what: str, actor: str, target: str = "", details: Mapping[str, object] | None = None) -> Iterator[dict[str, str]]:
        """Around an administrator's act, such as ("tenant.add", "cli:uid=0", "acme"): written before, and how it ended after, with what the
        block puts into the dict that it gets.

        AuditError, before anything is done, where it cannot be written. details: settings, never a key's secret.
        """
        line = {"event": what, "actor": actor, "target": target, **({"details": dict(details)} if details else {})}
        try:
            self._append([self._line({**line, "stage": "begin"})], sync=True)
        except OSError as error:
            fix = "make room for it, or let it be written to"
            raise AuditError(f"{what} is not carried out: the audit log {self.path} cannot be written", fix=fix) from error
        outcome, learnt = "failed", dict[str, str]()
        try:
            yield learnt
            outcome = "done"
        finally:
            try:
                self._append([self._line({**line, **learnt, "stage": outcome})], sync=True)
            except OSError:
                pass  # it is counted and said; what is done is done

    def refused(self, reason: str, *, tenant: str = "", route: str = "", request_id: str = "", client: str = "") -> None:
        """A request that was not let in: reason "auth", "forbidden", "concurrency", "tokens", "full", …. Microseconds; never raises."""
        line = {"event": "refused", "reason": reason, "tenant": tenant, "route": route, "request": request_id, "client": client}
        with self._lock:
            if len(self._lines) < MAX_LINES:
                self._lines.append(self._line(line))
            else:
                self._more[reason[:MAX_TEXT], tenant[:MAX_TEXT]] += 1
            if self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(target=self._write_now_and_then, name="trimtab-audit", daemon=True)
                self._thread.start()

    def flush(self) -> None:
        """Write what is pending; what cannot be is lost, and counted."""
        with self._lock:
            lines, more = self._lines, self._more
            self._lines, self._more = [], Counter()
        lines += [self._line({"event": "refused", "reason": r, "tenant": t, "more": n}) for (r, t), n in more.items()]
        if lines:
            try:
                self._append(lines, sync=False)
            except OSError:
                pass  # it is counted and said

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.flush()
        with self._writing:
            os.close(self._file)

    def _line(self, fields: Mapping[str, object]) -> str:
        told = {k: redacted(v)[:MAX_TEXT] if isinstance(v, str) else v for k, v in fields.items() if v != ""}
        return json.dumps({"time": round(self._clock(), 3), **redacted_in(told)}) + "\n"

    def _open(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def _append(self, lines: list[str], *, sync: bool) -> None:
        """All of the lines, or an OSError and none of them."""
        with self._writing:
            try:
                self._reopen_if_moved()
                fcntl.flock(self._file, fcntl.LOCK_EX)
                try:
                    append_whole(self._file, "".join(lines).encode())
                    if sync:
                        os.fsync(self._file)
                finally:
                    fcntl.flock(self._file, fcntl.LOCK_UN)
            except OSError as error:
                self.lost += len(lines)
                if not self.problem:  # once, not with every refusal of an outage
                    log.error("the audit log cannot be written", extra={"told": {"audit": str(self.path), "error": str(error)}})
                self.problem = error.strerror or str(error)
                raise
            if self.problem:
                log.info("the audit log can be written again", extra={"told": {"audit": str(self.path), "lost": self.lost}})
                self.problem = ""

    def _reopen_if_moved(self) -> None:
        try:
            moved = not os.path.samestat(os.stat(self.path), os.fstat(self._file))
        except FileNotFoundError:
            moved = True
        if moved:
            new = self._open()
            os.close(self._file)
            self._file = new

    def _write_now_and_then(self) -> None:
        while not self._stop.wait(self._write_seconds):
            self.flush()


def append_whole(file: int, data: bytes) -> None:
    """Whole lines or none: what a full disk has cut off would spoil the next line. Call it under the file's lock."""
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":
        data = b"\n" + data  # a writer was killed in the middle of its line
    if (written := os.write(file, data)) < len(data):
        os.ftruncate(file, size)
        raise OSError(errno.ENOSPC, f"only {written} of {len(data)} bytes could be written")
