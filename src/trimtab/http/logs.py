"""One JSON line for each request: id, route, tenant, model, status, tokens, times. Never a prompt, an answer or a key.

This is the outermost layer of the app. It gives each request its id, and turns an exception that nothing else handled into an answer with
that id. Fields of a body that nobody read are named in the answer's header x-trimtab-ignored.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.http.errors import reply, unexpected
from trimtab.http.health import PROBES
from trimtab.serve.keys import redacted, redacted_in

log = logging.getLogger("trimtab.http")
GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
UNFIT = re.compile(r"[^ -~]|,")
"""What is no part of a name in a header."""


@dataclass
class Record:
    """What is known of one request; routes fill it in. Times in seconds since its start."""

    id: str
    method: str
    path: str
    client: str = ""
    started: float = field(default_factory=time.perf_counter)
    tenant: str | None = None
    model: str | None = None
    adapter: str | None = None
    status: int | None = None
    error: str | None = None
    finish: str | None = None
    stream: bool | None = None
    choices: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    first_token_s: float | None = None
    ignored: tuple[str, ...] | None = None

    def line(self) -> dict[str, object]:
        told = {k: v for k, v in vars(self).items() if v is not None and k != "started"}
        return told | {"seconds": round(time.perf_counter() - self.started, 4)}


class RequestLog:
    """ASGI middleware: `Record` in the scope, x-request-id on the answer, one line at the end, an answer to what nobody caught.
    on_end: hears each record."""

    def __init__(self, app: ASGIApp, on_end: Callable[[Record], None] = lambda record: None):
        self.app, self.on_end = app, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = next((v.decode("latin-1") for k, v in scope["headers"] if k == b"x-request-id"), "")
        record = Record(
            given if GIVEN_ID.fullmatch(given) and redacted(given) == given else uuid.uuid4().hex,
            scope["method"],
            redacted(scope["path"])[:200],
            (scope.get("client") or ("",))[0],
        )
        scope["trimtab.record"] = record
        header = (b"x-request-id", record.id.encode())

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", []), header, *_ignored(record)]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception:
            record.error = "internal_error"
            log.error("bug", extra={"told": {"id": record.id, "traceback": traceback.format_exc()}})
            if record.status is not None:
                raise  # the answer has begun: the server breaks the connection off, which the client sees
            await reply(unexpected(record.id))(scope, receive, sending)
        finally:
            self.on_end(record)
            if scope["path"] not in PROBES or (record.status or 500) >= 500:
                log.info("request", extra={"told": record.line()})
        return None


def _ignored(record: Record) -> list[tuple[bytes, bytes]]:
    """The header that names the body's fields that nobody read."""
    told = ", ".join(UNFIT.sub("?", name) for name in record.ignored or ())
    return [(b"x-trimtab-ignored", told.encode())] if told else []


class JsonLines(logging.Formatter):
    """A log record as one line of JSON; `told` in `extra` holds the fields. The last place before the log: no key passes, wherever it was
    put."""

    def format(self, record: logging.LogRecord) -> str:
        told = getattr(record, "told", None)
        line = {"time": round(record.created, 3), "level": record.levelname.lower(), "event": record.getMessage()}
        if record.exc_info and told is None:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(redacted_in(line | (told or {})), ensure_ascii=True)


def configure(stream: TextIO | None = None) -> None:
    """Send the server's log, and what uvicorn has to say beyond it, to `stream` (standard error) as JSON lines."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("trimtab", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
