"""OpenAI's /v1/embeddings: one vector for each text, from the hidden states of the base or of an adapter."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from trimtab.http.ask import deadline, model_of
from trimtab.http.auth import Caller, S, caller
from trimtab.http.errors import Fault, documented
from trimtab.http.fields import Body, Ids, NotSupported, Text, Truncated
from trimtab.http.limits import read_body
from trimtab.http.prompts import kept_of, text_ids
from trimtab.http.schema import AdapterPart, takes
from trimtab.http.send import WholeAnswer
from trimtab.http.services import Services
from trimtab.http.steps import headers_of, opened, whole_answer
from trimtab.serve.composed import MAX_PARTS
from trimtab.serve.request import Delta, Pooling, SamplingParams
from trimtab.serve.request import Request as EngineRequest
from trimtab.serve.served import Served
from trimtab.serve.tenants import Tenant

router = APIRouter(prefix="/v1", dependencies=[Depends(caller)])
ERRORS = documented(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)
MAX_INPUTS, MAX_NUMBERS = 2048, 1 << 21
"""Texts of a request, and numbers of its answer."""
Texts = Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]
Inputs = Text | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]


class EmbeddingsBody(Body):
    """POST /v1/embeddings"""

    model: str = Field(min_length=1, max_length=256, description="As in the other routes.")
    adapters: Annotated[list[AdapterPart], Field(fail_fast=True, max_length=MAX_PARTS)] | None = None
    input: Inputs = Field(description="A text, texts, token ids, or lists of token ids.")
    encoding_format: Literal["float", "base64"] | None = Field("float", description="base64: of fp32 numbers, little endian.")
    pooling: Literal["mean", "last"] | None = Field(
        "mean", description="Of the hidden states after the final norm: their mean over the text's tokens, or that of its last token."
    )
    normalize: bool | None = Field(False, description="Give each vector the length 1.")
    add_special_tokens: bool | None = Field(True, description="false: no start token comes before a text.")
    dimensions: Annotated[int, Field(ge=1)] | None = Field(None, description="Only as many as there are: vectors are not cut.")

    user: Any = Field(None, description="Changes nothing.")
    priority: Any = Field(None, description="vLLM's. Changes nothing.")
    messages: NotSupported = None
    truncate_prompt_tokens: Truncated = None


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsReply(BaseModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage


@router.post("/embeddings", responses=ERRORS | {200: {"model": EmbeddingsReply}}, openapi_extra=takes(EmbeddingsBody))
async def embeddings(request: Request, tenant: Caller, s: S) -> Response:
    """A vector for each text or list of token ids."""
    body = await read_body(request, EmbeddingsBody, s)
    record = request.scope["trimtab.record"]
    record.model = body.model
    if body.dimensions not in (None, s.hidden_size):
        text = f"dimensions: vectors have {s.hidden_size} numbers here, and are not cut"
        raise Fault(text, param="dimensions", code="not_supported")
    inputs = inputs_of(body.input)
    if len(inputs) * s.hidden_size > MAX_NUMBERS:
        text = f"input: {len(inputs)} vectors of {s.hidden_size} numbers; at most {MAX_NUMBERS} numbers in an answer"
        raise Fault(text, param="input", code="invalid_value")
    adapter = await model_of(body, tenant, s)
    s.admission.refuse_if_over(tenant)  # before the texts are tokenized
    last = kept_of(body.truncate_prompt_tokens, s.words)
    prompts = await text_ids(inputs, tenant, s, start=body.add_special_tokens is not False, param="input", last=last)
    found = await pooled(request, prompts, body.pooling or "mean", adapter, tenant, s)
    told = await s.words_work.run(tenant.name, lambda: _written(body, [d.vector for d in found], sum(map(len, prompts))))
    return WholeAnswer(told, record, s.life, write_s=s.limits.write_s, headers=headers_of(adapter, s))


async def pooled(
    request: Request, prompts: Sequence[list[int]], pooling: Pooling, adapter: Served | None, tenant: Tenant, s: Services
) -> list[Delta]:
    """What the engine tells of each prompt, with its vector. They are computed some at a time: half of what the tenant may have under way,
    so that it can ask for something else meanwhile."""
    name, end, nothing = f"pool-{uuid.uuid4().hex}", deadline(s), SamplingParams(max_tokens=0)
    at_once, found = min(s.limits.choices, max(1, s.admission.most(tenant) // 2)), list[Delta]()
    for begin in range(0, len(prompts), at_once):
        part = [
            EngineRequest(f"{name}-{begin + i}", tuple(ids), nothing, adapter, tenant.id, tenant.weight, end, pooling=pooling)
            for i, ids in enumerate(prompts[begin : begin + at_once])
        ]
        answer = await opened(request, adapter, len(part), 1, tenant, s)
        try:
            answer.submit(part)
            found += await whole_answer(answer, await answer.news(), len(part))
        finally:
            answer.close()
    record = request.scope["trimtab.record"]
    record.choices = len(prompts)
    record.prompt_tokens, record.cached_tokens = (sum(getattr(d.usage, n) for d in found) for n in ("prompt", "cached"))
    return found


def inputs_of(given: str | list[str] | list[int] | list[list[int]]) -> list[str] | list[list[int]]:
    """A body's texts, or lists of token ids."""
    if isinstance(given, str):
        return [given]
    return [given] if isinstance(given[0], int) else given  # type: ignore[list-item,return-value]


def _written(body: EmbeddingsBody, vectors: Sequence[bytes], tokens: int) -> bytes:
    data = []
    for i, raw in enumerate(vectors):
        vector = np.frombuffer(raw, dtype="<f4")
        if body.normalize:
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
        told = base64.b64encode(vector.astype("<f4").tobytes()).decode() if body.encoding_format == "base64" else vector.tolist()
        data.append(json.dumps({"object": "embedding", "index": i, "embedding": told}))
    usage = json.dumps({"prompt_tokens": tokens, "total_tokens": tokens})
    return f'{{"object": "list", "data": [{", ".join(data)}], "model": {json.dumps(body.model)}, "usage": {usage}}}'.encode()
