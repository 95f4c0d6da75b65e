"""`trimtab export` and `trimtab adapters combine | compress | import`, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import trimtab
from tests.store.common import stirred
from trimtab.cli import main
from trimtab.methods import IA3Config, LoraConfig, PromptTuningConfig


@pytest.fixture(scope="module")
def base(tiny_llama_folder: Path) -> trimtab.Base:
    return trimtab.load_base(str(tiny_llama_folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def saved(base: trimtab.Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with adapters: loras a and b, an IA3, a prompt."""
    folder = tmp_path_factory.mktemp("adapters")
    methods = {"a": LoraConfig(r=4), "b": LoraConfig(r=2, lora_alpha=9, target_modules=("q_proj",)), "ia3": IA3Config()}
    for i, (name, method) in enumerate((methods | {"prompt": PromptTuningConfig(num_virtual_tokens=3)}).items()):
        stirred(base, method, seed=i).save(folder / name, run={"metrics": {"loss": 1.5}, "data_digest": "sha256:d"})
    return folder


def call(folder: Path, *arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments), "--base", str(folder), "--dtype", "float32", "--device", "cpu"])


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("peft", {"adapter_config.json", "adapter_model.safetensors"}),
        ("vllm", {"adapter_config.json", "adapter_model.safetensors"}),
        ("gguf", {"adapter.gguf"}),
    ],
)
def test_export_writes_what_it_says(saved: Path, tiny_llama_folder: Path, tmp_path: Path, kind: str, files: set[str]) -> None:
    plain = call(tiny_llama_folder, "export", saved / "a", tmp_path / "plain", "--format", kind)
    assert plain.exit_code == 0, plain.output
    assert "read back by" in plain.output and "rounding explains" in plain.output
    report = json.loads(call(tiny_llama_folder, "export", saved / "a", tmp_path / "x", "--format", kind, "--json").stdout)
    assert set(report["files"]) == files == {p.name for p in (tmp_path / "x").iterdir()}
    assert report["format"] == kind and report["folder"] == str(tmp_path / "x") and report["relative"] <= report["allowed"]


def test_export_calls_the_base_as_told_or_by_its_folder(saved: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    for options, want in (([], str(tiny_llama_folder)), (["--call-base", "my/model"], "my/model")):
        target = tmp_path / str(len(options))
        assert call(tiny_llama_folder, "export", saved / "a", target, "--format", "vllm", *options).exit_code == 0
        assert json.loads((target / "adapter_config.json").read_text())["base_model_name_or_path"] == want


def test_export_of_what_a_format_cannot_hold_exits_with_2(saved: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    refused = call(tiny_llama_folder, "export", saved / "prompt", tmp_path / "x", "--format", "vllm")
    assert refused.exit_code == 2 and "it knows LoRA, and this is prompt" in refused.output
    assert "trimtab serve" in refused.output and "merge" not in refused.output  # it cannot be merged either
    merged = call(tiny_llama_folder, "export", saved / "ia3", tmp_path / "m", "--format", "merged")
    assert merged.exit_code == 0 and (tmp_path / "m" / "model.safetensors").is_file()
    assert not (tmp_path / "x").exists()


def test_combine_writes_an_adapter_and_its_error(saved: Path, tiny_llama_folder: Path, base: trimtab.Base, tmp_path: Path) -> None:
    both = [saved / "a", saved / "b", "--weight", "0.5", "--weight", "-2"]
    exact = call(tiny_llama_folder, "adapters", "combine", tmp_path / "exact", *both)
    assert exact.exit_code == 0, exact.output
    assert "rank 4 to 6" in exact.output and "error against the exact sum" in exact.output
    note = json.loads((tmp_path / "exact" / "trimtab.json").read_text())["run"]["combined"]
    assert [p["weight"] for p in note["of"]] == [0.5, -2.0] and note["how"] == "exact" and note["error"] < 1e-6
    assert {s.rank for s in trimtab.Adapter.load(tmp_path / "exact", base).sites} == {4, 6}
    thinned = call(tiny_llama_folder, "adapters", "combine", tmp_path / "t", *both, "--how", "ties", "--rank", "3", "--json")
    report = json.loads(thinned.stdout)
    assert set(report["ranks"].values()) == {3} and 0 < report["rank_error"] < 1 and report["error"] > 0
    assert json.loads((tmp_path / "t" / "trimtab.json").read_text())["run"]["combined"]["density"] == 0.5
    wrong = call(tiny_llama_folder, "adapters", "combine", tmp_path / "w", saved / "a", saved / "ia3")
    assert wrong.exit_code == 2 and "different methods" in wrong.output and not (tmp_path / "w").exists()
    few = call(tiny_llama_folder, "adapters", "combine", tmp_path / "w", saved / "a", saved / "b", "--weight", "1")
    assert few.exit_code == 2 and "1 weight for 2 adapters" in few.output


def test_compress_reports_what_it_lost(saved: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    both = call(tiny_llama_folder, "adapters", "compress", saved / "a", tmp_path / "x", "--rank", "2", "--store-as", "bfloat16")
    assert both.exit_code == 0, both.output
    assert "2.0 times fewer parameters" in both.output and "error of rounding to bfloat16" in both.output
    run = json.loads((tmp_path / "x" / "trimtab.json").read_text())["run"]
    assert run["compressed"]["rank"] == 2 and 0 < run["compressed"]["error"] < 1 and run["compressed"]["dtype"] == "bfloat16"
    assert run["origin"]["metrics"] == {"loss": 1.5} and run["data_digest"] == "sha256:d" and "metrics" not in run
    report = json.loads(call(tiny_llama_folder, "adapters", "compress", saved / "a", tmp_path / "y", "--error", "0.4", "--json").stdout)
    assert max(report["errors"].values()) <= 0.4 and report["bytes"] == (tmp_path / "y" / "adapter_model.safetensors").stat().st_size
    half = json.loads(
        call(tiny_llama_folder, "adapters", "compress", saved / "ia3", tmp_path / "z", "--store-as", "float16", "--json").stdout
    )
    assert 0 < half["rounding_error"] < 2**-10 and "ranks" not in half
    nothing = call(tiny_llama_folder, "adapters", "compress", saved / "a", tmp_path / "n")
    assert nothing.exit_code == 2 and "nothing to compress" in nothing.output


def test_import_reads_names_of_old(saved: Path, tiny_llama_folder: Path, base: trimtab.Base, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "adapter_config.json").write_bytes((saved / "a" / "adapter_config.json").read_bytes())
    tensors = load_file(saved / "a" / "adapter_model.safetensors")
    save_file({k.replace(".weight", ".default.weight"): t for k, t in tensors.items()}, old / "adapter_model.safetensors")
    result = call(tiny_llama_folder, "adapters", "import", old, tmp_path / "new")
    assert result.exit_code == 0, result.output
    assert "lora of peft's" in result.output and ".lora_A.default.weight is read as " in result.output
    assert trimtab.Adapter.load(tmp_path / "new", base).verified
    (old / "adapter_config.json").write_text(json.dumps({"config": {}, "model_type": "bert", "version": "3.0"}))
    refused = call(tiny_llama_folder, "adapters", "import", old, tmp_path / "none", "--json")
    assert refused.exit_code == 2 and "model_type = 'bert'" in refused.output and not (tmp_path / "none").exists()
    hint = call(tiny_llama_folder, "generate", "--adapter", old, "hello")
    assert hint.exit_code == 2 and "trimtab adapters import" in hint.output
