"""The engine: requests in, deltas out, one step at a time. Read `step` first.

It puts the parts together: the scheduler says what runs, the runner computes logits, the sampler chooses tokens, text comes out of them. It
knows nothing of HTTP, keys or names. `submit`, `cancel`, `prefetch` and `evict` may be called from any thread; all else happens on the one
that calls `step`: the engine's own after `start`, or whoever drives it. Every request that `submit` takes ends with one last delta.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from threading import Condition, Event, Lock, Thread

from torch import Tensor

from trimtab.decode.text import Decoder
from trimtab.errors import OverloadedError, TrimtabError
from trimtab.model import Base
from trimtab.ops import native
from trimtab.serve.blocks import BlockPool, chain_start
from trimtab.serve.config import EngineConfig, adapter_budget, kv_blocks
from trimtab.serve.grammars import Grammars
from trimtab.serve.request import Delta, FinishReason, Request, Servable, Sink, Token, Usage
from trimtab.serve.residency import LOADERS, Residency, Resident
from trimtab.serve.results import Collector, Result
from trimtab.serve.runner import Feed, Runner
from trimtab.serve.sampling import Sampler, make_draw
from trimtab.serve.scheduler import Scheduler, Work
from trimtab.serve.sequence import Live, ServingError
from trimtab.serve.stats import EngineStats, StepFacts, TokenCounts

__all__ = ["Engine", "EngineConfig", "EngineStats", "Result", "ServingError", "StepFacts"]

BESIDE_S, ALONE_S = 0.002, 0.01
"""Seconds that a step waits for grammars: where others run, and where nobody does."""
_log = logging.getLogger(__name__)
OnFinish = Callable[[Request, Usage, FinishReason, float, float | None, float, Sequence[float]], None]
"""request, usage, finish, seconds in the queue, to the first token (None: there was none), in all, and between tokens."""


class Engine:
    """Serves one base. clock: seconds, monotonic. loader: runs adapter loads. on_step, on_finish: called on the step thread."""

    def __init__(
        self,
        base: Base,
        config: EngineConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        loader: Executor | None = None,
    ):
        self.base, self.config, self.clock = base, config or EngineConfig(), clock
        size = self.config.block_size
        self.pool = BlockPool(kv_blocks(self.config, base, Runner.bytes_per_block(base, size)))
        self.runner = Runner(base, blocks=self.pool.total, block_size=size)
        self.forward_lock = Lock()
        self._own_loader = loader is None
        self._loader = loader or ThreadPoolExecutor(LOADERS, thread_name_prefix="trimtab-load", initializer=native.compute_alone)
        self._wake = Event()
        self.residency = Residency(base, adapter_budget(self.config, base), self._loader, self.forward_lock, self._wake.set, self._freed)
        self.scheduler = Scheduler(self.config, self.pool, self.residency, min(base.spec.max_positions, self.pool.total * size))
        self.sampler = Sampler(base.spec.vocab_size, base.stop_ids, base.device)
        self.decoder = Decoder(base.tokenizer)
        self.grammars = Grammars(base.tokenizer, base.spec.vocab_size, base.stop_ids, self._wake.set)
        self._held: list[Live] = []  # those whose grammar has not said what may follow
        self.on_step: Callable[[StepFacts], None] = lambda facts: None
        self.on_finish: OnFinish = lambda *facts: None
        self._live: dict[str, Live] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._changed = Condition()  # guards _live, _serial, _closing; notified when a request has ended
        self._serial = self._steps = self._step_errors = 0
        self._closing = False
        self._departing: set[str] = set()  # digests to evict once nobody is left who is queued for them
        self._deadlines: list[tuple[float, int, str]] = []
        self._tokens = TokenCounts()
        self._thread: Thread | None = None
        self._stop = Event()

    # ---- from any thread ----

    def submit(self, request: Request, sink: Sink) -> None:
        """Take a request; everything later goes through the sink. TrimtabError where it can never run, OverloadedError where too many wait
        or the engine is shutting down, ValueError where its id is in use."""
        request.check(self.base.spec.vocab_size, self.scheduler.max_length)
        p = request.sampling
        digest = None if request.adapter is None else request.adapter.digest
        tenant = None if self.config.share_prefix_across_tenants else request.tenant
        matcher = None if p.grammar is None else self.grammars.matcher(p.grammar, request.tenant)
        live = Live(
            request,
            sink,
            self.decoder.stream(p.stop, p.min_tokens),
            make_draw(p, request.prompt, matcher),
            matcher,
            serial=0,
            arrived=self.clock(),
            chain=chain_start(self.base.fingerprint, digest, tenant, request.cache_salt, self.config.block_size),
            tokens=list(request.prompt),
        )
        try:
            self._enter(live)
        except BaseException:
            if matcher is not None:
                matcher.close()  # nobody else would
            raise
        self._wake.set()

    def _enter(self, live: Live) -> None:
        """Have the next step begin with it. Raises as `submit` does."""
        with self._changed:
            if self._closing:
                raise OverloadedError("the server is shutting down", fix="ask another one, or again later", retry_after=10.0)
            if len(self._live) - len(self.scheduler.running) >= self.config.max_queued:
                raise OverloadedError(f"{self.config.max_queued} requests are waiting already", fix="try again later", retry_after=2.0)
            if live.request.id in self._live:
                raise ValueError(f"a request with the id {live.request.id!r} is running")
            self._serial += 1
            live.serial = self._serial
            self._live[live.request.id] = live
            self._inbox.append(lambda: self._add(live))

    def cancel(self, request_id: str) -> None:
        """End a request, wherever it is; nothing where there is none."""
        live = self._live.get(request_id)
        if live is not None:
            self._post(lambda: self._finish(live, "cancelled"))

    def prefetch(self, adapter: Servable) -> None:
        """Have an adapter in memory before somebody asks for it, if there is room."""
        self._post(lambda: self.residency.load(adapter))

    def evict(self, digest: str) -> None:
        """Let go of an adapter: requests that are there finish with it, then it and all that is kept of it goes."""
        self._post(lambda: self._evict(digest))

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def stats(self) -> EngineStats:
        """Where everything stands now."""
        s, r, p = self.scheduler, self.residency, self.pool
        running, loading = len(s.running), s.loading_count
        return EngineStats(
            running=running,
            waiting=max(0, len(self._live) - running - loading),
            loading=loading,
            draining=self._closing,
            kv_blocks_total=p.total,
            kv_blocks_used=p.used,
            kv_blocks_cached=p.cached,
            adapters_resident=r.count,
            adapter_leases=r.leases,
            adapter_bytes=r.bytes,
            adapter_budget_bytes=r.budget_bytes,
            loads=r.loads,
            load_failures=r.failures,
            evictions=r.evictions,
            load_seconds=r.load_seconds,
            preemptions=s.preemptions,
            prefix_query_tokens=s.query_tokens,
            prefix_hit_tokens=s.hit_tokens,
            prompt_tokens=self._tokens.prompt,
            generation_tokens=self._tokens.generation,
            steps=self._steps,
            step_errors=self._step_errors,
            tenant_tokens=dict(self._tokens.by_tenant),
        )

    # ---- the loop ----

    def step(self) -> bool:
        """One step: what has come in, what runs now, its logits, its tokens. False where nothing could run."""
        self._take_inbox()
        self._end_overdue()
        began = time.perf_counter()
        work = self.scheduler.schedule(self.clock())
        self._end_refused()
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
        self._steps += 1
        decode_rows = sum(w.rows == 1 and w.live.new > 1 for w in work)
        rows = sum(w.rows for w in work)
        self._tell(self.on_step, StepFacts(time.perf_counter() - began, rows - decode_rows, decode_rows, len(work)))
        return True

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

    def _take_token(self, live: Live, token: Token | None, now: float) -> None:
        """A new token of a sequence."""
        if token is None:
            self._finish(live, "error", ServingError(f"{live.digest or 'the base'} gives numbers that are not finite"))
            return
        live.take(token.id, now)
        self.scheduler.fairness.charge(live.request.tenant, live.request.weight, tokens_out=1)
        self._tokens.add(live.request.tenant, 0, 1)
        if live.matcher is None:
            self._say(live, token)
        else:
            live.unsaid = token
            live.matcher.advance(token.id)
            self._held.append(live)

    def _hear_grammars(self, seconds: float) -> bool:
        """Go on with those whose grammar has said what may follow, after at most so many seconds; whether there are any at all."""
        held = [live for live in self._held if live.where != "ended"]
        self.grammars.wait([live.matcher for live in held if live.matcher is not None], seconds if held else 0.0)
        self._held = []
        for live in held:
            assert live.matcher is not None
            if not live.matcher.ready:
                self._held.append(live)
            elif live.unsaid is not None:
                token, live.unsaid = live.unsaid, None
                self._say(live, token)
            elif live.matcher.error:
                self._finish(live, "error", live.matcher.fault())
            else:
                self.scheduler.add(live)
        return bool(held)

    def _say(self, live: Live, token: Token) -> None:
        """The text of a sequence's newest token, and whether it is the last. What goes wrong here ends this sequence alone."""
        try:
            text, finish = live.say(self.base.stop_ids, self.scheduler.max_length)
        except Exception as error:
            _log.exception("request %s: a token could not be taken up", live.request.id)
            self._finish(live, "error", ServingError(f"the answer could not go on: {type(error).__name__}: {error}"))
            return
        if finish is None and live.matcher is not None and live.matcher.error:
            broken = live.matcher.fault("the answer cannot follow its grammar any further: ")
            self._finish(live, "error", broken, text=text, tokens=(token,))
        elif finish is None:
            self._send(live, Delta(text, (token,)))
        else:
            self._finish(live, finish, text=text, tokens=(token,))

    # ---- coming and going ----

    def _add(self, live: Live) -> None:
        if live.where == "ended":
            return
        if live.matcher is None:
            self.scheduler.add(live)
        else:  # it waits for its grammar before it waits for a place
            self._held.append(live)
        if live.request.deadline is not None:
            heapq.heappush(self._deadlines, (live.request.deadline, live.serial, live.request.id))

    def _take_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _end_overdue(self) -> None:
        now = self.clock() if self._deadlines else 0.0
        while self._deadlines and self._deadlines[0][0] <= now:
            _, serial, request_id = heapq.heappop(self._deadlines)
            live = self._live.get(request_id)
            if live is not None and live.serial == serial:
                self._finish(live, "deadline")

    def _end_refused(self) -> None:
        for live, error in list(self.scheduler.refused.items()):
            self._finish(live, "error", error)

    def _fail(self, work: Sequence[Work], error: Exception) -> None:
        """A forward went wrong: who was in it ends, the engine goes on."""
        self._step_errors += 1
        _log.error("a step of %d sequences failed; they end, the engine goes on", len(work), exc_info=error)
        for w in work:
            self._finish(w.live, "error", ServingError(f"the step that this request was in failed: {type(error).__name__}: {error}"))

    def _finish(
        self,
        live: Live,
        finish: FinishReason,
        error: TrimtabError | None = None,
        text: str = "",
        tokens: tuple[Token, ...] = (),
    ) -> None:
        """The end of a request, whatever it was doing: what it holds is free, and its last delta goes out."""
        if live.where == "ended":
            return
        if live.admitted is not None:
            self._tokens.add(live.request.tenant, len(live.request.prompt), 0)
        self.scheduler.remove(live)
        self.sampler.release(live.draw)
        if live.matcher is not None:
            live.matcher.close()
        try:
            text += live.text.finish()
        except Exception:
            _log.exception("request %s: its last text is lost", live.request.id)
        with self._changed:
            del self._live[live.request.id]
            self._changed.notify_all()
        if live.digest in self._departing and all(other.digest != live.digest for other in list(self._live.values())):
            self._departing.discard(live.digest)
            self._evict(live.digest)
        self._send(live, Delta(text, tokens, finish, live.usage, error))
        now = self.clock()
        queue_s = (live.admitted if live.admitted is not None else now) - live.arrived
        first = None if live.first is None else live.first - live.arrived
        self._tell(lambda: self.on_finish(live.request, live.usage, finish, queue_s, first, now - live.arrived, live.gaps))

    def _send(self, live: Live, delta: Delta) -> None:
        try:
            live.sink(delta)
        except Exception:
            _log.exception("request %s: its sink raised", live.request.id)
            if delta.finish is None:
                self._finish(live, "cancelled")

    def _tell(self, observer: Callable[..., None], *facts: object) -> None:
        try:
            observer(*facts)
        except Exception:
            _log.exception("an observer of the engine raised")

    def _evict(self, digest: str) -> None:
        self.pool.forget(digest)
        self.residency.evict(digest)
        if any(live.digest == digest and live.resident is None for live in list(self._live.values())):
            self._departing.add(digest)

    def _freed(self, resident: Resident) -> None:
        self.runner.forget(resident.packed)
        if resident.purge:
            self.pool.forget(resident.digest)

    def _post(self, what: Callable[[], None]) -> None:
        self._inbox.append(what)
        self._wake.set()

    # ---- who drives it ----

    def start(self) -> None:
        """Run steps on a thread of the engine's own."""
        assert self._thread is None, "the engine runs already"
        self._stop.clear()
        native.let_threads_go()
        self._thread = Thread(target=self._loop, name="trimtab-engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; requests that are not finished end with "cancelled"."""
        with self._changed:
            self._closing = True
        if self._thread is not None:
            self._stop.set()
            self._wake.set()
            self._thread.join()
            self._thread = None
        self._take_inbox()
        for live in list(self._live.values()):
            self._finish(live, "cancelled")
        self.grammars.shutdown()
        if self._own_loader:
            self._loader.shutdown(wait=False, cancel_futures=True)

    def drain(self, timeout: float) -> bool:
        """Take no new requests and finish those that are there; whether all have ended within so many seconds."""
        with self._changed:
            self._closing = True
        return self._until(lambda: not self._live, time.monotonic() + timeout)

    def run(self, requests: Iterable[Request]) -> list[Result]:
        """Answer these, in order, however many. A request that cannot be taken has its error in its result."""
        results: list[Result | None] = []
        for request in requests:
            self._until(lambda: len(self._live) < self.config.max_queued)
            results.append(None)
            try:
                self.submit(request, Collector(results, len(results) - 1))
            except TrimtabError as error:
                results[-1] = Result("", [], [], "error", Usage(), error)
        self._until(lambda: all(r is not None for r in results))
        return [r for r in results if r is not None]

    def idle_check(self) -> None:
        """AssertionError where something is held although no request is open."""
        assert not self._live, f"open requests: {sorted(self._live)}"
        assert self.pool.used == 0, f"{self.pool.used} KV blocks are held by nobody"
        assert self.residency.leases == 0, f"{self.residency.leases} leases are held by nobody"
        assert not self.scheduler.waiting_count and not self.scheduler.loading_count

    def _until(self, done: Callable[[], bool], deadline: float = float("inf")) -> bool:
        """Step, or let the thread step, until `done` or the deadline; whether it was done."""
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if self._thread is not None:
                with self._changed:
                    self._changed.wait_for(done, min(left, 0.1))
                continue
            self._wake.clear()
            if not self.step() and not done():
                self._wake.wait(min(left, 0.02))
        return True

    def _loop(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            try:
                if not self.step():
                    self._wake.wait(0.02 if self._live else 1.0)
            except Exception as error:  # a bug outside a forward: who is here ends with it, later ones get their chance
                _log.exception("a step failed; all open requests end, the engine goes on")
                for live in list(self._live.values()):
                    self._finish(live, "error", ServingError(f"the server failed: {type(error).__name__}: {error}"))
