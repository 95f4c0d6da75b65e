"""LoRA on experts (`target_parameters`) under the laws: with peft in both directions, mixed and co-trained as alone, at no cost for others.

peft has no dropout there and no adapters that aim at different experts; `tests/ops/test_experts.py` has these against a loop over rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab
from tests.laws.common import EXAMPLES, base_of, cached_logits, difference, gradient_difference, noisy, solo, tokens
from tests.laws.test_law6_gradients import _gradients, _losses
from tests.laws.test_peft_parity import _plain, differences, paired
from tests.tiny import MORE_FAMILIES, tiny_folder, tiny_model, tiny_tokenizer
from tests.train.common import run_file
from trimtab import ops
from trimtab.bases.shapes import read_architecture
from trimtab.cost.plan import plan
from trimtab.decode.generate import Sampling
from trimtab.errors import AdapterError, ConfigError
from trimtab.methods import LoraConfig
from trimtab.model import Base
from trimtab.store import Adapter
from trimtab.store.combine import combine
from trimtab.store.compress import compress
from trimtab.train import RunConfig, train

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
FAMILIES = [f for f in MORE_FAMILIES if f.endswith("moe") or f in ("mixtral", "gpt_oss", "dots1", "flex_olmo", "minimax_m2")]
FAST = ("qwen3_moe", "gpt_oss")
BOTH = ("experts.gate_up_proj", "experts.down_proj")
CASES: dict[str, dict[str, Any]] = {
    "both": {},
    "last": {"target_parameters": ["experts.down_proj"]},
    "first-and-modules": {"target_parameters": ["experts.gate_up_proj"], "target_modules": ["q_proj"], "use_rslora": True},
    "patterns": {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {".*gate_up_proj": 9}},
}
_RUNS = [
    pytest.param(
        f, c, marks=() if (f, c) in (("qwen3_moe", "patterns"), ("gpt_oss", "first-and-modules")) else pytest.mark.slow, id=f"{f}-{c}"
    )
    for f in FAMILIES
    for c in CASES
]


def _config(case: str) -> Any:
    options = {"r": 4, "lora_alpha": 6, "target_modules": [], "target_parameters": list(BOTH)} | CASES[case]
    return peft.LoraConfig(task_type="CAUSAL_LM", **options)


@pytest.mark.parametrize(("family", "case"), _RUNS)
def test_peft_and_trimtab_agree_in_both_directions(family: str, case: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(_plain(family), _config(case)).eval()
    for name, apart, bound in differences(paired(model, family, tmp_path / "theirs"), family, case, tmp_path):
        assert apart <= bound, name


def _methods(p: float = 0.0) -> list[Any]:
    """Adapters that aim at different parameters and different experts, of different ranks, beside adapters of all methods."""
    experts = [
        LoraConfig(r=3, target_modules=(), target_parameters=BOTH, lora_dropout=p),
        LoraConfig(r=2, target_modules=(), target_parameters=BOTH[1:], target_experts=(0, 3), lora_dropout=p, use_rslora=True),
        LoraConfig(r=5, target_modules=("q_proj",), target_parameters=BOTH[:1], target_experts=(2,), alpha_pattern={"q_proj": 3.0}),
    ]
    return experts + [EXAMPLES[c] for c in ("lora-0", "ia3-0", "bottleneck-0", "prompt-0", "prefix-0")]


def _adapters(base: Base, p: float = 0.0) -> list[Adapter]:
    """Of the methods that this base has a place for."""
    without = {
        m
        for m, none in (("bottleneck", not base.spec.mlps), ("prompt", not base.spec.layers_alike), ("prefix", not base.spec.heads_alike))
        if none
    }
    return [noisy(base, method, seed=i) for i, method in enumerate(_methods(p)) if method.name not in without]


@pytest.mark.parametrize("family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_a_mixed_batch_equals_each_alone(family: str) -> None:
    base = base_of(family)
    everyone = [None, *_adapters(base)]
    sequences = [tokens(9 + i % 4, i) for i in range(len(everyone))]
    alone = solo(base, sequences, everyone)
    plain = _plain(family)
    with torch.no_grad():
        assert difference(alone[0], plain(torch.tensor([sequences[0]])).logits[0]) <= 1e-5
    chunks = [[6] + [1] * (len(s) - 6) for s in sequences]
    for found in (base.logits(sequences, everyone), cached_logits(base, sequences, everyone, chunks)):
        assert max(difference(got, want) for got, want in zip(found, alone, strict=True)) <= 1e-5
    for a, ids in zip(everyone[1:4], sequences[1:4], strict=True):
        assert difference(base.logits([ids], [a])[0], base.logits([ids])[0]) > 1e-3
    if family in FAST:
        mixed = base.generate_ids(sequences, everyone, Sampling(max_new_tokens=6))
        for ids, a, got in zip(sequences, everyone, mixed, strict=True):
            assert got == base.generate_ids([ids], [a], Sampling(max_new_tokens=6))[0]


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_co_trained_gradients_equal_solo_ones(p: float) -> None:
    base = base_of("qwen3_moe")
    adapters = _adapters(base, p)
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
    down = next(n for n in mixed[1] if n.endswith("experts.lora_A.weight"))
    assert mixed[1][down].view(4, 2, -1).flatten(1).any(1).tolist() == [True, False, False, True]


def test_experts_that_nobody_aims_at_run_as_the_class_wrote_them(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("qwen3_moe")
    adapters = _adapters(base)
    monkeypatch.setattr(ops.experts, "_Experts", None)
    base.logits([tokens(5, 1)] * 6, [None, *adapters[3:]])
    with pytest.raises(AttributeError):
        base.logits([tokens(5, 1)], adapters[:1])


def test_a_base_whose_experts_are_called_otherwise_is_used_without_adapters_there() -> None:
    """They take what their own router gives them, and raise for what they are compared on."""
    model = tiny_model("qwen3_moe")
    own = type(model.model.layers[0].mlp.experts)

    class Strict(own):
        def forward(self, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            if weight.sum(-1).max() > 1.001:
                raise RuntimeError("weights are probabilities")
            return super().forward(x, expert, weight)

    for layer in model.model.layers:
        layer.mlp.experts.__class__ = Strict
    base = Base(model, tiny_tokenizer())
    assert torch.isfinite(base.logits([tokens(5, 0)])[0]).all()
    with pytest.raises(ConfigError, match="in a way that trimtab does not know"):
        Adapter.create(base, LoraConfig(r=2, target_modules=(), target_parameters=BOTH))


def test_a_file_gives_the_same_tensors_and_zeros_for_other_experts(tmp_path: Path) -> None:
    base = base_of("gpt_oss")
    adapter = Adapter.create(base, _methods()[1], seed=1)
    for key, tensor in adapter.params.items():
        if "lora_B" in key:
            tensor.view(len(tensor), 2, 4)[:, :, [0, 3]] = 0.1
    adapter.save(tmp_path / "a")
    again = Adapter.load(tmp_path / "a", base)
    assert again.params.keys() == adapter.params.keys()
    assert all(torch.equal(again.params[k], t) for k, t in adapter.params.items())
    ids = tokens(8, 2)
    assert difference(base.logits([ids], [again])[0], base.logits([ids], [adapter])[0]) <= 1e-6
    A = next(t for k, t in adapter.params.items() if "lora_A" in k)
    assert A.view(4, 2, -1).flatten(1).any(1).tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target_parameters": BOTH, "target_experts": (1, 4)}, "target_experts: 4 does not exist"),
        ({"target_parameters": ("experts.gate_proj",)}, "'experts.gate_proj' matches no parameter of experts, and no router .did you mean"),
        ({"target_parameters": ("q_proj",)}, "'q_proj' matches no parameter of experts"),
        ({"target_modules": ("experts.down_proj",)}, "target_parameters"),
        ({"target_parameters": BOTH, "use_dora": True}, "DoRA does not act on target_parameters"),
        ({"target_experts": (0,)}, "these are not set"),
        ({"target_parameters": BOTH, "target_experts": (-1,)}, "from 0"),
        ({"target_parameters": BOTH, "r": 49}, "rank 49 is above its smaller side"),
    ],
)
def test_what_is_wrong_is_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Adapter.create(base_of("qwen3_moe"), LoraConfig(**{"r": 2} | options), seed=0)


def test_a_base_without_experts_and_what_has_no_sums() -> None:
    with pytest.raises(ConfigError, match="this base has no experts"):
        Adapter.create(base_of("llama"), LoraConfig(target_parameters=BOTH), seed=0)
    adapter = _adapters(base_of("qwen3_moe"))[0]
    with pytest.raises(AdapterError, match="experts"):
        compress(adapter, rank=1)
    with pytest.raises(AdapterError, match="experts"):
        combine([adapter, adapter], [1.0, 1.0])


def test_a_run_trains_variants_on_different_experts_and_plan_counts_them(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base", "qwen3_moe")
    base = trimtab.load_base(str(folder))
    variant = {"data": "a", "method": "lora", "r": 2, "target_modules": [], "target_parameters": list(BOTH), "lora_dropout": 0.1}
    content = run_file(tmp_path, {"a": variant | {"target_experts": [0, 1]}, "b": variant | {"target_experts": [3]}})
    report = train(RunConfig.from_dict(content, root=tmp_path), base=base)
    for name, wanted in (("a", [True, True, False, False]), ("b", [False, False, False, True])):
        adapter = Adapter.load(report.out / "adapters" / name, base)
        for key, tensor in adapter.params.items():
            r_last = tensor.view(4, 2, -1).flatten(1) if "lora_A" in key else tensor.view(len(tensor), 2, 4).permute(2, 0, 1).flatten(1)
            assert r_last.any(1).tolist() == wanted, key
    method = LoraConfig(r=2, target_modules=(), target_parameters=BOTH)
    theirs = peft.get_peft_model(tiny_model("qwen3_moe"), peft.LoraConfig(r=2, target_modules=[], target_parameters=list(BOTH)))
    assert plan(read_architecture(str(folder)), method).trainable == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
