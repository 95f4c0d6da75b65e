"""The contract of an objective: what a variant's log-probabilities are trained towards.

Read this file first. An objective says how a record of a data file becomes segments (`parts`), and turns the log-probabilities of their
supervised tokens into a loss (`loss`). Everything else is shared: forwards, the output head, micro-batches, optimizers, validation. The
gradient of a loss with respect to a log-probability is the weight of one target row, so one kernel serves all objectives: log-probabilities
in chunks, `loss` on that small vector, then the backward of the head with those weights (`ops.log_probabilities`). An objective that knows
the weights beforehand says them in `nll_weights` and saves the second pass over the head.

A class that sets `name` registers itself. With that a run file can name it, and the laws run over it.

Words: a *segment* is one token sequence with its supervised tokens; a *row* has one segment or several, such as a chosen and a rejected
answer. The segments of a row are never separated: they enter one forward and one call of `loss`. Dimensions: R supervised tokens of the
segments, one after the other; S segments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from trimtab.data.rows import whole
from trimtab.hyperparameters import Hyperparameters

if TYPE_CHECKING:  # run files are read without torch
    import torch
    from torch import Tensor

    from trimtab.data import Example
    from trimtab.methods import Head

OBJECTIVES: dict[str, type[Objective]] = {}
"""name in run files -> class, filled by definition of the classes."""


SAMPLE, LEARNT = "sample", "learnt"
"""The role of a drawn answer. Among the counts of a step, SAMPLE is all answers, and LEARNT those that are computed: an answer whose
gradient is 0 is counted and left out."""


def aimed_at(options: Mapping[str, Any]) -> Objective:
    """The objective among the settings of a trained adapter (`VariantConfig.aim`): `sft` where none is named, or it is not one of these.
    ConfigError where its fields are not."""
    cls = OBJECTIVES.get(str(options.get("objective")), OBJECTIVES["sft"])
    return cls(**{f.name: options[f.name] for f in fields(cls) if f.name in options})


def directions() -> dict[str, bool]:
    """Every metric that some objective reports -> whether higher is better; the loss is one."""
    return {"loss": False} | {name: higher for cls in OBJECTIVES.values() for name, higher in cls.metrics.items()}


class Taught(NamedTuple):
    """What an objective wants of a teacher: its `tokens` likeliest tokens at each target, of its distribution at a temperature."""

    teacher: str
    tokens: int
    temperature: float = 1.0


@dataclass(frozen=True)
class Counts:
    """Rows, and supervised tokens of all their segments. segments_of, targets_of: role -> its segments, their supervised tokens."""

    rows: int
    targets: int
    segments_of: Mapping[str, int] = field(default_factory=Counter)
    targets_of: Mapping[str, int] = field(default_factory=Counter)

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Counts:
        rows, segments, targets = 0, Counter[str](), Counter[str]()
        for e in examples:
            rows += 1
            for s in e.segments:
                segments[s.role] += 1
                targets[s.role] += int(s.supervised.sum())
        return cls(rows, targets.total(), segments, targets)


@dataclass(frozen=True)
class Samples:
    """What is known of the segments of a call of `loss` that the variant has drawn itself, as `train.samples.Sample` says it: advantage_S;
    the others, or None."""

    advantage_S: Tensor
    old_R: Tensor | None = None
    base_R: Tensor | None = None
    drawn_R: Tensor | None = None


@dataclass(frozen=True)
class Segments:
    """The segments behind a vector of log-probabilities, row by row in the order of the objective's `parts`.

    roles [S]: their names in `parts`. targets [S]: how many supervised tokens each has. of_all: counts of all rows over which the loss is
    a mean, of which these are a part: the rows of the optimizer step, or the held-out rows. device: that of the log-probabilities.
    probes_P: of the objective's `probes` of all those rows, log p less the base's, summed over each one's targets, without a graph; None
    where it has none. samples: what else is known of segments that the variant has drawn itself (`sampled_at`).
    """

    roles: tuple[str, ...]
    targets: tuple[int, ...]
    of_all: Counts
    device: torch.device
    probes_P: Tensor | None = None
    samples: Samples | None = None

    def having(self, role: str) -> list[int]:
        """Places in S of the segments with this role."""
        return [i for i, r in enumerate(self.roles) if r == role]

    def sums(self, values_R: Tensor) -> Tensor:
        """[S]: the sum over each segment's tokens; of log-probabilities, the segment's own."""
        import torch

        return torch.stack([v.sum() for v in values_R.split(self.targets)])

    def lengths(self) -> Tensor:
        """[S], fp32: the supervised tokens of each segment."""
        return self.floats(self.targets)

    def are(self, role: str) -> Tensor:
        """[S], fp32: 1 where a segment has this role, else 0."""
        return self.floats([float(r == role) for r in self.roles])

    def floats(self, numbers: Sequence[float]) -> Tensor:
        """fp32, on the device."""
        return self._uploaded(numbers, "float32")

    def integers(self, numbers: Sequence[int]) -> Tensor:
        """int64, on the device."""
        return self._uploaded(numbers, "int64")

    def _uploaded(self, numbers: Sequence[float], dtype: str) -> Tensor:
        import numpy as np

        from trimtab import ops

        return ops.upload([np.asarray(numbers, dtype=dtype)], self.device)[0]


@dataclass(frozen=True, kw_only=True)
class Objective(Hyperparameters):
    """Base of all objectives. Fields are hyperparameters; their names must differ from those of methods and training options, because all
    stand side by side in a variant of a run file."""

    needs_reference: ClassVar[bool] = False
    """Whether `loss` wants the base's log-probabilities of the same tokens. They are computed once for each data set."""
    reads_head: ClassVar[bool] = False
    """Whether `loss` reads the scores of a head of the adapter's own, instead of log-probabilities. Its `parts` are `data.rows.Read`."""
    lr_scale: ClassVar[float] = 1.0
    """What a method's preset learning rate is multiplied by, where a variant names no lr."""
    judged_by: ClassVar[str] = "loss"
    """What validation judges by, where a variant does not say it."""
    metrics: ClassVar[Mapping[str, bool]] = {}
    """What `report` gives beside the loss and runs can be judged by -> whether higher is better."""

    @classmethod
    def some(cls) -> Self:
        """One of its kind, to read rows by where the fields that were given are wrong."""
        return cls()

    @property
    def taught_by(self) -> Taught | None:
        """Where `loss` wants the K likeliest tokens of a teacher at each target instead of the target alone. Then logp_R is [R, K], of
        these tokens, the likeliest first, and ref_R the teacher's, both at the temperature. The latter are computed once for each data
        set."""
        return None

    @property
    def sampled_at(self) -> float | None:
        """The temperature at which the variant draws answers to its rows before a step, if it learns from these (`train.samples`). The
        log-probabilities are then those of that temperature."""
        return None

    @property
    def answers(self) -> int:
        """How many answers the variant draws to each row of a step."""
        return 0

    @property
    def steps_on_rows(self) -> int:
        """Optimizer steps on the same rows, one after the other."""
        return 1

    @property
    def answer_tokens(self) -> int:
        """How many tokens an answer that the variant draws has at most."""
        return 0

    @property
    def head(self) -> Head | None:
        """The head that a variant trains, where `loss` reads one. Then logp_R is [R, K], its scores in fp32 at the tokens that are read."""
        return None

    @property
    def passes_before(self) -> int:
        """Forwards without gradients of as many tokens as the rows have, before each step: what `probes` cost."""
        return 0

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            OBJECTIVES[cls.name] = cls

    parts = staticmethod(whole)
    """The segments of a record, at least one: role -> a record in one of the forms that `data.rows` reads. The first one's answer is what
    held-out rows ask for. BadRow or KeyError where a column is missing. It does not depend on fields, so that variants with different ones
    can share a data set. `whole`, by which readers know that a file's own columns are meant: one segment, the record as it is."""

    def loss(self, logp_R: Tensor, ref_R: Tensor | None, segments: Segments) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) of whole rows, some or all of those in `segments.of_all`. logp_R: nats, fp32, with the graph. ref_R: those of the
        base, None unless `needs_reference`.

        Loss and metrics are parts of a mean: divided by a count of `segments.of_all`, so that parts of the same rows add up to the whole.
        Differentiable in logp_R. Metrics are scalars; they go into metrics.jsonl under their names.
        """
        raise NotImplementedError

    def probes(self, rows: Sequence[Example]) -> list[Example]:
        """Token sequences, made of those of the rows, whose log-probabilities `loss` wants beside the rows' own, without a graph. rows: all
        of an optimizer step, in the order in which they were drawn, or all that are held out."""
        return []

    def nll_weights(self, segments: Segments) -> Tensor | None:
        """w [R], fp32, where `loss` is Σ w · (−logp) with w known before any log-probability and nothing else is reported; else None."""
        return None

    def sums(self, scores_RK: Tensor, segments: Segments) -> dict[str, Tensor]:
        """What `report` needs of held-out rows beside the metrics: numbers whose sums over parts are those of all rows. Heads only."""
        return {}

    def unjudged(self, metric: str, roles: Collection[str]) -> str | None:
        """Why held-out rows whose segments have these roles do not tell a metric of `metrics`; None where they do."""
        return None

    def report(self, loss: float, metrics: Mapping[str, float]) -> dict[str, float | None]:
        """The scores of held-out rows, from their loss and metrics: "loss" and all that `metrics` names, None where rows do not tell."""
        return {"loss": loss, **dict.fromkeys(self.metrics), **metrics}
