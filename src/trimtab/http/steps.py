"""The steps of a request that the engine answers, whatever route it came by: name, room, prompt, engine, answer.

What a request holds is given back however it ends: the client disconnects, the engine refuses, or the answer is written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from fastapi import Request
from starlette.responses import Response

from trimtab.decode.answers import Reader
from trimtab.errors import TrimtabError
from trimtab.http.answer import Answer, first_failure, mailbox
from trimtab.http.ask import AnswerPlan, constraint_of, plan, requests
from trimtab.http.errors import BAD_GRAMMAR, Fault, fault_of
from trimtab.http.schema import ChatBody, CompletionBody
from trimtab.http.send import WholeAnswer
from trimtab.http.services import Services
from trimtab.http.sse import EventStream
from trimtab.http.write import Writer
from trimtab.serve.composed import usage_of
from trimtab.serve.leases import WAIT_SECONDS
from trimtab.serve.request import Delta
from trimtab.serve.request import Request as EngineRequest
from trimtab.serve.served import Served
from trimtab.serve.tenants import Tenant


async def opened(request: Request, adapter: Served | None, choices: int, n: int, tenant: Tenant, s: Services) -> Answer:
    """Room for so many of the engine's requests, n to each prompt; watched from now on, until it is closed."""
    record = request.scope["trimtab.record"]
    record.choices, record.adapter = choices, None if adapter is None else adapter.ref
    await _has_its_part(tenant, choices, s)
    ticket = s.admission.admit(tenant, choices)
    turn, counted = partial(s.turns.take, tenant.name), _counted(adapter, choices, tenant, s)
    answer = Answer(s.engine, mailbox(request.app), ticket, record, turn, n, counted)
    answer.watch(request.receive)
    return answer


async def _has_its_part(tenant: Tenant, choices: int, s: Services) -> None:
    """Where servers share a tenant's limits: wait, for a moment at most, until this one's part is large enough. Mostly it is."""
    leases, loop = s.admission.leases, asyncio.get_running_loop()
    end = loop.time() + WAIT_SECONDS
    while leases is not None and leases.short(tenant, choices) and (left := end - loop.time()) > 0:
        await asyncio.wait([asyncio.wrap_future(leases.exchanged())], timeout=left)


async def answered(
    request: Request, body: ChatBody | CompletionBody, tenant: Tenant, s: Services, writer_of: Callable[..., Writer] = Writer
) -> Response:
    """From a checked body to its answer. Room is reserved before the prompt is tokenized, so that overload costs next to nothing.
    writer_of: makes who writes the answer, of what `Writer` is made of."""
    record = request.scope["trimtab.record"]
    record.model, record.stream = body.model, bool(body.stream)
    what = await plan(body, tenant, s)
    answer = await opened(request, what.adapter, what.choices, what.n, tenant, s)
    try:
        asked, readers = await _submit(answer, what, tenant, s)
        first = await answer.news()
        if (failed := first_failure(first)) is not None:
            raise _about_grammar(failed, what)
        writer = writer_of(
            what, s.words, "fp_" + s.fingerprint.rpartition(":")[2][:12], partial(s.words_work.run, tenant.name), readers, asked
        )
        if body.stream:
            return EventStream(answer, writer, first, write_s=s.limits.write_s, headers=headers_of(what.adapter, s))
        try:
            whole = await whole_answer(answer, first, what.choices)
        except Fault as fault:
            raise _about_grammar(fault, what) from None
    except BaseException:
        answer.close()
        raise
    answer.close()
    told = await writer.whole(_best(whole, what), answer.usage)
    return WholeAnswer(told, record, s.life, write_s=s.limits.write_s, headers=headers_of(what.adapter, s))


async def _submit(answer: Answer, what: AnswerPlan, tenant: Tenant, s: Services) -> tuple[list[EngineRequest], list[Reader | None]]:
    asked, readers = await requests(what, tenant, s)
    try:
        answer.submit(asked)
    except TrimtabError as error:
        raise _about_grammar(fault_of(error), what) from None
    return asked, readers


def _about_grammar(fault: Fault, what: AnswerPlan) -> Fault:
    """The fault of a request that was right but for its grammar names the field."""
    if fault.code != BAD_GRAMMAR:
        return fault
    if isinstance(what.body, ChatBody) and what.body.tools and what.body.tool_choice != "none":
        return fault.about("tools", "invalid_value")
    asked = constraint_of(what.body)
    return fault if asked is None else fault.about(asked[0], "invalid_value")


async def whole_answer(answer: Answer, first: dict[int, Delta], choices: int) -> list[Delta]:
    """Every choice to its end. Fault if one fails."""
    found: dict[int, list[Delta]] = {i: [] for i in range(choices)}
    news = first
    while True:
        for i, delta in news.items():
            found[i].append(delta)
        if (failed := first_failure(news)) is not None:
            raise failed
        if answer.over:
            return [_joined(d) for d in found.values()]
        news = await answer.news()


def _joined(deltas: list[Delta]) -> Delta:
    """All pieces of a choice as one, in one pass: an answer may have thousands."""
    if len(deltas) == 1:
        return deltas[0]
    tokens, prompt = (tuple(t for d in deltas for t in getattr(d, name)) for name in ("tokens", "prompt"))
    pooled = next((d for d in deltas if d.vector), deltas[-1])
    text = "".join(d.text for d in deltas)
    return replace(deltas[-1], text=text, tokens=tokens, prompt=prompt, vector=pooled.vector, labels=pooled.labels)


def _best(choices: list[Delta], what: AnswerPlan) -> list[Delta]:
    """Of the answers to each prompt those that are told: the ones with the highest log-probability a token, each with its prompt."""
    found = list[Delta]()
    for begin in range(0, len(choices), what.n):
        mine = [replace(d, prompt=choices[begin].prompt) for d in choices[begin : begin + what.n]]
        if what.told < what.n:
            mine.sort(key=lambda d: -sum(t.logprob or 0.0 for t in d.tokens) / max(1, len(d.tokens)))
        found += mine[: what.told]
    return found


def headers_of(adapter: Served | None, s: Services) -> dict[str, str]:
    """Headers that say what answers: the full name behind `model` at this moment, and its digest."""
    if adapter is None:
        return {"x-trimtab-base": _ascii(s.base_name)}
    return {"x-trimtab-adapter": f"{_ascii(adapter.ref)} {adapter.digest}"}


def _ascii(text: str) -> str:
    """As a header takes it: a folder's name may hold anything."""
    return "".join(char if char.isascii() and char.isprintable() else "?" for char in text)


def _counted(adapter: Served | None, choices: int, tenant: Tenant, s: Services) -> Callable[[int, int], None] | None:
    """Writes the usage of an answer down; None in local mode."""
    if s.tenants is None:
        return None
    usage, digest = s.tenants.usage, "" if adapter is None else usage_of(adapter.digest)
    return lambda prompt, completion: usage.add(tenant.id, digest, prompt, completion, requests=choices)
