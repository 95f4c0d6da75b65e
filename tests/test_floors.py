"""The floors of the design: a file imports only from floors below, or from its own floor without a cycle.

Found by parsing, so imports inside functions count too. Names that only type checkers see are no reason for a cycle either.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "trimtab"

FLOORS = {
    **dict.fromkeys(
        [
            "atomic",
            "compiler",
            "errors",
            "foreign",
            "hyperparameters",
            "lazy",
            "memory",
            "ops",
            "paths",
            "patterns",
            "places",
            "startup",
            "tables",
            "version",
        ],
        0,
    ),
    **dict.fromkeys(["methods", "bases"], 1),
    "forward": 2,
    "decode": 3,
    "model": 4,
    **dict.fromkeys(["store", "data", "rewards"], 5),
    "objectives": 6,
    **dict.fromkeys(["cost", "train", "serve", "tryout"], 7),
    **dict.fromkeys(["http", "cluster", "fleet"], 8),
    "cli": 9,
    "python": 9.5,
    "__main__": 10,
}
FACADE = 9.6
"""`import trimtab` loads everything by name: for the command line and for people, not for the floors that it stands on."""

APART = [{"train", "serve"}]
KERNELS = {"mm", "bmm", "baddbmm", "addmm", "addmm_", "torch.matmul", "einsum", "scaled_dot_product_attention", "flex_attention", "triton"}
"""Calls that mean a kernel (`@` is for small algebra, as in a merge; `matmul` of anything but torch is a base's weight's)."""

WEIGHTS = "trimtab.bases.weights"
"""Where a module's weight is read. Everybody else asks `weight_of` for a matrix and `norm_weight` for a norm's vector."""
MADE_IN_THE_DEFAULT = {f"torch.{name}" for name in ("empty", "zeros", "ones", "full", "eye", "rand", "randn", "linspace", "logspace")}
SHARES = {
    "serve": {"tenant", "request", "holding", "h", "self"},
    "fleet": {"request"},
    "http": {"tenant"},
    "cli": {"tenant", "wanted", "s"},
    "data": {"source", "self"},
    "train.check": {"source"},
    "train.rewarding": {"r"},
}
"""Where `weight` is another word, and whose it is there: a tenant's share of the server, a source's share of the rows, a
reward's share of the sum."""


@dataclass(frozen=True)
class Import:
    line: int
    target: str
    typing_only: bool


def read(folder: Path = SOURCE) -> dict[str, str]:
    """dotted module name -> source, of every file."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = ("trimtab", *path.relative_to(folder).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


@lru_cache(None)
def nodes(source: str) -> list[ast.AST]:
    """All of a file's syntax tree."""
    return list(ast.walk(ast.parse(source)))


def imports(module: str, source: str, known: Mapping[str, str]) -> Iterator[Import]:
    """What a file imports: of trimtab, the module that holds the name; of others, their dotted name. A package that loads its names on
    first use does import what it lists for type checkers."""
    typing_only = (
        set()
        if "load_on_first_use(__name__)" in source
        else {
            id(inner)
            for node in nodes(source)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for statement in node.body
            for inner in ast.walk(statement)
        }
    )
    for node in nodes(source):
        if isinstance(node, ast.Import):
            targets = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno} is a relative import: write the whole name, so that floors are seen"
            targets = [f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in known else str(node.module) for a in node.names]
            if node.module == "trimtab":
                targets = [t for t, a in zip(targets, node.names, strict=True) if a.name != "__version__"]
        else:
            continue
        for target in dict.fromkeys(targets):
            yield Import(node.lineno, target, id(node) in typing_only)


def top(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def floor(module: str) -> float:
    return FLOORS.get(top(module), FACADE)


def violations(files: Mapping[str, str]) -> list[str]:
    """Every finding, as "module:line says what"."""
    found = [f"{m}: not in the map: give {top(m)!r} a floor in FLOORS" for m in files if m != "trimtab" and top(m) not in FLOORS]
    graph: dict[str, set[str]] = {}
    for module, source in files.items():
        found += (
            [f"{module}: no utils: name the file after what it does"] if module.rpartition(".")[2] in ("utils", "util", "helpers") else []
        )
        if module == "trimtab":
            continue  # the facade: it loads what it is asked for
        found += [f"{module}:{line}: {what} is read: a module's weight is read in {WEIGHTS}" for line, what in weights(module, source)]
        found += [f"{module}:{line}: {what} has torch's default dtype: name one" for line, what in without_dtype(source)]
        if top(module) != "ops":
            found += [f"{module}:{line}: {what} is a kernel: kernels live in ops" for line, what in kernels(source)]
        for i in imports(module, source, files):
            if i.target.split(".")[0] == "torch" and top(module) == "http":
                found.append(f"{module}:{i.line}: http never imports torch")
            if i.target.split(".")[0] != "trimtab":
                continue
            if i.target != module:
                graph.setdefault(module, set()).add(i.target)
            if i.typing_only:
                continue
            if floor(i.target) > floor(module):
                found.append(f"{module}:{i.line}: imports {i.target}, which is above it")
            if {top(module), top(i.target)} in APART:
                found.append(f"{module}:{i.line}: {top(module)} and {top(i.target)} never import each other")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        found.append(f"a cycle: {' -> '.join(reversed(e.args[1]))}")
    return found


def kernels(source: str) -> Iterator[tuple[int, str]]:
    for node in nodes(source):
        if isinstance(node, ast.Attribute) and (node.attr in KERNELS or (node.attr == "matmul" and ast.unparse(node) in KERNELS)):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ClassDef) and any(ast.unparse(b).endswith("autograd.Function") for b in node.bases):
            yield node.lineno, f"{node.name}(autograd.Function)"
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and "triton" in ast.unparse(node).split():
            yield node.lineno, "triton"


def without_dtype(source: str) -> Iterator[tuple[int, str]]:
    """Every tensor that is made in the dtype which the program, or another thread, has set last. Kernels once wrote fp32 into half the
    room."""
    for node in nodes(source):
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in MADE_IN_THE_DEFAULT
            and not {k.arg for k in node.keywords} & {"dtype", "out"}
        ):
            yield node.lineno, ast.unparse(node.func)


def weights(module: str, source: str) -> Iterator[tuple[int, str]]:
    """Every reading of a `weight` that may be a module's."""
    if module.startswith(WEIGHTS):
        return
    shares = next((owners for place, owners in SHARES.items() if f"{module}.".startswith(f"trimtab.{place}.")), set())
    for node in nodes(source):
        if not isinstance(node, (ast.Attribute, ast.Call, ast.Subscript)):
            continue
        text = ast.unparse(node)
        if isinstance(node, ast.Attribute):
            read = node.attr == "weight" and ast.unparse(node.value).rpartition(".")[2] not in shares
        elif isinstance(node, ast.Call):
            read = bool(
                re.match(r"(getattr|hasattr|setattr|.*\.(get_parameter|register_parameter|_parameters\.get))\(.*['\"]weight['\"]", text)
            )
        else:
            read = bool(re.search(r"parameters\W*\['weight'\]$", text))
        if read:
            yield node.lineno, text


def test_every_file_keeps_to_its_floor():
    files = read()
    assert len(files) > 20, "the source was not found"
    assert violations(files) == []


def test_typing_imports_that_point_upwards_are_these():
    """Exempt from the floors, but listed: each is a name in an annotation, never a call."""
    files = read()
    upward = {
        (module, i.target)
        for module, source in files.items()
        if module != "trimtab"
        for i in imports(module, source, files)
        if i.typing_only and i.target.split(".")[0] == "trimtab" and floor(i.target) > floor(module)
    }
    assert upward == set()


IMPORTED = ("trimtab.methods.base", "trimtab.serve.engine", "trimtab.train.step")
"""Files within packages that the planted violations import, whatever the source holds today."""


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        ("trimtab.ops", "from trimtab.methods.base import Span", "trimtab.ops:1: imports trimtab.methods.base, which is above it"),
        ("trimtab.errors", "def f():\n    from trimtab import model", "trimtab.errors:2: imports trimtab.model, which is above it"),
        ("trimtab.bases.load", "import trimtab.store", "imports trimtab.store, which is above it"),
        ("trimtab.model", "from trimtab import Adapter", "imports trimtab, which is above it"),
        ("trimtab.train.loop", "from trimtab.serve import engine", "train and serve never import each other"),
        ("trimtab.serve.engine", "import trimtab.train.step", "serve and train never import each other"),
        ("trimtab.http.app", "import torch.nn", "http never imports torch"),
        ("trimtab.http.app", "if True:\n    from torch import Tensor", "trimtab.http.app:2: http never imports torch"),
        ("trimtab.forward.packs", "import torch\ntorch.bmm(a, b)", "trimtab.forward.packs:2: bmm is a kernel"),
        ("trimtab.train.loss", "class F(torch.autograd.Function): ...", "F(autograd.Function) is a kernel"),
        ("trimtab.forward.hosts", "def f(module):\n    return module.weight.T", "trimtab.forward.hosts:2: module.weight is read"),
        ("trimtab.ops.edit", "y = x @ self.weight", "self.weight is read"),
        ("trimtab.store.merge", "w = getattr(module, 'weight', None)", "getattr(module, 'weight', None) is read"),
        ("trimtab.train.full", "w = head._parameters['weight']", "head._parameters['weight'] is read"),
        ("trimtab.train.full", "w = dict(head.named_parameters())['weight']", "['weight'] is read"),
        ("trimtab.serve.engine", "w = base.head.weight", "base.head.weight is read"),
        ("trimtab.train.step", "w = source.weight", "source.weight is read"),
        ("trimtab.ops.edit", "y = torch.empty(3, device=x.device)", "trimtab.ops.edit:1: torch.empty has torch's default dtype"),
        ("trimtab.data.utils", "", "no utils"),
        ("trimtab.extras", "", "give 'extras' a floor"),
    ],
)
def test_a_planted_violation_is_found(module, source, words):
    planted = dict.fromkeys(["trimtab", *(f"trimtab.{name}" for name in FLOORS), *IMPORTED], "") | {module: source}
    findings = violations(planted)
    assert len(findings) == 1 and words in findings[0], findings


def test_a_cycle_is_found_for_typing_too():
    cycle = {"trimtab.forward.packs": "from trimtab.forward.batch import Batch", "trimtab.forward.batch": "import trimtab.forward.packs"}
    assert "a cycle: " in violations(cycle)[0]
    typed = cycle | {"trimtab.forward.batch": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import trimtab.forward.packs"}
    assert "a cycle: " in violations(typed)[0]
    assert violations({"trimtab.forward.packs": "from trimtab import __version__"}) == []
