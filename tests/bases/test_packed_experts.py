"""Packed experts, quantised on load and MXFP4 as gpt-oss publishes it, against transformers' own model of their dense values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import trimtab
from tests import tiny
from tests.laws.common import difference, gradient_difference, noisy, tokens
from tests.tiny import tiny_folder
from trimtab.bases.shapes import read_architecture
from trimtab.bases.weights import claimed
from trimtab.bases.weights.experts import Experts
from trimtab.decode.generate import Sampling
from trimtab.errors import BaseError, ConfigError, NotMergeable
from trimtab.methods import LoraConfig
from trimtab.model import Base
from trimtab.store.quantized import write_quantized

BOTH = ("experts.gate_up_proj", "experts.down_proj")


def _twin(base: Base, folder: Path) -> Any:
    """transformers' model with what the base's packed matrices are dequantised to."""
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").requires_grad_(False)
    for name, module in base.model.named_modules():
        weight = claimed(module)
        if weight is None or weight.stored_dense:
            continue
        if module.experts:
            at, _, own = name.rpartition(".")
            experts = Experts(base.model.get_submodule(at), own)
            dense = torch.stack([experts.dense(e) for e in range(module.experts)])
            twin.get_submodule(at)._parameters[own].copy_(dense.transpose(1, 2) if experts.transposed else dense)
        else:
            twin.get_submodule(name).weight.copy_(weight.dense())
    return twin


def _gradients(base: Base, adapter: Any, ids: list[int]) -> dict[str, Tensor]:
    params = {k: t.clone().requires_grad_() for k, t in adapter.params.items()}
    logits = base.logits([ids], [type(adapter)(base, adapter.method, params)], grad=True)[0]
    return dict(zip(params, torch.autograd.grad(logits.square().sum(), list(params.values())), strict=True))


def _compare(base: Base, dense: Any) -> None:
    """Logits and gradients, with and without LoRA on experts and beside them; and the bytes that are counted."""
    ids = tokens(13, 2)
    with torch.no_grad():
        assert difference(base.logits([ids])[0], dense(torch.tensor([ids])).logits[0]) <= 1e-5
    other = Base(dense, base.tokenizer)
    method = LoraConfig(r=3, target_modules=("q_proj",), target_parameters=BOTH, target_experts=(0, 2, 3))
    ours, theirs = (noisy(b, method, seed=1) for b in (base, other))
    with torch.no_grad():
        assert difference(base.logits([ids], [ours])[0], other.logits([ids], [theirs])[0]) <= 1e-5
    got, want = _gradients(base, ours, ids), _gradients(other, theirs, ids)
    assert max(gradient_difference(got[k], want[k]) for k in want if want[k].any()) <= 1e-4
    answers = [b.generate_ids([ids, ids], [a, None], Sampling(max_new_tokens=5)) for b, a in ((base, ours), (other, theirs))]
    assert answers[0] == answers[1]
    assert base.spec.weight_bytes(torch.float32) == sum(t.nbytes for t in base.model.state_dict().values())


@pytest.mark.parametrize(
    ("family", "quantize"),
    [
        ("mixtral", "nf4"),
        ("gpt_oss", "int8"),
        *(pytest.param(f, q, marks=pytest.mark.slow) for f, q in (("qwen3_moe", "nf4-double"), ("granitemoe", "fp4"), ("gpt_oss", "nf4"))),
    ],
)
def test_experts_are_quantised_on_load(family: str, quantize: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base", family)
    base = trimtab.load_base(str(folder), dtype="float32", quantize=quantize)
    packed = [m for m in base.spec.modules.values() if m.kind == "experts" and m.bits]
    assert len(packed) == 4 and base.packed_as == quantize
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).get_parameter(packed[0].name).detach()
    at, _, own = packed[0].name.rpartition(".")
    experts = Experts(base.model.get_submodule(at), own)
    rows = dense.transpose(1, 2) if experts.transposed else dense
    for e in range(len(dense)):
        assert 0.001 < float((experts.dense(e) - rows[e]).norm() / rows[e].norm()) < (0.02 if quantize == "int8" else 0.15)
    _compare(base, _twin(base, folder))


def test_a_merge_goes_into_dense_experts_and_a_written_base_keeps_them(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base", "qwen3_moe")
    base = trimtab.load_base(str(folder), dtype="float32", quantize="nf4")
    adapter = noisy(base, LoraConfig(r=2, target_modules=(), target_parameters=BOTH))
    assert adapter.merge_into(tmp_path / "merged").relative < 1e-4
    write_quantized(str(folder), tmp_path / "nf4", "nf4")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "nf4" / "model.safetensors")
    assert any(".experts." in n for n in before)
    dense = trimtab.load_base(str(tmp_path / "nf4"), dtype="float32")
    assert not any(m.bits for m in dense.spec.modules.values() if m.kind == "experts") and len(after) > len(before)


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(a folder of gpt-oss as on the hub, with random blocks and scales; the same as transformers dequantises it)."""
    monkeypatch.setitem(tiny.MORE_FAMILIES, "gpt_oss", tiny.MORE_FAMILIES["gpt_oss"] | {"hidden_size": 64, "intermediate_size": 96})
    packed, dense = (tiny_folder(tmp_path / name, "gpt_oss") for name in ("packed", "dense"))
    stored, wanted, random = {}, {}, torch.Generator().manual_seed(0)
    for name, tensor in load_file(packed / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = wanted[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), generator=random, dtype=torch.uint8)
        scales = torch.randint(120, 125, blocks.shape[:3], generator=random, dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        wanted[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(stored, packed / "model.safetensors")
    save_file(wanted, dense / "model.safetensors")
    config = json.loads((packed / "config.json").read_text())
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]}
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return packed, dense


def test_mxfp4_as_it_is_on_the_hub(published: tuple[Path, Path], tmp_path: Path) -> None:
    packed, dense = published
    base = trimtab.load_base(str(packed), dtype="float32")
    assert base.packed_as == "mxfp4"
    twin = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, attn_implementation="eager").requires_grad_(False)
    experts = Experts(base.model.get_submodule("model.layers.1.mlp.experts"), "gate_up_proj")
    for e, own in enumerate(twin.get_submodule("model.layers.1.mlp.experts").gate_up_proj):
        assert torch.equal(experts.dense(e), own.T)
    _compare(base, twin)
    assert read_architecture(str(packed)).spec.weight_bytes(torch.float32) == base.spec.weight_bytes(torch.float32)
    adapter = noisy(base, LoraConfig(r=2, target_modules=(), target_parameters=BOTH))
    with pytest.raises(NotMergeable, match="mxfp4"):
        adapter.merge_into(tmp_path / "merged")
    with pytest.raises(ConfigError, match="quantised already"):
        trimtab.load_base(str(packed), quantize="nf4")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            lambda t: {k: v[..., :-1].clone() if k.endswith("1.mlp.experts.down_proj_scales") else v for k, v in t.items()},
            r"scales is \[4, 64, 2\]",
        ),
        (lambda t: {k: v for k, v in t.items() if not k.endswith("0.mlp.experts.down_proj_scales")}, "no tensor scales"),
        (
            lambda t: {k: v.masked_fill(v > 123, 255) if k.endswith("1.mlp.experts.down_proj_scales") else v for k, v in t.items()},
            r"experts\.down_proj: scales has \d+ numbers that are not finite",
        ),
        (lambda t: {k: v[:3].clone() if k.endswith("0.mlp.experts.down_proj_blocks") else v for k, v in t.items()}, r"blocks is \[3, "),
    ],
)
def test_packed_experts_that_do_not_fit(published: tuple[Path, Path], wrong: Any, says: str) -> None:
    packed, _ = published
    save_file(wrong(load_file(packed / "model.safetensors")), packed / "model.safetensors")
    with pytest.raises(BaseError, match=says):
        trimtab.load_base(str(packed), dtype="float32")
