"""The decode path: when it is used, and what for."""

from __future__ import annotations

from collections import namedtuple

import psutil
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests import odd
from tests.forward.test_rowwise import DEVIATIONS
from tests.laws.common import cached_logits, difference, tokens
from tests.tiny import tiny_model, tiny_tokenizer
from trimtab import ops
from trimtab.bases.copies import copied
from trimtab.bases.weights import FORMATS
from trimtab.forward import decode_layer, decode_path, decode_path_check
from trimtab.forward.attached import Attached
from trimtab.forward.batch import BASE, Piece
from trimtab.forward.decode_path import FAMILIES, DecodePath
from trimtab.forward.hosted import Hosted
from trimtab.forward.kv_cache import PagedKV
from trimtab.forward.packs import Mix
from trimtab.model import Base
from trimtab.ops import native

pytestmark = [
    pytest.mark.skipif(native.load()[0] is None, reason="no native kernels on this machine"),
    pytest.mark.usefixtures("compared_anew"),
]


@pytest.mark.parametrize("total", [2**40, 2**10])
def test_packing_depends_on_the_machine_and_not_on_what_is_free(monkeypatch, total: int) -> None:
    memory = namedtuple("memory", "total available")
    base, packs = Base(tiny_model("llama", dtype=torch.bfloat16), tiny_tokenizer()), []
    real = decode_layer.linear
    monkeypatch.setattr(decode_layer, "linear", lambda *args: packs.append(args[2]) or real(*args))
    for free in (2**40, 0):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: memory(total, free))
        DecodePath(base.attached)
        assert set(packs) == {total == 2**40}
        packs.clear()


def test_only_dense_weights_would_be_copied(monkeypatch) -> None:
    """What a quantised base stores is not counted, nor is it packed as in its files, which takes long for GPTQ."""
    base = Base(tiny_model("llama", dtype=torch.bfloat16), tiny_tokenizer())
    head = base.attached.weights.of[base.spec.head].nbytes
    memory = namedtuple("memory", "total available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(4 * head, 0))
    monkeypatch.setattr(FORMATS["gptq"], "stored", lambda _: pytest.fail("packed as in its files"))
    assert not decode_path.packs_weights(base.attached)
    for name, module in list(base.model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != base.spec.head:
            base.model.set_submodule(name, FORMATS["gptq"].of_linear(module))
    assert decode_path.packs_weights(Hosted(base.model))


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_used_where_it_is_right(family: str, dtype: torch.dtype) -> None:
    assert Base(tiny_model(family, dtype=dtype), tiny_tokenizer()).attached.decode_path is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", [w for w in DEVIATIONS if "gradient" not in w])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_a_class_that_deviates_is_not_run_so(family: str, what: str, dtype: torch.dtype) -> None:
    assert Attached(odd.deviate(tiny_model(family, dtype=dtype), *DEVIATIONS[what])).decode_path is None


def test_an_epsilon_of_one_layer() -> None:
    """Settings of a module that the decode path takes to be the same everywhere."""
    model = tiny_model("llama")
    model.model.layers[1].post_attention_layernorm.variance_epsilon *= 100
    base, prompt = Base(model, tiny_tokenizer()), tokens(9, 1)
    assert base.attached.decode_path is None
    got = cached_logits(base, [prompt], [None], [[5, 3, 1]])[0]
    theirs = copied(model)
    theirs.model.layers[1].post_attention_layernorm.variance_epsilon *= 100
    assert difference(got, theirs(torch.tensor([prompt])).logits[0].detach()) <= 1e-4


def _scale(made: DecodePath) -> None:
    for layer in made.layers:
        layer.scaling *= 1.1


def _window(made: DecodePath) -> None:
    for layer in made.layers:
        layer.window += 1


def _no_window_in_long_prompts(made: DecodePath) -> None:
    real = made._attend_long

    def attend(a, qkv, pools, long, layer):
        window, layer.window = layer.window, None
        real(a, qkv, pools, long, layer)
        layer.window = window

    made._attend_long = attend


def _epsilon(made: DecodePath) -> None:
    made.eps *= 1.2


def _head(made: DecodePath) -> None:
    real = made.head
    made.head = lambda x: 1.02 * real(x)


def _norms_exchanged(made: DecodePath) -> None:
    for layer in made.layers:
        layer.input_norm, layer.mlp_norm = layer.mlp_norm, layer.input_norm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", [_scale, _window, _no_window_in_long_prompts, _epsilon, _head, _norms_exchanged])
def test_a_fault_of_its_own_is_seen(fault, dtype: torch.dtype, monkeypatch) -> None:
    made = DecodePath.__init__

    def wrong(self: DecodePath, attached: Attached, packs: bool | None = None) -> None:
        made(self, attached, packs)
        self.stack = None  # kernel by kernel, where the fault is
        fault(self)

    base = Base(tiny_model("mistral", dtype=dtype), tiny_tokenizer())
    monkeypatch.setattr(DecodePath, "__init__", wrong)
    assert base.attached.decode_path is None


def test_models_built_alike_are_compared_once(monkeypatch) -> None:
    made, real = list[torch.dtype](), decode_path_check._agrees
    monkeypatch.setattr(decode_path_check, "_agrees", lambda hosted, make: made.append(hosted.dtype) or real(hosted, make))
    for seed, dtype in ((0, torch.float32), (1, torch.float32), (0, torch.bfloat16)):
        assert Base(tiny_model("llama", seed=seed, dtype=dtype), tiny_tokenizer()).attached.decode_path is not None
    assert made == [torch.float32, torch.bfloat16]
    other = odd.deviate(tiny_model("llama"), "RMSNorm", odd.with_setting("variance_epsilon", 1.2))
    assert Base(other, tiny_tokenizer()).attached.decode_path is None and made[2:] == [torch.float32]


@pytest.mark.parametrize("wrong", ["struct", "attend"])
def test_a_kernel_that_is_wrong_is_not_run(wrong: str, monkeypatch) -> None:
    """A scale that is off by a tenth in the one call of all layers, or in the kernel of attention."""
    if wrong == "struct" and not native.attends_flat():
        pytest.skip("this processor does not multiply bfloat16")
    if wrong == "struct":
        real = decode_path.LayerWeights
        monkeypatch.setattr(decode_path, "LayerWeights", lambda *args: real(*args[:3], args[3] * 1.1, args[4]))
    else:
        attend = decode_path.native_inference.attend
        monkeypatch.setattr(decode_path.native_inference, "attend", lambda *args: attend(*args[:4], args[4] * 1.1, args[5]))
    assert Base(tiny_model("llama", dtype=torch.bfloat16), tiny_tokenizer()).attached.decode_path is None


@pytest.mark.skipif(not native.attends_flat(), reason="this processor does not multiply bfloat16, or there are no native kernels")
def test_long_prompts_on_flat_rows(monkeypatch) -> None:
    """Heads that fill blocks: two sequences that bring many rows onto cached ones, each as it is alone in transformers in fp32. A scale
    that is off by a tenth is seen before."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, head_dim=32
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    calls, real = list[int](), ops.attend_rows
    monkeypatch.setattr(ops, "attend_rows", lambda q, *rest: calls.append(len(q)) or real(q, *rest))
    base = Base(copied(model).to(torch.bfloat16), None)
    ids = [torch.tensor(tokens(n, i)) for i, n in enumerate((300, 190))]
    cache = PagedKV(2, 40, 16, 1, 32, base.dtype, base.device)
    places, got = [list(range(0, 40, 2)), list(range(1, 40, 2))], [list[Tensor](), list[Tensor]()]
    with torch.inference_mode():
        for cuts in ((100, 1), (70, 100), (130, 89)):
            past = [sum(map(len, g)) for g in got]
            pieces = [Piece(x[p : p + n], BASE, place, p) for x, p, n, place in zip(ids, past, cuts, places, strict=True)]
            batch = base.batch(pieces, Mix([]), cache=cache)
            hidden = base.attached.forward(batch)
            for g, (a, b) in zip(got, batch.where, strict=True):
                g.append(hidden[a:b])
        assert base.attached.decode_path is not None and calls.count(101) == 2 and calls.count(170) == calls.count(219) == 2
        for g, x in zip(got, ids, strict=True):
            want = model.model(x[None]).last_hidden_state[0]
            assert difference(torch.cat(g).float(), want) < 0.03
    monkeypatch.setattr(ops, "attend_rows", lambda *args: real(*args[:5], args[5] * 1.1, args[6]))
    monkeypatch.setattr(decode_path_check, "_agreed", {})
    assert Base(copied(model).to(torch.bfloat16), None).attached.decode_path is None
