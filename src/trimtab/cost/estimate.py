"""What a run would cost: steps and tokens as training counts them, memory by `plan`, time by the speed of a small matmul measured here."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch

from trimtab.bases import resolve_dtype
from trimtab.bases.fits import available_bytes
from trimtab.bases.shapes import Architecture
from trimtab.bases.spec import Spec
from trimtab.cost.activations import judging_bytes, packed_bytes
from trimtab.cost.plan import CostPlan, plan
from trimtab.data import answer_of, order
from trimtab.decode.generate import MAX_LIVE
from trimtab.errors import ConfigError
from trimtab.methods import FullConfig
from trimtab.train.ahead import Held, validations
from trimtab.train.config import RunConfig
from trimtab.train.findings import CheckReport, Estimate, Finding, Split, VariantEstimate
from trimtab.train.options import VariantConfig

EFFICIENCY = (0.25, 0.7)
"""Share of the probe's speed that whole steps reach: an assumption. Seen on the bundled base, 1 thread with AMX: 0.4."""
PROBE_S, PROBE_ROWS = 0.25, 512
HEAP = 2.2
"""How far activations on a CPU may grow above `plan`'s sum, as glibc's heap keeps what was freed: measured on examples/halyard.yaml."""


def estimate_run(
    run: RunConfig, base: Architecture, data: Mapping[str, Sequence[Split]], device: torch.device, report: CheckReport
) -> None:
    """Fill in `variants` and `estimate`; a variant that does not fit the base becomes a finding. data: the splits of each data set, train
    first."""
    dtype = resolve_dtype(run.dtype, device)
    variants, plans = _variants(run, base, data, dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch."), report)
    if not plans:
        return
    joint = [e.tokens_per_step for e, p in plans if p.full is not None]
    longest = max(int(examples.longest.max()) for v in run.variants if (examples := data[v.data][0].examples))
    forward = max([longest, *(min(run.max_tokens, t) for t in [sum(joint), *(e.tokens_per_step for e, p in plans if p.full is None)])])
    kept = base.dtype if dtype == "auto" else dtype
    assert isinstance(kept, torch.dtype)
    steps = {e.name: e.steps for e, _ in plans}
    passes, work = _judging(run, variants, data, steps)
    memory = memory_bytes(run, base, variants, kept, forward, min(longest, base.spec.max_positions), passes)
    probe = probe_flops(base.spec, kept, device)
    spans = [tuple(e.flops / (probe * share) for share in EFFICIENCY[::-1]) for e, _ in plans]
    report.variants = [dataclasses.replace(e, seconds=(low, high)) for (e, _), (low, high) in zip(plans, spans, strict=True)]
    low, high = (2 * _body(base) * work / (probe * share) for share in EFFICIENCY[::-1])
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
        judging_seconds=(low, high),
        answers=_answers(run, report),
    )
    report.estimate = estimate
    report.findings += _memory_findings(run, estimate)


def _variants(
    run: RunConfig, base: Architecture, data: Mapping[str, Sequence[Split]], dtype: str, report: CheckReport
) -> tuple[list[VariantConfig], list[tuple[VariantEstimate, CostPlan]]]:
    """The variants that fit the base and have rows, and what each of them takes; the others become findings."""
    variants: list[VariantConfig] = []
    plans: list[tuple[VariantEstimate, CostPlan]] = []
    for v in run.variants:
        split = data[v.data][0]
        try:
            v.method.sites_to_train(base.spec)
            if split.epoch:
                plans.append(_variant(run, v, split, base, dtype))
                variants.append(v)
        except ConfigError as e:
            report.findings.append(Finding("error", f"variants.{v.name}", e.message, e.problems, len(e.problems), e.fix))
    return variants, plans


def _memory_findings(run: RunConfig, estimate: Estimate) -> list[Finding]:
    most, free = estimate.memory_bytes[1], estimate.available_bytes
    if most <= free:
        return []
    more = "" if run.activation_checkpointing else ", or set activation_checkpointing: true"
    message = f"up to {most / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free on {estimate.device}"
    return [Finding("warning", "memory", message, fix=f"lower max_tokens or batch_size, train fewer variants together{more}.")]


@dataclass(frozen=True)
class Pass:
    """Judging on one data set, as far as it takes memory: tokens of its rows for all contestants, its longest row, how many answers or
    labels are asked for, the length of an answer, and whether training goes on afterwards."""

    tokens: int
    longest: int
    asked: int
    answer: int
    midway: bool


def _judging(
    run: RunConfig, variants: Sequence[VariantConfig], data: Mapping[str, Sequence[Split]], steps: Mapping[str, int]
) -> tuple[list[Pass], float]:
    """(a pass for each held-out split that is judged, tokens' worth of forwards of all of them together: see `ahead`)."""
    passes, work = list[Pass](), 0.0
    for name, splits in data.items():
        who = [v for v in variants if v.data == name]
        for split in splits[1:] if who else ():
            kept = split.examples[: run.evaluate.max_rows]
            asked = sum(answer_of(row) is not None for row in split.rows[: len(kept)])
            labels = run.data[name].labels
            chosen = len(labels) if isinstance(labels, list) else 2 * bool(labels)
            held = Held(kept, asked, chosen, run.evaluate.max_new_tokens)
            if split.name == "test":
                asks = {v.name: (run.evaluate.generate, True) for v in who}
                times = dict.fromkeys(asks, 1)
            else:
                metrics = {v.name: v.options.valid_metric for v in who}
                asks = {n: (m not in ("loss", "label_accuracy"), m == "label_accuracy") for n, m in metrics.items()}
                times = {
                    v.name: validations(steps[v.name], v.options.eval_every or v.options.epoch_steps(len(splits[0].epoch))) for v in who
                }
            base = (any(g for g, _ in asks.values()), any(c for _, c in asks.values()))
            work += sum(held.work(*ask) * times[n] for n, ask in asks.items()) + held.work(*base)
            said = [*asks.values(), base]
            generating, choosing = sum(g for g, _ in said), sum(c for _, c in said) if chosen else 0
            answer = run.evaluate.max_new_tokens if generating else 0
            passes.append(Pass(held.tokens * len(said), held.longest, asked * max(generating, choosing), answer, split.name != "test"))
    return [p for p in passes if p.tokens], work


def _variant(run: RunConfig, v: VariantConfig, split: Split, base: Architecture, dtype: str) -> tuple[VariantEstimate, CostPlan]:
    """One variant's steps, tokens and plan. Steps are counted as training counts them; tokens are those of as many mean steps."""
    o, spec = v.options, base.spec
    lengths = split.epoch.tokens
    at = order(len(lengths), o.seed if o.seed is not None else run.seed, 0)
    batches = np.add.reduceat(lengths[at], np.arange(0, len(at), o.batch_size))
    of_step = np.add.reduceat(batches, np.arange(0, len(batches), o.gradient_accumulation_steps))
    steps = o.total_steps(len(lengths))
    tokens = int(lengths.sum() * steps * o.gradient_accumulation_steps / len(batches))
    costs = plan(base, v.method, dtype=dtype, batch_tokens=1, sequence_length=1)
    supervised = int(split.epoch.targets.sum()) / lengths.sum()
    # Frozen linears cost 2 FLOPs a parameter and token in the forward and 2 in the backward; the output head works on supervised rows only.
    # Activation checkpointing runs the layers' forward once more.
    table, body = spec.vocab_size * spec.hidden_size, _body(base)
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
        tokens_per_step=int(of_step.max()),
        trainable=costs.trainable,
        adapter_bytes=costs.adapter_file_bytes,
        virtual_tokens=virtual_tokens(v),
        flops=float(per_token * tokens),
    )
    return estimate, costs


def memory_bytes(
    run: RunConfig,
    base: Architecture,
    variants: Sequence[VariantConfig],
    dtype: torch.dtype,
    tokens: int,
    length: int,
    passes: Sequence[Pass],
) -> tuple[int, int]:
    """(least, most) of a run whose forwards have `tokens` rows in sequences of `length`, and which is judged in `passes`:

        base       once, and once more for each fully fine-tuned variant
        variants   tensors, gradients, moments, the best tensors where they are kept; packed for inference where they are judged
        inference  where answers or labels are asked for, the weights in the layout that decoding reads, of each model; for the base's these
                   take the place of what is mapped from its file, unless training reads that again
        the rest   activations of the dearest method; the fp32 gradients of a fully fine-tuned variant, which are made when those are gone;
                   or what judging takes (`judging_bytes`): whichever is most

    The most: activations beside the other two, all up to `HEAP` times, since the heap keeps in pieces what was freed.
    """
    spec, again = base.spec, run.activation_checkpointing
    name = str(dtype).removeprefix("torch.")
    plans = [
        plan(base, v.method, dtype=name, batch_tokens=tokens, sequence_length=length, activation_checkpointing=again) for v in variants
    ]
    held = plans[0].base_bytes
    full = [p for p in plans if p.full is None]
    for v, p in zip(variants, plans, strict=True):
        held += p.weight_bytes + p.gradient_bytes + p.optimizer_bytes
        held += 4 * p.trainable if v.options.keep_best and run.data[v.data].valid else 0
        held += p.base_bytes if p.full is None else p.serve_adapter_bytes * bool(passes)
    virtual = max(map(virtual_tokens, variants), default=0)
    judged = 0
    for one in passes:
        capacity = min(spec.max_positions, one.longest + virtual + one.answer)
        slots, rows = min(MAX_LIVE, one.asked), max(one.longest, min(run.max_tokens, one.tokens))
        judged = max(judged, judging_bytes(spec, dtype, rows, one.longest, slots, capacity))
    twice = any(one.asked for one in passes) and (dtype != base.dtype or any(one.asked and one.midway for one in passes))
    held += (twice + len(full) * any(one.asked for one in passes)) * packed_bytes(spec, dtype)
    activations, masters = max(p.activation_bytes for p in plans), max((4 * p.trainable for p in full), default=0)
    return held + max(activations, judged, masters), held + int(HEAP * (activations + max(judged, masters)))


def fitting_tokens(run: RunConfig, base: Architecture, variants: Sequence[VariantConfig], dtype: torch.dtype, length: int) -> int | None:
    """The largest half, quarter, … of `max_tokens` whose forwards fit the memory that is free, beside what is held already; None where none
    does, since a row longer than that runs alone."""
    tokens, free = run.max_tokens // 2, available_bytes(torch.device("cpu"))
    while tokens >= max(64, length):
        name, again = str(dtype).removeprefix("torch."), run.activation_checkpointing
        options: dict[str, Any] = {"dtype": name, "batch_tokens": tokens, "sequence_length": length, "activation_checkpointing": again}
        if HEAP * max(plan(base, v.method, **options).activation_bytes for v in variants) <= free:
            return tokens
        tokens //= 2
    return None


def _body(base: Architecture) -> int:
    """Parameters between embedding and head."""
    return base.parameters - base.spec.vocab_size * base.spec.hidden_size * (1 if base.spec.tied_head else 2)


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
