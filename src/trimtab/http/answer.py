"""One HTTP request at the engine: its n answers, the deltas that have come, and the end, which may come from client, engine or server."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from fastapi import FastAPI
from starlette.types import Receive

from trimtab.errors import TrimtabError
from trimtab.http.errors import ClientGone, Fault, fault_of_engine
from trimtab.http.logs import Record
from trimtab.http.services import Engine
from trimtab.serve.admission import Ticket
from trimtab.serve.request import Delta, Request, Usage


def mailbox(app: FastAPI) -> Mailbox:
    """The app's mailbox on the running loop."""
    loop = asyncio.get_running_loop()
    box: Mailbox | None = getattr(app.state, "mailbox", None)
    if box is None or box.loop is not loop:
        if box is not None:  # what was posted as its loop ended was never read
            box.deliver()
        box = app.state.mailbox = Mailbox(loop)
    return box


class Mailbox:
    """From the engine's thread to one event loop. The thread that posts does not wait."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self._waiting: deque[tuple[Answer, int, Delta]] = deque()
        self._called = False

    def post(self, answer: Answer, index: int, delta: Delta) -> None:
        self._waiting.append((answer, index, delta))
        if self.loop.is_closed():  # nobody reads any more, but room is to be given back
            self.deliver()
        elif not self._called:  # `deliver` lowers the flag before it looks, so nothing is left lying
            self._called = True
            try:
                self.loop.call_soon_threadsafe(self.deliver)
            except RuntimeError:  # it was closed at this moment
                self.deliver()

    def deliver(self) -> None:
        """Hand over all that has gathered. On the event loop, or once that has ended."""
        self._called = False
        while self._waiting:
            answer, index, delta = self._waiting.popleft()
            answer.take(index, delta)


@dataclass
class Answer:
    """The engine's requests that stem from one HTTP request. All methods run on the event loop.

    turn: returns when this request may go on, if hundreds end at once. n: choices of each prompt; as with OpenAI, a prompt counts once,
    whichever choice computed it. on_usage: called with prompt and new tokens. The ticket is closed when the engine has finished the last
    choice, even if the client has not read everything, so a slow reader delays only itself.
    """

    engine: Engine
    mailbox: Mailbox
    ticket: Ticket
    record: Record
    turn: Callable[[], Awaitable[None]]
    n: int = 1
    on_usage: Callable[[int, int], None] | None = None
    usage: Usage = field(default_factory=Usage)
    _live: dict[int, str] = field(default_factory=dict)
    _news: dict[int, Delta] = field(default_factory=dict)
    _ring: asyncio.Event = field(default_factory=asyncio.Event)
    _gone: bool = False
    _sealed: bool = False
    _watch: asyncio.Task[None] | None = None

    def watch(self, receive: Receive) -> None:
        """From now on, if the client disconnects, everything is cancelled at once. Call it when the body has been read."""

        async def watching() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self._gone = True
            self.cancel()
            self._ring.set()

        self._watch = asyncio.create_task(watching())

    def submit(self, requests: Sequence[Request]) -> None:
        """Hand over the requests, in the order of their choices; none where the client has left. Raises what the engine says of them."""
        if self._gone:
            raise ClientGone
        self._live = {i: r.id for i, r in enumerate(requests)}
        taken: list[int] = []
        try:
            for index, request in enumerate(requests):
                self.engine.submit(request, partial(self.mailbox.post, self, index))
                taken.append(index)
        finally:
            self._live = {i: name for i, name in self._live.items() if i in taken}
            self._sealed = True

    def take(self, index: int, delta: Delta) -> None:
        """What the engine has to say of one choice."""
        if self.record.first_token_s is None and delta.tokens:
            self.record.first_token_s = round(time.perf_counter() - self.record.started, 4)
        before = self._news.get(index)
        self._news[index] = delta if before is None else merged(before, delta)
        if delta.finish is not None:
            self._live.pop(index, None)
            first, u, d = index % self.n == 0, self.usage, delta.usage
            self.usage = Usage(u.prompt + first * d.prompt, u.completion + d.completion, u.cached + first * d.cached)
            self.record.finish = delta.finish if self.record.finish in (None, delta.finish) else "several"
            self._settle()
        self._ring.set()

    async def news(self) -> dict[int, Delta]:
        """The new part of each choice since the last call, merged; waits until there is something. ClientGone if the client has left."""
        while not self._news and not self._gone:
            self._ring.clear()
            await self._ring.wait()
        if self._gone:
            await self.turn()
            raise ClientGone
        taken, self._news = self._news, {}
        return taken

    @property
    def over(self) -> bool:
        """Whether the engine has finished all choices and everything has been taken."""
        return self._sealed and not self._live and not self._news

    def cancel(self) -> None:
        """Free what the engine holds. Its last delta still comes, and closes the ticket."""
        for request_id in list(self._live.values()):
            self.engine.cancel(request_id)

    def close(self) -> None:
        """Nobody reads any more. To be called at every end; a second call changes nothing."""
        if self._watch is not None:
            self._watch.cancel()
        self._sealed = True
        self.cancel()
        self._settle()

    def _settle(self) -> None:
        """Give the room back once nothing of the request is left at the engine, and note what it has cost."""
        if self._live or not self._sealed or self.ticket.closed:
            return
        self.ticket.close(self.usage.prompt + self.usage.completion)
        r, u = self.record, self.usage
        r.prompt_tokens, r.completion_tokens, r.cached_tokens = u.prompt, u.completion, u.cached
        if self.on_usage is not None:
            self.on_usage(u.prompt, u.completion)


def merged(a: Delta, b: Delta) -> Delta:
    """Two pieces of one answer, the second right after the first."""
    return Delta(
        a.text + b.text, a.tokens + b.tokens, b.finish, b.usage, b.error, a.prompt + b.prompt, a.vector or b.vector, a.labels or b.labels
    )


def first_failure(news: Mapping[int, Delta]) -> Fault | None:
    """The failure of the first choice that has one, or None."""
    return next((fault for delta in news.values() if (fault := failure(delta)) is not None), None)


def failure(delta: Delta) -> Fault | None:
    """What went wrong with a choice, or None."""
    if delta.finish == "error":
        return fault_of_engine(delta.error or TrimtabError("the answer failed"))
    if delta.finish == "deadline":
        return Fault("the answer was not done within the server's time for a request", status=504, code="deadline")
    if delta.finish == "cancelled":
        return Fault("the server is shutting down", status=503, code="shutting_down", headers={"Retry-After": "5"})
    return None
