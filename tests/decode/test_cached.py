"""The parts of a loop over a cache, beside transformers' own forward of whole sequences with the methods written plainly."""

from __future__ import annotations

import pytest
import torch

from tests.laws.common import adapter_of, base_of, difference, plain_of, tokens
from tests.laws.plain import plain_logits
from trimtab.decode.cached import Pages, continue_prompts, feed, virtual_tokens, write_prefix
from trimtab.forward.batch import BASE, Piece

FAMILY = "llama"
ADAPTERS = ("prefix-0", None, "lora-0", "prompt-0", None)
"""Not in the order in which a batch lays them out."""


@pytest.fixture(scope="module")
def mixed():
    """(base, mix, members, the adapters themselves)."""
    adapters = [adapter_of(FAMILY, name) if name else None for name in ADAPTERS]
    return base_of(FAMILY), *base_of(FAMILY).mix(adapters), adapters


def whole(adapter, ids) -> torch.Tensor:
    """Logits of the last token, from transformers."""
    with torch.no_grad():
        return plain_logits(plain_of(FAMILY), adapter, list(ids))[-1]


@pytest.mark.parametrize("asked", [range(5), [3, 0], [4], []])
def test_rows_come_in_the_order_in_which_they_are_asked(mixed, asked):
    base, mix, members, adapters = mixed
    texts, virtual = [tokens(4 + 3 * i, i) for i in range(len(members))], virtual_tokens(mix, members)
    pages = Pages(base.attached, [40] * len(members), len(members))
    places = [pages.take(i) for i in range(len(members))]
    for place, m in zip(places, members, strict=True):
        if m != BASE:
            write_prefix(pages.kv, place, mix.adapters[m])
    with torch.no_grad():
        logits = None
        for a, b in ((0, 2), (2, None)):  # the second forward finds the first's keys in the cache
            pieces = [Piece(torch.tensor(t[a:b]), members[i], places[i], virtual[i] + a) for i, t in enumerate(texts)]
            logits = feed(base.attached, mix, pages.kv, pieces).logits(asked)
    assert logits.shape == (len(asked), base.spec.vocab_size)
    for got, i in zip(logits, asked, strict=True):
        assert difference(got, whole(adapters[i], texts[i])) < 1e-4, ADAPTERS[i]


def test_each_round_continues_the_prompts_and_not_the_round_before(mixed):
    """One prompt is empty, and one takes no part in the longer round."""
    base, mix, members, adapters = mixed
    prompts = [tokens(n, 50 + i) for i, n in enumerate((6, 3, 0, 5, 9))]
    rounds = [[(i, tokens(7 - i, 60 + i)) for i in range(5)], [(i, tokens(2 + i, 70 + i)) for i in (3, 0, 4, 2)]]
    given = [[(i, torch.tensor(ids)) for i, ids in asked] for asked in rounds]
    with torch.no_grad():
        found = [
            fed.logits(range(len(asked)))
            for asked, fed in zip(
                rounds, continue_prompts(base.attached, mix, members, [torch.tensor(p).long() for p in prompts], given), strict=True
            )
        ]
    for asked, logits in zip(rounds, found, strict=True):
        for got, (i, ids) in zip(logits, asked, strict=True):
            assert difference(got, whole(adapters[i], prompts[i] + ids)) < 1e-4, (ADAPTERS[i], ids)
