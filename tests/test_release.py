"""The release script, on a small tree of its own: what it stamps and cuts, and what it refuses."""

from __future__ import annotations

import io
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from scripts.release import ROOT, STAMPS, Refused, committed, cut, look, stamped
from trimtab.version import __version__

LOG = "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- A thing.\n\n## [0.1.0] - 2026-01-01\n\n- The first.\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for file in STAMPS:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "src/trimtab/version.py").write_text('"""It."""\n\n__version__ = "0.1.0"\n')
    (tmp_path / "deploy/helm/trimtab/Chart.yaml").write_text('name: trimtab\nversion: 0.3.0\nappVersion: "0.1.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(LOG)
    return tmp_path


def test_the_tree_has_one_version() -> None:
    import re

    found = {re.search(pattern, (ROOT / file).read_text(encoding="utf-8"))[1] for file, pattern in STAMPS.items()}  # type: ignore[index]
    assert found == {__version__}


def test_a_cut_stamps_every_file_and_the_changelog(tree: Path) -> None:
    cut(tree, "0.2.0", "2026-02-03")
    assert stamped(tree) == "0.2.0"
    assert (tree / "CHANGELOG.md").read_text() == LOG.replace("[Unreleased]\n", "[Unreleased]\n\n## [0.2.0] - 2026-02-03\n")
    assert (tree / "deploy/helm/trimtab/Chart.yaml").read_text() == 'name: trimtab\nversion: 0.3.0\nappVersion: "0.2.0"\n'
    with pytest.raises(Refused, match=r"nothing under \[Unreleased\]"):
        cut(tree, "0.3.0", "2026-02-04")


def test_the_first_release_may_have_the_version_that_is_stamped(tree: Path) -> None:
    (tree / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased] / 0.1.0\n\n- A thing.\n")
    cut(tree, "0.1.0", "2026-02-03")
    assert stamped(tree) == "0.1.0" and "## [Unreleased]\n\n## [0.1.0] - 2026-02-03\n\n- A thing." in (tree / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    ("name", "said"), [("two", "not a version"), ("0.1.0", "does not come after 0.1.0"), ("0.0.9", "does not come after")]
)
def test_a_wrong_version_is_refused_and_nothing_is_written(tree: Path, name: str, said: str) -> None:
    with pytest.raises(Refused, match=said):
        cut(tree, name, "2026-02-03")
    assert (tree / "CHANGELOG.md").read_text() == LOG and stamped(tree) == "0.1.0"


def test_versions_that_differ_or_are_not_in_the_changelog_are_refused(tree: Path) -> None:
    (tree / "src/trimtab/version.py").write_text('__version__ = "0.2.0"\n')
    with pytest.raises(Refused, match=r"version\.py has 0\.2\.0, deploy/.*Chart\.yaml has 0\.1\.0"):
        stamped(tree)
    (tree / "deploy/helm/trimtab/Chart.yaml").write_text('appVersion: "0.2.0"\n')
    with pytest.raises(Refused, match=r"no section for 0\.2\.0"):
        stamped(tree)


def test_a_tree_with_changes_is_refused(tree: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@example.com", *words], cwd=tree, check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    assert committed(tree) == {"CHANGELOG.md", *STAMPS}
    (tree / "new.txt").write_text("x")
    with pytest.raises(Refused, match=r"\?\? new\.txt"):
        committed(tree)


def archives(folder: Path, wheel: dict[str, str], sdist: list[str]) -> tuple[Path, Path]:
    with zipfile.ZipFile(folder / "w.whl", "w") as z:
        for name, text in wheel.items():
            z.writestr(name, text)
    with tarfile.open(folder / "s.tar.gz", "w:gz") as t:
        for name in sdist:
            t.addfile(tarfile.TarInfo(f"trimtab-1/{name}"), io.BytesIO())
    return folder / "w.whl", folder / "s.tar.gz"


def test_archives_that_differ_from_the_commit_are_seen(tmp_path: Path) -> None:
    top = ["LICENSE", "README.md", "CHANGELOG.md", "SECURITY.md", "pyproject.toml", "Makefile", "constraints.txt", "mkdocs.yml"]
    files = {*top, "src/trimtab/a.py", "examples/desks.yaml", "tests/x.py"}
    metadata = "Metadata-Version: 2.4\nName: trimtab\nVersion: 1\n"
    good = {"trimtab/a.py": "", "trimtab/examples/desks.yaml": "", "trimtab-1.dist-info/METADATA": metadata}
    assert look(*archives(tmp_path, good, [*top, "src/trimtab/a.py", "PKG-INFO"]), files, "1") == []
    bad = {"trimtab/b.py": "", "trimtab/a.py": "", "trimtab-1.dist-info/METADATA": metadata}
    assert look(*archives(tmp_path, bad, [*top[1:], "src/trimtab/a.py", "secret.txt"]), files, "2") == [
        "the wheel says version 1, not 2",
        "the wheel lacks trimtab/examples/desks.yaml",
        "the wheel has trimtab/b.py, which is not committed",
        "the sdist lacks LICENSE",
        "the sdist has secret.txt, which is not committed",
    ]
