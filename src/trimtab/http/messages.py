"""Messages, calls and tools in the bodies that clients send; `schema.py` has the bodies."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from trimtab.http.fields import Body, NotSupported, Schema, Variables

if TYPE_CHECKING:
    from trimtab.bases.template import End


def _kind(content: Any) -> str:
    return "parts" if isinstance(content, list) else "text"


class Part(Body):
    """A piece of a message's content. cache_control is Anthropic's, and changes nothing here."""

    type: str = Field(max_length=64, description="text, or as the Responses API names it: input_text, output_text.")
    text: str | None = None
    refusal: str | None = Field(None, description="Of type refusal, as an earlier answer may have it: read as text.")
    cache_control: Any = None
    annotations: Any = Field(None, description="Changes nothing.")
    logprobs: Any = Field(None, description="Changes nothing.")

    @model_validator(mode="after")
    def _is_text(self) -> Part:
        kind = self.type.removeprefix("input_").removeprefix("output_")
        if kind == "refusal" and self.refusal is not None:
            self.text = self.refusal
            return self
        if kind == "text" and self.text is not None:
            return self
        if kind == "text":
            raise PydanticCustomError("missing", "has type text and no text")
        what = {"image_url": "images", "image": "images", "audio": "sounds", "file": "files", "video_url": "videos"}.get(kind)
        raise PydanticCustomError("not_text", "{what} are not supported", {"what": what or "parts of other types than text"})


class CalledFunction(Body):
    name: str = Field(min_length=1, max_length=256)
    arguments: str | dict[str, Any] | None = Field(None, description="A JSON object, as text as OpenAI has it, or as it is.")


class ToolCall(Body):
    """A call that an earlier answer has made."""

    id: str | None = Field(None, max_length=256)
    type: Literal["function"] | None = None
    function: CalledFunction
    index: Any = Field(None, description="Changes nothing.")


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"] = Field(
        description="developer is taken as system, unless the base's chat template knows it; function is tool's older name."
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
    reasoning: str | None = Field(None, description="The same, as vLLM names it by now.")
    annotations: Any = Field(None, description="Changes nothing.")
    cache_control: Any = Field(None, description="Changes nothing.")
    refusal: NotSupported = None
    audio: NotSupported = None
    function_call: CalledFunction | None = Field(None, description="The older form of a single call in tool_calls.")
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=128)] | None = Field(
        None, description="An assistant turn's calls; the template writes them."
    )
    tool_call_id: str | None = Field(None, max_length=256, description="Of a turn of role tool: the call that it answers.")
    prefix: NotSupported = None

    @model_validator(mode="after")
    def _in_todays_form(self) -> Message:
        if self.function_call is not None and not self.tool_calls:
            self.tool_calls = [ToolCall(function=self.function_call)]
        if self.role == "function":
            self.role = "tool"
        return self

    @field_validator("content")
    @classmethod
    def _has_content(cls, content: Any, info: ValidationInfo) -> Any:
        if content is None and info.data.get("role", "assistant") != "assistant":
            raise PydanticCustomError("missing", "is required: only an assistant turn may have none")
        return "" if content is None else content


class FunctionTool(Body):
    name: str = Field(pattern=r"^[A-Za-z0-9_.\-]{1,64}$")
    description: str | None = None
    parameters: Schema | None = Field(None, description="JSON Schema of the arguments, an object; none: there are no arguments.")
    strict: bool | None = Field(None, description="true: arguments follow the schema under auto too, or the request fails.")


def only_functions(value: Any) -> Any:
    """OpenAI's other tools (custom, web_search, mcp) have other fields: that they are not supported is said before those are missed."""
    if isinstance(value, dict) and isinstance(kind := value.get("type"), str) and kind != "function":
        raise PydanticCustomError("no_function", "is of type {kind}; only functions are supported", {"kind": kind[:64]})
    return value


class Tool(Body):
    type: Literal["function"]
    function: FunctionTool

    _functions = model_validator(mode="before")(only_functions)


MAX_MESSAGES = 4096


class Conversation(Body):
    """Messages, and what the chat template is told beside them."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    reasoning_effort: str | None = Field(None, max_length=64, description="A variable of the chat template, where that reads it.")
    chat_template_kwargs: Variables | None = Field(None, description="vLLM's. Variables of the chat template (enable_thinking).")
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=128)] | None = Field(
        None, description="Functions that the answer may call, where the base's chat template knows tools."
    )
    add_generation_prompt: bool | None = Field(None, description="vLLM's. false: the prompt is the conversation as it stands.")
    continue_final_message: bool | None = Field(
        False, description="vLLM's. The answer goes on with the last message, which is an assistant's."
    )

    @field_validator("continue_final_message")
    @classmethod
    def _may_continue(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        if value and info.data.get("add_generation_prompt"):
            raise PydanticCustomError("continued", "add_generation_prompt excludes it")
        messages = info.data.get("messages")
        if value and messages is not None and (not messages or messages[-1].role != "assistant"):
            raise PydanticCustomError("continued", "the last message must be an assistant's")
        return value

    @property
    def end(self) -> End:
        """How the prompt ends."""
        return "open" if self.continue_final_message else "finished" if self.add_generation_prompt is False else "asked"

    @property
    def variables(self) -> dict[str, Any]:
        """Those of the template that the body sets, by the name of its field."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return effort | (self.chat_template_kwargs or {})

    def unread(self, names: Collection[str]) -> list[str]:
        """Fields that set a variable which the template does not read. names: those that it reads."""
        given = self.chat_template_kwargs or {}
        return [f"chat_template_kwargs.{name}" if name in given else name for name in self.variables if name not in names]


class FunctionName(Body):
    name: str = Field(min_length=1, max_length=64)


class NamedTool(Body):
    """A function by its name; flat as in the Responses API, too."""

    type: Literal["function"]
    function: FunctionName | None = None
    name: str | None = Field(None, min_length=1, max_length=64)

    @model_validator(mode="after")
    def _has_name(self) -> NamedTool:
        if not self.named:
            raise PydanticCustomError("missing", "has no function with a name")
        return self

    @property
    def named(self) -> str:
        return self.function.name if self.function is not None else self.name or ""


class Allowed(Body):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(fail_fast=True, min_length=1, max_length=128)]


class AllowedTools(Body):
    """Some of the tools; flat as in the Responses API, too."""

    type: Literal["allowed_tools"]
    allowed_tools: Allowed | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[NamedTool], Field(fail_fast=True, min_length=1, max_length=128)] | None = None

    @model_validator(mode="after")
    def _has_tools(self) -> AllowedTools:
        if self.allowed_tools is None and (self.mode is None or self.tools is None):
            raise PydanticCustomError("missing", "has no allowed_tools with mode and tools")
        return self

    @property
    def told(self) -> Allowed:
        if self.allowed_tools is not None:
            return self.allowed_tools
        assert self.mode is not None and self.tools is not None
        return Allowed.model_construct(mode=self.mode, tools=self.tools)


def _choice(choice: Any) -> str:
    """Of what a client sent, or of what has been read already: /v1/responses makes a chat of it."""
    if isinstance(choice, dict):
        return "allowed" if choice.get("type") == "allowed_tools" else "named"
    return "allowed" if isinstance(choice, AllowedTools) else "named" if isinstance(choice, NamedTool) else "word"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], BeforeValidator(lambda said: "required" if said == "any" else said), Tag("word")]
    | Annotated[NamedTool, Tag("named")]
    | Annotated[AllowedTools, Tag("allowed")],
    Discriminator(_choice),
]
