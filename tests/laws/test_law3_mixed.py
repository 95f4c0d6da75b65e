"""Law 3: a mixed batch of every method, of LoRAs of different rank, alpha and targets, and of the base equals each alone.

Both ways of running: by span (full forwards, prefill) and gathered (decoding many short spans), with and without the KV cache.
"""

import importlib
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.laws.common import CASES, adapter_of, adapters_of, base_of, cached_logits, difference, method_of, noisy, solo, tokens
from tests.tiny import FAMILIES
from trimtab import ops
from trimtab.decode.generate import Sampling
from trimtab.forward import decode_path
from trimtab.forward.attached import Attached
from trimtab.methods import LoraConfig
from trimtab.ops import native


def _shuffle(items, seed):
    return [items[i] for i in torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()]


def _two_loras(base):
    """Different rank, alpha and targets; they meet at one module and miss each other at another."""
    first, second = base.spec.defaults.ia3_targets[-1], base.spec.defaults.lora_targets[0]
    return [
        noisy(base, LoraConfig(r=5, lora_alpha=3, target_modules=(first, second)), seed=50),
        noisy(base, LoraConfig(r=1, lora_alpha=7, target_modules=(second,)), seed=51),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_at_once_equals_each_alone(family):
    """Three sequences of every adapter and of the base, lengths 1 to 29, in an order that interleaves them."""
    base = base_of(family)
    everyone = [None, *adapters_of(family).values(), *_two_loras(base)]
    entries = _shuffle([(a, tokens(1 + (7 * i + 11 * k) % 29, 10 * i + k)) for i, a in enumerate(everyone) for k in range(3)], seed=3)
    adapters, sequences = [a for a, _ in entries], [s for _, s in entries]
    for got, want in zip(base.logits(sequences, adapters), solo(base, sequences, adapters), strict=True):
        assert difference(got, want) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text", "gpt2"])
def test_long_sequences_equal_each_alone(family):
    """Longer than a block of the attention and than any window; two long ones of like length share a bucket behind different prefixes."""
    base = base_of(family)
    cases = ["lora-0", "prompt-0", "prefix-0", "prefix-1", "ia3-0"]
    entries = [(adapter_of(family, c), tokens(ops.QUERY_BLOCK + 17 + 9 * i, i)) for i, c in enumerate(cases)]
    entries += [
        (None, tokens(2 * ops.QUERY_BLOCK, 40)),
        (None, tokens(3, 41)),
        (adapter_of(family, "prefix-0"), tokens(ops.QUERY_BLOCK, 42)),
    ]
    adapters, sequences = [a for a, _ in entries], [s for _, s in entries]
    for got, want in zip(base.logits(sequences, adapters), solo(base, sequences, adapters), strict=True):
        assert difference(got, want) <= 1e-5


def _twin(base, case):
    """Another adapter of the same method, of another rank where there is one: kernels gather only where several adapters share them."""
    method = method_of(case, base.spec)
    changed = {"r": lambda r: r + 1, "reduction_factor": lambda f: 2 * f}
    method = replace(method, **{f: change(getattr(method, f)) for f, change in changed.items() if hasattr(method, f)})
    return noisy(base, method, seed=100 + CASES.index(case))


def _without_native(monkeypatch):
    """As on a machine without a compiler, or on a GPU."""
    monkeypatch.setattr(native, "available", lambda *tensors: False)
    monkeypatch.setattr(Attached, "decode_path", None)


@cache
def _of_everyone(family):
    """(adapters, sequences, each one's logits in a full forward of its own): two sequences of each, in an order that interleaves them."""
    base = base_of(family)
    everyone = [None, *adapters_of(family).values(), *_two_loras(base), *(_twin(base, c) for c in CASES)]
    entries = _shuffle([(a, tokens(10 + (i + k) % 4, 20 * i + k)) for i, a in enumerate(everyone) for k in range(2)], seed=4)
    adapters, sequences = [a for a, _ in entries], [s for _, s in entries]
    return adapters, sequences, solo(base, sequences, adapters)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_everything_at_once_equals_full_forwards(family, compiled, monkeypatch):
    """One token of every adapter a step, through the cache and the kernels of few rows, against one full forward of each."""
    base, gathered, real = base_of(family), set(), ops.gathers
    adapters, sequences, alone = _of_everyone(family)
    if compiled and native.load()[0] is None:
        pytest.skip(native.load()[1])
    if not compiled:
        _without_native(monkeypatch)
    elif family in decode_path.FAMILIES:
        assert base.attached.decode_path is not None, "the decode path does not agree with the model's own"

    def spy(rows, packs):
        caller = sys._getframe(1)  # the kernel that asks
        gathered.add((caller.f_code.co_qualname, getattr(caller.f_locals.get("self"), "parallel", None), real(rows, packs)))
        return real(rows, packs)

    monkeypatch.setattr(ops.edit, "gathers", spy)
    chunks = [[6] + [1] * (len(s) - 6) for s in sequences]  # prefill by span, then decode
    cached = cached_logits(base, sequences, adapters, chunks)
    both_ways = {
        (k, p, way)
        for k, p in [("lora", None), ("dora", None), ("_scale", None), ("Bottleneck.__call__", True), ("Bottleneck.__call__", False)]
        for way in (True, False)
    }
    both_ways |= {(k, p, way) for k, p, _ in gathered for way in (True, False)}  # those of new methods too
    if not compiled:
        assert gathered == both_ways, "every kernel must have run both ways"
    for got, want in zip(cached, alone, strict=True):
        assert difference(got, want) <= 1e-5


@st.composite
def _chunked(draw):
    """Sequences cut into pieces of arbitrary sizes, each under some adapter: what continuous batching feeds."""
    chunks = draw(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=7))
    return [(draw(st.sampled_from([None, *CASES])), c) for c in chunks]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(family=st.sampled_from(list(FAMILIES)), entries=_chunked())
def test_any_chunks_of_any_mix_equal_full_forwards(family, entries):
    base = base_of(family)
    adapters = [c and adapter_of(family, c) for c, _ in entries]
    sequences, chunks = [tokens(sum(c), i) for i, (_, c) in enumerate(entries)], [c for _, c in entries]
    for got, want in zip(cached_logits(base, sequences, adapters, chunks), solo(base, sequences, adapters), strict=True):
        assert difference(got, want) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_generation_equals_solo_generation(family, monkeypatch):
    """More sequences than there are places in the cache: prompts enter beside sequences that decode, in places that others have left."""
    monkeypatch.setattr(importlib.import_module("trimtab.decode.generate"), "MAX_LIVE", 7)
    base = base_of(family)
    everyone = _shuffle([None, *adapters_of(family).values(), *_two_loras(base)], seed=5)
    prompts = [tokens(3 + i % 11, 300 + i) for i in range(len(everyone))]
    mixed = base.generate_ids(prompts, everyone, Sampling(max_new_tokens=10))
    assert sum(map(len, mixed)) > 5 * len(prompts), "the stop token came too early for this test to say much"
    for prompt, adapter, got in zip(prompts, everyone, mixed, strict=True):
        assert got == base.generate_ids([prompt], [adapter], Sampling(max_new_tokens=10))[0]


def test_mixed_sampling_equals_its_own_stream():
    """Sequence i draws from (seed, i) alone, whatever its neighbours are."""
    base, adapter = base_of("llama"), adapter_of("llama", "lora-0")
    prompts, sampling = [tokens(5, 1), tokens(9, 2)], Sampling(max_new_tokens=8, temperature=1.0, top_p=0.9, top_k=50, seed=3)
    one = base.generate_ids(prompts, [adapter, None], sampling)
    assert one == base.generate_ids(prompts, [adapter, None], sampling)
    assert one[0] == base.generate_ids([prompts[0]], [adapter], sampling)[0]
    assert one[0] == base.generate_ids([prompts[0], prompts[0], prompts[1]], [adapter, None, adapter], sampling)[0]
