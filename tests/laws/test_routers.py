"""Routers of experts among what trains: with peft in both directions, mixed and co-trained as alone, and frozen unless they are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab
from tests.laws.common import EXAMPLES, base_of, cached_logits, difference, gradient_difference, noisy, solo, tokens
from tests.laws.test_law6_gradients import _gradients, _losses
from tests.laws.test_peft_parity import _logits, _plain, differences, paired
from tests.store.common import SEQUENCES, stir_trained_
from tests.tiny import tiny_folder, tiny_model, tiny_tokenizer
from tests.train.common import run_file
from trimtab.bases.shapes import read_architecture
from trimtab.cost.plan import plan
from trimtab.errors import BaseError, ConfigError
from trimtab.forward.routers import row_by_row
from trimtab.methods import IA3Config, LoraConfig
from trimtab.model import Base
from trimtab.store import Adapter
from trimtab.train import RunConfig, train

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
ROUTERS = {
    "qwen3_moe": "mlp.gate",
    "gpt_oss": "mlp.router",
    "deepseek_v3": "mlp.gate",
    "phimoe": "mlp.router",
    "mixtral": "mlp.gate",
    "qwen2_moe": "mlp.gate",
    "granitemoe": "block_sparse_moe.router",
    "glm4_moe": "mlp.gate",
    "lfm2_moe": "feed_forward.gate",
    "ernie4_5_moe": "mlp.gate",
    "minimax_m2": "mlp.gate",
    "olmoe": "mlp.gate",
}
"""Families and where their routers are: each is a module that gives more than a product."""
LINEAR = {"hunyuan_v1_moe": "gate.wg", "afmoe": "router.gate", "gemma4_text-moe": "router.proj"}
"""Families whose routers hold an ordinary linear layer."""
FAST = ("qwen3_moe", "gpt_oss", "deepseek_v3")
CASES = ("lora", "with-experts", "saved")
_RUNS = [
    pytest.param(
        f, c, marks=() if (f, c) in (("qwen3_moe", "with-experts"), ("gpt_oss", "saved"), ("deepseek_v3", "lora")) else pytest.mark.slow
    )
    for f in ROUTERS
    for c in CASES
    if c != "with-experts" or f in FAST
]


def _config(family: str, case: str) -> Any:
    at, options = ROUTERS[family], {"r": 4, "lora_alpha": 6, "target_modules": []}
    if case == "saved":
        return peft.LoraConfig(task_type="CAUSAL_LM", **options | {"target_modules": ["q_proj", "q_b_proj"], "modules_to_save": [at]})
    names = [f"{at}.weight"] if case == "lora" else [f"{at}.weight", "experts.down_proj"]
    patterns = {} if case == "lora" else {"rank_pattern": {f"{at.rpartition('.')[2]}.weight": 2}, "alpha_pattern": {".*weight": 9}}
    return peft.LoraConfig(task_type="CAUSAL_LM", **options | {"target_parameters": names} | patterns)


@pytest.mark.parametrize(("family", "case"), _RUNS)
def test_peft_and_trimtab_agree_in_both_directions(family: str, case: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(_plain(family), _config(family, case)).eval()
    for name, parameter in model.named_parameters():  # peft lets them train, but no gradient reaches them
        parameter.requires_grad_(parameter.requires_grad and "e_score_correction_bias" not in name)
    pair = paired(model, family, tmp_path / "theirs")
    # of two experts out of four phimoe's router's weights are 1, so that no gradient reaches it
    for name, apart, bound in differences(pair, family, case, tmp_path, gradients=family != "phimoe"):
        assert apart <= bound, name


def _methods(at: str) -> list[Any]:
    """Adapters that change a router in both ways, beside some that do not."""
    return [
        LoraConfig(r=3, target_modules=(), target_parameters=(f"{at}.weight",)),
        LoraConfig(r=2, target_modules=("q_proj",), modules_to_save=(at,)),
        LoraConfig(r=2, target_modules=(), target_parameters=(f"{at}.weight", "experts.down_proj"), target_experts=(1,)),
        EXAMPLES["lora-0"],
        EXAMPLES["ia3-0"],
    ]


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_a_mixed_batch_equals_each_alone(family: str) -> None:
    base = base_of(family)
    everyone = [None, *(noisy(base, m, seed=i) for i, m in enumerate(_methods(ROUTERS[family]))), None]
    sequences = [tokens(9 + i % 4, i) for i in range(len(everyone))]
    alone = solo(base, sequences, everyone)
    with torch.no_grad():
        assert difference(alone[0], _plain(family)(torch.tensor([sequences[0]])).logits[0]) <= 1e-5
    chunks = [[6] + [1] * (len(s) - 6) for s in sequences]
    for found in (base.logits(sequences, everyone), cached_logits(base, sequences, everyone, chunks)):
        assert max(difference(got, want) for got, want in zip(found, alone, strict=True)) <= 1e-5
    for a, ids in zip(everyone[1:4], sequences[1:4], strict=True):
        assert difference(base.logits([ids], [a])[0], base.logits([ids])[0]) > 1e-3


def test_co_trained_gradients_equal_solo_ones() -> None:
    base = base_of("qwen3_moe")
    adapters = [noisy(base, m, seed=i) for i, m in enumerate(_methods("mlp.gate"))]
    for a in adapters:
        a.params = {k: t.requires_grad_() for k, t in a.params.items()}
    data = [[tokens(5 + (3 * i + k) % 7, 30 * i + k) for k in range(2)] for i in range(len(adapters))]
    seeds = {i: 11 + i for i in range(len(adapters))}
    sum(_losses(base, adapters, data, seeds)).backward()
    mixed = [_gradients(a) for a in adapters]
    for i, a in enumerate(adapters):
        _losses(base, [a], [data[i]], {0: seeds[i]})[0].backward()
        for name, want in _gradients(a).items():
            assert gradient_difference(mixed[i][name], want) <= 1e-4, (i, name)
    assert all(float(g.norm()) > 0 for name, g in mixed[0].items())


@pytest.mark.parametrize("family", [*FAST, *(pytest.param(f, marks=pytest.mark.slow) for f in [*ROUTERS, *LINEAR] if f not in FAST)])
def test_a_router_is_frozen_unless_it_is_named(family: str) -> None:
    base, at = base_of(family), (ROUTERS | LINEAR)[family]
    named = [n for n in base.spec.modules if n.endswith(at)]
    assert named and all(base.spec.modules[n].routes for n in named)
    assert not set(named) & {s.name for s in LoraConfig().sites(base.spec)}
    asked = LoraConfig(target_modules=(at,)) if family in LINEAR else LoraConfig(target_modules=(), target_parameters=(f"{at}.weight",))
    assert [s.name for s in asked.sites(base.spec)] == named


@pytest.mark.parametrize("family", ["afmoe", *(pytest.param(f, marks=pytest.mark.slow) for f in LINEAR if f != "afmoe")])
def test_packing_leaves_the_linear_layer_of_a_router_dense(family: str, tmp_path: Path) -> None:
    folder, at = str(tiny_folder(tmp_path, family)), LINEAR[family]
    for spec in (trimtab.load_base(folder, quantize="nf4", device="cpu").spec, read_architecture(folder, "nf4").spec):
        named = [m for n, m in spec.modules.items() if n.endswith(at)]
        assert named and all(m.routes and m.bits is None for m in named)
        assert spec.packed_bits is not None and not {m.name for m in named} & set(spec.linears)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "at"), LINEAR.items())
def test_the_linear_layer_of_a_router_takes_pefts_lora(family: str, at: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(_plain(family), peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=[at])).eval()
    stir_trained_(model, torch.Generator().manual_seed(4))
    model.save_pretrained(tmp_path)
    base = Base(tiny_model(family), tiny_tokenizer())
    adapter, ids = Adapter.load(tmp_path, base), SEQUENCES[0]
    with torch.no_grad():
        wanted = _logits(model, ids)
    assert difference(base.logits([ids], [adapter])[0], wanted) <= 1e-4
    assert difference(base.logits([ids])[0], wanted) > 1e-3


def test_the_linear_layer_of_a_router_may_be_named_by_its_weight(tmp_path: Path) -> None:
    family, names = "gemma4_text-moe", ["router.proj.weight"]
    told = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], target_parameters=names, rank_pattern={names[0]: 2})
    pair = paired(peft.get_peft_model(_plain(family), told).eval(), family, tmp_path / "theirs")
    assert {s.rank for s in pair.adapter.sites if s.name.endswith("router.proj")} == {2}
    for name, apart, bound in differences(pair, family, "lora", tmp_path):
        assert apart <= bound, name
    everywhere = noisy(pair.base, LoraConfig(r=3, target_modules="all-linear", target_parameters=tuple(names)))
    everywhere.save(tmp_path / "everywhere")
    again, ids = peft.PeftModel.from_pretrained(_plain(family), tmp_path / "everywhere").eval(), SEQUENCES[0]
    with torch.no_grad():
        assert difference(pair.base.logits([ids], [everywhere])[0], _logits(again, ids)) <= 1e-4
    twice = LoraConfig(target_modules=("router.proj",), target_parameters=tuple(names))
    with pytest.raises(ConfigError, match=r"router\.proj is both in target_modules and, by its weight, in target_parameters"):
        twice.sites(pair.base.spec)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (
            lambda: LoraConfig(target_modules=("gate",)),
            r"a router of experts, no linear layer: name mlp\.gate\.weight in LoRA's target_parameters",
        ),
        (lambda: IA3Config(target_modules=("gate",), feedforward_modules=()), "a router of experts"),
        (lambda: LoraConfig(target_modules=(), target_parameters=("mlp.gate.weight",), lora_dropout=0.1), "lora_dropout = 0.1: a router"),
        (lambda: LoraConfig(target_modules=(), target_parameters=("mlp.gate.bias",)), r"matches no parameter of experts, and no router"),
        (lambda: LoraConfig(target_modules=(), target_parameters=("gate.weight",), r=5), "rank 5 is above its smaller side 4"),
        (lambda: LoraConfig(target_modules=(), target_parameters=("gate.weight",), modules_to_save=("gate",)), "both"),
        (lambda: LoraConfig(target_modules=(), target_parameters=("gate.weight",), target_experts=(1,)), "target_experts"),
    ],
)
def test_what_no_router_takes_is_named(method: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Adapter.create(base_of("qwen3_moe"), method(), seed=0)


def test_a_router_whose_rows_depend_on_each_other_takes_no_adapter() -> None:
    model = tiny_model("qwen3_moe")
    own = type(model.model.layers[0].mlp.gate)

    class Balanced(own):
        def forward(self, x: torch.Tensor) -> Any:
            logits, weights, chosen = super().forward(x)
            return logits, weights * (1 + 0.1 * logits.mean()), chosen

    for layer in model.model.layers:
        layer.mlp.gate.__class__ = Balanced
    assert not row_by_row(model.model.layers[0].mlp.gate, (torch.randn(5, 48),), {})
    with pytest.raises(BaseError):  # and in such a base the rows of a mixed batch depend on each other anyway
        Base(model, tiny_tokenizer())


def test_a_router_gets_what_its_model_gives_behind_the_rows() -> None:
    class Warm(type(tiny_model("qwen3_moe").model.layers[0].mlp.gate)):
        def forward(self, x: torch.Tensor, heat: float) -> Any:
            logits, weights, chosen = super().forward(x)
            return logits, weights * heat, chosen

    class Block(type(tiny_model("qwen3_moe").model.layers[0].mlp)):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = x.flatten(0, -2)
            _, weights, chosen = self.gate(rows, 1.5)
            return self.experts(rows, chosen, weights).view(x.shape)

    model = tiny_model("qwen3_moe")
    for layer in model.model.layers:
        layer.mlp.__class__, layer.mlp.gate.__class__ = Block, Warm
    base = Base(model, tiny_tokenizer())
    routed = noisy(base, LoraConfig(r=3, target_modules=(), target_parameters=("mlp.gate.weight",)))
    sequences = [tokens(9, 0), tokens(7, 1)]
    with torch.no_grad():
        plain = base.logits(sequences)
        assert difference(base.logits(sequences, [None, routed])[0], plain[0]) <= 1e-5
    merged = tiny_model("qwen3_moe")
    for i, layer in enumerate(merged.model.layers):
        layer.mlp.__class__, layer.mlp.gate.__class__ = Block, Warm
        A, B = (routed.params[f"model.layers.{i}.mlp.gate.lora_{f}.weight"] for f in "AB")
        layer.mlp.gate.weight.data += routed.sites[i].scaling * (B @ A)
    with torch.no_grad():
        wanted = merged(torch.tensor([sequences[1]])).logits[0]
        assert difference(base.logits(sequences, [None, routed])[1], wanted) <= 1e-4
    assert difference(plain[1], wanted) > 1e-3


def test_a_run_trains_a_router_and_plan_counts_it(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base", "qwen3_moe")
    base = trimtab.load_base(str(folder))
    lora = {"data": "a", "method": "lora", "r": 2, "target_modules": [], "target_parameters": ["mlp.gate.weight"]}
    saved = {"data": "a", "method": "lora", "r": 2, "target_modules": ["q_proj"], "modules_to_save": ["mlp.gate"]}
    report = train(RunConfig.from_dict(run_file(tmp_path, {"lora": lora, "saved": saved}), root=tmp_path), base=base)
    for name in ("lora", "saved"):
        adapter = Adapter.load(report.out / "adapters" / name, base)
        router = {k: t for k, t in adapter.params.items() if "mlp.gate." in k}
        start = base.parameters_of("model.layers.0.mlp.gate")["weight"]
        moved = router["model.layers.0.mlp.gate.lora_B.weight"] if name == "lora" else router["model.layers.0.mlp.gate.weight"] - start
        assert moved.abs().max() > 0
        assert base.model.model.layers[0].mlp.gate.weight.equal(start)
    method = LoraConfig(r=2, target_modules=(), target_parameters=("mlp.gate.weight",))
    theirs = peft.get_peft_model(tiny_model("qwen3_moe"), peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.gate.weight"]))
    assert plan(read_architecture(str(folder)), method).trainable == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
