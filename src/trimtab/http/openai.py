"""OpenAI's routes: chat, completions, models. `_answer` has the steps of a request: name, room, prompt, engine, answer.

What a request holds is given back however it ends: the client disconnects, the engine refuses, or the answer is written.
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from trimtab.errors import TrimtabError
from trimtab.http.answer import Answer, failure, mailbox, merged
from trimtab.http.ask import AnswerPlan, plan, requests
from trimtab.http.auth import Caller, caller
from trimtab.http.errors import BAD_GRAMMAR, Fault, documented, fault_of
from trimtab.http.limits import read_body
from trimtab.http.replies import STREAM, ChatReply, CompletionReply, Model, ModelList
from trimtab.http.schema import ChatBody, CompletionBody, takes
from trimtab.http.send import WholeAnswer
from trimtab.http.services import Services
from trimtab.http.sse import EventStream
from trimtab.http.write import Writer
from trimtab.serve.catalog import MAX_NAME, ModelInfo
from trimtab.serve.request import Delta
from trimtab.serve.tenants import Tenant

router = APIRouter(prefix="/v1", dependencies=[Depends(caller)])
MAX_PAGE = 1000
"""Models in a list, unless the request says fewer."""
ERRORS = documented(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)


async def services(request: Request) -> Services:
    s: Services = request.app.state.services
    return s


S = Annotated[Services, Depends(services)]


@router.post("/chat/completions", responses=ERRORS | {200: {"model": ChatReply, "content": STREAM}}, openapi_extra=takes(ChatBody))
async def chat(request: Request, tenant: Caller, s: S) -> Response:
    """Answer a conversation, with the base's own chat template."""
    return await _answer(request, await read_body(request, ChatBody, s), tenant, s)


@router.post("/completions", responses=ERRORS | {200: {"model": CompletionReply, "content": STREAM}}, openapi_extra=takes(CompletionBody))
async def completions(request: Request, tenant: Caller, s: S) -> Response:
    """Continue a text or token ids, as they are."""
    return await _answer(request, await read_body(request, CompletionBody, s), tenant, s)


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


@router.get("/models/{model:path}", responses=documented(401, 403, 404, 500, 503))
async def model(model: str, tenant: Caller, s: S) -> Model:
    """One of them, by any name that a request may use."""
    try:
        found = await s.store_work.run(tenant.name, lambda: s.catalog.find(model, tenant))
    except TrimtabError as error:
        raise fault_of(error).about("model", "model_not_found") from None
    if found is None:
        return _model(ModelInfo(model, s.created, s.base_name), s)
    return _model(ModelInfo(model, s.created, found.ref, s.base_name, found.digest), s)


def _model(m: ModelInfo, s: Services) -> Model:
    return Model(id=m.id, created=m.created, root=m.root, parent=m.parent, digest=m.digest or None, max_model_len=s.words.max_positions)


async def _answer(request: Request, body: ChatBody | CompletionBody, tenant: Tenant, s: Services) -> Response:
    """From a checked body to its answer. Room is reserved before the prompt is tokenized, so that overload costs next to nothing."""
    record = request.scope["trimtab.record"]
    record.model, record.stream = body.model, bool(body.stream)
    what = await plan(body, tenant, s)
    record.choices, record.adapter = what.choices, None if what.adapter is None else what.adapter.ref
    ticket = s.admission.admit(tenant, what.choices)
    turn = partial(s.turns.take, tenant.name)
    answer = Answer(s.engine, mailbox(request.app), ticket, record, turn, what.n, _counted(what, tenant, s))
    try:
        answer.watch(request.receive)
        await _submit(answer, what, tenant, s)
        first = await answer.news()
        if (failed := _failed(first)) is not None:
            raise _about_grammar(failed, what)
        writer = Writer(what, s.words, "fp_" + s.fingerprint.rpartition(":")[2][:12], partial(s.words_work.run, tenant.name))
        if body.stream:
            return EventStream(answer, writer, first, write_s=s.limits.write_s, headers=_headers(what, s))
        try:
            whole = await _whole(answer, first, what.choices)
        except Fault as fault:
            raise _about_grammar(fault, what) from None
    except BaseException:
        answer.close()
        raise
    answer.close()
    told = await writer.whole(whole, answer.usage)
    return WholeAnswer(told, record, s.life, write_s=s.limits.write_s, headers=_headers(what, s))


async def _submit(answer: Answer, what: AnswerPlan, tenant: Tenant, s: Services) -> None:
    asked = await requests(what, tenant, s)
    try:
        answer.submit(asked)
    except TrimtabError as error:
        raise _about_grammar(fault_of(error), what) from None


def _about_grammar(fault: Fault, what: AnswerPlan) -> Fault:
    """The fault of a request that was right but for its grammar names the field."""
    if fault.code != BAD_GRAMMAR:
        return fault
    return fault.about("structured_outputs" if what.body.structured_outputs is not None else "response_format", "invalid_value")


async def _whole(answer: Answer, first: dict[int, Delta], choices: int) -> list[Delta]:
    """Every choice to its end. Fault if one fails."""
    found: dict[int, list[Delta]] = {i: [] for i in range(choices)}
    news = first
    while True:
        for i, delta in news.items():
            found[i].append(delta)
        if (failed := _failed(news)) is not None:
            raise failed
        if answer.over:
            return [_joined(d) for d in found.values()]
        news = await answer.news()


def _joined(deltas: list[Delta]) -> Delta:
    """All pieces of a choice as one, in one pass: an answer may have thousands."""
    if len(deltas) == 1:
        return deltas[0]
    tokens = tuple(t for d in deltas for t in d.tokens)
    return merged(Delta("".join(d.text for d in deltas[:-1]), ()), Delta(deltas[-1].text, tokens, deltas[-1].finish, deltas[-1].usage))


def _failed(news: dict[int, Delta]) -> Fault | None:
    return next((fault for d in news.values() if (fault := failure(d)) is not None), None)


def _headers(what: AnswerPlan, s: Services) -> dict[str, str]:
    """Headers that say what answers: the full name behind `model` at this moment, and its digest."""
    if what.adapter is None:
        return {"x-trimtab-base": _ascii(s.base_name)}
    return {"x-trimtab-adapter": f"{_ascii(what.adapter.ref)} {what.adapter.digest}"}


def _ascii(text: str) -> str:
    return text.encode("ascii", "replace").decode()


def _counted(what: AnswerPlan, tenant: Tenant, s: Services) -> Any:
    if s.tenants is None:
        return None
    usage, digest = s.tenants.usage, "" if what.adapter is None else what.adapter.digest
    return lambda prompt, completion: usage.add(tenant.id, digest, prompt, completion, requests=what.choices)
