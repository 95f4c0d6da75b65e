"""`init_lora_weights`: starts against peft's own, what is saved and read by peft, bases in 4 bits, what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import loftq_utils

from tests.tiny import tiny_model, tiny_tokenizer
from tests.train.common import METHODS, run, run_file, tiny_base
from trimtab.bases.shapes import Architecture
from trimtab.cost.plan import plan
from trimtab.errors import ConfigError
from trimtab.methods import LoraConfig
from trimtab.model import Base, load_base
from trimtab.store import Adapter
from trimtab.train import RunConfig

IDS = [list(range(5, 40)), list(range(90, 110))]
SETTINGS: dict[str, dict[str, Any]] = {
    "pissa": {"r": 4, "lora_alpha": 6},
    "pissa_niter_900": {"r": 4, "use_rslora": True, "lora_alpha": 3},
    "olora": {"r": 4, "lora_alpha": 6, "use_dora": True},
    "gaussian": {"r": 4},
}


def theirs_of(family: str, kind: Any, fields: dict[str, Any]) -> Any:
    """peft's model of that start: its base's weights are changed, so on a copy."""
    model = copy.deepcopy(tiny_model(family))
    keys = {"lora_alpha": 2 * fields["r"], "target_modules": "all-linear", "fan_in_fan_out": family == "gpt2"} | fields
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=kind, **keys))


@pytest.mark.parametrize(("family", "kind"), [*(("llama", kind) for kind in SETTINGS), ("gpt2", "pissa")])  # peft has no OLoRA of Conv1D
def test_starts_are_pefts(family: str, kind: str) -> None:
    """Products, since signs and, of equal singular values, directions are anybody's. A new adapter changes no logit, here exactly."""
    base = Base(tiny_model(family), tiny_tokenizer())
    adapter = Adapter.create(base, LoraConfig(init_lora_weights=kind, **SETTINGS[kind]))
    model = theirs_of(family, kind, SETTINGS[kind])
    near = {"rtol": 1e-3, "atol": 1e-4 if "niter" in kind else 1e-5}  # rounds of a product with what torch draws, in peft without a seed
    for site in adapter.sites:
        module = model.base_model.model.get_submodule(site.name)
        A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
        mine = {n: adapter.params[site.key(f"{n}.weight")] for n in ("lora_A", "lora_B")}
        assert site.scaling == pytest.approx(module.scaling["default"])
        torch.testing.assert_close(mine["lora_B"] @ mine["lora_A"], B @ A, **near)
        if kind == "gaussian":
            assert mine["lora_A"].std().item() == pytest.approx(0.25, rel=0.2) and not mine["lora_B"].any()
        elif kind != "olora":  # each half takes the root of a singular value
            torch.testing.assert_close(mine["lora_A"].norm(dim=1), A.norm(dim=1), **near)
            torch.testing.assert_close(mine["lora_B"].norm(dim=0), B.norm(dim=0), **near)
    for got, want in zip(base.logits(IDS, [adapter, adapter]), base.logits(IDS), strict=True):
        if SETTINGS[kind].get("use_dora"):  # whose norms are computed with the start
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_what_is_saved_is_a_lora_on_the_base_as_it_is(kind: str, tmp_path: Path) -> None:
    """Equal steps from equal starts: peft's model, with its residual base, and ours on the unchanged base, which peft reads again."""
    base = tiny_base()
    method = LoraConfig(init_lora_weights=kind, rank_pattern={"q_proj": 6}, alpha_pattern={"v_proj": 3}, r=4, lora_alpha=6)
    adapter = Adapter.create(base, method)
    model = theirs_of("llama", kind, {"r": 4, "lora_alpha": 6, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 3}})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for site in adapter.sites:
            module = model.base_model.model.get_submodule(site.name)
            for name, of in (("lora_A", module.lora_A), ("lora_B", module.lora_B)):
                p = adapter.params[site.key(f"{name}.weight")]
                of["default"].weight.copy_(p)  # the same start, signs included
                step = 0.05 * torch.randn(p.shape, generator=generator)
                p += step
                of["default"].weight.add_(step)
    want = model(torch.tensor([IDS[0]])).logits[0]
    got = base.logits(IDS[:1], [adapter])[0]
    assert (want - base.logits(IDS[:1])[0]).abs().max() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    adapter.save(tmp_path / "a")
    again = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "a")
    torch.testing.assert_close(again(torch.tensor([IDS[0]])).logits[0], want, rtol=1e-4, atol=1e-4)
    loaded = Adapter.load(tmp_path / "a", base)
    assert (loaded.method.r, loaded.method.init_lora_weights, loaded.method.rank_pattern) == (8, True, {"q_proj": 12})
    torch.testing.assert_close(base.logits(IDS[:1], [loaded])[0], got, rtol=1e-5, atol=1e-5)


def test_small_changes_survive_bfloat16() -> None:
    """What training has changed is small beside the start: it is rounded by itself, not as a part of the start."""
    base = Base(tiny_model("llama").bfloat16(), tiny_tokenizer())
    adapter = Adapter.create(base, LoraConfig(r=4, init_lora_weights="pissa"))
    site = adapter.sites[0]
    before = {n: adapter.params[site.key(n)].clone() for n in ("lora_A.weight", "lora_B.weight")}
    generator = torch.Generator().manual_seed(0)
    for name in before:
        adapter.params[site.key(name)] += 1e-4 * torch.randn(before[name].shape, generator=generator)
    now = {n: adapter.params[site.key(n)] for n in before}
    packed = base.pack(adapter).edits[site.name].tensors
    got = packed["B"].float() @ packed["A"].float()
    want = site.scaling * (now["lora_B.weight"] @ now["lora_A.weight"] - before["lora_B.weight"] @ before["lora_A.weight"])
    assert (got - want).norm() < 0.01 * want.norm()


def test_loftq_takes_what_packing_lost(tmp_path: Path) -> None:
    """On nf4, against peft's function for bases that stay as they are; the adapter is nearer to the dense base than the packed one is."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base, dense = (load_base(str(tmp_path / "base"), dtype="float32", quantize=q) for q in ("nf4", None))
    adapter = Adapter.create(base, LoraConfig(r=8, init_lora_weights="loftq"))
    for site in adapter.sites:
        W = model.get_submodule(site.name).weight.detach()
        kept = loftq_utils._low_rank_decomposition(W - base.matrix(site.name).dense(), reduced_rank=8)
        got = site.scaling * adapter.params[site.key("lora_B.weight")] @ adapter.params[site.key("lora_A.weight")]
        torch.testing.assert_close(got, kept["L"] @ kept["R"], rtol=1e-3, atol=1e-5)
    right, packed, ours = (b.logits(IDS, a) for b, a in ((dense, None), (base, None), (base, [adapter, adapter])))
    far, near = (sum((x - y).square().sum().item() for x, y in zip(right, other, strict=True)) for other in (packed, ours))
    assert near < 0.8 * far
    assert all(t.is_contiguous() for t in adapter.params.values())  # as optimizers in 8 bits want them
    magnified = Adapter.create(base, LoraConfig(r=8, init_lora_weights="loftq", use_dora=True))
    for got, want in zip(base.logits(IDS, [magnified] * 2), ours, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # DoRA starts from W + BA, not from W
    with pytest.raises(ConfigError, match="is not packed"):
        Adapter.create(dense, LoraConfig(r=8, init_lora_weights="loftq"))


def test_a_plan_counts_what_trains(tmp_path: Path) -> None:
    base = tiny_base()
    shape = Architecture("tiny", base.spec, base.spec.num_parameters, torch.float32)
    plain, pissa = (plan(shape, LoraConfig(r=4, init_lora_weights=k), dtype="float32") for k in (True, "pissa"))
    P = plain.trainable
    assert (pissa.trainable, pissa.gradient_bytes, pissa.optimizer_bytes) == (P, 4 * P, 8 * P)
    assert (plain.weight_bytes, pissa.weight_bytes) == (8 * P, 16 * P)
    Adapter.create(base, LoraConfig(r=4, init_lora_weights="pissa")).save(tmp_path / "a")
    assert (tmp_path / "a" / "adapter_model.safetensors").stat().st_size == pissa.adapter_file_bytes
    assert Adapter.create(base, LoraConfig(r=4, init_lora_weights="pissa")).num_parameters == P


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"init_lora_weights": "corda"}, "one of true, gaussian, pissa"),
        ({"init_lora_weights": False}, "one of true"),
        ({"init_lora_weights": "pissa_niter_0"}, "one of true"),
        ({"init_lora_weights": "pissa", "lora_dropout": 0.1}, "lora_dropout = 0.1 must be 0"),
        ({"init_lora_weights": "olora", "r": 3000}, "r = 3000 is above 2048"),
        ({"init_lora_weights": "pissa", "target_modules": ["embed_tokens"]}, "is an embedding"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Adapter.create(tiny_base(), LoraConfig(**fields))
    assert says in str(caught.value)


def test_a_run_trains_what_a_start_leaves(tmp_path: Path) -> None:
    """Decay and steps leave the start alone; a run ends as an ordinary LoRA. (Its trajectory is law 11's.)"""
    variants = {"p": METHODS["lora"] | {"lora_dropout": 0.0, "data": "a", "init_lora_weights": "pissa", "weight_decay": 0.5}}
    report = run(tmp_path, variants, evaluate={"generate": False})
    adapter, fresh = report.adapters["p"], Adapter.create(tiny_base(), LoraConfig(r=4, init_lora_weights="pissa"), seed=0)
    for site in fresh.sites:
        B = adapter.params[site.key("lora_B.weight")]
        torch.testing.assert_close(B[:, 4:], fresh.params[site.key("lora_B.start")])
        assert B[:, :4].any()
    assert report.summary["variants"]["p"]["trainable"] == fresh.num_parameters
    again = RunConfig.from_dict(run_file(tmp_path / "x", {"p": {"method": "lora", "data": "a", "init_lora_weights": True}}))
    assert again.variants[0].method == LoraConfig()
