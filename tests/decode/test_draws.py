"""Draws: what they are drawn from is told, and a prompt that several sequences have is computed once, with the same answers."""

from __future__ import annotations

import random

import pytest
import torch

from tests.store.common import stir_
from tests.train.common import tiny_base
from trimtab.decode import generate as module
from trimtab.decode.generate import Sampling, generate
from trimtab.decode.sampling import drawn_from
from trimtab.methods import LoraConfig, PrefixTuningConfig
from trimtab.store import Adapter


def test_what_is_drawn_from() -> None:
    logits, ids = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)), torch.tensor([4, 0, 19])
    logp, entropy = drawn_from(logits, ids, [1.0, 0.5, 2.0])
    for i, temperature in enumerate((1.0, 0.5, 2.0)):
        one = torch.distributions.Categorical(logits=logits[i] / temperature)
        torch.testing.assert_close(logp[i], one.log_prob(ids[i]))
        torch.testing.assert_close(entropy[i], one.entropy())


def test_a_prompt_is_computed_once_for_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of three answers of two adapters and the base; alone, each answer has a prompt of its own."""
    base = tiny_base()
    adapters = [Adapter.create(base, method, seed=3) for method in (LoraConfig(r=4), PrefixTuningConfig(num_virtual_tokens=3))]
    for adapter in adapters:
        for tensor in adapter.params.values():
            stir_(tensor, torch.Generator().manual_seed(4))
    who = [who for who in (None, *adapters) for _ in range(3)]
    mix, members = base.mix(who)
    prompts = [list(range(5, 17))] * len(who)
    rows: list[int] = []
    feed = module.feed

    def counted(attached: object, mix: object, cache: object, pieces: list[object]) -> object:
        rows.append(sum(len(p.ids) for p in pieces))  # type: ignore[attr-defined]
        return feed(attached, mix, cache, pieces)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "feed", counted)
    how = [Sampling(6, temperature=1.0 + 0.1 * i) for i in range(len(who))]
    heard: list[tuple[int, int]] = []

    def hear(order: list[int], logits_BV: torch.Tensor, id_B: torch.Tensor) -> None:
        heard.extend(zip(order, id_B.tolist(), strict=True))

    together = generate(base.attached, mix, members, prompts, how, set(), generators=[random.Random(i) for i in range(9)], on_draw=hear)  # type: ignore[arg-type]
    assert rows == [36, 9, 9, 9, 9, 9], "three prompts, nine sequences"
    for i in range(len(who)):
        (alone,) = generate(base.attached, mix, members[i : i + 1], prompts[:1], how[i], set(), generators=[random.Random(i)])
        assert alone == together[i] == [token for n, token in heard if n == i]
    assert len({tuple(t) for t in together}) == 9
