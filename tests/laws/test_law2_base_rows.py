"""Law 2: base rows in any mixed batch equal the base alone."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.laws.common import CASES, adapter_of, base_of, cached_logits, difference, tokens
from tests.tiny import FAMILIES

MIXES = st.lists(st.tuples(st.sampled_from(CASES), st.integers(1, 24)), min_size=1, max_size=8)
BASE_LENGTHS = st.lists(st.integers(1, 24), min_size=1, max_size=3)
QUICK = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def _shuffled(family, mix, lengths, seed):
    """(case or None, ids) of every sequence, in an order drawn from `seed`."""
    entries = [(adapter_of(family, c), tokens(n, 7 + i)) for i, (c, n) in enumerate(mix)] + [
        (None, tokens(n, 99 + i)) for i, n in enumerate(lengths)
    ]
    order = torch.randperm(len(entries), generator=torch.Generator().manual_seed(seed)).tolist()
    return [entries[i] for i in order]


@QUICK
@given(family=st.sampled_from(list(FAMILIES)), mix=MIXES, lengths=BASE_LENGTHS, seed=st.integers(0, 999))
def test_base_rows_equal_the_base_alone(family, mix, lengths, seed):
    base, entries = base_of(family), _shuffled(family, mix, lengths, seed)
    mixed = base.logits([ids for _, ids in entries], [a for a, _ in entries])
    for (adapter, ids), got in zip(entries, mixed, strict=True):
        if adapter is None:
            assert difference(got, base.logits([ids])[0]) <= 1e-5


@QUICK
@given(family=st.sampled_from(list(FAMILIES)), mix=MIXES, lengths=BASE_LENGTHS, seed=st.integers(0, 999))
def test_base_rows_equal_the_base_alone_when_decoding(family, mix, lengths, seed):
    """With a KV cache and one token at a time, where kernels gather."""
    base, entries = base_of(family), _shuffled(family, mix, lengths, seed)
    sequences = [ids for _, ids in entries]
    mixed = cached_logits(base, sequences, [a for a, _ in entries], [[1] * len(s) for s in sequences])
    for (adapter, ids), got in zip(entries, mixed, strict=True):
        if adapter is None:
            assert difference(got, base.logits([ids])[0]) <= 1e-5
