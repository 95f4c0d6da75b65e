"""All layers in one native call give, to the last bit, what they give kernel by kernel, and step aside where they do not know an edit."""

from __future__ import annotations

import pytest
import torch

import trimtab
from tests import tiny
from trimtab.forward import decode_layer
from trimtab.forward.attached import Attached
from trimtab.forward.batch import Piece, Way, make_batch
from trimtab.forward.decode_path import DecodePath
from trimtab.forward.kv_cache import PagedKV
from trimtab.forward.packs import Mix
from trimtab.ops import native
from trimtab.store import Adapter

pytestmark = pytest.mark.skipif(
    not native.attends_flat(), reason="this processor does not multiply bfloat16, or there are no native kernels"
)


@pytest.fixture
def base(request, monkeypatch):
    monkeypatch.setitem(tiny.FAMILIES, request.param, tiny.FAMILIES[request.param] | {"hidden_size": 64, "head_dim": 16})
    model = tiny.tiny_model(request.param, dtype=torch.bfloat16)
    return trimtab.model.Base(model, tiny.tiny_tokenizer(), name="tiny", path=None, fingerprint="")


def adapter(base, seed, config):
    made = Adapter.create(base, config, seed=seed)
    for key, tensor in made.params.items():
        tensor += 0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed + len(key)))
    return base.packed(made)


@torch.no_grad()
def run(base, path, mix, monkeypatch):
    """Hidden states, keys and values of a prompt for each member and for the base, then of one more token each, on this decode path."""
    monkeypatch.setattr(Attached, "decode_path", path)
    spec, attached = base.spec, base.attached
    cache = PagedKV(spec.num_layers, 64, 4, *spec.kv_shape, attached.dtype, attached.device)
    found = []
    for past, count in ((0, 13), (13, 1)):
        ids = [torch.randint(250, (count,), generator=torch.Generator().manual_seed(10 * past + i)) for i in range(len(mix.adapters) + 1)]
        pieces = [Piece(t, i - 1, list(range(4 * i, 4 * i + 4)), past) for i, t in enumerate(ids)]
        batch = make_batch(pieces, mix, device=attached.device, max_positions=spec.max_positions, cache=cache)
        found.append(attached.forward(batch))
    return [*found, cache.keys, cache.values]


@pytest.mark.parametrize("base", ["llama", "qwen2", "qwen3", "mistral"], indirect=True)
def test_one_call_equals_a_call_for_each_kernel(base, monkeypatch):
    assert isinstance(base.attached, Attached)
    some = trimtab.LoraConfig(r=5, target_modules=("q_proj", "v_proj", "down_proj"))
    every = trimtab.LoraConfig(r=16, target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    bottlenecks = [trimtab.BottleneckConfig(variant=v, reduction_factor=8) for v in ("houlsby", "pfeiffer", "parallel")]
    outputs = trimtab.IA3Config(target_modules=("q_proj", "o_proj", "up_proj", "down_proj"), feedforward_modules=("o_proj",))
    more = [trimtab.IA3Config(), outputs, trimtab.BottleneckConfig(non_linearity="gelu"), trimtab.PrefixTuningConfig(num_virtual_tokens=3)]
    configs = [some, every, every, *bottlenecks, *more]
    mix = Mix([adapter(base, i, config) for i, config in enumerate(configs)])
    one, many = DecodePath(base.attached), DecodePath(base.attached)
    assert one.stack is not None
    many.stack = None
    monkeypatch.setattr(decode_layer, "FEW_ROWS", 200)  # the prompts are 143 rows: two parts of the one call, and else the same kernels
    got, want, plain = (run(base, path, m, monkeypatch) for path, m in ((one, mix), (many, mix), (one, Mix([]))))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(plain[0], got[0][:13]), "the base's rows do not depend on the adapters beside them"
    assert mix.tables[one.stack].unknown == frozenset()
    parts = [got[0][13 * i : 13 * i + 13] for i in range(len(configs))]  # a prefix that is not in the cache does nothing
    assert all(float((part - parts[0]).abs().max()) > 0.1 for part in parts[1:]), "every adapter does something"


@pytest.mark.parametrize("base", ["llama"], indirect=True)
@pytest.mark.parametrize(
    "config", [trimtab.LoraConfig(r=5), trimtab.BottleneckConfig(), trimtab.IA3Config()], ids=["lora", "bottleneck", "ia3"]
)
@torch.no_grad()
def test_many_short_sequences_of_one_adapter(base, config, monkeypatch):
    """130 sequences of one adapter, two parts of the call, between others: each gives what it gives alone, and nearly what the model gives
    with the adapter's edits in its own modules."""
    mix = Mix([adapter(base, 3, trimtab.LoraConfig(r=3)), adapter(base, 4, config)])
    monkeypatch.setattr(Attached, "decode_path", DecodePath(base.attached))
    spec, attached = base.spec, base.attached
    members = [-1, 0, *[1] * 130, 0]

    def fed(chosen):
        cache = PagedKV(spec.num_layers, len(members), 4, *spec.kv_shape, attached.dtype, attached.device)
        pieces = [Piece(torch.tensor([i % 200 + 3, i % 77 + 5]), members[i], [i]) for i in chosen]
        batch = make_batch(pieces, mix, device=attached.device, max_positions=spec.max_positions, cache=cache)
        hidden = attached.forward(batch)
        return [hidden[a:b] for a, b in batch.where]

    together, before = fed(range(len(members))), dict(attached.cached_rows)
    assert before == {Way.ONE_CALL: 2 * len(members), Way.LAYER_BY_LAYER: 0, Way.MODEL: 0}
    for i in (0, 1, 2, 60, 129, 131, 132):
        assert torch.equal(together[i], fed([i])[0]), i
    monkeypatch.setattr(Attached, "decode_path", None)
    for got, want in zip(together, fed(range(len(members))), strict=True):
        assert float((got - want).float().norm() / want.float().norm()) < 0.05
    members = [-1] * len(members)
    plain = fed(range(len(members)))
    assert min(float((together[i] - plain[i]).float().norm() / plain[i].float().norm()) for i in range(2, 132)) > 0.2


@pytest.mark.parametrize(
    "other",
    [trimtab.LoraConfig(use_dora=True), trimtab.IA3Config(target_modules=("gate_proj",), feedforward_modules=("gate_proj",))],
    ids=["dora", "one of two inputs"],
)
@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_other_edits_cost_their_own_rows(base, other, monkeypatch):
    """An edit beside LoRA that the one call does not know goes kernel by kernel; LoRA's rows and the base's stay in the one call."""
    lora, unknown = adapter(base, 1, trimtab.LoraConfig(r=4)), adapter(base, 2, other)
    one, many = DecodePath(base.attached), DecodePath(base.attached)
    many.stack = None
    got, rows = run(base, one, Mix([lora, unknown]), monkeypatch), dict(base.attached.cached_rows)
    alone, want = run(base, one, Mix([lora]), monkeypatch), run(base, many, Mix([lora, unknown]), monkeypatch)
    assert rows == {Way.ONE_CALL: 28, Way.LAYER_BY_LAYER: 14, Way.MODEL: 0}
    for step in range(2):
        assert torch.equal(got[step][: len(alone[step])], alone[step]), "the base and LoRA as they are without the other"
        assert float((got[step] - want[step]).norm() / want[step].norm()) < 0.01
