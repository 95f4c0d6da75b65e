"""Every answer that is not a success has OpenAI's shape: {"error": {"message", "type", "param", "code"}}.

A `TrimtabError` becomes such an answer by its class. What pydantic finds wrong with a body becomes one that names the fields. Anything else
is a bug of ours, and its answer has only the request's id.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from trimtab.errors import AdapterError, AuthError, LimitError, NotFoundError, OverloadedError, TrimtabError, nearest
from trimtab.serve.grammar import GrammarError
from trimtab.serve.keys import redacted

MAX_FINDINGS, MAX_ERRORS, MAX_NAME = 8, 64, 256
RETRY_S = 5
"""When to try again after trouble of which nobody knows how long it lasts."""
BAD_GRAMMAR = "invalid_grammar"
CLIENT_GONE = 499
"""nginx's number for a client that went away before its answer; nobody reads it but the log."""


class Fault(TrimtabError):
    """An answer that is an error. status: of HTTP. param: the field that is wrong. code: for machines. type: OpenAI's class of error."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.http_status, self.code, self.param, self.headers = status, code, param, dict(headers or {})

    def about(self, param: str, code: str) -> Fault:
        """The same answer, with the field named where it is the client's mistake."""
        if self.http_status in (400, 404):
            self.param, self.code = param, code
        return self

    @property
    def type(self) -> str:
        return TYPES.get(self.http_status, "server_error" if self.http_status >= 500 else "invalid_request_error")

    @property
    def body(self) -> dict[str, Any]:
        param = None if self.param is None else redacted(self.param)
        return {"error": {"message": redacted(self.message), "type": self.type, "param": param, "code": self.code}}


class ClientGone(Exception):
    """The client has closed the connection: there is nobody to answer."""


class ErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """What is wrong, for people (message) and for machines (code); param names the field."""

    error: ErrorInfo


TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error", 503: "overloaded_error"}
MEANINGS = {
    400: "A field is wrong; the message names it.",
    401: "No key, or one that is not valid.",
    403: "The key may not do this.",
    404: "There is no such model, or it is not the caller's.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "The caller is over one of its limits; Retry-After says when to try again.",
    500: "A bug of the server.",
    503: "The server is full or shutting down; Retry-After says when to try again.",
    504: "The answer was not done within the server's time for a request.",
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of these answers."""
    retry = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}
    return {s: {"model": ErrorReply, "description": MEANINGS[s]} | ({"headers": retry} if s in (429, 503) else {}) for s in statuses}


def fault_of(error: TrimtabError) -> Fault:
    """The answer that a user's error gets."""
    if isinstance(error, Fault):
        return error
    status = error.http_status
    retry = {"Retry-After": str(RETRY_S)} if status == 503 else {}
    if isinstance(error, LimitError):
        limit = "overloaded" if isinstance(error, OverloadedError) else "rate_limit_exceeded"
        return Fault(error.render(), status=status, code=limit, headers={"Retry-After": str(max(1, math.ceil(error.retry_after)))})
    if isinstance(error, AuthError):
        named = "invalid_api_key" if status == 401 else "forbidden"
        return Fault(error.render(), status=status, code=named, headers={"WWW-Authenticate": "Bearer"} if status == 401 else {})
    code = "not_found" if isinstance(error, NotFoundError) else BAD_GRAMMAR if isinstance(error, GrammarError) else None
    return Fault(error.render(), status=status, code=code, headers=retry)


def fault_of_engine(error: TrimtabError) -> Fault:
    """The answer to a request that failed after it was accepted. If an adapter is refused then, the server is at fault, not the client."""
    if isinstance(error, AdapterError):
        return Fault(f"the adapter cannot be served: {error.message}", status=500, code="adapter_refused", param="model")
    return fault_of(error)


def fault_of_body(error: ValidationError, body: Any, model: type[BaseModel]) -> Fault:
    """What pydantic found wrong, field by field; never the values, which may be a prompt."""
    findings: dict[str, list[str]] = {}
    for found in error.errors(include_url=False, include_context=False, include_input=False)[:MAX_ERRORS]:
        where = _path(found, body)
        if found["type"] == "extra_forbidden":  # a hint only among the fields of the body itself, where many are known
            text = f"is unknown or not supported{nearest(where, model.model_fields) if len(found['loc']) == 1 else ''}"
        else:
            text = found["msg"][:1].lower() + found["msg"][1:]
        texts = findings.setdefault(where, [])
        if text not in texts:
            texts.append(text)
    lines = [f"{where or 'body'}: {' or '.join(texts)}" for where, texts in findings.items()]
    if len(lines) > MAX_FINDINGS:
        lines[MAX_FINDINGS:] = ["and more"]
    return Fault("; ".join(lines), param=next(iter(findings)) or None, code="invalid_value")


def _path(found: Any, body: Any) -> str:
    """The part of pydantic's location that lies in the body (names of a union's branches do not), as "messages[0].content"."""
    path, loc = "", found["loc"]
    for i, key in enumerate(loc):
        absent = found["type"] == "missing" and i == len(loc) - 1
        if isinstance(body, dict) and isinstance(key, str) and (key in body or absent):
            name = redacted(key[:MAX_NAME])[:64]  # before it is cut: half a key is not seen to be one
            path += f".{name}" if path else name
            body = body.get(key)
        elif isinstance(body, list) and isinstance(key, int) and key < len(body):
            path += f"[{key}]"
            body = body[key]
    return path


def reply(fault: Fault) -> JSONResponse:
    return JSONResponse(fault.body, fault.http_status, fault.headers)


def unexpected(request_id: str) -> Fault:
    """The message for a bug: it says only where the log tells more."""
    return Fault(f"the server has failed; its log tells more under request {request_id}", status=500, code="internal_error")


def _methods(app: FastAPI, request: Request) -> str:
    """What a path takes. Where several routes have it, the framework itself names one route's methods. HEAD is a GET (`limits.py`)."""

    def takes(method: str) -> bool:
        return any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in app.routes)

    return ", ".join(m for m in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT") if takes("GET" if m == "HEAD" else m))


def install(app: FastAPI) -> None:
    """Give every error of the app its answer. What is left over is caught in logs.py, where the request's id is known."""

    async def of_user(request: Request, error: Exception) -> Response:
        assert isinstance(error, TrimtabError)
        return _noted(request, fault_of(error))

    async def of_routing(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = {"allow": _methods(app, request)} if error.status_code == 405 else error.headers
        if error.status_code == 405 and request.method == "OPTIONS":  # what a path takes; that of a web page is answered before (app.py)
            return Response(status_code=204, headers=headers)
        text = {
            404: f"there is no route {request.method} {request.url.path[:200]}",
            405: f"{request.url.path[:200]} does not take {request.method}",
        }
        message = text.get(error.status_code, str(error.detail))
        return _noted(request, Fault(message, status=error.status_code, code="unknown_route", headers=headers))

    async def of_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    async def of_parameter(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        found = error.errors()
        where = [str(e["loc"][-1]) for e in found]
        text = "; ".join(f"{w}: {e['msg'][:1].lower()}{e['msg'][1:]}" for w, e in zip(where, found, strict=True))
        return _noted(request, Fault(text, param=where[0], code="invalid_value"))

    app.add_exception_handler(TrimtabError, of_user)
    app.add_exception_handler(RequestValidationError, of_parameter)
    app.add_exception_handler(HTTPException, of_routing)
    app.add_exception_handler(ClientGone, of_gone)
    app.add_exception_handler(ClientDisconnect, of_gone)


def _noted(request: Request, fault: Fault) -> Response:
    if (record := request.scope.get("trimtab.record")) is not None:
        record.error = fault.code or fault.type
    return reply(fault)
