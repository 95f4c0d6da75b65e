"""The engine: requests in, deltas out, one step at a time.

It puts the parts together, in the order of a request's way: it is among the open requests (`open_requests.py`), the scheduler says what
runs, a step computes logits, tokens and text (`step.py`), and it ends (`ending.py`). Nothing is known of HTTP, keys or names. `submit`,
`cancel`, `prefetch` and `evict` may be called from any thread; all else happens on the one that calls `step`: the engine's own after
`start`, or whoever drives it. Every request that `submit` takes ends with one last delta.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from threading import Event, Lock, Thread

from trimtab.cost.serving import ServingMemory, memory_of_server
from trimtab.decode.text import Decoder
from trimtab.errors import TrimtabError
from trimtab.model import Base
from trimtab.ops import native
from trimtab.serve.blocks import BlockPool, chain_start
from trimtab.serve.config import EngineConfig, fitted, make_budgets
from trimtab.serve.drafts import Drafts
from trimtab.serve.ending import Ending, OnFinish
from trimtab.serve.grammars import Grammars, Matcher
from trimtab.serve.open_requests import OpenRequests
from trimtab.serve.prompt_rows import prompt_rows
from trimtab.serve.request import Grammar, Request, SamplingParams, Servable, Sink, Usage
from trimtab.serve.residency import LOADERS, Residency, Resident
from trimtab.serve.results import Collector, Result
from trimtab.serve.runner import Runner
from trimtab.serve.sampling import Sampler, make_draw
from trimtab.serve.scheduler import Scheduler
from trimtab.serve.sequence import Live, ServingError, adapters_of
from trimtab.serve.stats import EngineStats, StepFacts, TokenCounts
from trimtab.serve.step import Step
from trimtab.serve.step_cost import StepCost
from trimtab.serve.watch import Watch

__all__ = ["Engine", "EngineConfig"]

SWITCH_S = 0.0002
"""Python's switch interval while the engine has a thread of its own. A step lets go of the interpreter some hundred times. It waits so long
for it each time while another thread computes: with Python's 5 ms, eight tokens took 21 s beside one busy thread, now 2 s."""
_log = logging.getLogger(__name__)


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
        self.base, self.config, self.clock = base, fitted(config or EngineConfig(), base), clock
        size = self.config.block
        budgets = make_budgets(self.config, base, Runner.bytes_per_block(base, size))
        self.pool = BlockPool(budgets.kv_blocks)
        self.runner = Runner(base, blocks=self.pool.total, block_size=size)
        self.forward_lock = Lock()
        self.requests = OpenRequests(self.config.max_queued)
        wake = self.requests.wake.set
        self._own_loader = loader is None
        self._loader = loader or ThreadPoolExecutor(LOADERS, thread_name_prefix="trimtab-load", initializer=native.compute_alone)
        self.residency = Residency(base, budgets.adapter_bytes, self._loader, self.forward_lock, wake, self._freed)
        cost = StepCost.measured(self.runner, self.pool) if self.config.speculate else None
        self.scheduler = Scheduler(self.config, self.pool, self.residency, min(base.spec.max_positions, self.pool.total * size), cost)
        self.sampler = Sampler(base.spec.vocab_size, base.stop_ids, base.device)
        self.decoder = Decoder(base.tokenizer)
        self.grammars = Grammars(base.tokenizer, base.spec.vocab_size, base.stop_ids, wake)
        self.on_step: Callable[[StepFacts], None] = lambda facts: None
        self.on_finish: OnFinish = lambda *facts: None
        self._tokens = TokenCounts()
        self._ending = Ending(
            requests=self.requests,
            scheduler=self.scheduler,
            sampler=self.sampler,
            pool=self.pool,
            residency=self.residency,
            tokens=self._tokens,
            clock=clock,
            on_finish=lambda *facts: self.on_finish(*facts),
        )
        self._step = Step(
            requests=self.requests,
            scheduler=self.scheduler,
            runner=self.runner,
            forward_lock=self.forward_lock,
            sampler=self.sampler,
            grammars=self.grammars,
            ending=self._ending,
            tokens=self._tokens,
            stop_ids=base.stop_ids,
            clock=clock,
            on_step=lambda facts: self.on_step(facts),
        )
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
        matcher = None if p.grammar is None else self._matcher(request, p.grammar)
        trigger = None if p.grammar is None or matcher is None else p.grammar.trigger
        live = Live(
            request,
            sink,
            self.decoder.stream(p.stop, p.min_tokens, self._shown(p), p.with_stop),
            make_draw(p, request.prompt, matcher if trigger is None else None),
            matcher,
            serial=0,
            arrived=self.clock(),
            chain=chain_start(self.base.fingerprint, digest, tenant, request.cache_salt, self.config.block),
            base_chain=chain_start(self.base.fingerprint, None, tenant, request.cache_salt, self.config.block),
            tokens=list(request.prompt),
            drafts=Drafts(len(request.prompt)) if self.config.speculate and p.grammar is None else None,
            watch=None if trigger is None else Watch(trigger, self.decoder.stream(shown=self._shown(p))),
            rows=prompt_rows(request),
        )
        try:
            self.requests.enter(live, self.scheduler.running, lambda: self._step.begin(live))
        except BaseException:
            if matcher is not None:
                matcher.close()  # nobody else would
            raise

    def _matcher(self, request: Request, grammar: Grammar) -> Matcher | None:
        """Follows its grammar; None where that cannot be followed and need not."""
        try:
            return self.grammars.matcher(grammar, request.tenant)
        except TrimtabError as error:
            if not grammar.loose:
                raise
            _log.info("request %s goes on without its grammar: %s", request.id, error.message)
            return None

    def _shown(self, p: SamplingParams) -> Collection[int]:
        """Control tokens that are part of an answer's text."""
        return self.decoder.special.keys() if p.all_shown else p.shown

    def cancel(self, request_id: str) -> None:
        """End a request, wherever it is; nothing where there is none."""
        live = self.requests.by_id.get(request_id)
        if live is not None:
            self.requests.post(lambda: self._ending.finish(live, "cancelled"))

    def prefetch(self, adapter: Servable) -> None:
        """Have an adapter in memory before somebody asks for it, if there is room."""
        self.requests.post(lambda: self.residency.load(adapter))

    def evict(self, digest: str) -> None:
        """Let go of an adapter: requests that are there finish with it, then it and all that is kept of it goes."""
        self.requests.post(lambda: self._ending.evict(digest))

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def stats(self) -> EngineStats:
        """Where everything stands now."""
        s, r, p = self.scheduler, self.residency, self.pool
        running, loading = len(s.running), s.queues.loading_count
        live = list(self.requests)
        return EngineStats(
            running=running,
            waiting=max(0, len(self.requests) - running - loading),
            loading=loading,
            draining=self.requests.closing,
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
            drafted_tokens=s.drafted,
            accepted_tokens=self._step.accepted,
            prefix_query_tokens=s.query_tokens,
            prefix_hit_tokens=s.hit_tokens,
            prompt_tokens=self._tokens.prompt,
            generation_tokens=self._tokens.generation,
            steps=self._step.count,
            step_errors=self._step.errors,
            tenant_tokens=dict(self._tokens.by_tenant),
            rows_by_path=dict(self.base.attached.cached_rows),
            adapters_running=adapters_of(r for r in live if r.where == "running"),
            adapters_waiting=adapters_of(r for r in live if r.where != "running"),
        )

    def memory(self) -> ServingMemory:
        """What serving takes at most, beside the process itself."""
        blocks = self.pool.total * Runner.bytes_per_block(self.base, self.config.block)
        return memory_of_server(self.base, blocks, self.residency.budget_bytes, self.config.max_step_rows)

    # ---- who drives it ----

    def step(self) -> bool:
        """One step; False where nothing could run."""
        return self._step()

    def start(self) -> None:
        """Run steps on a thread of the engine's own."""
        assert self._thread is None, "the engine runs already"
        self._stop.clear()
        native.let_threads_go()
        sys.setswitchinterval(min(SWITCH_S, sys.getswitchinterval()))
        self._thread = Thread(target=self._loop, name="trimtab-engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; requests that are not finished end with "cancelled"."""
        self.requests.close()
        if self._thread is not None:
            self._stop.set()
            self.requests.wake.set()
            self._thread.join()
            self._thread = None
        self.requests.take_in()
        for live in self.requests:
            self._ending.finish(live, "cancelled")
        self.grammars.shutdown()
        if self._own_loader:
            self._loader.shutdown(cancel_futures=True)

    def drain(self, timeout: float) -> bool:
        """Take no new requests and finish those that are there; whether all have ended within so many seconds."""
        self.requests.close()
        return self._until(lambda: not self.requests, time.monotonic() + timeout)

    def run(self, requests: Iterable[Request]) -> list[Result]:
        """Answer these, in order, however many. A request that cannot be taken has its error in its result."""
        results: list[Result | None] = []
        for request in requests:
            self._until(lambda: len(self.requests) < self.config.max_queued)
            results.append(None)
            try:
                self.submit(request, Collector(results, len(results) - 1))
            except TrimtabError as error:
                results[-1] = Result("", [], [], "error", Usage(), error)
        self._until(lambda: all(r is not None for r in results))
        return [r for r in results if r is not None]

    def idle_check(self) -> None:
        """AssertionError where something is held although no request is open."""
        assert not self.requests, f"open requests: {sorted(self.requests.by_id)}"
        assert self.pool.used == 0, f"{self.pool.used} KV blocks are held by nobody"
        assert self.residency.leases == 0, f"{self.residency.leases} leases are held by nobody"
        assert not self.scheduler.waiting_count and not self.scheduler.queues.loading_count

    def _until(self, done: Callable[[], bool], deadline: float = float("inf")) -> bool:
        """Step, or let the thread step, until `done` or the deadline; whether it was done."""
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if self._thread is not None:
                self.requests.wait(done, min(left, 0.1))
                continue
            self.requests.wake.clear()
            if not self.step() and not done():
                self.requests.wake.wait(min(left, 0.02))
        return True

    def _loop(self) -> None:
        while not self._stop.is_set():
            self.requests.wake.clear()
            try:
                if not self.step():
                    self.requests.wake.wait(0.02 if self.requests else 1.0)
            except Exception as error:  # a bug outside a forward: who is here ends with it, later ones get their chance
                _log.exception("a step failed; all open requests end, the engine goes on")
                for live in self.requests:
                    self._ending.finish(live, "error", ServingError(f"the server failed: {type(error).__name__}: {error}"))

    def _freed(self, resident: Resident) -> None:
        """An adapter has left memory."""
        self.runner.forget(resident.packed)
        if resident.purge:
            self.pool.forget(resident.digest)
