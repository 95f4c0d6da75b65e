"""Segments of a row that begin alike share rows of the batch: losses and gradients are those of segments that stand alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.laws.common import noisy
from tests.tiny import tiny_model, tiny_tokenizer
from trimtab.data.examples import Example, one_row
from trimtab.forward.batch import BASE
from trimtab.forward.packs import Mix
from trimtab.methods import BottleneckConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig
from trimtab.model import Base
from trimtab.objectives import Counts, Sft
from trimtab.train.losses import Part, forward_loss
from trimtab.train.measure import log_probabilities_of

METHODS = {
    "lora": LoraConfig(r=3),
    "dora": LoraConfig(r=2, use_dora=True),
    "bottleneck": BottleneckConfig(reduction_factor=4),
    "prompt": PromptTuningConfig(num_virtual_tokens=3),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3),
}


def _segment(ids: list[int], targets: list[int]) -> Example:
    mask = np.zeros(len(ids), dtype=bool)
    mask[targets] = True
    return Example(np.array(ids, dtype=np.int32), mask, "r:1", (0, 0))


def _rows() -> list[Example]:
    """Three turns whose earlier answers are rewritten; a pair with one prompt; a row of one segment; two segments that share nothing."""
    draw = np.random.default_rng(0).integers(1, 250, size=60).tolist()
    p, a, b = draw[:12], draw[12:18], draw[18:30]
    turns = [_segment([*p, 7, 7, *a], [12, 13, 14, 19]), _segment([*p, *a, *b, 9], [30]), _segment([*p, *a, *b, 8, 8, 9], [30, 31, 32])]
    pair = [_segment([*b, *a, 3], [12, 13, 18]), _segment([*b, *a[:2], 4, 5], [14, 15])]
    apart = [_segment([1, *a], [3]), _segment([2, *a], [3])]
    return [one_row(turns), one_row(pair), _segment(draw[30:45], [5, 9]), one_row(apart)]


def _alone(row: Example) -> Example:
    first, *others = (replace(s, shared=0, others=()) for s in row.segments)
    return replace(first, others=tuple(others))


def test_how_much_is_shared() -> None:
    rows = _rows()
    assert [[s.shared for s in r.segments] for r in rows] == [
        [0, 12, 29],
        [0, 13],
        [0],
        [0, 0],
    ]  # the row that predicts a first target is own
    assert [r.tokens for r in rows] == [20 + (31 - 12) + (33 - 29), 19 + (16 - 13), 15, 14]
    assert [r.targets for r in rows] == [_alone(r).targets for r in rows]


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt2", "qwen3_moe"])
def test_the_base_gives_what_transformers_gives(family: str) -> None:
    base = Base(tiny_model(family), tiny_tokenizer(), name=family)
    segments = [s for row in _rows() for s in row.segments]
    with torch.no_grad():
        found = log_probabilities_of(base.attached, Mix([]), [(BASE, s) for s in segments]).split(
            [int(s.supervised.sum()) for s in segments]
        )
    plain = tiny_model(family)
    for s, own_R in zip(segments, found, strict=True):
        with torch.no_grad():
            logits = plain(input_ids=torch.from_numpy(s.ids.astype(np.int64))[None]).logits[0].float()
        at = np.flatnonzero(s.supervised)
        want = -cross_entropy(logits[at - 1], torch.from_numpy(s.ids[at].astype(np.int64)), reduction="none")
        assert torch.allclose(own_R, want, atol=2e-4), family


@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradients_are_those_of_segments_alone(method: str) -> None:
    base = Base(tiny_model("llama"), tiny_tokenizer(), name="llama")
    adapter = noisy(base, METHODS[method])
    found = {}
    for shared in (True, False):
        params = {k: p.detach().clone().requires_grad_() for k, p in adapter.params.items()}
        packed = base.attached.pack(adapter.method, params, adapter.sites)
        rows = _rows() if shared else [_alone(r) for r in _rows()]
        loss, _ = forward_loss(base.attached, Mix([packed]), [Part(0, rows, Sft(), Counts.of(rows))])
        loss.backward()
        found[shared] = [loss.detach(), *(p.grad for p in params.values() if p.grad is not None)]
    assert len(found[True]) == len(found[False]) > 1
    for a, b in zip(found[True], found[False], strict=True):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max() + 1e-8
