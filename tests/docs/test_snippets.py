"""Every block of the new pages is of a known kind, and right as far as it can be told without running it."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.pages import DOCS, SHOWN, blocks, pages
from trimtab.train import RunConfig
from trimtab.train.runfile import read_value

PAGES = pages()
IDS = [str(p.relative_to(DOCS)) for p in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_blocks_are_right(page: Path, tmp_path: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            ast.parse(block.text)
        elif block.language == "json":
            for line in block.text.splitlines():
                json.loads(line)
        elif block.language == "yaml":
            content: Any = read_value(block.text)
            if "variants" in content:
                RunConfig.from_dict(content, root=tmp_path)
        else:
            assert block.language in ("bash", *SHOWN), f"a block of {block.language}: nothing checks it"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_run_files_and_rows_have_names(page: Path) -> None:
    """Without a title a reader could not save a file, and the page's test would not write it. Rows are named where they are used."""
    said = [b for b in blocks(page) if b.not_run is None]
    assert not [b.text for b in said if b.language == "yaml" and not b.title]
    text = "\n".join(b.text for b in said)
    for block in said:
        if block.title:
            assert block.title.removesuffix(".yaml") in text.replace(block.text, ""), f"{block.title} is written and not used"


def test_a_wrong_block_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for text in ('```yaml title="a.yaml"\nvariants: {v: {method: lora, lr: x}}\n```\n', '```json\n{"a": 1,}\n```\n', "```sh\nls\n```\n"):
        page.write_text(text)
        with pytest.raises((AssertionError, ValueError, Exception)):
            test_blocks_are_right(page, tmp_path)
    page.write_text("- item\n\n  ```bash\n  ls\n  ```\n")
    with pytest.raises(AssertionError, match="written in another way"):
        blocks(page)


def test_the_site_has_every_page_and_no_others() -> None:
    """mkdocs says so too, but only where it is installed."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
    text = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    nav = yaml.load(text, Loader=Loader)["nav"]
    named = set(re.findall(r"'([\w/.-]+\.md)'", str(nav)))
    inside = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")}
    assert named == inside | {"CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "examples/README.md"}
