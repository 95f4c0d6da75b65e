"""The reference that is made from the code has all of it, and the hand-written page of the run file has the same keys and defaults."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import click
import pytest

import trimtab
from scripts import reference
from tests.docs.pages import DOCS
from tests.laws.common import base_of
from trimtab.cli import main
from trimtab.data import Source
from trimtab.methods import BY_NAME
from trimtab.objectives import OBJECTIVES
from trimtab.train.halving import Halving
from trimtab.train.options import DataConfig, EvalOptions, RunOptions, TrainOptions
from trimtab.train.runfile import read_value
from trimtab.train.search import SweepOptions

CLASSES = [RunOptions, DataConfig, Source, TrainOptions, EvalOptions, SweepOptions, Halving, *BY_NAME.values(), *OBJECTIVES.values()]
RUN_FILE = (DOCS / "run-file.md").read_text(encoding="utf-8")
SECTIONS = {
    RunOptions: "## Keys of the run",
    DataConfig: "### Keys of a data set",
    TrainOptions: "### Training options",
    EvalOptions: "### Scores",
    Source: "## Sources",
}
"""Where the page has the keys of a class."""
WORDS = {
    (TrainOptions, "lr"): "the method's",
    (TrainOptions, "seed"): "the run's",
    (Source, "format"): "by suffix",
    (Source, "split"): "`train`",
}
"""Defaults that the page says in words: those of null."""


def rows(text: str) -> dict[str, tuple[str, ...]]:
    """key -> the other cells, of all tables of a page whose first column is a name in code."""
    found = {}
    for line in re.findall(r"^\| (`.*) \|$", text, re.MULTILINE):
        first, *others = re.split(r"(?<!\\) \| ", line)
        for name in re.findall(r"`([\w.]+)`", first):
            found.setdefault(name, tuple(others))
    return found


@pytest.mark.parametrize("owner", CLASSES, ids=lambda c: c.__name__)
def test_every_key_has_a_meaning(owner: type) -> None:
    """A class that a reader's page is made from says what each of its fields is."""
    fields = getattr(owner, "model_fields", None) or [f.name for f in dataclasses.fields(owner)]
    keys = {k.name: k for k in reference.keys_of(owner)}
    assert set(fields) - set(keys) == set(reference.NOT_KEYS.get(owner, ())) & set(fields)
    assert not [name for name, key in keys.items() if len(key.meaning) < 2 or not key.type]


@pytest.mark.parametrize(("owner", "heading"), SECTIONS.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_the_run_files_page_has_the_keys_and_defaults_of_the_code(owner: type, heading: str) -> None:
    section = RUN_FILE.split(f"\n{heading}\n")[1]
    table, keys = rows(section[section.index("| key |") :].split("\n\n")[0]), {k.name: k for k in reference.keys_of(owner)}
    assert set(table) - {"defaults"} == set(keys)
    assert not {n: (table[n][1], k.default) for n, k in keys.items() if not same(table[n][1], k.default, WORDS.get((owner, n), ""))}


def same(said: str, default: str, words: str) -> bool:
    """Whether the page says a default as the code has it, as a value or in these words."""
    if said in (default, words) or (default == "null" and said in ("null", "none", "–")) or (default in ("[]", "{}") and said == "none"):
        return True
    return {str(value(x)) for x in said.strip("`").split(", ")} >= {str(value(default))}


def value(text: str) -> Any:
    found = read_value(text)
    return float(found) if isinstance(found, int) and not isinstance(found, bool) else found


def test_a_field_that_nobody_describes_is_seen() -> None:
    @dataclasses.dataclass
    class Toy:
        """r: rank. s, t: two more; each a number."""

        r: int = 1
        s: float = 1e-8
        t: str | None = None
        u: bool = False

    found = [(k.name, k.type, k.default, k.meaning) for k in reference.keys_of(Toy)]
    both = "two more; each a number"
    assert found == [
        ("r", "int", "1", "rank"), ("s", "float", "1e-8", both), ("t", "text or null", "null", both), ("u", "bool", "false", ""),
    ]  # fmt: skip


def test_http_has_every_route_and_its_bodies() -> None:
    text, document = reference.http(), reference.openapi()
    routes = {f"### `{verb.upper()} {path}`" for path, item in document["paths"].items() for verb in item}
    assert routes == set(re.findall(r"^### `[A-Z]+ /.*`$", text, re.MULTILINE)) and len(routes) > 20
    heads = {h.lower() for h in re.findall(r"^### (\w+)$", text, re.MULTILINE)}
    assert set(re.findall(r"\]\(#(\w+)\)", text)) <= heads
    assert "| `temperature` | float ≥ 0 ≤ 100 or null | `1.0` |" in text


def test_python_has_every_name() -> None:
    text = reference.python()
    assert set(re.findall(r"^::: trimtab[\w.]*\.(\w+)$", text, re.MULTILINE)) == set(trimtab.__all__) - {"__version__"}
    functions, rest = text.split("## Objects")
    assert (
        ".train\n" in functions and "Adapter" not in functions and ".Adapter\n" in rest and ".LoraConfig\n" in rest.split("## Methods")[1]
    )


def test_the_command_line_has_every_command_with_its_options() -> None:
    text = reference.commands()
    assert set(re.findall(r"^##+ (trimtab .*)$", text, re.MULTILINE)) >= leaves(main, click.Context(main, info_name="trimtab"))
    train = text.split("\n## trimtab train\n")[1].split("\n## ")[0]
    assert "```bash\ntrimtab train examples/desks.yaml\ntrimtab train examples/desks.yaml --resume\n" in train
    assert "| `--ranks` N | " in train and "(x>=1)" in train and "Sentinel" not in text and "\b" not in text
    assert (
        re.search(r"\| `--port` INTEGER RANGE \| `8000` \|", text)
        and "adapters/&lt;variant>" not in train
        and "adapters/\\<variant>" in train
    )


def test_the_page_of_files_has_the_keys_of_a_note(tmp_path: Path) -> None:
    """`trimtab.json` as an adapter has it that is saved now."""
    trimtab.Adapter.create(base_of("llama"), trimtab.LoraConfig(r=2)).save(tmp_path / "a")
    written = set(json.loads((tmp_path / "a" / "trimtab.json").read_text()))
    table = rows((DOCS / "reference" / "files.md").read_text(encoding="utf-8"))
    assert written <= set(table), "docs/reference/files.md does not have them"
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "trimtab.json", "README.md"}


def leaves(command: click.Command, context: click.Context) -> set[str]:
    if not isinstance(command, click.Group):
        return {context.command_path}
    found = ((n, command.get_command(context, n)) for n in command.list_commands(context))
    return {x for n, c in found if c for x in leaves(c, click.Context(c, info_name=n, parent=context))}


def test_the_commands_without_json_are_those_that_the_pages_name() -> None:
    def without(command: click.Command, context: click.Context) -> set[str]:
        if not isinstance(command, click.Group):
            return set() if any("--json" in p.opts for p in command.params) else {context.command_path.removeprefix("trimtab ")}
        inner = ((n, command.get_command(context, n)) for n in command.list_commands(context))
        return {x for n, c in inner if c for x in without(c, click.Context(c, info_name=n, parent=context))}

    for page in ("guide.md", "reference/command-line.md"):
        (named,) = re.findall(r"All but ([^.]*?)\s+have\s+`--json`", (DOCS / page).read_text(encoding="utf-8"))
        assert set(re.findall(r"`(.*?)`", named)) == without(main, click.Context(main, info_name="trimtab"))


@pytest.mark.filterwarnings("ignore:.*make_default_short_help:DeprecationWarning")  # click-man calls it
def test_there_is_a_manual_page_for_each_command(tmp_path: Path) -> None:
    pytest.importorskip("click_man", reason="click-man is not installed here: make docs")
    from scripts.man import write

    pages = {p.stem for p in write(tmp_path)}
    assert {name.replace(" ", "-") for name in leaves(main, click.Context(main, info_name="trimtab"))} <= pages
    assert "--resume" in (tmp_path / "trimtab-train.1").read_text().replace("\\-", "-")
