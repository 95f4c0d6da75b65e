"""Each Python example of README and docs runs, in the order of its page, on a tiny base in a folder of its own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.tiny import tiny_folder
from trimtab.train import RunConfig

ROOT = Path(__file__).parent.parent.parent
BUNDLED = "smollm2-135m-instruct"
EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = {
    page.relative_to(ROOT): found
    for page in sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
    if (found := EXAMPLE.findall(page.read_text(encoding="utf-8")))
}


def test_pages_with_examples_are_found() -> None:
    assert {Path("docs/guide.md"), Path("docs/python.md")} <= PAGES.keys()


def test_the_readmes_run_is_that_of_the_example() -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    readme = RunConfig.from_dict(yaml.safe_load(text), root=ROOT / "examples")
    assert readme == RunConfig.load(ROOT / "examples" / "halyard.yaml")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the checkout, whose bundled base is a tiny one with room for rows of one token a byte."""
    tiny_folder(tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 4096}))
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("runs"))
    for path in (tmp_path / "examples").glob("*.yaml"):
        text = path.read_text(encoding="utf-8").replace(BUNDLED, str(tmp_path / "base")).replace("max_length: 512", "max_length: 4000")
        path.write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIMTAB_STORE", str(tmp_path / "store"))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_examples_of_a_page_run(page: Path, checkout: Path) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for example in PAGES[page]:
        source = example.replace(BUNDLED, str(checkout / "base"))
        exec(compile(source, str(page), "exec"), names)
