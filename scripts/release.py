"""What a release needs, short of publishing it.

    python -m scripts.release cut 0.2.0     # stamps the version wherever it stands, and cuts the changelog
    python -m scripts.release check         # builds wheel and sdist from the commit, and looks at them

`cut` changes files and commits nothing. `check` wants what `cut` wrote: the version's section in the changelog, and the same version
everywhere.
"""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from datetime import UTC, datetime
from pathlib import Path

from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).parent.parent
STAMPS = {
    "src/trimtab/version.py": r'(?m)^__version__ = "(.*)"$',
    "deploy/helm/trimtab/Chart.yaml": r'(?m)^appVersion: "(.*)"$',
}
"""Where the version stands: file -> a pattern whose group is the version."""
UNRELEASED = re.compile(r"^## \[Unreleased\].*\n", re.MULTILINE)
SECTION = r"(?ms)^## \[{}\].*?\n(.*?)(?=^## |\Z)"


class Refused(Exception):
    """The reason why this cannot be released."""


def cut(root: Path, name: str, day: str) -> None:
    """Stamp version `name` and make the changelog's unreleased part its section, with a new empty one above."""
    try:
        version = Version(name)
    except InvalidVersion:
        raise Refused(f"{name!r} is not a version, such as 0.2.0") from None
    log = root / "CHANGELOG.md"
    text = log.read_text(encoding="utf-8")
    released = [Version(m) for m in re.findall(r"(?m)^## \[(\d[^\]]*)\]", text)]
    if any(version <= old for old in released):
        raise Refused(f"{name} does not come after {max(released)}, which the changelog has already")
    part = re.search(SECTION.format("Unreleased"), text)
    if part is None or not re.search(r"(?m)^- ", part[1]):
        raise Refused("the changelog has nothing under [Unreleased]")
    log.write_text(UNRELEASED.sub(lambda _: f"## [Unreleased]\n\n## [{name}] - {day}\n", text, count=1), encoding="utf-8")
    for file, pattern in STAMPS.items():
        old = (root / file).read_text(encoding="utf-8")
        found = re.search(pattern, old)
        assert found is not None, file
        (root / file).write_text(old[: found.start(1)] + name + old[found.end(1) :], encoding="utf-8")


def stamped(root: Path) -> str:
    """The version that all files have. Refused where they differ, or where the changelog lacks it."""
    found = {}
    for file, pattern in STAMPS.items():
        match = re.search(pattern, (root / file).read_text(encoding="utf-8"))
        found[file] = match[1] if match else "none"
    if len(set(found.values())) > 1:
        raise Refused("the versions differ: " + ", ".join(f"{f} has {v}" for f, v in found.items()))
    version = next(iter(found.values()))
    section = re.search(SECTION.format(re.escape(version)), (root / "CHANGELOG.md").read_text(encoding="utf-8"))
    if section is None or not re.search(r"(?m)^- ", section[1]):
        raise Refused(f"the changelog has no section for {version}: make release VERSION={version}")
    return version


def committed(root: Path) -> set[str]:
    """The files of the commit. Refused where the tree has something else: it would get into the archives."""
    if changes := git(root, "status", "--porcelain"):
        raise Refused(f"there is something that is not committed:\n{changes}")
    return set(git(root, "ls-files").splitlines())


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout


def build(root: Path, out: Path) -> tuple[Path, Path]:
    """Wheel and sdist; the wheel is built from the sdist, so a file that the sdist lacks is missed here."""
    subprocess.run([sys.executable, "-m", "build", "--outdir", out, root], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *out.iterdir()], check=True)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def look(wheel: Path, sdist: Path, files: set[str], version: str) -> list[str]:
    """What is wrong with the two archives."""
    found = []
    with zipfile.ZipFile(wheel) as archive:
        held = {n for n in archive.namelist() if not n.endswith("/")}
        (metadata,) = [n for n in held if n.endswith(".dist-info/METADATA")]
        said = email.message_from_bytes(archive.read(metadata))
    if said["Version"] != version:
        found.append(f"the wheel says version {said['Version']}, not {version}")
    wanted = {f.removeprefix("src/") for f in files if f.startswith("src/")}
    wanted |= {f"trimtab/{f}" for f in files if f == "examples/desks.yaml" or f.startswith("examples/desks/")}
    code = {n for n in held if n.startswith("trimtab/")}
    found += [f"the wheel lacks {n}" for n in sorted(wanted - code)] + [
        f"the wheel has {n}, which is not committed" for n in sorted(code - wanted)
    ]
    with tarfile.open(sdist) as archive:
        inside = {n.name.partition("/")[2] for n in archive.getmembers() if n.isfile()}
    needed = {"LICENSE", "README.md", "CHANGELOG.md", "SECURITY.md", "pyproject.toml", "Makefile", "constraints.txt", "mkdocs.yml"}
    found += [f"the sdist lacks {n}" for n in sorted(needed | {f for f in files if f.startswith("src/")}) if n not in inside]
    return found + [f"the sdist has {n}, which is not committed" for n in sorted(inside - files - {"PKG-INFO"})]


def starts(wheel: Path, version: str, folder: Path) -> list[str]:
    """What is wrong with the installed command, with no more of its dependencies than its first line needs."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    quiet = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*quiet, "click", "psutil"], check=True)
    subprocess.run([*quiet, "--no-deps", wheel], check=True)
    own = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    said = subprocess.run([folder / "bin" / "trimtab", "--version"], capture_output=True, text=True, check=False, env=own)
    return [] if version in said.stdout else [f"`trimtab --version` of the wheel: {said.stdout}{said.stderr}"]


def check(root: Path) -> str:
    """Build both archives and look at them. Refused with every finding, else where they are."""
    version = stamped(root)
    files = committed(root)
    with tempfile.TemporaryDirectory() as scratch:
        out = root / "dist"
        for old in out.glob("trimtab-*"):
            old.unlink()
        wheel, sdist = build(root, out)
        found = look(wheel, sdist, files, version) + starts(wheel, version, Path(scratch) / "venv")
    if found:
        raise Refused("\n".join(found))
    return f"{wheel.relative_to(root)} and {sdist.relative_to(root)} are version {version}, and hold what is committed"


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["cut"] and len(sys.argv) == 3:
            cut(ROOT, sys.argv[2], datetime.now(UTC).date().isoformat())
            print(f"version {sys.argv[2]} is stamped: look at `git diff`, commit, then `make release-check`")
        elif sys.argv[1:] == ["check"]:
            print(check(ROOT))
        else:
            raise Refused(str(__doc__))
    except Refused as e:
        sys.exit(f"error: {e}")
