"""A copy of a base computes to the last bit what the base computes in transformers' own hands: nothing is cast on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import FAMILIES, tiny_folder, tiny_tokenizer
from trimtab.bases.copies import copied, copied_in_float32
from trimtab.methods import LoraConfig
from trimtab.model import Base, load_base
from trimtab.store import Adapter
from trimtab.store.merge import fresh_copy, in_float32

DTYPES = [torch.bfloat16, torch.float32]
LONG = 450
"""Tokens: at position 390 rotary frequencies in bf16 turn by 0.074 too much or too little."""


def load(folder: Path, dtype: torch.dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def tensors(model) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


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
        for copy in (in_float32(adapter).base.model, fresh_copy(base, torch.float32), copied_in_float32(base.model)):
            assert {n: t.dtype for n, t in tensors(copy).items()} == dict.fromkeys(tensors(want), torch.float32)
            assert all(torch.equal(t, tensors(want)[n]) for n, t in tensors(copy).items())
        assert torch.equal(logits(fresh_copy(base, torch.float32)), logits(want))


def test_tied_weights_stay_tied_and_the_generator_as_it_was(tmp_path: Path) -> None:
    model = load(tiny_folder(tmp_path / "base", "qwen2"), torch.bfloat16)
    before = torch.random.get_rng_state()
    for copy in (copied(model), copied_in_float32(model)):
        assert copy.lm_head.weight is copy.model.embed_tokens.weight
        assert copy.generation_config.to_dict() == model.generation_config.to_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
