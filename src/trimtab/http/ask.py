"""From a checked body to requests for the engine: prompts as ids, settings of sampling, a grammar, and the adapter that `model` names.

The cheapest reasons for a refusal are checked first: the name, then room, then the prompt's tokens.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from trimtab.errors import DataError, TrimtabError
from trimtab.http.errors import Fault, fault_of
from trimtab.http.schema import ChatBody, CompletionBody, Conversation, Message, Sampled, StructuredOutputs
from trimtab.http.services import Services, TooLong, Words
from trimtab.serve.request import Grammar, Request, SamplingParams
from trimtab.serve.served import Served
from trimtab.serve.tenants import Tenant

SMALL = 4096
"""Characters that are tokenized on the event loop: a thread costs more than they do."""
T = TypeVar("T")


@dataclass(frozen=True)
class AnswerPlan:
    """What a body asks for. id, object: of the answer. choices: n answers to each prompt."""

    id: str
    body: ChatBody | CompletionBody
    adapter: Served | None
    n: int
    choices: int

    @property
    def chat(self) -> bool:
        return isinstance(self.body, ChatBody)

    @property
    def usage_in_stream(self) -> bool:
        return self.body.stream_options is not None and bool(self.body.stream_options.include_usage)


async def plan(body: ChatBody | CompletionBody, tenant: Tenant, s: Services) -> AnswerPlan:
    """Find the adapter and count the answers. Fault: 404 where there is no such model, 400 where there are too many answers."""
    try:
        if s.catalog.looks_in_store(body.model, tenant):
            adapter = await s.store_work.run(tenant.name, lambda: s.catalog.find(body.model, tenant))
        else:
            adapter = s.catalog.find(body.model, tenant)
    except TrimtabError as error:
        raise fault_of(error).about("model", "model_not_found") from None
    n = _or(body.n, 1)
    choices = n * (len(_prompts(body)) if isinstance(body, CompletionBody) else 1)
    if choices > s.limits.choices:
        raise Fault(f"n: {choices} answers (n times the prompts); at most {s.limits.choices} in a request", param="n", code="invalid_value")
    prefix = "chatcmpl" if isinstance(body, ChatBody) else "cmpl"
    return AnswerPlan(f"{prefix}-{uuid.uuid4().hex}", body, adapter, n, choices)


async def requests(plan: AnswerPlan, tenant: Tenant, s: Services) -> list[Request]:
    """The engine's requests, one for each choice, in order. Fault (400) if a prompt is too long or cannot be used."""
    sampling = sampling_of(plan.body)  # before the prompt's tokens, which cost more
    if isinstance(plan.body, ChatBody):
        prompts = [await chat_ids(plan.body, tenant, s)]
    else:
        prompts = await text_ids(_prompts(plan.body), tenant, s)
    end = None if s.limits.request_s is None else time.monotonic() + s.limits.request_s
    found: list[Request] = []
    kept = 0
    for ids in prompts:
        room = s.words.max_positions - len(ids)
        own = replace(sampling, max_tokens=min(sampling.max_tokens, room), min_tokens=min(sampling.min_tokens, room))
        kept += plan.n * own.max_tokens * (0 if own.logprobs is None else 1 + own.logprobs)  # the chosen token's own too
        if kept > s.limits.logprobs:
            field = "top_logprobs" if plan.chat and own.logprobs else "logprobs"
            text = f"{field}: the answers may bring {kept} log-probabilities; at most {s.limits.logprobs}. Give a smaller max_tokens"
            raise Fault(text, param=field, code="invalid_value")
        for i in range(plan.n):
            seed = None if own.seed is None else (own.seed + i) % (1 << 63)
            name = f"{plan.id}-{len(found)}"
            found.append(Request(name, tuple(ids), replace(own, seed=seed), plan.adapter, tenant.id, tenant.weight, end))
    return found


def sampling_of(body: ChatBody | CompletionBody) -> SamplingParams:
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
    least = _or(body.min_tokens, 0)
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
        grammar=grammar_of(body),
    )


def wants_logprobs(body: ChatBody | CompletionBody) -> bool:
    """Whether log-probabilities come with the tokens: completions ask for a number of alternatives, which may be 0."""
    return bool(body.logprobs) if isinstance(body, ChatBody) else body.logprobs is not None


def top_of(body: ChatBody | CompletionBody) -> int:
    """Alternatives that come with each token."""
    return (body.top_logprobs if isinstance(body, ChatBody) else body.logprobs) or 0


def grammar_of(body: Sampled) -> Grammar | None:
    """The constraint on the answer, from OpenAI's response_format or vLLM's structured_outputs; Fault (400) if they contradict."""
    form, own = body.response_format, _structured(body)
    found = [] if own is None else _own_grammars(own)
    if own is not None and len(found) != 1:
        text = "structured_outputs: give exactly one of json, json_object, regex and choice"
        raise Fault(text, param="structured_outputs", code="invalid_value")
    if form is not None and (form.type == "json_schema") != (form.json_schema is not None):
        raise Fault(
            "response_format: json_schema goes with type json_schema, and only with it", param="response_format", code="invalid_value"
        )
    if form is not None and form.type == "json_object":
        found.append(Grammar("json_object"))
    if form is not None and form.json_schema is not None:
        found.append(Grammar("json_schema", _schema_text(form.json_schema.schema_, "response_format")))
    if len(found) > 1:
        raise Fault("response_format and structured_outputs: give one of them", param="structured_outputs", code="invalid_value")
    return found[0] if found else None


def _structured(body: Sampled) -> StructuredOutputs | None:
    """vLLM's constraint, by its newer or its older names."""
    older = StructuredOutputs.model_construct(json_=body.guided_json, regex=body.guided_regex, choice=body.guided_choice)
    if not _own_grammars(older):
        return body.structured_outputs
    if body.structured_outputs is not None:
        raise Fault("structured_outputs and guided_*: give one of them", param="structured_outputs", code="invalid_value")
    return older


def _own_grammars(own: StructuredOutputs) -> list[Grammar]:
    return [
        *([Grammar("json_schema", _schema_text(own.json_, "structured_outputs"))] if own.json_ is not None else []),
        *([Grammar("json_object")] if own.json_object else []),
        *([Grammar("regex", own.regex)] if own.regex is not None else []),
        *([Grammar("choice", json.dumps(own.choice))] if own.choice is not None else []),
    ]


def _schema_text(schema: dict[str, object], param: str) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except ValueError:  # 1e999 is JSON, but infinite once it is read
        raise Fault(f"{param}: the schema holds a number that is too large", param=param, code="invalid_value") from None


async def chat_ids(body: Conversation, tenant: Tenant, s: Services) -> list[int]:
    """The ids of a conversation."""
    words = s.words
    messages = [_message(m) for m in body.messages]
    variables = {name: value for name, value in body.variables.items() if name in words.variables}
    size = sum(len(text) for m in messages for text in m.values())
    encode = lambda: [_within("messages", words, lambda: words.encode_chat(messages, variables))]  # noqa: E731
    return (await _encoded("messages", [size], encode, tenant, s))[0]


async def text_ids(prompts: Sequence[str | list[int]], tenant: Tenant, s: Services) -> list[list[int]]:
    """The ids of each prompt, a text or ids."""
    sizes = [len(p) if isinstance(p, str) else 0 for p in prompts]
    encode = lambda: [_ids(p, _where("prompt", i, len(prompts)), s.words) for i, p in enumerate(prompts)]  # noqa: E731
    return await _encoded("prompt", sizes, encode, tenant, s)


async def _encoded(param: str, sizes: Sequence[int], encode: Callable[[], list[list[int]]], tenant: Tenant, s: Services) -> list[list[int]]:
    """What `encode` gives, off the event loop where there is much to do. sizes: characters of each prompt; what cannot fit is refused by
    them, before it is tokenized."""
    for i, size in enumerate(sizes):
        if size > s.words.max_chars:
            raise _over(_where(param, i, len(sizes)), f"{size} characters, and no text of more than {s.words.max_chars} fits", s.words)
    try:
        return encode() if sum(sizes) <= SMALL else await s.words_work.run(tenant.name, encode)
    except DataError as error:
        raise Fault(error.render(), param=param, code="invalid_prompt") from None


def _ids(prompt: str | list[int], where: str, words: Words) -> list[int]:
    return _within(where, words, lambda: words.encode_text(prompt) if isinstance(prompt, str) else prompt)


def _within(where: str, words: Words, encode: Callable[[], list[int]]) -> list[int]:
    """A prompt's ids. Fault if they do not fit, or are none."""
    try:
        ids = encode()
    except TooLong as error:
        raise _over(where, error.message, words) from None
    _check_ids(ids, where, words)
    return ids


def _where(param: str, index: int, count: int) -> str:
    return f"{param}[{index}]" if count > 1 else param


def _over(where: str, what: str, words: Words) -> Fault:
    return Fault(
        f"{where}: {what}. This model's maximum context length is {words.max_positions} tokens, prompt and answer together",
        param=where,
        code="context_length_exceeded",
    )


def _check_ids(ids: list[int], where: str, words: Words) -> None:
    if not ids:
        raise Fault(f"{where}: has no tokens", param=where, code="invalid_prompt")
    if len(ids) >= words.max_positions:
        raise _over(where, f"{len(ids)} tokens", words)
    if (large := max(ids)) >= words.vocab_size:
        raise Fault(f"{where}: token id {large} is not in 0..{words.vocab_size - 1}", param=where, code="invalid_prompt")


def _prompts(body: CompletionBody) -> list[str] | list[list[int]]:
    p = body.prompt
    if isinstance(p, str):
        return [p]
    return [p] if isinstance(p[0], int) else p  # type: ignore[list-item,return-value]


def _message(message: Message) -> dict[str, str]:
    """As the template gets it: what was given, and content as text."""
    content = message.content if isinstance(message.content, str) else "\n".join(part.text or "" for part in message.content or ())
    more = {"name": message.name, "reasoning_content": message.reasoning_content}
    return {"role": message.role, "content": content} | {k: v for k, v in more.items() if v is not None}


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
