"""The losses of several members' rows in one mixed forward, each by its own objective.

Rows whose objective knows their weights beforehand take one pass over the output head, the others two (`ops.loss`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab import ops
from trimtab.data import Example
from trimtab.data.rows import RowId
from trimtab.forward.attached import Attached
from trimtab.forward.batch import Batch
from trimtab.forward.heads import member_scores
from trimtab.forward.packs import Mix
from trimtab.objectives import Counts, Objective, Segments
from trimtab.train.samples import samples_of
from trimtab.train.targets import Targets, lay_out, log_probabilities, supervised_loss


@dataclass(frozen=True)
class Reference:
    """The base's log-probabilities of the supervised tokens of rows, [N]; a teacher's of its K likeliest tokens there, [N, K].

    values: nats, fp32, on the CPU, the segments of a row one after the other. begins: where each row's begin, by its identity: of a row
    nothing else is kept. tokens: int32 [N, K], a teacher's. source: what the teacher was, as a digest.
    """

    values: Tensor
    begins: Mapping[RowId, int]
    tokens: Tensor | None = None
    source: str = ""

    def of(self, rows: Sequence[Example], device: torch.device) -> Tensor:
        """[R] or [R, K], of these rows' segments in order."""
        return self._of(self.values, rows).to(device)

    def tokens_of(self, rows: Sequence[Example], device: torch.device) -> Tensor:
        """int64 [R, K]"""
        assert self.tokens is not None
        return self._of(self.tokens, rows).to(device, torch.int64)

    def _of(self, values: Tensor, rows: Sequence[Example]) -> Tensor:
        places = [self.begins[e.row] for e in rows]
        return torch.cat([values[a : a + e.targets] for a, e in zip(places, rows, strict=True)])


@dataclass(frozen=True)
class Part:
    """Rows of one member in one forward. counts: of all rows over which the loss is a mean. reference: of the rows' segments, where the
    objective needs it. probes_P: see `Segments`. seeds: of each row's dropout; None where there is none. noise: of each segment's
    embeddings (see `Piece`); empty where there is none."""

    member: int
    examples: Sequence[Example]
    objective: Objective
    counts: Counts
    reference: Reference | None = None
    probes_P: Tensor | None = None
    seeds: Sequence[int] | None = None
    noise: Sequence[tuple[int, float]] = ()

    @property
    def segments(self) -> list[Example]:
        return [s for e in self.examples for s in e.segments]

    @property
    def seeded(self) -> list[tuple[int, Example, int | None]]:
        """(member, segment, seed) of every segment."""
        seeds: Sequence[int | None] = self.seeds or [None] * len(self.examples)
        return [(self.member, s, seed) for e, seed in zip(self.examples, seeds, strict=True) for s in e.segments]

    def described(self, device: torch.device) -> Segments:
        """What the objective knows of the segments."""
        targets = tuple(int(s.supervised.sum()) for s in self.segments)
        samples = samples_of(self.segments, device) if self.objective.sampled_at is not None else None
        return Segments(tuple(s.role for s in self.segments), targets, self.counts, device, self.probes_P, samples)


@dataclass(frozen=True)
class Outcome:
    """Loss and metrics of some rows; those of parts of the same rows add up. logps: of a part's answers, at the first of several steps on
    them; they do not add up."""

    loss: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    logps: Sequence[float] = ()

    def __add__(self, other: Outcome) -> Outcome:
        metrics = {k: self.metrics.get(k, 0.0) + other.metrics.get(k, 0.0) for k in {**self.metrics, **other.metrics}}
        return Outcome(self.loss + other.loss, metrics)


@dataclass(frozen=True)
class Unread:
    """The outcomes of a forward's parts, whose numbers are where they were computed. numbers: these, as tensors. told: the outcomes, from
    what `ops.to_host` gives of them. A GPU is waited for where they are read, so a step reads those of all its forwards together."""

    numbers: list[Tensor]
    told: Callable[[Sequence[Any]], list[Outcome]]

    def read(self) -> list[Outcome]:
        return self.told(ops.to_host(self.numbers))


def forward_loss(attached: Attached, mix: Mix, parts: Sequence[Part]) -> tuple[Tensor, Unread]:
    """(Σ of all parts' losses, with the graph; each part's outcome) in one mixed forward."""
    noise: list[tuple[int, float] | None] = []
    for p in parts:
        noise += p.noise or [None] * len(p.segments)
    laid, batch = lay_out(attached, mix, [s for p in parts for s in p.seeded], noise)
    hidden_TH = attached.forward(batch)
    of = [n for n, p in enumerate(parts) for _ in p.segments]  # the part of each segment
    computed = _Computed(attached, batch, hidden_TH, [(of[i], start, segment) for i, start, segment in laid])
    losses = _Losses(parts, [p.described(attached.device) for p in parts])
    aims, weights = {n: parts[n].objective for n in computed.parts}, losses.weights()
    headed = [n for n, aim in aims.items() if aim.reads_head]
    taught = {n: by.temperature for n, aim in aims.items() if (by := aim.taught_by)}
    drawn = {n: heat for n, aim in aims.items() if (heat := aim.sampled_at) is not None}
    _add_weighted(computed, losses, {n: w for n in aims if (w := weights[n]) is not None})
    _add_headed(computed, losses, headed)
    _add_taught(computed, losses, taught)
    _add_drawn(computed, losses, drawn)
    _add_others(computed, losses, [n for n in aims if weights[n] is None and n not in {*headed, *taught, *drawn}])
    return sum(losses.totals[1:], losses.totals[0]), Unread(losses.numbers, losses.told)


@dataclass(frozen=True)
class _Computed:
    """A forward's hidden states. order: (part, first row, segment), in the order of rows; a part's follow each other."""

    attached: Attached
    batch: Batch
    hidden_TH: Tensor
    order: Sequence[tuple[int, int, Example]]

    @property
    def parts(self) -> list[int]:
        """Those that have rows, in the order of these."""
        return list(dict.fromkeys(n for n, _, _ in self.order))

    def targets(self, parts: Collection[int]) -> Targets:
        """Of these parts."""
        chosen = set(parts)
        return Targets.of([(start, s) for n, start, s in self.order if n in chosen], self.attached.device)

    def log_probabilities(self, targets: Targets, temperature: float = 1.0) -> Tensor:
        return log_probabilities(self.attached, self.hidden_TH, self.batch, targets, temperature)


@dataclass
class _Losses:
    """What is found of the parts. totals: losses, with the graph. numbers: losses and metrics (see `Unread`). places: (part, begin and end
    of a segment) in the first of the numbers, where weights were known. names: of the others, in order: part -> its metrics. kept: parts
    whose log-probabilities stand behind their numbers."""

    parts: Sequence[Part]
    described: Sequence[Segments]
    totals: list[Tensor] = field(default_factory=list)
    numbers: list[Tensor] = field(default_factory=list)
    places: list[tuple[int, int, int]] = field(default_factory=list)
    names: dict[int, list[str]] = field(default_factory=dict)
    kept: set[int] = field(default_factory=set)

    def weights(self) -> list[Tensor | None]:
        """The weights of each part's log-probabilities, where its objective knows them."""
        asked = zip(self.parts, self.described, strict=True)
        return [None if p.objective.reads_head else p.objective.nll_weights(d) for p, d in asked]

    def add(self, n: int, logp_R: Tensor, ref_R: Tensor | None = None) -> None:
        """The loss and the metrics of a part. logp_R: scores, where its objective reads a head."""
        objective, segments = self.parts[n].objective, self.described[n]
        loss, metrics = objective.loss(logp_R, ref_R, segments)
        if objective.reads_head and not torch.is_grad_enabled():
            metrics = metrics | objective.sums(logp_R, segments)
        self.totals.append(loss)
        self.names[n] = list(metrics)
        found = [loss, *(torch.as_tensor(m, device=loss.device) for m in metrics.values())]
        self.numbers.append(torch.stack([f.detach().to(loss.dtype) for f in found]))
        if objective.steps_on_rows > 1 and segments.samples is not None and segments.samples.old_R is None:
            self.kept.add(n)
            self.numbers.append(logp_R.detach())

    def split(self, parts: Sequence[int], logp_R: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(a part, its own log-probabilities), of parts whose rows follow each other."""
        return zip(parts, logp_R.split([sum(self.described[n].targets) for n in parts]), strict=True)

    def told(self, read: Sequence[Any]) -> list[Outcome]:
        """The outcome of each part, from the numbers as they are read."""
        losses, rest = [0.0] * len(self.parts), iter(read)
        scaled = next(rest) if self.places else []
        for n, a, b in self.places:
            losses[n] += sum(scaled[a:b])
        outcomes = [Outcome(loss) for loss in losses]
        for n, names in self.names.items():
            loss, *metrics = next(rest)
            outcomes[n] = Outcome(loss, dict(zip(names, metrics, strict=True)), next(rest) if n in self.kept else ())
        return outcomes


def _add_weighted(computed: _Computed, losses: _Losses, weights: Mapping[int, Tensor]) -> None:
    """Parts whose weights are known: the loss is made in the one pass over the output head."""
    if not weights:
        return
    targets, scale_R = computed.targets(weights), torch.cat(list(weights.values()))
    total, nll_R = supervised_loss(computed.attached, computed.hidden_TH, computed.batch, targets, scale_R)
    losses.totals.append(total)
    losses.numbers.append(nll_R * scale_R)
    owners = [n for n, _, _ in computed.order if n in weights]
    losses.places = [(n, a, b) for n, (a, b) in zip(owners, targets.runs, strict=True)]


def _add_headed(computed: _Computed, losses: _Losses, parts: Sequence[int]) -> None:
    """Parts that read the scores of the adapter's own head."""
    for n in parts:
        rows = [start + int(t) for m, start, s in computed.order if m == n for t in np.flatnonzero(s.supervised)]
        losses.add(n, member_scores(computed.attached, computed.hidden_TH, computed.batch, losses.parts[n].member, rows))


def _add_taught(computed: _Computed, losses: _Losses, temperatures: Mapping[int, float]) -> None:
    """Parts that have a teacher: the log-probabilities of its likeliest tokens."""
    for n, temperature in temperatures.items():
        part = losses.parts[n]
        assert part.reference is not None
        targets = computed.targets([n])
        of_teacher = part.reference.tokens_of(part.examples, computed.attached.device)
        own_RK = computed.log_probabilities(replace(targets, target_R=of_teacher), temperature)
        losses.add(n, own_RK, part.reference.of(part.examples, computed.attached.device))


def _add_drawn(computed: _Computed, losses: _Losses, temperatures: Mapping[int, float]) -> None:
    """Parts whose answers the variant has drawn: those of a temperature together."""
    for temperature in sorted(set(temperatures.values())):
        parts = [n for n, t in temperatures.items() if t == temperature]
        for n, own_R in losses.split(parts, computed.log_probabilities(computed.targets(parts), temperature)):
            losses.add(n, own_R)


def _add_others(computed: _Computed, losses: _Losses, parts: Sequence[int]) -> None:
    """Parts that are compared with the base's log-probabilities, or with nothing."""
    if not parts:
        return
    for n, own_R in losses.split(parts, computed.log_probabilities(computed.targets(parts))):
        part = losses.parts[n]
        reference = part.reference if part.objective.needs_reference else None
        losses.add(n, own_R, reference.of(part.examples, computed.attached.device) if reference else None)
