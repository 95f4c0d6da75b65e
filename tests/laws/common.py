"""What the laws share: every method as a case, tiny bases, adapters that clearly do something, how two results are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.tiny import tiny_model, tiny_tokenizer
from trimtab.bases.spec import Spec
from trimtab.forward.batch import BASE, Piece
from trimtab.forward.kv_cache import KVCache
from trimtab.methods import METHODS, IA3Config, LoraConfig, Method
from trimtab.model import Base
from trimtab.store import Adapter


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices: a second thread only waits for the first, for long where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


REQUIRED = {"LORA", "IA3", "BOTTLENECK", "PROMPT_TUNING", "PREFIX_TUNING"}
EXAMPLES: dict[str, Method] = {f"{cls.name}-{i}": m for cls in METHODS.values() for i, m in enumerate(cls.examples())}
"""The whole registry: id -> one small configuration. A new method is under the laws as soon as its file is imported."""


def _last(name: str) -> str:
    return name.rpartition(".")[2]


EXTRAS: dict[str, Callable[[Spec], Method]] = {
    "lora-embedding": lambda s: LoraConfig(r=2, target_modules=(_last(s.embedding), *s.defaults.lora_targets)),
    "lora-head": lambda s: LoraConfig(r=3, lora_alpha=5, target_modules=(s.head,)),
    "lora-saved": lambda s: LoraConfig(
        r=2, target_modules=s.defaults.lora_targets, modules_to_save=(s.head, *s.defaults.ia3_feedforward, _final_norm(s))
    ),
    "ia3-saved": lambda s: IA3Config(modules_to_save=(s.embedding, _final_norm(s))),
}
"""What examples() cannot say for every family at once, since it names modules: embeddings, the head, whole modules trained in full."""

CASES = [*EXAMPLES, *EXTRAS]


def _final_norm(spec: Spec) -> str:
    return next(m.name for m in spec.modules.values() if m.kind == "norm" and m.layer is None)


def method_of(case: str, spec: Spec) -> Method:
    return EXAMPLES[case] if case in EXAMPLES else EXTRAS[case](spec)


@cache
def base_of(family: str) -> Base:
    """One base a family, shared by all laws: law 8 says that nothing can change it."""
    return Base(tiny_model(family), tiny_tokenizer())


@cache
def plain_of(family: str):
    """The same weights in transformers' own hands, with its own eager attention."""
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    return model.requires_grad_(False)


def noisy(base: Base, method: Method, seed: int = 1, scale: float = 0.1) -> Adapter:
    """An adapter with every tensor perturbed, so that nothing is right by being zero, one, or a copy of the base."""
    adapter = Adapter.create(base, method, seed=seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    adapter.params = {k: t + scale * torch.randn(t.shape, generator=generator) for k, t in adapter.params.items()}
    return adapter


@cache
def adapter_of(family: str, case: str) -> Adapter:
    base = base_of(family)
    return noisy(base, method_of(case, base.spec), seed=CASES.index(case))


def adapters_of(family: str) -> dict[str, Adapter]:
    return {case: adapter_of(family, case) for case in CASES}


def by_outputs(module) -> Tensor:
    """A module's weight as (out, in): transformers' Conv1D keeps (in, out)."""
    return module.weight.T if type(module).__name__ == "Conv1D" else module.weight


def with_dropout(method: Method, p: float) -> Method:
    """The method with dropout on, where it has one."""
    names = [f for f in ("lora_dropout", "dropout") if hasattr(method, f)]
    start = {"init_lora_weights": True} if hasattr(method, "init_lora_weights") and p else {}  # some starts allow no dropout
    return replace(method, **dict.fromkeys(names, p), **start)


def tokens(n: int, seed: int) -> list[int]:
    return torch.randint(256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def difference(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference, relative to the largest value where that is above 1."""
    assert got.shape == want.shape, (got.shape, want.shape)
    return float((got - want).abs().max() / want.abs().max().clamp_min(1.0))


def gradient_difference(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference relative to the largest value; 0 where both are exactly zero."""
    assert got.shape == want.shape, (got.shape, want.shape)
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-12))


def solo(base: Base, sequences: Sequence[Sequence[int]], adapters: Sequence[Adapter | None]) -> list[Tensor]:
    """Each sequence in a forward of its own."""
    return [base.logits([s], [a])[0] for s, a in zip(sequences, adapters, strict=True)]


@torch.no_grad()
def cached_logits(
    base: Base, sequences: Sequence[Sequence[int]], adapters: Sequence[Adapter | None], chunks: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Logits of each sequence, fed through the KV cache: chunks[i] are the sizes of sequence i's pieces; step j feeds the j-th of each."""
    mix, members = base.mix(adapters)
    spec = base.spec
    past = [0 if m == BASE else mix.adapters[m].virtual_tokens for m in members]
    capacity = max(p + len(s) for p, s in zip(past, sequences, strict=True))
    cache_ = KVCache(spec.num_layers, len(sequences), capacity, *spec.kv_shape, base.dtype, base.device)
    for slot, m in enumerate(members):
        if past[slot]:
            cache_.put(slot, *mix.adapters[m].stored_prefix())
    fed, out = [0] * len(sequences), [[] for _ in sequences]
    for step in range(max(map(len, chunks))):
        now = [i for i, c in enumerate(chunks) if step < len(c)]
        pieces = [Piece(torch.tensor(sequences[i][fed[i] : fed[i] + chunks[i][step]]), members[i], i, past[i] + fed[i]) for i in now]
        batch = base.batch(pieces, mix, cache=cache_)
        logits_TV = base.attached.head(base.attached.forward(batch), batch, range(batch.total))
        for i, (a, b) in zip(now, batch.where, strict=True):
            out[i].append(logits_TV[a:b])
            fed[i] += b - a
    return [torch.cat(o) for o in out]
