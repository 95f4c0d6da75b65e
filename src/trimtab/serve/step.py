"""One step of the engine: what has come in, what runs now, its logits, its tokens, their text. Read `Step.__call__` first."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from threading import Lock

from torch import Tensor

from trimtab import ops
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
    """Runs steps, one thread at a time. stop_ids: the base's end tokens. held: sequences whose grammar has not said what may follow.
    following: (first, sequence): the sequence waits for the first one's prompt (`Request.like`). count, errors: steps that have run, and
    those that failed. accepted: drafted tokens that were right."""

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
    following: list[tuple[Live, Live]] = field(default_factory=list)
    count: int = 0
    errors: int = 0
    accepted: int = 0

    def __call__(self) -> bool:
        """One step. False where nothing could run."""
        self.requests.take_in()
        self._let_follow()
        for live in self.requests.overdue(self.clock):
            self.ending.finish(live, "deadline")
        began = time.perf_counter()
        work = self.scheduler.schedule(self.clock())
        for live, error in list(self.scheduler.queues.refused.items()):
            self.ending.finish(live, "error", error)
        work = [w for w in work if w.live.where == "running"]
        if not work:
            return self._hear_grammars(ALONE_S)
        try:
            logits_NV = self._run(work)
            done = [w for w in work if w.live.remaining == 0]
            asked = [w for w in done if w.live.request.sampling.max_tokens]
            first = _first_rows(asked)
            own_NV = logits_NV if len(first) == len(logits_NV) else self._rows(logits_NV, first)
            tokens = self.sampler(own_NV, [w.live.draw for w in asked]) if asked else []
        except Exception as error:  # a fault of a forward: it must not take the others with it
            self._fail(work, error)
            return True
        now = self.clock()
        self._tell_prompts(work)
        for w in done:
            if not w.live.request.sampling.max_tokens:
                self.ending.finish(w.live, "length")
        for w, token in zip(asked, tokens, strict=True):
            if w.live.where != "ended":
                self._take_token(w.live, token, now)
        self._verify(asked, first, logits_NV, now)
        self._hear_grammars(BESIDE_S)
        self.count += 1
        decode_rows = sum(w.rows == 1 and w.live.new > 1 for w in work)
        rows, drafted = sum(w.rows for w in work), sum(len(w.drafts) for w in work)
        facts = StepFacts(time.perf_counter() - began, rows - decode_rows, decode_rows + drafted, len(work))
        if self.scheduler.step_cost is not None and not facts.prefill_rows:
            self.scheduler.step_cost.learn(facts.decode_rows, facts.seconds)
        tell(self.on_step, facts)
        return True

    def begin(self, live: Live) -> None:
        """A request that has come in."""
        if live.where == "ended":
            return
        self.requests.watch(live)
        first = self.requests.by_id.get(live.request.like)
        if first is not None and first is not live and not first.new:
            self.following.append((first, live))
        else:
            self._line_up(live)

    def _let_follow(self) -> None:
        """Line up those whose prompt has been computed for another, or whose other has ended."""
        waiting, self.following = self.following, []
        for first, live in waiting:
            if first.where != "ended" and not first.new:
                self.following.append((first, live))
            elif live.where != "ended":
                self._line_up(live)

    def _line_up(self, live: Live) -> None:
        """Have a request wait for its place."""
        if live.matcher is None:
            self.scheduler.add(live)
        else:  # it waits for its grammar before it waits for a place
            self.held.append(live)

    def _tell_prompts(self, work: Sequence[Work]) -> None:
        """What has been read of prompts in this step."""
        for live in (w.live for w in work if w.live.rows is not None):
            assert live.rows is not None
            tokens = live.rows.tokens()
            vector = live.rows.vector() if live.remaining == 0 and not live.new else b""
            if not live.rows.finite:
                self._not_finite(live)
            elif tokens or vector:
                labels = live.resident.labels if vector and live.resident is not None else ()
                self.ending.send(live, Delta(prompt=tokens, vector=vector, labels=labels))

    def _run(self, work: Sequence[Work]) -> Tensor:
        """Logits of the sequences all of whose tokens have now entered a forward."""
        feeds = []
        with self.forward_lock:
            for w in work:
                live, rows = w.live, w.rows
                packed = None if live.resident is None or live.off else live.resident.packed
                if live.unwritten and packed is not None:
                    self.runner.write_prefix(live.blocks, packed)
                    live.unwritten = False
                at = live.past - live.virtual
                last = at + rows == len(live.tokens) and live.request.sampling.max_tokens > 0
                read = None if live.rows is None else partial(live.rows.take, at=at)
                ids, logits = [*live.tokens[at : at + rows], *w.drafts], last * (1 + len(w.drafts))
                feeds.append(Feed(ids, live.past, live.blocks, packed, logits, read))
            logits_NV = self.runner(feeds)
        for w in work:
            self.scheduler.computed(w)
        return logits_NV

    def _verify(self, work: Sequence[Work], first: Sequence[int], logits_NV: Tensor, now: float) -> None:
        """Go through drafts, a token of each sequence at a time. Where the token that was chosen is the one that was drafted, the next row
        has the logits that a step of its own would give, and the next token is chosen from them in the same way."""
        going = [(w, row) for w, row in zip(work, first, strict=True) if w.drafts]
        plain = [row + 1 + i for w, row in going if w.live.draw.plain for i in range(len(w.drafts))]  # their rows in one piece
        known = dict(zip(plain, self.sampler.likeliest(self._rows(logits_NV, plain)), strict=True)) if plain else {}
        for i in range(max((len(w.drafts) for w, _ in going), default=0)):
            going = [(w, row) for w, row in going if i < len(w.drafts) and w.live.where == "running" and w.live.tokens[-1] == w.drafts[i]]
            drawn = [(w, row + 1 + i) for w, row in going if not w.live.draw.plain]
            for w, _ in going:
                self.scheduler.computed(Work(w.live, 1))
                self.accepted += 1
                w.live.draw.new += w.live.draw.plain
            try:
                found = self.sampler(self._rows(logits_NV, [row for _, row in drawn]), [w.live.draw for w, _ in drawn]) if drawn else []
            except Exception as error:
                self._fail([w for w, _ in drawn], error)
                found = []
            known |= zip((row for _, row in drawn), found, strict=False)
            for w, row in going:
                if w.live.where == "running":
                    self._take_token(w.live, known[row + 1 + i], now)

    @staticmethod
    def _rows(logits_NV: Tensor, rows: Sequence[int]) -> Tensor:
        return logits_NV[ops.index(rows, logits_NV.device)]

    def _fail(self, work: Sequence[Work], error: Exception) -> None:
        """A forward went wrong: who was in it ends, the engine goes on."""
        self.errors += 1
        _log.error("a step of %d sequences failed; they end, the engine goes on", len(work), exc_info=error)
        for w in work:
            broken = ServingError(f"the step that this request was in failed: {type(error).__name__}: {error}")
            self.ending.finish(w.live, "error", broken)

    def _not_finite(self, live: Live) -> None:
        """A base or an adapter computes what is no answer: its request ends."""
        what = "numbers that are not finite" if live.matcher is None else "no finite number to a token that its grammar allows"
        self.ending.finish(live, "error", ServingError(f"{live.digest or 'the base'} gives {what}"))

    def _take_token(self, live: Live, token: Token | None, now: float) -> None:
        """A new token of a sequence."""
        if token is None:
            self._not_finite(live)
            return
        live.take(token.id, now)
        self.scheduler.fairness.charge(live.request.tenant, live.request.weight, tokens_out=1)
        self.tokens.add(live.request.tenant, 0, 1)
        matcher, follows = live.matcher, [token.id]
        if matcher is not None and live.watch is not None:  # a lazy grammar
            follows = live.watch(token.id)
            if follows:
                live.watch = None
                live.draw.follow(matcher)
        if matcher is None or not follows:
            self._say(live, token)
        else:
            live.unsaid = token
            matcher.advance(*follows)
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
                continue
            grammar = live.request.sampling.grammar
            error = live.matcher.error
            if error and grammar is not None and grammar.loose:
                _log.info("request %s goes on without its grammar: %s", live.request.id, error)
                live.released()
            if live.unsaid is not None:
                token, live.unsaid = live.unsaid, None
                self._say(live, token)
            elif live.matcher is not None and live.matcher.error:
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
        if finish is None and live.watch is None and live.matcher is not None and live.matcher.error:
            fault = live.matcher.fault("the answer cannot follow its grammar any further: ")
            self.ending.finish(live, "error", fault, text=text, tokens=(token,))
        elif finish is None:
            self.ending.send(live, Delta(text, (token,)))
        else:
            self.ending.finish(live, finish, text=text, tokens=(token,))


def _first_rows(work: Sequence[Work]) -> list[int]:
    """Which row of the logits is each sequence's first."""
    counts = [1 + len(w.drafts) for w in work]
    return [stop - n for stop, n in zip(accumulate(counts), counts, strict=True)]
