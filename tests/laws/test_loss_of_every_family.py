"""The training loss and its gradients, through the path that training takes, against transformers' own logits: every family.

Soft caps of the final logits, scaled embeddings, tied heads and biases of the head count in the loss as in the logits.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.laws.common import adapter_of, base_of, difference, gradient_difference, plain_of, tokens
from tests.laws.plain import plain_logits
from tests.tiny import FAMILIES
from trimtab.data import Example
from trimtab.objectives import Counts, Sft
from trimtab.train.losses import Part, forward_loss


@pytest.mark.parametrize("case", [None, "lora-0", "lora-head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family: str, case: str | None) -> None:
    base, model = base_of(family), plain_of(family)
    adapter = None if case is None else adapter_of(family, case)
    examples = []
    for n, learnt in ((11, 5), (17, 2)):
        supervised = np.zeros(n, dtype=bool)
        supervised[-learnt:] = True
        examples.append(Example(np.array(tokens(n, n), dtype=np.int32), supervised, f"row {n}", (0, n)))
    leaves = [] if adapter is None else [adapter.params[k].requires_grad_() for k in sorted(adapter.params)]
    try:
        want = torch.zeros(())
        for e in examples:
            at = np.flatnonzero(e.supervised)
            ids = torch.from_numpy(e.ids.astype(np.int64))
            want = want + F.cross_entropy(plain_logits(model, adapter, e.ids.tolist())[at - 1], ids[at], reduction="sum") / 7
        theirs = torch.autograd.grad(want, leaves) if leaves else ()
        mix, (member,) = base.mix([adapter], packed=base._pack_with_grad)
        total, unread = forward_loss(base.attached, mix, [Part(member, examples, Sft(), Counts(2, 7))])
        ours = torch.autograd.grad(total, leaves) if leaves else ()
    finally:
        for leaf in leaves:
            leaf.requires_grad_(False)
    assert difference(torch.tensor(unread.read()[0].loss), want.detach()) < 1e-5
    for got, expected in zip(ours, theirs, strict=True):
        assert gradient_difference(got, expected) < 1e-3
