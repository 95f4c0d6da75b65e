"""Law 8: the base's hash never changes, and no base parameter ever wants or gets a gradient."""

import hashlib

import pytest
import torch

from tests.laws.common import CASES, by_outputs, method_of, noisy, tokens
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer
from trimtab.decode.generate import Sampling
from trimtab.errors import NotMergeable
from trimtab.model import Base
from trimtab.store import Adapter


def _digest(base):
    whole = hashlib.sha256()
    for name, tensor in sorted(base.model.state_dict().items()):
        whole.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        whole.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_changes_the_base(family):
    base = Base(tiny_model(family), tiny_tokenizer())
    before, storage = _digest(base), {n: (p.data_ptr(), id(p)) for n, p in base.model.named_parameters()}
    adapters = [noisy(base, method_of(c, base.spec), seed=i) for i, c in enumerate(CASES)]
    sequences = [tokens(5 + i % 3, i) for i in range(len(adapters))]

    def intact(after):
        assert _digest(base) == before, after
        assert {n: (p.data_ptr(), id(p)) for n, p in base.model.named_parameters()} == storage, after
        for name, p in base.model.named_parameters():
            assert not p.requires_grad and p.grad is None, (after, name)

    base.logits(sequences, adapters)
    intact("forward")
    for a in adapters:
        a.params = {k: t.requires_grad_() for k, t in a.params.items()}
    optimizer = torch.optim.AdamW([t for a in adapters for t in a.params.values()], lr=0.1)
    torch.cat(base.logits(sequences, adapters, grad=True)).log_softmax(-1)[:, 0].sum().backward()
    assert all(t.grad is not None for a in adapters for t in a.params.values())
    intact("backward")
    optimizer.step()
    intact("an optimizer's step")
    for a in adapters:
        a.params = {k: t.detach() for k, t in a.params.items()}
    base.generate_ids(sequences, adapters, Sampling(max_new_tokens=3))
    intact("generation")
    for a in adapters:
        for site in a.sites:
            mine = {t: a.params[site.key(t)] for t in site.shapes}
            module = base.model.get_submodule(site.name)
            weight = by_outputs(module) if a.method.mergeable else torch.empty(0)
            try:
                merged = a.method.merge(site, weight, getattr(module, "bias", None), mine)
            except NotMergeable:
                break
            for tensor in merged:
                if tensor is not None:
                    tensor.add_(1.0)  # what merge gives back is the caller's own
    intact("merging")


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_adapter_holds_no_memory_of_the_base(case):
    """Training writes into the adapter's tensors in place: none may be the base's own."""
    base = Base(tiny_model("llama"), tiny_tokenizer())
    before = _digest(base)
    adapter = Adapter.create(base, method_of(case, base.spec))
    for t in adapter.params.values():
        t.add_(1.0)
    assert _digest(base) == before
