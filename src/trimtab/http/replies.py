"""The answers of the OpenAI routes, as OpenAPI documents them. `write.py` writes them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

Finish = Literal["stop", "length"]
ChatFinish = Literal["stop", "length", "tool_calls", "function_call"]


class CachedTokens(BaseModel):
    cached_tokens: int


class UsageReply(BaseModel):
    """prompt_tokens counts each prompt once, however many answers it gets."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Alternative(BaseModel):
    """bytes: joined over tokens they are the text's, end tokens and halves of characters included."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Alternative):
    top_logprobs: list[Alternative]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class CalledFunction(BaseModel):
    name: str
    arguments: str


class Called(BaseModel):
    """A call of a tool; arguments is JSON text."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(BaseModel):
    """content is null where there are calls alone. reasoning_content: what the base wrote between its tags of reasoning;
    reasoning: the same, as vLLM names it by now."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Called] | None = None
    function_call: CalledFunction | None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinish


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish


class _Reply(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: UsageReply


class ChatReply(_Reply):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class CompletionReply(_Reply):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class Model(BaseModel):
    """root: the full name (acme/support@3). parent: the base's name, null for the base. digest: of the adapter's content."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["trimtab"] = "trimtab"
    root: str
    parent: str | None
    digest: str | None
    max_model_len: int


class ModelList(BaseModel):
    """One page. has_more: there are others behind last_id."""

    object: Literal["list"] = "list"
    data: list[Model]
    first_id: str | None
    last_id: str | None
    has_more: bool


STREAM: dict[str, Any] = {"text/event-stream": {}}
"""Where stream is true: each event's data is a chunk in OpenAI's shape, the last is [DONE]. OpenAPI 3.1 has no schema for events."""
