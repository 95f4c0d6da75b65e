"""Law 10: one hand-computed case per method, in literal numbers. A formula that is wrong everywhere passes every other law.

The module is y = W x + b with W = [[1, 2], [3, 4]], b = [10, 20]; the row is x = [1, 2], so that W x = [5, 11] and y = [15, 31].
"""

import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.bases.weights import weight_of
from trimtab.forward.hosts import Around
from trimtab.forward.packs import PackList
from trimtab.methods import METHODS, BottleneckConfig, IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig
from trimtab.methods.base import Rows, Site, Span
from trimtab.model import Base
from trimtab.store import Adapter

W, b, X = [[1.0, 2.0], [3.0, 4.0]], [10.0, 20.0], [1.0, 2.0]


def _run(method, site, params, x=X, weight=W, bias=b):
    """The method's own pack and kernel on the first of two rows; the second belongs to nobody and must be the base's."""
    linear = nn.Linear(2, 2, bias=bias is not None).requires_grad_(False)
    linear.weight.copy_(torch.tensor(weight))
    if bias is not None:
        linear.bias.copy_(torch.tensor(bias))
    packed = method.pack(site, {k: torch.tensor(v) for k, v in params.items()}, torch.float32, weight_of(linear))
    x_TI = torch.tensor([x, x])
    rows = Rows((Span(0, 1, 0),), 2, torch.device("cpu"))
    edited, untouched = packed.kernel(x_TI, Around(linear, weight_of(linear), 0, linear.forward, linear.forward), PackList([packed]), rows)
    assert torch.equal(untouched, linear(x_TI)[1])
    return edited.tolist()


def _lora(method, params, **kwargs):
    """A [1, 2], B [2, 1] at a site whose scaling the method itself gives."""
    module = _two_by_two_base().spec.modules["model.layers.0.self_attn.q_proj"]
    site = method._site(module)
    assert site.shapes.keys() == params.keys()
    return _run(method, site, params, **kwargs)


def test_lora():
    # A x = 1·1 + (-1)·2 = -1;  B A x = [-2, -3];  s = alpha / r = 4;  y = [15, 31] + 4·[-2, -3]
    method = LoraConfig(r=1, lora_alpha=4)
    assert _lora(method, {"lora_A.weight": [[1.0, -1.0]], "lora_B.weight": [[2.0], [3.0]]}) == [7.0, 19.0]


def test_lora_of_rank_two_and_its_default_alpha():
    # A x = [3, -1];  B A x = [3 - 1, 2·3 + 0] = [2, 6];  alpha is 2r by default, so s = 2;  y = [15, 31] + [4, 12]
    params = {"lora_A.weight": [[1.0, 1.0], [1.0, -1.0]], "lora_B.weight": [[1.0, 1.0], [2.0, 0.0]]}
    assert _lora(LoraConfig(r=2), params) == [19.0, 43.0]
    # s = alpha / r = 3 / 2;  y = [15, 31] + [3, 9]
    assert _lora(LoraConfig(r=2, lora_alpha=3), params) == [18.0, 40.0]


def test_rslora():
    # s = alpha / √r = 3 / √2 = 2.1213203;  y = [15, 31] + 2.1213203·[2, 6]
    params = {"lora_A.weight": [[1.0, 1.0], [1.0, -1.0]], "lora_B.weight": [[1.0, 1.0], [2.0, 0.0]]}
    assert _lora(LoraConfig(r=2, lora_alpha=3, use_rslora=True), params) == pytest.approx([19.2426407, 43.7279221])


def test_lora_on_an_embedding():
    # E[1] = [3, 4];  A[:, 1] = -1;  B·(-1) = [-2, -3];  s = 2;  y = [3, 4] + 2·[-2, -3]
    method, site = LoraConfig(r=1, lora_alpha=2), Site("e", {}, rank=1, scaling=2.0)
    table = nn.Embedding(2, 2).requires_grad_(False)
    table.weight.copy_(torch.tensor(W))
    params = {"lora_embedding_A": torch.tensor([[1.0, -1.0]]), "lora_embedding_B": torch.tensor([[2.0], [3.0]])}
    packed = method.pack(site, params, torch.float32, weight_of(table))
    rows = Rows((Span(1, 2, 0),), 2, torch.device("cpu"))
    out = packed.kernel(torch.tensor([1, 1]), Around(table, weight_of(table), 0, table.forward, table.forward), PackList([packed]), rows)
    assert out.tolist() == [[3.0, 4.0], [-1.0, -2.0]]


def test_dora():
    # BA = [[2], [0]]·[1, 1] = [[2, 2], [0, 0]];  s = 1;  V = W + BA = [[3, 4], [3, 4]], both rows of norm 5
    # m = [10, 2.5]: V is scaled by [2, 0.5];  V x = [3 + 8, 3 + 8] = [11, 11];  y = [2·11, 0.5·11] + [10, 20]
    params = {"lora_A.weight": [[1.0, 1.0]], "lora_B.weight": [[2.0], [0.0]], "lora_magnitude_vector": [10.0, 2.5]}
    assert _lora(LoraConfig(r=1, lora_alpha=1, use_dora=True), params) == pytest.approx([32.0, 25.5])
    assert _lora(LoraConfig(r=1, lora_alpha=1, use_dora=True), params, bias=None) == pytest.approx([22.0, 5.5])


def test_ia3_on_the_output_scales_the_bias_too():
    # y = [2, -1] ∘ ([5, 11] + [10, 20])
    site = Site("k_proj", {"ia3_l": (2, 1)})
    assert _run(IA3Config(), site, {"ia3_l": [[2.0], [-1.0]]}) == [30.0, -31.0]


def test_ia3_on_a_feed_forward_module_scales_the_input():
    # l ∘ x = [2, -2];  W (l ∘ x) = [2 - 4, 6 - 8];  y = [-2, -2] + [10, 20], the bias as it is
    site = Site("down_proj", {"ia3_l": (1, 2)}, feedforward=True)
    assert _run(IA3Config(), site, {"ia3_l": [[2.0, -1.0]]}) == [8.0, 18.0]


BOTTLENECK = {"adapter_down.weight": [[1.0, -1.0], [-1.0, 1.0]], "adapter_down.bias": [1.0, -1.0]} | {
    "adapter_up.weight": [[1.0, 2.0], [3.0, 4.0]],
    "adapter_up.bias": [0.5, -0.5],
}


@pytest.mark.parametrize("variant", ["houlsby", "pfeiffer"])
def test_bottleneck_after_a_sub_layer(variant):
    # h = y = [15, 31];  D h + d = [-16 + 1, 16 - 1] = [-15, 15];  relu: [0, 15];  U·[0, 15] = [30, 60];  + u = [30.5, 59.5];
    # y = h + 2·that
    method = BottleneckConfig(variant=variant, scaling=2.0)
    assert _run(method, Site("mlp", {}, scaling=2.0), BOTTLENECK) == [76.0, 150.0]


def test_bottleneck_beside_the_mlp():
    # h = x = [1, 2];  D x + d = [-1 + 1, 1 - 1] = [0, 0];  tanh: [0, 0];  y = [15, 31] + 4·u = [15, 31] + [2, -2]
    method = BottleneckConfig(variant="parallel", non_linearity="tanh", scaling=4.0)
    assert _run(method, Site("mlp", {}, scaling=4.0), BOTTLENECK) == [17.0, 29.0]
    # x = [2, 1]: y = [4 + 10, 10 + 20];  D x + d = [2, -2];  linear;  U·[2, -2] = [-2, -2];  + u = [-1.5, -2.5];  y = [14, 30] + 4·that
    method = BottleneckConfig(variant="parallel", non_linearity="linear", scaling=4.0)
    assert _run(method, Site("mlp", {}, scaling=4.0), BOTTLENECK, x=[2.0, 1.0]) == [8.0, 20.0]


def test_where_the_bottlenecks_act():
    spec = _two_by_two_base().spec
    layer = "model.layers.0."
    assert [s.name for s in BottleneckConfig(variant="houlsby").sites(spec)] == [layer + "self_attn.o_proj", layer + "mlp"]
    assert [s.name for s in BottleneckConfig(variant="pfeiffer").sites(spec)] == [layer + "mlp"]
    assert [s.name for s in BottleneckConfig(variant="parallel").sites(spec)] == [layer + "mlp"]


# ---- prefixes: a Llama with one head of two dimensions, where everything but attention is the identity -----------------------------------


def _two_by_two_base():
    """Embeddings [1, 1], [1, -1], [-1, 1]: RMS 1, so the first norm changes nothing. q = k = x, v = x, o = 1, the MLP gives 0.

    Keys and queries at position p are rotated by the angle p (rotary frequency 1). Scores are scaled by 1/√2.
    """
    config = LlamaConfig(
        vocab_size=3,
        hidden_size=2,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=16,
        rms_norm_eps=0.0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]]))
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            model.get_submodule(f"model.layers.0.self_attn.{name}").weight.copy_(torch.eye(2))
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    return Base(model, None)


def _after_norm(h):
    """RMSNorm, then the head [[1, 0], [0, 1], [1, 1]]: two logits are the normalised h itself, the third their sum."""
    rms = math.sqrt((h[0] ** 2 + h[1] ** 2) / 2)
    return [h[0] / rms, h[1] / rms, (h[0] + h[1]) / rms]


def _rotated(x, angle):
    return [x[0] * math.cos(angle) - x[1] * math.sin(angle), x[0] * math.sin(angle) + x[1] * math.cos(angle)]


def _with(base, method, embeddings):
    adapter = Adapter.create(base, method)
    assert adapter.params["prompt_embeddings"].shape == torch.tensor(embeddings).shape
    adapter.params = {"prompt_embeddings": torch.tensor(embeddings)}
    return adapter


def test_prompt_tuning():
    # One virtual token [1, -1] at position 0, the real token [1, 1] at position 1.
    # Own score: [1,1]·[1,1]/√2 = 1.4142136. Virtual: R(1)[1,1]·[1,-1]/√2 = [-0.3011687, 1.3817733]·[1,-1]/√2 = -1.6829420/√2 = -1.1900197
    # softmax: own 1/(1 + e^(-1.1900197 - 1.4142136)) = 0.9311335, virtual 0.0688665
    # attention: own·[1, 1] + virtual·[1, -1] = [1, 0.8622671]
    # h = [1, 1] + [1, 0.8622671] = [2, 1.8622671]
    base = _two_by_two_base()
    adapter = _with(base, PromptTuningConfig(num_virtual_tokens=1, prompt_tuning_init="RANDOM"), [[1.0, -1.0]])
    for logits in (base.logits([[0]], [adapter])[0], base.logits([[0]], [adapter], grad=True)[0].detach()):
        assert logits[0].tolist() == pytest.approx(_after_norm([2.0, 1.8622671]), abs=1e-6)


def test_prefix_tuning_sees_stored_keys_unrotated_and_real_tokens_after_them():
    # Two virtual tokens: keys [2, 0] and [0, 2], values [3, 0] and [0, -3], as stored. The real token [1, 1] is at position 2.
    # q = R(2)[1, 1] = [cos 2 - sin 2, sin 2 + cos 2] = [-1.3254443, 0.4931506]
    # scores: 2·(-1.3254443)/√2 = -1.8744613;  2·0.4931506/√2 = 0.6974203;  own 2/√2 = 1.4142136
    # softmax: e^-1.8744613 = 0.1534376, e^0.6974203 = 2.0085644, e^1.4142136 = 4.1132504, sum 6.2752524: 0.0244512, 0.3200770, 0.6554718
    # attention: 0.0244512·[3, 0] + 0.3200770·[0, -3] + 0.6554718·[1, 1] = [0.7288254, -0.3047592];  h = [1.7288254, 0.6952408]
    base = _two_by_two_base()
    adapter = _with(base, PrefixTuningConfig(num_virtual_tokens=2, prefix_init="ZERO"), [[2.0, 0.0, 3.0, 0.0], [0.0, 2.0, 0.0, -3.0]])
    for logits in (base.logits([[0]], [adapter])[0], base.logits([[0]], [adapter], grad=True)[0].detach()):
        assert logits[0].tolist() == pytest.approx(_after_norm([1.7288254, 0.6952408]), abs=1e-5)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_the_second_real_token_comes_one_position_later(kind):
    """The same, for two real tokens, with the rotations written out."""
    base, first, second = _two_by_two_base(), [1.0, 1.0], [1.0, -1.0]
    if kind == "prompt":  # virtual token [-1, 1] at position 0
        adapter = _with(base, PromptTuningConfig(num_virtual_tokens=1, prompt_tuning_init="RANDOM"), [[-1.0, 1.0]])
        keys, values = [[-1.0, 1.0]], [[-1.0, 1.0]]
    else:
        adapter = _with(base, PrefixTuningConfig(num_virtual_tokens=1, prefix_init="ZERO"), [[0.5, -1.0, 2.0, 1.0]])
        keys, values = [[0.5, -1.0]], [[2.0, 1.0]]
    keys += [_rotated(first, 1), _rotated(second, 2)]  # N = 1: the real tokens are at positions 1 and 2
    values += [first, second]
    q = _rotated(second, 2)
    weights = [math.exp((q[0] * k[0] + q[1] * k[1]) / math.sqrt(2)) for k in keys]
    attended = [sum(w * v[d] for w, v in zip(weights, values, strict=True)) / sum(weights) for d in range(2)]
    want = _after_norm([second[0] + attended[0], second[1] + attended[1]])
    assert base.logits([[0, 1]], [adapter])[0][1].tolist() == pytest.approx(want, abs=1e-5)


def test_prefix_reparametrisation():
    # embedding [0.5, -1] → W0 = [[2, 0]], b0 = [0] → tanh(1) = 0.7615942 → W2 = [[1], [2], [3], [4]], b2 = [0, 0, 0, 1]
    method = PrefixTuningConfig(num_virtual_tokens=1, prefix_projection=True, encoder_hidden_size=1)
    params = {"embedding.weight": [[0.5, -1.0]], "transform.0.weight": [[2.0, 0.0]], "transform.0.bias": [0.0]} | {
        "transform.2.weight": [[1.0], [2.0], [3.0], [4.0]],
        "transform.2.bias": [0.0, 0.0, 0.0, 1.0],
    }
    saved, flat = method.export({k: torch.tensor(v) for k, v in params.items()})
    assert not saved.prefix_projection
    assert flat["prompt_embeddings"].tolist()[0] == pytest.approx([0.7615942, 1.5231884, 2.2847825, 4.0463767])
    keys, values = method.prefix(_two_by_two_base().spec, {k: torch.tensor(v) for k, v in params.items()}, torch.float32).kv_LNHD
    assert keys.flatten().tolist() == pytest.approx([0.7615942, 1.5231884])
    assert values.flatten().tolist() == pytest.approx([2.2847825, 4.0463767])


def test_every_method_has_a_case_here():
    assert set(METHODS) == {"LORA", "IA3", "BOTTLENECK", "PROMPT_TUNING", "PREFIX_TUNING"}, "compute a case of the new method by hand"


# ---- merging, by hand --------------------------------------------------------------------------------------------------------------------


def test_merges():
    weight, bias = torch.tensor(W), torch.tensor(b)
    lora = {"lora_A.weight": torch.tensor([[1.0, -1.0]]), "lora_B.weight": torch.tensor([[2.0], [3.0]])}
    merged, same = LoraConfig(r=1, lora_alpha=4).merge(Site("q", {}, rank=1, scaling=4.0), weight, bias, lora)
    assert merged.tolist() == [[9.0, -6.0], [15.0, -8.0]] and same.tolist() == b
    dora = {
        "lora_A.weight": torch.tensor([[1.0, 1.0]]),
        "lora_B.weight": torch.tensor([[2.0], [0.0]]),
        "lora_magnitude_vector": torch.tensor([10.0, 2.5]),
    }
    merged, same = LoraConfig(r=1, lora_alpha=1, use_dora=True).merge(Site("q", {}, rank=1, scaling=1.0), weight, bias, dora)
    assert merged.flatten().tolist() == pytest.approx([6.0, 8.0, 1.5, 2.0]) and same.tolist() == b
    merged, scaled = IA3Config().merge(Site("k", {}), weight, bias, {"ia3_l": torch.tensor([[2.0], [-1.0]])})
    assert merged.tolist() == [[2.0, 4.0], [-3.0, -4.0]] and scaled.tolist() == [20.0, -20.0]
    merged, same = IA3Config().merge(Site("d", {}, feedforward=True), weight, bias, {"ia3_l": torch.tensor([[2.0, -1.0]])})
    assert merged.tolist() == [[2.0, -2.0], [6.0, -4.0]] and same.tolist() == b
