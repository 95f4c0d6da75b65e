"""One step of the engine: what has come in, what runs now, its logits, its tokens, their text. Read `Step.__call__` first."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from threading import Lock

from torch import Tensor

from trimtab.serve.ending import Ending, tell
from trimtab.serve.grammars import Grammars
from trimtab.serve.open_requests import OpenRequests
from trimtab.serve.request import Delta, Token
from trimtab.serve.runner import Feed, Runner
from trimtab.serve.sampling import Sampler
from trimtab.serve.scheduler import Scheduler, Work
from trimtab.serve.sequence import Live, ServingError
from trimtab.serve.stats import StepFacts, TokenCounts

BESIDE_S, ALONE_S = 0.002, 0.01
"""Seconds that a step waits for grammars: where others run, and where nobody does."""
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Step:
    """Runs steps, one thread at a time. stop_ids: the base's end tokens. held: sequences whose grammar has not said what may follow. count,
    errors: steps that have run, and those that failed."""

    requests: OpenRequests
    scheduler: Scheduler
    runner: Runner
    forward_lock: Lock
    sampler: Sampler
    grammars: Grammars
    ending: Ending
    tokens: TokenCounts
    stop_ids: Collection[int]
    clock: Callable[[], float]
    on_step: Callable[[StepFacts], None]
    held: list[Live] = field(default_factory=list)
    count: int = 0
    errors: int = 0

    def __call__(self) -> bool:
        """One step. False where nothing could run."""
        self.requests.take_in()
        for live in self.requests.overdue(self.clock):
            self.ending.finish(live, "deadline")
        began = time.perf_counter()
        work = self.scheduler.schedule(self.clock())
        for live, error in list(self.scheduler.refused.items()):
            self.ending.finish(live, "error", error)
        work = [w for w in work if w.live.where == "running"]
        if not work:
            return self._hear_grammars(ALONE_S)
        try:
            logits_NV = self._run(work)
            asked = [w.live for w in work if w.live.remaining == 0]
            tokens = self.sampler(logits_NV, [live.draw for live in asked]) if asked else []
        except Exception as error:  # a fault of a forward: it must not take the others with it
            self._fail(work, error)
            return True
        now = self.clock()
        for live, token in zip(asked, tokens, strict=True):
            self._take_token(live, token, now)
        self._hear_grammars(BESIDE_S)
        self.count += 1
        decode_rows = sum(w.rows == 1 and w.live.new > 1 for w in work)
        rows = sum(w.rows for w in work)
        tell(self.on_step, StepFacts(time.perf_counter() - began, rows - decode_rows, decode_rows, len(work)))
        return True

    def begin(self, live: Live) -> None:
        """A request that has come in."""
        if live.where == "ended":
            return
        if live.matcher is None:
            self.scheduler.add(live)
        else:  # it waits for its grammar before it waits for a place
            self.held.append(live)
        self.requests.watch(live)

    def _run(self, work: Sequence[Work]) -> Tensor:
        """Logits of the sequences all of whose tokens have now entered a forward."""
        feeds = []
        with self.forward_lock:
            for live, rows in ((w.live, w.rows) for w in work):
                packed = None if live.resident is None else live.resident.packed
                if live.unwritten and packed is not None:
                    self.runner.write_prefix(live.blocks, packed)
                    live.unwritten = False
                at = live.past - live.virtual
                feeds.append(Feed(live.tokens[at : at + rows], live.past, live.blocks, packed, at + rows == len(live.tokens)))
            logits_NV = self.runner(feeds)
        for w in work:
            self.scheduler.computed(w)
        return logits_NV

    def _fail(self, work: Sequence[Work], error: Exception) -> None:
        """A forward went wrong: who was in it ends, the engine goes on."""
        self.errors += 1
        _log.error("a step of %d sequences failed; they end, the engine goes on", len(work), exc_info=error)
        for w in work:
            broken = ServingError(f"the step that this request was in failed: {type(error).__name__}: {error}")
            self.ending.finish(w.live, "error", broken)

    def _take_token(self, live: Live, token: Token | None, now: float) -> None:
        """A new token of a sequence."""
        if token is None:
            what = "numbers that are not finite" if live.matcher is None else "no finite number to a token that its grammar allows"
            broken = ServingError(f"{live.digest or 'the base'} gives {what}")
            self.ending.finish(live, "error", broken)
            return
        live.take(token.id, now)
        self.scheduler.fairness.charge(live.request.tenant, live.request.weight, tokens_out=1)
        self.tokens.add(live.request.tenant, 0, 1)
        if live.matcher is None:
            self._say(live, token)
        else:
            live.unsaid = token
            live.matcher.advance(token.id)
            self.held.append(live)

    def _hear_grammars(self, seconds: float) -> bool:
        """Go on with those whose grammar has said what may follow, after at most so many seconds; whether there are any at all."""
        held = [live for live in self.held if live.where != "ended"]
        ready = self.grammars.wait([live.matcher for live in held if live.matcher is not None], seconds if held else 0.0)
        self.held = []
        for live in held:
            assert live.matcher is not None
            if live.matcher not in ready:
                self.held.append(live)
            elif live.unsaid is not None:
                token, live.unsaid = live.unsaid, None
                self._say(live, token)
            elif live.matcher.error:
                self.ending.finish(live, "error", live.matcher.fault())
            else:
                self.scheduler.add(live)
        return bool(held)

    def _say(self, live: Live, token: Token) -> None:
        """The text of a sequence's newest token, and whether it is the last. What goes wrong here ends this sequence alone."""
        try:
            text, finish = live.say(self.stop_ids, self.scheduler.max_length)
        except Exception as error:
            _log.exception("request %s: a token could not be taken up", live.request.id)
            broken = ServingError(f"the answer could not go on: {type(error).__name__}: {error}")
            self.ending.finish(live, "error", broken)
            return
        if finish is None and live.matcher is not None and live.matcher.error:
            fault = live.matcher.fault("the answer cannot follow its grammar any further: ")
            self.ending.finish(live, "error", fault, text=text, tokens=(token,))
        elif finish is None:
            self.ending.send(live, Delta(text, (token,)))
        else:
            self.ending.finish(live, finish, text=text, tokens=(token,))
