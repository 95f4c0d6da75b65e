"""What an installed trimtab carries, and that it runs where a user installs it: a wheel is built, unpacked, and installed without
constraints into an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import trimtab
from tests.train.common import METHODS, run_file
from trimtab.cli import demo
from trimtab.errors import TrimtabError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--disable-pip-version-check", "--wheel-dir", str(folder)]
    built = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=False)
    if built.returncode != 0 and "hatchling" in built.stderr:
        pytest.skip("pip cannot fetch hatchling, which builds the wheel")
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def installed(wheel: Path) -> Path:
    """The wheel's content, unpacked as pip would."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(wheel.parent / "site")
    return wheel.parent / "site"


@pytest.mark.slow
def test_the_package_has_its_files_and_no_others(installed: Path) -> None:
    held = {str(p.relative_to(installed / "trimtab")) for p in (installed / "trimtab").rglob("*") if p.is_file()}
    source, examples = ROOT / "src" / "trimtab", ROOT / "examples"
    code = {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    rows = {f"examples/{p.relative_to(examples)}" for p in (examples / "desks").rglob("*.jsonl")} | {"examples/desks.yaml"}
    assert held == code | rows
    assert {"web/report/report.css", "web/report/report.js", "examples/desks/support/train.jsonl"} <= held
    assert {"py.typed", "ops/cpp/attention.cpp", "ops/cpp/common.h"} <= held
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


Trimtab = Callable[..., str]


@pytest.fixture(scope="session")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `trimtab` of a new environment with what pip takes for the wheel today. No constraints but one: torch is of the version that
    runs here, since the newest may be a CUDA build of several GB."""
    if torch.version.cuda is not None:
        pytest.skip("torch is a CUDA build here: another environment would fetch several GB")
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder / "venv", with_pip=True)
    pip = [str(folder / "venv" / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    reached = subprocess.run([*pip, "download", "--no-deps", "--dest", folder, "click"], capture_output=True, timeout=60, check=False)
    if reached.returncode != 0:
        pytest.skip("pip reaches no registry")
    command = [*pip, "install", "--no-compile", f"torch=={torch.__version__}", f"{wheel}[serve]"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "venv" / "bin" / "trimtab"


def outside(command: list[str | Path], folder: Path, **options: Any) -> subprocess.Popen[str]:
    """Started outside the checkout."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.Popen([str(x) for x in command], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, **options)


@pytest.fixture
def run(fresh: Path, tmp_path: Path) -> Trimtab:
    """Runs a command and gives its standard output."""

    def run(*arguments: str | Path, code: int | None = 0) -> str:
        process = outside([fresh, *arguments], tmp_path, stderr=subprocess.PIPE)
        said, errors = process.communicate(timeout=120)
        assert code is None or process.returncode == code, errors
        return said

    return run


@pytest.mark.slow
def test_a_fresh_install_runs(fresh: Path, run: Trimtab, tiny_llama_folder: Path, tmp_path: Path) -> None:
    """doctor, generate, a training run of two steps, serve: with the newest versions that the wheel allows."""
    checks = {c["name"]: c for c in json.loads(run("doctor", "--json", code=None))}
    assert [c for c in checks.values() if c["name"] in ("torch", "transformers", "forward", "training") and not c["ok"]] == []

    base = ["--base", tiny_llama_folder, "--dtype", "float32"]
    (answer,) = json.loads(run("generate", *base, "--max-new-tokens", "8", "--json", "n 3"))
    assert answer["adapter"] == "base" and answer["text"]

    content = run_file(tmp_path / "run", {n: METHODS[n] | {"data": "a", "max_steps": 2} for n in ("lora", "prefix")})
    (tmp_path / "run" / "run.yaml").write_text(yaml.safe_dump(content | {"base": str(tiny_llama_folder)}))
    summary = json.loads(run("train", tmp_path / "run" / "run.yaml", "--json"))
    assert {name: v["steps"] for name, v in summary["variants"].items()} == {"lora": 2, "prefix": 2}

    adapter = f"mine={tmp_path / 'run' / 'out' / 'adapters' / 'lora'}"
    command = [fresh, "serve", *base, "--local", "--port", "0", "--kv-gb", "0.02", "--adapter", adapter, "--json"]
    with outside(command, tmp_path, stderr=subprocess.DEVNULL) as server:
        try:
            assert server.stdout is not None
            url = json.loads(server.stdout.readline())["url"]
            body = {"model": "mine", "messages": [{"role": "user", "content": "n 3"}], "max_tokens": 4}
            asked = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
            with urllib.request.urlopen(asked, timeout=60) as reply:
                assert json.load(reply)["usage"]["completion_tokens"] >= 1
        finally:
            server.terminate()
