"""Tiny random bases taken through a forward, a generation and a training step, as `trimtab doctor` does: whether the libraries that are
installed here and trimtab fit together. No model, no tokenizer and no network is needed.

Results are compared with transformers' own forward of the same weights in fp32.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy

from trimtab.bases import BUNDLED_NAMES, Check, default_dtype, guarded, resolve_device
from trimtab.bases.fits import available_bytes
from trimtab.bases.shapes import read_architecture
from trimtab.cost.plan import plan
from trimtab.data import Example
from trimtab.decode.generate import Sampling
from trimtab.methods import METHODS, LoraConfig, Method
from trimtab.model import Base
from trimtab.store import Adapter
from trimtab.train.options import TrainOptions, VariantConfig
from trimtab.train.step import run_step
from trimtab.train.variant import Variant

VOCAB = 96
LENGTHS = (19, 1, 12)
NEW_TOKENS = 6
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
FAMILIES = {"llama": SIZES | {"num_key_value_heads": 2, "intermediate_size": 128}, "gpt2": SIZES}
"""One whose modules trimtab replaces where it can, and one that runs as transformers wrote it."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Of the difference's norm, relative to that of what is expected."""
ADVICE = "these versions of torch, transformers and trimtab do not fit together: install trimtab into an environment of its own."


def try_out() -> list[Check]:
    """The findings "forward", "training" and "needs". Never raises."""
    checks = [guarded("forward", _forward), guarded("training", _training)]
    return [*(c if c.ok else Check(c.name, c.value, False, ADVICE) for c in checks), guarded("needs", _needs)]


def _needs() -> Check:
    """What `trimtab plan` says of a LoRA on the bundled base, beside what is free."""
    device = resolve_device(None)
    costs = plan(read_architecture(BUNDLED_NAMES[0]), LoraConfig(), dtype=_name(default_dtype(device)))
    free = available_bytes(device)
    value = (
        f"a LoRA on the bundled base: {costs.train_peak_bytes / 1e9:.2f} GB to train, {costs.serve_peak_bytes / 1e9:.2f} GB to serve, "
        f"{free / 1e9:.1f} GB are free on {device}"
    )
    ok = max(costs.train_peak_bytes, costs.serve_peak_bytes) <= free
    return Check("needs", value, ok, "" if ok else "make memory free, or train with a smaller max_tokens.")


def _tiny(family: str, dtype: torch.dtype, device: torch.device) -> tuple[Base, Any]:
    """A base, and transformers' own model of the same weights in fp32."""
    config = transformers.AutoConfig.for_model(
        family, vocab_size=VOCAB, bos_token_id=None, eos_token_id=None, initializer_range=0.2, **FAMILIES[family]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(device, dtype).eval()
    twin = deepcopy(model).float()
    return Base(model, None), twin


def _sequences() -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, VOCAB, n).tolist() for n in LENGTHS]


@torch.no_grad()
def _logits(twin: Any, ids: list[int]) -> Tensor:
    return twin(torch.tensor([ids], device=twin.device), use_cache=False).logits[0]


def _forward() -> Check:
    """Several sequences in one forward, and a generation with a cache, against one sequence at a time without."""
    device = resolve_device(None)
    dtypes = list(dict.fromkeys([torch.float32, default_dtype(device)]))
    for family in FAMILIES:
        for dtype in dtypes:
            base, twin = _tiny(family, dtype, device)
            sequences = _sequences()
            for got, ids in zip(base.logits(sequences), sequences, strict=True):
                want = _logits(twin, ids)
                off = float((got.float() - want).norm() / want.norm())
                if not off <= TOLERANCE[dtype]:
                    return Check("forward", f"{family} in {_name(dtype)} is off by {off:.2g} from transformers' logits", False)
            if dtype == torch.float32 and base.generate_ids(sequences, sampling=Sampling(NEW_TOKENS)) != [
                _greedy(twin, s) for s in sequences
            ]:
                return Check("forward", f"{family} generates other tokens than transformers", False)
    return Check("forward", f"tiny random {' and '.join(FAMILIES)} in {' and '.join(map(_name, dtypes))}: as transformers", True)


def _greedy(twin: Any, ids: list[int]) -> list[int]:
    new: list[int] = []
    for _ in range(NEW_TOKENS):
        new.append(int(_logits(twin, [*ids, *new])[-1].argmax()))
    return new


def _training() -> Check:
    """One joint step of every method. A new adapter that computes what the base computes has the base's loss."""
    device = resolve_device(None)
    base, twin = _tiny("llama", default_dtype(device), device)
    examples = [
        Example(np.array(ids, dtype=np.int32), np.arange(len(ids)) > 0, f"row {i}", (0, i))
        for i, ids in enumerate(_sequences())
        if len(ids) > 1
    ]
    variants = [_variant(base, cls.examples()[0], examples) for cls in METHODS.values()]
    before = {v: {k: p.clone() for k, p in v.trained().items()} for v in variants}
    batches = {v: v.next_batch() for v in variants}
    found = run_step(batches, max_tokens=4096)
    want = _loss(twin, examples)
    problems = []
    for v in variants:
        loss = found[v].loss
        v.step(loss, found[v].grad_norm, batches[v], 1.0)
        if v.method.fresh_is_base and not abs(loss - want) <= TOLERANCE[base.dtype] * want:
            problems.append(f"{v.name}: a loss of {loss:.4g}, where transformers has {want:.4g}")
        if v.progress.stopped:
            problems.append(f"{v.name}: {v.progress.stopped}")
        elif all(torch.equal(p, v.params[k]) for k, p in before[v].items()):
            problems.append(f"{v.name}: the step has changed nothing")
    return Check(
        "training", "; ".join(problems) or f"a joint step of {', '.join(v.name for v in variants)}: loss as transformers", not problems
    )


def _variant(base: Base, method: Method, examples: list[Example]) -> Variant:
    options = TrainOptions(batch_size=len(examples), max_steps=1, warmup_steps=0)
    config = VariantConfig(name=method.name, data="doctor", method=method, options=options)
    fresh = Adapter.create(base, method)
    return Variant(config, base.attached, fresh.sites, fresh.params, examples, seed=0, max_tokens=4096)


def _loss(twin: Any, examples: list[Example]) -> float:
    """Mean nats a target, one row at a time."""
    losses = []
    for e in examples:
        ids = e.ids.tolist()
        losses.append(cross_entropy(_logits(twin, ids)[:-1], torch.tensor(ids[1:], device=twin.device), reduction="none"))
    return float(torch.cat(losses).mean())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
