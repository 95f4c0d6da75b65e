"""Folders of compressed-tensors, packed by plain loops over the format's description: dequantised entries, logits, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.bases.repacked import words, write_dense, write_packed
from tests.laws.common import difference, tokens
from trimtab.bases import fingerprint_folder, fingerprint_model
from trimtab.bases.shapes import read_architecture
from trimtab.bases.weights.compressed import read
from trimtab.errors import BaseError
from trimtab.model import load_base

Q = "model.layers.0.self_attn.q_proj"
GROUP, BLOCK = {"strategy": "group", "group_size": 8}, {"strategy": "block", "block_structure": [4, 4]}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("pack-quantized", INT4),
    "int4 with zeros": ("pack-quantized", INT4 | {"symmetric": False}),
    "int4 with zeros as int8": ("pack-quantized", INT4 | {"symmetric": False}),
    "int4 in an order": ("pack-quantized", INT4 | {"actorder": "group"}),
    "int4 of outputs": ("pack-quantized", INT4 | {"strategy": "channel", "group_size": None}),
    "int8 packed": ("pack-quantized", INT4 | {"num_bits": 8, "symmetric": False}),
    "int8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}),
    "int8 with zeros": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}),
    "int8 of a matrix": ("naive-quantized", {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True}),
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}),
    "fp8 of a matrix": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}),
    "fp8 of blocks": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [48, 32]}),
}
"""Case -> (`format`, `weights` of its group)."""


def by_loop(case: str, W: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """(a layer's tensors as the format has them, the matrix that they hold)."""
    (form, scheme), (O, I) = SCHEMES[case], W.shape
    bits, strategy, draw = scheme["num_bits"], scheme["strategy"], torch.Generator().manual_seed(O)
    rows, columns = scheme.get("block_structure") or {"group": (1, 32), "channel": (1, I), "tensor": (O, I)}[strategy]
    grid = -(-O // rows), -(-I // columns)
    scale = (torch.rand(grid, generator=draw) + 0.5).to(torch.bfloat16)
    group = torch.arange(I) // columns
    if "order" in case:
        group = group[torch.randperm(I, generator=draw)]
    whole = scale.float()[torch.arange(O) // rows][:, group]
    stored = scale.view(1) if grid == (1, 1) else scale
    if scheme["type"] == "float":
        codes = (W.float() / whole).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": stored, "input_scale": torch.ones(1)}, codes.float() * whole
    half = 2 ** (bits - 1)
    zero = torch.randint(-half, half, grid, generator=draw) * (not scheme["symmetric"])
    code = torch.randint(-half, half, (O, I), generator=draw)
    held = (code - zero[torch.arange(O) // rows][:, group]) * whole
    if form != "pack-quantized":
        zeros = {} if scheme["symmetric"] else {"weight_zero_point": zero.to(torch.int8)}
        return {"weight": code.to(torch.int8), "weight_scale": stored} | zeros, held
    tensors = {"weight_packed": torch.tensor([words(row, bits) for row in (code + half).tolist()], dtype=torch.int32)}
    tensors |= {"weight_scale": scale, "weight_shape": torch.tensor([O, I])}
    if "zeros as int8" in case:
        tensors["weight_zero_point"] = zero.to(torch.int8)
    elif not scheme["symmetric"]:
        tensors["weight_zero_point"] = torch.tensor([words(c, bits) for c in (zero + half).T.tolist()], dtype=torch.int32).T.contiguous()
    return tensors | ({"weight_g_idx": group.int()} if "order" in case else {}), held


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("bases") / "dense", hidden_size=64, intermediate_size=96, num_hidden_layers=1)


def written(
    case: str, dense: Path, to: Path, change: Callable[[dict[str, Tensor]], object] = lambda t: None, **settings: Any
) -> dict[str, Tensor]:
    """The dense base packed so: the matrices."""
    form, scheme = SCHEMES[case]
    told = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}}}
    return write_packed(dense, to, partial(by_loop, case), told | settings, change)


@pytest.mark.parametrize("case", SCHEMES)
def test_a_folder_that_loops_have_packed(case: str, dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    matrices = written(case, dense, folder)
    base, twin = load_base(str(folder), dtype="float32"), AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    twin.load_state_dict({f"{n}.weight": W for n, W in matrices.items()}, strict=False)
    assert len(matrices) == 7 and base.packed_as.removesuffix("-4").removesuffix("-8") == SCHEMES[case][0].replace("naive", "int")
    for n, W in matrices.items():
        weight = base.matrix(n)
        assert difference(weight.dense(), W) < 1e-6, n
        assert all(t.is_contiguous() for t in weight.packed.parts.values()), "kernels would copy it for each product"
    ids = tokens(40, 1)
    with torch.no_grad():
        assert difference(base.logits([ids])[0], twin(torch.tensor([ids])).logits[0]) < 1e-5
    as_stored = load_base(str(folder), dtype="bfloat16")
    assert as_stored.fingerprint == fingerprint_folder(folder) == fingerprint_model(as_stored.model)
    real = sum(w.nbytes for w in base.attached.weights.of.values() if not w.stored_dense)
    told = read_architecture(str(folder)).spec
    planned = sum(m.bits / 8 * m.in_features * m.out_features for m in told.modules.values() if m.bits)
    assert abs(planned - real) < 0.4 * real  # the scales of matrices as small as these weigh much


@pytest.mark.parametrize(
    ("case", "change", "settings", "said"),
    [
        ("int4", lambda t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"][:, :1].clone()}), {}, r"weight_scale is \[64, 1\]"),
        ("int4", lambda t: t.update({f"{Q}.weight_packed": t[f"{Q}.weight_packed"][:-1].clone()}), {}, r"weight_packed is \[63, 8\]"),
        ("int4", lambda t: t.update({f"{Q}.weight_shape": torch.tensor([64, 96])}), {}, r"weight_shape is \[64, 96\] where the model has"),
        ("int4 with zeros", lambda t: t.pop(f"{Q}.weight_zero_point"), {}, "no tensor weight_zero_point"),
        ("int4 in an order", lambda t: t.pop(f"{Q}.weight_g_idx"), {}, "no tensor weight_g_idx"),
        ("int4 in an order", lambda t: t[f"{Q}.weight_g_idx"].add_(1), {}, "weight_g_idx names groups from 1 to 2, where there are 2"),
        ("int4 in an order", lambda t: t[f"{Q}.weight_g_idx"].fill_(-1), {}, "were never stored"),
        ("int8", lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].float()}), {}, "weight is .* float32 where"),
        ("fp8 of blocks", lambda t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"][:1].clone()}), {}, r"weight_scale is \[1, 2\]"),
    ],
)
def test_tensors_that_do_not_fit(case: str, change: Any, settings: dict[str, Any], said: str, dense: Path, tmp_path: Path) -> None:
    written(case, dense, tmp_path / "wrong", change, **settings)
    with pytest.raises(BaseError, match="packed weights of the base in") as refusal:
        load_base(str(tmp_path / "wrong"))
    (problem,) = refusal.value.problems
    assert problem.startswith(Q) and re.search(said, problem), problem


@pytest.mark.parametrize(
    ("case", "weights", "said"),
    [
        ("int4", INT4 | {"group_size": 40}, r"group_size = 40 does not divide the (64|96) inputs"),
        ("int4", INT4 | {"num_bits": 8}, r"weight_packed is \[\d+, (8|12)\] int32 where \[\d+, (16|24)\]"),
        ("int8", INT4, "num_bits 4 are not read unless they are packed, only those with 8"),
        ("int8", {"num_bits": 8, "type": "int"} | BLOCK, "int8 weights with strategy 'block' are not read"),
        ("fp8", {"num_bits": 8, "type": "float"} | BLOCK | {"block_structure": [0, 4]}, "two numbers above 0"),
    ],
)
def test_weights_that_are_declared_wrongly(case: str, weights: dict[str, Any], said: str, dense: Path, tmp_path: Path) -> None:
    written(case, dense, tmp_path / "wrong", config_groups={"group_0": {"weights": weights}})
    with pytest.raises(BaseError, match="packed weights of the base in") as refusal:
        load_base(str(tmp_path / "wrong"))
    assert len(refusal.value.problems) == 7 and all(re.search(said, p) for p in refusal.value.problems), refusal.value.problems


def test_layers_of_several_kinds(dense: Path, tmp_path: Path) -> None:
    """One group of layers in 4 bits and one in float8: each layer has what fits its tensors."""

    def change(tensors: dict[str, Tensor]) -> None:
        layer, held[Q] = by_loop("fp8", W)
        for name in [n for n in tensors if n.startswith(f"{Q}.weight")]:
            del tensors[name]
        tensors |= {f"{Q}.{part}": t for part, t in layer.items()}

    W, held = load_file(dense / "model.safetensors")[f"{Q}.weight"], dict[str, Tensor]()
    groups = {f"group_{i}": {"weights": SCHEMES[case][1]} for i, case in enumerate(("int4", "fp8"))}
    matrices = written("int4", dense, tmp_path / "mixed", change, config_groups=groups, format="mixed-precision")
    base = load_base(str(tmp_path / "mixed"), dtype="float32")
    assert base.packed_as == "float-quantized, pack-quantized-4"
    for n, W in (matrices | held).items():
        assert difference(base.matrix(n).dense(), W) < 1e-6, n


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized' is not read, only pack-quantized"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "transform_config rotates"),
        ({"config_groups": {}}, "config_groups names no weights"),
        ({"config_groups": None}, "config_groups names no weights"),
        ({"config_groups": {"group_0": {"weights": None}}}, "config_groups names no weights"),
        ({"config_groups": {"group_0": {"weights": INT4 | {"num_bits": None}}}}, "num_bits None, where 4 or 8 belongs"),
        ({"config_groups": {"group_0": {"weights": INT4 | {"num_bits": True}}}}, "num_bits True, where 4 or 8 belongs"),
        ({"config_groups": {"group_0": {"weights": INT4 | {"num_bits": 4.0}}}}, "num_bits 4.0, where 4 or 8 belongs"),
        ({"config_groups": {"group_0": {"weights": INT4 | {"num_bits": [4]}}}}, "num_bits [4], where 4 or 8 belongs"),
        ({"config_groups": {"group_0": {"weights": INT4 | {"num_bits": 10**400}}}}, "0, where 4 or 8 belongs"),
        ({"config_groups": {"group_0": {"weights": INT4 | {"group_size": True}}}}, "group_size True, where -1 or a whole number above 0"),
        ({"config_groups": {"group_0": {"weights": INT4 | {"group_size": 0}}}}, "group_size 0, where -1 or a whole number above 0"),
        ({"config_groups": {"group_0": {"weights": INT4 | {"group_size": "32"}}}}, "group_size '32', where -1 or a whole number"),
        ({"config_groups": {"group_0": {"weights": INT4, "format": ["a"]}}}, "format ['a'] is not read"),
        ({"format": {"a": 1}}, "format {'a': 1} is not read"),
        ({"sparsity_config": "2:4"}, "sparsity_config is no mapping"),
        ({"transform_config": ["R1"]}, "transform_config is no mapping"),
    ],
)
def test_ways_that_are_not_read(settings: dict[str, Any], said: str, dense: Path, tmp_path: Path) -> None:
    written("int4", dense, tmp_path / "other", **settings)
    for reads in (load_base, read_architecture):  # a plan says it before the weights are there
        with pytest.raises(BaseError, match="quantised by compressed-tensors in a way that trimtab does not read") as refusal:
            reads(str(tmp_path / "other"))
        assert any(said in problem for problem in refusal.value.problems) and "quantize: nf4" in refusal.value.fix


@pytest.mark.parametrize(("kind", "strategy"), [("int", GROUP), ("float", GROUP), ("float", BLOCK)])
def test_one_scale_is_that_of_the_whole_matrix(kind: str, strategy: dict[str, Any]) -> None:
    W = torch.arange(8.0).repeat(8, 2)
    codes = W.to(torch.int8 if kind == "int" else torch.float8_e4m3fn)
    scheme = {"num_bits": 8, "type": kind, "symmetric": True, **strategy}
    tensors = {"weight": codes, "weight_scale": torch.tensor([0.5])}
    layer = read(tensors, (8, 16), None, torch.float32, {"config_groups": {"all": {"weights": scheme}}})
    assert torch.equal(layer(torch.eye(16)).T, 0.5 * W)


def test_a_shape_that_is_told_as_one_number() -> None:
    tensors = {"weight_packed": torch.zeros(8, 2, dtype=torch.int32), "weight_scale": torch.ones(8, 1), "weight_shape": torch.tensor(8)}
    with pytest.raises(ValueError, match=r"weight_shape is 8 where the model has \[8, 16\]"):
        read(
            tensors,
            (8, 16),
            None,
            torch.float32,
            {"config_groups": {"all": {"weights": INT4 | {"strategy": "channel", "group_size": None}}}},
        )


def test_a_shape_that_is_told_at_length_is_not_repeated() -> None:
    tensors = {"weight_packed": torch.zeros(8, 2, dtype=torch.int32), "weight_scale": torch.ones(8, 1), "weight_shape": torch.ones(100_000)}
    scheme = INT4 | {"strategy": "channel", "group_size": None}
    with pytest.raises(ValueError, match="weight_shape is 100,000 numbers where"):
        read(tensors, (8, 16), None, torch.float32, {"config_groups": {"all": {"weights": scheme}}})


def test_weights_that_leave_their_bits_out_have_8() -> None:
    """As compressed-tensors has it."""
    scheme = {"type": "int", "strategy": "channel"}
    tensors = {"weight": torch.full((8, 16), -3, dtype=torch.int8), "weight_scale": torch.full((8, 1), 0.5)}
    layer = read(tensors, (8, 16), None, torch.float32, {"config_groups": {"all": {"weights": scheme}}})
    assert torch.equal(layer(torch.eye(16)), torch.full((16, 8), -1.5))


@pytest.mark.parametrize("kind", ["int", "float"])
def test_groups_in_an_order_are_not_read_as_consecutive_ones(kind: str) -> None:
    """Of weights that are not packed. One that says what holds without it is none."""
    codes = torch.ones(8, 16).to(torch.int8 if kind == "int" else torch.float8_e4m3fn)
    tensors = {"weight": codes, "weight_scale": torch.tensor([[1.0, 2.0]]).repeat(8, 1)}
    settings = {"config_groups": {"all": {"weights": {"num_bits": 8, "type": kind, "symmetric": True, **GROUP}}}}
    group = torch.arange(16) // 8
    for same in (group.int(), torch.full((16,), -1)):
        layer = read(tensors | {"weight_g_idx": same}, (8, 16), None, torch.float32, settings)
        assert torch.equal(layer(torch.eye(16))[:, 0], group + 1.0)
    with pytest.raises(ValueError, match="weight_g_idx says that groups are not consecutive"):
        read(tensors | {"weight_g_idx": group.flip(0)}, (8, 16), None, torch.float32, settings)
