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

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trimtab.data.rows import Record, whole
from trimtab.hyperparameters import Hyperparameters

if TYPE_CHECKING:  # run files are read without torch
    import torch
    from torch import Tensor

    from trimtab.data import Example

OBJECTIVES: dict[str, type[Objective]] = {}
"""name in run files -> class, filled by definition of the classes."""


@dataclass(frozen=True)
class Counts:
    """Rows, and supervised tokens of all their segments."""

    rows: int
    targets: int

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Counts:
        targets = [e.targets for e in examples]
        return cls(len(targets), sum(targets))


@dataclass(frozen=True)
class Segments:
    """The segments behind a vector of log-probabilities, row by row in the order of the objective's `parts`.

    roles [S]: their names in `parts`. targets [S]: how many supervised tokens each has. of_all: counts of all rows over which the loss is
    a mean, of which these are a part: the rows of the optimizer step, or the held-out rows. device: that of the log-probabilities.
    """

    roles: tuple[str, ...]
    targets: tuple[int, ...]
    of_all: Counts
    device: torch.device

    def having(self, role: str) -> list[int]:
        """Places in S of the segments with this role."""
        return [i for i, r in enumerate(self.roles) if r == role]

    def sums(self, values_R: Tensor) -> Tensor:
        """[S]: the sum over each segment's tokens; of log-probabilities, the segment's own."""
        import torch

        return torch.stack([v.sum() for v in values_R.split(self.targets)])


@dataclass(frozen=True, kw_only=True)
class Objective(Hyperparameters):
    """Base of all objectives. Fields are hyperparameters; their names must differ from those of methods and training options, because all
    stand side by side in a variant of a run file."""

    needs_reference: ClassVar[bool] = False
    """Whether `loss` wants the base's log-probabilities of the same tokens. They are computed once for each data set."""

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            OBJECTIVES[cls.name] = cls

    @staticmethod
    def parts(record: Record) -> Mapping[str, Record]:
        """The segments of a record, at least one: role -> a record in one of the forms that `data.rows` reads. The first one's answer is
        what held-out rows ask for. BadRow or KeyError where a column is missing. It does not depend on fields, so that variants with
        different ones can share a data set."""
        return whole(record)

    def loss(self, logp_R: Tensor, ref_R: Tensor | None, segments: Segments) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) of whole rows, some or all of those in `segments.of_all`. logp_R: nats, fp32, with the graph. ref_R: those of the
        base, None unless `needs_reference`.

        Loss and metrics are parts of a mean: divided by a count of `segments.of_all`, so that parts of the same rows add up to the whole.
        Differentiable in logp_R. Metrics are scalars; they go into metrics.jsonl under their names.
        """
        raise NotImplementedError

    def nll_weights(self, segments: Segments) -> Tensor | None:
        """w [R], fp32, where `loss` is Σ w · (−logp) with w known before any log-probability and nothing else is reported; else None."""
        return None

    def report(self, loss: float, metrics: Mapping[str, float]) -> dict[str, float | None]:
        """The scores of held-out rows, from their loss and metrics. "loss" is among them."""
        return {"loss": loss, **metrics}
