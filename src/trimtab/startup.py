"""What the process of a command leaves out while it starts: half of the CPU seconds before the first token are imports.

- transformers imports `torch._dynamo`, torch's compiler, for one small file and for decorators, and it brings sympy and many more. Here it
  is loaded when somebody uses more of it than those, as `torch.compile` does.
- The garbage collector looks at all objects again and again while an import makes a million that stay. Here it runs more rarely.

`trimtab` as a library leaves the process as it is.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from functools import partial, wraps
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import FunctionType, ModuleType
from typing import Any

COMPILER = "torch._dynamo"
BY_ITSELF = "_trace_wrapped_higher_order_op"
"""A file of the compiler that needs nothing else of it; transformers' masks import it."""
OBJECTS = 50_000
"""The collector runs after so many new objects; Python's own figure is 700 to 2,000."""


def quick() -> None:
    """For the process of a command, before torch is imported."""
    gc.set_threshold(OBJECTS, 20, 100)
    if COMPILER not in sys.modules:
        sys.meta_path.insert(0, _Finder())


def quick_end() -> None:
    """For its end: Python looks at all objects several times before it frees the modules. Those that are there now it need not look at."""
    gc.freeze()


class _Finder(MetaPathFinder):
    """Finds a stand-in for the compiler, until somebody needs the compiler itself."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == COMPILER:
            spec = PathFinder.find_spec(name, path, target)
            if spec is not None:
                spec.loader = _Made(_StandIn(name))
            return spec
        if not name.startswith(f"{COMPILER}.") or name == f"{COMPILER}.{BY_ITSELF}":
            return None
        _load()
        if (module := sys.modules.pop(name, None)) is not None:  # of the compiler, which has imported it: else it would run again
            return ModuleSpec(name, _Made(module))
        return PathFinder.find_spec(name, path, target)


class _Made(Loader):
    """Of a module that is made already: the import system puts it where it belongs, and there is nothing to execute."""

    def __init__(self, module: ModuleType):
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        """The import system has given the module a new spec; its own, if it has one, stays."""
        module.__spec__ = self._spec or module.__spec__


class _StandIn(ModuleType):
    """The compiler as long as nobody compiles: its decorators, and what an optimizer's step calls. Any other name loads the compiler."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system asks of every module
            raise AttributeError(name)
        return _WITHOUT[name] if name in _WITHOUT else getattr(_load(), name)


def _load() -> ModuleType:
    """The compiler itself, now under its name; what was decorated before is decorated."""
    stand_in = sys.modules.get(COMPILER)
    if not isinstance(stand_in, _StandIn):
        return import_module(COMPILER)
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _Finder)]
    del sys.modules[COMPILER]
    compiler = import_module(COMPILER)
    if (file := sys.modules.get(f"{COMPILER}.{BY_ITSELF}")) is not None:
        setattr(compiler, BY_ITSELF, file)
    while _decorated:
        name, function = _decorated.pop(0)
        getattr(compiler, name)(function)
    return compiler


def _disable(fn: Any = None, recursive: bool = True, **more: Any) -> Any:
    """A function that is not compiled. As long as the compiler is not loaded nothing is, so the function is called as it is."""
    if fn is None:
        return partial(_disable, recursive=recursive, **more)
    if not isinstance(fn, FunctionType):
        return _load().disable(fn, recursive, **more)
    disabled: Callable[..., Any] | None = None

    @wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            disable = vars(sys.modules[COMPILER]).get("disable")  # there when the compiler is, and has been loaded to the end
            if disable is None:
                return fn(*args, **kwargs)
            disabled = disable(fn, recursive, **more)
        return disabled(*args, **kwargs)

    return call


def _later(name: str, fn: Any) -> Any:
    """A decorator that only notes the function and returns it."""
    _decorated.append((name, fn))
    return fn


_decorated: list[tuple[str, Any]] = []
_WITHOUT: dict[str, Callable[..., Any]] = {
    "disable": _disable,
    "graph_break": lambda msg="": None,  # as it is, too, where nothing is compiled
    **{name: partial(_later, name) for name in ("allow_in_graph", "assume_constant_result")},
}
