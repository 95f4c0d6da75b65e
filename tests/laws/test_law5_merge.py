"""Law 5: merge equals forward, or refuses with a reason."""

import pytest
import torch
from torch import nn

from tests.laws.common import CASES, adapter_of, base_of, by_outputs, difference, tokens
from tests.tiny import tiny_model
from trimtab.errors import NotMergeable

MERGED_FAMILIES = [
    "llama",
    "qwen2",
    "gpt2",
    "phi3",
    "gemma3_text",
]  # no biases, qkv biases and a tied head, Conv1D, fused qkv, scaled embedding


def _merged(family, adapter):
    """A plain copy of the model with the adapter folded in. A tied head keeps its own weight: only the site itself changes."""
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    for site in adapter.sites:
        module = model.get_submodule(site.name) if site.name else nn.Linear(1, 1)
        params = {t: adapter.params[site.key(t)] for t in site.shapes}
        before = {n: p.clone() for n, p in module.named_parameters(recurse=False)}
        own_bias = getattr(module, "bias", None)
        weight, bias = adapter.method.merge(site, by_outputs(module) if "weight" in before else torch.empty(0), own_bias, params)
        assert all(torch.equal(p, before[n]) for n, p in module.named_parameters(recurse=False)), "merge changed the base's tensors"
        assert weight.dtype == torch.float32 and weight.shape == by_outputs(module).shape
        assert (bias is None) == (own_bias is None)
        module.weight = nn.Parameter(weight.T.contiguous() if type(module).__name__ == "Conv1D" else weight)
        if bias is not None:
            module.bias = nn.Parameter(bias)
    return model


@pytest.mark.parametrize("family", MERGED_FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_merge_equals_forward_or_refuses(family, case):
    base, adapter, ids = base_of(family), adapter_of(family, case), tokens(23, 6)
    if not adapter.method.mergeable:
        with pytest.raises(NotMergeable) as refusal:
            _merged(family, adapter)
        assert len(refusal.value.message) > 20
        return
    with torch.no_grad():
        merged = _merged(family, adapter)(torch.tensor([ids])).logits[0]
    assert difference(merged, base.logits([ids], [adapter])[0]) <= 1e-5


def test_something_merges_and_something_refuses():
    assert {adapter_of("llama", c).method.mergeable for c in CASES} == {True, False}
