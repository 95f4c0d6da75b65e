"""OpenAI's /v1/responses, without state: the same answers as /v1/chat/completions, told as items."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel
from starlette.responses import Response

from trimtab.http.ask import prompt_tokens
from trimtab.http.auth import Caller, S, caller
from trimtab.http.errors import Fault, documented
from trimtab.http.limits import read_body
from trimtab.http.replies import STREAM
from trimtab.http.responses_schema import ResponsesBody, chat_of
from trimtab.http.responses_write import ResponseWriter
from trimtab.http.schema import Chosen, takes
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
CHATS = re.compile(r"\b(max_tokens|max_completion_tokens|response_format)\b")


class ResponseReply(BaseModel):
    """output: items of type reasoning, message or function_call, in OpenAI's shapes. status: incomplete where max_output_tokens cut it."""

    id: str
    object: str
    created_at: int
    status: str
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any]


class InputTokensReply(BaseModel):
    object: Literal["response.input_tokens"]
    input_tokens: int


@router.post("/responses", responses=ERRORS | {200: {"model": ResponseReply, "content": STREAM}}, openapi_extra=takes(ResponsesBody))
async def responses(request: Request, tenant: Caller, s: S) -> Response:
    """Answer a text or a list of items, which holds all that the answer is to know: nothing is kept between requests."""
    body = await read_body(request, ResponsesBody, s)
    with _own_names():
        return await answered(request, chat_of(body), tenant, s, partial(ResponseWriter, body))


@router.post("/responses/input_tokens", responses=ERRORS, openapi_extra=takes(ResponsesBody))
async def input_tokens(request: Request, tenant: Caller, s: S) -> InputTokensReply:
    """Count the tokens that /v1/responses would read for this body. Nothing is computed."""
    body = await read_body(request, ResponsesBody, s)
    with _own_names():
        return InputTokensReply(object="response.input_tokens", input_tokens=await prompt_tokens(chat_of(body), tenant, s))


@contextmanager
def _own_names() -> Iterator[None]:
    """A fault about a chat's field names the field of this route that it came from."""
    try:
        yield
    except Fault as fault:
        top, rest = (fault.param or "").partition("[")[0], (fault.param or "").partition("[")
        if top in NAMES:
            fault.message = fault.message.replace(top, NAMES[top], 1)
            fault.param = NAMES[top] + "".join(rest[1:])
        elif top in Chosen.model_fields:  # it contradicts a field that has another name here
            fault.message = CHATS.sub(lambda name: NAMES[name[0]], fault.message)
        raise
