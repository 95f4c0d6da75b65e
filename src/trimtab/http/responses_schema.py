"""The body of /v1/responses, OpenAI's newer route, and the conversation that it means. Nothing is kept between requests: what an answer
needs of earlier ones is in its input."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from trimtab.http.fields import Body, NotSupported, Schema, Text, Tokens, TopLogprobs, off
from trimtab.http.messages import MAX_MESSAGES, CalledFunction, FunctionTool, Message, Part, Tool, ToolCall, ToolChoice, only_functions
from trimtab.http.schema import AdapterPart, ChatBody, Chosen, JsonSchema, ResponseFormat, StreamOptions
from trimtab.serve.composed import MAX_PARTS

LOGPROBS = "message.output_text.logprobs"


def _kind(content: Any) -> str:
    return "parts" if isinstance(content, list) else "text"


def _kind_of_item(content: Any) -> str:
    first = content[0] if isinstance(content, list) and content else None
    return "thoughts" if isinstance(first, dict) and first.get("type") == "reasoning_text" else _kind(content)


Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[Part], Field(fail_fast=True, max_length=1024), Tag("parts")], Discriminator(_kind)
]


class ReasoningText(Body):
    type: Literal["reasoning_text"]
    text: str


class Item(Body):
    """A message, a call that an earlier answer has made, its result, or the reasoning before them."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    id: Any = Field(None, description="Changes nothing.")
    status: Any = Field(None, description="Changes nothing.")
    role: Literal["user", "assistant", "system", "developer"] | None = Field(None, description="Of a message.")
    content: (
        Annotated[
            Annotated[str, Tag("text")]
            | Annotated[list[Part], Field(fail_fast=True, max_length=1024), Tag("parts")]
            | Annotated[list[ReasoningText], Field(fail_fast=True, max_length=1024), Tag("thoughts")],
            Discriminator(_kind_of_item),
        ]
        | None
    ) = None
    call_id: str | None = Field(None, max_length=256)
    name: str | None = Field(None, min_length=1, max_length=256, description="Of a call.")
    arguments: str | None = Field(None, description="Of a call: a JSON object, as text.")
    output: Content | None = Field(None, description="Of a call's result.")
    summary: Any = Field(None, description="Of reasoning. Changes nothing.")
    encrypted_content: Any = Field(None, description="Of reasoning. Changes nothing.")

    @model_validator(mode="after")
    def _is_whole(self) -> Item:
        needs = {"message": ("role", "content"), "function_call": ("name", "arguments"), "function_call_output": ("call_id", "output")}
        for field in needs.get(self.type, ()):
            if getattr(self, field) is None:
                raise PydanticCustomError("missing", "has no {field}", {"field": field})
        return self


class ResponsesTool(FunctionTool):
    """A function, flat as this route has it."""

    type: Literal["function"]

    _functions = model_validator(mode="before")(only_functions)


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, max_length=64)
    description: str | None = Field(None, description="Ignored: it is not put into the prompt.")
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="Ignored: the answer always keeps to the schema.")


class TextOptions(Body):
    format: TextFormat | None = None


class Reasoning(Body):
    effort: str | None = Field(None, max_length=64, description="A variable of the chat template, reasoning_effort, where that reads it.")


class ResponsesBody(Chosen):
    """POST /v1/responses"""

    model: str = Field(min_length=1, max_length=256, description="As in the other routes.")
    adapters: Annotated[list[AdapterPart], Field(fail_fast=True, max_length=MAX_PARTS)] | None = None
    input: Annotated[
        Annotated[Text, Tag("text")]
        | Annotated[list[Item], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES - 1), Tag("parts")],
        Discriminator(_kind),
    ] = Field(description="A text, or items, one of which is a message, a call or a result.")
    instructions: str | None = Field(None, description="A system message before the input.")
    max_output_tokens: Tokens | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    tools: Annotated[list[ResponsesTool], Field(fail_fast=True, max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include: Annotated[list[str], Field(fail_fast=True, max_length=32)] | None = Field(
        None, description=f"{LOGPROBS} is read; what others ask for, answers here do not have."
    )
    top_logprobs: TopLogprobs | None = None
    truncation: Literal["auto", "disabled"] | None = Field(None, description="Nothing is cut: an input that is too long is refused.")

    metadata: dict[str, Any] | None = Field(None, description="Told again in the answer.")
    store: Any = Field(None, description="Changes nothing: no answer is kept.")
    max_tool_calls: Any = Field(None, description="Changes nothing: it counts calls of tools that run at the server.")
    user: Any = Field(None, description="Changes nothing.")
    service_tier: Any = Field(None, description="Changes nothing.")
    safety_identifier: Any = Field(None, description="Changes nothing.")
    prompt_cache_key: Any = Field(None, description="Changes nothing.")
    prompt_cache_retention: Any = Field(None, description="Changes nothing.")

    messages: Annotated[Any, off(why="is input here")] = None
    max_tokens: Annotated[Any, off(why="is max_output_tokens here")] = None
    max_completion_tokens: Annotated[Any, off(why="is max_output_tokens here")] = None
    response_format: Annotated[Any, off(why="is text.format here")] = None
    n: Annotated[Any, off(1)] = None
    echo: NotSupported = None
    prompt_logprobs: NotSupported = None
    previous_response_id: NotSupported = None
    conversation: NotSupported = None
    prompt: NotSupported = None
    background: Annotated[Any, off()] = None

    @field_validator("input")
    @classmethod
    def _says_something(cls, given: str | list[Item]) -> str | list[Item]:
        if not isinstance(given, str) and all(item.type == "reasoning" for item in given):
            raise PydanticCustomError("missing", "has reasoning alone, which is part of no turn")
        return given

    @model_validator(mode="after")
    def _fits_together(self) -> ResponsesBody:
        form = None if self.text is None else self.text.format
        if form is not None and (form.type == "json_schema") != (form.schema_ is not None):
            raise PydanticCustomError("text", "text.format: a schema goes with type json_schema, and only with it")
        for field, told in self.told_again.items():
            try:
                json.dumps(told, allow_nan=False)
            except ValueError:  # 1e999 is JSON, but infinite once it is read
                raise PydanticCustomError("too_large", "{field} holds a number that is too large", {"field": field}) from None
        return self

    @cached_property
    def told_again(self) -> dict[str, Any]:
        """What the answer repeats as the client sent it."""
        form, choice = None if self.text is None else self.text.format, self.tool_choice or "auto"
        return {
            "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True)},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(exclude_none=True),
            "tools": [tool.model_dump() for tool in self.tools or ()],
            "metadata": self.metadata or {},
        }


def chat_of(body: ResponsesBody) -> ChatBody:
    """The chat that asks for the same."""
    messages = [Message(role="system", content=body.instructions)] if body.instructions else []
    messages += [Message(role="user", content=body.input)] if isinstance(body.input, str) else _messages(body.input)
    logprobs = LOGPROBS in (body.include or ()) or bool(body.top_logprobs)
    form = None if body.text is None else body.text.format
    return ChatBody(
        model=body.model,
        adapters=body.adapters,
        messages=messages,
        max_completion_tokens=body.max_output_tokens,
        stream=body.stream,
        response_format=None if form is None else _format(form),
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
        tools=None if body.tools is None else [_tool(tool) for tool in body.tools],
        tool_choice=body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls,
        logprobs=logprobs,
        top_logprobs=body.top_logprobs if logprobs else None,
        **{name: getattr(body, name) for name in Chosen.model_fields},
    )


def _format(form: TextFormat) -> ResponseFormat:
    schema = None if form.schema_ is None else JsonSchema.model_construct(name=form.name, schema_=form.schema_)
    return ResponseFormat.model_construct(type=form.type, json_schema=schema, schema_=None, value=None)


def _tool(tool: ResponsesTool) -> Tool:
    return Tool(type="function", function=FunctionTool(**tool.model_dump(exclude={"type"})))


def _messages(items: list[Item]) -> list[Message]:
    """Calls and reasoning belong to an assistant's turn: reasoning to the one that follows it, calls to the one that they follow. Reasoning
    that somebody else's message follows, as where an answer was cut off in it, belongs to none and is left out."""
    found, thought = list[Message](), list[str]()
    for item in items:
        last = found[-1] if found else None
        if item.type == "reasoning":
            parts = item.content if isinstance(item.content, list) else []
            thought += [part.text or "" for part in parts]
        elif item.type == "function_call_output":
            found.append(Message(role="tool", tool_call_id=item.call_id, content=_content(item.output)))
        elif item.type == "function_call":
            called = CalledFunction(name=item.name or "", arguments=item.arguments)
            call = ToolCall(id=item.call_id, type="function", function=called)
            if last is not None and last.role == "assistant" and not thought:
                last.tool_calls = [*(last.tool_calls or []), call]
            else:
                found.append(Message(role="assistant", content="", tool_calls=[call], reasoning_content=_joined(thought)))
        else:
            assert item.role is not None
            reasoning = _joined(thought)
            reasoning = reasoning if item.role == "assistant" else None
            found.append(Message(role=item.role, content=_content(item.content), reasoning_content=reasoning))
    return found


def _joined(thought: list[str]) -> str | None:
    """The reasoning so far, which is told by then."""
    text = "\n".join(thought)
    thought.clear()
    return text or None


def _content(content: Any) -> str:
    return content if isinstance(content, str) else "\n".join(part.text or "" for part in content or ())
