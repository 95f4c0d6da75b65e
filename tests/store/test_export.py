"""Exports: every folder is read by the program that it is for, or by peft, with equal logits; or refused with the reason, nothing left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.laws.common import one_thread
from tests.store.common import EXAMPLES, SEQUENCES, stirred, tiny_base
from tests.tiny import tiny_model
from trimtab.errors import AdapterError, ConfigError, NotMergeable
from trimtab.methods import BottleneckConfig, IA3Config, LoraConfig, PromptTuningConfig
from trimtab.store import Adapter, gguf_lora
from trimtab.store import export as module
from trimtab.store.card import vllm_problems
from trimtab.store.export import export
from trimtab.store.factors import distance, factors_of

__all__ = ["one_thread"]

IN_PEFT = [(name, m) for name, m in EXAMPLES if type(m).in_peft]
MIXED = LoraConfig(
    r=6, lora_alpha=12, use_rslora=True, rank_pattern={"mlp.*": 3, "o_proj": 9}, alpha_pattern={"mlp.*": 5}, lora_dropout=0.1
)


@pytest.fixture(scope="module")
def base():
    return tiny_base()


def by_peft(folder: Path, family: str = "llama") -> list[torch.Tensor]:
    peft = pytest.importorskip("peft")
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    model = peft.PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :] for ids in SEQUENCES]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize(("name", "method"), IN_PEFT, ids=[name for name, _ in IN_PEFT])
def test_peft_loads_what_is_exported_for_it(base, name, method, tmp_path):
    adapter = stirred(base, method)
    report = export(adapter, tmp_path / "a", "peft", base_name="org/model")
    assert set(report.files) == {"adapter_config.json", "adapter_model.safetensors"} == {p.name for p in (tmp_path / "a").iterdir()}
    assert report.checked == ("trimtab", "peft") and report.relative < report.allowed
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/model"
    ours = base.logits(SEQUENCES, adapters=[adapter] * 3)
    assert float((ours[0] - base.logits(SEQUENCES)[0]).abs().max()) > 0.05
    for got, want in zip(by_peft(tmp_path / "a"), ours, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3"])
def test_a_folder_for_vllm_is_uniform_and_computes_the_same(family, tmp_path):
    base = tiny_base(family)
    method = MIXED if family != "phi3" else LoraConfig(r=3, lora_alpha=5, rank_pattern={"qkv_proj": 9})
    adapter = stirred(base, method)
    report = export(adapter, tmp_path / "a", "vllm", base_name="/models/base")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == report.rank == 16  # 9 is not in vLLM's list
    assert not (
        config["rank_pattern"] or config["alpha_pattern"] or config["use_rslora"] or config["use_dora"] or config["modules_to_save"]
    )
    assert config["base_model_name_or_path"] == "/models/base"
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors)
    assert all(16 in t.shape for t in tensors.values())
    loaded = Adapter.load(tmp_path / "a", base)
    assert not vllm_problems(loaded.method, loaded.sites)
    for name, factors in factors_of(adapter).items():
        assert distance(factors_of(loaded)[name], factors) < 1e-6 * factors.norm()
    for got, want in zip(by_peft(tmp_path / "a", family), base.logits(SEQUENCES, adapters=[adapter] * 3), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-4)


def test_what_vllm_cannot_hold_is_refused_with_every_reason(base, tmp_path):
    saved = LoraConfig(r=2, use_dora=True, modules_to_save=("model.norm",), target_modules=("lm_head", "q_proj"))
    with pytest.raises(AdapterError) as e:
        export(stirred(base, saved), tmp_path / "a", "vllm")
    assert len(e.value.problems) == 3 and "merge" in e.value.fix
    assert all(w in str(e.value) for w in ("DoRA", "model.norm was trained in full", "lm_head is outside"))
    cases = {
        "it knows LoRA, and this is ia3": (base, IA3Config()),
        "embed_tokens is outside": (base, LoraConfig(r=2, target_modules=("embed_tokens", "q_proj"))),
        "no LoRA for gpt2": (tiny_base("gpt2"), LoraConfig(r=2)),
    }
    for words, (on, method) in cases.items():
        with pytest.raises(AdapterError, match=words):
            export(stirred(on, method), tmp_path / "a", "vllm")
    assert list(tmp_path.iterdir()) == []


def test_a_rank_above_vllms_list_says_to_compress(base, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "VLLM_RANKS", (1, 8))
    with pytest.raises(AdapterError, match="its largest rank is 8, and this one has 9: compress it first"):
        export(stirred(base, LoraConfig(r=9)), tmp_path / "a", "vllm")


@pytest.mark.parametrize("format", ["peft", "vllm", "gguf"])
def test_an_export_that_went_wrong_is_not_kept(base, tmp_path, monkeypatch, format):
    """A tensor that is a little off on the way to the file: the comparison sees it."""
    save, write = module.format_tensors, gguf_lora._halves_to_pairs
    monkeypatch.setattr(module, "format_tensors", lambda tensors, metadata: save({k: 1.01 * t for k, t in tensors.items()}, metadata))
    monkeypatch.setattr(gguf_lora, "_halves_to_pairs", lambda B, heads: 1.01 * write(B, heads))
    with pytest.raises(AdapterError, match="does not compute what base and adapter do"):
        export(stirred(base, LoraConfig(r=2)), tmp_path / "a", format)
    assert list(tmp_path.iterdir()) == []


def test_what_peft_reads_otherwise_is_not_kept(base, tmp_path, monkeypatch):
    """A config that trimtab reads as meant and peft not: peft's own logits decide."""
    pytest.importorskip("peft")
    by = module._by_peft
    monkeypatch.setattr(module, "_by_peft", lambda base, folder: [1.01 * t for t in by(base, folder)])
    with pytest.raises(AdapterError, match="read by peft"):
        export(stirred(base, LoraConfig(r=2)), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_without_peft_trimtab_reads_it_back(base, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert export(stirred(base, LoraConfig(r=2)), tmp_path / "a").checked == ("trimtab",)


def test_merged_and_refused_formats(base, tmp_path):
    report = export(stirred(base, LoraConfig(r=2)), tmp_path / "m", "merged")
    assert report.checked == ("transformers",) and "model.safetensors" in report.files and report.relative <= report.allowed
    with pytest.raises(NotMergeable):
        export(stirred(base, PromptTuningConfig()), tmp_path / "n", "merged")
    with pytest.raises(AdapterError, match="peft has no bottleneck adapters"):
        export(stirred(base, BottleneckConfig()), tmp_path / "n", "peft")
    with pytest.raises(ConfigError, match="did you mean 'vllm'"):
        export(stirred(base, LoraConfig(r=2)), tmp_path / "n", "vlm")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("x")
    with pytest.raises(AdapterError, match="mine"):
        export(stirred(base, LoraConfig(r=2)), tmp_path / "used")
    assert {p.name for p in tmp_path.iterdir()} == {"m", "used"}


def test_the_base_is_called_what_others_find_it_by(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = tiny_base()
    names = {"org/model": "org/model", "bundled": "/where/it/lies"}
    for name, want in names.items():
        base.name, base.path = name, Path("/where/it/lies")
        assert module._base_name(base) == want
    base.name, base.path = "tiny", None
    assert module._base_name(base) == "tiny"


# ---- GGUF ----


def test_a_gguf_file_has_llama_cpps_names_and_order(base, tmp_path):
    """Metadata and names as llama.cpp's own converter writes them; q and k reordered by its formula, written out here by hand."""
    import gguf

    adapter = stirred(base, MIXED)
    report = export(adapter, tmp_path / "a", "gguf")
    assert list(report.files) == ["adapter.gguf"] and report.rank == 9 and report.relative < 1e-5
    reader = gguf.GGUFReader(str(tmp_path / "a" / "adapter.gguf"))
    fields = {k: reader.get_field(k).contents() for k in ("general.type", "adapter.type", "general.architecture", "adapter.lora.alpha")}
    assert fields == {"general.type": "adapter", "adapter.type": "lora", "general.architecture": "llama", "adapter.lora.alpha": 9.0}
    tensors = {t.name: torch.from_numpy(t.data.copy()).double() for t in reader.tensors}
    modules = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    assert set(tensors) == {f"blk.{i}.{m}.weight.lora_{x}" for i in (0, 1) for m in modules for x in "ab"}
    for peft_name, name, heads in [("self_attn.q_proj", "attn_q", 4), ("self_attn.k_proj", "attn_k", 2), ("mlp.down_proj", "ffn_down", 0)]:
        f = factors_of(adapter)[f"model.layers.1.{peft_name}"]
        want = f.B_OR @ f.A_RI
        if heads:
            D = want.shape[0] // heads
            order = [h * D + half * (D // 2) + i for h in range(heads) for i in range(D // 2) for half in (0, 1)]
            want = want[order]
        got = tensors[f"blk.1.{name}.weight.lora_b"] @ tensors[f"blk.1.{name}.weight.lora_a"]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "method", "words"),
    [
        ("qwen2", LoraConfig(r=2), "this base is qwen2"),
        ("llama", LoraConfig(r=2, target_modules=("embed_tokens", "q_proj")), "embed_tokens is outside"),
        ("llama", LoraConfig(r=2, use_dora=True), "no DoRA"),
        ("llama", IA3Config(), "this is ia3"),
    ],
)
def test_what_llama_cpp_cannot_hold_is_refused(family, method, words, tmp_path):
    with pytest.raises(AdapterError, match=words):
        export(stirred(tiny_base(family), method), tmp_path / "a", "gguf")
    assert list(tmp_path.iterdir()) == []
