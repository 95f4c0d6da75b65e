"""Sends an answer to a client that may read slowly, or not at all. Nothing waits for a client longer than `write_s`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from typing import IO

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from trimtab.http.errors import ClientGone
from trimtab.http.logs import Record
from trimtab.http.services import Life

CHUNK = 64 << 10
"""Bytes that a client has to read within the time, of an answer that is there as a whole."""

PIECE = 1 << 20
"""Bytes of a file that are sent at a time."""


class SlowReader(ClientGone):
    """The client does not read what it asked for."""


async def start_timed(send: Send, status: int, headers: list[tuple[bytes, bytes]], write_s: float) -> None:
    """The beginning of an answer. It also waits until the client has read the answer before."""
    await _timed(send, {"type": "http.response.start", "status": status, "headers": headers}, write_s)


async def send_timed(send: Send, body: bytes, write_s: float, *, last: bool) -> None:
    """A piece of the answer. SlowReader if the client has not read the previous one within `write_s`."""
    await _timed(send, {"type": "http.response.body", "body": body, "more_body": not last}, write_s)


async def _timed(send: Send, message: Message, write_s: float) -> None:
    try:
        async with asyncio.timeout(write_s):
            await send(message)
    except TimeoutError:
        raise SlowReader(f"nothing was read for {write_s:g} s") from None


class WholeAnswer(Response):
    """An answer that is sent as a whole. Until the client has read it, it counts among the bytes that its tenant holds, as bodies do."""

    media_type = "application/json"

    def __init__(self, body: bytes, record: Record, life: Life, *, write_s: float, headers: Mapping[str, str]):
        super().__init__(body, headers=headers)
        self.record, self.life, self.write_s = record, life, write_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        owner, size = self.record.tenant or "", len(self.body)
        self.life.hold(owner, size)
        try:
            await start_timed(send, self.status_code, self.raw_headers, self.write_s)
            for begin in range(0, size, CHUNK):
                end = begin + CHUNK
                await send_timed(send, bytes(self.body[begin:end]), self.write_s, last=end >= size)
        except ClientGone:
            self.record.error = "client_gone"
        finally:
            self.life.hold(owner, -size)


class SentFile(Response):
    """An open file from its beginning, of which a piece at a time is in memory. It is closed, and `ended` called, once it is sent or the
    client has gone or does not read."""

    def __init__(self, file: IO[bytes], ended: Callable[[], None], *, media_type: str, write_s: float, headers: Mapping[str, str]):
        self.size = file.seek(0, os.SEEK_END)
        super().__init__(None, media_type=media_type, headers={**headers, "content-length": str(self.size)})
        self.file, self.ended, self.write_s = file, ended, write_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await start_timed(send, self.status_code, self.raw_headers, self.write_s)
            for begin in range(0, self.size, PIECE):
                piece = await run_in_threadpool(os.pread, self.file.fileno(), PIECE, begin)
                await send_timed(send, piece, self.write_s, last=begin + PIECE >= self.size)
        except ClientGone:
            pass  # the server breaks the connection off, as the answer is not whole
        finally:
            self.file.close()
            self.ended()
