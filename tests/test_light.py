"""Commands that need no tensor load no library of tensors, and `trimtab.http` never does. Each case runs in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.store.stores import adapter_folder
from tests.train.common import METHODS
from tests.train.past import run_folder, variant
from trimtab.cli import COMMANDS
from trimtab.cli.adapters import SUBCOMMANDS
from trimtab.cli.store import store as store_group
from trimtab.cli.tenants import tenants as tenants_group
from trimtab.store.registry import Store

SOURCE = Path(__file__).parent.parent / "src"
HEAVY = ("torch", "transformers", "numpy", "tokenizers", "safetensors", "huggingface_hub", "accelerate", "gguf", "datasets", "pandas")
FORKING = f"""
import importlib, io, json, os, sys
from contextlib import redirect_stderr, redirect_stdout
import click, fastapi.openapi.utils, jinja2, pydantic, rich.table, uvicorn, yaml  # what is light is read once
import trimtab.cli, trimtab.cli.adapters, trimtab.cli.compare, trimtab.train.config  # and this, as long as it is

def heavy():
    return [name for name in {HEAVY!r} if name in sys.modules]

def modules(*names):
    loaded = dict()
    for name in names:
        before = heavy()
        importlib.import_module(name)
        loaded[name] = [n for n in heavy() if n not in before]
    return 0, loaded

def command(*arguments):
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            trimtab.cli.main(arguments)
    except SystemExit as end:
        return end.code, said.getvalue()[-2000:]
    return 0, said.getvalue()[-2000:]

for kind, arguments, environment in map(json.loads, sys.stdin):
    assert not heavy()
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.environ.update(environment)
        code, said = globals()[kind](*arguments)
        os.write(writing, json.dumps([code, said, heavy()]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        print(answer.read() or "null", flush=True)
    os.wait()
"""
"""Reads ["modules", names, {}] or ["command", arguments, environment], one a line. A line for each: the exit code; what was printed, or
what of HEAVY each module has loaded; what of HEAVY there is in the end."""
Fork = Callable[..., Any]


@pytest.fixture(scope="module")
def fork() -> Iterator[Fork]:
    """Answers a case in a process of its own: one process that has loaded what is light forks them all."""
    command, environment = [sys.executable, "-c", FORKING], os.environ | {"PYTHONPATH": str(SOURCE)}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout

        def answer(kind: str, case: list[str], **environment: str) -> Any:
            print(json.dumps([kind, case, environment]), file=process.stdin, flush=True)
            found = json.loads(process.stdout.readline() or "null")
            assert found, case
            return found

        yield answer
        process.stdin.close()
        assert process.wait(timeout=60) == 0


def refuse_heavy(cases: list[list[str]], answers: list[Any]) -> None:
    loaded = {" ".join(case): heavy for case, (_, _, heavy) in zip(cases, answers, strict=True) if heavy}
    assert loaded == {}


def test_no_module_of_http_loads_torch(fork: Fork) -> None:
    names = [f"trimtab.http.{path.stem}".removesuffix(".__init__") for path in sorted((SOURCE / "trimtab" / "http").glob("*.py"))]
    assert "trimtab.http" in names and "trimtab.http.limits" in names and len(names) > 15
    _, loaded, _ = fork("modules", names)
    assert {name: heavy for name, heavy in loaded.items() if {"torch", "transformers", "safetensors"} & {*heavy}} == {}


def test_importing_trimtab_loads_nothing(fork: Fork) -> None:
    names = ["trimtab", "trimtab.cli", "trimtab.store", "trimtab.train", "trimtab.data", "trimtab.methods", "trimtab.ops"]
    assert fork("modules", names) == [0, {name: [] for name in names}, []]


def test_help_loads_nothing(fork: Fork) -> None:
    cases = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    for group, commands in (("adapters", SUBCOMMANDS), ("store", store_group.commands), ("tenants", tenants_group.commands)):
        cases += [[group, name, "--help"] for name in commands]
    answers = [fork("command", case) for case in cases]
    assert [code for code, _, _ in answers] == [0] * len(cases)
    refuse_heavy(cases, answers)


def test_what_lists_and_names_loads_nothing(fork: Fork, tmp_path: Path) -> None:
    store = Store(tmp_path / "store", create=True)
    for weights in (0, 1):
        store.publish(adapter_folder(tmp_path / f"adapter-{weights}", weights), "acme/a")
    runs = [run_folder(tmp_path / "runs" / name, {"v": variant()}) for name in ("one", "two")]
    cases = [
        ["adapters", "list"],
        ["adapters", "list", "acme", "--json"],
        ["adapters", "show", "acme/a@1"],
        ["adapters", "diff", "acme/a@1", "acme/a@2", "--no-weights"],
        ["adapters", "alias", "acme/a@1", "prod"],
        ["adapters", "unalias", "acme/a", "prod"],
        ["adapters", "push", "acme/a@1", f"file://{tmp_path}/elsewhere"],
        ["adapters", "remove", "acme/a@1"],
        ["store", "where"],
        ["store", "init"],
        ["store", "verify"],
        ["store", "gc", "--dry-run"],
        ["tenants", "add", "acme", "--db", str(tmp_path / "tenants.db")],
        ["tenants", "list", "--db", str(tmp_path / "tenants.db")],
        ["tenants", "usage", "--db", str(tmp_path / "tenants.db")],
        ["compare", *map(str, runs)],
        ["compare", *map(str, runs), "--html", str(tmp_path / "page.html")],
    ]
    answers = [fork("command", case, TRIMTAB_STORE=str(store.root)) for case in cases]
    assert [(code, said) for code, said, _ in answers if code != 0] == []
    refuse_heavy(cases, answers)


WRONG = {
    "unknown key": {"bsae": "x"},
    "wrong types": {"seed": "many", "variants": {"v": {"data": "a", "method": "lora", "r": "large", "lr": -1}}},
    "no rows named": {"data": {"a": {}}},
    "every method": {"variants": {name: fields | {"data": "b"} for name, fields in METHODS.items()}},
    "a non-linearity": {"variants": {"v": {"data": "a", "method": "bottleneck", "non_linearity": "rleu"}}},
    "a store's namespace": {"store": "Not A Word"},
}


@pytest.mark.parametrize("command", ["train", "check", "sweep"])
def test_a_mistake_in_a_run_file_loads_nothing(fork: Fork, command: str, tmp_path: Path) -> None:
    cases, start = [], {"base": "smollm2-135m-instruct", "out": "out", "data": {"a": {"train": "rows.jsonl"}}}
    variants = {"sweep": {"data": "a", "template": {"method": "lora"}, "over": {"r": ["x"]}}} if command == "sweep" else {}
    for name, keys in WRONG.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(start | {"variants": {"v": {"data": "a", "method": "lora"}}} | keys | variants))
        cases.append([command, str(path)])
    cases += [[command, str(tmp_path / "absent.yaml")], [command, str(tmp_path)]]
    answers = [fork("command", case) for case in cases]
    assert [(code, said) for code, said, _ in answers if code != 2] == []
    refuse_heavy(cases, answers)


def test_a_mistake_in_a_plan_loads_nothing(fork: Fork) -> None:
    cases = [["plan", "llama-2-7b", "--method", "lroa"], ["plan", "llama-2-7b", "--method", "bottleneck", "-o", "non_linearity=rleu"]]
    answers = [fork("command", case) for case in cases]
    assert [code for code, _, _ in answers] == [2, 2]
    refuse_heavy(cases, answers)
