"""Which loops of a chat template can be followed by `beginnings`, and what stands behind them. Nothing is run here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from jinja2 import nodes

REST = "__rest"
"""The name under which a tail has what its loop has left."""


class Unproved(Exception):
    """Nothing can be said about this template or conversation."""


Path = tuple[tuple[Any, list[Any]], ...]
"""From the top to a loop: each statement, and those that follow it in its block."""


def loops(body: Sequence[Any], above: Path = ()) -> Iterator[Path]:
    """The loops that run once at most, at the top or in its conditions, and have none behind them: a tail with a loop would be a rendering
    of its own."""
    for i, node in enumerate(body):
        path = (*above, (node, list(body[i + 1 :])))
        if isinstance(node, nodes.If):
            for block in (node.body, *(e.body for e in node.elif_), node.else_):
                yield from loops(block, path)
        elif isinstance(node, nodes.For) and not node.recursive and not node.else_:
            again = any(isinstance(n, nodes.For) or next(n.find_all(nodes.For), None) is not None for n in continuation(path))
            if not again and not (node.test is not None and count([node], "loop")):
                yield path


def continuation(path: Path) -> list[Any]:
    return [node for _, following in reversed(path) for node in following]


def count(block: Sequence[Any], name: str) -> int:
    """How often a name stands in statements."""
    return sum(found.name == name for node in block for found in node.find_all(nodes.Name))


def refuse(tree: nodes.Template) -> None:
    """Unproved where a run has state that cannot be copied."""
    if next(tree.find_all((nodes.Block, nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport)), None) is not None:
        unproved("other templates")
    if any(node.name in ("cycler", "joiner", REST) for node in tree.find_all(nodes.Name)):
        unproved("counters")
    if any(node.name == "random" for node in tree.find_all(nodes.Filter)):
        unproved("chance")
    if any(node.attr == "changed" for node in tree.find_all(nodes.Getattr)):
        unproved("loop.changed")
    macros = list(tree.find_all(nodes.Macro))
    if len(macros) > sum(isinstance(node, nodes.Macro) for node in tree.body):
        unproved("a macro within something")
    stored = {node.name for node in tree.find_all(nodes.Name) if node.ctx != "load"}
    if len({m.name for m in macros} - stored) < len(macros):
        unproved("a macro's name stands for something else, too")
    plain = {
        id(node.node.node)
        for node in tree.find_all(nodes.Assign)
        if isinstance(node.target, nodes.Name) and isinstance(node.node, nodes.Call)
    }
    if any(node.name == "namespace" and id(node) not in plain for node in tree.find_all(nodes.Name)):
        unproved("a namespace within something")


def unproved(what: str) -> NoReturn:
    raise Unproved(what)
