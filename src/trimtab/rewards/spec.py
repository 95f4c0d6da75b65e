"""What a run file says of a reward: a built-in one by name, or a function of a Python file, with its weight.

rewards:
  - exact_match                                              # a built-in, as it comes
  - {reward: regex, pattern: '^\\{.*\\}$', weight: 0.2}
  - {reward: rewards.py:closeness, trusted: true}            # a function with TRL's signature
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict
from pydantic.dataclasses import dataclass as checked

from trimtab.errors import nearest
from trimtab.rewards import builtin


@checked(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Reward:
    """reward: the name of a built-in, or FILE.py:FUNCTION. weight: of its numbers in the sum. name: in metrics; None: as it is called.
    column: of the row, what a built-in compares with; None: the row's own answer. pattern: of `regex`. schema: of `json_schema`. min_words,
    max_words: of `length`. trusted: the file's code may run. time_limit: seconds for one call; None: the objective's."""

    reward: str
    weight: float = 1.0
    name: str | None = None
    column: str | None = None
    pattern: str | None = None
    schema: dict[str, Any] | None = None
    min_words: int | None = None
    max_words: int | None = None
    trusted: bool = False
    time_limit: float | None = None

    def __post_init__(self) -> None:
        if problems := self._problems():
            raise ValueError("; ".join(problems))

    @property
    def file(self) -> str | None:
        """The Python file, as the run file names it; None of a built-in."""
        return self.reward.rpartition(":")[0] or None

    @property
    def function(self) -> str:
        return self.reward.rpartition(":")[2]

    @property
    def label(self) -> str:
        return self.name or self.function

    @property
    def options(self) -> dict[str, Any]:
        """What is set of the options of a built-in."""
        return {n: v for n in OPTIONS if (v := getattr(self, n)) is not None}

    def _problems(self) -> list[str]:
        found = []
        if self.time_limit is not None and self.time_limit <= 0:
            found.append(f"time_limit = {self.time_limit}: must be above 0")
        if self.file is not None:
            if not self.file.endswith(".py") or not self.function.isidentifier():
                found.append(f"reward = {self.reward!r}: a function is named FILE.py:FUNCTION")
            if not self.trusted:
                found.append(f"reward = {self.reward!r} runs code of that file: add `trusted: true` to it if you trust that code")
            found += [f"{n}: only built-in rewards take it" for n in self.options]
            return found
        if self.reward not in builtin.REWARDS:
            known = ", ".join(builtin.REWARDS)
            return [*found, f"reward = {self.reward!r}{nearest(self.reward, builtin.REWARDS)}: one of {known}, or FILE.py:FUNCTION"]
        parameters = inspect.signature(builtin.REWARDS[self.reward]).parameters
        found += [f"{n}: reward {self.reward} does not take it" for n in self.options if n not in parameters]
        wanted = [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
        found += [f"{n}: reward {self.reward} needs it" for n in wanted if n not in self.options]
        if self.reward == "json_schema" and find_spec("jsonschema") is None:
            found.append("reward json_schema needs the package jsonschema: pip install 'trimtab[rewards]'")
        elif self.schema is not None and (problem := _no_schema(self.schema)):
            found.append(f"schema: it is no JSON schema: {problem}")
        found += [f"{n} = {v}: at least 0" for n in ("min_words", "max_words") if (v := getattr(self, n)) is not None and v < 0]
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except (re.error, OverflowError, RecursionError) as error:
                found.append(f"pattern = {self.pattern!r} is no regular expression: {error}")
        if self.reward == "length" and (self.min_words or 0) > (self.max_words or float("inf")):
            found.append(f"min_words = {self.min_words} is above max_words = {self.max_words}")
        return found


def _no_schema(schema: dict[str, Any]) -> str | None:
    """What is wrong with a JSON schema."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        return error.message
    return None


OPTIONS = ("column", "pattern", "schema", "min_words", "max_words")


def _spelled_out(value: Any) -> Any:
    """One reward, or several, each by its name alone or with its options."""
    given = [value] if isinstance(value, str | Mapping | Reward) else value
    if not isinstance(given, list | tuple):
        return given
    return tuple({"reward": r} if isinstance(r, str) else r for r in given)


Rewards = Annotated[tuple[Reward, ...], BeforeValidator(_spelled_out)]
