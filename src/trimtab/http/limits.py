"""What is checked before a route runs: Host, whether the server takes requests, the body's size; and how a body is read into a model.

Sizes count as bytes arrive, whatever Content-Length says. Depth is counted before anything is parsed.
"""

from __future__ import annotations

import asyncio
import re
from typing import TypeVar

import numpy as np
from fastapi.security.utils import get_authorization_scheme_param
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.errors import LimitError, TrimtabError
from trimtab.http.auth import tenant_of
from trimtab.http.errors import RETRY_S, ClientGone, Fault, fault_of, fault_of_body, reply
from trimtab.http.services import Limits, Services

MAX_FIELDS = 100
"""Of a body: more than there are, and few enough to look for each one's nearest spelling."""
SMALL = 16 << 10
"""Bytes of a body that is parsed on the event loop; a larger one would hold up other requests' tokens."""
ALWAYS = frozenset({"/livez", "/readyz", "/metrics"})
"""Answered while the server shuts down."""
ANSWERS = frozenset({"/v1/chat/completions", "/v1/completions"})
"""Routes that need room in the engine."""
M = TypeVar("M", bound=BaseModel)
STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


class Gate:
    """ASGI middleware: refuses a request by its headers, and a body that grows too large while it is read."""

    def __init__(self, app: ASGIApp, services: Services):
        self.app, self.s = app, services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if (fault := self._refusal(scope)) is not None:
            if (record := scope.get("trimtab.record")) is not None:
                record.error = fault.code
            return await reply(fault)(scope, receive, send)
        limit, seen = self.s.limits.body_bytes, 0

        async def receiving() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request" and (seen := seen + len(message.get("body", b""))) > limit:
                raise _too_large(limit)
            return message

        self.s.life.open += scope["path"] not in ALWAYS
        try:
            await self.app(scope, receiving, send)
        finally:
            self.s.life.open -= scope["path"] not in ALWAYS
        return None

    def _refusal(self, scope: Scope) -> Fault | None:
        headers = dict(scope["headers"])
        if self.s.hosts is not None and not self._is_us([v for k, v in scope["headers"] if k == b"host"]):
            return Fault(
                "this server answers only to its own name (the Host header is another): it runs in local mode",
                status=403,
                code="wrong_host",
            )
        if self.s.life.draining and scope["path"] not in ALWAYS:
            retry = {"Retry-After": str(RETRY_S), "Connection": "close"}
            return Fault("the server is shutting down", status=503, code="shutting_down", headers=retry)
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > self.s.limits.body_bytes:
            return _too_large(self.s.limits.body_bytes)
        if scope["path"] in ANSWERS and self.s.admission.full:
            return self._no_room(scope, headers.get(b"authorization", b"").decode("latin-1"))
        return None

    def _no_room(self, scope: Scope, authorization: str) -> Fault | None:
        """The refusal of a request for which there is no room, before anything of it is read: under overload there are many. Whoever has
        no valid key passes, to be told so by the route."""
        try:
            scheme, key = get_authorization_scheme_param(authorization)
            tenant = tenant_of(self.s, key if scheme.lower() == "bearer" else None)
        except TrimtabError:
            return None
        if (record := scope.get("trimtab.record")) is not None:
            record.tenant = tenant.name
        try:
            self.s.admission.refuse_if_over(tenant)
        except LimitError as error:
            return fault_of(error)
        return None  # somebody has just gone

    def _is_us(self, named: list[bytes]) -> bool:
        return len(named) == 1 and self.s.hosts is not None and named[0].decode("latin-1").lower() in self.s.hosts


def _too_large(limit: int) -> Fault:
    return Fault(f"the body is larger than {limit:,} bytes", status=413, code="body_too_large", headers={"Connection": "close"})


async def read_body(request: Request, model: type[M], limits: Limits) -> M:
    """The request's body as a `model`. Fault: not JSON (415, 400), too slow (408), too large (413), too deep or with a wrong field (400).
    ClientGone where the client goes away on the way."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a browser sends a page's form to any server, but JSON only to those that allow it
        raise Fault(f"content-type {kind[:64]!r}: must be application/json", status=415, code="unsupported_media_type")
    try:
        async with asyncio.timeout(limits.body_s):
            raw = await request.body()
    except TimeoutError:
        text = f"the body did not arrive within {limits.body_s:g} s"
        raise Fault(text, status=408, code="body_timeout", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ClientGone from None
    if len(raw) <= SMALL:
        return parse(raw, model, limits.json_depth)
    return await run_in_threadpool(parse, raw, model, limits.json_depth)


def parse(raw: bytes, model: type[M], max_depth: int) -> M:
    """A body as a `model`; Fault (400) where it is not one."""
    if (deep := depth_of(raw)) > max_depth:
        raise Fault(f"the body nests lists and objects {deep} deep; at most {max_depth} are read", code="too_deep")
    try:
        body = from_json(raw, allow_inf_nan=False)
    except ValueError as error:  # the parser's words tell a place, never the text there
        raise Fault(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise Fault("the body must be a JSON object", code="invalid_json")
    if len(body) > MAX_FIELDS:
        raise Fault(f"the body has {len(body)} fields; at most {MAX_FIELDS} are read", code="invalid_value")
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise fault_of_body(error, body, model) from None


def depth_of(raw: bytes) -> int:
    """How deep brackets nest, in one pass and without recursion. Text in strings does not count."""
    marks = np.frombuffer(STRING.sub(b"", raw), dtype=np.uint8)
    steps = np.isin(marks, np.frombuffer(b"[{", np.uint8)).astype(np.int32) - np.isin(marks, np.frombuffer(b"]}", np.uint8))
    return int(np.cumsum(steps).max(initial=0))
