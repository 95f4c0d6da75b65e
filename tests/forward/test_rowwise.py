"""A fast forward is used where the class computes what is known of it, forwards and backwards, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from tests import odd
from tests.tiny import tiny_model
from trimtab import ops
from trimtab.forward import rowwise
from trimtab.forward.attached import Attached

pytestmark = pytest.mark.usefixtures("compared_anew")
DTYPES = [torch.float32, torch.bfloat16]
WHOLE = {
    "llama": ["LlamaAttention", "LlamaMLP", "LlamaRMSNorm"],
    "mistral": ["MistralAttention", "MistralMLP", "MistralRMSNorm"],
    "qwen2": ["Qwen2Attention", "Qwen2MLP", "Qwen2RMSNorm"],
    "qwen3": ["Qwen3Attention", "Qwen3MLP", "Qwen3RMSNorm"],
    "phi3": ["Phi3MLP", "Phi3RMSNorm"],
    "gemma2": [],
    "gpt2": [],
}
DEVIATIONS = {
    "scale": ("Attention", odd.with_setting("scaling", 1.1)),
    "window": ("Attention", odd.sees_one_less),
    "gradient of attention": ("Attention", odd.other_gradient),
    "epsilon": ("RMSNorm", odd.with_setting("variance_epsilon", 1.2)),
    "gradient of norms": ("RMSNorm", odd.other_gradient),
    "gate": ("MLP", odd.gate_of_another_shape),
    "gradient of gates": ("MLP", odd.other_gradient),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", WHOLE)
def test_classes_that_are_known(family: str, dtype: torch.dtype) -> None:
    assert sorted(Attached(tiny_model(family, dtype=dtype)).fast) == WHOLE[family]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", DEVIATIONS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_a_class_that_deviates_keeps_its_own_forward(family: str, what: str, dtype: torch.dtype) -> None:
    part, how = DEVIATIONS[what]
    model = odd.deviate(tiny_model(family, dtype=dtype), part, how)
    assert sorted(Attached(model).fast) == [name for name in WHOLE[family] if not name.endswith(part)]


def test_modules_built_alike_are_compared_once(monkeypatch) -> None:
    """Whatever their weights; another dtype, another config and another class of the same name are compared again."""
    made, real = list[str](), rowwise._agrees
    monkeypatch.setattr(rowwise, "_agrees", lambda module: made.append(type(module).__name__) or real(module))
    for seed in (0, 1):
        assert sorted(Attached(tiny_model("llama", seed=seed)).fast) == WHOLE["llama"]
    assert sorted(made) == WHOLE["llama"]
    other = tiny_model("llama")
    other.config.rope_parameters["rope_theta"] = 5.0
    for n, model in enumerate((tiny_model("llama", dtype=torch.bfloat16), other), 2):
        Attached(model)
        assert sorted(made) == sorted(n * WHOLE["llama"])
    found = Attached(odd.deviate(tiny_model("llama"), "RMSNorm", odd.with_setting("variance_epsilon", 1.2))).fast
    assert sorted(found) == ["LlamaAttention", "LlamaMLP"]


@pytest.mark.parametrize("kernel", ["rms_norm", "swiglu", "rotate"])
def test_a_kernel_that_is_wrong_is_not_run(kernel: str, monkeypatch) -> None:
    """On this machine, built by this compiler: forwards right, backwards wrong by a tenth."""
    real = getattr(ops, kernel)
    monkeypatch.setattr(ops, kernel, lambda *args: odd.other_gradient(real, None)(*args))
    monkeypatch.setattr(
        rowwise.RowWise, "__init__", lambda self: vars(self).update({k: getattr(ops, k) for k in ("rms_norm", "swiglu", "rotate")})
    )
    part = {"rms_norm": "RMSNorm", "swiglu": "MLP", "rotate": "Attention"}[kernel]
    found = Attached(tiny_model("llama", dtype=torch.bfloat16)).fast
    assert sorted(found) == [name for name in WHOLE["llama"] if not name.endswith(part)]


def test_layers_that_differ_are_compared_each() -> None:
    """The last layer's attention has another class: the others keep their fast forwards."""
    model = tiny_model("llama")
    odd.deviate(model.model.layers[-1], "Attention", DEVIATIONS["scale"][1])
    Attached(model)
    assert ["forward" in vars(layer.self_attn) for layer in model.model.layers] == [True, False]


def test_a_forward_that_stands_on_an_instance_stays() -> None:
    """Somebody else's hook; ours of an earlier attach gives way."""
    model, mine = tiny_model("llama"), lambda x: x
    model.model.layers[0].mlp.forward = mine
    again = Attached(model), Attached(model)
    assert model.model.layers[0].mlp.forward is mine and model.model.layers[1].mlp.forward is not LlamaMLP.forward
    assert again[0].fast == again[1].fast and again[1].decode_path is None


def test_the_models_generator_and_weights_are_left_alone() -> None:
    model = tiny_model("llama")
    before, weights = torch.random.get_rng_state(), {n: p.clone() for n, p in model.named_parameters()}
    with torch.inference_mode():
        assert sorted(Attached(model).fast) == WHOLE["llama"], "in inference mode too"
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(p, weights[n]) and p.grad is None and not p.requires_grad for n, p in model.named_parameters())
