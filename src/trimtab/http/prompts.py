"""From the messages or texts of a body to token ids. What is long is counted and tokenized off the event loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal, TypeVar

from pydantic_core import from_json

from trimtab.bases.tool_turns import texts_in, tools_of
from trimtab.errors import DataError
from trimtab.http.errors import Fault
from trimtab.http.messages import Conversation, Message, ToolCall
from trimtab.http.services import Services, TooLong, Words
from trimtab.serve.tenants import Tenant

SMALL, SMALL_MESSAGES = 4096, 64
"""Characters that are tokenized on the event loop, and messages or texts that hold them: a thread costs more than they do."""
T = TypeVar("T")


async def chat_ids(body: Conversation, tenant: Tenant, s: Services) -> list[int]:
    """The ids of a conversation."""
    return await aside("messages", is_small(body), lambda: conversation_ids(body, s.words, shown_tools(body, s.words)), tenant, s)


def shown_tools(body: Conversation, words: Words) -> list[dict[str, Any]] | None:
    """A conversation's tools as the template takes them; None where it has none. Fault (400) if the template knows no tools."""
    if not body.tools:
        return None
    if not words.answers.tools:
        text = "tools: the chat template of this base knows no tools; leave them out, or give tool_choice: none"
        raise Fault(text, param="tools", code="not_supported")
    return tools_of([tool.function.model_dump(include={"name", "description", "parameters"}) for tool in body.tools])


def is_small(body: Conversation) -> bool:
    """Whether a conversation has little text, no tools and no calls. What those hold takes long to count."""
    if body.tools or len(body.messages) > SMALL_MESSAGES:
        return False
    parts = [part for m in body.messages for part in ([m.content] if isinstance(m.content, str) else [p.text for p in m.content or ()])]
    parts += [m.reasoning_content or m.reasoning for m in body.messages]
    return not any(m.tool_calls for m in body.messages) and sum(len(part or "") for part in parts) <= SMALL


def kept_of(truncate: int | None, words: Words, new: int = 1) -> int | None:
    """How many tokens at the end of a prompt `truncate_prompt_tokens` keeps, where so many new ones are asked for; None for all."""
    return max(1, words.max_positions - max(1, new)) if truncate == -1 else truncate


def conversation_ids(body: Conversation, words: Words, tools: list[dict[str, Any]] | None = None, last: int | None = None) -> list[int]:
    """The same on this thread. tools: as the template takes them. last: how many ids at the end; None for all."""
    messages = [_message(m) for m in body.messages]
    variables = {name: value for name, value in body.variables.items() if name in words.variables}
    if tools is not None:
        variables["tools"] = tools
    _refuse_long("messages", sum(map(len, texts_in([messages, variables]))), words)
    return _within("messages", words, partial(words.encode_chat, messages, variables, body.end, last))


async def text_ids(
    prompts: Sequence[str | list[int]], tenant: Tenant, s: Services, *, start: bool = True, param: str = "prompt", last: int | None = None
) -> list[list[int]]:
    """The ids of each prompt, a text or ids. start: whether a text gets the start token. param: the field that holds them. last: how many
    ids at the end of each; None for all. Of a text then, as many characters at its end are tokenized as the base could read at most."""

    def ids_of(i: int, prompt: str | list[int]) -> list[int]:
        where = _where(param, i, len(prompts))
        if not isinstance(prompt, str):
            return _within(where, s.words, lambda: prompt[-(last or len(prompt)) :])
        return _within(where, s.words, lambda: s.words.encode_text(prompt if last is None else prompt[-s.words.max_chars :], start, last))

    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str) and last is None:
            _refuse_long(_where(param, i, len(prompts)), len(prompt), s.words)
    small = len(prompts) <= SMALL_MESSAGES and sum(map(len, prompts)) <= SMALL
    return await aside(param, small, lambda: [ids_of(i, p) for i, p in enumerate(prompts)], tenant, s)


async def answer_ids(
    pairs: Sequence[tuple[str, str]], param: str, tenant: Tenant, s: Services, *, last: int | None = None
) -> list[list[int]]:
    """The ids of questions with their answers. param: the field that holds the answers. last: how many ids at the end of each; None for
    all."""

    def ids_of(i: int, question: str, answer: str) -> list[int]:
        return _within(_where(param, i, len(pairs)), s.words, lambda: s.words.encode_answer(question, answer, last))

    for i, pair in enumerate(pairs):
        _refuse_long(_where(param, i, len(pairs)), sum(map(len, pair)), s.words)
    if (size := sum(len(question) + len(answer) for question, answer in pairs)) > s.limits.body_bytes:
        text = f"{param}: {size} characters, the question counted with each answer; at most {s.limits.body_bytes} are read"
        raise Fault(text, param=param, code="invalid_value")
    return await aside(param, False, lambda: [ids_of(i, *pair) for i, pair in enumerate(pairs)], tenant, s)


async def aside(param: str, small: bool, encode: Callable[[], T], tenant: Tenant, s: Services) -> T:
    """What `encode` gives, off the event loop where there is much to do."""
    try:
        return encode() if small else await s.words_work.run(tenant.name, encode)
    except DataError as error:
        raise Fault(error.render(), param=param, code="invalid_prompt") from None


def _refuse_long(where: str, size: int, words: Words) -> None:
    """Fault where so many characters cannot fit, before they are tokenized."""
    if size > words.max_chars:
        raise _over(where, f"{size} characters, and no text of more than {words.max_chars} fits", words)


def _within(where: str, words: Words, encode: Callable[[], list[int]]) -> list[int]:
    """A prompt's ids. Fault if they do not fit, or are none."""
    try:
        ids = encode()
    except TooLong as error:
        raise _over(where, error.message, words) from None
    if not ids:
        raise Fault(f"{where}: has no tokens", param=where, code="invalid_prompt")
    if len(ids) >= words.max_positions:
        raise _over(where, f"{len(ids)} tokens", words)
    if (large := max(ids)) >= words.vocab_size:
        raise Fault(f"{where}: token id {large} is not in 0..{words.vocab_size - 1}", param=where, code="invalid_prompt")
    return ids


def _where(param: str, index: int, count: int) -> str:
    return f"{param}[{index}]" if count > 1 else param


def _over(where: str, what: str, words: Words) -> Fault:
    return Fault(
        f"{where}: {what}. This model's maximum context length is {words.max_positions} tokens, prompt and answer together",
        param=where,
        code="context_length_exceeded",
    )


def text_of(message: Message) -> str:
    """A message's content as text."""
    return message.content if isinstance(message.content, str) else "\n".join(part.text or "" for part in message.content or ())


def _message(message: Message) -> dict[str, Any]:
    """As the template gets it: what was given, and content as text."""
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": _arguments(call)}}
        for call in message.tool_calls or ()
    ]
    more: dict[str, Any] = {
        "name": message.name,
        "reasoning_content": message.reasoning_content or message.reasoning,
        "tool_call_id": message.tool_call_id,
    }
    more |= {"tool_calls": calls or None}
    return {"role": message.role, "content": text_of(message)} | {k: v for k, v in more.items() if v is not None}


def _arguments(call: ToolCall) -> str | dict[str, Any] | None:
    """A call's arguments. Clients send back what we answered, and an answer may be cut off within a call: of a text that is no JSON object
    the template gets as much as can be read, else the text under a key of its own."""
    given = call.function.arguments
    if not isinstance(given, str) or not given.strip():
        return given
    ways: tuple[Literal["off", "trailing-strings"], ...] = ("off", "trailing-strings")
    for way in ways:
        with suppress(ValueError):
            if isinstance(found := from_json(given, allow_partial=way), dict):
                return given if way == "off" else found
    return {"arguments": given}
