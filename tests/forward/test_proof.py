"""A base is refused where trimtab does not compute what its class computes. Each fault here was planted in one of the two."""

import copy
import dataclasses
import re
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from tests.laws.common import cached_logits, difference, noisy, one_thread, tokens
from tests.laws.plain import plain_logits
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer
from trimtab.bases.structure import read_spec
from trimtab.errors import BaseError, ConfigError
from trimtab.forward import attention, kv_cache, proof
from trimtab.forward.hosts import Host
from trimtab.forward.replica import LARGE
from trimtab.forward.small import small_model
from trimtab.methods import LoraConfig
from trimtab.methods.base import Span
from trimtab.model import Base
from trimtab.store import Adapter

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("compared_anew")


def refusal(model):
    with pytest.raises(BaseError, match="does not compute this") as e:
        Base(model, tiny_tokenizer())
    return e.value.problems


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_proved_and_left_as_it_was(family):
    model, generator = tiny_model(family), torch.get_rng_state()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    proof.prove(model)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert not any("forward" in vars(m) for m in model.modules()) and model.config._attn_implementation != attention.NAME
    assert torch.equal(torch.get_rng_state(), generator)


def test_models_built_alike_are_compared_once(monkeypatch):
    made = []
    monkeypatch.setattr(proof, "small_model", lambda *args: made.append(args) or small_model(*args))
    for model in (tiny_model("llama"), tiny_model("llama", seed=1), tiny_model("llama", dtype=torch.bfloat16)):
        proof.prove(model)
    assert len(made) == 1
    other = tiny_model("llama")
    other.config.rope_parameters["rope_theta"] = 5.0
    proof.prove(other)
    assert len(made) == 2
    real = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda mlp, x: real(mlp, x))  # as packages do that bring kernels of their own
    proof.prove(tiny_model("llama"))
    assert len(made) == 3


def test_stand_ins_of_a_large_base_take_little_memory():
    """Of the layers of a base that has matrices of 2.4 and 4.7 million numbers, two have 38 million."""
    sizes = {"hidden_size": 1536, "intermediate_size": 3072, "num_attention_heads": 12, "num_key_value_heads": 4, "num_hidden_layers": 4}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model = small_model(model, read_spec(model), torch.float32)
    matrices = [p for p in model.parameters() if p.numel() > LARGE]
    assert len({p.data_ptr() for p in matrices}) == len(matrices) == 10, "no two begin alike"
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(held.values()) < 0.5 * sum(p.nbytes for p in model.parameters())
    assert not any(torch.equal(a, b) for a, b in pairwise(matrices) if a.shape == b.shape)
    assert not proof._differences(model, read_spec(model), {"model.layers.1.mlp.up_proj": 3072})
    assert not any(p.numel() for p in model.parameters()), "and it is let go"


# ---- faults in trimtab


def _scaled_too_much(monkeypatch):
    right = attention.attend
    monkeypatch.setattr(attention, "attend", lambda q, k, v, plan, layer, scaling, *rest: right(q, k, v, plan, layer, 1.1 * scaling, *rest))


def _without_windows(monkeypatch):
    right = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *args: right(*args[:7], None, *args[8:]))


def _cache_one_off(monkeypatch):
    right = kv_cache.PagedKV.runs
    monkeypatch.setattr(
        kv_cache.PagedKV,
        "runs",
        lambda self, place, first, end: right(self, place, max(0, first - 1), end - 1) if first else right(self, place, first, end),
    )


def _deaf_hosts(monkeypatch):
    right = Host.__call__
    monkeypatch.setattr(Host, "__call__", lambda self, x, *a: self.original(x, *a) if self.name.endswith("up_proj") else right(self, x, *a))


def _hosts_for_everyone(monkeypatch):
    right = Host.edited

    def edited(self, x, batch, original):
        whole = dataclasses.replace(batch, spans=[Span(0, batch.total, 0)], _rows={})
        return right(self, x, whole, original)

    monkeypatch.setattr(Host, "edited", edited)


BOTH = [
    f"a sequence {what}, {way}"
    for way in ("at once", "at position 448", "in chunks")
    for what in ("of the base beside one with its modules edited", "with its modules edited")
]
UP = [f"a sequence with model.layers.{i}.mlp.up_proj edited, {way}" for i in (0, 1) for way in ("at once", "at position 448", "in chunks")]
LEAK = [
    f"a sequence of the base beside one with {m} edited, {w}"
    for m in ("model.embed_tokens", "model.layers.0.self_attn.q_proj")
    for w in ("at once", "at position 448", "in chunks")
]


@pytest.mark.parametrize(
    ("fault", "family", "words"),
    [
        (_scaled_too_much, "llama", BOTH),
        (_without_windows, "mistral", BOTH),
        (_cache_one_off, "llama", BOTH[4:]),
        (_deaf_hosts, "llama", UP),
        (_hosts_for_everyone, "llama", LEAK),
    ],
)
def test_a_fault_of_ours_is_seen_and_named(fault, family, words, monkeypatch):
    fault(monkeypatch)
    found = refusal(tiny_model(family))
    for problem, part in zip(found[: len(words)], words, strict=True):
        assert problem.startswith(part), found
    assert len(found) == len(words) or len(found) == proof.SHOWN


# ---- models that are not what they seem


class _Mixing(LlamaMLP):
    """Tokens see each other outside the attention."""

    def forward(self, x):
        return super().forward(x) + x.mean(-2, keepdim=True)


class _Past(LlamaMLP):
    """Reads a weight past its module."""

    def forward(self, x):
        return self.down_proj(self.act_fn(linear(x, self.gate_proj.weight)) * self.up_proj(x))


class _Twice(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + self.up_proj(-x)))


class _More(LlamaAttention):
    """Goes on behind its last projection."""

    def forward(self, hidden_states, **kwargs):
        y, weights = super().forward(hidden_states, **kwargs)
        return y + hidden_states, weights


class _Broken(LlamaMLP):
    def forward(self, x):
        raise ValueError("not today")


@pytest.mark.parametrize(
    ("part", "cls", "words"),
    [
        ("mlp", _Mixing, "a sequence of the base beside one with its modules edited, at once"),
        ("self_attn", _More, "model.layers.0.self_attn changes what model.layers.0.self_attn.o_proj gives"),
        ("mlp", _Broken, "ValueError: not today"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("layer", [0, 1])
def test_a_model_that_is_not_what_it_seems_is_refused_by_name(part, cls, words, layer):
    model = tiny_model("llama")
    getattr(model.model.layers[layer], part).__class__ = cls
    found = refusal(model)
    assert any(re.search(words.replace("layers.0", f"layers.{layer}"), problem) for problem in found), found


@pytest.mark.parametrize(("cls", "name"), [(_Past, "gate_proj"), (_Twice, "up_proj")])
def test_a_module_that_is_not_run_once_for_each_token_takes_no_adapter(cls, name):
    model = tiny_model("llama")
    model.model.layers[1].mlp.__class__ = cls
    base = Base(model, tiny_tokenizer())
    assert not any(linear.endswith(name) for linear in base.spec.linears)
    with pytest.raises(ConfigError, match=rf"model\.layers\.\d\.mlp\.{name} is not run once with each token's row"):
        Adapter.create(base, LoraConfig(target_modules=[name]))


# ---- layers that differ


def _with_another_layer(**changes):
    model = tiny_model("llama")
    config = copy.deepcopy(model.config)
    for key, value in changes.items():
        setattr(config, key, value)
    layer = type(model.model.layers[0])(config, 1)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    model.model.layers[1] = layer.eval()
    model.set_attn_implementation("eager")
    return model.requires_grad_(False)


def test_layers_of_other_widths_and_heads_are_computed_as_transformers_does():
    change = {"intermediate_size": 80, "num_attention_heads": 8, "head_dim": 12}
    base, plain, ids = Base(_with_another_layer(**change), tiny_tokenizer()), _with_another_layer(**change), tokens(20, 3)
    with torch.no_grad():
        want = plain(torch.tensor([ids])).logits[0]
    adapter = noisy(base, LoraConfig(r=2, target_modules=["o_proj", "down_proj"]))
    assert {t.shape[1] for k, t in adapter.params.items() if k.endswith("lora_A.weight")} == {48, 96, 80}
    mixed = base.logits([ids, ids], [None, adapter])
    assert difference(mixed[0], want) <= 1e-5
    assert difference(mixed[1], plain_logits(plain, adapter, ids).detach()) <= 1e-5
    new = plain.generate(torch.tensor([ids]), attention_mask=torch.ones(1, 20, dtype=torch.int64), max_new_tokens=8, do_sample=False)[
        0, 20:
    ]
    got = base.generate([ids], max_new_tokens=8)
    assert got == [tiny_tokenizer().decode([t for t in new.tolist() if t not in base.stop_ids], skip_special_tokens=True)]


@torch.no_grad()
def test_keys_and_values_may_have_several_shapes():
    model, ids = _with_another_layer(num_key_value_heads=4), tokens(20, 1)
    want = copy.deepcopy(model)(torch.tensor([ids]), use_cache=False).logits[0]
    base = Base(model, tiny_tokenizer())
    assert base.spec.kv_shape == (1, 48)
    for got in (base.logits([ids])[0], cached_logits(base, [ids], [None], [[12, 1, 7]])[0]):
        assert difference(got, want) < 1e-5
