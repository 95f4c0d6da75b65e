"""What an installed trimtab carries: a wheel is built and unpacked, and the demo and the report page run from there."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import trimtab
from trimtab.cli import demo
from trimtab.errors import TrimtabError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, unpacked as pip would."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--disable-pip-version-check", "--wheel-dir", str(folder)]
    built = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=False)
    if built.returncode != 0 and "hatchling" in built.stderr:
        pytest.skip("pip cannot fetch hatchling, which builds the wheel")
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.slow
def test_the_package_has_its_files_and_no_others(installed: Path) -> None:
    held = {str(p.relative_to(installed / "trimtab")) for p in (installed / "trimtab").rglob("*") if p.is_file()}
    source, examples = ROOT / "src" / "trimtab", ROOT / "examples"
    code = {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    rows = {f"examples/{p.relative_to(examples)}" for p in (examples / "desks").rglob("*.jsonl")} | {"examples/desks.yaml"}
    assert held == code | rows
    assert {"web/report.html.j2", "web/report.css", "web/report.js", "examples/desks/support/train.jsonl"} <= held
    (metadata,) = installed.glob("trimtab-*.dist-info/METADATA")
    assert "\n# trimtab\n" in metadata.read_text(encoding="utf-8"), "the README is the description"


@pytest.mark.slow
def test_the_demo_finds_its_examples_where_there_is_no_checkout(installed: Path, tmp_path: Path) -> None:
    code = "from trimtab.cli.demo import examples; from trimtab.train import RunConfig; r = RunConfig.load(examples() / 'desks.yaml'); "
    code += "print(examples(), all((r.root / s.path).is_file() for d in r.data.values() for s in [*d.train, *d.valid, *d.test]))"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.stdout.split() == [str(installed / "trimtab" / "examples"), "True"], done.stderr


def test_the_examples_of_the_package_come_first_and_strangers_never(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo.examples() == ROOT / "examples"
    package = tmp_path / "lib" / "site-packages" / "trimtab"
    for folder in (package / "examples", tmp_path / "lib" / "examples"):  # the second is another program's
        folder.mkdir(parents=True)
        (folder / "desks.yaml").write_text("")
    monkeypatch.setattr(trimtab, "__file__", str(package / "__init__.py"))
    assert demo.examples() == package / "examples"
    (package / "examples" / "desks.yaml").unlink()
    with pytest.raises(TrimtabError, match="examples are not installed"):
        demo.examples()
