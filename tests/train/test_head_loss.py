"""The loss at the output head: in chunks as in one piece, edited or not, in the memory that the estimate says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.laws.common import base_of, gradient_difference, noisy, plain_of, tokens
from trimtab import ops
from trimtab.bases.structure import read_spec
from trimtab.bases.weights import weight_of
from trimtab.cost.activations import activation_bytes
from trimtab.data import Example
from trimtab.forward.batch import BASE
from trimtab.forward.packs import Mix
from trimtab.methods import LoraConfig
from trimtab.objectives import Counts, Sft
from trimtab.store import Adapter
from trimtab.train.losses import Part, forward_loss

LENGTHS = {BASE: (7, 12), 0: (9, 4), 1: (11, 3)}
"""Tokens of each member's rows: with chunks of 5 targets, most chunks hold rows of two members and begin amid a sequence."""


def examples(member: int) -> list[Example]:
    made = []
    for i, n in enumerate(LENGTHS[member]):
        supervised = np.arange(n) % 4 != 0
        made.append(Example(np.array(tokens(n, 10 * member + i), dtype=np.int32), supervised, "row", (member, i)))
    return made


def by_hand(family: str, adapters: list[Adapter], scales: dict[int, float]) -> tuple[list[Tensor], list[Tensor]]:
    """(each member's loss, the gradients of all factors): transformers' hidden states, W h + s B A h, the loss of each target alone."""
    model = plain_of(family)
    leaves = [{k.rpartition("lora_")[2][0]: t.detach().clone().requires_grad_() for k, t in a.params.items()} for a in adapters]
    losses = []
    for member in LENGTHS:
        loss = torch.zeros(())
        for e in examples(member):
            ids = torch.from_numpy(e.ids.astype(np.int64))
            h = model.get_submodule(base_of(family).spec.body)(ids[None]).last_hidden_state[0]
            for t in np.flatnonzero(e.supervised):
                logits = model.lm_head(h[t - 1])
                if member != BASE:
                    method, own = adapters[member].method, leaves[member]
                    logits = logits + method.lora_alpha / method.r * (own["B"] @ (own["A"] @ h[t - 1]))
                if (cap := base_of(family).spec.final_softcap) is not None:
                    logits = torch.tanh(logits / cap) * cap
                loss = loss - scales[member] * torch.log_softmax(logits, -1)[ids[t]]
        losses.append(loss)
    torch.stack(losses).sum().backward()
    return losses, [leaf.grad for own in leaves for leaf in (own["A"], own["B"])]


@pytest.mark.parametrize("rows", [5, 1, 1024])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_edited_head_in_chunks(family: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk's rows meet their own adapters and their own targets."""
    monkeypatch.setattr(ops.loss, "LOSS_ROWS", rows)
    base, counts = base_of(family), {BASE: 2, 0: 4, 1: 8}
    adapters = [noisy(base, LoraConfig(r=r, lora_alpha=5, lora_dropout=0.0, target_modules=("lm_head",)), seed=r) for r in (2, 3)]
    params = [{k: t.clone().requires_grad_() for k, t in a.params.items()} for a in adapters]
    mix = Mix([base.attached.pack(a.method, p, a.sites) for a, p in zip(adapters, params, strict=True)])
    total, unread = forward_loss(base.attached, mix, [Part(m, examples(m), Sft(), Counts(1, counts[m])) for m in LENGTHS])
    total.backward()
    want, gradients = by_hand(family, adapters, {m: 1 / n for m, n in counts.items()})
    losses = [o.loss for o in unread.read()]
    assert losses == pytest.approx([float(w.detach()) for w in want], rel=1e-4)
    assert float(total.detach()) == pytest.approx(sum(losses), rel=1e-5)
    got = [p[k].grad for p in params for k in sorted(p)]
    assert all(gradient_difference(g, w) <= 1e-4 for g, w in zip(got, gradients, strict=True))


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that was held at a time, by torch's own count of allocations."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [(e.start_ns(), e.nbytes()) for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    return int(np.cumsum([size for _, size in sorted(events)]).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_estimate_of_the_head_is_what_it_takes(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The difference that a larger vocabulary makes: all else is the same."""
    for rows in (1024, 32):
        monkeypatch.setattr(ops.loss, "LOSS_ROWS", rows)
        (small, less), (large, more) = (_head_bytes(family, dtype, vocabulary, 96) for vocabulary in (3000, 9000))
        assert large - small == pytest.approx(more - less, rel=0.08), rows


def _head_bytes(family: str, dtype: torch.dtype, vocabulary: int, rows: int) -> tuple[int, int]:
    """(measured in a loss and its backward, estimated for a step)."""
    config = plain_of(family).config
    config = type(config).from_dict(config.to_dict() | {"vocab_size": vocabulary})
    with torch.device("meta"):
        spec = read_spec(type(plain_of(family))(config))
    hidden_RH = torch.randn(rows, spec.hidden_size, dtype=dtype).requires_grad_()
    head = weight_of(torch.nn.Linear(spec.hidden_size, vocabulary, bias=False, dtype=dtype).requires_grad_(False))
    others = None, torch.arange(rows), torch.ones(rows), spec.final_softcap
    measured = peak_bytes(lambda: ops.supervised_loss(hidden_RH, head, *others)[0].backward())
    return measured, activation_bytes(spec, [], dtype, rows, rows)
