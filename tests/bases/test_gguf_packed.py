"""A .gguf file whose blocks stay packed gives what transformers makes of the file's dequantised entries."""

from __future__ import annotations

import struct
from functools import partial
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
from trimtab.bases import fingerprint_folder, fingerprint_model, gguf, load
from trimtab.bases.shapes import read_architecture
from trimtab.bases.weights.gguf_blocks import BLOCKS
from trimtab.errors import BaseError, ConfigError
from trimtab.model import load_base
from trimtab.ops import native

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


OTHERS = (
    ("q4_1", "q5_0", "q5_1", "q5_k", "q2_k", "q3_k", "iq4_nl"),
    ("iq4_xs", "f16", "bf16", "f32", "iq2_xxs", "iq3_s", "mxfp4"),
)
"""By block, the kind of each of `MATRICES` in a file whose matrices do not stay packed."""


def _numbers(kind: str, outputs: int, inputs: int, seed: int) -> np.ndarray:
    """Random numbers in this kind of blocks, about as large as weights are; of what gguf does not quantise, random blocks."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    random, kept = np.random.default_rng(seed), GGMLQuantizationType[kind.upper()]
    if kind in BLOCKS:
        return random_blocks(kind, outputs, inputs, seed=seed)
    try:
        return quants.quantize((0.2 * random.normal(size=(outputs, inputs))).astype(np.float32), kept)
    except NotImplementedError:
        (block, size), halves = GGML_QUANT_SIZES[kept], HALF_AT[kind]
        blocks = random.integers(0, 256, (outputs, inputs // block, size), dtype=np.uint8)
        for at in halves:
            blocks[..., at : at + 2] = np.full((*blocks.shape[:2], 1), 0.001, np.float16).view(np.uint8)
        return blocks.reshape(outputs, -1)


HALF_AT = {"q5_k": (0, 2), "q2_k": (80, 82), "q3_k": (108,), "iq4_nl": (0,), "iq4_xs": (0,), "iq2_xxs": (0,), "iq3_s": (0,)}
"""Where blocks have fp16 numbers."""


def write(path: Path, blocks_written: int = 2, kinds: tuple[tuple[str, ...], ...] = ()) -> Path:
    """A file that says that it has two blocks. kinds: other ones than those of `MATRICES`, by block."""
    from gguf import GGMLQuantizationType, GGUFWriter

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
        for number, (name, (kind, outputs, inputs)) in enumerate(MATRICES.items()):
            kind = kinds[i][number] if kinds else kind
            writer.add_tensor(f"blk.{i}.{name}.weight", _numbers(kind, outputs, inputs, i), raw_dtype=GGMLQuantizationType[kind.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    native.load()  # else the kernels would be built anew for a cache of this test's own
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


def _lying(path: Path, what: str) -> str:
    """Change the value of one key of a file's header; what it is refused with."""
    raw = bytearray(path.read_bytes())
    at = raw.index(what.encode()) + len(what)
    if what == "llama.block_count":
        struct.pack_into("<I", raw, at + 4, 2**31)
        said = r"block_count is 2,147,483,648, and it has \d+ tensors"
    elif what == "llama.context_length":
        struct.pack_into("<IIQ", raw, at, 9, 5, 2**60)
        said = r"its header has 1,152,921,504,606,\d+,\d+ keys, tensors and elements of arrays; at most 4,194,304 are read"
    else:
        struct.pack_into("<IIQ", raw, at, 9, 5, 2**21)
        said = rf"it ends at {len(raw):,} bytes, and its header goes on"
    path.write_bytes(raw)
    return said


@pytest.mark.parametrize("what", ["llama.block_count", "llama.context_length", "general.architecture"])
def test_a_header_that_names_more_than_the_file_has(what: str, cached: Path, tmp_path: Path) -> None:
    """An array of 2**60 numbers, and layers without end, were read until memory was full."""
    path = write(tmp_path / "lying.gguf")
    said = _lying(path, what)
    for reads in (load_base, partial(load_base, quantize="gguf"), read_architecture):
        with pytest.raises(BaseError, match=f"cannot be read: .*{said}"):
            reads(str(path))


def _by_loop(kind: str, blocks: np.ndarray, inputs: int) -> np.ndarray:
    """The entries of the first row, computed one by one from what llama.cpp says of these kinds."""
    found = []
    size = {"q4_1": 20, "q5_0": 22, "q5_1": 24, "iq4_nl": 18}[kind]
    table = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
    for at in range(0, inputs // 32 * size, size):
        block = blocks[0, at : at + size]
        halves = block[:4].view(np.float16).astype(np.float64)
        fifth = int.from_bytes(block[2 if kind == "q5_0" else 4 :][:4].tobytes(), "little") if "5" in kind else 0
        for i in range(32):
            byte = int(block[size - 16 + i % 16])
            code = (byte & 15 if i < 16 else byte >> 4) | (fifth >> i & 1) << 4
            least = {"q4_1": halves[1], "q5_1": halves[1], "q5_0": -16 * halves[0], "iq4_nl": 0}[kind]
            found.append(halves[0] * (table[code] if kind == "iq4_nl" else code) + least)
    return np.array(found)


@pytest.mark.parametrize("quantize", [None, "gguf"])
def test_what_does_not_stay_packed_is_dequantised(quantize: str | None, cached: Path, tmp_path: Path) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    file = write(tmp_path / "others.gguf", kinds=OTHERS)
    plan = GgufConfig(dequantize=True)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32, quantization_config=plan)
    said: list[str] = []
    load(str(file), dtype="float32", quantize=quantize, progress=said.append)
    base = load_base(str(file), dtype="float32", quantize=quantize)
    for name, weight in base.attached.weights.of.items():
        assert weight.stored_dense and torch.equal(weight.dense(), twin.get_submodule(name).weight.bfloat16().float()), name
    for name, kind in (("attn_v", "q5_1"), ("ffn_down", "iq4_nl")):
        own = base.matrix(f"model.layers.0.{'self_attn.v_proj' if name == 'attn_v' else 'mlp.down_proj'}").dense()[0]
        _, outputs, inputs = MATRICES[name]
        assert difference(own.double(), torch.from_numpy(_by_loop(kind, _numbers(kind, outputs, inputs, 0), inputs))) < 4e-3, kind
    told = [line for line in said if "are kept in bfloat16" in line]
    assert bool(told) == (quantize == "gguf")
    if told:
        assert told[0].startswith("matrices of IQ2_XXS, IQ3_S, IQ4_NL, IQ4_XS, MXFP4, Q2_K, Q3_K, Q4_1, Q5_0, Q5_1, Q5_K are kept")
        kinds = [(kind, outputs * inputs) for own in OTHERS for kind, (_, outputs, inputs) in zip(own, MATRICES.values(), strict=True)]
        loosened = [
            (entries, *GGML_QUANT_SIZES[GGMLQuantizationType[k.upper()]]) for k, entries in kinds if k not in ("f16", "bf16", "f32")
        ]
        was, now = sum(n // block * size for n, block, size in loosened), sum(2 * n for n, *_ in loosened)
        assert told[0].endswith(f" in bfloat16: {now / 1e9:.3g} GB in place of {was / 1e9:.3g}")


@pytest.mark.parametrize("quantize", [None, "gguf"])
def test_numbers_that_are_not_finite_are_told_with_their_tensor(quantize: str | None, file: Path, cached: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    spoilt = tmp_path / "spoilt.gguf"
    spoilt.write_bytes(file.read_bytes())
    reader = GGUFReader(spoilt, "r+")
    (matrix,) = [t for t in reader.tensors if t.name == "blk.1.attn_v.weight"]  # q8_0
    matrix.data[3, :2] = np.array([np.inf], np.float16).view(np.uint8)
    reader.data.flush()
    with pytest.raises(BaseError, match=r"not finite") as refusal:
        load_base(str(spoilt), quantize=quantize)
    assert "blk.1.attn_v.weight" in str(refusal.value) or "layers.1.self_attn.v_proj" in str(refusal.value)


def test_a_file_that_is_converted_is_not_read_again(file: Path, cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 150,000 tokens in it that takes 6 s."""
    load_base(str(file), quantize="gguf")
    monkeypatch.setattr(gguf, "_reader_of", lambda path: pytest.fail("it is read again"))
    load_base(str(file), quantize="gguf")


def test_a_kind_that_gguf_cannot_dequantise_is_refused_by_name(cached: Path, tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(str(tmp_path / "tiny.gguf"), "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((4, 292), np.uint8), raw_dtype=GGMLQuantizationType.Q8_K)
    for write_part in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write_part()
    with pytest.raises(BaseError, match="has tensors that cannot be dequantised") as refusal:
        load_base(str(tmp_path / "tiny.gguf"))
    assert refusal.value.problems == ("blk.0.attn_q.weight is Q8_K",) and "Q5_K" in refusal.value.fix
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes()[:60])
    with pytest.raises(BaseError, match=r"cut\.gguf' cannot be read"):
        load_base(str(tmp_path / "cut.gguf"))
