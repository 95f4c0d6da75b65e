"""OpenAI's routes: chat, completions, models."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from trimtab.http.ask import adapter_of
from trimtab.http.auth import Caller, S, caller
from trimtab.http.errors import documented
from trimtab.http.limits import read_body
from trimtab.http.replies import STREAM, ChatReply, CompletionReply, Model, ModelList
from trimtab.http.schema import ChatBody, CompletionBody, takes
from trimtab.http.services import Services
from trimtab.http.steps import answered
from trimtab.serve.catalog import MAX_NAME, ModelInfo

router = APIRouter(prefix="/v1", dependencies=[Depends(caller)])
MAX_PAGE = 1000
"""Models in a list, unless the request says fewer."""
ERRORS = documented(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)


@router.post("/chat/completions", responses=ERRORS | {200: {"model": ChatReply, "content": STREAM}}, openapi_extra=takes(ChatBody))
async def chat(request: Request, tenant: Caller, s: S) -> Response:
    """Answer a conversation, with the base's own chat template."""
    return await answered(request, await read_body(request, ChatBody, s), tenant, s)


@router.post("/completions", responses=ERRORS | {200: {"model": CompletionReply, "content": STREAM}}, openapi_extra=takes(CompletionBody))
async def completions(request: Request, tenant: Caller, s: S) -> Response:
    """Continue a text or token ids, as they are."""
    return await answered(request, await read_body(request, CompletionBody, s), tenant, s)


@router.get("/models", responses=documented(400, 401, 403, 500, 503))
async def models(
    tenant: Caller,
    s: S,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
    after: Annotated[str, Query(max_length=MAX_NAME)] = "",
) -> ModelList:
    """The base, and the adapters that this key may use: at most `limit` of them, those behind the id `after`."""
    found = await s.store_work.run(tenant.name, lambda: list(islice(s.catalog.models(tenant, after), limit + 1)))
    page = [_model(m, s) for m in found[:limit]]
    first, last = (page[0].id, page[-1].id) if page else (None, None)
    return ModelList(data=page, first_id=first, last_id=last, has_more=len(found) > limit)


@router.get("/models/{model:path}", responses=documented(400, 401, 403, 404, 500, 503))
async def model(model: str, tenant: Caller, s: S) -> Model:
    """One of them, by any name that a request may use."""
    if (found := await adapter_of(model, tenant, s)) is None:
        return _model(ModelInfo(model, s.created, s.base_name), s)
    return _model(ModelInfo(model, s.catalog.created(model, found, tenant), found.ref, s.base_name, found.digest), s)


def _model(m: ModelInfo, s: Services) -> Model:
    return Model(id=m.id, created=m.created, root=m.root, parent=m.parent, digest=m.digest or None, max_model_len=s.words.max_positions)
