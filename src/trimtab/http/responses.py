"""OpenAI's /v1/responses, without state: the same answers as /v1/chat/completions, told as items."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel
from starlette.responses import Response

from trimtab.http.auth import Caller, S, caller
from trimtab.http.errors import Fault, documented
from trimtab.http.limits import read_body
from trimtab.http.replies import STREAM
from trimtab.http.responses_schema import ResponsesBody, chat_of
from trimtab.http.responses_write import ResponseWriter
from trimtab.http.schema import takes
from trimtab.http.steps import answered

router = APIRouter(prefix="/v1", dependencies=[Depends(caller)])
ERRORS = documented(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)
NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
}
"""Fields of a chat, as this route names them."""


class ResponseReply(BaseModel):
    """output: items of type reasoning, message or function_call, in OpenAI's shapes. status: incomplete where max_output_tokens cut it."""

    id: str
    object: str
    created_at: int
    status: str
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any]


@router.post("/responses", responses=ERRORS | {200: {"model": ResponseReply, "content": STREAM}}, openapi_extra=takes(ResponsesBody))
async def responses(request: Request, tenant: Caller, s: S) -> Response:
    """Answer a text or a list of items, which holds all that the answer is to know: nothing is kept between requests."""
    body = await read_body(request, ResponsesBody, s)
    try:
        return await answered(request, chat_of(body), tenant, s, partial(ResponseWriter, body))
    except Fault as fault:
        top, rest = (fault.param or "").partition("[")[0], (fault.param or "").partition("[")
        if top in NAMES:
            fault.message = fault.message.replace(top, NAMES[top], 1)
            fault.param = NAMES[top] + "".join(rest[1:])
        raise
