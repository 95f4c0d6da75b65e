"""Folders that have each expert's matrices packed by themselves, as GPTQ, AWQ, FP8, compressed-tensors and bitsandbytes write them, against
transformers' own model of the matrices that loops read from them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import trimtab
from tests import tiny
from tests.bases.repacked import words
from tests.bases.test_packed_experts import BOTH, _gradients
from tests.bases.test_stored import SETTINGS, packed_by_loop
from tests.bases.test_text_tower import write_whole
from tests.laws.common import difference, gradient_difference, noisy, tokens
from trimtab.bases.fits import weight_bytes
from trimtab.bases.pieces import Pieces
from trimtab.bases.shapes import read_architecture
from trimtab.bases.weights.experts import Experts
from trimtab.errors import BaseError, NotMergeable
from trimtab.methods import LoraConfig
from trimtab.model import Base

WIDE = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 96}
MATRIX = re.compile(r"\.(\w*proj|w[123])\.weight$")


def _folder(to: Path, family: str, pack: Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor] | None], settings: dict[str, Any]) -> Any:
    """A folder with what `pack` makes of each matrix, None: as it is; and transformers' model of the matrices that it holds then."""
    wide = tiny.MORE_FAMILIES[family] | {k: n for k, n in WIDE.items() if k in tiny.MORE_FAMILIES[family]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.MORE_FAMILIES, family, wide)
        tiny.tiny_folder(to, family)
    tensors, held = load_file(to / "model.safetensors"), to.parent / f"{to.name}-held"
    shutil.copytree(to, held)
    packed, plain = dict(tensors), dict(tensors)
    for name in [n for n in tensors if MATRIX.search(n)]:
        if (made := pack(name, tensors[name])) is not None:
            del packed[name]
            packed |= {f"{name.removesuffix('.weight')}.{part}": t for part, t in made[0].items()}
            plain[name] = made[1]
    save_file({n: t.contiguous() for n, t in packed.items()}, to / "model.safetensors", {"format": "pt"})
    save_file({n: t.contiguous() for n, t in plain.items()}, held / "model.safetensors", {"format": "pt"})
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return AutoModelForCausalLM.from_pretrained(held, dtype=torch.float32, attn_implementation="eager").requires_grad_(False)


def _by_loop(kind: str, name: str, W: Tensor) -> tuple[dict[str, Tensor], Tensor] | None:
    return packed_by_loop(kind, W) if W.shape[1] % 32 == 0 else None


def _by_bitsandbytes(name: str, W: Tensor, kind: str = "nf4") -> tuple[dict[str, Tensor], Tensor]:
    from bitsandbytes import functional as bnb

    if kind == "int8":
        codes, scale, _ = bnb.int8_vectorwise_quant(W.half())
        return {"weight": codes, "SCB": scale}, codes.float() * scale[:, None] / 127
    codes, state = bnb.quantize_4bit(W, quant_type="nf4", compress_statistics=kind.endswith("double"))
    scales, pairs = state.absmax, codes.flatten().long()
    if state.nested:
        nested = state.state2.absmax[torch.arange(len(scales)) // state.state2.blocksize]
        scales = state.state2.code[scales.long()] * nested + state.offset
    entries = state.code[torch.stack((pairs >> 4, pairs & 15), 1).flatten()] * scales[torch.arange(W.numel()) // state.blocksize]
    return {"weight": codes} | {f"weight.{n}": t for n, t in state.as_dict(packed=True).items()}, entries.view(W.shape)


def _by_compressed_tensors(name: str, W: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = W.abs().amax(1, keepdim=True) / 127
    codes = (W / scale).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scale.half()}, codes.float() * scale.half().float()


def _by_pack(name: str, W: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Of llm-compressor, symmetric: codes from 0 on, of which 8 is zero."""
    scale = (W.abs().unflatten(1, (-1, 32)).amax(2) / 7).bfloat16()
    codes = (W / scale.float().repeat_interleave(32, 1)).round().clamp(-8, 7).long()
    packed = torch.tensor([words(row) for row in (codes + 8).tolist()], dtype=torch.int32)
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor(W.shape)}, codes * scale.float().repeat_interleave(
        32, 1
    )


INT4 = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True}
INT8 = {"type": "int", "num_bits": 8, "strategy": "channel", "symmetric": True}
KINDS: dict[str, tuple[Any, dict[str, Any], str]] = {
    **{kind: (partial(_by_loop, kind), SETTINGS[kind], SETTINGS[kind]["quant_method"]) for kind in SETTINGS},
    "nf4": (_by_bitsandbytes, {"quant_method": "bitsandbytes", "load_in_4bit": True}, "nf4"),
    "nf4-double": (
        partial(_by_bitsandbytes, kind="nf4-double"),
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
        "nf4",
    ),
    "int8": (partial(_by_bitsandbytes, kind="int8"), {"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
    "pack-quantized": (
        _by_pack,
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": {"weights": INT4}}},
        "pack-quantized-4",
    ),
    "compressed-tensors": (
        _by_compressed_tensors,
        {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"a": {"weights": INT8}}},
        "int-quantized",
    ),
}
KINDS |= {kind: (*KINDS[kind][:2], "") for kind in KINDS if "in an order" in kind}
KINDS |= {f"gptq of {n} bits": (*KINDS[f"gptq of {n} bits"][:2], f"gptq-{n}") for n in (2, 8)}
KINDS["awq gemv"] = (*KINDS["awq gemv"][:2], "awq-gemv")
KINDS["fp8 of outputs"] = (*KINDS["fp8 of outputs"][:2], "float-quantized")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Any]]:
    @cache
    def make(kind: str, family: str) -> tuple[Path, Any]:
        pack, settings, _ = KINDS[kind]
        to = tmp_path_factory.mktemp("bases") / "packed"
        return to, _folder(to, family, pack, settings)

    return make


def _equal(base: Base, twin: Any, form: str) -> None:
    """Entries, logits with and without LoRA, its gradients, and the bytes that are counted, against a dense model. form: how experts are
    kept; "": dense."""
    ids, count = tokens(13, 2), 0
    for at, module in twin.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() != 3:
                continue
            experts, count = Experts(base.model.get_submodule(at), name), count + 1
            assert (experts.packed.form if experts.packed else "") == form, (at, name)
            for e, W in enumerate(parameter):
                assert difference(experts.dense(e), W) < 1e-6, (at, name, e)
    assert count >= 2
    with torch.no_grad():
        assert difference(base.logits([ids])[0], twin(torch.tensor([ids])).logits[0]) <= 1e-5
    other = Base(twin, base.tokenizer)
    q_proj = "q_b_proj" if base.spec.model_type.startswith("deepseek") else "q_proj"
    method = LoraConfig(r=3, target_modules=(q_proj,), target_parameters=BOTH, target_experts=(0, 2, 3))
    ours, theirs = (noisy(b, method, seed=1) for b in (base, other))
    assert list(ours.params) == list(theirs.params)
    got, want = _gradients(base, ours, ids), _gradients(other, theirs, ids)
    assert max(gradient_difference(got[k], want[k]) for k in want if want[k].any()) <= 1e-4
    stored = sum({t.data_ptr(): t.nbytes for t in base.model.state_dict().values()}.values())
    assert 0 <= stored - base.spec.weight_bytes(torch.float32) <= 32, "buffers of routers are not counted"


CASES = [
    ("gptq", "mixtral"),
    ("fp8", "qwen3_moe"),
    *(
        pytest.param(kind, family, marks=pytest.mark.slow)
        for kind, family in (
            *((kind, "qwen3_moe") for kind in KINDS if kind != "fp8"),
            *(("gptq", f) for f in ("qwen2_moe", "olmoe", "glm4_moe", "deepseek_v3", "ernie4_5_moe", "minimax_m2", "phimoe", "lfm2_moe")),
        )
    ),
]


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_experts_that_are_packed_one_by_one(kind: str, family: str, made: Callable[[str, str], tuple[Path, Any]]) -> None:
    folder, twin = made(kind, family)
    base = trimtab.load_base(str(folder), dtype="float32")
    _equal(base, twin, KINDS[kind][2])


def test_routers_and_experts_that_differ(tmp_path: Path) -> None:
    """Experts of which one is dense and one has 8 bits become dense; a router that is packed does too, as nothing multiplies with it
    otherwise."""

    def pack(name: str, W: Tensor) -> tuple[dict[str, Tensor], Tensor] | None:
        if "layers.0" in name and "experts.2.down_proj" in name:
            return None
        return packed_by_loop("gptq of 8 bits" if "layers.1" in name and "experts.1.up_proj" in name else "gptq", W)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.bases.test_experts_one_by_one.MATRIX", re.compile(r"(proj|mlp\.gate)\.weight$"))
        twin = _folder(tmp_path / "base", "qwen3_moe", pack, SETTINGS["gptq"] | {"dynamic": {r"+:.*experts\.1\.up.*": {"bits": 8}}})
    base = trimtab.load_base(str(tmp_path / "base"), dtype="float32")
    kept = {f"{at}.{n}" for at in (0, 1) for n in ("gate_up_proj", "down_proj") if _experts(base, at, n).packed}
    assert kept == {"0.gate_up_proj", "1.down_proj"}
    assert [n for n, _ in _experts(base, 0, "down_proj").module.named_parameters()] == ["down_proj"]
    held = dict(twin.named_parameters())
    for at in (0, 1):
        assert difference(base.model.get_parameter(f"model.layers.{at}.mlp.gate.weight"), held[f"model.layers.{at}.mlp.gate.weight"]) < 1e-6
    ids = tokens(13, 2)
    with torch.no_grad():
        assert difference(base.logits([ids])[0], twin(torch.tensor([ids])).logits[0]) <= 1e-5


def _experts(base: Base, layer: int, name: str) -> Experts:
    return Experts(base.model.get_submodule(f"model.layers.{layer}.mlp.experts"), name)


def _without(pattern: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda t: [t.pop(n) for n in list(t) if re.search(pattern, n)]


def _beyond(tensors: dict[str, Tensor]) -> None:
    for name in [n for n in tensors if "layers.0.mlp.experts.3." in n]:
        tensors[name.replace("experts.3.", "experts.17.")] = tensors[name].clone()


def _again(expert: str, part: str) -> Callable[[dict[str, Tensor]], object]:
    """Under a second name of a number."""
    return lambda t: t.update({n.replace("1.mlp.experts.3.", f"1.mlp.experts.{expert}."): x.clone() for n, x in t.items() if part in n})


AT = "model.layers.1.mlp.experts"
WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "one is missing": (_without(r"layers\.1\.mlp\.experts\.2\.up_proj"), rf"{AT}.gate_up_proj: the files have no expert 2's up_proj"),
    "one too many": (_beyond, "the files have expert 17, where the model has experts 0 to 3"),
    "one without scales": (_without(r"1\.mlp\.experts\.0\.down_proj\.scales"), rf"{AT}\.0\.down_proj: no tensor scales"),
    "one of another shape": (
        lambda t: t.update({f"{AT}.0.up_proj.scales": t[f"{AT}.0.up_proj.scales"][:-1].clone()}),
        rf"{AT}\.0\.up_proj: scales is \[1, 96\]",
    ),
    "one with a bias": (
        lambda t: t.update({f"{AT}.3.up_proj.bias": torch.ones(96)}),
        rf"{AT}\.3\.up_proj: bias is not zero, and the model has no place for it",
    ),
    "one twice": (_again("03", "1.mlp.experts.3."), rf"twice, as {AT}\.03\.\w+ and as {AT}\.3\.\w+"),
    "one twice, once dense": (
        lambda t: t.update({f"{AT}.03.up_proj.weight": torch.ones(96, 64)}),
        rf"{AT}.gate_up_proj: the files have one matrix twice, as {AT}\.03\.up_proj and as {AT}\.3\.up_proj",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_experts(case: str, made: Callable[[str, str], tuple[Path, Any]], tmp_path: Path) -> None:
    folder, (change, said) = made("gptq", "qwen3_moe")[0], WRONG[case]
    shutil.copytree(folder, tmp_path / "wrong")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "wrong" / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseError, match="packed weights of the base in") as refusal:
        trimtab.load_base(str(tmp_path / "wrong"), dtype="float32")
    assert any(re.search(said, problem) for problem in refusal.value.problems), refusal.value.problems


def test_numbers_that_nobody_counts_to(made: Callable[[str, str], tuple[Path, Any]], tmp_path: Path) -> None:
    """A number of 5,000 digits, and a config that names a billion experts, of which the files have four."""
    shutil.copytree(made("gptq", "qwen3_moe")[0], tmp_path / "wrong")
    file = tmp_path / "wrong" / "model.safetensors"
    tensors = load_file(file)
    _again("9" * 5000, f"{AT}.3.up_proj")(tensors)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(BaseError, match="has packed weights where its model has no linear layer"):
        trimtab.load_base(str(tmp_path / "wrong"), dtype="float32")
    pieces = Pieces(["experts.*.up_proj.weight", "experts.*.gate_proj.weight"])
    for expert in range(4):
        for pattern in pieces.patterns:
            pieces.add(expert, pattern, f"{expert}.{pattern}")
    with pytest.raises(ValueError, match=r"no expert 4's up_proj, expert 4's gate_proj, expert 5's up_proj and 1,999,999,989 more"):
        pieces.check(10**9)
    pieces.check(4)


def test_a_config_of_other_sizes(made: Callable[[str, str], tuple[Path, Any]], tmp_path: Path) -> None:
    shutil.copytree(made("gptq", "qwen3_moe")[0], tmp_path / "wrong")
    config = json.loads((tmp_path / "wrong" / "config.json").read_text())
    for change, said in (
        ({"num_local_experts": 3}, "the files have expert 3, where the model has experts 0 to 2"),
        ({"vocab_size": 301}, r"lm_head\.weight is \[300, 64\] where \[301, 64\] belongs"),
    ):
        (tmp_path / "wrong" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(BaseError) as refusal:
            trimtab.load_base(str(tmp_path / "wrong"), dtype="float32")
        assert any(re.search(said, problem) for problem in refusal.value.problems), refusal.value.problems


def test_such_a_base_is_planned_and_merges_into_nothing(made: Callable[[str, str], tuple[Path, Any]], tmp_path: Path) -> None:
    folder, _ = made("gptq", "qwen3_moe")
    base, again = (trimtab.load_base(str(folder), dtype="float32") for _ in range(2))
    assert base.packed_as == "gptq" and base.fingerprint == again.fingerprint
    planned, there = read_architecture(str(folder)).spec.weight_bytes(torch.float32), base.spec.weight_bytes(torch.float32)
    assert 0 <= there - planned <= 0.01 * there, "the order of groups is not counted"
    whole, own = weight_bytes(folder, torch.float32)
    ordered = made("gptq in an order", "qwen3_moe")[0]
    dense = read_architecture(str(ordered)).spec.weight_bytes(torch.float32)
    assert 0 <= trimtab.load_base(str(ordered), dtype="float32").spec.weight_bytes(torch.float32) - dense <= 0.01 * dense
    config = json.loads((folder / "config.json").read_text())  # one group of all inputs has no order, whatever the config says
    shutil.copytree(folder, tmp_path / "one group")
    one = config["quantization_config"] | {"desc_act": True, "group_size": -1}
    (tmp_path / "one group" / "config.json").write_text(json.dumps(config | {"quantization_config": one}))
    assert weight_bytes(tmp_path / "one group", torch.float32) == (whole, own)
    eight = made("gptq of 8 bits in an order", "qwen3_moe")[0]
    assert weight_bytes(eight, torch.float32)[0] == pytest.approx(read_architecture(str(eight)).spec.weight_bytes(torch.float32), rel=0.05)
    assert own < there and whole < planned * 1.02 and weight_bytes(ordered, torch.float32)[1] >= own + dense - planned
    adapter = noisy(base, LoraConfig(r=2, target_modules=(), target_parameters=BOTH))
    with pytest.raises(NotMergeable, match="gptq"):
        adapter.merge_into(tmp_path / "merged")


@pytest.mark.parametrize("family", ["kimi_k25", "qwen3_vl"])
def test_the_packed_tower_of_a_multimodal_folder(family: str, tmp_path: Path) -> None:
    """Kimi K2.5 is published so: experts of 4 bits, under the names of the whole. Qwen3-VL's tower is loaded as another family."""
    model = write_whole(family, tmp_path / "base")
    file, held = tmp_path / "base" / "model.safetensors", model.state_dict()
    stored = {n.replace("language_model.model.blocks.", "language_model.model.layers."): t for n, t in load_file(file).items()}
    for name in [n for n in stored if "language_model" in n and re.search(r"proj\.weight$", n) and stored[n].shape[1] % 32 == 0]:
        tensors, W = _by_pack(name, stored[name].float())
        stored |= {f"{name.removesuffix('.weight')}.{part}": t for part, t in tensors.items()}
        del stored[name]
        own = name.replace("language_model.model.", "model.language_model.")
        if ".experts." in own:
            at, expert, which = re.fullmatch(r"(.*experts)\.(\d+)\.(\w+)\.weight", own).groups()  # type: ignore[union-attr]
            whole = held[f"{at}.{'down_proj' if which == 'down_proj' else 'gate_up_proj'}"][int(expert)]
            {"down_proj": whole, "gate_proj": whole[: len(W)], "up_proj": whole[len(whole) - len(W) :]}[which].copy_(W)
        else:
            held[own].copy_(W)
    save_file({n: t.contiguous() for n, t in stored.items()}, file, {"format": "pt"})
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"quantization_config": KINDS["pack-quantized"][1]}))
    base, ids = trimtab.load_base(str(tmp_path / "base"), dtype="float32"), tokens(21, 1)
    assert base.packed_as == "pack-quantized-4"
    assert sum(m.bits is not None for m in base.spec.modules.values()) >= 3
    with torch.no_grad():
        assert difference(base.logits([ids])[0], model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]) <= 1e-5
