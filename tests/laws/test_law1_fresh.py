"""Law 1: a fresh adapter is the base, where its method claims it."""

import pytest
import torch

from tests.laws.common import CASES, base_of, cached_logits, difference, method_of, tokens
from tests.tiny import FAMILIES
from trimtab.methods import METHODS
from trimtab.store import Adapter


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_fresh_adapter_is_the_base(family, case):
    base, ids = base_of(family), tokens(17, 3)
    method = method_of(case, base.spec)
    adapter = Adapter.create(base, method, seed=5)
    fresh, alone = base.logits([ids], [adapter])[0], base.logits([ids])[0]
    if method.fresh_is_base:
        assert difference(fresh, alone) <= 1e-6
    else:
        assert difference(fresh, alone) > 1e-3, "this method could claim fresh_is_base"


def test_only_prefixes_do_not_claim_it():
    claims = {cls.peft_type: {m.fresh_is_base for m in cls.examples()} for cls in METHODS.values()}
    prefixes = ("PROMPT_TUNING", "PREFIX_TUNING")
    assert claims == {t: {t not in prefixes} for t in claims}


def test_fresh_adapters_decode_as_the_base():
    """The gathered kernels too: all fresh adapters at once, one token at a time."""
    base = base_of("qwen2")
    methods = [m for m in (method_of(c, base.spec) for c in CASES) if m.fresh_is_base]
    adapters = [Adapter.create(base, m, seed=i) for i, m in enumerate(methods)]
    ids = tokens(9, 4)
    alone = base.logits([ids])[0]
    for got in cached_logits(base, [ids] * len(adapters), adapters, [[1] * 9] * len(adapters)):
        assert difference(got, alone) <= 2e-6


def test_equal_seeds_give_equal_adapters():
    base = base_of("llama")
    for case in CASES:
        method = method_of(case, base.spec)
        one, same, other = (Adapter.create(base, method, seed=s).params for s in (1, 1, 2))
        assert all(torch.equal(one[k], same[k]) for k in one)
        drawn = getattr(method, "init_lora_weights", True) is True  # pissa starts from the base's weights
        if drawn and case.startswith(("lora", "bottleneck", "prompt", "prefix")):
            assert any(not torch.equal(one[k], other[k]) for k in one)
