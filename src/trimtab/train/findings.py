"""What `check` hands on: splits as read, and its report: findings, counts, rendered rows, estimates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from trimtab.data import Dropped, Row
from trimtab.data.prompts_alone import Asked
from trimtab.data.token_store import Examples
from trimtab.tables import Table

SHOWN = 10
"""Findings of one kind that are named by file and line; the others are counted."""

Level = Literal["error", "warning", "note"]


@dataclass
class Split:
    """A split as read: the examples of the rows that are left, those that an epoch draws, and what was dropped. rows: of a held-out split.
    answers: of train, where labels are to be found in them. asked: the first of train that are prompts alone."""

    data: str
    name: str
    rows: list[Row] = field(default_factory=list)
    answers: set[str] = field(default_factory=set)
    examples: Examples = field(default_factory=lambda: Examples([]))
    epoch: Examples = field(default_factory=lambda: Examples([]))
    starts: list[int] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)

    @property
    def where(self) -> str:
        return f"data.{self.data}.{self.name}"


@dataclass(frozen=True)
class Finding:
    """level: error, warning or note. where: part of the run file. items: the first `SHOWN` of `count`, each "file:line: particulars"."""

    level: Level
    where: str
    message: str
    items: tuple[str, ...] = ()
    count: int = 0
    fix: str = ""

    @classmethod
    def of(cls, level: Level, where: str, message: str, items: Sequence[str], fix: str = "") -> Finding:
        return cls(level, where, message, tuple(items[:SHOWN]), len(items), fix)


@dataclass(frozen=True)
class SourceCounts:
    """One source of one split. read: rows found, of which `dropped` cannot be trained on. drawn: rows of one epoch, by weight; tokens and
    supervised are over those."""

    path: str
    weight: float
    read: int
    dropped: int
    drawn: int
    tokens: int
    supervised: int


@dataclass(frozen=True)
class SplitCounts:
    """One split of one data set. histogram: (longest row of the bin in tokens, rows), over the rows that are left."""

    data: str
    split: str
    sources: tuple[SourceCounts, ...]
    lengths: Mapping[str, int]
    histogram: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        return sum(s.tokens for s in self.sources)

    @property
    def supervised(self) -> int:
        return sum(s.supervised for s in self.sources)


@dataclass(frozen=True)
class Rendered:
    """A row as the base reads it. runs: (text, whether its tokens are supervised), in order."""

    origin: str
    runs: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class VariantEstimate:
    """What one variant would do. tokens: of all its steps. flops: of them all. seconds: (least, most), alone at the speed that `Estimate`
    assumes."""

    name: str
    method: str
    data: str
    rows_per_epoch: int
    tokens_per_epoch: int
    steps: int
    tokens: int
    tokens_per_step: int
    trainable: int
    adapter_bytes: int
    virtual_tokens: int
    flops: float
    seconds: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Estimate:
    """Of the whole run. forward_tokens: rows of its largest forward. memory_bytes: (least, most), see `room.memory_bytes`; the
    process itself holds process_bytes besides. probe_flops: matmul speed measured here, per second. seconds: of all steps.
    judging_seconds: of validation and of the scores at the end. answers: texts that are generated for those scores."""

    dtype: str
    device: str
    forward_tokens: int
    memory_bytes: tuple[int, int]
    process_bytes: int
    available_bytes: int
    probe_flops: float
    efficiency: tuple[float, float]
    seconds: tuple[float, float]
    judging_seconds: tuple[float, float]
    answers: int


@dataclass
class CheckReport:
    """All that `check` found. estimate: None where no variant has rows. seconds: that the check took."""

    base: str
    base_parameters: int
    max_positions: int
    splits: list[SplitCounts] = field(default_factory=list)
    rendered: list[Rendered] = field(default_factory=list)
    variants: list[VariantEstimate] = field(default_factory=list)
    estimate: Estimate | None = None
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def errors(self) -> list[Finding]:
        return [f for f in self.findings if f.level == "error"]

    @property
    def warnings(self) -> list[Finding]:
        return [f for f in self.findings if f.level == "warning"]

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain JSON values."""
        return dataclasses.asdict(self)

    def tables(self) -> list[Table]:
        """Sources, variants and findings."""
        sources = [
            [f"{s.data}.{s.split}", x.path, *(f"{n:,}" for n in (x.read, x.dropped, x.drawn, x.tokens, x.supervised))]
            for s in self.splits
            for x in s.sources
        ]
        variants = [
            [v.name, v.method, v.data, f"{v.trainable:,}", f"{v.steps:,}", f"{v.tokens:,}", f"{v.seconds[0]:.0f} to {v.seconds[1]:.0f}"]
            for v in self.variants
        ]
        found = [[f.level, f.where, "; ".join([f.message, *f.items, *([f"fix: {f.fix}"] if f.fix else [])])] for f in self.findings]
        headings = ("split", "source", "rows", "dropped", "an epoch", "tokens", "supervised")
        made = [Table(self.base, headings, sources, frozenset(("split", "source")))]
        if variants:
            headings = ("variant", "method", "data", "trainable", "steps", "tokens", "alone, s")
            made.append(Table("", headings, variants, frozenset(("variant", "method", "data"))))
        made += [Table("", ("level", "where", "what"), found, frozenset(("level", "where", "what")))] if found else []
        return made

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables()))

    def _repr_html_(self) -> str:
        return "".join(t.html() for t in self.tables())
