"""From a checked body to requests for the engine: settings of sampling, a grammar, and the adapter that `model` names.

The cheapest reasons for a refusal are checked first: the name, then room, then the prompt's tokens.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

from trimtab.decode.answers import Reader
from trimtab.errors import TrimtabError
from trimtab.http.errors import Fault, fault_of
from trimtab.http.prompts import aside, conversation_ids, is_small, kept_of, text_ids
from trimtab.http.schema import AdapterPart, ChatBody, CompletionBody, Sampled, StructuredOutputs
from trimtab.http.services import Services, Words
from trimtab.http.tools import reader, sampled, tools_in
from trimtab.serve.request import Grammar, Request, SamplingParams
from trimtab.serve.served import Served
from trimtab.serve.tenants import Tenant

T = TypeVar("T")


@dataclass(frozen=True)
class AnswerPlan:
    """What a body asks for. id: of the answer. adapter: None for the base. choices: n answers to each prompt, of which `told` are told: the
    best ones."""

    id: str
    body: ChatBody | CompletionBody
    adapter: Served | None
    n: int
    choices: int
    told: int

    @property
    def chat(self) -> bool:
        return isinstance(self.body, ChatBody)

    @property
    def usage_in_stream(self) -> bool:
        return self.body.stream_options is not None and bool(self.body.stream_options.include_usage)

    @property
    def usage_so_far(self) -> bool:
        """Whether each event of a stream tells it."""
        told = self.body.stream_options
        return told is not None and bool(told.include_usage and told.continuous_usage_stats)


async def plan(body: ChatBody | CompletionBody, tenant: Tenant, s: Services) -> AnswerPlan:
    """Find the adapter and count the answers. Fault: 404 where there is no such model, 400 where there are too many answers."""
    adapter = await model_of(body, tenant, s)
    told = _or(body.n, 1)
    n = _best_of(body, told) if isinstance(body, CompletionBody) else told
    choices = n * (len(prompts_of(body)) if isinstance(body, CompletionBody) else 1)
    if choices > s.limits.choices:
        raise Fault(f"n: {choices} answers (n times the prompts); at most {s.limits.choices} in a request", param="n", code="invalid_value")
    prefix = "chatcmpl" if isinstance(body, ChatBody) else "cmpl"
    return AnswerPlan(f"{prefix}-{uuid.uuid4().hex}", body, adapter, n, choices, told)


def _best_of(body: CompletionBody, n: int) -> int:
    """Answers to each prompt, of which the best n are told."""
    if body.best_of is None or body.best_of == n:
        return n
    if body.best_of < n:
        raise Fault(f"best_of: {body.best_of} is less than n", param="best_of", code="invalid_value")
    if body.stream:
        raise Fault("best_of: which answers are best is known only at their end; leave stream out", param="best_of", code="invalid_value")
    return body.best_of


class Named(Protocol):
    """A body that says who answers."""

    @property
    def model(self) -> str: ...
    @property
    def adapters(self) -> list[AdapterPart] | None: ...


async def model_of(body: Named, tenant: Tenant, s: Services) -> Served | None:
    """The adapter that a body asks for, or the sum of several; None for the base. Fault: 404 where there is no such model."""
    adapter = await adapter_of(body.model, tenant, s)
    if not body.adapters:
        return adapter
    if adapter is not None:
        text = f"adapters: model is the base's name beside it, {s.base_name}; an adapter is named in one place"
        raise Fault(text, param="adapters", code="invalid_value")
    return await _composed(body.adapters, tenant, s)


async def adapter_of(model: str, tenant: Tenant, s: Services) -> Served | None:
    """What this tenant means by a name, None for the base; looked up off the event loop where the store has to be read. Fault (404) where
    there is no such model."""
    find = partial(s.catalog.find, model, tenant)
    try:
        return await s.store_work.run(tenant.name, find) if s.catalog.looks_in_store(model, tenant) else find()
    except TrimtabError as error:
        raise _about_names(fault_of(error), "model") from None


async def _composed(parts: Sequence[AdapterPart], tenant: Tenant, s: Services) -> Served | None:
    """The sum of these. Fault: 404 where this tenant has no such adapter."""
    asked = [(part.name, part.scale) for part in parts]
    try:
        return await s.store_work.run(tenant.name, partial(s.catalog.compose, asked, tenant))
    except TrimtabError as error:
        raise _about_names(fault_of(error), "adapters") from None


def _about_names(fault: Fault, param: str) -> Fault:
    return fault.about(param, "model_not_found" if fault.http_status == 404 else "invalid_value")


async def requests(plan: AnswerPlan, tenant: Tenant, s: Services) -> tuple[list[Request], list[Reader | None]]:
    """The engine's requests, one for each choice, in order, and who reads their answers. The first of a prompt computes it, and tells of it
    where that was asked for. Fault (400) if a prompt is too long or cannot be used."""
    sampling = sampling_of(plan.body, s.words.vocab_size)  # before the prompt's tokens, which cost more
    if plan.n > plan.told:
        sampling = replace(sampling, logprobs=sampling.logprobs or 0)
    readers: list[Reader | None] = [None] * plan.choices
    last = kept_of(plan.body.truncate_prompt_tokens, s.words, _or(plan.body.max_completion_tokens, _or(plan.body.max_tokens, 1)))
    if isinstance(plan.body, ChatBody):
        chat = partial(_chat, plan.body, sampling, plan.choices, s.words, last)
        ids, sampling, readers = await aside("messages", is_small(plan.body), chat, tenant, s)
        prompts = [ids]
    else:
        prompts = await text_ids(prompts_of(plan.body), tenant, s, start=plan.body.add_special_tokens is not False, last=last)
    end = deadline(s)
    found: list[Request] = []
    kept = 0
    for ids in prompts:
        room = s.words.max_positions - len(ids)
        own = replace(sampling, max_tokens=min(sampling.max_tokens, room), min_tokens=min(sampling.min_tokens, room))
        kept += plan.n * own.max_tokens * (0 if own.logprobs is None else 1 + own.logprobs)  # the chosen token's own too
        kept += plan.told * len(ids) * (0 if own.prompt_logprobs is None else 1 + own.prompt_logprobs)
        if kept > s.limits.logprobs:
            field = "top_logprobs" if plan.chat and own.logprobs else "logprobs" if own.logprobs is not None else "prompt_logprobs"
            text = f"{field}: the answers may bring {kept} log-probabilities; at most {s.limits.logprobs}. Give a smaller max_tokens"
            text += "" if own.prompt_logprobs is None else ", or a shorter prompt"
            raise Fault(text, param=field, code="invalid_value")
        for i in range(plan.n):
            seed = None if own.seed is None else (own.seed + i) % (1 << 63)
            mine = replace(own, seed=seed, prompt_logprobs=None if i else own.prompt_logprobs)
            name, like = f"{plan.id}-{len(found)}", f"{plan.id}-{len(found) - i}" if i else ""
            found.append(Request(name, tuple(ids), mine, plan.adapter, tenant.id, tenant.weight, end, like=like))
    return found, readers


async def prompt_tokens(body: ChatBody, tenant: Tenant, s: Services) -> int:
    """How many tokens the prompt of this chat has. Fault where the chat would be refused for its model, its tools' choice or its length."""
    await model_of(body, tenant, s)

    def count() -> int:
        tools = tools_in(body, s.words)
        return len(conversation_ids(body, s.words, None if tools is None else tools.shown))

    return await aside("messages", is_small(body), count, tenant, s)


def deadline(s: Services) -> float | None:
    """When a request that begins now must have its last token."""
    return None if s.limits.request_s is None else time.monotonic() + s.limits.request_s


def sampling_of(body: ChatBody | CompletionBody, vocab_size: int) -> SamplingParams:
    """How to sample; max_tokens is as large as the body leaves it. Fault (400) if fields contradict each other."""
    most = body.max_tokens
    if body.max_completion_tokens is not None and most is not None and most != body.max_completion_tokens:
        raise Fault("max_tokens and max_completion_tokens differ; give one", param="max_tokens", code="invalid_value")
    most = _or(body.max_completion_tokens if most is None else most, 1 << 30 if isinstance(body, ChatBody) else 16)
    if isinstance(body, ChatBody) and body.top_logprobs and not body.logprobs:
        raise Fault("top_logprobs: needs logprobs: true", param="top_logprobs", code="invalid_value")
    temperature, top_p = _or(body.temperature, 1.0), _or(body.top_p, 1.0)
    if top_p == 0 and temperature > 0:
        raise Fault("top_p: must be greater than 0, unless temperature is 0", param="top_p", code="invalid_value")
    if body.prompt_logprobs is not None and body.stream:
        raise Fault("prompt_logprobs: do not come in a stream; leave stream out", param="prompt_logprobs", code="invalid_value")
    biases = tuple((int(token), bias) for token, bias in (body.logit_bias or {}).items())
    if (large := max((i for i, _ in biases), default=0)) >= vocab_size:
        raise Fault(f"logit_bias: token id {large} is not in 0..{vocab_size - 1}", param="logit_bias", code="invalid_value")
    constraint, least = constraint_of(body), _or(body.min_tokens, 0)
    if least > most:
        raise Fault(f"min_tokens: {least} is more than max_tokens", param="min_tokens", code="invalid_value")
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return SamplingParams(
        max_tokens=most,
        temperature=temperature,
        top_p=top_p or 1.0,
        top_k=max(0, _or(body.top_k, 0)),
        min_p=_or(body.min_p, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        seed=None if body.seed is None else body.seed % (1 << 63),
        stop=stop,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        min_tokens=least,
        logprobs=top_of(body) if wants_logprobs(body) else None,
        grammar=None if constraint is None else constraint[1],
        prompt_logprobs=prompt_top_of(body),
        logit_bias=biases,
        with_stop=bool(body.include_stop_str_in_output or body.no_stop_trim),
        all_shown=body.skip_special_tokens is False,
    )


def prompt_top_of(body: ChatBody | CompletionBody) -> int | None:
    """Alternatives that come with each token of the prompt; None if its log-probabilities are not asked for."""
    echoed = body.logprobs if isinstance(body, CompletionBody) and body.echo else None
    asked = [most for most in (body.prompt_logprobs, echoed) if most is not None]
    return max(asked) if asked else None


def wants_logprobs(body: ChatBody | CompletionBody) -> bool:
    """Whether log-probabilities come with the tokens: completions ask for a number of alternatives, which may be 0."""
    return bool(body.logprobs) if isinstance(body, ChatBody) else body.logprobs is not None


def top_of(body: ChatBody | CompletionBody) -> int:
    """Alternatives that come with each token."""
    return (body.top_logprobs if isinstance(body, ChatBody) else body.logprobs) or 0


def constraint_of(body: Sampled) -> tuple[str, Grammar] | None:
    """(the field that constrains the answer, its grammar); Fault (400) if fields contradict each other."""
    form, own, found = body.response_format, body.structured_outputs, _constraints(body)
    if own is not None and sum(field.startswith("structured_outputs.") for field in found) != 1:
        text = "structured_outputs: give exactly one of json, json_object, regex, choice and grammar"
        raise Fault(text, param="structured_outputs", code="invalid_value")
    if form is not None and (form.type == "json_schema") != (form.json_schema is not None):
        text = "response_format: json_schema goes with type json_schema, and only with it"
        raise Fault(text, param="response_format", code="invalid_value")
    if form is not None and sum(x is not None for x in (form.json_schema, form.schema_, form.value)) > (form.type != "text"):
        text = "response_format: a schema goes with json_schema or json_object, and is json_schema, schema or value"
        raise Fault(text, param="response_format", code="invalid_value")
    if len(set(found.values())) > 1:  # guidance sends one grammar under two names
        raise Fault(f"{' and '.join(found)}: give one of them", param="structured_outputs", code="invalid_value")
    return next(((field.partition(".")[0], grammar) for field, grammar in found.items()), None)


def _constraints(body: Sampled) -> dict[str, Grammar]:
    """All of OpenAI's response_format, vLLM's structured_outputs, its older guided_*, and other servers' names of them, by field."""
    form, own = body.response_format, body.structured_outputs or StructuredOutputs.model_construct()
    schema = None if form is None else form.json_schema.schema_ if form.json_schema is not None else _or(form.schema_, form.value)
    schemas = {"response_format": schema, "structured_outputs.json": own.json_, "guided_json": body.guided_json}
    schemas["json_schema"] = body.json_schema
    objects = {
        "response_format": form is not None and form.type == "json_object" and schema is None,
        "structured_outputs.json_object": own.json_object,
    }
    regexes = {"structured_outputs.regex": own.regex, "guided_regex": body.guided_regex, "regex": body.regex}
    choices = {"structured_outputs.choice": own.choice, "guided_choice": body.guided_choice}
    grammars = {
        "structured_outputs.grammar": own.grammar,
        "guided_grammar": body.guided_grammar,
        "ebnf": body.ebnf,
        "grammar": body.grammar,
    }
    return {
        **{field: Grammar("json_schema", _schema_text(given, field)) for field, given in schemas.items() if given is not None},
        **{field: Grammar("json_object") for field, given in objects.items() if given},
        **{field: Grammar("regex", given) for field, given in regexes.items() if given is not None},
        **{field: Grammar("choice", json.dumps(given)) for field, given in choices.items() if given is not None},
        **{field: Grammar("grammar", given) for field, given in grammars.items() if given},
    }


def _schema_text(schema: dict[str, object], field: str) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except ValueError:  # 1e999 is JSON, but infinite once it is read
        text = f"{field}: the schema holds a number that is too large"
        raise Fault(text, param=field.partition(".")[0], code="invalid_value") from None


def _chat(
    body: ChatBody, sampling: SamplingParams, choices: int, words: Words, last: int | None
) -> tuple[list[int], SamplingParams, list[Reader | None]]:
    """A conversation's ids, its sampling with what tools add to it, and a reader for each answer."""
    tools = tools_in(body, words)
    ids = conversation_ids(body, words, None if tools is None else tools.shown, last)
    readers = [reader(tools, sampling.grammar is not None, words, ids, eager=bool(body.stream)) for _ in range(choices)]
    return ids, sampled(sampling, tools, words, ids), readers


def prompts_of(body: CompletionBody) -> list[str] | list[list[int]]:
    """Its prompts, texts or ids."""
    p = body.prompt
    if isinstance(p, str):
        return [p]
    return [p] if isinstance(p[0], int) else p  # type: ignore[list-item,return-value]


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
