"""A copy of a base computes to the last bit what the base computes in transformers' own hands: nothing is cast on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import FAMILIES, tiny_folder, tiny_model, tiny_tokenizer
from trimtab.bases.by_layer import held, in_float32_by_layer
from trimtab.bases.copies import copied
from trimtab.bases.structure import read_spec
from trimtab.methods import LoraConfig
from trimtab.model import Base, load_base
from trimtab.store import Adapter
from trimtab.store.merge import fresh_copy, fresh_in_float32, in_float32

DTYPES = [torch.bfloat16, torch.float32]
LONG = 450
"""Tokens: at position 390 rotary frequencies in bf16 turn by 0.074 too much or too little."""


def load(folder: Path, dtype: torch.dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def tensors(model) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def held_bytes(model) -> int:
    return sum({s.data_ptr(): s.nbytes() for s in (p.untyped_storage() for p in model.parameters())}.values())


@torch.no_grad()
def logits(model) -> torch.Tensor:
    model.set_attn_implementation("eager")
    return model(torch.randint(256, (1, LONG), generator=torch.Generator().manual_seed(3))).logits[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_is_the_base_to_the_last_bit(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    folder = tiny_folder(tmp_path / "base", family, dtype=torch.bfloat16)
    theirs, base = load(folder, dtype), Base(load(folder, dtype), tiny_tokenizer())
    base.logits([[1, 2, 3]], [Adapter.create(base, LoraConfig(r=2))])  # hosts are in place
    for copy in (copied(base.model), fresh_copy(base)):
        got, want = tensors(copy), tensors(theirs)
        assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in want.items()}
        assert all(torch.equal(t, want[n]) for n, t in got.items())
        assert not {t.data_ptr() for t in got.values()} & {t.data_ptr() for t in tensors(base.model).values()}, "nothing is shared"
        assert torch.equal(logits(copy), logits(theirs))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt2"])
def test_in_float32_every_buffer_is_computed_in_float32(tmp_path: Path, family: str) -> None:
    folder = tiny_folder(tmp_path / "base", family, dtype=torch.bfloat16)
    want, loaded = load(folder, torch.float32), load_base(str(folder), dtype="bfloat16")
    careless = load(folder, torch.bfloat16).to(torch.bfloat16)  # its buffers are bf16: what is cast back is not what it was
    for base in (loaded, Base(load(folder, torch.bfloat16), tiny_tokenizer()), Base(careless, tiny_tokenizer())):
        adapter = Adapter.create(base, LoraConfig(r=2))
        for copy in (in_float32(adapter).base.model, fresh_in_float32(base), in_float32_by_layer(base.model)):
            assert {n: t.dtype for n, t in tensors(copy).items()} == dict.fromkeys(tensors(want), torch.float32)
            with held(copy):
                assert all(torch.equal(t, tensors(want)[n]) for n, t in tensors(copy).items())
        assert torch.equal(logits(fresh_in_float32(base)), logits(want))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_by_layer_holds_one_layer_at_a_time_and_rests_as_nothing(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    before = {n: t.clone() for n, t in tensors(model).items()}
    copy, want = in_float32_by_layer(model), copied(model).float()
    assert held_bytes(copy) == 4
    held_at = list[int]()
    for module in copy.modules():
        module.register_forward_hook(lambda *_: held_at.append(held_bytes(copy)))
    ids = torch.randint(256, (1, 30), generator=torch.Generator().manual_seed(3))
    want.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(copy(ids).logits, want(ids).logits)
    layers = copy.get_submodule(read_spec(model).layer_list)
    largest = max(sum(4 * p.numel() for p in part.parameters()) for part in (*layers, copy.get_input_embeddings()))
    assert max(held_at) == largest + 4 and held_bytes(copy) == 4
    assert all(torch.equal(t, before[n]) for n, t in tensors(model).items())


def test_what_a_layer_raises_leaves_nothing_in_memory() -> None:
    copy = in_float32_by_layer(tiny_model("llama"))
    with pytest.raises(RuntimeError), torch.no_grad():
        copy(inputs_embeds=torch.zeros(1, 3, 7))
    assert held_bytes(copy) == 4


def test_tied_weights_stay_tied_and_the_generator_as_it_was(tmp_path: Path) -> None:
    model = load(tiny_folder(tmp_path / "base", "qwen2"), torch.bfloat16)
    before = torch.random.get_rng_state()
    for copy in (copied(model), in_float32_by_layer(model)):
        assert copy.lm_head.weight is copy.model.embed_tokens.weight
        assert copy.generation_config.to_dict() == model.generation_config.to_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
