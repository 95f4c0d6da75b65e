"""Packed folders as programs left them: settings beside config.json, layers that differ, and damage, which is told with its file."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.bases.repacked import words, write_dense, write_packed
from tests.bases.test_stored import SETTINGS, packed_by_loop
from tests.laws.common import difference, noisy, tokens
from trimtab.bases.fits import weight_bytes
from trimtab.bases.shapes import read_architecture
from trimtab.bases.weights import weight_of
from trimtab.bases.weights.int4 import read_gptq
from trimtab.errors import BaseError, ConfigError, NotMergeable
from trimtab.methods import LoraConfig
from trimtab.model import load_base

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("bases") / "dense", hidden_size=64, intermediate_size=128)


def _beside(folder: Path, name: str, settings: Any) -> None:
    """Move the settings from config.json to a file of its own."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / name).write_text(settings if isinstance(settings, str) else json.dumps(settings))


AUTO_GPTQ = {"damp_percent": 0.01, "static_groups": False, "sym": False, "true_sequential": True, "model_file_base_name": "model"}
BESIDE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "AutoGPTQ": ("gptq in an order", "quantize_config.json", AUTO_GPTQ | {"bits": 4, "group_size": 32, "desc_act": True}),
    "GPTQModel": (
        "gptq_v2",
        "quantize_config.json",
        {"bits": 4, "group_size": 32, "desc_act": False, "method": "gptq", "format": "gptq_v2", "pack_dtype": "int32"},
    ),
    "AutoAWQ": ("awq", "quant_config.json", {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}),
    "GPTQModel's AWQ": (
        "awq gemv",
        "quantize_config.json",
        {"bits": 4, "group_size": 32, "quant_method": "awq", "checkpoint_format": "gemv"},
    ),
}


@pytest.mark.parametrize("program", BESIDE)
def test_settings_in_a_file_of_their_own(program: str, dense: Path, tmp_path: Path) -> None:
    kind, name, settings = BESIDE[program]
    matrices = write_packed(dense, tmp_path / "base", partial(packed_by_loop, kind), SETTINGS[kind])
    planned, counted = read_architecture(str(tmp_path / "base")), weight_bytes(tmp_path / "base", torch.float32)
    _beside(tmp_path / "base", name, settings)
    base = load_base(str(tmp_path / "base"), dtype="float32")
    for n, W in matrices.items():
        assert difference(base.matrix(n).dense(), W) < 1e-6, n
    there = read_architecture(str(tmp_path / "base"))
    assert there.spec.weight_bytes(torch.float32) == planned.spec.weight_bytes(torch.float32)
    assert weight_bytes(tmp_path / "base", torch.float32) == counted
    with pytest.raises(NotMergeable, match="awq" if "awq" in kind else "gptq"):
        noisy(base, LoraConfig(r=2)).merge_into(tmp_path / "merged")
    with pytest.raises(ConfigError, match="is quantised already"):
        load_base(str(tmp_path / "base"), quantize="nf4")
    with pytest.raises(ConfigError, match="is quantised already"):
        read_architecture(str(tmp_path / "base"), "nf4")


def test_such_a_file_beside_dense_weights_says_nothing(dense: Path, tmp_path: Path) -> None:
    """Merged and dequantised folders keep it."""
    shutil.copytree(dense, tmp_path / "base")
    _beside(tmp_path / "base", "quantize_config.json", AUTO_GPTQ | {"bits": 4, "group_size": 32})
    assert load_base(str(tmp_path / "base"), dtype="float32").packed_as == ""


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("{", "quantize_config.json is not readable JSON"),
        ({"bits": 4, "group_size": 32, "quant_method": "spqr"}, "quant_method 'spqr'"),
        ({"bits": 5, "group_size": 32}, "bits = 5"),
    ],
)
def test_a_file_that_cannot_be_used(settings: Any, said: str, dense: Path, tmp_path: Path) -> None:
    write_packed(dense, tmp_path / "base", partial(packed_by_loop, "gptq"), SETTINGS["gptq"])
    _beside(tmp_path / "base", "quantize_config.json", settings)
    for reads in (load_base, read_architecture):
        with pytest.raises(BaseError, match=re.escape(said)):
            reads(str(tmp_path / "base"))


@pytest.mark.parametrize("what", ["nowhere", "itself", "a folder", "a pipe"])
def test_such_a_file_that_is_none(what: str, dense: Path, tmp_path: Path) -> None:
    """Without it the folder would be planned as a dense one."""
    write_packed(dense, tmp_path / "base", partial(packed_by_loop, "gptq"), SETTINGS["gptq"])
    _beside(tmp_path / "base", "quantize_config.json", {})
    (file := tmp_path / "base" / "quantize_config.json").unlink()
    {"a folder": file.mkdir, "a pipe": partial(os.mkfifo, file)}.get(what, partial(file.symlink_to, file if what == "itself" else "no"))()
    for reads in (load_base, read_architecture):
        with pytest.raises(BaseError, match=r"quantize_config\.json (is not a regular file|cannot be read)"):
            reads(str(tmp_path / "base"))


@pytest.mark.parametrize("layers", [{"num_hidden_layers": 10**12}, {"text_config": {"num_hidden_layers": 10**12}}])
def test_a_config_of_more_layers_than_tensors(layers: dict[str, Any], dense: Path, tmp_path: Path) -> None:
    """All would be built before the first is missed."""
    shutil.copytree(dense, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | layers))
    with pytest.raises(BaseError, match=r"config\.json has num_hidden_layers: 1000000000000, and there are \d+ tensors"):
        load_base(str(tmp_path / "base"))


@pytest.mark.parametrize("settings", [[], [{"bits": 4}], "gptq", True])
def test_a_config_whose_settings_are_no_object(settings: Any, dense: Path, tmp_path: Path) -> None:
    shutil.copytree(dense, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    for reads in (load_base, read_architecture):
        with pytest.raises(BaseError, match=r"config\.json has quantization_config: .*, where a JSON object belongs"):
            reads(str(tmp_path / "base"))


def test_layers_that_differ_by_rules_of_gptqmodel(dense: Path, tmp_path: Path) -> None:
    """A rule with "-:" leaves layers dense, others change their bits and the size of their groups. GPTQModel matches them from a name's
    beginning, the first that matches counts."""
    rules: dict[str, dict[str, Any]] = {
        r"-:.*\.down_proj": {},
        r"+:.*layers\.0\.self_attn\.q_proj": {"bits": 8},
        r".*\.k_proj": {"bits": 3},
        r"layers\.0": {"bits": 2},  # matches nothing: names begin with "model."
    }

    def by_loop(name: str, W: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rule = next((r for r in rules if re.match(r.removeprefix("+:").removeprefix("-:"), name)), None)
        if rule is not None and rule.startswith("-:"):
            return {"weight": W}, W.float()
        bits = 4 if rule is None else rules[rule]["bits"]
        return packed_by_loop("gptq" if bits == 4 else f"gptq of {bits} bits", W)

    names = iter([n.removesuffix(".weight") for n in load_file(dense / "model.safetensors") if n.endswith("proj.weight")])
    settings = SETTINGS["gptq"] | {"dynamic": rules}
    matrices = write_packed(dense, tmp_path / "base", lambda W: by_loop(next(names), W), settings)
    base, twin = load_base(str(tmp_path / "base"), dtype="float32"), AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    twin.load_state_dict({f"{n}.weight": W for n, W in matrices.items()}, strict=False)
    kinds = {n: base.matrix(n).name for n in matrices}
    assert kinds[Q] == "gptq-8" and kinds[K] == "gptq-3" and kinds["model.layers.1.mlp.up_proj"] == "gptq"
    assert {k for n, k in kinds.items() if n.endswith("down_proj")} == {"dense"} and set(kinds.values()) == {
        "gptq-8",
        "gptq-3",
        "gptq",
        "dense",
    }
    for n, W in matrices.items():
        assert difference(base.matrix(n).dense(), W) < 1e-6, n
    ids = tokens(40, 1)
    with torch.no_grad():
        assert difference(base.logits([ids])[0], twin(torch.tensor([ids])).logits[0]) < 1e-5


def _in_two_files(folder: Path) -> None:
    """The tensors of layer 1 in a second file, but for scales and zeros."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    second = {n: t for n, t in tensors.items() if ".layers.1." in n and not n.endswith(("scales", "qzeros", "weight_scale_inv"))}
    files = {
        "model-00001-of-00002.safetensors": {n: t for n, t in tensors.items() if n not in second},
        "model-00002-of-00002.safetensors": second,
    }
    for name, own in files.items():
        save_file(own, folder / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: name for name, own in files.items() for n in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _set(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda t: t.update({name: change(t[name]).contiguous()})


def _wild(number: float) -> Callable[[Tensor], Tensor]:
    return lambda t: t.index_fill(0, torch.tensor([1]), number)


DAMAGE: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "NaN": ("gptq", _set(f"{K}.scales", _wild(float("nan"))), f"{K}: scales has 32 numbers that are not finite (model-00001-of-00002"),
    "infinity": ("awq", _set(f"{K}.scales", _wild(float("inf"))), f"{K}: scales has 32 numbers that are not finite (model-00001-of-00002"),
    "of blocks": (
        "fp8",
        _set(f"{K}.weight_scale_inv", lambda t: t.log() - torch.inf),
        f"{K}: weight_scale_inv has 2 numbers that are not finite (model-00001-of-00002",
    ),
    "codes cut short": ("gptq", _set(f"{K}.qweight", lambda t: t[:-1]), "belongs (model-00002-of-00002.safetensors)"),
    "no codes of two": ("gptq", lambda t: t.pop(f"{K}.qzeros"), f"{K}: no tensor qzeros (model-00001-of-00002.safetensors, model-00002-"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_told_with_its_file(case: str, dense: Path, tmp_path: Path) -> None:
    kind, change, said = DAMAGE[case]
    write_packed(dense, tmp_path / "base", partial(packed_by_loop, kind), SETTINGS[kind], change)
    _in_two_files(tmp_path / "base")
    with pytest.raises(BaseError, match="packed weights of the base in") as refusal:
        load_base(str(tmp_path / "base"))
    (problem,) = refusal.value.problems
    assert said in problem, problem


@pytest.mark.parametrize(("kind", "name"), [("fp8", "activation_scale"), ("fp8 of outputs", "input_scale")])
def test_scales_of_inputs_that_are_not_used_may_be_anything(kind: str, name: str, dense: Path, tmp_path: Path) -> None:
    """Calibration leaves NaN where no token came, as in experts that no text was sent to."""

    def by_loop(W: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        tensors, entries = packed_by_loop(kind, W)
        return tensors | {name: torch.tensor(float("nan"))}, entries

    matrices = write_packed(dense, tmp_path / "base", by_loop, SETTINGS[kind])
    base = load_base(str(tmp_path / "base"), dtype="float32")
    for n, W in matrices.items():
        assert difference(base.matrix(n).dense(), W) < 1e-6, n


def test_weights_under_a_name_of_their_own(dense: Path, tmp_path: Path) -> None:
    """AutoGPTQ named the file by its settings."""
    shutil.copytree(dense, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "gptq_model-4bit-32g.safetensors")
    with pytest.raises(BaseError, match="is not a base that can be read") as refusal:
        load_base(str(tmp_path / "base"))
    assert any("if gptq_model-4bit-32g.safetensors has them, rename it to model.safetensors" in p for p in refusal.value.problems)


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_of_different_sizes(bits: int) -> None:
    """GPTQ's have one size, but its files could say anything."""
    draw = torch.Generator().manual_seed(0)
    code, zero = torch.randint(2**bits, (6, 64), generator=draw), torch.randint(1, 2**bits, (6, 2), generator=draw)
    scale, group = torch.rand(6, 2, generator=draw).half(), torch.rand(64, generator=draw).gt(0.7).int()
    tensors = {
        "qweight": torch.tensor([words(row, bits) for row in code.tolist()], dtype=torch.int32).T.contiguous(),
        "qzeros": torch.tensor([words(row, bits) for row in (zero.T - 1).tolist()], dtype=torch.int32),
        "scales": scale.T.contiguous(),
        "g_idx": group,
    }
    read = weight_of(read_gptq(tensors, (6, 64), None, torch.float32, {"bits": bits, "group_size": 32}))
    for o in range(6):
        for i in range(64):
            assert abs(float(read.dense()[o, i]) - float((code[o, i] - zero[o, group[i]]) * scale[o, group[i]].float())) < 1e-3
    assert all(torch.equal(t, tensors[n]) for n, t in read.stored().items())
