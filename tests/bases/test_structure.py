"""What is read off a model's modules and config: today's families as they are known, layers that differ, experts, and what is refused."""

import copy

import pytest
import torch
import transformers
from torch import nn

from tests.tiny import FAMILIES, VOCAB, tiny_model
from trimtab.bases.structure import read_spec
from trimtab.errors import BaseError, ConfigError
from trimtab.methods import LoraConfig

LLAMA = ("model", "model.layers", "model.embed_tokens", "lm_head", "self_attn.o_proj", "mlp", (4, 2, 12, 96, True))
"""body, list of layers, embedding, head; of one layer: the attention's output, the MLP; heads, kv heads, head_dim, inner width, gated."""
KNOWN = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": (*LLAMA[:6], (4, 2, 16, 96, True)),
    "gemma2": (*LLAMA[:6], (4, 2, 16, 96, True)),
    "gemma3_text": (*LLAMA[:6], (4, 2, 16, 96, True)),
    "phi3": LLAMA,
    "gpt2": ("transformer", "transformer.h", "transformer.wte", "lm_head", "attn.c_proj", "mlp", (4, 4, 12, 192, False)),
}
QV, IA3 = ("q_proj", "v_proj"), (("k_proj", "v_proj", "down_proj"), ("down_proj",))
DEFAULTS = dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"], (QV, *IA3)) | {
    "phi3": (("qkv_proj",), ("qkv_proj", "down_proj"), ("down_proj",)),
    "gpt2": (("c_attn",), ("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
}
WINDOWS = {"mistral": [8, 8], "gemma2": [8, None] * 2, "gemma3_text": [8, None] * 2}
LINEARS = {
    "phi3": ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
}
LLAMA_LINEARS = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_comes_out_as_it_is_known(family):
    body, layers, embedding, head, output, mlp, sizes = KNOWN[family]
    model = tiny_model(family)
    spec = read_spec(model)
    assert (spec.body, spec.layer_list, spec.embedding, spec.head) == (body, layers, embedding, head)
    names = [f"{layers}.{i}" for i in range(model.config.num_hidden_layers)]
    assert [layer.name for layer in spec.layers] == names
    assert spec.attention_outputs == tuple(f"{n}.{output}" for n in names)
    assert [layer.attention for layer in spec.layers] == [f"{n}.{output.partition('.')[0]}" for n in names]
    assert spec.mlps == tuple(f"{n}.{mlp}" for n in names)
    assert {(s.num_heads, s.num_kv_heads, s.head_dim, s.intermediate_size, s.gated) for s in spec.layers} == {sizes}
    assert spec.kv_shape == sizes[1:3] and spec.kv_width == sizes[1] * sizes[2]
    assert [layer.window for layer in spec.layers] == WINDOWS.get(family, [None] * len(names))
    assert (spec.defaults.lora_targets, spec.defaults.ia3_targets, spec.defaults.ia3_feedforward) == DEFAULTS[family]
    assert sorted(spec.linears) == sorted(f"{n}.{part}" for n in names for part in LINEARS.get(family, LLAMA_LINEARS))


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_have_the_shapes_of_torch(family):
    """Every parameter of the model belongs to one module of the spec, in its shape; features are what the module reads and gives."""
    model = tiny_model(family)
    spec = read_spec(model)
    own = {f"{m.name}.{n}": shape for m in spec.modules.values() for n, shape in m.parameters.items()}
    assert own == {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
    for m in spec.modules.values():
        x = torch.zeros(1, dtype=torch.int64) if m.kind == "embedding" else torch.zeros(1, m.in_features)
        assert model.get_submodule(m.name)(x).shape == (1, m.out_features), m.name
    per_head = {m.name.rpartition(".")[2]: m.vectors for m in spec.modules.values() if m.vectors != 1}
    assert per_head == ({"q_norm": 4, "k_norm": 2} if family in ("qwen3", "gemma3_text") else {})


def _other_layer(model, **changes):
    """A layer of the same class, for a config with these changes."""
    config = copy.deepcopy(model.config)
    for key, value in changes.items():
        setattr(config, key, value)
    return type(model.model.layers[0])(config, 1)


def test_each_layer_is_read_by_itself():
    model = tiny_model("llama")
    model.model.layers[1] = _other_layer(model, num_attention_heads=8, intermediate_size=80, head_dim=12)
    spec = read_spec(model)
    assert [(s.num_heads, s.num_kv_heads, s.intermediate_size) for s in spec.layers] == [(4, 2, 96), (8, 2, 80)]
    assert spec.kv_shape == (2, 12) and spec.heads_alike


def test_gemma_4_keeps_keys_of_another_shape_where_it_sees_everything():
    sizes = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.AutoConfig.for_model("gemma4_text", num_hidden_layers=6, sliding_window=8, hidden_size_per_layer_input=0, **sizes)
    with torch.device("meta"):
        spec = read_spec(transformers.AutoModelForCausalLM.from_config(config))
    assert [(layer.head_dim, layer.window) for layer in spec.layers] == [(256, 8)] * 5 + [(512, None)]
    assert spec.kv_shape == (1, 1024) and not spec.heads_alike


MOE = {"vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
MIXTRAL = ("mixtral", {"intermediate_size": 80, "num_local_experts": 6}, 6, 80, 80)
QWEN2_MOE = ("qwen2_moe", {"num_experts": 5, "moe_intermediate_size": 56, "shared_expert_intermediate_size": 64}, 5, 56, 64)
GPT_OSS = ("gpt_oss", {"intermediate_size": 80, "num_local_experts": 6}, 6, 80, 80)


@pytest.mark.parametrize(
    ("family", "sizes", "experts", "inner", "widest"), [MIXTRAL, QWEN2_MOE, GPT_OSS], ids=lambda v: v if isinstance(v, str) else ""
)
def test_weights_of_experts_are_found(family, sizes, experts, inner, widest):
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **MOE, **sizes))
    spec = read_spec(model)
    assert [layer.mlp for layer in spec.layers] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert spec.layers[0].intermediate_size == widest
    found = {m.name: m for m in spec.modules.values() if m.kind == "experts"}
    parameters = {n: p for n, p in model.named_parameters() if p.dim() == 3}
    assert {n: m.parameters for n, m in found.items()} == {n: {"weight": tuple(p.shape)} for n, p in parameters.items()}
    assert all(len(p) == experts for p in parameters.values())
    features = {n.rpartition(".")[2]: (m.in_features, m.out_features) for n, m in found.items()}
    assert features == {"gate_up_proj": (48, 2 * inner), "down_proj": (inner, 48)}
    for name, parameter in parameters.items():
        x = torch.zeros(1, found[name].in_features)
        weight = parameter[0].T if family == "gpt_oss" else parameter[0]  # which keeps them as (in, out)
        assert nn.functional.linear(x, weight).shape == (1, found[name].out_features)
    assert not any("experts" in n for n in spec.linears)
    with pytest.raises(ConfigError, match=r"mlp\.experts\.gate_up_proj is a parameter of experts: LoRA takes it in target_parameters"):
        LoraConfig(target_modules=["gate_up_proj"]).sites(spec)


class _Renamed(nn.Module):
    """An attention whose projection behind it has a name of its own."""

    def __init__(self, attention):
        super().__init__()
        self.is_causal, self.config, self.head_dim = True, attention.config, attention.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.last = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj


def _without_attention(model):
    model.model.layers[1].self_attn = nn.Identity()


def _without_an_mlp(model):
    model.model.layers[1].mlp = nn.Identity()


def _with_another_output(model):
    model.model.layers[0].self_attn = _Renamed(model.model.layers[0].self_attn)


def _with_a_wider_query(model):
    model.model.layers[1].self_attn.q_proj = nn.Linear(48, 96)


def _with_fewer_layers(model):
    model.config.num_hidden_layers = 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without_attention, r"attention modules in model\.layers\.1, of which there should be one: none"),
        (_without_an_mlp, r"model\.layers\.1 has no matrices beside its attention"),
        (
            _with_another_output,
            r"model\.layers\.0\.self_attn has no output projection, or several, by the names that trimtab knows: o_proj",
        ),
        (_with_a_wider_query, r"model\.layers\.1\.self_attn makes 144 features of a token and reads 48: no number of heads of 12"),
        (_with_fewer_layers, r"lists of 3 layers, of which there should be one: none"),
    ],
)
def test_what_is_built_otherwise_is_refused_by_name(change, words):
    model = tiny_model("llama")
    change(model)
    with pytest.raises(BaseError, match=words):
        read_spec(model)
