"""What a run would cost: steps and tokens as training counts them, memory by `plan`, time by the speed of a small matmul measured here."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import psutil
import torch

from trimtab.bases import resolve_dtype
from trimtab.bases.machine import machine_memory
from trimtab.data import order
from trimtab.errors import ConfigError
from trimtab.methods import FullConfig, Method
from trimtab.plan import Plan, plan
from trimtab.shapes import Architecture
from trimtab.spec import Spec
from trimtab.train.config import RunConfig
from trimtab.train.findings import CheckReport, Estimate, Finding, Split, VariantEstimate
from trimtab.train.options import VariantConfig

EFFICIENCY = (0.25, 0.7)
"""Share of the probe's speed that whole steps reach: an assumption. Seen on the bundled base, 1 thread with AMX: 0.4."""
PROBE_S, PROBE_ROWS = 0.25, 512
HEAP = 2.2
"""How far activations on a CPU may grow above `plan`'s sum, as glibc's heap keeps what was freed: measured on examples/halyard.yaml."""


def estimate_run(run: RunConfig, base: Architecture, trained: Mapping[str, Split], device: torch.device, report: CheckReport) -> None:
    """Fill in `variants` and `estimate`; a variant that does not fit the base becomes a finding."""
    plans: list[tuple[VariantEstimate, Plan]] = []
    methods: list[Method] = []
    dtype = resolve_dtype(run.dtype, device)
    name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    for v in run.variants:
        split = trained[v.data]
        try:
            v.method.sites_to_train(base.spec)
            if split.epoch:
                plans.append(_variant(run, v, split, base, name))
                methods.append(v.method)
        except ConfigError as e:
            report.findings.append(Finding("error", f"variants.{v.name}", e.message, e.problems, len(e.problems), e.fix))
    if not plans:
        return
    joint = [e.tokens_per_step for e, p in plans if p.full is not None]
    longest = max(len(e.ids) for v in run.variants for e in trained[v.data].examples)
    forward = max([longest, *(min(run.max_tokens, t) for t in [sum(joint), *(e.tokens_per_step for e, p in plans if p.full is None)])])
    memory = _memory(base, methods, name, forward, min(longest, base.spec.max_positions), run.activation_checkpointing)
    kept = base.dtype if dtype == "auto" else dtype
    assert isinstance(kept, torch.dtype)
    probe = probe_flops(base.spec, kept, device)
    spans = [tuple(e.flops / (probe * share) for share in EFFICIENCY[::-1]) for e, _ in plans]
    report.variants = [dataclasses.replace(e, seconds=(low, high)) for (e, _), (low, high) in zip(plans, spans, strict=True)]
    estimate = Estimate(
        dtype=str(kept).removeprefix("torch."),
        device=str(device),
        forward_tokens=forward,
        memory_bytes=memory,
        process_bytes=psutil.Process().memory_info().rss,
        available_bytes=available_bytes(device),
        probe_flops=probe,
        efficiency=EFFICIENCY,
        seconds=(sum(low for low, _ in spans), sum(high for _, high in spans)),
        answers=_answers(run, report),
    )
    report.estimate = estimate
    if memory[1] > estimate.available_bytes:
        more = "" if run.activation_checkpointing else ", or set activation_checkpointing: true"
        message = f"up to {memory[1] / 1e9:.1f} GB are needed and {estimate.available_bytes / 1e9:.1f} GB are free on {device}"
        report.findings.append(
            Finding("warning", "memory", message, fix=f"lower max_tokens or batch_size, train fewer variants together{more}.")
        )


def _variant(run: RunConfig, v: VariantConfig, split: Split, base: Architecture, dtype: str) -> tuple[VariantEstimate, Plan]:
    """One variant's steps, tokens and plan. Steps are counted as training counts them; tokens are those of as many mean steps."""
    o, spec = v.options, base.spec
    lengths = np.array([len(e.ids) for e in split.epoch], dtype=np.int64)
    at = order(len(lengths), o.seed if o.seed is not None else run.seed, 0)
    batches = np.add.reduceat(lengths[at], np.arange(0, len(at), o.batch_size))
    windows = np.add.reduceat(batches, np.arange(0, len(batches), o.gradient_accumulation_steps))
    steps = o.max_steps or max(1, math.ceil(o.epochs * len(batches) / o.gradient_accumulation_steps))
    tokens = int(lengths.sum() * steps * o.gradient_accumulation_steps / len(batches))
    costs = plan(base, v.method, dtype=dtype, batch_tokens=1, sequence_length=1)
    supervised = sum(int(e.supervised.sum()) for e in split.epoch) / lengths.sum()
    # Frozen linears cost 2 FLOPs a parameter and token in the forward and 2 in the backward; the output head works on supervised rows only.
    # Activation checkpointing runs the layers' forward once more.
    table = spec.vocab_size * spec.hidden_size
    body = base.parameters - table * (1 if spec.tied_head else 2)
    adapter = 0 if isinstance(v.method, FullConfig) or virtual_tokens(v) else costs.trainable
    per_token = (6 if isinstance(v.method, FullConfig) else 4) * (body + supervised * table) + 6 * adapter
    per_token += 2 * (body + adapter) if run.activation_checkpointing else 0
    estimate = VariantEstimate(
        name=v.name,
        method=v.method.name,
        data=v.data,
        rows_per_epoch=len(lengths),
        tokens_per_epoch=int(lengths.sum()),
        steps=steps,
        tokens=tokens,
        tokens_per_step=int(windows.max()),
        trainable=costs.trainable,
        adapter_bytes=costs.adapter_file_bytes,
        virtual_tokens=virtual_tokens(v),
        flops=float(per_token * tokens),
    )
    return estimate, costs


def _memory(base: Architecture, methods: Sequence[Method], dtype: str, tokens: int, length: int, again: bool) -> tuple[int, int]:
    """(least, most): the base once, each variant's tensors, gradients and optimizer, and the activations of the dearest method on all rows,
    up to `HEAP` times. Fully fine-tuned variants hold a model each. again: activation checkpointing."""
    options: dict[str, Any] = {"dtype": dtype, "batch_tokens": tokens, "sequence_length": length, "activation_checkpointing": again}
    plans = [plan(base, m, **options) for m in methods]
    own = sum(p.weight_bytes + p.gradient_bytes + p.optimizer_bytes + (p.base_bytes if p.full is None else 0) for p in plans)
    held, activations = plans[0].base_bytes + own, max(p.activation_bytes for p in plans)
    return held + activations, held + int(HEAP * activations)


def probe_flops(spec: Spec, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a frozen gated MLP of the base's width, forward and backward on `PROBE_ROWS` rows: the median of `PROBE_S` seconds. Wide
    bases are measured at a width of 2048."""
    hidden = min(spec.hidden_size, 2048)
    x = torch.randn(PROBE_ROWS, hidden, dtype=dtype, device=device)
    up, down = (torch.randn(shape, dtype=dtype, device=device) / hidden for shape in ((3 * hidden, hidden), (hidden, 3 * hidden)))
    linear, silu = torch.nn.functional.linear, torch.nn.functional.silu
    took, until = list[float](), time.perf_counter() + PROBE_S
    while time.perf_counter() < until or len(took) < 3:
        start = time.perf_counter()
        leaf = x.detach().requires_grad_()
        linear(silu(linear(leaf, up)) * linear(leaf, up), down).backward(x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - start)
    return 4 * PROBE_ROWS * 3 * up.numel() / float(np.median(took))


def available_bytes(device: torch.device) -> int:
    """Memory that can still be had on the device; on a CPU within the container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return machine_memory()[1]


def _answers(run: RunConfig, report: CheckReport) -> int:
    """Texts that scoring generates: every test row is answered by the base and by each variant of its data set."""
    if not run.evaluate.generate:
        return 0
    tests = {s.data: sum(x.drawn for x in s.sources) for s in report.splits if s.split == "test"}
    limit = run.evaluate.max_rows or math.inf
    return int(sum(min(n, limit) * (1 + sum(v.data == name for v in run.variants)) for name, n in tests.items()))


def virtual_tokens(variant: VariantConfig) -> int:
    """Positions that the variant's method takes before each row; 0 of a method that takes none."""
    return int(getattr(variant.method, "num_virtual_tokens", 0))
