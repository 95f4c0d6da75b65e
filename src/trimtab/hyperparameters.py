"""A frozen dataclass whose fields are hyperparameters: checked against their annotations, read from a mapping, all findings at once.

A method is one, and so is an objective.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Self, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from trimtab.errors import ConfigError
from trimtab.foreign import answer


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """A wrong type, value or name raises ConfigError that lists every finding."""

    name: ClassVar[str] = ""
    """The name in run files and on the command line."""

    def __post_init__(self) -> None:
        wrong = _type_problems(self)
        for f in dataclasses.fields(self) if wrong else ():  # so that `problems` can judge the others
            if f.name in wrong:
                fresh = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
                object.__setattr__(self, f.name, fresh)
        own = [
            p for p in self.problems() if not p.startswith(tuple(f"{name}: " for name in wrong))
        ]  # their defaults are not what was given
        if problems := [*wrong.values(), *own]:
            raise ConfigError(f"{type(self).__name__} cannot be used", problems=problems)

    def problems(self) -> list[str]:
        """What is wrong with the hyperparameters, whatever the base. Each finding names field and value."""
        return []

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], *, where: str = "") -> Self:
        """Build from a mapping. Unknown names are refused with the nearest known one. where: what the mapping is, for the message."""
        known = [f.name for f in dataclasses.fields(cls)]
        problems = [f"unknown key {k!r}{answer(k, known)}" for k in fields if k not in known]
        if problems:
            raise ConfigError(f"{where or cls.__name__} cannot be used", problems=problems, fix=f"{cls.name} takes: {', '.join(known)}")
        try:
            return cls(**fields)
        except ConfigError as e:
            raise ConfigError(f"{where}: {e.message}" if where else e.message, problems=e.problems, fix=e.fix) from None

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain JSON values."""
        return dataclasses.asdict(self)


_FINITE = ConfigDict(allow_inf_nan=False)


@lru_cache
def _field_types(cls: type[Hyperparameters]) -> dict[str, tuple[Any, TypeAdapter]]:
    """Each field's annotation, and what checks it: looking annotations up takes milliseconds."""
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: (hints[f.name], TypeAdapter(hints[f.name], config=_FINITE)) for f in dataclasses.fields(cls)}


NO_SWITCH = "a number belongs here, not true or false"


def switch_for_number(value: Any, hint: Any) -> bool:
    """Whether a boolean is given where `hint` wants numbers. Python counts true as 1, but `r: true` is a mistake."""
    wanted = _kinds(hint)
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
    return bool not in wanted and bool(wanted & {int, float}) and any(isinstance(item, bool) for item in items)


def _kinds(hint: Any) -> set[Any]:
    return {hint}.union(*map(_kinds, get_args(hint)))


def _type_problems(owner: Hyperparameters) -> dict[str, str]:
    """Field -> what is wrong with it by its annotation; lossless conversions that YAML needs (1 -> 1.0, list -> tuple) are applied."""
    problems = {}
    cls: Any = type(owner)
    for name, (hint, adapter) in _field_types(cls).items():
        value = getattr(owner, name)
        if switch_for_number(value, hint):
            problems[name] = f"{name} = {reprlib.repr(value)}: {NO_SWITCH}"
            continue
        try:
            object.__setattr__(owner, name, adapter.validate_python(value))
        except ValidationError as e:
            problems[name] = _found(name, value, e)
    return problems


def _found(name: str, value: Any, error: ValidationError) -> str:
    """What is wrong with a value; of a list, with each of its entries."""
    found = [(err["loc"], err["msg"].removeprefix("Value error, ")) for err in error.errors()]
    if isinstance(value, list | tuple) and all(loc and isinstance(loc[0], int) for loc, _ in found):
        return "; ".join(f"{name}[{loc[0]}]{''.join(f'.{part}' for part in loc[1:])}: {text}" for loc, text in found)
    return f"{name} = {reprlib.repr(value)}: {'; '.join(dict.fromkeys(text for _, text in found))}"
