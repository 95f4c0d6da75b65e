"""The kinds of fields that the bodies of `schema.py` have, and what a body says that nobody read."""

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
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_before_validator_function

from trimtab.serve.grammar import MAX_CHARS
from trimtab.serve.keys import redacted
from trimtab.serve.request import MAX_STOP_CHARS

MAX_FIELDS = 100
"""Of an object with fields of its own: more than there are, and few enough to say of each one what is wrong with it."""
MAX_IDS = 1 << 20
"""Ids of one prompt: what no base has positions for. It bounds what a check of the list costs."""
MAX_VARIABLES = 4096
"""Characters of a template's variables, as JSON."""
TOLD, MAX_NAME = 16, 64
"""Unknown fields that are named to the client, and characters of a name."""


def _short(variables: dict[str, Any]) -> dict[str, Any]:
    if (size := len(json.dumps(variables))) > MAX_VARIABLES:
        raise ValueError(f"has {size} characters; at most {MAX_VARIABLES} are taken")
    return variables


@dataclass(frozen=True, eq=False)  # typing keeps one of equal annotations, and 1 equals true
class Off:
    """In the annotation of a field that would change the answer and is not supported: only these values, which change nothing, are
    taken."""

    values: tuple[Any, ...]

    def check(self, value: Any) -> None:
        if not any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in self.values):
            raise PydanticCustomError("not_supported", "is not supported by this server; leave it out")

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_before_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self.values), "description": "Not supported."}


def off(*neutral: Any) -> Off:
    """Takes null, false, "", [], {} and the neutral values."""
    return Off((None, False, "", [], {}, *neutral))


def only(*values: Any) -> Off:
    """Takes null and these values."""
    return Off((None, *values))


def _integral(value: Any) -> Any:
    """16.0 is an integer, as in JSON Schema."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _small(schema: dict[str, Any]) -> dict[str, Any]:
    """Measured where the body is checked, off the event loop."""
    if (size := len(json.dumps(schema))) > MAX_CHARS:
        raise ValueError(f"has {size} characters; at most {MAX_CHARS} are taken")
    return schema


INTEGRAL = BeforeValidator(_integral)
NONE_IF_FALSE = BeforeValidator(lambda value: None if value is False else value)
NotSupported = Annotated[Any, off()]
Tokens = Annotated[int, Field(ge=1, lt=1 << 31), INTEGRAL]
Schema = Annotated[dict[str, Any], AfterValidator(_small)]
Variables = Annotated[dict[str, Any], AfterValidator(_short)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Ids = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=MAX_IDS)]
Text = Annotated[str, Field(min_length=1)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


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
