"""What a run would cost: steps and tokens as training counts them, memory by `plan`, time by the speed of a small matmul measured here."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import psutil
import torch

from trimtab.bases import resolve_dtype
from trimtab.bases.fits import available_bytes
from trimtab.bases.shapes import Architecture
from trimtab.bases.spec import Spec
from trimtab.cost.plan import CostPlan, plan
from trimtab.cost.room import NOTHING_FITS, ROW_BYTES, Need, Pass, drawing, heap, said_of, virtual_tokens
from trimtab.data import answer_of, order
from trimtab.data.token_store import Examples
from trimtab.errors import ConfigError, DataError
from trimtab.methods import FullConfig, Method
from trimtab.train.ahead import DECODED, Held, validations
from trimtab.train.config import RunConfig
from trimtab.train.findings import CheckReport, Estimate, Finding, Split, VariantEstimate
from trimtab.train.options import VariantConfig
from trimtab.train.prepare import labelled

EFFICIENCY = (0.25, 0.7)
"""Share of the probe's speed that whole steps reach: an assumption. Seen on the bundled base, 1 thread with AMX: 0.4."""
PROBE_S, PROBE_ROWS = 0.25, 512
DRAWN_ROWS = 2**20
"""Of so many rows at most the order is drawn, whole epochs, to find the largest step. That takes half a second."""


def estimate_run(
    run: RunConfig, base: Architecture, data: Mapping[str, Sequence[Split]], device: torch.device, report: CheckReport
) -> Need | None:
    """Fill in `variants` and `estimate`; a variant that does not fit the base becomes a finding. data: the splits of each data set, train
    first. Returns what decides the memory, None where no variant has rows."""
    dtype = resolve_dtype(run.dtype, device)
    variants, plans = _variants(run, base, data, dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch."), report)
    if not plans:
        return None
    each = [(v, int(examples.tokens.max())) for v in run.variants if (examples := data[v.data][0].examples)]
    longest = max(n + v.objective.answer_tokens for v, n in each)
    kept = base.dtype if dtype == "auto" else dtype
    assert isinstance(kept, torch.dtype)
    steps = {e.name: e.steps for e, _ in plans}
    passes, work = _judging(run, variants, data, steps)
    passes += drawing(each)
    referred = _referred(run, variants, data)
    work += sum(int(examples.tokens.sum()) for examples, _ in referred)
    beside = sum(each * int(examples.targets.sum()) + ROW_BYTES * len(examples) for examples, each in referred)
    need = Need(run, base, variants, kept, device, {e.name: e.tokens_per_step for e, _ in plans}, longest, passes, beside)
    probe = probe_flops(base.spec, kept, device)
    spans = [tuple(e.flops / (probe * share) for share in EFFICIENCY[::-1]) for e, _ in plans]
    report.variants = [dataclasses.replace(e, seconds=(low, high)) for (e, _), (low, high) in zip(plans, spans, strict=True)]
    low, high = (2 * _body(base) * work / (probe * share) for share in EFFICIENCY[::-1])
    estimate = Estimate(
        dtype=str(kept).removeprefix("torch."),
        device=str(device),
        forward_tokens=need.forward_tokens,
        memory_bytes=need.bytes(),
        process_bytes=psutil.Process().memory_info().rss,
        available_bytes=available_bytes(device),
        probe_flops=probe,
        efficiency=EFFICIENCY,
        seconds=(sum(low for low, _ in spans), sum(high for _, high in spans)),
        judging_seconds=(low, high),
        answers=_answers(run, report),
    )
    report.estimate = estimate
    report.findings += _memory_findings(need, estimate)
    return need


def _referred(run: RunConfig, variants: Sequence[VariantConfig], data: Mapping[str, Sequence[Split]]) -> list[tuple[Examples, int]]:
    """(rows, bytes of a target) of what the base or a teacher says of rows, which is computed before the first step and kept."""
    limit, said = run.evaluate.max_rows, said_of(variants)
    return [(s.examples if s.name == "train" else s.examples[:limit], each) for (name, _), each in said.items() for s in data[name]]


def _variants(
    run: RunConfig, base: Architecture, data: Mapping[str, Sequence[Split]], dtype: str, report: CheckReport
) -> tuple[list[VariantConfig], list[tuple[VariantEstimate, CostPlan]]]:
    """The variants that fit the base and have rows, and what each of them takes; the others become findings."""
    variants: list[VariantConfig] = []
    plans: list[tuple[VariantEstimate, CostPlan]] = []
    for v in run.variants:
        split = data[v.data][0]
        with suppress(DataError):  # labels that cannot be had have a finding of their own
            v = labelled(v, run.data[v.data], set(split.examples.roles))
        try:
            v.method.sites_to_train(base.spec)
            if split.epoch:
                plans.append(_variant(run, v, split, base, dtype))
                variants.append(v)
        except ConfigError as e:
            report.findings.append(Finding("error", f"variants.{v.name}", e.message, e.problems, len(e.problems), e.fix))
    return variants, plans


def _memory_findings(need: Need, estimate: Estimate) -> list[Finding]:
    most, free = estimate.memory_bytes[1], estimate.available_bytes
    if most <= free:
        return []
    message = f"up to {most / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free on {estimate.device}"
    fits = need.fitting(free)
    fix = f"set {', or '.join(fits)}." if fits else NOTHING_FITS
    return [Finding("warning", "memory", message, fix=fix)]


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
                asks = {v.name: v.asks for v in who}
                rows = len(splits[0].epoch)
                times = {v.name: validations(steps[v.name], v.options.eval_steps(rows, v.objective.steps_on_rows)) for v in who}
            base = (any(g for g, _ in asks.values()), any(c for _, c in asks.values()))
            work += sum(held.work(*ask) * times[n] for n, ask in asks.items()) + held.work(*base)
            said = [*asks.values(), base]
            generating, choosing = sum(g for g, _ in said), sum(c for _, c in said) if chosen else 0
            answer = run.evaluate.max_new_tokens if generating else 0
            passes.append(Pass(held.tokens * len(said), held.longest, asked * max(generating, choosing), answer, split.name != "test"))
    return [p for p in passes if p.tokens], work


def _variant(run: RunConfig, v: VariantConfig, split: Split, base: Architecture, dtype: str) -> tuple[VariantEstimate, CostPlan]:
    """One variant's steps, tokens and plan. Steps are counted as training counts them; tokens are those of as many mean steps."""
    o, aim = v.options, v.objective
    answers = aim.answers * aim.answer_tokens  # at most, to each row
    lengths = split.epoch.tokens + answers
    rows, accumulated = len(lengths), o.gradient_accumulation_steps
    steps, an_epoch = o.total_steps(rows, aim.steps_on_rows), math.ceil(rows / o.batch_size)
    drawn = math.ceil(steps / aim.steps_on_rows) * accumulated  # batches
    epochs = min(math.ceil(drawn / an_epoch), max(1, DRAWN_ROWS // rows))
    orders = (order(rows, o.seed if o.seed is not None else run.seed, epoch) for epoch in range(epochs))
    batches = np.concatenate([np.add.reduceat(lengths[at], np.arange(0, rows, o.batch_size)) for at in orders])[:drawn]
    of_step = np.add.reduceat(batches, np.arange(0, len(batches), accumulated))
    tokens = int(lengths.sum() * steps * accumulated / an_epoch)
    costs, bare = (plan(base, v.method, dtype=dtype, batch_tokens=1, sequence_length=1, head=h) for h in (aim.head, None))
    supervised = 0.0 if aim.reads_head else (int(split.epoch.targets.sum()) + answers * len(lengths)) / lengths.sum()
    per_token = flops_per_token(base, v.method, bare.trainable, supervised, again=run.activation_checkpointing)
    per_token += 2 * (_body(base) + supervised * _table(base)) * aim.passes_before
    per_token += 2 * (_body(base) + _table(base)) * DECODED * answers * len(lengths) / lengths.sum() / aim.steps_on_rows
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


def flops_per_token(base: Architecture, method: Method, trainable: int, supervised: float, *, again: bool = False) -> float:
    """FLOPs of training on one token, without attention's scores. trainable: numbers of the adapter, without a head, which computes few
    rows. supervised: the part of tokens that reach the output head. again: with activation checkpointing.

    Frozen linears cost 2 FLOPs a parameter and token in the forward and 2 in the backward. Activation checkpointing runs the layers'
    forward once more. Of a layer's experts those count that a token is sent to, and an adapter's factors at these.
    """
    body = _body(base)
    adapter = 0 if isinstance(method, FullConfig) or hasattr(method, "num_virtual_tokens") else trainable
    if adapter and base.spec.experts_per_token:
        at = [(s.experts, sum(map(math.prod, s.shapes.values()))) for s in method.sites(base.spec) if s.experts]
        adapter -= int(sum(numbers * max(0.0, 1 - base.spec.experts_per_token / experts) for experts, numbers in at))
    per_token = (6 if isinstance(method, FullConfig) else 4) * (body + supervised * _table(base)) + 6 * adapter
    return per_token + (2 * (body + adapter) if again else 0)


def fitting_tokens(run: RunConfig, base: Architecture, variants: Sequence[VariantConfig], dtype: torch.dtype, length: int) -> int | None:
    """The largest half, quarter, … of `max_tokens` whose forwards fit the memory that is free, beside what is held already; None where none
    does, since a row longer than that runs alone."""
    cpu = torch.device("cpu")
    tokens, free, sequence, most = run.max_tokens // 2, available_bytes(cpu), min(length, base.spec.max_positions), heap(cpu)[1]
    while tokens >= max(64, length):
        name, again = str(dtype).removeprefix("torch."), run.activation_checkpointing
        options: dict[str, Any] = {"dtype": name, "batch_tokens": tokens, "sequence_length": sequence, "activation_checkpointing": again}
        if most * max(plan(base, v.method, **options).activation_bytes for v in variants) <= free:
            return tokens
        tokens //= 2
    return None


def _body(base: Architecture) -> int:
    """Parameters between embedding and head that compute one token: not those of experts that it is not sent to."""
    return base.parameters - _table(base) * (1 if base.spec.tied_head else 2) - base.spec.idle_parameters()


def _table(base: Architecture) -> int:
    """Parameters of the head."""
    return base.spec.vocab_size * base.spec.hidden_size


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
