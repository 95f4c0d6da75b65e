"""Law 19: every weight format's forward, backward, DoRA norm and merge equal those of its dense twin, and their fingerprints differ.

The twin is transformers' own model with the dense matrices in plain `nn.Linear`s. The law runs over the registry and over the format that
CONTRIBUTING.md adds.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests import tiny
from tests.bases import new_weight
from tests.bases.gguf_blocks import random_blocks
from tests.laws.common import EXAMPLES, difference, gradient_difference, noisy, tokens
from tests.laws.plain import plain_logits
from tests.tiny import tiny_model, tiny_tokenizer
from trimtab.bases import fingerprint_folder, fingerprint_model
from trimtab.bases.weights import FORMATS, Weight, gguf_blocks, mxfp4, weight_of
from trimtab.bases.weights.gguf_blocks import BLOCKS, GgufBlocks
from trimtab.decode.generate import Sampling
from trimtab.errors import NotMergeable
from trimtab.methods import LoraConfig
from trimtab.model import Base

QUICK = ("dense", "nf4-double", "int8", "gptq", "q4_k", new_weight.NAME)
"""One format of each kind; the others are slow."""
NAMES = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in (*FORMATS, new_weight.NAME)]
FAMILIES = ["llama", "qwen2", "gemma3_text"]
"""Without biases and with a head of its own, with biases, with a tied head."""


@pytest.fixture(params=NAMES)
def stored(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Weight]]:
    if request.param in FORMATS:
        kind = FORMATS[request.param]
        if issubclass(kind, GgufBlocks):  # nothing is quantised to these: random blocks, in layers that are wide enough
            monkeypatch.setattr(kind, "of_matrix", classmethod(_of_random_blocks))
        if _block_of(kind) > 1:
            for family in FAMILIES:
                monkeypatch.setitem(tiny.FAMILIES, family, tiny.FAMILIES[family] | {"hidden_size": 256, "intermediate_size": 512})
        yield kind
        return
    with new_weight.registered() as kind:
        yield kind


def _of_random_blocks(cls: type[GgufBlocks], weight_OI: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    codes = torch.from_numpy(random_blocks(cls.name, *weight_OI.shape))
    return gguf_blocks.read({cls.name: codes}, tuple(weight_OI.shape), bias, dtype)


def _block_of(stored: type[Weight]) -> int:
    """What the inputs of a layer are a multiple of."""
    if issubclass(stored, GgufBlocks):
        return BLOCKS[stored.name][0]
    return mxfp4.BLOCK if stored.name == "mxfp4" else 1


def linear_of(bias: bool, dtype: torch.dtype = torch.float32, inputs: int = 24) -> nn.Linear:
    made = nn.utils.skip_init(nn.Linear, inputs, 40, bias=bias)
    with torch.no_grad():
        for p, generator in zip(made.parameters(), map(torch.Generator().manual_seed, (1, 2)), strict=False):
            p.copy_(torch.randn(p.shape, generator=generator))
    return made.to(dtype).requires_grad_(False)


def pair(family: str, stored: type[Weight], dtype: torch.dtype = torch.float32) -> tuple[Base, nn.Module]:
    """A base whose linear layers are in the format, and transformers' own model of their dense matrices."""
    model, twin = (tiny_model(family, dtype=dtype).requires_grad_(False) for _ in range(2))
    twin.set_attn_implementation("eager")
    embedding = model.get_input_embeddings().weight
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module.weight is not embedding and module.in_features % _block_of(stored) == 0:
            model.set_submodule(name, stored.of_linear(module))
            twin.get_submodule(name).weight.copy_(weight_of(model.get_submodule(name)).dense())
    return Base(model, tiny_tokenizer()), twin


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer(stored: type[Weight], dtype: torch.dtype, bias: bool) -> None:
    module = stored.of_linear(linear_of(bias, dtype, inputs=max(24, _block_of(stored))))
    check_a_module(module, lambda W, x: F.linear(x, W, module.bias), dtype)


@pytest.mark.parametrize("kind", ["Conv1D", "Embedding"])
def test_dense_modules_that_are_no_linear_layers(kind: str) -> None:
    torch.manual_seed(0)
    module = (Conv1D(40, 24) if kind == "Conv1D" else nn.Embedding(40, 24)).requires_grad_(False)
    W = module.weight.T if kind == "Conv1D" else module.weight
    assert torch.equal(weight_of(module).dense(), W)
    check_a_module(module, (lambda W, x: module(x)) if kind == "Conv1D" else (lambda W, x: x @ W.T), torch.float32)


def check_a_module(module: nn.Module, plain, dtype: torch.dtype) -> None:
    weight, near = weight_of(module), 1e-5 if dtype == torch.float32 else 2e-2
    W, bias = weight.dense().clone(), getattr(module, "bias", None)
    x, dy = (torch.randn(2, 5, n, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (W.shape[1], 40))
    assert weight.shape == tuple(W.shape) and weight.dtype == dtype == W.dtype and weight.device == W.device
    held = [t for name, t in module.state_dict().items() if name != "bias"]
    assert not weight.trained and weight.nbytes == sum(t.numel() * t.element_size() for t in held) > 0

    leaf, theirs = (x.clone().requires_grad_() for _ in range(2))
    y, want = weight.matmul(leaf, bias), plain(W, theirs)
    assert difference(y.detach(), want.detach()) < near
    y.backward(dy)
    want.backward(dy)
    assert gradient_difference(leaf.grad, theirs.grad) < near
    assert all(t.grad is None for t in weight.stored().values())
    assert gradient_difference(weight.matmul_t(dy), dy @ W) < near
    if not isinstance(module, nn.Embedding):
        assert torch.equal(module(x), weight.matmul(x, bias))
    wide = torch.full((5, 50), torch.nan, dtype=dtype)
    weight.matmul(x[0], bias, wide[:, 3:43])
    assert difference(wide[:, 3:43], want[0].detach()) < near and wide[:, :3].isnan().all() and wide[:, 43:].isnan().all()
    rows = torch.tensor([7, 0, 39, 7])
    assert torch.equal(weight.dense(rows), W[rows]) and torch.equal(weight.dense(slice(3, 9)), W[3:9])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_and_every_method(stored: type[Weight], family: str) -> None:
    """Logits and gradients of adapters of every method, mixed and one at a time, against hooks on the twin. In a mix the edits of other
    methods stand between LoRA and its layer; alone, LoRA's backward is the layer's too."""
    if _block_of(stored) > 1 and family != "llama":
        pytest.skip("wide layers are tried in one family")
    base, twin = pair(family, stored)
    adapters = [None, *(noisy(base, method, seed=i) for i, method in enumerate(EXAMPLES.values()))]
    sequences = [tokens(7 + i % 3, i) for i in range(len(adapters))]
    for adapter in adapters[1:]:
        adapter.params = {k: t.requires_grad_() for k, t in adapter.params.items()}
    want = [plain_logits(twin, adapter, ids) for adapter, ids in zip(adapters, sequences, strict=True)]
    leaves = [t for adapter in adapters[1:] for t in adapter.params.values()]
    theirs = torch.autograd.grad(sum(t.square().sum() for t in want), leaves, allow_unused=True)
    alone = [base.logits([ids], [adapter], grad=True)[0] for adapter, ids in zip(adapters, sequences, strict=True)]
    for got in (base.logits(sequences, adapters, grad=True), alone):
        assert all(difference(a.detach(), b.detach()) < 2e-5 for a, b in zip(got, want, strict=True))
        ours = torch.autograd.grad(sum(t.square().sum() for t in got), leaves, allow_unused=True)
        assert all((a is None) == (b is None) for a, b in zip(ours, theirs, strict=True))
        assert max(gradient_difference(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None) < 1e-4


def test_dora_begins_with_the_norms_of_the_dense_matrix(stored: type[Weight]) -> None:
    base, twin = pair("llama", stored)
    method = LoraConfig(r=2, use_dora=True)
    for site in method.sites(base.spec):
        started = method.init(site, base, torch.Generator().manual_seed(0))["lora_magnitude_vector"]
        assert difference(started, torch.linalg.vector_norm(twin.get_submodule(site.name).weight, dim=1)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_tokens_with_a_cache(stored: type[Weight], dtype: torch.dtype) -> None:
    """Through the decode path where there is one. Two candidates may be nearly equal, so the twin is asked for the logits of our tokens.
    An answer may end early."""
    base, twin = pair("qwen2", stored, dtype)
    prompts = [tokens(70, 1), tokens(5, 2)]
    for prompt, new in zip(prompts, base.generate_ids(prompts, sampling=Sampling(max_new_tokens=6)), strict=True):
        logits = twin(input_ids=torch.tensor([prompt + new]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(new)[:, None])[:, 0]
        assert len(new) > 1 and float((logits.max(1).values - chosen).max() / logits.std()) < (1e-4 if dtype == torch.float32 else 0.1)


def test_merging_equals_the_twins_or_is_refused(stored: type[Weight], tmp_path) -> None:
    base, twin = pair("llama", stored)
    adapter, ids = noisy(base, LoraConfig(r=2, use_dora=True)), tokens(9, 1)
    if not stored.stored_dense:
        with pytest.raises(NotMergeable, match=f"the base's weights are stored as {stored.name}"):
            adapter.merge_into(tmp_path / "merged")
        assert list(tmp_path.iterdir()) == []
        return
    adapter.merge_into(tmp_path / "merged")
    merged = type(twin).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert difference(merged(torch.tensor([ids])).logits[0].detach(), plain_logits(twin, adapter, ids).detach()) < 1e-4


def test_fingerprints_differ_and_see_every_stored_byte(stored: type[Weight]) -> None:
    base, twin = pair("llama", stored)
    before = fingerprint_model(base.model)
    assert (before == fingerprint_model(twin)) == stored.stored_dense
    seen: list[str] = [before]
    for name, tensor in base.model.get_submodule("model.layers.1.mlp.down_proj").state_dict().items():
        if name != "bias":
            tensor.view(-1).view(torch.uint8)[-1] ^= 1
            seen.append(fingerprint_model(base.model))
    assert len(set(seen)) == len(seen)


def test_a_model_has_the_fingerprint_of_its_files(stored: type[Weight], tmp_path, monkeypatch) -> None:
    """A format may keep its tensors otherwise than the file has them. Here the file has transposes, under another name."""
    base, _ = pair("qwen2", stored)
    in_memory = stored.stored
    monkeypatch.setattr(stored, "stored", lambda self: {f"{part}_t": t.t().contiguous() for part, t in in_memory(self).items()})
    files = dict(base.model.state_dict())
    for name, weight in base.attached.weights.of.items():
        if isinstance(weight, stored):
            for part in base.model.get_submodule(name).state_dict():
                if part != "bias":
                    del files[f"{name}.{part}"]
            files |= {f"{name}.{part}": t for part, t in weight.stored().items()}
    save_file({k: t.clone() for k, t in files.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(base.model.config.to_json_string(), encoding="utf-8")
    assert fingerprint_model(base.model) == fingerprint_folder(tmp_path)
