"""Grammars as the engine sees them: a `Matcher` for each answer, whose mask is there some time after each token.

Processes beside the server (`grammar_process.py`) do the work, a tenant's in one of them. One that a message ends (for want of time or
memory) takes that message's answer with it alone: the others of the process are opened again in a new one. Nobody waits here but as long as
he says; the tokenizer is written out, and the first process started, by the thread that listens to them.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import OverloadedError, TrimtabError
from trimtab.serve.grammar import GrammarError, check_size
from trimtab.serve.grammar_process import REPLY, message
from trimtab.serve.request import Grammar

OPEN_S, MASK_S = 2.0, 0.5
"""Processor seconds of compiling a grammar, and of following a token."""
ROOM_BYTES = 64 << 20
"""Address space of a process beyond what it has after its start."""
MAX_PROCESSES = 4
"""Tenants beyond share one."""
MAX_TOO_SLOW = 256
"""Grammars that are known to take too long: they are refused at once the next time."""
MAX_LOST, MAX_KILLED = 2, 1
"""How often a matcher is opened again whose process has ended for a reason that is not its own, and whose process was killed from outside
while it worked for it."""
FAULT_S = 0.1
"""Seconds until the thread goes on after a fault."""
log = logging.getLogger(__name__)


@dataclass(eq=False)
class Matcher:
    """Where one answer stands in its grammar. ready: what follows is known, and then: mask: which tokens may come next, a bit each in int32
    words; done: nothing but an end; error: why nothing may; ours: that is no fault of the grammar."""

    grammars: Grammars = field(repr=False)
    number: int
    tenant: str
    opening: bytes
    tokens: array[int] = field(default_factory=lambda: array("I"))
    mask: bytes = b""
    done: bool = False
    error: str = ""
    ours: bool = False
    awaited: int = 0
    lost: int = 0
    process: _Process | None = field(default=None, repr=False)

    @property
    def ready(self) -> bool:
        return not self.awaited or bool(self.error)

    def fault(self, told: str = "") -> TrimtabError:
        """Its error, after these words."""
        if self.ours:
            return OverloadedError(told + self.error, fix="try again later", retry_after=2.0)
        return GrammarError(told + self.error)

    def give_up(self, why: str) -> None:
        """Through no fault of the grammar."""
        self.error, self.ours = f"grammars cannot be followed here: {why}", True

    def advance(self, token: int) -> None:
        """A token was chosen; it is `ready` again later."""
        self.grammars.advance(self, token)

    def close(self) -> None:
        self.grammars.close(self)


@dataclass(eq=False)
class _Process:
    """One process. asked: matchers whose messages are not answered, oldest first. trouble: why it could not start."""

    popen: subprocess.Popen[bytes]
    matchers: set[Matcher] = field(default_factory=set)
    asked: deque[Matcher] = field(default_factory=deque)
    out: bytearray = field(default_factory=bytearray)
    got: bytearray = field(default_factory=bytearray)
    trouble: str = ""

    @property
    def read_end(self) -> int:
        assert self.popen.stdout is not None
        return self.popen.stdout.fileno()

    @property
    def write_end(self) -> int:
        assert self.popen.stdin is not None
        return self.popen.stdin.fileno()


class Grammars:
    """Matchers for one tokenizer. changed: called, on a thread of its own, when one has become ready. Any number of threads."""

    def __init__(self, tokenizer: Any, vocab_size: int, stop_ids: Collection[int], changed: Callable[[], None] = lambda: None):
        self._tokenizer, self._vocab_size, self._stop_ids, self._changed = tokenizer, vocab_size, sorted(stop_ids), changed
        self._news = threading.Condition()  # guards everything; notified when a matcher has become ready
        self._processes: list[_Process] = []
        self._too_slow: OrderedDict[bytes, str] = OrderedDict()  # digests of grammars, and what is said of them
        self._number = 0
        self._thread: threading.Thread | None = None
        self._bell: tuple[int, int] | None = None  # a pipe that wakes the thread
        self._start = b""
        self._unopened: list[Matcher] = []  # those that came before the first words were there
        self._closed = False

    def matcher(self, grammar: Grammar, tenant: str = "") -> Matcher:
        """A new matcher, ready later; what is wrong with the grammar is its `error` then. GrammarError where it is too large, TrimtabError
        where llguidance is not installed, OverloadedError where no process can be started now."""
        check_size(grammar.kind, grammar.text)
        if find_spec("llguidance") is None:
            raise TrimtabError("answers under a grammar need llguidance", fix="pip install 'trimtab[serve]'")
        with self._news:
            self._number += 1
            made = Matcher(self, self._number, tenant, json.dumps([grammar.kind, grammar.text]).encode())
            try:
                self._listener()
                if self._start:
                    self._open(made)
                else:
                    made.awaited = 1
                    self._unopened.append(made)
                    self._ring()
            except (OSError, RuntimeError) as error:  # the second: no more threads
                raise OverloadedError(f"grammars cannot be followed now: {error}", fix="try again later", retry_after=2.0) from error
        return made

    def advance(self, matcher: Matcher, token: int) -> None:
        with self._news:
            matcher.tokens.append(token)
            if matcher.process is not None:
                self._ask(matcher, message(b"a", matcher.number, matcher.tokens[-1:]))

    def close(self, matcher: Matcher) -> None:
        """Nobody needs it any more."""
        with self._news:
            process, matcher.process = matcher.process, None
            if matcher in self._unopened:
                self._unopened.remove(matcher)
            if process is not None:
                process.matchers.discard(matcher)
                self._send(process, message(b"c", matcher.number, array("I")))

    def wait(self, matchers: Sequence[Matcher], seconds: float) -> None:
        """Until all are ready, so long at most."""
        with self._news:
            self._news.wait_for(lambda: all(m.ready for m in matchers), seconds)

    def shutdown(self) -> None:
        """End the processes. Matchers never become ready any more."""
        with self._news:
            self._closed = True
            self._ring()
        if self._thread is not None:
            self._thread.join()
        for process in self._processes:
            _end(process)
        self._processes.clear()
        for end in self._bell or ():
            os.close(end)
        self._bell = None

    # ---- under the lock ----

    def _open(self, matcher: Matcher) -> None:
        if (known := self._too_slow.get(sha256(matcher.opening).digest())) is not None:
            matcher.error = known
            return
        process = self._process_of(matcher.tenant)
        matcher.process = process
        process.matchers.add(matcher)
        self._ask(matcher, message(b"o", matcher.number, matcher.tokens, matcher.opening))

    def _process_of(self, tenant: str) -> _Process:
        """The one where the tenant's others are, else one that nobody uses, else a new one, else the one with the fewest."""
        mine = next((p for p in self._processes if any(m.tenant == tenant for m in p.matchers)), None)
        found = mine or next((p for p in self._processes if not p.matchers), None)
        if found is None and len(self._processes) < MAX_PROCESSES:
            try:
                found = self._spawn()
            except OSError:
                if not self._processes:
                    raise
        return found or min(self._processes, key=lambda p: len(p.matchers))

    def _ask(self, matcher: Matcher, data: bytes) -> None:
        assert matcher.process is not None
        matcher.awaited += 1
        matcher.process.asked.append(matcher)
        self._send(matcher.process, data)

    def _send(self, process: _Process, data: bytes) -> None:
        """Write what the pipe takes now; the thread writes the rest."""
        waiting = bool(process.out)
        process.out += data
        if not waiting:
            self._write(process)
            if process.out:
                self._ring()

    def _write(self, process: _Process) -> None:
        try:
            del process.out[: os.write(process.write_end, memoryview(process.out)[: 1 << 16].tobytes())]
        except BlockingIOError:
            pass
        except OSError:  # it has ended, which its other pipe tells
            process.out.clear()

    def _spawn(self) -> _Process:
        if self._closed:
            raise TrimtabError("the server is shutting down")
        command = [sys.executable, "-m", "trimtab.serve.grammar_process"]
        # a session of its own: Ctrl-C lets running answers finish
        pipe = subprocess.PIPE
        popen = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0, start_new_session=True)
        process = _Process(popen)
        os.set_blocking(process.write_end, False)
        os.set_blocking(process.read_end, False)
        self._processes.append(process)
        self._send(process, self._start)
        self._ring()
        return process

    def _listener(self) -> None:
        """Have the thread run."""
        if self._thread is None and not self._closed:
            self._bell = self._bell or os.pipe()
            thread = threading.Thread(target=self._listen, args=(self._bell[0],), name="trimtab-grammars", daemon=True)
            thread.start()
            self._thread = thread

    def _ring(self) -> None:
        """Have the thread look again at what it waits for."""
        if self._bell is not None:
            os.write(self._bell[1], b"!")

    # ---- the thread that listens ----

    def _listen(self, bell: int) -> None:
        while not self._closed:
            try:
                self._open_first()
                self._hear(bell)
                self._changed()
            except Exception:  # one fault must not end what all answers wait for
                log.exception("processes for grammars could not be heard")
                time.sleep(FAULT_S)

    def _open_first(self) -> None:
        """Open those that came first, once the first words are there."""
        if not self._unopened:
            return
        try:
            self._start = self._start or self._first_words()
            trouble = ""
        except Exception as error:  # whatever a tokenizer does
            trouble = f"{type(error).__name__}: {error}"[:500]
        with self._news:
            unopened, self._unopened = self._unopened, []
            for matcher in unopened:
                matcher.awaited = 0
                if trouble:
                    matcher.give_up(trouble)
                else:
                    self._try_open(matcher)
            self._news.notify_all()
        self._changed()

    def _first_words(self) -> bytes:
        """The tokenizer, for each process at its start."""
        backend = type(self._tokenizer.backend_tokenizer).from_str(self._tokenizer.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        told = {"tokenizer": backend.to_str(), "vocab_size": self._vocab_size, "stop_ids": self._stop_ids}
        told |= {"open_s": OPEN_S, "mask_s": MASK_S, "room_bytes": ROOM_BYTES}
        data = json.dumps(told).encode()
        return struct.pack("<I", len(data)) + data

    def _hear(self, bell: int) -> None:
        """Wait until a process has something to say, or takes more; take it up."""
        with self._news:
            waiting = {p.write_end: p for p in self._processes if p.out}
            reading = {p.read_end: p for p in self._processes}
        with selectors.PollSelector() as selector:  # others need a descriptor, and there may be none left
            selector.register(bell, selectors.EVENT_READ)
            for end in reading:
                selector.register(end, selectors.EVENT_READ)
            for end in waiting:
                selector.register(end, selectors.EVENT_WRITE)
            found = [key.fd for key, _ in selector.select()]
        with self._news:
            for end in found:
                if end == bell:
                    os.read(end, 4096)
                elif end in waiting and waiting[end] in self._processes:
                    self._write(waiting[end])
                elif end in reading and not self._closed:
                    try:
                        self._read(reading[end])
                    except Exception:
                        log.exception("a process for grammars said what nobody asked")
                        if reading[end] in self._processes:
                            self._ended(reading[end])
            self._news.notify_all()

    def _try_open(self, matcher: Matcher) -> None:
        """Where that fails, its answer ends."""
        try:
            self._open(matcher)
        except (OSError, TrimtabError) as error:
            matcher.give_up(str(error))

    def _read(self, process: _Process) -> None:
        with suppress(BlockingIOError):
            data = os.read(process.read_end, 1 << 20)
            if not data:
                return self._ended(process)
            process.got += data
        while len(process.got) >= REPLY.size:
            status, number, size = REPLY.unpack_from(process.got)
            if len(process.got) < REPLY.size + size:
                break
            answer = bytes(process.got[REPLY.size : REPLY.size + size])
            del process.got[: REPLY.size + size]
            if not number:
                process.trouble = answer.decode("utf-8", "replace")
                continue
            matcher = process.asked.popleft()
            assert matcher.number == number
            if matcher.process is process:
                _take(matcher, status, answer)
        return None

    def _ended(self, process: _Process) -> None:
        """A process has ended: by whose message, and what becomes of the others."""
        self._processes.remove(process)
        code = _end(process)
        guilty = process.asked[0] if process.asked else None
        log.warning("a process for grammars has ended", extra={"told": {"code": code, "answers": len(process.matchers)}})
        for matcher in sorted(process.matchers, key=lambda m: (m is not guilty, m.number)):
            matcher.process, matcher.awaited, matcher.lost = None, 0, matcher.lost + 1
            most = MAX_LOST if matcher is not guilty else MAX_KILLED if code == -signal.SIGKILL else 0
            if process.trouble:
                matcher.give_up(process.trouble)
            elif matcher.lost > most:
                matcher.error = self._blame(matcher, code)
            else:
                self._try_open(matcher)

    def _blame(self, matcher: Matcher, code: int) -> str:
        """What is said of a matcher whose process ended with this code, once too often."""
        if code == -signal.SIGKILL:  # not by its own limits
            return f"its process was killed {matcher.lost} times: it may take too much memory"
        if code != -signal.SIGPROF:
            return "it takes too much memory"
        late = f"it takes more than {MASK_S if matcher.tokens else OPEN_S:g} s of processor time"
        if not matcher.tokens:
            self._too_slow[sha256(matcher.opening).digest()] = late
            if len(self._too_slow) > MAX_TOO_SLOW:
                self._too_slow.popitem(last=False)
        return late


def _take(matcher: Matcher, status: bytes, answer: bytes) -> None:
    matcher.awaited -= 1
    matcher.mask, matcher.done = answer if status == b"+" else b"", status == b"="
    if status == b"-":
        matcher.error = answer.decode("utf-8", "replace") or "no reason given"


def _end(process: _Process) -> int:
    """Its exit code; its pipes are closed."""
    process.popen.kill()
    code = process.popen.wait()
    for pipe in (process.popen.stdin, process.popen.stdout):
        with suppress(OSError):
            if pipe is not None:
                pipe.close()
    return code


def masks(matchers: Sequence[Any], vocab_size: int) -> Tensor:
    """Which tokens may come next [n, V] bool, on the CPU."""
    words = (vocab_size + 31) // 32
    rows = [np.frombuffer(m.mask or bytes(4 * words), dtype=np.uint8) for m in matchers]
    bits = np.unpackbits(np.stack(rows), axis=1, bitorder="little")[:, :vocab_size]
    return torch.from_numpy(bits).bool()


__all__ = ["GrammarError", "Grammars", "Matcher", "masks"]
