"""How requests end, and adapters after their last request: what they hold is freed, and the caller gets the last delta."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trimtab.errors import TrimtabError
from trimtab.serve.blocks import BlockPool
from trimtab.serve.composed import parts_of
from trimtab.serve.open_requests import OpenRequests
from trimtab.serve.request import Delta, FinishReason, Request, Token, Usage
from trimtab.serve.residency import Residency
from trimtab.serve.sampling import Sampler
from trimtab.serve.scheduler import Scheduler
from trimtab.serve.sequence import Live
from trimtab.serve.stats import TokenCounts

_log = logging.getLogger(__name__)
OnFinish = Callable[[Request, Usage, FinishReason, float, float | None, float, Sequence[float]], None]
"""request, usage, finish, seconds in the queue, to the first token (None: there was none), in all, and between tokens."""


@dataclass(eq=False)
class Ending:
    """Ends requests and lets adapters go, on the thread that steps. departing: digests to evict once nobody is left who is queued for
    them."""

    requests: OpenRequests
    scheduler: Scheduler
    sampler: Sampler
    pool: BlockPool
    residency: Residency
    tokens: TokenCounts
    clock: Callable[[], float]
    on_finish: OnFinish
    departing: set[str] = field(default_factory=set)

    def finish(
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
            self.tokens.add(live.request.tenant, len(live.request.prompt), 0)
        self.scheduler.remove(live)
        self.sampler.release(live.draw)
        if live.matcher is not None:
            live.matcher.close()
        try:
            text += live.text.finish()
        except Exception:
            _log.exception("request %s: its last text is lost", live.request.id)
        self.requests.leave(live)
        if live.digest in self.departing and all(other.digest != live.digest for other in self.requests):
            self.departing.discard(live.digest)
            self.evict(live.digest)
        now = self.clock()
        queue_s = (live.admitted if live.admitted is not None else now) - live.arrived
        first = None if live.first is None else live.first - live.arrived
        tell(self.on_finish, live.request, live.usage, finish, queue_s, first, now - live.arrived, live.gaps)
        self.send(live, Delta(text, tokens, finish, live.usage, error))  # whoever has it finds it counted

    def send(self, live: Live, delta: Delta) -> None:
        """A delta to whoever asked; who cannot take it has its request cancelled."""
        try:
            live.sink(delta)
        except Exception:
            _log.exception("request %s: its sink raised", live.request.id)
            if delta.finish is None:
                self.finish(live, "cancelled")

    def evict(self, digest: str) -> None:
        """Let go of an adapter, of the sums that it is part of, and of what the cache has of them. Requests that wait for it still get it;
        then it goes again."""
        asked = [live.digest for live in self.requests if live.digest is not None and live.resident is None]
        for one in {d for d in (digest, *self.pool.digests, *self.residency.digests, *asked) if d == digest or digest in parts_of(d)}:
            self.pool.forget(one)
            self.residency.evict(one)
            if one in asked:
                self.departing.add(one)


def tell(observer: Callable[..., None], *facts: object) -> None:
    """Tell an observer something; what goes wrong there harms nobody."""
    try:
        observer(*facts)
    except Exception:
        _log.exception("an observer of the engine raised")
