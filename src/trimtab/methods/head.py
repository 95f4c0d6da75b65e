"""Heads: a matrix of an adapter's own behind the base's last hidden state, in the place of the base's output head.

    scores = W h + b        W [K, H], b [K] or none; h [H] the hidden state after the final norm; K labels, 1 for a reward

A head belongs to an adapter of any method, and is its last site. It computes in fp32. In files it is what transformers calls `score`, under
`modules_to_save`, as peft saves it. Dimensions: H hidden, K labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab.bases.spec import Spec
from trimtab.methods.base import Site

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SCORE = "score"
NAMES = (SCORE, "classifier")
"""What transformers calls the head of a causal model; peft names both in `modules_to_save`."""
STD = 0.02
TASKS = {False: "SEQ_CLS", True: "TOKEN_CLS"}
"""`Head.every_token` -> peft's task_type."""


@dataclass(frozen=True)
class Head:
    """labels: one for each score; a reward has one. every_token: scores are read at tokens within a sequence, else at its last one.
    module: its name in files. bias: whether it has b."""

    labels: tuple[str, ...]
    every_token: bool = False
    module: str = SCORE
    bias: bool = False

    @property
    def task(self) -> str:
        """peft's task_type."""
        return TASKS[self.every_token]

    def site(self, spec: Spec) -> Site:
        """Its tensors, as a module that peft saves whole."""
        shapes: dict[str, tuple[int, ...]] = {"weight": (len(self.labels), spec.hidden_size)}
        return Site(self.module, shapes | ({"bias": (len(self.labels),)} if self.bias else {}), saved=True, head=True)

    def init(self, spec: Spec, generator: torch.Generator) -> dict[str, Tensor]:
        """Its tensors by `Site.key`: W normal(0.02), b zero, as transformers makes them."""
        import torch

        site = self.site(spec)
        found = {site.key(name): torch.zeros(shape, dtype=torch.float32) for name, shape in site.shapes.items()}
        found[site.key("weight")].normal_(std=STD, generator=generator)
        return found

    def to_dict(self) -> dict[str, Any]:
        """As trimtab.json has it."""
        return {"labels": list(self.labels), "every_token": self.every_token, "module": self.module, "bias": self.bias}

    @classmethod
    def from_dict(cls, content: Any) -> Head | None:
        """What `to_dict` gave; None of anything else."""
        types: Mapping[str, type] = {"labels": list, "every_token": bool, "module": str, "bias": bool}
        if not isinstance(content, dict) or content.keys() != types.keys() or content["module"] not in NAMES:
            return None
        if any(type(content[k]) is not t for k, t in types.items()) or not content["labels"]:
            return None
        labels = tuple(content["labels"])
        return cls(**{**content, "labels": labels}) if all(isinstance(x, str) for x in labels) and len(set(labels)) == len(labels) else None


def unnamed(count: int) -> tuple[str, ...]:
    """Labels where a file has none, as transformers calls them."""
    return tuple(f"LABEL_{i}" for i in range(count))
