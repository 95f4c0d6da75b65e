"""Classification by a head over labels: one label for a text.

    L = mean over rows of −log softmax(W h)[label]        h: hidden state of the row's last token

This is the loss of transformers' AutoModelForSequenceClassification. Rows have a text (`text`, a conversation, or a prompt with its answer)
and a `label`: a name or an integer. Logged: accuracy. Of held-out rows also macro F1: the mean over labels that a row has or was given of
2 · right / (rows of the label + rows that were given it), as scikit-learn computes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trimtab.bases.template import BadRow
from trimtab.data.keys import is_blank
from trimtab.data.rows import Read, Record
from trimtab.methods import Head
from trimtab.objectives.base import Objective, Segments

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Classify(Objective):
    """classes: the labels in the order of the head's scores. None: those that the data set's `labels` lists, else those of its training
    rows, sorted."""

    name: ClassVar[str] = "classify"
    reads_head: ClassVar[bool] = True
    metrics: ClassVar[Mapping[str, bool]] = {"accuracy": True, "macro_f1": True}

    classes: tuple[str, ...] | None = None

    def problems(self) -> list[str]:
        if self.classes is not None and (len(self.classes) < 2 or len(set(self.classes)) < len(self.classes)):
            return [f"classes = {list(self.classes)}: at least two, and each once"]
        return []

    @property
    def head(self) -> Head | None:
        return Head(self.classes) if self.classes else None

    @staticmethod
    def parts(record: Record) -> Mapping[str, Record]:
        return {label_of(record): Read({k: v for k, v in record.items() if k != "label"})}

    def loss(self, logp_R: Tensor, ref_R: Tensor | None, segments: Segments) -> tuple[Tensor, dict[str, Tensor]]:
        from torch.nn.functional import cross_entropy

        wanted_R = self._wanted(segments)
        right = (logp_R.detach().argmax(1) == wanted_R).sum()
        rows = segments.of_all.rows
        return cross_entropy(logp_R, wanted_R, reduction="sum") / rows, {"accuracy": right / rows}

    def sums(self, scores_RK: Tensor, segments: Segments) -> dict[str, Tensor]:
        import torch

        wanted_R, given_R = self._wanted(segments), scores_RK.argmax(1)
        of = {"right": wanted_R[wanted_R == given_R], "wanted": wanted_R, "given": given_R}
        counts = {name: torch.bincount(found, minlength=scores_RK.shape[1]) for name, found in of.items()}
        return {f"{name} {k}": count for name, found in counts.items() for k, count in enumerate(found)}

    def report(self, loss: float, metrics: Mapping[str, float]) -> dict[str, float | None]:
        count = {name: [metrics.get(f"{name} {k}", 0.0) for k in range(len(self.classes or ()))] for name in ("right", "wanted", "given")}
        f1 = [2 * r / (w + g) for r, w, g in zip(*count.values(), strict=True) if w + g]
        rows = sum(count["wanted"])
        return {"loss": loss, "accuracy": sum(count["right"]) / rows if rows else None, "macro_f1": sum(f1) / len(f1) if f1 else None}

    def _wanted(self, segments: Segments) -> Tensor:
        """int64 [R]: each row's label as a number."""
        place = {name: i for i, name in enumerate(self.classes or ())}
        return segments.integers([place[role] for role in segments.roles])


def label_of(record: Record) -> str:
    """A record's label as text. BadRow where it is neither a name nor an integer."""
    label: Any = record["label"]
    if is_blank(label):
        raise BadRow("no label: label is empty")
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise BadRow(f"label: {label!r} is neither a name nor an integer")
    return str(label).strip()


def in_order(labels: set[str]) -> tuple[str, ...]:
    """Labels as a head has them: numbers by their value, names by the alphabet."""
    numbers = all(x.removeprefix("-").isdecimal() for x in labels)
    return tuple(sorted(labels, key=lambda x: (int(x), x)) if numbers else sorted(labels))
