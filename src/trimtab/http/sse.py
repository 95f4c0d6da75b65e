"""A stream of server-sent events: the new part of each choice as soon as it is there, then the usage and [DONE].

If a client stops reading, it is cut off after `write_s`. If it disconnects, its request is cancelled (answer.py watches).
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from trimtab.http.answer import Answer, failure, first_failure
from trimtab.http.errors import ClientGone
from trimtab.http.send import send_timed, start_timed
from trimtab.http.write import Writer
from trimtab.serve.request import Delta

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""So that no proxy holds events back."""


class EventStream(Response):
    """The answer as events. first: the part that is there already, so that a request that fails at once still gets a proper status."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, writer: Writer, first: dict[int, Delta], *, write_s: float, headers: Mapping[str, str]):
        super().__init__(headers={**HEADERS, **headers})
        del self.headers["content-length"]  # of the empty content that the constructor saw
        self.answer, self.writer, self.first, self.write_s = answer, writer, first, write_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await start_timed(send, 200, self.raw_headers, self.write_s)
            await self._events(send)
        except ClientGone:
            self.answer.record.error = "client_gone"
        finally:
            self.answer.close()

    async def _events(self, send: Send) -> None:
        news = self.first
        while True:
            failed = first_failure(news)
            told = await self.writer.chunks({i: d for i, d in news.items() if failure(d) is None})
            if failed is not None:
                self.answer.record.error = failed.code
                await send_timed(send, told + self.writer.failed(failed), self.write_s, last=True)
                return
            if self.answer.over:
                await send_timed(send, told + await self.writer.end(self.answer.usage), self.write_s, last=True)
                return
            if told:
                await send_timed(send, told, self.write_s, last=False)
            news = await self.answer.news()
