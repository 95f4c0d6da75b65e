"""Requests that do something: only the page itself may send them, and their bodies have a limit.

A web page elsewhere can make a browser send a form to any address. It cannot make one say `application/json` without asking first, which
nothing here allows; and a browser says where a request comes from (`Origin`, `Sec-Fetch-Site`), which scripts of a page cannot change.
"""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from trimtab.http.errors import Fault, fault_of_body
from trimtab.http.limits import shape_of

MAX_BODY, MAX_DEPTH = 1 << 20, 32
M = TypeVar("M", bound=BaseModel)


async def from_this_page(request: Request) -> None:
    """Fault (403, 415) for a request that another page may have sent."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Fault(f"content-type {kind[:64]!r}: must be application/json", status=415, code="unsupported_media_type")
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    host = request.headers.get("host", "").lower()
    ours = origin is None or origin.lower() in (f"http://{host}", f"https://{host}")
    if not ours or site not in (None, "same-origin"):
        raise Fault("another page may not ask for this", status=403, code="wrong_origin")


async def body_of(request: Request, model: type[M]) -> M:
    """The request's body. Fault where it is too large, no JSON, or not such a `model`."""
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > MAX_BODY:
            raise Fault(f"the body is larger than {MAX_BODY:,} bytes", status=413, code="body_too_large", headers={"Connection": "close"})
    if shape_of(bytes(raw))[0] > MAX_DEPTH:
        raise Fault(f"the body nests lists and objects more than {MAX_DEPTH} deep", code="too_deep")
    try:
        content = from_json(bytes(raw), allow_inf_nan=False)
    except ValueError as error:
        raise Fault(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(content, dict):
        raise Fault("the body must be a JSON object", code="invalid_json")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise fault_of_body(error, content, model) from None
