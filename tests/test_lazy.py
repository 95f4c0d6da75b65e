"""Packages that load a name's file when the name is first used."""

from __future__ import annotations

import ast
from importlib import import_module

from tests.test_floors import read


def test_a_lazy_package_is_asked_only_for_names_that_it_lists() -> None:
    """`ops.loss` is there only where somebody has imported that file before."""
    files = read()
    lazy = {name for name, source in files.items() if "load_on_first_use(__name__)" in source}
    assert "trimtab.ops" in lazy
    found = []
    for module, source in files.items():
        tree = ast.parse(source)
        names = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if f"{node.module}.{alias.name}" in lazy
        }
        found += [
            f"{module}:{node.lineno}: {names[node.value.id]} does not list {node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names
            if node.attr not in import_module(names[node.value.id]).__all__
        ]
    assert found == []
