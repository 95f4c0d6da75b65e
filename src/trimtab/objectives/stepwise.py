"""A process reward model: a head over (wrong, right) at the end of each step of a solution (arXiv:2305.20050, 2211.14275).

    L = mean over steps of −log softmax(W h + b)[label]        h: hidden state of the step's last token

Rows: `prompt`, `completions` (a list of steps) and `labels` (a list of true or false), as TRL's PRMTrainer has them. A line break ends each
step, and is where it is judged. The loss is that of transformers' AutoModelForTokenClassification. Logged: accuracy, over steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trimtab.bases.template import BadRow
from trimtab.data.keys import flag
from trimtab.data.rows import Read, Record
from trimtab.data.turns import kind_of
from trimtab.methods import Head
from trimtab.objectives.base import Objective, Segments

if TYPE_CHECKING:
    from torch import Tensor

CLASSES = ("wrong", "right")


@dataclass(frozen=True, kw_only=True)
class Stepwise(Objective):
    """Every step weighs the same, whatever its row."""

    name: ClassVar[str] = "stepwise"
    reads_head: ClassVar[bool] = True
    lr_scale: ClassVar[float] = 0.1
    metrics: ClassVar[Mapping[str, bool]] = {"accuracy": True}
    head: ClassVar[Head] = Head(CLASSES, every_token=True, bias=True)

    @staticmethod
    def parts(record: Record) -> Mapping[str, Record]:
        steps, labels = record["completions"], record["labels"]
        if not isinstance(steps, list) or not steps or not all(isinstance(s, str) and s.strip() for s in steps):
            raise BadRow("completions: not a list of steps with text")
        marks = [flag(x) for x in labels] if isinstance(labels, list) else []
        if len(marks) != len(steps) or None in marks:
            raise BadRow(f"labels: not a list of true or false, one for each of the {len(steps)} steps")
        if not isinstance(record["prompt"], str):
            raise BadRow(f"prompt: {kind_of(record['prompt'])}, not text: steps follow a text")
        rest = {k: v for k, v in record.items() if k not in ("completions", "labels", "prompt")}
        part = Read({**rest, "text": record["prompt"]})
        part.steps = tuple(steps)
        return {"".join("1" if mark else "0" for mark in marks): part}

    def loss(self, logp_R: Tensor, ref_R: Tensor | None, segments: Segments) -> tuple[Tensor, dict[str, Tensor]]:
        from torch.nn.functional import cross_entropy

        wanted_R = segments.integers([int(mark) for role in segments.roles for mark in role])
        right = (logp_R.detach().argmax(1) == wanted_R).sum()
        steps = segments.of_all.targets
        return cross_entropy(logp_R, wanted_R, reduction="sum") / steps, {"accuracy": right / steps}
