"""A .gguf file whose blocks stay packed gives what transformers makes of the file's dequantised entries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import GgufConfig

from tests.bases.gguf_blocks import random_blocks
from tests.laws.common import difference, tokens
from tests.tiny import VOCAB, tiny_tokenizer
from trimtab.bases import fingerprint_folder, fingerprint_model, gguf
from trimtab.bases.shapes import read_architecture
from trimtab.errors import BaseError, ConfigError
from trimtab.model import load_base

HIDDEN, INNER, HEADS, KV_HEADS = 256, 512, 4, 2
MATRICES = {
    "attn_q": ("q4_k", HIDDEN, HIDDEN),
    "attn_k": ("q6_k", HIDDEN // 2, HIDDEN),
    "attn_v": ("q8_0", HIDDEN // 2, HIDDEN),
    "attn_output": ("q4_0", HIDDEN, HIDDEN),
    "ffn_gate": ("q4_k", INNER, HIDDEN),
    "ffn_up": ("q5_0", INNER, HIDDEN),
    "ffn_down": ("q6_k", HIDDEN, INNER),
}
"""GGUF's name -> kind of blocks, shape. Q5_0 is not kept packed. llama.cpp stores the rows of q and k in another order."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def write(path: Path, blocks_written: int = 2) -> Path:
    """A file that says that it has two blocks."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(2)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    random = np.random.default_rng(0)
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", (0.2 * random.normal(size=(VOCAB, HIDDEN))).astype(np.float32))
    norms = ["output_norm", *(f"blk.{i}.{n}" for i in range(2) for n in ("attn_norm", "ffn_norm"))]
    for name in norms:
        writer.add_tensor(f"{name}.weight", (1 + 0.1 * random.normal(size=HIDDEN)).astype(np.float32))
    for i in range(blocks_written):
        for name, (kind, outputs, inputs) in MATRICES.items():
            quantised = GGMLQuantizationType[kind.upper()]
            entries = (0.2 * random.normal(size=(outputs, inputs))).astype(np.float32)
            blocks = quants.quantize(entries, quantised) if kind == "q5_0" else random_blocks(kind, outputs, inputs, seed=i)
            writer.add_tensor(f"blk.{i}.{name}.weight", blocks, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf, "_tokenizer", lambda path, config: tiny_tokenizer())  # the file has none
    return tmp_path / "cache"


def test_its_logits_and_what_stays_packed(file: Path, cached: Path) -> None:
    plan = GgufConfig(dequantize=True)
    twin = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=plan)
    twin.requires_grad_(False)
    base, ids = load_base(str(file), dtype="float32", quantize="gguf"), tokens(40, 1)
    for name, weight in base.attached.weights.of.items():
        want = twin.get_submodule(name).weight
        assert difference(weight.dense(), want if not weight.stored_dense else want.bfloat16().float()) < 1e-6, name
        twin.get_submodule(name).weight.data = weight.dense()
    assert base.packed_as == "q4_0, q4_k, q6_k, q8_0"
    assert [n for n, w in base.attached.weights.of.items() if w.stored_dense and "layers.0" in n] == ["model.layers.0.mlp.up_proj"]
    for p in twin.parameters():
        if p.dim() == 1:
            p.data = p.data.bfloat16().float()
    with torch.no_grad():
        assert difference(base.logits([ids])[0], twin(torch.tensor([ids])).logits[0]) < 1e-5
    assert base.path is not None and base.path.is_relative_to(cached)
    as_stored = load_base(str(file), dtype="bfloat16", quantize="gguf")
    assert as_stored.fingerprint == fingerprint_folder(base.path) == fingerprint_model(as_stored.model)
    real, told = base.spec.weight_bytes(torch.bfloat16), read_architecture(str(base.path)).spec.weight_bytes(torch.bfloat16)
    assert abs(real - told) < 0.25 * real  # what stays dense is not told by the config


def test_damaged_blocks_and_files_that_are_none(file: Path, cached: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"keeps the blocks of a \.gguf file"):
        load_base(str(tmp_path), quantize="gguf")
    folder = load_base(str(file), dtype="bfloat16", quantize="gguf").path
    assert folder is not None
    tensors = load_file(folder / "model.safetensors")
    q = "model.layers.0.self_attn.q_proj"
    save_file(tensors | {f"{q}.q4_k": tensors[f"{q}.q4_k"][:, :-1].contiguous()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseError, match="packed weights of the base in") as refusal:
        load_base(str(folder))
    assert refusal.value.problems[0].startswith(f"{q}: q4_k is [256, 143] uint8 where [256, 144]")


@pytest.mark.parametrize("quantize", [None, "gguf"])
def test_a_file_without_all_of_its_tensors_is_no_base(quantize: str | None, cached: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseError, match=r"has no tensors for model\.layers\.1\."):
        load_base(str(write(tmp_path / "tiny.gguf", 1)), quantize=quantize)
    with pytest.raises(BaseError, match="is one of several parts of a model"):
        load_base(str(write(tmp_path / "tiny-00001-of-00002.gguf", 1)), quantize=quantize)
