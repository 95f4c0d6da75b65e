"""`trimtab store`: where it is, making, verifying and cleaning it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.store.common import stirred, tiny_base
from trimtab.cli import main
from trimtab.cli.store import store as group
from trimtab.methods import IA3Config
from trimtab.store.registry import Store


def call(*arguments: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["store", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default store's folder, which is not there yet."""
    monkeypatch.setenv("TRIMTAB_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def filled(root: Path) -> Store:
    store = Store(root, create=True)
    for seed in (1, 2):
        store.publish(stirred(tiny_base(), IA3Config(), seed=seed), "acme/support")
    return store


@pytest.mark.parametrize("name", group.commands)
def test_every_command_has_help_with_an_example(name: str) -> None:
    output = call(name, "--help").output
    assert "Example" in output and f"trimtab store {name}" in output and "--json" in output


def test_where(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("where").output == f"{root}\n"
    assert json.loads(call("where", "--json").stdout) == {"root": str(root), "exists": False}
    assert not root.exists(), "asking makes nothing"
    assert call("where", "--store", tmp_path / "x").output == f"{tmp_path / 'x'}\n"
    monkeypatch.delenv("TRIMTAB_STORE")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert call("where").output == f"{tmp_path}/data/trimtab/store\n"


def test_init(root: Path, tmp_path: Path) -> None:
    assert call("init").output == f"{root} is a store of 0 adapters\n"
    assert json.loads(call("where", "--json").stdout)["exists"]
    assert json.loads(call("init", "--json").stdout) == {"root": str(root)}, "one that is there stays"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert "thesis.tex" in call("init", "--store", tmp_path / "mine", code=2).output
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_verify_finds_a_flipped_byte(filled: Store) -> None:
    assert "2 versions" in call("verify").output and "all as it was published" in call("verify").output
    blob = filled.blob_path(filled.resolve("acme/support@1").files["adapter_model.safetensors"].digest)
    raw = bytearray(blob.read_bytes())
    raw[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(bytes(raw))
    output = call("verify", code=1).output
    assert blob.name in output and "acme/support@1" in output and "fix: " in output
    report = json.loads(call("verify", "--json", code=1).stdout)
    assert report["versions"] == 2 and any(blob.name in p for p in report["problems"])


def test_gc(filled: Store) -> None:
    blob = filled.blob_path(filled.resolve("acme/support@1").files["adapter_model.safetensors"].digest)
    filled.remove("acme/support@1")
    assert call("gc").output.startswith("0 blobs"), "spared for an hour"
    assert "would be removed" in call("gc", "--grace", "0", "--dry-run").output and blob.exists()
    report = json.loads(call("gc", "--grace", "0", "--json").stdout)
    assert report["blobs"] >= 3 and report["bytes"] > 1000 and not blob.exists()
    assert "0 blobs" in call("gc", "--grace", "0").output
    shown = call("verify").output
    assert shown.startswith("1 version, ") and "all as it was published" in shown
    assert call("gc", "--grace", "-1", code=2)


def test_mistakes(root: Path) -> None:
    for name in ("verify", "gc"):
        output = call(name, code=2).output
        assert "there is no store in" in output and "fix: " in output
