"""vLLM's /classify and /score, and /rerank as Cohere, Jina and vLLM have it: what an adapter's own head says of texts, and of answers to
questions."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from trimtab.errors import AdapterError
from trimtab.http.ask import adapter_of
from trimtab.http.auth import Caller, S, caller
from trimtab.http.embeddings import MAX_INPUTS, Inputs, Texts, inputs_of, pooled
from trimtab.http.errors import Fault, documented
from trimtab.http.fields import INTEGRAL, Body, NotSupported, Text, Truncated, off
from trimtab.http.limits import read_body
from trimtab.http.prompts import answer_ids, kept_of, text_ids
from trimtab.http.schema import takes
from trimtab.http.send import WholeAnswer
from trimtab.http.services import Services
from trimtab.http.steps import headers_of
from trimtab.serve.request import Delta, head_problem
from trimtab.serve.served import Served
from trimtab.serve.tenants import Tenant
from trimtab.store.files import Refusal

router = APIRouter(dependencies=[Depends(caller)])
FEW = 8
"""Texts that are tokenized in about the time in which an adapter's small files are read."""
ERRORS = documented(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)


class Scored(Body):
    """What both routes take."""

    model: str = Field(min_length=1, max_length=256, description="An adapter with a head.")
    use_activation: bool | None = Field(None, description="false: scores as the head gives them, no probabilities.")
    activation: bool | None = Field(None, description="vLLM's older name of use_activation.")

    user: Any = Field(None, description="Changes nothing.")
    priority: Any = Field(None, description="vLLM's. Changes nothing.")
    truncate_prompt_tokens: Truncated = None

    @property
    def raw(self) -> bool:
        return False in (self.use_activation, self.activation)


class ClassifyBody(Scored):
    """POST /classify"""

    input: Inputs = Field(description="A text, texts, token ids, or lists of token ids.")
    add_special_tokens: bool | None = Field(True, description="false: no start token comes before a text.")
    messages: NotSupported = None


class ScoreBody(Scored):
    """POST /v1/score. One question for all answers, or one for each."""

    text_1: Text | Texts | None = Field(None, description="A question, or questions.")
    text_2: Text | Texts | None = Field(None, description="An answer, or answers.")
    queries: Text | Texts | None = Field(None, description="vLLM's newer name of text_1.")
    documents: Text | Texts | None = Field(None, description="vLLM's newer name of text_2.")

    @model_validator(mode="after")
    def _is_whole(self) -> ScoreBody:
        if (self.text_1 is None) == (self.queries is None) or (self.text_2 is None) == (self.documents is None):
            raise PydanticCustomError("missing", "must have text_1 and text_2, or queries and documents")
        return self

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Each answer with its question. Fault (400) where their numbers do not go together."""
        left, right = (
            [given] if isinstance(given, str) else given or [] for given in (self.text_1 or self.queries, self.text_2 or self.documents)
        )
        if len(left) not in (1, len(right)):
            text = f"text_1: {len(left)} questions for {len(right)} answers; give one, or one for each"
            raise Fault(text, param="queries" if self.text_1 is None else "text_1", code="invalid_value")
        return list(zip(left * len(right) if len(left) == 1 else left, right, strict=True))


class Document(Body):
    text: Text


class RerankBody(Scored):
    """POST /v1/rerank"""

    query: Text
    documents: Annotated[list[Text | Document], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)] = Field(
        description="Texts, or objects with a text."
    )
    top_n: Annotated[int, Field(ge=0), INTEGRAL] | None = Field(None, description="So many results, the best ones; 0: all.")
    return_documents: bool | None = Field(True, description="false: results name their documents by index alone.")
    max_chunks_per_doc: NotSupported = None
    max_tokens_per_doc: NotSupported = None
    rank_fields: Annotated[Any, off(["text"])] = None


BODIES = (ClassifyBody, ScoreBody, RerankBody)


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int


class Class(BaseModel):
    """label: the likeliest. probs: of all labels, in the head's order."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyReply(BaseModel):
    id: str
    object: str
    created: int
    model: str
    data: list[Class]
    usage: Usage


class Score(BaseModel):
    index: int
    object: str
    score: float


class ScoreReply(BaseModel):
    id: str
    object: str
    created: int
    model: str
    data: list[Score]
    usage: Usage


class Told(BaseModel):
    text: str


class Ranked(BaseModel):
    """index: of the document in the request."""

    index: int
    relevance_score: float
    document: Told | None = None


class RerankUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class RerankReply(BaseModel):
    """results: the best first."""

    id: str
    model: str
    results: list[Ranked]
    usage: RerankUsage


@router.post("/classify", responses=ERRORS | {200: {"model": ClassifyReply}}, openapi_extra=takes(ClassifyBody))
async def classify(request: Request, tenant: Caller, s: S) -> Response:
    """The label of each text, with the probability of each label: softmax, or the sigmoid of a head with one score."""
    body = await read_body(request, ClassifyBody, s)
    texts = inputs_of(body.input)
    adapter = await _adapter(request, body, tenant, s, len(texts), many=True)
    last = kept_of(body.truncate_prompt_tokens, s.words)
    ids = await text_ids(texts, tenant, s, start=body.add_special_tokens is not False, param="input", last=last)

    def told(i: int, delta: Delta) -> dict[str, Any]:
        probs = _scores(delta, body.raw)
        return {"index": i, "label": delta.labels[int(probs.argmax())], "probs": probs.tolist(), "num_classes": len(probs)}

    return await _answered(request, "classify", body, ids, told, adapter, tenant, s)


@router.post("/score", include_in_schema=False)
@router.post("/v1/score", responses=ERRORS | {200: {"model": ScoreReply}}, openapi_extra=takes(ScoreBody))
async def score(request: Request, tenant: Caller, s: S) -> Response:
    """How good each answer to its question is, by a head with one score: its sigmoid."""
    body = await read_body(request, ScoreBody, s)
    pairs = body.pairs
    adapter = await _adapter(request, body, tenant, s, len(pairs))
    last = kept_of(body.truncate_prompt_tokens, s.words)
    ids = await answer_ids(pairs, "text_2" if body.documents is None else "documents", tenant, s, last=last)

    def told(i: int, delta: Delta) -> dict[str, Any]:
        return {"index": i, "object": "score", "score": _score(delta, body)}

    return await _answered(request, "score", body, ids, told, adapter, tenant, s)


@router.post("/rerank", include_in_schema=False)
@router.post("/v2/rerank", include_in_schema=False)
@router.post("/v1/rerank", responses=ERRORS | {200: {"model": RerankReply}}, openapi_extra=takes(RerankBody))
async def rerank(request: Request, tenant: Caller, s: S) -> Response:
    """Documents by how well they answer a query, the best first; their scores are those of /v1/score."""
    body = await read_body(request, RerankBody, s)
    adapter = await _adapter(request, body, tenant, s, len(body.documents))
    documents = [d if isinstance(d, str) else d.text for d in body.documents]
    last = kept_of(body.truncate_prompt_tokens, s.words)
    ids = await answer_ids([(body.query, text) for text in documents], "documents", tenant, s, last=last)
    found = await pooled(request, ids, "head", adapter, tenant, s)

    def written() -> bytes:
        scores = [_score(delta, body) for delta in found]
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[: body.top_n or len(scores)]
        shown = body.return_documents is not False
        results = [{"index": i, "relevance_score": scores[i]} | ({"document": {"text": documents[i]}} if shown else {}) for i in best]
        usage = {"prompt_tokens": sum(map(len, ids)), "total_tokens": sum(map(len, ids))}
        return json.dumps({"id": f"rerank-{uuid.uuid4().hex}", "model": body.model, "usage": usage, "results": results}).encode()

    answer = await s.words_work.run(tenant.name, written)
    return WholeAnswer(answer, request.scope["trimtab.record"], s.life, write_s=s.limits.write_s, headers=headers_of(adapter, s))


async def _adapter(request: Request, body: Scored, tenant: Tenant, s: Services, texts: int, *, many: bool = False) -> Served:
    """Whose head is asked of so many texts. Fault: 404 where there is no such adapter, 400 where it is the base, or where its head is
    another one or missing. The engine says that too; of more than FEW texts it is asked before they are tokenized, which takes seconds.
    many: the head may have more than one label."""
    request.scope["trimtab.record"].model = body.model
    adapter = await adapter_of(body.model, tenant, s)
    if adapter is None:
        raise Fault("model: the base has no head that could score texts; name an adapter", param="model", code="invalid_value")
    s.admission.refuse_if_over(tenant)  # before the texts are tokenized
    if texts > FEW:
        await s.store_work.run(tenant.name, partial(_refuse_by_head, adapter, many))
    return adapter


def _refuse_by_head(adapter: Served, many: bool) -> None:
    try:
        head = adapter.head
    except (AdapterError, Refusal, OSError):
        return  # the engine says what is wrong with it
    if (problem := head_problem(head, "head")) is not None:
        raise problem
    if head is not None and not many:
        _refuse_labels(len(head.labels))


def _refuse_labels(count: int) -> None:
    if count != 1:
        text = f"model: its head has {count} labels, and a score is one number; POST /classify tells of labels"
        raise Fault(text, param="model", code="invalid_value")


async def _answered(
    request: Request,
    what: str,
    body: Scored,
    ids: Sequence[list[int]],
    told: Callable[[int, Delta], dict[str, Any]],
    adapter: Served,
    tenant: Tenant,
    s: Services,
) -> Response:
    found = await pooled(request, ids, "head", adapter, tenant, s)
    head = {"id": f"{what}-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": body.model}
    tokens = sum(map(len, ids))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, "prompt_tokens_details": None}

    def written() -> bytes:
        return json.dumps(head | {"data": [told(i, d) for i, d in enumerate(found)], "usage": usage}).encode()

    answer = await s.words_work.run(tenant.name, written)
    return WholeAnswer(answer, request.scope["trimtab.record"], s.life, write_s=s.limits.write_s, headers=headers_of(adapter, s))


def _score(delta: Delta, body: Scored) -> float:
    """Fault (400) where the head gives several numbers."""
    _refuse_labels(len(delta.labels))
    return float(_scores(delta, body.raw)[0])


def _scores(delta: Delta, raw: bool) -> np.ndarray:
    """Probabilities [K] as transformers' pipelines and vLLM form them: softmax, of one score its sigmoid."""
    score_K = np.frombuffer(delta.vector, dtype="<f4").astype(np.float64)
    if raw:
        return score_K
    with np.errstate(over="ignore"):
        e_K = np.exp(score_K - score_K.max())
        return e_K / e_K.sum() if len(e_K) > 1 else 1.0 / (1.0 + np.exp(-score_K))
