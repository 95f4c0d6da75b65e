"""Chat templates rendered as transformers renders them, within bounds: a template comes with a base, and may loop or grow without end.

The environment has transformers' blocks, filters and functions, so that a text equals that of `apply_chat_template`; a test compares both.
Each rendering has a budget of characters. Every text and list that the template makes is charged its length before it is made. Every turn
of a loop and every call of a macro is charged one, and the literal text inside. A rendering that exceeds its budget, or runs longer than
MAX_SECONDS, ends with `TooMuch`. Nothing is computed when a template is compiled: jinja2 would compute 'a' * 10**10 there.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from trimtab.bases.sandbox_names import Dict, Generation, Namespace, TooMuch, bounded_range, raise_exception, strftime_now, tojson

__all__ = ["Program", "TooMuch"]

MAX_TEMPLATE = 2**20
"""Characters of a template. The longest published ones have about 50,000."""
MAX_WORK = 10**8
"""Characters that one rendering may make, intermediate texts included; and COPIES times what the messages have."""
COPIES = 16
MAX_SECONDS = 1.0
"""Processor time of one rendering. The longest conversations take a tenth of it."""
MAX_WIDTH = 10_000
"""To which a text may be padded or indented."""
PADDING = frozenset({"batch", "center", "expandtabs", "indent", "ljust", "rjust", "slice", "to_bytes", "tojson", "wordwrap", "zfill"})
SPELLING = frozenset({"e", "escape", "forceescape", "format", "pprint", "safe", "string", "tojson", "urlencode", "xmlattr"})
"""Filters that write out all that a value holds."""
WIDE = re.compile(r"%[^%a-zA-Z]*(\d{5}|\*)|\{[^{}]*:[^{}]*(\d{5}|\{)")
"""A format with a width of five digits, or with one that is computed."""


class Program:
    """A compiled template. Threads may render at the same time. names: of the variables that it reads.

    Raises jinja2.TemplateError or TooMuch where it cannot be compiled."""

    def __init__(self, text: str):
        if len(text) > MAX_TEMPLATE:
            raise TooMuch(f"it has {len(text):,} characters; at most {MAX_TEMPLATE:,} are read")
        self._environment = environment = Environment()
        try:
            tree = Bounds().visit(environment.parse(text))
            code = environment.compile(tree)
        except (RecursionError, SyntaxError, MemoryError) as error:
            raise TooMuch(f"it is nested too deeply to be compiled ({type(error).__name__})") from error
        self.names = frozenset(find_undeclared_variables(tree))
        self._template = environment.template_class.from_code(environment, code, environment.make_globals(None))

    def render(self, variables: Mapping[str, Any], size: int = 0) -> str:
        """The text. size: characters of the messages. Raises TooMuch where the budget does not suffice, else what the template raises."""
        with self._environment.budget(MAX_WORK + COPIES * size):
            try:
                return "".join(self._template.generate(**variables))
            except (RecursionError, MemoryError) as error:
                raise TooMuch(f"it calls itself without end ({type(error).__name__})") from error


class _Budget:
    """What is left to one rendering. until: in seconds of this thread's processor time."""

    __slots__ = ("calls", "left", "until", "whole")

    def __init__(self, amount: int):
        self.whole, self.left, self.calls, self.until = amount, amount, 0, time.thread_time() + MAX_SECONDS

    def spend(self, amount: int) -> None:
        self.left -= amount + 1
        self.calls += 1
        if self.left < 0:
            raise TooMuch(f"it makes more than {self.whole:,} characters")
        if not self.calls % 64 and time.thread_time() > self.until:
            raise TooMuch(f"it computes for more than {MAX_SECONDS:g} s")


class Environment(ImmutableSandboxedEnvironment):
    """transformers' environment, with a price on what it does."""

    intercepted_binops = frozenset({"+", "*", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, jinja2.ext.loopcontrols],
            optimized=False,
            finalize=_finalize,
        )
        self.of_thread = threading.local()
        self.filters["tojson"] = tojson
        self.filters = {name: self._priced(name, f) for name, f in self.filters.items()}
        self.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now, "dict": Dict(), "namespace": Namespace}
        self.globals["range"] = bounded_range
        del self.globals["lipsum"]
        self.tick = _Tick(self.spend)

    @contextmanager
    def budget(self, amount: int) -> Iterator[None]:
        """For what this thread renders inside."""
        self.of_thread.budget = _Budget(amount)
        try:
            yield
        finally:
            del self.of_thread.budget

    def spend(self, amount: int) -> None:
        self.of_thread.budget.spend(amount)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # a template's keyword may be `self`
        if type(__obj) is _Tick:
            return __obj(*args)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes | int):
            args = __self._paid(__obj.__name__, (owner, *args), kwargs)[1:]
        return __self._made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            if type(left) is str and type(right) is str:  # most of what templates do
                self.of_thread.budget.spend(len(left) + len(right))
                return left + right
            self.spend(_size(left) + _size(right))
        elif operator == "%" and isinstance(left, str):
            self._paid("format", (left, right), {})
        elif operator == "**":
            self.spend(_size(left) * abs(right) if isinstance(right, int) else 1)
        elif operator == "*":
            times, what = (left, right) if isinstance(left, int) else (right, left)
            self.spend(_size(what) * (max(times, 0) if isinstance(times, int) and not isinstance(what, int) else 1) + _size(times))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def paid(*args: Any, **kwargs: Any) -> str:
            self._paid("format", (value.__self__, *args), kwargs)
            return wrapped(*args, **kwargs)

        return paid

    def joined(self, *parts: Any) -> str:
        """What `~` does."""
        self.spend(sum(map(self._weight, parts)))
        return "".join(map(str, parts))

    def sliced(self, value: Any) -> Any:
        return self._made(value)

    def _made(self, value: Any) -> Any:
        self.spend(_size(value))
        return value

    def _priced(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that pays for what it reads and makes."""
        skipped = int(hasattr(function, "jinja_pass_arg"))

        @functools.wraps(function)  # copies what jinja2 notes on its filters
        def filter(*args: Any, **kwargs: Any) -> Any:
            return self._made(function(*args[:skipped], *self._paid(name, args[skipped:], kwargs), **kwargs))

        return filter

    def _paid(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """The arguments of a filter or a method of a text, paid for by what the result may be."""
        if not args:
            return args
        value, rest = args[0], [*args[1:], *kwargs.values()]
        widest = max((abs(n) for n in rest if isinstance(n, int)), default=0)
        if name in PADDING and widest > MAX_WIDTH:
            raise TooMuch(f"{name} by {widest:,}; at most {MAX_WIDTH:,}")
        if name == "join":
            first, others = (
                (value, rest) if not isinstance(value, str) or not rest else (rest[0], [value])
            )  # the filter's, or str.join's order
            items = list(first)
            self.spend(sum(map(self._weight, items)) + len(items) * sum(map(_size, others)))
            return (items, *args[1:]) if first is value else (value, items, *args[2:])
        if name == "replace" and len(rest) > 1:
            self.spend(str(value).count(str(rest[0])) * _size(rest[1]))
        elif name in ("format", "format_map"):
            if WIDE.search(str(value)):
                raise TooMuch(f"the format {str(value)[:40]!r} pads without bounds")
            self.spend((str(value).count("%") + str(value).count("{") + 1) * sum(map(self._weight, rest)))
        elif name in PADDING:
            self.spend((str(value).count("\n") + str(value).count("\t") + 1) * (widest + 1) if isinstance(value, str) else widest)
        self.spend(self._weight(value) if name in SPELLING else _size(value))
        return args

    def _weight(self, value: Any) -> int:
        """The length of `value` as text, about. What is counted is paid for, since lists in lists may spell more than can be counted."""
        total, left = 0, [value]
        while left:
            item = left.pop()
            total += _size(item)
            if isinstance(item, dict):
                left += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple | set):
                left += item
            if left:
                self.spend(1)
        return total


class _Tick:
    """Called by what `Bounds` puts into loops and macros."""

    def __init__(self, spend: Callable[[int], None]):
        self.spend = spend

    def __call__(self, amount: int) -> str:
        self.spend(amount)
        return ""


class Bounds(NodeTransformer):
    """Puts a payment into the body of every loop, macro and call block, and around what makes texts without calling anything."""

    def _body(self, node: Any) -> Any:
        literal = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(asked("tick", [nodes.Const(literal)], node.lineno), lineno=node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _body

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return asked("joined", node.nodes, node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return asked("sliced", [node], node.lineno) if isinstance(node.arg, nodes.Slice) else node


def asked(method: str, args: list[nodes.Expr], line: int) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method, lineno=line), args, [], None, None, lineno=line)


_SIZED = (bytes, list, tuple, dict, set, range)


def _size(value: Any) -> int:
    """Characters of a text or number, entries of a collection: what a copy costs."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() // 3
    return len(value) if isinstance(value, _SIZED) else 1


@jinja2.pass_context  # a context exists only at run time, so that nothing is written out when the template is compiled
def _finalize(context: Any, value: Any) -> Any:
    environment = context.environment
    environment.spend(len(value) if type(value) is str else environment._weight(value))
    return value
