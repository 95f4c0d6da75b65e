"""The bodies that clients send, as OpenAPI documents them. What is not listed here is refused by name.

A field that would change the answer and is not supported is an error, unless it has the value that changes nothing (`echo: false`,
`tools: []`). Fields that never change an answer are accepted and ignored. `null` means the default, as in OpenAI's API; vLLM's extra
fields have vLLM's names.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from trimtab.serve.grammar import MAX_CHARS
from trimtab.serve.request import MAX_STOP_CHARS, MAX_STOPS, MAX_TOP_LOGPROBS

MAX_N, MAX_PROMPTS = 16, 64
MAX_FIELDS = 100
"""Of an object with fields of its own: more than there are, and few enough to say of each one what is wrong with it."""
MAX_IDS = 1 << 20
"""Ids of one prompt: what no base has positions for. It bounds what a check of the list costs."""


def _exact(value: Any) -> Any:
    """Literal[False] compares, so it would take 0 too."""
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _small(schema: dict[str, Any]) -> dict[str, Any]:
    """Measured where the body is checked, off the event loop."""
    if (size := len(json.dumps(schema))) > MAX_CHARS:
        raise ValueError(f"has {size} characters; at most {MAX_CHARS} are taken")
    return schema


Exact = BeforeValidator(_exact)
Schema = Annotated[dict[str, Any], AfterValidator(_small)]
NoList = Annotated[list[Any], Field(max_length=0)] | None
NoDict = Annotated[dict[str, Any], Field(max_length=0)] | None
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(fail_fast=True, min_length=1, max_length=MAX_IDS)]
Text = Annotated[str, Field(min_length=1)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class Body(BaseModel):
    """Any object of a body, at any depth, whose fields are known."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        """Fields are counted first: each unknown field is a finding, and half a million of them would block the server for seconds."""
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise PydanticCustomError(
                "too_many_fields", "has {count} fields; at most {most} are read", {"count": len(value), "most": MAX_FIELDS}
            )
        return value


def takes(model: type[Body]) -> dict[str, Any]:
    """What OpenAPI says of a route whose body is read by itself (limits.py), after the key has been checked. `app.py` adds the schema."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="One more event before the end, with the tokens used.")
    include_obfuscation: bool | None = Field(None, description="Ignored.")


class JsonSchema(Body):
    name: str | None = Field(None, max_length=64)
    description: str | None = Field(None, description="Ignored: it is not put into the prompt.")
    schema_: Schema = Field(alias="schema", description="JSON Schema of the whole answer.")
    strict: bool | None = Field(None, description="Ignored: the answer always keeps to the schema.")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """vLLM's constraints on the whole answer; exactly one."""

    json_: Schema | None = Field(None, alias="json", description="A JSON Schema.")
    json_object: Annotated[Literal[True], Exact] | None = None
    regex: str | None = Field(None, min_length=1, max_length=4096)
    choice: Annotated[list[StopText], Field(fail_fast=True, min_length=1, max_length=256)] | None = None


class Sampled(Body):
    """How tokens are chosen, for both routes."""

    model: str = Field(min_length=1, max_length=256, description="An adapter (support, acme/support@3) or the base's own name.")
    max_tokens: int | None = Field(None, ge=1, lt=1 << 31, description="New tokens at most.")
    temperature: float | None = Field(1.0, ge=0, le=100, description="0 takes the likeliest token each time.")
    top_p: float | None = Field(1.0, gt=0, le=1)
    n: int | None = Field(1, ge=1, le=MAX_N, description="Answers to each prompt.")
    stop: StopText | Annotated[list[StopText], Field(fail_fast=True, max_length=MAX_STOPS)] | None = None
    seed: int | None = Field(
        None, ge=-(1 << 63), lt=1 << 63, description="Same seed, same request: same answer. The i-th answer has seed + i."
    )
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    top_k: int | None = Field(0, ge=-1, lt=1 << 31, description="vLLM's. Draw from the k likeliest tokens; 0 or -1: from all.")
    min_p: float | None = Field(0.0, ge=0, lt=1, description="vLLM's. Least probability relative to the likeliest token.")
    repetition_penalty: float | None = Field(1.0, ge=0.01, le=100, description="vLLM's.")
    min_tokens: int | None = Field(0, ge=0, lt=1 << 31, description="vLLM's. No end before so many.")
    ignore_eos: bool | None = Field(False, description="vLLM's. End tokens do not end the answer.")
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(fail_fast=True, max_length=64)] | None = None
    structured_outputs: StructuredOutputs | None = None

    user: Any = Field(None, description="Ignored.")
    metadata: Any = Field(None, description="Ignored.")
    store: Any = Field(None, description="Ignored.")
    service_tier: Any = Field(None, description="Ignored.")
    safety_identifier: Any = Field(None, description="Ignored.")
    prompt_cache_key: Any = Field(None, description="Ignored: prompts of a tenant share what they have in common anyway.")
    logit_bias: NoDict = Field(None, description="Not supported.")


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="developer is taken as system, unless the base's chat template knows it."
    )
    content: str | Annotated[list[TextPart], Field(fail_fast=True, min_length=1, max_length=1024)] = Field(
        description="Text; parts of type text are joined with line breaks."
    )
    name: None = Field(None, description="Not supported.")
    refusal: None = Field(None, description="Not supported.")
    audio: None = Field(None, description="Not supported.")
    function_call: None = Field(None, description="Not supported.")
    tool_calls: NoList = Field(None, description="Not supported.")
    annotations: NoList = Field(None, description="Not supported.")


class ChatBody(Sampled):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=4096)]
    max_tokens: int | None = Field(
        None, ge=1, lt=1 << 31, description="New tokens at most; by default as many as the base has positions for."
    )
    max_completion_tokens: int | None = Field(None, ge=1, lt=1 << 31, description="OpenAI's newer name of max_tokens.")
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description="Needs logprobs: true.")

    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = Field(None, description="Text only.")
    parallel_tool_calls: Any = Field(None, description="Ignored.")
    tool_choice: Literal["none", "auto"] | None = Field(None, description="Tools are not supported.")
    tools: NoList = Field(None, description="Not supported.")
    functions: NoList = Field(None, description="Not supported.")
    function_call: Literal["none", "auto"] | None = Field(None, description="Functions are not supported.")
    audio: None = Field(None, description="Not supported.")
    prediction: None = Field(None, description="Not supported.")
    reasoning_effort: None = Field(None, description="Not supported.")
    verbosity: None = Field(None, description="Not supported.")
    web_search_options: None = Field(None, description="Not supported.")


class CompletionBody(Sampled):
    """POST /v1/completions: the prompt as it is, without a chat template."""

    prompt: (
        Text
        | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
        | Ids
        | Annotated[list[Ids], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
    ) = Field(description="A text, texts, token ids, or lists of token ids.")
    max_tokens: int | None = Field(16, ge=1, lt=1 << 31, description="New tokens at most.")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="How many of the likeliest alternatives come with each token."
    )

    echo: Annotated[Literal[False], Exact] | None = Field(None, description="Not supported.")
    best_of: int | None = Field(None, ge=1, le=1, description="Not supported.")
    suffix: Literal[""] | None = Field(None, description="Not supported.")


class LoadBody(Body):
    """POST /v1/load_lora_adapter, vLLM's."""

    lora_name: str = Field(min_length=1, max_length=128)
    lora_path: str = Field(
        min_length=1, max_length=4096, description="A folder on the server, below one that it allows; or a name in its store."
    )


class UnloadBody(Body):
    """POST /v1/unload_lora_adapter, vLLM's."""

    lora_name: str = Field(min_length=1, max_length=128)
    lora_int_id: Any = Field(None, description="Ignored.")
