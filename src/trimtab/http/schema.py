"""The bodies that clients send, as OpenAPI documents them.

A field that would change the answer and is not supported is an error that names it, unless it has a value that changes nothing (`off` of
`fields.py`: `echo: false`, `tools: []`). Fields that never change an answer are accepted. So are fields that are not listed here: the
answer's header x-trimtab-ignored names them. `null` means the default, as in OpenAI's API; vLLM's extra fields have vLLM's names.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from trimtab.http.fields import (
    INTEGRAL,
    MAX_IDS,
    NONE_IF_FALSE,
    Biases,
    Body,
    Choice,
    GrammarText,
    Ids,
    NotSupported,
    Regex,
    Schema,
    SchemaOrText,
    StopText,
    Strict,
    Text,
    TokenId,
    Tokens,
    TopLogprobs,
    Truncated,
    off,
)
from trimtab.http.messages import MAX_MESSAGES, Conversation, FunctionName, FunctionTool, Message, NamedTool, Tool, ToolChoice
from trimtab.serve.composed import MAX_PARTS, MAX_SCALE
from trimtab.serve.request import MAX_STOPS, MAX_TOP_LOGPROBS

MAX_N, MAX_PROMPTS = 16, 64


def takes(model: type[Strict]) -> dict[str, Any]:
    """What OpenAPI says of a route whose body is read by itself (limits.py), after the key has been checked. `app.py` adds the schema."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="One more event before the end, with the tokens used.")
    continuous_usage_stats: bool | None = Field(
        None, description="vLLM's. Beside include_usage: each event tells the tokens of its answer so far, and of its prompt."
    )
    include_obfuscation: bool | None = Field(None, description="Ignored.")


class JsonSchema(Body):
    name: str | None = Field(None, max_length=64)
    description: str | None = Field(None, description="Ignored: it is not put into the prompt.")
    schema_: Schema = Field(alias="schema", description="JSON Schema of the whole answer.")
    strict: bool | None = Field(None, description="Ignored: the answer always keeps to the schema.")


class ResponseFormat(Body):
    type: Annotated[Literal["text", "json_object", "json_schema"], BeforeValidator(lambda said: "json_object" if said == "json" else said)]
    json_schema: JsonSchema | None = None
    schema_: Schema | None = Field(None, alias="schema", description="A JSON Schema beside json_object, as some clients send it.")
    value: SchemaOrText | None = Field(None, description="The same, as TGI has it; its type may be json.")


class StructuredOutputs(Body):
    """vLLM's constraints on the whole answer; exactly one."""

    json_: SchemaOrText | None = Field(None, alias="json", description="A JSON Schema.")
    json_object: Literal[True] | None = None
    regex: Regex | None = None
    choice: Choice | None = None
    grammar: GrammarText | None = Field(None, description="A grammar in Lark's form or llama.cpp's GBNF, as llguidance reads them.")
    structural_tag: NotSupported = None


class AdapterPart(Body):
    name: str = Field(min_length=1, max_length=256, description="An adapter, as model names one.")
    scale: float = Field(1.0, ge=-MAX_SCALE, le=MAX_SCALE, description="What it adds is multiplied by this.")


class Chosen(Body):
    """How tokens are chosen, for all routes that answer."""

    temperature: float | None = Field(1.0, ge=0, le=100, description="0 takes the likeliest token each time.")
    top_p: float | None = Field(1.0, ge=0, le=1, description="0 only at temperature 0, where it changes nothing.")
    stop: StopText | Annotated[list[StopText], Field(fail_fast=True, max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63), INTEGRAL] | None = Field(
        None, description="Same seed, same request: same answer. The i-th answer has seed + i."
    )
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31), INTEGRAL] | None = Field(
        0, description="vLLM's. Draw from the k likeliest tokens; 0 or -1: from all."
    )
    min_p: float | None = Field(0.0, ge=0, lt=1, description="vLLM's. Least probability relative to the likeliest token.")
    repetition_penalty: float | None = Field(1.0, ge=0.01, le=100, description="vLLM's.")
    min_tokens: Annotated[int, Field(ge=0, lt=1 << 31), INTEGRAL] | None = Field(0, description="vLLM's. No end before so many.")
    ignore_eos: bool | None = Field(False, description="vLLM's. End tokens do not end the answer.")
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=64)] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaOrText | None = Field(None, description="vLLM's older name of structured_outputs.json.")
    guided_regex: Regex | None = Field(None, description="The same of structured_outputs.regex.")
    guided_choice: Choice | None = Field(None, description="The same of structured_outputs.choice.")
    guided_grammar: GrammarText | None = Field(None, description="The same of structured_outputs.grammar.")
    regex: Regex | None = Field(None, description="SGLang's name of structured_outputs.regex.")
    json_schema: SchemaOrText | None = Field(None, description="SGLang's and llama.cpp's name of structured_outputs.json.")
    ebnf: GrammarText | None = Field(None, description="SGLang's name of structured_outputs.grammar.")
    grammar: GrammarText | None = Field(None, description="llama.cpp's name of structured_outputs.grammar.")
    logit_bias: Biases | None = Field(None, description="Token ids, as text, and what is added to their logits.")
    include_stop_str_in_output: bool | None = Field(False, description="vLLM's. What ends the answer is part of its text.")
    no_stop_trim: bool | None = Field(False, description="SGLang's name of include_stop_str_in_output.")
    skip_special_tokens: bool | None = Field(True, description="vLLM's. false: control tokens are part of the answer's text.")
    truncate_prompt_tokens: Truncated = None
    bad_words: NotSupported = None
    allowed_token_ids: NotSupported = None
    logits_processors: NotSupported = None
    use_beam_search: NotSupported = None
    length_penalty: Annotated[Any, off(1)] = None
    no_repeat_ngram_size: Annotated[Any, off(0)] = None
    repeat_penalty: Annotated[Any, off(1)] = None
    typical_p: Annotated[Any, off(1)] = None
    top_a: Annotated[Any, off(0)] = None
    tfs: Annotated[Any, off(1)] = None
    mirostat: Annotated[Any, off(0)] = None
    dry_multiplier: Annotated[Any, off(0)] = None
    xtc_probability: Annotated[Any, off(0)] = None


class Sampled(Chosen):
    """What chat and completions share."""

    model: str = Field(
        min_length=1, max_length=256, description="An adapter (support, acme/support@3), a sum (support+0.5*legal), or the base's own name."
    )
    adapters: Annotated[list[AdapterPart], Field(fail_fast=True, max_length=MAX_PARTS)] | None = Field(
        None, description="Adapters whose sum answers, of LoRA or of IA3; model is the base then."
    )
    max_tokens: Tokens | None = Field(
        None,
        description="New tokens at most; by default as many as the base has positions for in a chat, and 16 in a completion. 0: the prompt"
        " alone is computed.",
    )
    max_completion_tokens: Tokens | None = Field(None, description="OpenAI's newer name of max_tokens.")
    n: Annotated[int, Field(ge=1, le=MAX_N), INTEGRAL] | None = Field(1, description="Answers to each prompt.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

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

    prompt_logprobs: TopLogprobs | None = Field(
        None, description="vLLM's. The prompt's tokens come with their log-probabilities and so many alternatives; not in a stream."
    )
    return_tokens_as_token_ids: bool | None = Field(False, description="vLLM's. Tokens of log-probabilities are told as token_id:5.")
    return_token_ids: bool | None = Field(False, description="vLLM's. Ids of the prompt and of the answer come beside it.")
    echo: bool | None = Field(
        False, description="The answer begins with the prompt; in a chat with the last message, where that is an assistant's."
    )


class ChatBody(Conversation, Sampled):
    """POST /v1/chat/completions"""

    logprobs: bool | None = False
    top_logprobs: TopLogprobs | None = Field(None, description="Needs logprobs: true.")

    tool_choice: ToolChoice | None = Field(
        None, description="none, auto (where there are tools), required, a function by name, or allowed_tools."
    )
    parallel_tool_calls: bool | None = Field(None, description="false: one call at most.")
    prediction: Any = Field(None, description="Changes nothing.")
    modalities: Annotated[Any, off(["text"])] = None
    functions: Annotated[list[FunctionTool], Field(fail_fast=True, max_length=128)] | None = Field(
        None, description="The older form of tools; an answer then has one call at most, as function_call."
    )
    function_call: Literal["none", "auto"] | FunctionName | None = Field(None, description="The older form of tool_choice.")
    audio: NotSupported = None
    web_search_options: NotSupported = None
    prompt: NotSupported = None
    best_of: Annotated[Any, off(1)] = None
    add_special_tokens: NotSupported = None
    chat_template: NotSupported = None
    documents: NotSupported = None

    @model_validator(mode="after")
    def _in_todays_form(self) -> ChatBody:
        """Functions become tools."""
        if not self.functions:
            if isinstance(self.function_call, FunctionName):
                raise PydanticCustomError("functions", "function_call: there are no functions")
            return self
        if self.tools or self.tool_choice is not None:
            raise PydanticCustomError("functions", "functions: give tools and tool_choice, or the older functions and function_call")
        chosen = self.function_call
        self.tools = [Tool(type="function", function=function) for function in self.functions]
        self.tool_choice = NamedTool(type="function", function=chosen) if isinstance(chosen, FunctionName) else chosen
        self.parallel_tool_calls = False
        return self


ALSO_FALSE = WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0, "maximum": MAX_TOP_LOGPROBS}, {"enum": [None, False]}]})


class CompletionBody(Sampled):
    """POST /v1/completions: the prompt as it is, without a chat template."""

    prompt: (
        Text
        | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
        | Ids
        | Annotated[list[Ids], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
    ) = Field(description="A text, texts, token ids, or lists of token ids.")
    logprobs: Annotated[TopLogprobs | None, NONE_IF_FALSE, ALSO_FALSE] = Field(
        None, description="How many of the likeliest alternatives come with each token."
    )

    best_of: Annotated[int, Field(ge=1, le=MAX_N), INTEGRAL] | None = Field(
        None, description="So many answers are made to each prompt; the n with the highest log-probability a token are told."
    )
    add_special_tokens: bool | None = Field(True, description="vLLM's. false: no start token comes before a text.")

    messages: NotSupported = None
    prompt_embeds: NotSupported = None
    suffix: NotSupported = None


class TokenizeBody(Conversation):
    """POST /tokenize, vLLM's: a prompt or messages."""

    model: str | None = Field(None, max_length=256, description="Changes nothing: all models of a server have one tokenizer.")
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(fail_fast=True, max_length=MAX_MESSAGES)] = Field(default_factory=list)
    return_token_strs: bool | None = False
    add_special_tokens: bool | None = Field(True, description="false: no start token comes before a prompt.")

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
    load_inplace: bool | None = Field(False, description="A name that is loaded already stands for this one from the next request on.")
    base_model_name: str | None = Field(None, max_length=256, description="Must be a name of the server's base.")
    lora_int_id: Any = Field(None, description="Changes nothing.")


class UnloadBody(Body):
    """POST /v1/unload_lora_adapter, vLLM's."""

    lora_name: str = Field(min_length=1, max_length=128)
    lora_int_id: Any = Field(None, description="Ignored.")
