"""The bodies that clients send, as OpenAPI documents them.

A field that would change the answer and is not supported is an error that names it, unless it has a value that changes nothing (`off` of
`fields.py`: `echo: false`, `tools: []`). Fields that never change an answer are accepted. So are fields that are not listed here: the
answer's header x-trimtab-ignored names them. `null` means the default, as in OpenAI's API; vLLM's extra fields have vLLM's names.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, WithJsonSchema, field_validator, model_validator
from pydantic_core import PydanticCustomError

from trimtab.http.fields import (
    INTEGRAL,
    MAX_IDS,
    NONE_IF_FALSE,
    Body,
    Ids,
    NotSupported,
    Schema,
    StopText,
    Strict,
    Text,
    TokenId,
    Tokens,
    Variables,
    off,
    only,
)
from trimtab.serve.request import MAX_STOPS, MAX_TOP_LOGPROBS

MAX_N, MAX_PROMPTS = 16, 64


def takes(model: type[Strict]) -> dict[str, Any]:
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
    json_object: Literal[True] | None = None
    regex: str | None = Field(None, min_length=1, max_length=4096)
    choice: Annotated[list[StopText], Field(fail_fast=True, min_length=1, max_length=256)] | None = None
    grammar: NotSupported = None
    structural_tag: NotSupported = None


class Sampled(Body):
    """How tokens are chosen, for both routes."""

    model: str = Field(min_length=1, max_length=256, description="An adapter (support, acme/support@3) or the base's own name.")
    max_tokens: Tokens | None = Field(None, description="New tokens at most.")
    max_completion_tokens: Tokens | None = Field(None, description="OpenAI's newer name of max_tokens.")
    temperature: float | None = Field(1.0, ge=0, le=100, description="0 takes the likeliest token each time.")
    top_p: float | None = Field(1.0, ge=0, le=1, description="0 only at temperature 0, where it changes nothing.")
    n: Annotated[int, Field(ge=1, le=MAX_N), INTEGRAL] | None = Field(1, description="Answers to each prompt.")
    stop: StopText | Annotated[list[StopText], Field(fail_fast=True, max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63), INTEGRAL] | None = Field(
        None, description="Same seed, same request: same answer. The i-th answer has seed + i."
    )
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    top_k: Annotated[int, Field(ge=-1, lt=1 << 31), INTEGRAL] | None = Field(
        0, description="vLLM's. Draw from the k likeliest tokens; 0 or -1: from all."
    )
    min_p: float | None = Field(0.0, ge=0, lt=1, description="vLLM's. Least probability relative to the likeliest token.")
    repetition_penalty: float | None = Field(1.0, ge=0.01, le=100, description="vLLM's.")
    min_tokens: Annotated[int, Field(ge=0, lt=1 << 31), INTEGRAL] | None = Field(0, description="vLLM's. No end before so many.")
    ignore_eos: bool | None = Field(False, description="vLLM's. End tokens do not end the answer.")
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=64)] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = Field(None, description="vLLM's older name of structured_outputs.json.")
    guided_regex: str | None = Field(None, min_length=1, max_length=4096, description="The same of structured_outputs.regex.")
    guided_choice: Annotated[list[StopText], Field(fail_fast=True, min_length=1, max_length=256)] | None = Field(
        None, description="The same of structured_outputs.choice."
    )

    user: Any = Field(None, description="Changes nothing.")
    metadata: Any = Field(None, description="Changes nothing.")
    store: Any = Field(None, description="Changes nothing.")
    service_tier: Any = Field(None, description="Changes nothing.")
    safety_identifier: Any = Field(None, description="Changes nothing.")
    prompt_cache_key: Any = Field(None, description="Changes nothing: prompts of a tenant share what they have in common anyway.")
    prompt_cache_retention: Any = Field(None, description="Changes nothing.")
    priority: Any = Field(None, description="vLLM's. Changes nothing: tenants share fairly.")
    request_id: Any = Field(None, description="vLLM's. Changes nothing: the header x-request-id names a request.")
    spaces_between_special_tokens: Any = Field(None, description="vLLM's. Changes nothing.")

    logit_bias: NotSupported = None
    best_of: Annotated[Any, off(1)] = None
    prompt_logprobs: NotSupported = None
    truncate_prompt_tokens: NotSupported = None
    bad_words: NotSupported = None
    allowed_token_ids: NotSupported = None
    logits_processors: NotSupported = None
    guided_grammar: NotSupported = None
    use_beam_search: NotSupported = None
    length_penalty: Annotated[Any, off(1)] = None
    include_stop_str_in_output: NotSupported = None
    skip_special_tokens: Annotated[Any, only(True)] = None
    no_repeat_ngram_size: Annotated[Any, off(0)] = None
    repeat_penalty: Annotated[Any, off(1)] = None
    typical_p: Annotated[Any, off(1)] = None
    top_a: Annotated[Any, off(0)] = None
    tfs: Annotated[Any, off(1)] = None
    mirostat: Annotated[Any, off(0)] = None
    dry_multiplier: Annotated[Any, off(0)] = None
    xtc_probability: Annotated[Any, off(0)] = None


def _kind(content: Any) -> str:
    return "parts" if isinstance(content, list) else "text"


class Part(Body):
    """A piece of a message's content. cache_control is Anthropic's, and changes nothing here."""

    type: str = Field(max_length=64, description="text, or as the Responses API names it: input_text, output_text.")
    text: str | None = None
    cache_control: Any = None

    @model_validator(mode="after")
    def _is_text(self) -> Part:
        kind = self.type.removeprefix("input_").removeprefix("output_")
        if kind == "text" and self.text is not None:
            return self
        if kind == "text":
            raise PydanticCustomError("missing", "has type text and no text")
        what = {"image_url": "images", "image": "images", "audio": "audio", "file": "files", "video_url": "videos"}.get(kind)
        raise PydanticCustomError("not_text", "{what} are not supported", {"what": what or "parts of other types than text"})


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="developer is taken as system, unless the base's chat template knows it."
    )
    content: (
        Annotated[
            Annotated[str, Tag("text")] | Annotated[list[Part], Field(fail_fast=True, min_length=1, max_length=1024), Tag("parts")],
            Discriminator(_kind),
        ]
        | None
    ) = Field(
        None, validate_default=True, description="Text; parts of type text are joined with line breaks. Assistant turns may have none."
    )
    name: str | None = Field(None, max_length=64, description="The template may write it.")
    reasoning_content: str | None = Field(None, description="An assistant turn's reasoning; the template writes it, or leaves it out.")
    annotations: Any = Field(None, description="Changes nothing.")
    cache_control: Any = Field(None, description="Changes nothing.")
    refusal: NotSupported = None
    audio: NotSupported = None
    function_call: NotSupported = None
    tool_calls: NotSupported = None
    tool_call_id: NotSupported = None
    prefix: NotSupported = None

    @field_validator("content")
    @classmethod
    def _has_content(cls, content: Any, info: ValidationInfo) -> Any:
        if content is None and info.data.get("role", "assistant") != "assistant":
            raise PydanticCustomError("missing", "is required: only an assistant turn may have none")
        return "" if content is None else content


class Conversation(Body):
    """Messages, and what the chat template is told beside them."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=4096)]
    reasoning_effort: str | None = Field(None, max_length=64, description="A variable of the chat template, where that reads it.")
    chat_template_kwargs: Variables | None = Field(None, description="vLLM's. Variables of the chat template (enable_thinking).")

    @property
    def variables(self) -> dict[str, Any]:
        """Those of the template that the body sets, by the name of its field."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return effort | (self.chat_template_kwargs or {})

    def unread(self, names: Collection[str]) -> list[str]:
        """Fields that set a variable which the template does not read. names: those that it reads."""
        given = self.chat_template_kwargs or {}
        return [f"chat_template_kwargs.{name}" if name in given else name for name in self.variables if name not in names]


class ChatBody(Conversation, Sampled):
    """POST /v1/chat/completions"""

    max_tokens: Tokens | None = Field(None, description="New tokens at most; by default as many as the base has positions for.")
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), INTEGRAL] | None = Field(None, description="Needs logprobs: true.")

    parallel_tool_calls: Any = Field(None, description="Changes nothing: there are no tools.")
    prediction: Any = Field(None, description="Changes nothing.")
    modalities: Annotated[Any, off(["text"])] = None
    tools: NotSupported = None
    tool_choice: Annotated[Any, off("none", "auto")] = None
    functions: NotSupported = None
    function_call: Annotated[Any, off("none", "auto")] = None
    audio: NotSupported = None
    web_search_options: NotSupported = None
    prompt: NotSupported = None
    echo: NotSupported = None
    add_generation_prompt: Annotated[Any, only(True)] = None
    continue_final_message: NotSupported = None
    add_special_tokens: NotSupported = None
    chat_template: NotSupported = None
    documents: NotSupported = None


ALSO_FALSE = WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0, "maximum": MAX_TOP_LOGPROBS}, {"enum": [None, False]}]})


class CompletionBody(Sampled):
    """POST /v1/completions: the prompt as it is, without a chat template."""

    prompt: (
        Text
        | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
        | Ids
        | Annotated[list[Ids], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
    ) = Field(description="A text, texts, token ids, or lists of token ids.")
    max_tokens: Tokens | None = Field(None, description="New tokens at most; by default 16.")
    logprobs: Annotated[Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), INTEGRAL] | None, NONE_IF_FALSE, ALSO_FALSE] = Field(
        None, description="How many of the likeliest alternatives come with each token."
    )

    messages: NotSupported = None
    echo: NotSupported = None
    suffix: NotSupported = None
    add_special_tokens: Annotated[Any, only(True)] = None
    return_tokens_as_token_ids: NotSupported = None


class TokenizeBody(Conversation):
    """POST /tokenize, vLLM's: a prompt or messages."""

    model: str | None = Field(None, max_length=256, description="Changes nothing: all models of a server have one tokenizer.")
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(fail_fast=True, max_length=4096)] = Field(default_factory=list)
    return_token_strs: bool | None = False
    add_special_tokens: Annotated[Any, only(True)] = None
    add_generation_prompt: Annotated[Any, only(True)] = None

    @model_validator(mode="after")
    def _one_of_them(self) -> TokenizeBody:
        if (self.prompt is None) == (not self.messages):
            raise PydanticCustomError("one_of", "must have a prompt or messages, and not both")
        return self


class DetokenizeBody(Body):
    """POST /detokenize, vLLM's."""

    model: str | None = Field(None, max_length=256, description="Changes nothing.")
    tokens: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_IDS)]


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
