"""Law 14: what was computed from tensors does not outlive them. Whatever is written to, in whichever way, the next use is that of an object
made anew of what stands there now."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from itertools import product
from weakref import ref

import pytest
import torch
from torch import Tensor

from tests.laws.common import CASES, cached_logits, difference, method_of, noisy, tokens
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer
from trimtab.bases.copies import copied
from trimtab.bases.weights.derived import Stamp
from trimtab.decode.generate import Sampling
from trimtab.forward import decode_path
from trimtab.methods import LoraConfig, PromptTuningConfig
from trimtab.model import Base
from trimtab.store import Adapter

PROMPTS = [tokens(9, 1), tokens(6, 2)]
CHUNKS = [[6, 1, 1, 1], [3, 1, 1, 1]]


def _each(write: Callable[[Tensor, Tensor], object]) -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None]:
    def writer(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, target in targets.items():
                write(target, values[name])

    return writer


def _in_inference_mode(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.inference_mode():
        for name, target in targets.items():
            target.copy_(values[name])


def _fused_optimizer(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """A step towards the new values. torch counts no write of a fused optimizer."""
    leaves = [t.detach().requires_grad_() for t in targets.values()]
    for leaf, value in zip(leaves, values.values(), strict=True):
        leaf.grad = leaf.detach() - value
    torch.optim.AdamW(leaves, lr=0.1, fused=True).step()


WRITERS = {
    "copy_": _each(lambda t, v: t.copy_(v)),
    "add_": _each(lambda t, v: t.add_(v - t)),
    "inference mode": _in_inference_mode,
    "fused optimizer": _fused_optimizer,
    ".data": _each(lambda t, v: t.data.copy_(v)),
    ".data =": _each(lambda t, v: setattr(t, "data", v.clone())),
}


FEW_WRITERS = ("copy_", "fused optimizer")
"""One that torch counts, one that it does not."""


def use(base: Base, adapters: list[Adapter | None]) -> list[Tensor]:
    """All that is computed with and without a cache: logits of whole prompts, logits by chunks and single tokens, greedy tokens."""
    found = [*base.logits(PROMPTS, adapters), *cached_logits(base, PROMPTS, adapters, CHUNKS)]
    return found + [torch.tensor(ids) for ids in base.generate_ids(PROMPTS, adapters, Sampling(max_new_tokens=5))]


def fresh(base: Base, adapters: list[Adapter | None]) -> list[Tensor]:
    """The same from objects that have never computed anything."""
    other = Base(copied(base.model), tiny_tokenizer())
    return use(other, [a and Adapter(other, a.method, {k: t.detach().clone() for k, t in a.params.items()}) for a in adapters])


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def state(model) -> dict[str, Tensor]:
    return dict(model.named_parameters())


@pytest.mark.parametrize(("case", "writer"), [*product(CASES, FEW_WRITERS), *product(["lora-0"], sorted(WRITERS.keys() - FEW_WRITERS))])
def test_an_adapters_tensors(case: str, writer: str) -> None:
    """Every method: factors, DoRA's magnitudes, prefixes, prompts' keys and values, saved modules."""
    base = Base(tiny_model("llama"), tiny_tokenizer())
    adapter = noisy(base, method_of(case, base.spec))
    before = use(base, [adapter, None])
    WRITERS[writer](adapter.params, noisy(base, adapter.method, seed=7, scale=0.3).params)
    after = use(base, [adapter, None])
    assert same(after, fresh(base, [adapter, None])) and not torch.equal(after[0], before[0])


def test_a_large_adapters_tensors_after_one_step_of_an_optimizer() -> None:
    """A write that changes a part of an adapter: B moves at LoRA's first step, A does not."""
    base = Base(tiny_model("llama", dtype=torch.bfloat16), tiny_tokenizer())
    adapter = Adapter.create(base, LoraConfig(r=8))
    before = use(base, [adapter, None])
    adapter.params = {k: t.requires_grad_() for k, t in adapter.params.items()}
    base.logits(PROMPTS, [adapter, None], grad=True)[0].float().square().sum().backward()
    use(base, [adapter, None])
    torch.optim.AdamW(adapter.params.values(), lr=1e-2, fused=True).step()
    after = use(base, [adapter, None])
    assert same(after, fresh(base, [adapter, None])) and not torch.equal(after[0], before[0])


def test_an_adapters_method_and_its_whole_mapping() -> None:
    base = Base(tiny_model("llama"), tiny_tokenizer())
    adapter, other = (noisy(base, LoraConfig(r=2), seed=s) for s in (1, 2))
    use(base, [adapter, None])
    adapter.params = other.params
    assert same(use(base, [adapter, None]), fresh(base, [other, None]))
    adapter.method = LoraConfig(r=2, lora_alpha=32)
    adapter.sites = adapter.method.sites(base.spec)
    assert same(use(base, [adapter, None]), fresh(base, [adapter, None]))


BASES = {f"{family}-{str(dtype)[6:]}": (family, dtype) for family in FAMILIES for dtype in (torch.float32, torch.bfloat16)}


def users(base: Base) -> list[Adapter]:
    """Adapters whose packed copies hold something of the base: DoRA's norms, a prompt's keys and values."""
    return [noisy(base, LoraConfig(r=2, use_dora=True)), noisy(base, PromptTuningConfig(num_virtual_tokens=3))]


@pytest.mark.parametrize(
    ("name", "writer"),
    [
        *(
            pytest.param(*each, marks=() if each[0].startswith(("llama", "gpt2")) else pytest.mark.slow)
            for each in product(BASES, FEW_WRITERS)
        ),
        *product(["llama-bfloat16"], sorted(WRITERS.keys() - FEW_WRITERS)),
    ],
)
def test_the_bases_weights(name: str, writer: str) -> None:
    family, dtype = BASES[name]
    base, new = Base(tiny_model(family, dtype=dtype), tiny_tokenizer()), tiny_model(family, seed=5, dtype=dtype)
    every: list[list[Adapter | None]] = [[None, None], [*users(base)]]
    before = [use(base, adapters) for adapters in every]
    WRITERS[writer](state(base.model), state(new))
    after = [use(base, adapters) for adapters in every]
    for a, b, adapters in zip(after, before, every, strict=True):
        assert same(a, fresh(base, adapters)) and not torch.equal(a[0], b[0])
    if dtype == torch.float32:
        theirs = copied(base.model)
        for got, ids in zip(after[0][2:4], PROMPTS, strict=True):
            assert difference(got, theirs(torch.tensor([ids])).logits[0].detach()) <= 1e-3


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_that_is_loaded_into_the_base(assign: bool) -> None:
    base, new = Base(tiny_model("qwen2", dtype=torch.bfloat16), tiny_tokenizer()), tiny_model("qwen2", seed=5, dtype=torch.bfloat16)
    use(base, [None, None])
    base.model.load_state_dict(new.state_dict(), assign=assign)
    assert same(use(base, [None, None]), fresh(base, [None, None]))
    assert same(use(base, [None, None]), use(Base(new, tiny_tokenizer()), [None, None]))


def test_between_two_steps_over_one_cache() -> None:
    """Counted writes are seen at each forward."""
    base = Base(tiny_model("llama", dtype=torch.bfloat16), tiny_tokenizer())
    first = base.attached.decode_path
    assert first is None or first is base.attached.decode_path
    with torch.no_grad():
        base.model.model.norm.weight.add_(0.5)
    assert first is None or first is not base.attached.decode_path


def test_no_copy_is_leaked() -> None:
    """One packed copy at a time, though a mix that has run the first one lives on."""
    base = Base(tiny_model("llama", dtype=torch.bfloat16), tiny_tokenizer())
    if base.attached.decode_path is None:
        pytest.skip("no decode path on this machine")
    mix, _ = base.mix([noisy(base, LoraConfig(r=2))])
    seen = []
    for _ in range(3):
        use(base, [None, None])
        mix.tables[base.attached.decode_path] = None  # as the forward keeps tables there, by what has run
        seen.append(ref(base.attached.decode_path))
        with torch.no_grad():
            base.model.model.embed_tokens.weight.mul_(1.1)
    use(base, [None, None])
    gc.collect()
    assert [s() is None for s in seen] == [True] * 3
    base.attached.drop_copies()
    last = ref(base.attached.decode_path)
    base.attached.drop_copies()
    gc.collect()
    assert last() is None


def test_tensors_that_torch_counts_no_writes_for() -> None:
    with torch.inference_mode():
        tensor, odd = torch.zeros(1000), torch.full((3, 4), torch.nan).T
        stamp = Stamp([tensor, odd])
        assert stamp.unwritten() and stamp.holds([tensor, odd])
        tensor += 1
        assert not stamp.unwritten() and not stamp.holds([tensor, odd])
        assert not Stamp([odd]).holds([odd.clone()]), "another tensor in its place"


def test_tensors_of_every_layout() -> None:
    """Written past the counter, everywhere: transposed, sliced, scalar, empty."""
    whole = torch.zeros(40, 50)
    for tensor in (
        whole,
        whole.T,
        whole[3:30:2, 5:9],
        whole[:, 7],
        torch.zeros(()),
        torch.zeros(1),
        torch.zeros(2, 3, 70).permute(2, 0, 1),
    ):
        stamp = Stamp([tensor, torch.zeros(0), torch.zeros(3, dtype=torch.bool)])
        assert stamp.holds(stamp.tensors)
        tensor.data.add_(1.0)
        assert not stamp.holds(stamp.tensors), tensor.stride()


assert set(decode_path.FAMILIES) <= set(FAMILIES)
