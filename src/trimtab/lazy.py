"""Packages that load a name's file when the name is first used, so that reading a run file or listing a store imports no torch."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any


def load_on_first_use(package: str) -> None:
    """Called by a package's `__init__` in the `else` of its `if TYPE_CHECKING:`. What is imported there, for people and type checkers, is
    what the package has; each name is written once."""
    module = sys.modules[package]
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    homes = {
        alias.name: str(node.module)
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    module.__class__ = LazyPackage
    vars(module).update(__getattr__=_loader(module, homes), __lazy__=frozenset(homes), __homes__=homes)


class LazyPackage(ModuleType):
    """A package that has both a function `load` and a file `load.py`: importing the file must not hide the function. A package of that name
    (`trimtab.train`) stands in the function's place and can be called as it."""

    __lazy__: frozenset[str]
    __homes__: Mapping[str, str]

    def __setattr__(self, name: str, value: object) -> None:
        hides = name in self.__lazy__ and isinstance(value, ModuleType)
        if hides and hasattr(value, "__path__"):
            _let_call(value, lambda: getattr(import_module(self.__homes__[name]), name))
        if not hides or hasattr(value, "__path__"):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__lazy__})


def _let_call(package: Any, function: Callable[[], Callable[..., Any]]) -> None:
    """Make a package callable as a function, which is loaded at the first call. `help` and notebooks see its signature and docstring."""

    class Called(type(package)):  # type: ignore[misc]
        __doc__ = property(lambda self: function().__doc__)  # type: ignore[assignment]

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function()(*args, **kwargs)

        @property
        def __signature__(self) -> inspect.Signature:
            return inspect.signature(function())

    package.__class__ = Called


def _loader(module: ModuleType, homes: dict[str, str]) -> Callable[[str], Any]:
    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        value = getattr(import_module(homes[name]), name)
        return vars(module).setdefault(name, value)

    return load
