"""The processes of grammars (`grammar_process.py`) as the server holds them: started, spoken to through pipes, chosen for a tenant, ended.

What a message means is `grammars.py`'s to know. Nobody waits here: a pipe takes what it takes now. Starting a process takes some
milliseconds and must not happen under a lock that the engine's step needs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from trimtab.serve.grammar_process import REPLY

MAX_PROCESSES = 3
"""Tenants beyond share one. Each has 45 MB of its own, and at most `grammars.ROOM_BYTES` more."""
IDLE_S = 10.0
"""Seconds after which a process ends that nobody needs. The last one stays: the next grammar need not wait for a start."""


class Asker(Protocol):
    """Somebody for whom a process works."""

    @property
    def tenant(self) -> str: ...


A = TypeVar("A", bound=Asker)


@dataclass(eq=False)
class Process(Generic[A]):
    """One process. matchers: for whom it works. asked: those whose messages are not answered, oldest first. out, got: bytes that wait to be
    written, and bytes of a reply that is not complete. trouble: why it could not start."""

    popen: subprocess.Popen[bytes]
    matchers: set[A] = field(default_factory=set)
    asked: deque[A] = field(default_factory=deque)
    out: bytearray = field(default_factory=bytearray)
    got: bytearray = field(default_factory=bytearray)
    trouble: str = ""
    idle_since: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, first: bytes) -> Process[A]:
        """A new one, whose first words these are. OSError where the system gives none."""
        command = [sys.executable, "-m", "trimtab.serve.grammar_process"]
        pipe = subprocess.PIPE
        # A process group of its own: Ctrl-C lets running answers finish. No session of its own: Linux shares the cores among sessions
        # first (autogroup), so in another session its priority would count for nothing beside the server.
        popen = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0, process_group=0)
        _lower(popen.pid)
        process = cls(popen)
        os.set_blocking(process.write_end, False)
        os.set_blocking(process.read_end, False)
        process.out += first
        return process

    @property
    def read_end(self) -> int:
        assert self.popen.stdout is not None
        return self.popen.stdout.fileno()

    @property
    def write_end(self) -> int:
        assert self.popen.stdin is not None
        return self.popen.stdin.fileno()

    def leave(self, matcher: A) -> None:
        """It works for this one no longer."""
        self.matchers.discard(matcher)
        if not self.matchers:
            self.idle_since = time.monotonic()

    def send(self, data: bytes) -> bool:
        """Write what the pipe takes now; whether this left something for `write`."""
        waiting = bool(self.out)
        self.out += data
        if not waiting:
            self.write()
        return bool(self.out) and not waiting

    def write(self) -> None:
        """Write what the pipe takes now."""
        try:
            del self.out[: os.write(self.write_end, memoryview(self.out)[: 1 << 16].tobytes())]
        except BlockingIOError:
            pass
        except OSError:  # it has ended, which its other pipe tells
            self.out.clear()

    def read(self) -> list[tuple[bytes, int, bytes]] | None:
        """Replies that are complete now: (status, number, bytes). None where the process has ended."""
        with suppress(BlockingIOError):
            data = os.read(self.read_end, 1 << 20)
            if not data:
                return None
            self.got += data
        replies = []
        while len(self.got) >= REPLY.size:
            status, number, size = REPLY.unpack_from(self.got)
            if len(self.got) < REPLY.size + size:
                break
            replies.append((status, number, bytes(self.got[REPLY.size : REPLY.size + size])))
            del self.got[: REPLY.size + size]
        return replies

    def end(self) -> int:
        """Its exit code; its pipes are closed."""
        self.popen.kill()
        code = self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        return code


def _lower(pid: int) -> None:
    """Give a process the lowest priority. It is done from here because a new process first imports for 70 ms. Linux treats a core on which
    only SCHED_IDLE runs as free: threads that wake go there, and those that share a core are moved there at once."""
    with suppress(OSError):  # it has ended already
        if hasattr(os, "SCHED_IDLE"):
            os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
        else:
            os.setpriority(os.PRIO_PROCESS, pid, 19)


def process_for(processes: Sequence[Process[A]], tenant: str, *, may_start: bool) -> Process[A] | None:
    """The one where the tenant's others are, else one that nobody uses, else none so that one is started, else the one with the fewest."""
    mine = next((p for p in processes if any(m.tenant == tenant for m in p.matchers)), None)
    found = mine or next((p for p in processes if not p.matchers), None)
    if found is None and may_start and len(processes) < MAX_PROCESSES:
        return None
    return found or min(processes, key=lambda p: len(p.matchers), default=None)


def idle(processes: Sequence[Process[A]]) -> list[Process[A]]:
    """Those that nobody has needed for a while, but for the last one of all."""
    until = time.monotonic() - IDLE_S
    found = sorted((p for p in processes if not p.matchers and p.idle_since <= until), key=lambda p: p.idle_since)
    return found[:-1] if len(found) == len(processes) else found
