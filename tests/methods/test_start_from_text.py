"""Prefix and prompt tuning that start from a text: a fresh adapter is the base that has read the text.

Compared with transformers' own model on the tokens of text and prompt: neither keys and values, nor layers, nor positions can be
exchanged.
"""

from __future__ import annotations

import pytest
import torch

from tests.laws.common import base_of, difference, plain_of, tokens
from tests.tiny import FAMILIES, tiny_tokenizer
from trimtab.methods import Method, PrefixTuningConfig, PromptTuningConfig
from trimtab.store import Adapter

TEXT = "Be brief"
METHODS = {
    "prefix": lambda n: PrefixTuningConfig(num_virtual_tokens=n, prefix_init_text=TEXT),
    "prompt": lambda n: PromptTuningConfig(num_virtual_tokens=n, prompt_tuning_init="TEXT", prompt_tuning_init_text=TEXT),
}


@pytest.mark.parametrize("virtual", [8, 5, 11])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_is_the_base_after_the_text(family: str, name: str, virtual: int) -> None:
    """The text is cut where it is longer than the virtual tokens, and repeated where it is shorter."""
    method: Method = METHODS[name](virtual)
    base, prompt = base_of(family), tokens(12, 4)
    text = tiny_tokenizer()(TEXT)["input_ids"]
    assert len(text) == 8
    with torch.no_grad():
        whole = plain_of(family)(torch.tensor([(text * 2)[:virtual] + prompt])).logits[0, virtual:]
    got = base.logits([prompt], [Adapter.create(base, method, seed=0)])[0]
    assert difference(got, whole) < 1e-5
