"""What is checked before a route runs: Host, whether the server takes requests, the body's size; and how a body is read into a model.

Sizes count as bytes arrive, whatever Content-Length says. Depth and number of values are counted before anything is parsed.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from typing import TypeVar

import numpy as np
from fastapi.security.utils import get_authorization_scheme_param
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.errors import LimitError, TrimtabError
from trimtab.http.auth import tenant_of
from trimtab.http.errors import RETRY_S, ClientGone, Fault, fault_of, fault_of_body, reply
from trimtab.http.fields import Body, Strict, ignored_of
from trimtab.http.foreign import refuse_foreign
from trimtab.http.health import PROBES
from trimtab.http.services import Services
from trimtab.memory import release_freed
from trimtab.serve.tenant import Tenant

MAX_VALUES, MAX_CONTAINERS, MAX_KEYS = 1 << 19, 50_000, 50_000
"""Of a body: numbers and texts, lists and objects, fields of all objects. A million small lists in 4 MB keep the parser busy for seconds,
and no other thread runs meanwhile."""
PIECE = 1 << 16
"""Bytes of a body that are looked at together."""
LARGE, RELEASE_S = 1 << 20, 1.0
"""A body of so many bytes has the memory given back that was freed since, so many seconds after its request."""
SMALL = 16 << 10
"""Bytes of a body that is parsed on the event loop; a larger one would hold up other requests' tokens."""
READ_AWAY = 4
"""A body of so many times the largest that is taken is read to its end and thrown away before it is refused: most clients write all of it
before they read, and would see a broken connection instead of the reason."""
ANSWERS = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/classify", "/score", "/v1/score"}
    | {"/rerank", "/v1/rerank", "/v2/rerank"}
)
"""Routes that need room in the engine."""
M = TypeVar("M", bound=Strict)


class Gate:
    """ASGI middleware: refuses a request by its headers, and a body that grows too large while it is read."""

    def __init__(self, app: ASGIApp, services: Services):
        self.app, self.s = app, services
        self._releasing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        scope = _usual(scope)
        if (fault := self._refusal(scope)) is not None:
            if fault.http_status == 413 and int(dict(scope["headers"])[b"content-length"][:20]) <= READ_AWAY * self.s.limits.body_bytes:
                await _read_away(receive, self.s)
            return await self._refuse(fault, scope, receive, send)
        counted = scope["path"] not in PROBES
        body = _Incoming(scope, receive, self.s)
        self.s.life.open += counted
        try:
            if counted and (fault := await self._turn(scope)) is not None:
                await self._refuse(fault, scope, receive, send)
            else:
                await self.app(scope, body.receive, send)
        finally:
            body.close()
            self.s.life.open -= counted
            if body.seen >= LARGE and not self._releasing:
                self._releasing = True
                asyncio.get_running_loop().call_later(RELEASE_S, self._release)
        return None

    async def _turn(self, scope: Scope) -> Fault | None:
        """Wait for the tenant's turn: a request is matched to a route and read only then, so hundreds that come together do not hold up
        other tenants'. Those without a valid key have one turn among them; the route tells them. A fault where there is no room."""
        tenant = self._tenant(scope)
        await self.s.turns.take("" if tenant is None else tenant.name)
        if tenant is None or scope["path"] not in ANSWERS or not self.s.admission.full:
            return None
        return self._no_room(scope, tenant)

    async def _refuse(self, fault: Fault, scope: Scope, receive: Receive, send: Send) -> None:
        if (record := scope.get("trimtab.record")) is not None:
            record.error = fault.code
        await reply(fault)(scope, receive, send)

    def _release(self) -> None:
        """On another thread."""
        self._releasing = False
        asyncio.get_running_loop().run_in_executor(None, release_freed)

    def _refusal(self, scope: Scope) -> Fault | None:
        headers = dict(scope["headers"])
        if self.s.hosts is not None and not self._is_us([v for k, v in scope["headers"] if k == b"host"]):
            return Fault(
                "this server answers only to its own name (the Host header is another): it runs in local mode",
                status=403,
                code="wrong_host",
            )
        if self.s.life.draining and scope["path"] not in PROBES:
            retry = {"Retry-After": str(RETRY_S), "Connection": "close"}
            return Fault("the server is shutting down", status=503, code="shutting_down", headers=retry)
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > self.s.limits.body_bytes:
            return _too_large(self.s.limits.body_bytes)
        return None

    def _tenant(self, scope: Scope) -> Tenant | None:
        """Whose key it has; None without a valid one."""
        authorization = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
        scheme, key = get_authorization_scheme_param(authorization)
        try:
            return tenant_of(self.s, key if scheme.lower() == "bearer" else None)
        except TrimtabError:
            return None

    def _no_room(self, scope: Scope, tenant: Tenant) -> Fault | None:
        """Refuses a request for which there is no room before reading anything of it, since there are many under overload."""
        if (record := scope.get("trimtab.record")) is not None:
            record.tenant = tenant.name
        try:
            self.s.admission.refuse_if_over(tenant)
        except LimitError as error:
            return fault_of(error)
        return None  # somebody has just gone

    def _is_us(self, named: list[bytes]) -> bool:
        return len(named) == 1 and self.s.hosts is not None and named[0].decode("latin-1").lower() in self.s.hosts


def _usual(scope: Scope) -> Scope:
    """A request as routes know it: HEAD is a GET whose body the server leaves out, and a slash at a path's end says nothing."""
    path = scope["path"].rstrip("/") or "/"
    return {**scope, "path": path, "method": "GET" if scope["method"] == "HEAD" else scope["method"]}


async def _read_away(receive: Receive, s: Services) -> None:
    """A body of which nothing is kept, as far as it comes in time, and no longer than it may be."""
    left = READ_AWAY * s.limits.body_bytes
    with suppress(TimeoutError):
        async with asyncio.timeout(s.limits.body_s):
            while left >= 0 and (message := await receive()).get("more_body"):
                left -= len(message.get("body", b""))


class _Incoming:
    """A request's body as it arrives. Counted until the request is over: for itself, and with all that its tenant has sent and that is not
    answered yet."""

    def __init__(self, scope: Scope, receive: Receive, s: Services):
        self.scope, self._receive, self.s, self.seen, self.owner = scope, receive, s, 0, ""

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request" and (more := len(message.get("body", b""))):
            self._count(more)
        return message

    def _count(self, more: int) -> None:
        held, limits = self.s.life.held, self.s.limits
        if not self.seen and (record := self.scope.get("trimtab.record")) is not None:
            self.owner = record.tenant or ""  # routes ask for the key before they read
        self.seen += more
        self.s.life.hold(self.owner, more)
        if self.seen > limits.body_bytes:
            raise _too_large(limits.body_bytes)
        if held[self.owner] > limits.held_bytes:
            text = (
                f"bodies and answers of more than {limits.held_bytes:,} bytes are under way for this key; send fewer large ones at a time"
            )
            raise Fault(text, status=429, code="rate_limit_exceeded", headers={"Retry-After": "1", "Connection": "close"})

    def close(self) -> None:
        self.s.life.hold(self.owner, -self.seen)


def _too_large(limit: int) -> Fault:
    return Fault(f"the body is larger than {limit:,} bytes", status=413, code="body_too_large", headers={"Connection": "close"})


async def read_body(request: Request, model: type[M], s: Services) -> M:
    """The request's body as a `model`. Fault: not JSON (415, 400), too slow (408), too large (413), too deep or with a wrong field (400).
    ClientGone if the client goes away on the way."""
    limits = s.limits
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
    record = request.scope["trimtab.record"]
    read = partial(parse, raw, model, limits.json_depth, s.words.variables)
    body, ignored = read() if len(raw) <= SMALL else await s.words_work.run(record.tenant or "", read)
    if ignored:
        record.ignored = ignored
        s.metrics.ignored += 1
    return body


def parse(raw: bytes, model: type[M], max_depth: int, variables: frozenset[str]) -> tuple[M, tuple[str, ...]]:
    """(a body as a `model`, the names of fields that nobody reads); Fault (400) if it is not one. variables: those that the template
    reads."""
    deep, values, containers, keys = shape_of(raw)
    if deep > max_depth:
        raise Fault(f"the body nests lists and objects {deep} deep; at most {max_depth} are read", code="too_deep")
    if values > MAX_VALUES or containers > MAX_CONTAINERS or keys > MAX_KEYS:
        held = f"{values} values, {containers} lists and objects and {keys} fields"
        raise Fault(f"the body holds {held}; at most {MAX_VALUES}, {MAX_CONTAINERS} and {MAX_KEYS} are read", code="too_many_values")
    try:
        body = from_json(raw, allow_inf_nan=False)
    except ValueError as error:  # the parser's words tell a place, never the text there
        raise Fault(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise Fault("the body must be a JSON object", code="invalid_json")
    try:
        read = model.model_validate(body)
        if isinstance(read, Body):
            refuse_foreign(read)
        return read, ignored_of(read, variables)
    except ValidationError as error:
        raise fault_of_body(error, body, model) from None


def shape_of(raw: bytes) -> tuple[int, int, int, int]:
    """(how deep brackets nest, about how many values there are, how many lists and objects, how many fields), without recursion and with
    nothing built. Text in strings does not count. Piece by piece, so that it takes no memory to speak of; numpy lets other threads run
    meanwhile, where a regular expression would hold them up for a second."""
    depth = deepest = containers = commas = fields = 0
    inside = False  # a string goes on from the piece before
    begin = 0
    while begin < len(raw):
        piece = raw[begin : begin + PIECE]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:  # what a backslash escapes stays with it
            piece = raw[begin : begin + PIECE + 1]
        begin += len(piece)
        if b"\\" in piece:
            piece = piece.replace(b"\\\\", b"  ").replace(b'\\"', b"  ")
        marks = np.frombuffer(piece, dtype=np.uint8)
        quotes = np.bitwise_xor.accumulate(marks == ord('"')) ^ inside
        outside = ~quotes
        folded = marks & 0xDF  # a brace is a bracket with one more bit
        opens, closes = (folded == ord("[")) & outside, (folded == ord("]")) & outside
        nested = np.cumsum(opens.astype(np.int8) - closes.astype(np.int8), dtype=np.int32)
        deepest, depth = max(deepest, depth + int(nested.max())), depth + int(nested[-1])
        containers += int(np.count_nonzero(opens))
        commas += int(np.count_nonzero((marks == ord(",")) & outside))
        fields += int(np.count_nonzero((marks == ord(":")) & outside))
        inside = bool(quotes[-1])
    return deepest, commas + containers, containers, fields
