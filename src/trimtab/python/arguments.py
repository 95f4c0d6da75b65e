"""Keyword arguments: one that a function lacks is an error with the nearest name, or with the place where it belongs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from trimtab.errors import ConfigError
from trimtab.foreign import answer

P = ParamSpec("P")
R = TypeVar("R")


class UnknownArgument(ConfigError, TypeError):
    """A function was called with a keyword that it lacks."""


def with_known_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with such an error in the place of Python's."""
    known = list(inspect.signature(function).parameters)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if unknown := [name for name in kwargs if name not in known]:
            from trimtab.train.config import HOMES

            problems = [f"{name}: unknown{answer(name, known, HOMES)}" for name in unknown]
            fix = f"it takes {', '.join(known)}"
            raise UnknownArgument(f"trimtab.{function.__name__} was called with what it does not take", problems=problems, fix=fix)
        return function(*args, **kwargs)

    return call
