"""Grammars as the engine sees them: a `Matcher` for each answer, whose mask is there some time after each token.

Processes beside the server (`grammar_process.py`) do the work, a tenant's in one of them (`grammar_pool.py`). One that a message ends (for
want of time or memory) takes that message's answer with it alone: the others of the process are opened again in a new one. Nobody waits
here but as long as he says; the tokenizer is written out, and processes are started and ended, by the thread that listens to them.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import struct
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.util import find_spec
from typing import Any

from trimtab.errors import OverloadedError, TrimtabError
from trimtab.serve.grammar import GrammarError, check_size
from trimtab.serve.grammar_pool import IDLE_S, Process, idle, process_for
from trimtab.serve.grammar_process import message
from trimtab.serve.request import Grammar

OPEN_S, MASK_S = 2.0, 0.5
"""Processor seconds of compiling a grammar, and of following a token."""
ROOM_BYTES = 64 << 20
"""Address space of a process beyond what it has after its start."""
MAX_REFUSED = 256
"""Grammars that are known to take too much: they are refused at once the next time."""
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
    process: Process[Matcher] | None = field(default=None, repr=False)

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

    def advance(self, *tokens: int) -> None:
        """Tokens were chosen; it is `ready` again later."""
        self.grammars.advance(self, tokens)

    def close(self) -> None:
        self.grammars.close(self)


class Grammars:
    """Matchers for one tokenizer. changed: called, on a thread of its own, when one has become ready. Any number of threads."""

    def __init__(self, tokenizer: Any, vocab_size: int, stop_ids: Collection[int], changed: Callable[[], None] = lambda: None):
        self._tokenizer, self._vocab_size, self._stop_ids, self._changed = tokenizer, vocab_size, sorted(stop_ids), changed
        self._news = threading.Condition()  # guards everything; notified when a matcher has become ready
        self._processes: list[Process[Matcher]] = []
        # What is said of grammars, by digest. One that takes too much memory may do so because of the tenant's others: (tenant, digest).
        self._refused: OrderedDict[bytes | tuple[str, bytes], str] = OrderedDict()
        self._number = 0
        self._thread: threading.Thread | None = None
        self._bell: tuple[int, int] | None = None  # a pipe that wakes the thread
        self._start = b""
        self._unopened: list[Matcher] = []  # those that wait for a process
        self._closed = False

    def matcher(self, grammar: Grammar, tenant: str = "") -> Matcher:
        """A new matcher, ready later; what is wrong with the grammar is its `error` then. GrammarError where it is too large, TrimtabError
        where llguidance is not installed, OverloadedError where no thread can be started now."""
        check_size(grammar.kind, grammar.text)
        if find_spec("llguidance") is None:
            raise TrimtabError("answers under a grammar need llguidance", fix="pip install 'trimtab[serve]'")
        with self._news:
            self._number += 1
            made = Matcher(self, self._number, tenant, json.dumps([grammar.kind, grammar.text]).encode())
            try:
                self._listener()
            except (OSError, RuntimeError) as error:  # the second: no more threads
                raise OverloadedError(f"grammars cannot be followed now: {error}", fix="try again later", retry_after=2.0) from error
            process = process_for(self._processes, tenant, may_start=True)
            if process is None:
                self._open_later(made)
            else:
                self._open(made, process)
        return made

    def advance(self, matcher: Matcher, tokens: Sequence[int]) -> None:
        with self._news:
            matcher.tokens.extend(tokens)
            if matcher.process is not None:
                self._ask(matcher, message(b"a", matcher.number, array("I", tokens)))

    def close(self, matcher: Matcher) -> None:
        """Nobody needs it any more."""
        with self._news:
            process, matcher.process = matcher.process, None
            if matcher in self._unopened:
                self._unopened.remove(matcher)
            if process is not None:
                process.leave(matcher)
                self._send(process, message(b"c", matcher.number, array("I")))

    def wait(self, matchers: Sequence[Matcher], seconds: float) -> set[Matcher]:
        """Those that are ready once all are, or after so long. Asked of a matcher itself, `ready` may see a change half made."""
        with self._news:
            self._news.wait_for(lambda: all(m.ready for m in matchers), seconds)
            return {m for m in matchers if m.ready}

    def shutdown(self) -> None:
        """End the processes. Matchers never become ready any more."""
        with self._news:
            self._closed = True
            self._ring()
        if self._thread is not None:
            self._thread.join()
        with self._news:  # a request that has just come in must write neither to a process nor to a descriptor that is gone
            for process in self._processes:
                for matcher in process.matchers:
                    matcher.process = None
                process.end()
            self._processes.clear()
            bell, self._bell = self._bell or (), None
            for end in bell:
                os.close(end)

    # ---- under the lock ----

    def _open(self, matcher: Matcher, process: Process[Matcher]) -> None:
        digest = sha256(matcher.opening).digest()
        if (known := self._refused.get(digest) or self._refused.get((matcher.tenant, digest))) is not None:
            matcher.error = known
            return
        matcher.process = process
        process.matchers.add(matcher)
        self._ask(matcher, message(b"o", matcher.number, matcher.tokens, matcher.opening))

    def _open_later(self, matcher: Matcher) -> None:
        """Once the thread has found or started a process for it."""
        matcher.awaited = 1
        self._unopened.append(matcher)
        self._ring()

    def _ask(self, matcher: Matcher, data: bytes) -> None:
        assert matcher.process is not None
        matcher.awaited += 1
        matcher.process.asked.append(matcher)
        self._send(matcher.process, data)

    def _send(self, process: Process[Matcher], data: bytes) -> None:
        """Write what the pipe takes now; the thread writes the rest."""
        if process.send(data):
            self._ring()

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
                self._open_waiting()
                self._end_idle()
                self._hear(bell)
                self._changed()
            except Exception:  # one fault must not end what all answers wait for
                log.exception("processes for grammars could not be heard")
                time.sleep(FAULT_S)

    def _open_waiting(self) -> None:
        """Open those that wait for a process. New ones are started outside of the lock."""
        if not self._unopened:
            return
        trouble = ""
        while self._open_all(trouble):
            try:
                self._start = self._start or self._first_words()
                process = Process[Matcher].start(self._start)
            except OSError as error:
                trouble = str(error)
            except Exception as error:  # whatever a tokenizer does
                trouble = f"{type(error).__name__}: {error}"[:500]
            else:
                with self._news:
                    self._processes.append(process)
        self._changed()

    def _open_all(self, trouble: str) -> bool:
        """Open those that wait, in order; whether a process is to be started for the next one. trouble: why none can be started."""
        with self._news:
            while self._unopened:
                matcher = self._unopened[0]
                process = process_for(self._processes, matcher.tenant, may_start=not trouble)
                if process is None and not trouble:
                    return not self._closed
                del self._unopened[0]
                matcher.awaited = 0
                if process is None:
                    matcher.give_up(trouble)
                else:
                    self._open(matcher, process)
            self._news.notify_all()
        return False

    def _first_words(self) -> bytes:
        """The tokenizer, for each process at its start."""
        backend = self._tokenizer.backend_tokenizer
        if backend.padding or backend.truncation:  # a copy without takes 0.2 s, in which no other thread runs
            backend = type(backend).from_str(backend.to_str())
            backend.no_padding()
            backend.no_truncation()
        told = {"tokenizer": backend.to_str(), "vocab_size": self._vocab_size, "stop_ids": self._stop_ids}
        told |= {"open_s": OPEN_S, "mask_s": MASK_S, "room_bytes": ROOM_BYTES}
        data = json.dumps(told).encode()
        return struct.pack("<I", len(data)) + data

    def _end_idle(self) -> None:
        with self._news:
            found = idle(self._processes)
            self._processes = [p for p in self._processes if p not in found]
        for process in found:
            process.end()

    def _hear(self, bell: int) -> None:
        """Wait until a process has something to say, takes more or may be idle for too long; take up what it says."""
        with self._news:
            waiting = {p.write_end: p for p in self._processes if p.out}
            reading = {p.read_end: p for p in self._processes}
        with selectors.PollSelector() as selector:  # others need a descriptor, and there may be none left
            selector.register(bell, selectors.EVENT_READ)
            for end in reading:
                selector.register(end, selectors.EVENT_READ)
            for end in waiting:
                selector.register(end, selectors.EVENT_WRITE)
            found = [key.fd for key, _ in selector.select(IDLE_S if len(reading) > 1 else None)]
        with self._news:
            for end in found:
                if end == bell:
                    os.read(end, 4096)
                elif end in waiting and waiting[end] in self._processes:
                    waiting[end].write()
                elif end in reading and not self._closed:
                    try:
                        self._read(reading[end])
                    except Exception:
                        log.exception("a process for grammars said what nobody asked")
                        if reading[end] in self._processes:
                            self._ended(reading[end])
            self._news.notify_all()

    def _read(self, process: Process[Matcher]) -> None:
        if (replies := process.read()) is None:
            return self._ended(process)
        for status, number, answer in replies:
            if not number:
                process.trouble = answer.decode("utf-8", "replace")
                continue
            matcher = process.asked.popleft()
            assert matcher.number == number
            if matcher.process is process:
                _take(matcher, status, answer)
        return None

    def _ended(self, process: Process[Matcher]) -> None:
        """A process has ended: by whose message, and what becomes of the others."""
        self._processes.remove(process)
        code = process.end()
        guilty = process.asked[0] if process.asked else None
        log.warning("a process for grammars has ended", extra={"told": {"code": code, "answers": len(process.matchers)}})
        for matcher in sorted(process.matchers, key=lambda m: (m is not guilty, m.number)):
            matcher.process, matcher.awaited, matcher.lost = None, 0, matcher.lost + 1
            most = MAX_LOST if matcher is not guilty else MAX_KILLED if code == -signal.SIGKILL else 0
            if process.trouble:
                matcher.give_up(process.trouble)
            elif matcher.lost > most and matcher is guilty:
                matcher.error = self._blame(matcher, code)
            elif matcher.lost > most:
                matcher.give_up(f"their process has ended {matcher.lost} times because of others")
            else:
                self._open_later(matcher)

    def _blame(self, matcher: Matcher, code: int) -> str:
        """What is said of a matcher whose process ended with this code, once too often."""
        if code == -signal.SIGKILL:  # not by its own limits
            return f"its process was killed {matcher.lost} times: it may take too much memory"
        digest = sha256(matcher.opening).digest()
        if code == -signal.SIGPROF:
            key: bytes | tuple[str, bytes] = digest
            why = f"it takes more than {MASK_S if matcher.tokens else OPEN_S:g} s of processor time"
        else:
            key = (matcher.tenant, digest)
            why = "it takes too much memory"
        if not matcher.tokens:
            self._refused[key] = why
            if len(self._refused) > MAX_REFUSED:
                self._refused.popitem(last=False)
        return why


def _take(matcher: Matcher, status: bytes, answer: bytes) -> None:
    matcher.awaited -= 1
    matcher.mask, matcher.done = answer if status == b"+" else b"", status == b"="
    if status == b"-":
        matcher.error = answer.decode("utf-8", "replace") or "no reason given"
