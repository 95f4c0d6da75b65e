"""Modules that an adapter has a copy of (`modules_to_save`), beside rows that run the base's own."""

from __future__ import annotations

import pytest
import torch

from tests.laws.common import cached_logits, difference, noisy, one_thread, tokens
from tests.tiny import tiny_model, tiny_tokenizer
from trimtab.bases.copies import copied
from trimtab.errors import BaseError
from trimtab.methods import LoraConfig
from trimtab.model import Base

__all__ = ["one_thread"]


@pytest.mark.parametrize("name", ["down_proj", "k_proj", "lm_head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_runs_the_copy(name: str, dtype: torch.dtype) -> None:
    """Against transformers with the copies in place of its own weights, where projections are packed and where they are not."""
    base = Base(tiny_model("llama", dtype=dtype), tiny_tokenizer())
    adapter, sequence = noisy(base, LoraConfig(r=2, target_modules=("v_proj",), modules_to_save=(name,))), tokens(9, 1)
    adapter.params = {k: torch.zeros_like(t) if "lora_" in k else t for k, t in adapter.params.items()}
    plain, copies = copied(base.model).float(), 0
    for site in adapter.sites:
        if site.saved:
            plain.get_submodule(site.name).weight.data = adapter.params[site.key("weight")].to(dtype).float()
            copies += 1
    assert copies == (1 if name == "lm_head" else base.spec.num_layers)
    want = plain(torch.tensor([sequence])).logits[0].detach()
    alone, beside = cached_logits(base, [sequence, sequence], [adapter, None], [[5, 3, 1]] * 2)
    assert difference(alone.float(), want) <= (1e-5 if dtype == torch.float32 else 0.05)
    assert difference(beside.float(), want) > 0.3, "the base's rows run its own"


def test_a_forward_that_knows_only_its_module() -> None:
    """A module whose forward somebody has put there cannot run with other parameters: nobody knows what it reads."""
    model = tiny_model("llama")
    module = model.model.layers[1].mlp.down_proj
    module.forward = lambda x: torch.nn.functional.linear(x, module.weight)
    base = Base(model, tiny_tokenizer())
    base.logits([tokens(5, 1)])
    with pytest.raises(BaseError, match=r"model\.layers\.1\.mlp\.down_proj has a forward of its own"):
        base.logits([tokens(5, 1)], [noisy(base, LoraConfig(target_modules=("v_proj",), modules_to_save=("down_proj",)))])
