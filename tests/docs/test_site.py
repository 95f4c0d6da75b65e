"""The check of the built site sees what it is for; and where mkdocs is installed, the site is built and checked as `make docs` does."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from scripts.check_site import problems
from tests.docs.pages import ROOT

GOOD = '<h1 id="a">A</h1><a href="b/two.html#x">x</a><a href="https://docs.ray.io/en/latest">out</a><img src="data:image/png;base64,AA==">'


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "b").mkdir()
    (tmp_path / "index.html").write_text(GOOD)
    (tmp_path / "b" / "two.html").write_text('<p id="x"><a href="../index.html">up</a><a href="#x">here</a><a href="..">folder</a></p>')
    (tmp_path / "404.html").write_text('<a href="/b/two.html">two</a>')
    (tmp_path / "site.css").write_text("p { background: url(data:image/svg+xml;utf8,x) }")
    return tmp_path


def test_a_good_site_has_no_problems(site: Path) -> None:
    assert problems(site) == []


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        ('<a href="b/three.html">', "index.html: b/three.html leads nowhere"),
        ('<a href="b/two.html#y">', "index.html: b/two.html#y names no anchor of that page"),
        ('<a href="#nowhere">', "index.html: #nowhere names no anchor of that page"),
        ('<a href="/b/two.html">', "index.html: /b/two.html begins at the root of a host, which a folder does not have"),
        ('<script src="https://cdn.example/x.js"></script>', "index.html: loads https://cdn.example/x.js from elsewhere"),
        ('<link rel="stylesheet" href="//fonts.example/f.css">', "index.html: loads //fonts.example/f.css from elsewhere"),
        ('<link rel="canonical" href="https://example.com/">', None),
        ('<a href="http://docs.ray.io">', "index.html: http://docs.ray.io is not https"),
        ('<a href="//docs.ray.io">', "index.html: //docs.ray.io is not https"),
        ('<a href="mailto:a@docs.ray.io">', "index.html: mailto:a@docs.ray.io is not https"),
        ('<a href="https://docs.ray.io/a b">', "index.html: https://docs.ray.io/a b is no well-formed address"),
        ('<a href="https://user@docs.ray.io">', "index.html: https://user@docs.ray.io is no well-formed address"),
        (
            '<a href="https://docs.rey.io/">',
            "index.html: https://docs.rey.io/ names a host that nobody has looked at; follow it, and add docs.rey.io to HOSTS",
        ),
        ('<img src="missing.png">', "index.html: missing.png leads nowhere"),
    ],
)
def test_a_planted_fault_is_seen(site: Path, planted: str, said: str | None) -> None:
    (site / "index.html").write_text(GOOD + planted)
    assert problems(site) == ([said] if said else [])


@pytest.mark.parametrize("style", ["p { background: url('https://a.example/b.png') }", '@import "https://a.example/c.css";'])
def test_a_style_that_loads_is_seen(site: Path, style: str) -> None:
    (site / "site.css").write_text(style)
    (said,) = problems(site)
    assert said.startswith("site.css: loads https://a.example/")


@pytest.mark.slow
def test_the_site_is_built_and_whole(tmp_path: Path) -> None:
    if find_spec("material") is None or find_spec("mkdocstrings") is None:
        pytest.skip("what builds the site is not installed here: make docs")
    settings = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert problems(tmp_path / "site") == []
    pages = {p: p.read_text(encoding="utf-8") for p in (tmp_path / "site").rglob("*.html")}
    assert not [p for p, text in pages.items() if "<!-- made from the code:" in text], "a part that is to be made from the code is not"
    reference = {p.name: text for p, text in pages.items() if p.parent.name == "reference"}
    assert "<code>loraplus_lr_ratio</code>" in reference["keys.html"] and "/v1/chat/completions" in reference["http.html"]
    assert "max-restarts" in reference["command-line.html"] and "merge_into" in reference["python.html"]
