"""`trimtab adapters`, and names of the store wherever an adapter is asked for: tables, JSON, mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.store.common import stirred
from tests.train.common import write_rows
from trimtab.cli import adapters_list, main
from trimtab.cli.adapters import SUBCOMMANDS
from trimtab.methods import IA3Config, LoraConfig
from trimtab.model import load_base
from trimtab.store import Adapter


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """Adapters of the tiny base in folders: first, second (of the same method), other."""
    base, root = load_base(str(tiny_llama_folder), dtype="float32"), tmp_path_factory.mktemp("adapters")
    run = {"options": {"lr": 1e-3}, "metrics": {"loss": 0.25}, "data_digest": "sha256:d"}
    stirred(base, LoraConfig(r=2)).save(root / "first", run=run)
    stirred(base, LoraConfig(r=2, lora_alpha=16), seed=2).save(root / "second")
    stirred(base, IA3Config()).save(root / "other")
    return root


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TRIMTAB_STORE", str(tmp_path / "store"))

    def invoke(*arguments: str | Path, code: int = 0, text: str | None = None) -> Result:
        result = CliRunner().invoke(main, [str(a) for a in arguments], input=text)
        assert result.exit_code == code, result.output
        return result

    return invoke


@pytest.fixture
def filled(call: Any, folders: Path) -> Any:
    """acme/support@1 (prod) and @2, acme/legal@1."""
    call("adapters", "publish", folders / "first", "acme/support", "--alias", "prod")
    call("adapters", "publish", folders / "second", "acme/support")
    call("adapters", "publish", folders / "other", "acme/legal")
    return call


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_command_has_help_with_an_example(call: Any, name: str) -> None:
    output = call("adapters", name, "--help").output
    assert "Example" in output and f"trimtab adapters {name}" in output and "--json" in output


def test_help_needs_no_torch_and_lists_every_command() -> None:
    code = "import sys; sys.argv = ['trimtab', 'adapters', '--help']\nfrom trimtab.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in SUBCOMMANDS)


def test_list(filled: Any) -> None:
    lines = filled("adapters", "list").output.splitlines()
    assert lines[0].split() == ["adapter", "aliases", "method", "parameters", "size", "created", "base"]
    assert [line.split()[0] for line in lines[1:]] == ["acme/legal@1", "acme/support@2"]
    assert "│" not in "".join(lines) and "━" not in "".join(lines), "plain text where there is no terminal"
    found = json.loads(filled("adapters", "list", "--json").stdout)
    assert [(v["ref"], v["aliases"], v["method"]) for v in found] == [
        ("acme/legal@1", ["latest"], "ia3"),
        ("acme/support@2", ["latest"], "lora"),
    ]
    assert found[1]["parameters"] == 3072 and found[1]["bytes"] > 4 * 3072 and found[1]["fingerprint"].startswith("sha256:")
    assert json.loads(filled("adapters", "list", "beta", "--json").stdout) == []
    assert "no adapters in namespace beta" in filled("adapters", "list", "beta").output


def test_a_long_list_is_printed_in_blocks(filled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = filled("adapters", "list").output.split()
    monkeypatch.setattr(adapters_list, "BLOCK", 1)
    assert filled("adapters", "list").output.split() == whole


def test_show(filled: Any, folders: Path) -> None:
    output = filled("adapters", "show", "acme/support@prod").output
    for said in ("acme/support@1 (prod)", "r=2", "loss=0.25", "lr=0.001", "sha256:d", "adapter_model.safetensors", "README.md", "@2"):
        assert said in output, said
    found = json.loads(filled("adapters", "show", "acme/support@1", "--json").stdout)
    assert found["versions"] == [1, 2] and found["aliases"] == ["prod"]
    assert found["note"] == json.loads((folders / "first" / "trimtab.json").read_text())
    assert found["files"]["trimtab.json"]["bytes"] == (folders / "first" / "trimtab.json").stat().st_size
    assert json.loads(filled("adapters", "show", "acme/support", "--json").stdout)["version"] == 2


def test_a_damaged_note_is_a_mistake_with_a_fix(filled: Any, tmp_path: Path) -> None:
    digest = json.loads(filled("adapters", "show", "acme/legal", "--json").stdout)["files"]["trimtab.json"]["digest"]
    blob = tmp_path / "store" / "blobs" / "sha256" / digest.removeprefix("sha256:")
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-2] + b" \n")
    output = filled("adapters", "show", "acme/legal", code=2).output
    assert "acme/legal@1 is refused" in output and "trimtab store verify" in output


def test_publish_says_what_it_did(filled: Any, folders: Path, tiny_llama_folder: Path) -> None:
    again = json.loads(filled("adapters", "publish", folders / "second", "acme/support", "--json").stdout)
    assert again["ref"] == "acme/support@2", "what the newest version holds already"
    checked = filled("adapters", "publish", folders / "first", "acme/support", "--base", tiny_llama_folder, "--dtype", "float32")
    assert checked.output.startswith("acme/support@3 (latest): lora, ")


def test_publish_refuses_what_does_not_load(call: Any, folders: Path, tmp_path: Path) -> None:
    from tests.tiny import tiny_folder

    other = tiny_folder(tmp_path / "base", seed=5)
    assert "fingerprint" in call("adapters", "publish", folders / "first", "acme/x", "--base", other, code=2).output
    assert "no such folder" in call("adapters", "publish", tmp_path / "absent", "acme/x", code=2).output
    assert "Acme/x" in call("adapters", "publish", folders / "first", "Acme/x", code=2).output
    assert "is not a name in a store" in call("adapters", "publish", folders / "first", "support", code=2).output
    assert "is no alias" in call("adapters", "publish", folders / "first", "acme/x", "--alias", "3", code=2).output
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_config.json").write_bytes((folders / "first" / "adapter_config.json").read_bytes())
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"\x80\x04.")
    assert "is a pickle" in call("adapters", "publish", tmp_path / "pickled", "acme/x", code=2).output
    assert json.loads(call("adapters", "list", "--json").stdout) == []


def test_a_folder_of_peft_is_said_to_be_unverified(call: Any, folders: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "theirs" / name).write_bytes((folders / "first" / name).read_bytes())
    assert "it names no base" in call("adapters", "publish", tmp_path / "theirs", "acme/theirs").stderr
    assert "it is unverified" in call("adapters", "show", "acme/theirs").output
    assert json.loads(call("adapters", "show", "acme/theirs", "--json").stdout)["note"] is None


def test_aliases_move_and_go(filled: Any) -> None:
    assert filled("adapters", "alias", "acme/support@2", "prod").output == "acme/support@prod is acme/support@2\n"
    assert json.loads(filled("adapters", "alias", "acme/support@1", "old", "--json").stdout)["aliases"] == ["old"]
    assert filled("adapters", "unalias", "acme/support", "prod").output == "acme/support@prod is no more\n"
    assert json.loads(filled("adapters", "unalias", "acme/support", "old", "--json").stdout) == {"name": "acme/support", "removed": "old"}
    assert "aliases: latest" in filled("adapters", "show", "acme/support@prod", code=2).output
    assert "latest" in filled("adapters", "alias", "acme/support@1", "latest", code=2).output


def test_diff(filled: Any) -> None:
    output = filled("adapters", "diff", "acme/support@1", "acme/support@2").output
    for said in ("lora_alpha", "a: acme/support@1", "tensors: 0 equal, 28 changed", "relative difference"):
        assert said in output, said
    found = json.loads(filled("adapters", "diff", "acme/support@1", "acme/support@2", "--json").stdout)
    assert found["config"] == [{"key": "lora_alpha", "a": 4, "b": 16}] and len(found["tensors"]) == 28
    same = filled("adapters", "diff", "acme/support@2", "acme/support").output
    assert "adapter_config.json says the same" in same and "28 equal, 0 changed" in same
    methods = filled("adapters", "diff", "acme/support", "acme/legal").output
    assert "only in a: " in methods and "and 16 more" in methods and "only in b: " in methods
    assert "tensors" not in filled("adapters", "diff", "acme/support@1", "acme/support@2", "--no-weights").output


def test_remove(filled: Any) -> None:
    assert "move or remove the alias first" in filled("adapters", "remove", "acme/support@1", code=2).output
    assert "does not say what to remove" in filled("adapters", "remove", "acme/support", code=2).output
    filled("adapters", "unalias", "acme/support", "prod")
    assert "removed: acme/support@1" in filled("adapters", "remove", "acme/support@1").output
    removed = json.loads(filled("adapters", "remove", "acme/support", "--all", "--json").stdout)
    assert [v["ref"] for v in removed] == ["acme/support@2"]
    assert [v["name"] for v in json.loads(filled("adapters", "list", "--json").stdout)] == ["acme/legal"]


def test_mistakes_name_the_nearest_and_the_fix(filled: Any, call: Any, tmp_path: Path) -> None:
    output = filled("adapters", "show", "acme/suport", code=2).output
    assert "did you mean 'acme/support'?" in output and "fix: " in output and "Traceback" not in output
    assert "there is no store in" in call("adapters", "list", "--store", tmp_path / "none", code=2).output
    assert not (tmp_path / "none").exists()


def test_text_from_files_cannot_act_on_a_terminal(call: Any, tiny_llama_folder: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_llama_folder), dtype="float32")
    base.name = "\x1b[31mred\x07"
    stirred(base, IA3Config()).save(tmp_path / "a", run={"metrics": {"\x1b[2J": 1.0}})
    call("adapters", "publish", tmp_path / "a", "acme/x")
    for command in (["list"], ["show", "acme/x"], ["diff", "acme/x", "acme/x@1"]):
        output = call("adapters", *command).output
        assert "\x1b" not in output and "\x07" not in output
    base.name = "[bold]b[/]"
    stirred(base, IA3Config()).save(tmp_path / "b")
    call("adapters", "publish", tmp_path / "b", "acme/y")
    assert "[bold]b[/]" in call("adapters", "list").output, "no markup either"


# ---- names of the store where an adapter is asked for ----


def test_generate_takes_names_of_versions_and_aliases(filled: Any, folders: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    options = ["--base", tiny_llama_folder, "--dtype", "float32", "--max-new-tokens", "4", "--json"]
    names = ["acme/support@2", "acme/support", "acme/support@prod", "acme/legal"]
    asked = [a for n in names for a in ("--adapter", n)]
    by_name = {r["adapter"]: r["text"] for r in json.loads(filled("generate", *options, *asked, "n 3").stdout)}
    for name, folder in zip(names, ("second", "second", "first", "other"), strict=True):
        direct = json.loads(filled("generate", *options, "--adapter", folders / folder, "n 3").stdout)
        assert by_name[name] == direct[0]["text"], name
    assert "did you mean 'acme/legal'" in filled("generate", *options, "--adapter", "acme/legals", "n", code=2).output
    assert "there is no store" in filled("generate", *options, "--store", tmp_path / "no", "--adapter", "acme/legal", "n", code=2).output


def test_a_folder_of_that_name_comes_first(
    filled: Any, folders: Path, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme").mkdir()
    Adapter.load(folders / "second", load_base(str(tiny_llama_folder), dtype="float32")).save(tmp_path / "acme" / "legal")
    options = ["--base", tiny_llama_folder, "--dtype", "float32", "--max-new-tokens", "4", "--json"]
    here, there = (
        json.loads(filled("generate", *options, "--adapter", a, "n 3").stdout)[0]["text"] for a in ("acme/legal", folders / "second")
    )
    assert here == there


def test_chat_eval_and_merge_take_names(filled: Any, folders: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    base = ["--base", tiny_llama_folder, "--dtype", "float32"]
    store = ["--store", tmp_path / "store"]
    assert filled("chat", *base, *store, "--adapter", "acme/legal", "--max-new-tokens", "3", text="n 1\n").output.count("> ") == 2
    rows = write_rows(tmp_path / "rows.jsonl", 3, "a")
    named = ["--adapter", "acme/support@1", "--adapter", "acme/support@2", "--adapter", folders / "first"]
    scores = json.loads(filled("eval", rows, *base, *store, *named, "--no-generate", "--json").stdout)["scores"]
    assert set(scores) == {"base", "support@1", "support@2", "first"}
    assert scores["support@1"] == scores["first"] != scores["support@2"]
    report = json.loads(filled("merge", "acme/support@2", tmp_path / "merged", *base, *store, "--json").stdout)
    assert report["relative"] <= report["allowed"] and (tmp_path / "merged" / "config.json").is_file()
    assert "no such version" in filled("merge", "acme/support@9", tmp_path / "not", *base, code=2).output
