"""Bases whose layers are packed: folders that transformers and bitsandbytes write, and dense folders that are quantised while they load."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from tests.bases.repacked import words, write_dense, write_packed
from tests.laws.common import difference, noisy, tokens
from tests.tiny import tiny_tokenizer
from tests.train.common import METHODS as VARIANTS
from tests.train.common import run_file
from trimtab.bases import fingerprint, fingerprint_folder, fingerprint_model
from trimtab.bases.fits import weight_bytes
from trimtab.bases.recipes import BITS
from trimtab.bases.shapes import read_architecture
from trimtab.bases.stored_formats import bits_of
from trimtab.bases.unchanged import Watch
from trimtab.bases.weights import FORMATS, four_bit, int4, stored_state, weight_of
from trimtab.bases.weights.four_bit import FourBit
from trimtab.cli import main
from trimtab.errors import AdapterError, BaseError, ConfigError, NotMergeable
from trimtab.methods import LoraConfig
from trimtab.model import load_base
from trimtab.store import Adapter
from trimtab.train import RunConfig, train

WIDE = {"hidden_size": 64, "intermediate_size": 128}
"""bitsandbytes' own loading is wrong where a row is no whole number of blocks."""
BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "nf4 in bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("bases") / "dense", **WIDE)


@pytest.fixture(scope="module")
def folder_of(dense: Path) -> Callable[[str], Path]:
    """What transformers and bitsandbytes make of it: by the key of `BITSANDBYTES`."""

    def made(name: str) -> Path:
        folder = dense.parent / name.replace(" ", "-")
        if not folder.exists():
            with torch.compiler.set_stance("force_eager"):
                settings = BitsAndBytesConfig(**BITSANDBYTES[name])
                AutoModelForCausalLM.from_pretrained(dense, quantization_config=settings, dtype=torch.bfloat16).save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
        return folder

    return made


def bitsandbytes_of(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """transformers' own model of a folder with bitsandbytes' dequantised matrices in it, in float32; and these matrices."""
    from bitsandbytes import functional as bnb

    with torch.compiler.set_stance("force_eager"):
        packed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        matrices = {}
        for name, module in packed.named_modules():
            if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
                state.dtype = torch.float32
                matrices[name] = bnb.dequantize_4bit(module.weight.data, state)
            elif hasattr(module, "state") and hasattr(module.weight, "SCB"):
                matrices[name] = bnb.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    plain = {n: t.float() for n, t in packed.state_dict().items() if n in model.state_dict() and n.removesuffix(".weight") not in matrices}
    model.load_state_dict(plain | {f"{n}.weight": W for n, W in matrices.items()})
    return model, matrices


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_a_folder_of_bitsandbytes(name: str, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(name)
    model, matrices = bitsandbytes_of(folder)
    base = load_base(str(folder), dtype="float32")
    packed = {n: w for n, w in base.attached.weights.of.items() if not w.stored_dense}
    assert packed.keys() == matrices.keys() and len(packed) == 14 and {w.name for w in packed.values()} == {name.split(" ")[0]}
    for n, W in matrices.items():
        assert difference(packed[n].dense(), W) < 1e-6, n
    assert base.spec.num_parameters == sum(p.numel() for p in model.parameters())
    ids = tokens(40, 1)
    with torch.no_grad():
        assert difference(base.logits([ids])[0], model(torch.tensor([ids])).logits[0]) < 1e-5
    as_stored = load_base(str(folder), dtype="bfloat16")
    assert as_stored.fingerprint == fingerprint_folder(folder) == fingerprint_model(as_stored.model)
    assert not hasattr(base.model.config, "quantization_config") and not hasattr(base.model, "hf_quantizer")


@pytest.mark.parametrize("name", BITS)
def test_quantised_while_it_loads(name: str, dense: Path, folder_of: Callable[[str], Path]) -> None:
    """The bytes of bitsandbytes' own quantiser, but for scales of scales that lie between two values, and int8, which it rounds to float16
    first."""
    base, theirs = load_base(str(dense), dtype="bfloat16", quantize=name), load_file(folder_of(name) / "model.safetensors")
    packed = {n: w for n, w in base.attached.weights.of.items() if w.name == name}
    assert len(packed) == 14 and base.dtype == torch.bfloat16
    for n, weight in packed.items():
        for part, tensor in weight.stored().items():
            want = theirs[f"{n}.{part}"]
            assert tensor.shape == want.shape and tensor.dtype == want.dtype, part
            off = int((tensor != want).sum())
            assert off == 0 or (off <= 0.1 * len(tensor) if part == "weight.absmax" else name == "int8" and part == "weight"), (n, part)
    assert base.fingerprint == fingerprint_model(base.model) != fingerprint_folder(dense)
    if issubclass(FORMATS[name], FourBit) and "double" not in name:
        assert base.fingerprint == fingerprint_folder(folder_of(name))


def test_what_is_wrong_with_a_request(dense: Path, folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="quantize 'nf5' is no format for a base") as refusal:
        load_base(str(dense), quantize="nf5")
    assert "nf4" in refusal.value.fix
    with pytest.raises(ConfigError, match="is quantised already"):
        load_base(str(folder_of("nf4")), quantize="int8")


def change(folder: Path, to: Path, tensors: Callable[[dict[str, Tensor]], object] = lambda _: None, **settings: Any) -> str:
    """A copy of a folder with other tensors, or another `quantization_config`."""
    shutil.copytree(folder, to)
    found = load_file(to / "model.safetensors")
    tensors(found)
    save_file({n: t.contiguous() for n, t in found.items()}, to / "model.safetensors", {"format": "pt"})
    config = json.loads((to / "config.json").read_text())
    config["quantization_config"] = {k: v for k, v in (config["quantization_config"] | settings).items() if v is not None}
    (to / "config.json").write_text(json.dumps(config))
    return str(to)


def _state(**values: Any) -> Callable[[dict[str, Tensor]], object]:
    def changed(tensors: dict[str, Tensor]) -> None:
        key = f"{Q}.weight.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(tensors[key].tolist())) | values
        tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return changed


def test_codes_kept_in_a_wider_type_may_be_filled_up() -> None:
    made = four_bit.Nf4.of_matrix(torch.randn(3, 6, generator=torch.Generator().manual_seed(0)), None, torch.float32)
    stored = weight_of(made).stored()
    wider = torch.nn.functional.pad(stored["weight"].view(-1), (0, 1)).view(torch.bfloat16)[:, None]
    read = four_bit.read(stored | {"weight": wider}, (3, 6), None, torch.float32)
    assert torch.equal(weight_of(read).dense(), weight_of(made).dense())


WRONG: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "scales of another shape": (
        "nf4",
        lambda t: t.update({f"{Q}.weight.absmax": t[f"{Q}.weight.absmax"][:-1]}),
        r"weight.absmax is \[63\]",
    ),
    "scales of another dtype": ("nf4", lambda t: t.update({f"{Q}.weight.absmax": t[f"{Q}.weight.absmax"].half()}), "float16 where"),
    "codes too few": ("nf4", lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:-1]}), r"weight is \[2047, 1\]"),
    "no table": ("nf4", lambda t: t.pop(f"{Q}.weight.quant_map"), "no tensor weight.quant_map"),
    "no state": ("nf4", lambda t: t.pop(f"{Q}.weight.quant_state.bitsandbytes__nf4"), "no tensors weight.quant_state"),
    "another matrix": ("nf4", _state(shape=[64, 128]), r"shape \[64, 128\] where the model has \[64, 64\]"),
    "a shape that is none": ("nf4", _state(shape=64), "cannot be read"),
    "no such table": ("nf4", _state(quant_type="nf5"), "quant_type 'nf5' is none of nf4, fp4"),
    "no block": ("nf4", _state(blocksize=0), "blocksize 0"),
    "other blocks": ("nf4", _state(blocksize=96), "blocksize 96"),
    "int8 scales": ("int8", lambda t: t.update({f"{Q}.SCB": t[f"{Q}.SCB"][:-1]}), r"SCB is \[63\]"),
    "int8 in columns": ("int8", lambda t: t.update({f"{Q}.weight_format": torch.tensor(1, dtype=torch.uint8)}), "weight_format is 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_packed_weights_that_do_not_fit(case: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    name, tensors, said = WRONG[case]
    with pytest.raises(BaseError, match="packed weights of the base in") as refusal:
        load_base(change(folder_of(name), tmp_path / "wrong", tensors))
    (problem,) = refusal.value.problems
    assert problem.startswith(Q) and re.search(said, problem), problem


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_codes_without_their_scales_are_not_taken_for_matrices(
    kind: str, dense: Path, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """One scale that is missing; and scales under the name that other programs give them, one of a matrix, that are no known ones."""

    def changed(tensors: dict[str, Tensor]) -> None:
        if kind == "int8":
            del tensors[f"{Q}.SCB"]
        for name in [n for n in tensors if n.endswith("_inv")]:
            tensors[name.replace("weight_scale_inv", "weight_scales")] = tensors.pop(name).mean()

    folder = folder_of("int8") if kind == "int8" else loops("fp8", dense)[0]
    with pytest.raises(BaseError, match="packed weights without the tensors that tell") as refusal:
        load_base(change(folder, tmp_path / "bare", changed))
    assert f"{Q}.weight is {'I8' if kind == 'int8' else 'F8_E4M3'} (model.safetensors)" in refusal.value.problems
    assert len(refusal.value.problems) == (1 if kind == "int8" else 11)


def test_ways_of_quantising_that_are_not_read(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = change(folder_of("nf4"), tmp_path / "aqlm", quant_method="aqlm", load_in_4bit=None, load_in_8bit=None)
    with pytest.raises(BaseError, match="does not read: quant_method 'aqlm'") as refusal:
        load_base(folder)
    assert "bitsandbytes" in refusal.value.fix
    embedded = change(folder_of("nf4"), tmp_path / "embedding", lambda t: t.update({"model.embed_tokens.weight.absmax": torch.ones(3)}))
    with pytest.raises(BaseError, match=r"packed weights where its model has no linear layer: model\.embed_tokens"):
        load_base(embedded)
    cut = Path(change(folder_of("nf4"), tmp_path / "cut"))
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(BaseError, match="is not a base that can be read") as refusal:
        load_base(str(cut))
    assert "truncated" in str(refusal.value.problems)


def test_what_plans_count_is_what_is_stored(dense: Path, folder_of: Callable[[str], Path]) -> None:
    """Also of a folder that is packed, whose config alone is read; and what a refusal for want of memory counts."""
    for name in BITS:
        base = load_base(str(dense), dtype="bfloat16", quantize=name)
        stored = sum(t.nbytes for n, t in stored_state(base.model).items() if n != "lm_head.weight")
        small = sum(
            t.nbytes
            for w in base.attached.weights.of.values()
            for n, t in w.stored().items()
            if any(s in n for s in ("map", "state", "SCB"))
        )
        for spec in (base.spec, read_architecture(str(dense), name).spec, read_architecture(str(folder_of(name))).spec):
            assert spec.num_parameters == base.spec.num_parameters
            assert abs(spec.weight_bytes(torch.bfloat16) - (stored - small)) <= 0.02 * stored + small * (spec is base.spec), name
        whole, own = weight_bytes(dense, torch.bfloat16, name)
        assert own < whole and abs(whole - (stored - small)) <= 0.02 * stored
        assert weight_bytes(folder_of(name), torch.bfloat16)[1] == 0


def test_a_run_trains_checks_and_resumes_on_it(dense: Path, tmp_path: Path) -> None:
    content = run_file(tmp_path, {"lora": VARIANTS["lora"] | {"data": "a", "max_steps": 12}, "dora": VARIANTS["dora"] | {"data": "b"}})
    run = RunConfig.from_dict(content | {"base": str(dense), "quantize": "nf4", "dtype": "float32"}, root=tmp_path)
    report = train(run)
    assert {w.name for w in report.base.attached.weights.of.values()} == {"dense", "nf4"}
    assert report.summary["base_bytes"] == report.base.spec.weight_bytes(torch.float32)
    for name, adapter in report.adapters.items():
        losses = report.summary["variants"][name]["losses"]
        assert losses["last"] < losses["first"], name
        again = Adapter.load(tmp_path / "out" / "adapters" / name, load_base(str(dense), dtype="float32", quantize="nf4"))
        assert all(torch.equal(again.params[k], t) for k, t in adapter.params.items())
    assert train(run, resume=True).summary["variants"].keys() == report.adapters.keys()
    with pytest.raises(ConfigError, match="its run file has changed"):
        train(RunConfig.from_dict(content | {"base": str(dense), "dtype": "float32"}, root=tmp_path), resume=True)
    with pytest.raises(ConfigError, match="cannot be run") as refusal:
        RunConfig.from_dict(content | {"quantize": "nf5"}, root=tmp_path)
    assert "quantize" in str(refusal.value.problems) and "nf4" in str(refusal.value.problems)


def test_an_adapter_of_it_is_taken_elsewhere_only_when_asked_and_merged_into_the_dense_base(
    dense: Path, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    here, there = load_base(str(dense), dtype="float32", quantize="nf4"), load_base(str(dense), dtype="float32")
    folder = noisy(here, LoraConfig(r=2, use_dora=True)).save(tmp_path / "adapter")
    assert json.loads((folder / "trimtab.json").read_text())["base"]["quantized"] == "nf4"
    with pytest.raises(AdapterError, match="does not fit this base") as refusal:
        Adapter.load(folder, there)
    assert "in nf4 with fingerprint" in refusal.value.problems[0] and "--base-differs" in refusal.value.fix
    willing = load_base(str(dense), dtype="float32", base_differs=True)
    taken = Adapter.load(folder, willing)
    assert not taken.verified and "it was trained on" in taken.warnings[0]

    report = Adapter.load(folder, here).merge_into(tmp_path / "merged")
    merged, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32), tokens(9, 1)
    with torch.no_grad():
        got, want = merged(torch.tensor([ids])).logits[0], taken.base.logits([ids], [taken])[0]
        on_nf4 = here.logits([ids], [Adapter.load(folder, here)])[0]
    assert report.quantized == "nf4" and difference(got, want) < 0.1 < difference(on_nf4, want)
    packed = load_base(str(folder_of("nf4")), dtype="float32", base_differs=True)
    with pytest.raises(NotMergeable, match="stored as nf4") as refused:
        Adapter.load(folder, packed).merge_into(tmp_path / "none")
    assert "--base-differs" in refused.value.fix and not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", BITS)
def test_a_written_folder_is_read_by_transformers_with_bitsandbytes(name: str, dense: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["quantize", str(dense), str(tmp_path / "out"), "--to", name, "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.output)
    assert report["packed"] == 14 and report["fingerprint"] == load_base(str(dense), dtype="bfloat16", quantize=name).fingerprint
    model, matrices = bitsandbytes_of(tmp_path / "out")
    base, ids = load_base(str(tmp_path / "out"), dtype="float32"), tokens(40, 1)
    assert len(matrices) == 14 and base.packed_as == name
    with torch.no_grad():
        assert difference(base.logits([ids])[0], model(torch.tensor([ids])).logits[0]) < 1e-5
    again = CliRunner().invoke(main, ["quantize", str(dense), str(tmp_path / "out"), "--to", "nf5"])
    assert again.exit_code == 2 and "already holds" in again.output and "nf4" in again.output


# ---- formats whose programs are not here: folders packed by plain loops over the formats' descriptions ----

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def whole_numbers(W: Tensor, size: int, most: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [O, I], scales [O, G] in fp16, zeros [O, G]) in groups of so many inputs."""
    groups = W.float().unflatten(1, (-1, size))
    scale = ((groups.amax(2) - groups.amin(2)) / most).half()
    zero = (-groups.amin(2) / scale.float()).round().clamp(0, most)
    return ((groups / scale.float()[..., None]).round() + zero[..., None]).clamp(0, most).flatten(1).long(), scale, zero.long()


def packed_by_loop(kind: str, W: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """(a layer's tensors as the format has them, the matrix that they hold)."""
    O, I = W.shape
    if kind == "fp8 with one scale":
        codes, one = W.float().to(torch.float8_e4m3fn), torch.tensor(0.75)
        return {"weight": codes, "weight_scale_inv": one, "activation_scale": torch.tensor(2.0)}, codes.float() * one
    if kind == "fp8":
        rows, columns = (torch.arange(n) // 48 for n in (O, I))
        scale = torch.rand(-(-O // 48), -(-I // 48), generator=torch.Generator().manual_seed(O)) + 0.5
        codes = W.float().to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale_inv": scale}, codes.float() * scale[rows][:, columns]
    if kind == "fp8 of outputs":
        codes, scales = W.float().to(torch.float8_e4m3fn), torch.rand(O, 1, generator=torch.Generator().manual_seed(O)) + 0.5
        return {"weight": codes, "weight_scale": scales}, codes.float() * scales
    bits = next((int(n) for n in "238" if f"{n} bits" in kind), 4)
    code, scale, zero = whole_numbers(W, 32, 2**bits - 1)
    group = torch.arange(I) // 32
    if "in an order" in kind:
        group = group[torch.randperm(I, generator=torch.Generator().manual_seed(0))]
    held = (code - zero[:, group]) * scale.float()[:, group]
    if kind == "awq gemv":  # room for 32 groups, of which there are two to four
        scale, zero = (torch.nn.functional.pad(x, (0, 32 - x.shape[1])) for x in (scale, zero))
        tensors = {n: torch.tensor([words(row) for row in m.tolist()]) for n, m in (("qweight", code), ("qzeros", zero))}
        return {n: t.int() for n, t in tensors.items()} | {"scales": scale}, held
    if kind == "awq":
        tensors = {n: torch.tensor([words(row, order=AWQ_ORDER) for row in m.T.tolist()]) for n, m in (("qweight", code), ("qzeros", zero))}
    else:
        less = 0 if kind == "gptq_v2" else 1
        tensors = {
            "qweight": torch.tensor([words(row, bits) for row in code.tolist()]).T.contiguous(),
            "qzeros": torch.tensor([words(row, bits) for row in ((zero.T - less) & (2**bits - 1)).tolist()]),
            "g_idx": group.int(),
        }
    return {n: t.to(torch.int32) for n, t in tensors.items()} | {"scales": scale.T.contiguous()}, held


SETTINGS: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [48, 48]},
    "fp8 with one scale": {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
    "gptq in an order": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
    "gptq of 2 bits": {"quant_method": "gptq", "bits": 2, "group_size": 32},
    "gptq of 3 bits in an order": {"quant_method": "gptq", "bits": 3, "group_size": 32, "desc_act": True},
    "gptq of 8 bits": {"quant_method": "gptq", "bits": 8, "group_size": 32},
    "gptq of 8 bits in an order": {"quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
    "awq gemv": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"},
    "fp8 of outputs": {"quant_method": "fbgemm_fp8"},
}


@cache
def loops(kind: str, dense: Path) -> tuple[Path, dict[str, Tensor]]:
    """The dense base packed so: (its folder, the matrices)."""
    folder = dense.parent / f"loops-{kind.replace(' ', '-')}"
    return folder, write_packed(dense, folder, partial(packed_by_loop, kind), SETTINGS[kind])


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_folder_that_loops_have_packed(kind: str, dense: Path) -> None:
    folder, matrices = loops(kind, dense)
    base, twin = load_base(str(folder), dtype="float32"), AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    twin.load_state_dict({f"{n}.weight": W for n, W in matrices.items()}, strict=False)
    form = {f"gptq of {n} bits": f"gptq-{n}" for n in (2, 3, 8)} | {"awq gemv": "awq-gemv", "fp8 of outputs": "float-quantized"}
    form = form.get(kind.removesuffix(" in an order"))
    assert base.packed_as == (form or SETTINGS[kind]["quant_method"]) and len(matrices) == 14
    for n, W in matrices.items():
        assert difference(base.matrix(n).dense(), W) < 1e-6, n
        assert all(t.is_contiguous() for t in base.matrix(n).packed.parts.values()), "kernels would copy it for each product"
    there = sum({t.data_ptr(): t.nbytes for t in base.model.state_dict().values()}.values())
    assert weight_bytes(folder, torch.float32)[0] > 0.94 * there, "codes of 2 and 3 bits take 4 in memory; scales are small in real bases"
    ids = tokens(40, 1)
    with torch.no_grad():
        assert difference(base.logits([ids])[0], twin(torch.tensor([ids])).logits[0]) < 1e-5
    as_stored = load_base(str(folder), dtype="bfloat16")
    assert as_stored.fingerprint == fingerprint_folder(folder) == fingerprint_model(as_stored.model)


@pytest.mark.parametrize("number", [0.0, 0.5])
def test_a_bias_that_the_model_has_no_place_for(number: float, dense: Path, tmp_path: Path) -> None:
    """Programs write a bias of zeros to each layer. Another one would be lost."""
    name = "model.layers.0.self_attn.o_proj"
    folder = change(loops("gptq", dense)[0], tmp_path / "bias", lambda t: t.update({f"{name}.bias": torch.full((64,), number).half()}))
    if not number:
        assert load_base(folder, dtype="float32").matrix(name).name == "gptq"
        return
    with pytest.raises(BaseError, match="packed weights of the base in") as refusal:
        load_base(folder)
    assert list(refusal.value.problems) == [f"{name}: bias is not zero, and the model has no place for it (model.safetensors)"]


def test_few_matrices_at_a_time_are_packed_anew_for_a_fingerprint(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(str(loops("gptq", dense)[0]), dtype="bfloat16")
    made, alive, in_memory = list[weakref.ref[Tensor]](), list[int](), int4.Gptq.stored

    def stored(self: int4.Gptq) -> dict[str, Tensor]:
        found = in_memory(self)
        made.append(weakref.ref(found["qweight"]))
        alive.append(sum(one() is not None for one in made))
        return found

    monkeypatch.setattr(int4.Gptq, "stored", stored)
    monkeypatch.setattr(fingerprint, "THREADS", 2)
    assert fingerprint_model(base.model) == base.fingerprint and len(alive) == 14 and max(alive) <= 2, alive
    watch = Watch(base.model)
    before = watch._sum(base.model)
    base.model.model.layers[1].mlp.up_proj.codes[3, 5] ^= 1
    assert not torch.equal(watch._sum(base.model), before) and len(alive) == 4 * 14 and max(alive) <= 2, alive


@pytest.mark.parametrize(
    ("kind", "tensors", "settings", "said"),
    [
        ("gptq", lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"][:-1].clone()}), {}, r"scales is \[1, 64\]"),
        ("gptq", lambda t: t.update({f"{Q}.g_idx": t[f"{Q}.g_idx"] + 1}), {}, "g_idx names groups from 1 to 2, where there are 2"),
        ("gptq", lambda t: None, {"bits": 5}, "bits = 5: only 2, 3, 4 and 8 are read"),
        ("gptq", lambda t: None, {"bits": 8}, r"qweight is \[8, 64\] int32 where \[16, 64\]"),
        ("gptq", lambda t: None, {"group_size": 48}, "group_size = 48 does not divide the 64 inputs"),
        ("awq", lambda t: None, {"version": "gemv_fast"}, "version 'gemv_fast' of AWQ is not read"),
        ("awq", lambda t: None, {"version": "gemv"}, r"scales is \[2, 64\] float16 where \[64, 32\]"),
        ("awq gemv", lambda t: t[f"{Q}.scales"].add_(1), {}, "have more than the 2 groups of 32 inputs"),
        ("awq", lambda t: None, {"bits": 8}, "bits = 8: AWQ is read with 4"),
        ("awq", lambda t: t.pop(f"{Q}.qzeros"), {}, "no tensor qzeros"),
        ("fp8", lambda t: None, {"weight_block_size": [32, 48]}, r"weight_scale_inv is \[3, 2\]"),
        ("fp8", lambda t: None, {"weight_block_size": [0, 48]}, "two numbers above 0"),
        ("fp8", lambda t: None, {"weight_block_size": 48}, "weight_block_size = 48, where two numbers above 0"),
        ("gptq", lambda t: None, {"checkpoint_format": "bitblas"}, "checkpoint_format 'bitblas' of GPTQ is not read"),
        ("fp8", lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].view(torch.uint8)}), {}, "uint8 where"),
    ],
)
def test_folders_of_loops_that_do_not_fit(
    kind: str, tensors: Callable[[dict[str, Tensor]], object], settings: dict[str, Any], said: str, dense: Path, tmp_path: Path
) -> None:
    with pytest.raises(BaseError, match="packed weights of the base in") as refusal:
        load_base(change(loops(kind, dense)[0], tmp_path / "wrong", tensors, **settings))
    assert any(re.search(said, problem) for problem in refusal.value.problems), refusal.value.problems


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("gptq", {"bits": 5}, "bits = 5: only 2, 3, 4 and 8 are read"),
        ("gptq", {"bits": 4.0}, "bits = 4.0: only 2, 3, 4 and 8 are read"),
        ("awq", {"bits": True}, "bits = True: only 2, 3, 4 and 8 are read"),
        ("awq", {"bits": 10**400}, "only 2, 3, 4 and 8 are read"),
        ("gptq", {"group_size": True}, "group_size = True, where -1 or a whole number above 0 belongs"),
        ("awq", {"group_size": "32"}, "group_size = '32', where -1 or a whole number above 0 belongs"),
    ],
)
def test_sizes_of_groups_that_cannot_be(kind: str, settings: dict[str, Any], said: str, dense: Path, tmp_path: Path) -> None:
    """They are said by a plan too, which reads the config alone."""
    folder = change(loops(kind, dense)[0], tmp_path / "wrong", **settings)
    for reads in (load_base, read_architecture):
        with pytest.raises(BaseError, match=re.escape(said)):
            reads(str(folder))


@pytest.mark.parametrize("bits", ["x", None, [4], -1, 10**400, True])
def test_a_folder_that_calls_itself_gguf_is_planned_as_any_of_8_bits(bits: Any) -> None:
    assert bits_of({"quant_method": "gguf", "bits": bits}) == 8
