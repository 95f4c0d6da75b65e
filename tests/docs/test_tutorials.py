"""Tutorials, how-to pages and the reference run from the first block to the last one, in a folder of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from subprocess import PIPE

import pytest

from tests.docs.command import CLIENT
from tests.docs.pages import DOCS, ROOT, Block, blocks, pages, script
from tests.tiny import bundled_base, tiny_folder
from trimtab.bases.bundled import find_gguf

NAMES = ("smollm2-135m-instruct", "qwen2.5-0.5b-instruct")
"""The bases that the pages name, for which the tiny one stands in."""
PROGRAMS = [p for p in pages() if any(b.not_run is None and b.language in ("bash", "python") for b in blocks(p))]
SAID = {
    "tutorials/three-tenants.md": [
        r'"model": "support/answers@prod".*"model": "legal/clauses@prod"',
        r'"data":\[\{"id":"smollm2-135m-instruct",[^\]]*"id":"finance/messages",(?![^\]]*legal)',
        r"the model 'legal/clauses@prod' does not exist",
        r"no API key was given",
        r"changed finance: 8 answers",
    ],
    "how-to/rewards.md": [r"near of the own answers of 4 rows: 1, 1, 1, 1"],
    "how-to/move.md": [r"sample_packing: True", r"\['default'\] on llama"],
    "reference/files.md": [r"2 answers, 0 of them failed"],
}
"""What a page's commands print, where that is what the page is about."""
WHOLE = DOCS / "tutorials" / "first-adapter.md"
"""This one is run on the base that it names, to its end."""


@pytest.fixture(scope="session")
def docs_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base with the name of the bundled one, whose chat template knows tools, and with room for rows of a token a byte."""
    folder = tiny_folder(tmp_path_factory.mktemp("docs-base") / NAMES[0])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 4096}))
    (folder / "chat_template.jinja").write_text((files("trl") / "chat_templates" / "qwen2_5.jinja").read_text())
    return folder


@pytest.fixture(scope="session")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of the process that runs the scripts' calls of `trimtab`."""
    path = tmp_path_factory.mktemp("calls") / "socket"
    settings = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-P", "-m", "tests.docs.command", path], env=settings, cwd=path.parent) as process:
        try:
            while not path.exists():
                assert process.poll() is None
                time.sleep(0.05)
            yield path
        finally:
            process.kill()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(folder: Path, more: Mapping[str, str]) -> dict[str, str]:
    """Where `trimtab` and `python` are the ones that run the tests, and what is written stays below `folder`."""
    programs = folder / "bin"
    programs.mkdir()
    (programs / "client.py").write_text(CLIENT)
    for name, command in (("trimtab", f"-I -S {programs / 'client.py'}"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {command} "$@"\n')
        (programs / name).chmod(0o755)
    cache = os.environ.get("TRIMTAB_CACHE", str(Path.home() / ".cache" / "trimtab"))  # it has compiled kernels
    own = {"TRIMTAB_CACHE": cache, "HOME": str(folder), "TRIMTAB_STORE": str(folder / "store"), "XDG_DATA_HOME": str(folder / "data")}
    own |= {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    return os.environ | own | more


def run(page: Path, folder: Path, more: Mapping[str, str], change: Callable[[str], str] = str) -> str:
    """What the page's commands print."""
    place = folder / "checkout"
    place.mkdir()
    shutil.copytree(ROOT / "examples", place / "examples", ignore=shutil.ignore_patterns("runs"))
    program = change(script(blocks(page), free_port()))
    for file in place.rglob("*.yaml"):
        file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")
    command, settings = ["bash", "-c", program], environment(folder, more)
    with subprocess.Popen(command, cwd=place, env=settings, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True) as process:
        try:
            said, errors = process.communicate(timeout=240)
        finally:
            with suppress(ProcessLookupError):  # a server that is left
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"{said[-3000:]}\n{errors[-3000:]}"
    return said


def missing(page: Path, said: str) -> list[str]:
    """The lines of output that a page shows and its commands do not print, whatever the numbers are and the space between columns."""

    def masked(line: str) -> str:
        return " ".join(re.sub(r"\d[\d.,]*", "#", line).split())

    printed = {masked(line) for line in said.splitlines()}
    shown = [line for b in blocks(page) if b.language == "text" for line in b.text.splitlines()]
    return [line for line in shown if masked(line) not in printed]


def test_output_that_a_page_shows_and_nothing_prints_is_seen(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("```text\n┃ a ┃   loss, % ┃\n│ b │ 1.25→0.02 │\n```\n")
    assert missing(tmp_path / "page.md", "┃ a ┃ loss, % ┃\n│ b │ 11.5→7 │\n") == []
    assert missing(tmp_path / "page.md", "┃ a ┃ loss, % ┃ F1 ┃\n│ b │ 1→2 │\n") == ["┃ a ┃   loss, % ┃"]


def test_a_script_has_what_the_page_has() -> None:
    found = [
        Block("yaml", "a b.yaml", "x: 1\n", None),
        Block("bash", "", "cd first\n", None),
        Block("text", "", "shown\n", None),
        Block("bash", "", "make setup\n", "it takes long"),
        Block("bash", "", "trimtab serve --port 8000 --local\n", None),
        Block("python", "", "print(1)\n", None),
    ]
    text = script(found, 1234)
    assert "cat > 'a b.yaml' <<'END_OF_FILE'\nx: 1\nEND_OF_FILE" in text and "\ncd first\n" in text
    assert "make setup" not in text and "shown" not in text and "8000" not in text
    assert "trimtab serve  --local --port 1234 > serve-4.log" in text and text.rstrip().endswith("print(1)\nEND_OF_FILE")


def test_a_script_ends_where_a_command_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```bash\nfalse\necho more\n```\n")
    with pytest.raises(AssertionError):
        run(page, tmp_path, {})


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PROGRAMS if p != WHOLE], ids=lambda p: str(p.relative_to(DOCS)))
def test_a_page_runs(page: Path, docs_base: Path, calls: Path, tmp_path: Path) -> None:
    def on_tiny(program: str) -> str:
        for name in NAMES:
            program = program.replace(f"base: {name}", f"base: {docs_base}").replace(f"base_model: {name}", f"base_model: {docs_base}")
            program = program.replace(f"quantize {name}", f"quantize {docs_base}")
        return program

    said = run(page, tmp_path, {"TRIMTAB_CALLS": str(calls), "TEST_BASE": str(docs_base), "TEST_STEPS": "2"}, on_tiny)
    assert missing(page, said) == []
    assert not [p for p in SAID.get(str(page.relative_to(DOCS)), []) if not re.search(p, said, re.DOTALL)], said[-6000:]


@pytest.mark.slow
def test_the_first_tutorial_teaches_what_it_says(calls: Path, tmp_path: Path) -> None:
    if find_gguf() is None:
        bundled_base()  # fetched, or a skip
    said = run(WHOLE, tmp_path, {"TRIMTAB_CALLS": str(calls)})
    assert missing(WHOLE, said) == []
    summary = json.loads((tmp_path / "checkout" / "first" / "runs" / "first" / "summary.json").read_text())
    sorter = summary["variants"]["sorter"]
    assert (sorter["trainable"], summary["base_scores"]["requests"]["exact_match"]) == (2_442_240, 0.0)
    assert sorter["scores"]["exact_match"] > 80, "five of six, or all"
    assert "\nbug\n" in said and "\nwish\n" in said and "0 errors, 0 warnings" in said
