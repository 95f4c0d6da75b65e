"""Full fine-tuning as a variant: its own trainable copy of the model, fp32 master weights, the same batches and steps as every adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.bases.copies import copied
from trimtab.bases.progress import quiet_transformers
from trimtab.data import Example
from trimtab.errors import ConfigError
from trimtab.forward.attached import Attached
from trimtab.forward.packs import PackedAdapter
from trimtab.model import Base
from trimtab.store.staging import staged
from trimtab.train.losses import Reference
from trimtab.train.options import VariantConfig
from trimtab.train.variant import StepBatch, Variant


class FullVariant(Variant):
    """Every weight trains. The model computes in the base's dtype; the optimizer steps fp32 masters, which are copied back after each
    step."""

    def __init__(
        self, config: VariantConfig, base: Base, examples: Sequence[Example], seed: int, max_tokens: int, reference: Reference | None
    ):
        if stored := {m.name for m in base.attached.weights.of.values() if not m.stored_dense}:
            raise ConfigError(
                f"full fine-tuning cannot train weights that are stored as {', '.join(sorted(stored))}",
                fix="train an adapter, or load the base unquantised",
            )
        attached = Attached(copied(base.model))
        attached.activation_checkpointing = base.attached.activation_checkpointing
        attached.row_wise.become(base.attached.row_wise)
        self.weights = dict(attached.model.named_parameters())  # tied weights appear once
        masters = {k: w.float() for k, w in self.weights.items()}
        super().__init__(config, attached, [], masters, examples, seed, max_tokens, reference, base.attached)
        for w in self.weights.values():
            w.requires_grad_()

    def next_batch(self) -> StepBatch:
        """Draw the rows of the next step; what validation has computed from the weights goes, since the step will change them."""
        self.attached.drop_copies()
        return super().next_batch()

    def pack(self) -> PackedAdapter | None:
        return None

    def gradients(self) -> list[Tensor]:
        """Move the model's gradients to the masters."""
        for k, w in self.weights.items():
            if w.grad is not None:
                self.params[k].grad = w.grad.float()
                w.grad = None
        return super().gradients()

    def step(self, loss: float, norm: float, batch: StepBatch, seconds: float) -> dict[str, float]:
        logged = super().step(loss, norm, batch, seconds)
        self._publish()
        return logged

    def restore(self, state: Mapping[str, Tensor]) -> None:
        super().restore(state)
        self._publish()

    def restore_best(self) -> None:
        super().restore_best()
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        """Copy the masters into the model, in its dtype."""
        for k, w in self.weights.items():
            w.copy_(self.params[k])

    def save(self, folder: Path, tokenizer: Any) -> None:
        """Write a model folder that transformers loads, whole or not at all; one that an interrupted run has left is replaced."""
        earlier = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        with staged(folder, may_replace=earlier) as work, quiet_transformers():
            self.attached.model.save_pretrained(work)
            tokenizer.save_pretrained(work)
