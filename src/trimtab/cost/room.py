"""Whether a run has room in memory, and what would have, told from shapes and the lengths of rows.

`train` and `sweep` ask before the base is loaded. What a run could need at most, by `max_length` and `max_tokens`, is known without its
rows. Only where that is more than is free are the rows read, into the cache from which training takes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from trimtab.bases import resolve_device, resolve_dtype
from trimtab.bases.fits import available_bytes, most_bytes
from trimtab.bases.shapes import Architecture
from trimtab.bases.spec import Spec
from trimtab.cost.activations import judging_bytes, packed_sizes
from trimtab.cost.plan import CostPlan, plan
from trimtab.data.source_rows import text_bytes
from trimtab.decode.generate import MAX_LIVE, MAX_ROWS
from trimtab.memory import OutOfMemory
from trimtab.methods import FullConfig, Head
from trimtab.objectives import Objective
from trimtab.objectives.base import Taught
from trimtab.ops.reuse import reuse_blocks
from trimtab.train.config import RunConfig
from trimtab.train.options import VariantConfig
from trimtab.train.teachers import measured_by

HEAP = 0.95, 1.23
"""How many times its sum a process takes for what passes in a step on a CPU. Measured: 0.98 to 1.09 times in steps of equal rows, up to
1.17 where rows differ in length and are scored (`tests/cost/test_peak.py`). Other devices' allocators are taken to be as wasteful."""
HEAP_OF_TORCH = 1.2, 1.7
"""The same with torch's own allocator on the CPU, where `ops.reuse` cannot change it. Measured: 1.4 and 1.47 times for LoRA and IA³."""

ROW_BYTES = 200
"""Of a row's place among what the base says: an entry of a dict."""
NOTHING_FITS = "train fewer variants together, on a smaller base, or make memory free."


@dataclass(frozen=True)
class Pass:
    """Judging on one data set, as far as it takes memory: tokens of its rows for all contestants, its longest row, how many answers or
    labels are asked for, the length of an answer, and whether training goes on afterwards."""

    tokens: int
    longest: int
    asked: int
    answer: int
    midway: bool

    def bytes(self, spec: Spec, dtype: torch.dtype, max_tokens: int, virtual: int, device: torch.device) -> int:
        """At the peak, beside base and adapters (`judging_bytes`). virtual: positions that an adapter takes before each row."""
        capacity = min(spec.max_positions, self.longest + virtual + self.answer)
        slots, rows = min(MAX_LIVE, self.asked), max(self.longest, min(max_tokens, self.tokens))
        return judging_bytes(spec, dtype, rows, self.longest, slots, capacity, device)


@dataclass(frozen=True)
class Need:
    """What decides the memory of a run. dtype: the base's in memory. tokens: rows of each variant's largest step. longest: tokens of the
    longest row, whose sequences all enter one forward. passes: when it is judged. referred: bytes of what the base or a teacher says of
    rows, which is computed first and kept. parts: how many ranks share the base out."""

    run: RunConfig
    base: Architecture
    variants: Sequence[VariantConfig]
    dtype: torch.dtype
    device: torch.device
    tokens: Mapping[str, int]
    longest: int
    passes: Sequence[Pass]
    referred: int = 0
    parts: int = 1

    @property
    def forward_tokens(self) -> int:
        """Rows of the largest forward: variants train together, but for those that have a copy of the model."""
        joint = sum(self.tokens[v.name] for v in self.variants if not isinstance(v.method, FullConfig))
        alone = [self.tokens[v.name] for v in self.variants if isinstance(v.method, FullConfig)]
        return max([self.longest, *(min(self.run.max_tokens, t) for t in [joint, *alone])])

    def bytes(self) -> tuple[int, int]:
        """(least, most), as `memory_bytes` says."""
        length = min(self.longest, self.base.spec.max_positions)
        args = (self.run, self.base, self.variants, self.dtype, self.device, self.forward_tokens, length, self.passes)
        least, most = memory_bytes(*args, self.parts)
        return least + self.referred, most + self.referred

    def fitting(self, free: int, held: int = 0) -> list[str]:
        """Changes of the run file each of which would make the run fit into so many bytes. held: bytes that it has already."""

        def fits(changed: Need) -> bool:
            return changed.bytes()[0] - held <= free

        shorter = (n for n in halves(self.run.max_tokens) if n >= max(64, self.longest) and fits(self._with(max_tokens=n)))
        fewer = (n for n in halves(max(v.options.batch_size for v in self.variants)) if fits(self._of_rows(n)))
        found = [f"{name}: {n}" for name, several in (("max_tokens", shorter), ("batch_size", fewer)) for n in islice(several, 1)]
        if not self.run.activation_checkpointing and fits(self._with(activation_checkpointing=True)):
            found.append("activation_checkpointing: true")
        return found

    def _with(self, **changes: object) -> Need:
        return dataclasses.replace(self, run=self.run.model_copy(update=changes))

    def _of_rows(self, batch_size: int) -> Need:
        """With batches of so many rows at most."""
        share = {v.name: min(1.0, batch_size / v.options.batch_size) for v in self.variants}
        return dataclasses.replace(self, tokens={n: max(int(t * share[n]), min(t, self.longest)) for n, t in self.tokens.items()})


def halves(n: int) -> Iterator[int]:
    """n / 2, n / 4, … down to 1"""
    while (n := n // 2) >= 1:
        yield n


def memory_bytes(
    run: RunConfig,
    base: Architecture,
    variants: Sequence[VariantConfig],
    dtype: torch.dtype,
    device: torch.device,
    tokens: int,
    length: int,
    passes: Sequence[Pass],
    parts: int = 1,
) -> tuple[int, int]:
    """(least, most) of a run whose forwards have `tokens` rows in sequences of `length`, and which is judged in `passes`:

        base       once, and once more for each fully fine-tuned variant; of ranks that share it out, one of `parts`, and the two largest
                   things that are brought together
        variants   tensors, gradients, moments, the best tensors where they are kept; packed for inference where they are judged
        inference  where answers or labels are asked for on a CPU, the weights in the layout that decoding reads there, of each model; for
                   the base's these take the place of what is mapped from its file, unless training reads that again
        the rest   activations of the dearest method; the fp32 gradients of a fully fine-tuned variant, which are made when those are gone;
                   or what judging takes (`judging_bytes`), before which freed memory is given back: whichever is most

    The least and the most: the rest `heap` times, since the sum is not exact and the heap keeps in pieces what was freed.
    """
    spec, again = base.spec, run.activation_checkpointing
    name = str(dtype).removeprefix("torch.")
    options: dict[str, Any] = {"activation_checkpointing": again, "device": device}
    costs: dict[tuple[str, str, Head | None], CostPlan] = {}  # a sweep has many variants of a few kinds
    plans = list[CostPlan]()
    for v in variants:
        kind = (repr(v.method), v.options.optimizer, v.objective.head)
        if kind not in costs:
            own = options | {"optimizer": v.options.optimizer, "head": v.objective.head}
            costs[kind] = plan(base, v.method, dtype=name, batch_tokens=tokens, sequence_length=length, **own)
        plans.append(costs[kind])
    held = plans[0].base_bytes if parts == 1 else part_bytes(spec, dtype, plans[0].base_bytes, parts)
    full = [p for p in plans if p.full is None]
    for v, p in zip(variants, plans, strict=True):
        held += p.weight_bytes + p.gradient_bytes + p.optimizer_bytes
        held += 4 * p.trainable if v.options.keep_best and run.data[v.data].valid else 0
        held += p.base_bytes if p.full is None else p.serve_adapter_bytes * bool(passes)
    virtual = max(map(virtual_tokens, variants), default=0)
    judged = max((one.bytes(spec, dtype, run.max_tokens, virtual, device) for one in passes), default=0)
    asking = [one for one in passes if one.asked]
    if asking and device.type == "cpu" and parts == 1:
        twice = dtype != base.dtype or any(one.midway for one in asking)
        held += (twice + len(full)) * sum(packed_sizes(spec, dtype))
    rest = max(judged, *(p.activation_bytes for p in plans), *(4 * p.trainable for p in full))
    least, most = heap(device)
    return held + int(least * rest), held + int(most * rest)


def heap(device: torch.device) -> tuple[float, float]:
    """How many times its sum, at least and at most, a process takes for what passes in a step."""
    return HEAP if device.type != "cpu" or reuse_blocks()[0] else HEAP_OF_TORCH


def part_bytes(spec: Spec, dtype: torch.dtype, base_bytes: int, parts: int) -> int:
    """The most that a rank has of a base which so many ranks share out: its part, what it computes with (a layer, or the embedding), and
    what comes next."""
    embedding = spec.vocab_size * spec.hidden_size * dtype.itemsize
    return base_bytes // parts + 2 * max(embedding, (base_bytes - embedding) // spec.num_layers)


def virtual_tokens(variant: VariantConfig) -> int:
    """Positions that the variant's method takes before each row; 0 of a method that takes none."""
    return int(getattr(variant.method, "num_virtual_tokens", 0))


def refuse_without_room(
    at_most: Need, exact: Callable[[], Need | None], warning: Callable[[str], None], *, loaded: bool, sharers: int = 1
) -> None:
    """OutOfMemory, with what is needed, what is free and what would fit, where a run cannot have the memory that it needs at least.

    warning: hears where it may not have it. exact: finds the need from the rows; asked only where `at_most` is more than is free. loaded:
    the base is in memory. Nor do weights count that are mapped from their files: the system may drop them. sharers: ranks of the run on
    this machine, each of which needs as much of its memory; a GPU is one rank's own.
    """
    device, base = at_most.device, at_most.base
    mapped = device.type == "cpu" and at_most.dtype == base.dtype and at_most.parts == 1
    held = base.parameters * base.dtype.itemsize if loaded or mapped else 0
    sharers = sharers if device.type == "cpu" else 1
    most, free = most_bytes(device) // sharers, available_bytes(device) // sharers
    if at_most.bytes()[1] - held <= free or (need := exact()) is None:
        return
    least, high = (n - held for n in need.bytes())
    if high <= free:
        return
    fits = need.fitting(most if least > most else free, held)
    fix = f"set {', or '.join(fits)}; or make memory free." if fits else NOTHING_FITS
    beside = "beside the base's weights, " if held else ""
    where = f"{device} for each of {sharers} ranks" if sharers > 1 else str(device)
    said = f"{beside}for forwards of {need.forward_tokens:,} tokens, and {free / 1e9:.3g} GB are free on {where}"
    if least > most:
        raise OutOfMemory(f"this run does not fit: it needs {least / 1e9:.3g} GB at least, {said}", fix=fix)
    warning(f"this run may not fit: it needs {least / 1e9:.3g} to {high / 1e9:.3g} GB {said}; {fix}")


def at_most(run: RunConfig, base: Architecture, parts: int = 1) -> Need:
    """What a run could need, whatever its rows are, but for turns that a template rewrites: these may make a row longer than taken here."""
    device = resolve_device(run.device)
    dtype = resolve_dtype(run.dtype, device)
    variants = list(run.variants)
    sequence = min(base.spec.max_positions, max(v.options.max_length for v in variants))
    answers = max(v.objective.answer_tokens for v in variants)
    longest = sequence if all(v.objective.parts is Objective.parts for v in variants) else 2 * sequence + answers  # of a pair
    tokens = {v.name: (longest + v.objective.answers * answers) * rows_of_step(v) for v in variants}
    asks = run.evaluate.generate or any(any(v.asks) for v in variants) or any(d.labels for d in run.data.values())
    held = [split for d in run.data.values() for split in ("valid", "test") if getattr(d, split)]
    passes = [Pass(run.max_tokens, sequence, MAX_LIVE * asks, run.evaluate.max_new_tokens, split == "valid") for split in held]
    passes += drawing([(v, sequence) for v in variants])
    kept = dtype if isinstance(dtype, torch.dtype) else base.dtype
    return Need(run, base, variants, kept, device, tokens, longest, passes, _referred(run), parts)


def rows_of_step(variant: VariantConfig) -> int:
    """Rows of an optimizer step."""
    return variant.options.batch_size * variant.options.gradient_accumulation_steps


def drawing(variants: Sequence[tuple[VariantConfig, int]]) -> list[Pass]:
    """The pass before a step in which variants draw answers, as far as it takes memory: all of them together. variants: with the tokens
    of the longest row of each."""
    who = [(v, n) for v, n in variants if v.objective.answers]
    if not who:
        return []
    longest, answer = max(n for _, n in who), max(v.objective.answer_tokens for v, _ in who)
    return [Pass(MAX_ROWS, longest, sum(v.objective.answers * rows_of_step(v) for v, _ in who), answer, midway=True)]


def _referred(run: RunConfig) -> int:
    """Bytes of what base and teachers could say of rows, by the sizes of their files: a token has a byte of text at least, a row 16."""

    def text(name: str) -> int:
        return sum(text_bytes(source, run.root) for sources in run.data[name].splits.values() for source in sources)

    return sum((each + ROW_BYTES // 16) * text(name) for (name, _), each in said_of(run.variants).items())


def said_of(variants: Sequence[VariantConfig]) -> dict[tuple[str, Taught | None], int]:
    """What is kept for each supervised token of a data set before training: (data set, teacher and K, or None for the base) -> bytes."""
    return {(name, teacher): 8 * teacher.tokens if teacher else 4 for name, teacher in measured_by(variants)}
