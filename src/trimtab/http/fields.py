"""The kinds of fields that the bodies of `schema.py` and `messages.py` have, and what a body says that nobody read."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, from_json
from pydantic_core.core_schema import no_info_before_validator_function

from trimtab.serve.grammar import MAX_CHARS
from trimtab.serve.keys import redacted
from trimtab.serve.request import MAX_BIAS, MAX_BIASES, MAX_STOP_CHARS, MAX_TOP_LOGPROBS

MAX_FIELDS = 100
"""Of an object with fields of its own: more than there are, and few enough to say of each one what is wrong with it."""
MAX_IDS = 1 << 20
"""Ids of one prompt: what no base has positions for. It bounds what a check of the list costs."""
MAX_VARIABLES = 4096
"""Characters of a template's variables, as JSON."""
NOT_SUPPORTED = "is not supported by this server; leave it out"
TOLD, MAX_NAME = 16, 64
"""Unknown fields that are named to the client, and characters of a name."""


@dataclass(frozen=True, eq=False)  # typing keeps one of equal annotations, and 1 equals true
class Off:
    """In the annotation of a field that would change the answer and is not supported: only these values, which change nothing, are
    taken. why: what is told where it has another one."""

    values: tuple[Any, ...]
    why: str = NOT_SUPPORTED

    def takes(self, value: Any) -> bool:
        return any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in self.values)

    def check(self, value: Any) -> None:
        if not self.takes(value):
            raise PydanticCustomError("not_supported", "{why}", {"why": self.why})

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_before_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self.values), "description": "Not supported."}


def off(*neutral: Any, why: str = NOT_SUPPORTED) -> Off:
    """Takes null, false, "", [], {} and the neutral values."""
    return Off((None, False, "", [], {}, *neutral), why)


def _integral(value: Any) -> Any:
    """16.0 is an integer, as in JSON Schema."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _at_most(chars: int) -> AfterValidator:
    """For an object: its characters as JSON. Measured where the body is checked, off the event loop."""

    def check(value: dict[str, Any]) -> dict[str, Any]:
        if (size := len(json.dumps(value))) > chars:
            raise ValueError(f"has {size} characters; at most {chars} are taken")
        return value

    return AfterValidator(check)


def _read(value: Any) -> Any:
    """A JSON Schema may come as JSON text, as vLLM takes it."""
    if not isinstance(value, str):
        return value
    if len(value) > MAX_CHARS:
        raise ValueError(f"has {len(value)} characters; at most {MAX_CHARS} are taken")
    try:
        return from_json(value, allow_inf_nan=False)
    except ValueError:
        raise PydanticCustomError("no_json", "is no JSON") from None


def _biases(value: Any) -> Any:
    """Counted before its values are looked at."""
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise PydanticCustomError("too_many", "has {count} tokens; at most {most} are taken", {"count": len(value), "most": MAX_BIASES})
    return value


def _not_zero(value: int) -> int:
    if value == 0:
        raise PydanticCustomError("zero", "must be at least 1, or -1 for as many as fit")
    return value


INTEGRAL = BeforeValidator(_integral)
Truncated = Annotated[
    Annotated[int, Field(ge=-1, lt=1 << 31), INTEGRAL, AfterValidator(_not_zero)] | None,
    Field(
        description="vLLM's. So many tokens at the end of each prompt are read; -1: as many as fit, beside max_tokens where there is one."
    ),
]
NONE_IF_FALSE = BeforeValidator(lambda value: None if value is False else value)
NotSupported = Annotated[Any, off()]
Tokens = Annotated[int, Field(ge=0, lt=1 << 31), INTEGRAL]
Schema = Annotated[dict[str, Any], _at_most(MAX_CHARS)]
SchemaOrText = Annotated[
    dict[str, Any],
    _at_most(MAX_CHARS),
    BeforeValidator(_read),
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string", "description": "The same as JSON text."}]}),
]
Variables = Annotated[dict[str, Any], _at_most(MAX_VARIABLES)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Ids = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=MAX_IDS)]
Text = Annotated[str, Field(min_length=1)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Regex = Annotated[str, Field(min_length=1, max_length=4096)]
GrammarText = Annotated[str, Field(max_length=MAX_CHARS)]
"""Empty, as llama.cpp's clients send it: there is none."""
Choice = Annotated[list[StopText], Field(fail_fast=True, min_length=1, max_length=256)]
Biases = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]], BeforeValidator(_biases)
]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), INTEGRAL]


class Strict(BaseModel):
    """Any object of a body, at any depth. A field that it does not know is a mistake."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        """Fields are counted first: each unknown field may be a finding, and half a million of them would block the server for seconds."""
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise PydanticCustomError(
                "too_many_fields", "has {count} fields; at most {most} are read", {"count": len(value), "most": MAX_FIELDS}
            )
        return value


class Body(Strict):
    """One that takes fields it does not know, as clients send them to servers of many kinds."""

    model_config = ConfigDict(extra="allow")

    def unread(self, names: Collection[str]) -> list[str]:
        """Fields that this body knows and, for this base, nobody reads."""
        return []


def ignored_of(body: Strict, variables: Collection[str]) -> tuple[str, ...]:
    """Names of the fields that nobody reads ("messages.weight"), each once, the first few, none of them a key. variables: those that the
    chat template reads."""
    names = dict.fromkeys([*_unknown(body, ""), *(body.unread(variables) if isinstance(body, Body) else ())])
    told = tuple(redacted(name)[:MAX_NAME] for name in list(names)[:TOLD])
    return (*told, f"and {len(names) - TOLD} more") if len(names) > TOLD else told


def _unknown(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, Body):
        yield from (path + name for name, given in (value.model_extra or {}).items() if given is not None)
        for name in type(value).model_fields:
            yield from _unknown(getattr(value, name), f"{path}{name}.")
    elif isinstance(value, list) and value and isinstance(value[0], Body):
        for item in value:
            yield from _unknown(item, path)
