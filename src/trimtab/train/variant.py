"""A variant: one adapter under training, with its own order of rows, dropout, optimizer, schedule and clipping.

Nothing in here depends on whether other variants train as well. So a joint run gives each the result that it would get alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.data import Example, order
from trimtab.forward.attached import Attached
from trimtab.forward.packs import PackedAdapter
from trimtab.methods.base import Method, Site
from trimtab.objectives import Counts
from trimtab.train.losses import Reference
from trimtab.train.options import VariantConfig

LORA_B = "lora_B.weight"
"""LoRA's up-projection, by its name in `Site.shapes`."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows of an optimizer step that enter one forward together. seed: of their dropout."""

    examples: Sequence[Example]
    seed: int

    @property
    def tokens(self) -> int:
        return sum(e.tokens for e in self.examples)


@dataclass(frozen=True)
class StepBatch:
    """All rows of one optimizer step, cut into micro-batches. counts: what the loss is a mean over."""

    micro_batches: Sequence[MicroBatch]
    counts: Counts

    @property
    def tokens(self) -> int:
        return sum(m.tokens for m in self.micro_batches)

    @property
    def origins(self) -> list[str]:
        return [e.origin for m in self.micro_batches for e in m.examples]


class Rows:
    """A variant's endless stream of batches of `batch_size` rows: shuffled anew in each epoch, a function of (seed, position) alone."""

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int):
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.epoch = self.position = 0
        self._order = order(len(examples), seed, 0)

    def take(self) -> list[Example]:
        """The next batch. The last one of an epoch may be smaller."""
        if self.position >= len(self.examples):
            self.epoch, self.position = self.epoch + 1, 0
            self._order = order(len(self.examples), self.seed, self.epoch)
        chosen = self._order[self.position : self.position + self.batch_size]
        self.position += len(chosen)
        return [self.examples[i] for i in chosen]

    def seek(self, epoch: int, position: int) -> None:
        """Go on from where a checkpoint stood."""
        self.epoch, self.position = epoch, position
        self._order = order(len(self.examples), self.seed, epoch)


@dataclass
class Progress:
    """What a variant has done so far; losses are one number a step. stopped: why it diverged. finished_early: why validation ended it.

    valid: every validation, {"step", "loss", scores…}. base_valid: the same of the base, which is measured once. best_metric, best_step: of
    the best validation. bad_evals: validations since.
    """

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    stopped: str = ""
    finished_early: str = ""
    best_metric: float | None = None
    best_step: int = 0
    bad_evals: int = 0
    valid: list[dict[str, Any]] = field(default_factory=list)
    base_valid: dict[str, Any] = field(default_factory=dict)


class Variant:
    """One adapter under training.

    attached: the model that it runs on: the shared base, or (full fine-tuning) its own. params: fp32 leaves, by `Site.key`. best: the
    tensors of the best validation, on the CPU; None where there is none or where params are these. reference: the base's log-probabilities
    of the rows, where the objective needs them.
    """

    def __init__(
        self,
        config: VariantConfig,
        attached: Attached,
        sites: Sequence[Site],
        params: Mapping[str, Tensor],
        examples: Sequence[Example],
        seed: int,
        max_tokens: int,
        reference: Reference | None = None,
    ):
        self.reference: Reference = reference or {}
        self.config, self.attached, self.sites, self.max_tokens = config, attached, sites, max_tokens
        self.seed = config.options.seed if config.options.seed is not None else seed
        self.params = {k: p.detach().clone().requires_grad_() for k, p in params.items()}
        self.rows = Rows(examples, config.options.batch_size, self.seed)
        o = config.options
        self.total_steps = o.total_steps(len(examples))
        self.optimizer = torch.optim.AdamW(
            self._groups(),
            lr=config.lr,
            betas=(o.adam_beta1, o.adam_beta2),
            eps=o.adam_epsilon,
            weight_decay=o.weight_decay,
            fused=True,
        )
        self.progress = Progress()
        self.best: dict[str, Tensor] | None = None

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def method(self) -> Method:
        return self.config.method

    @property
    def live(self) -> bool:
        p = self.progress
        return not p.stopped and not p.finished_early and p.step < self.total_steps

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters with the ratio of their rate to the schedule's: 1, and LoRA+'s for the B matrices (Hayou et al. 2024)."""
        ratio = self.config.options.loraplus_lr_ratio
        if ratio is None:
            return [{"params": list(self.params.values()), "ratio": 1.0}]
        keys = {site.key(LORA_B) for site in self.sites if not site.saved and LORA_B in site.shapes}
        b, others = ([p for k, p in self.params.items() if (k in keys) is inside] for inside in (True, False))
        return [{"params": others, "ratio": 1.0}, {"params": b, "ratio": ratio}]

    def pack(self) -> PackedAdapter | None:
        """The adapter as this forward runs it, with the graph to its parameters; None where the rows are the model's own (full
        fine-tuning)."""
        return self.attached.pack(self.method, self.params, self.sites)

    def next_batch(self) -> StepBatch:
        """Draw the rows of the next optimizer step."""
        examples = [e for _ in range(self.config.options.gradient_accumulation_steps) for e in self.rows.take()]
        cut = enumerate(_cut(examples, self.max_tokens))
        micro_batches = [MicroBatch(rows, _dropout_seed(self.seed, self.progress.step, i)) for i, rows in cut]
        return StepBatch(micro_batches, Counts.of(examples))

    def learning_rate(self) -> float:
        """The rate of the next step: linear warm-up from 0, then the schedule down to 0 at the last step."""
        o, step = self.config.options, self.progress.step
        if step < o.warmup_steps:
            return self.config.lr * (step + 1) / o.warmup_steps
        done = (step - o.warmup_steps) / max(1, self.total_steps - o.warmup_steps)
        return self.config.lr * {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[o.schedule]

    def step(self, loss: float, norm: float, batch: StepBatch, seconds: float) -> dict[str, float]:
        """Clip and step on the gradients that the batch's forwards have left; norm: theirs. Returns what to log.

        A loss or gradient that is not finite stops the variant before the optimizer sees it: its tensors stay at the last good step.
        """
        p = self.progress
        if not math.isfinite(loss) or not math.isfinite(norm):
            p.stopped = f"step {p.step + 1}: the loss is {loss}, the gradient's norm {norm}; rows {', '.join(batch.origins[:16])}"
            self.clear()
            return {"loss": loss, "grad_norm": norm, "lr": self.learning_rate()}
        if norm > self.config.options.max_grad_norm:
            torch._foreach_mul_(self.gradients(), self.config.options.max_grad_norm / (norm + 1e-6))
        lr = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["ratio"]
        self.optimizer.step()
        self.clear()
        p.step, p.tokens, p.seconds = p.step + 1, p.tokens + batch.tokens, p.seconds + seconds
        p.supervised_tokens += batch.counts.targets
        p.losses.append(loss)
        return {"loss": loss, "grad_norm": norm, "lr": lr}

    def gradients(self) -> list[Tensor]:
        """The gradients of the parameters that have one."""
        return [p.grad for p in self.params.values() if p.grad is not None]

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the rest of the run depends on, not copied: "param/KEY", "best/KEY" and the optimizer's "exp_avg/KEY", ….

        There is no more state than these, `progress` and the place in `rows`: the order of rows, dropout and the learning rate are
        functions of seed and step, and no random number generator outlives a step.
        """
        found = {f"param/{k}": p.detach() for k, p in self.params.items()}
        for k, p in self.params.items():
            found |= {f"{name}/{k}": t for name, t in self.optimizer.state.get(p, {}).items()}
        return found | {f"best/{k}": t for k, t in (self.best or {}).items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take on what `state` gave; the tensors are copied."""
        self.optimizer.state.clear()
        best = {}
        for name, tensor in state.items():
            kind, _, key = name.partition("/")
            if kind == "param":
                self.params[key].copy_(tensor)
            elif kind == "best":
                best[key] = tensor.to("cpu", copy=True)
            else:  # a fused AdamW keeps its count of steps, too, where the parameter is
                self.optimizer.state[self.params[key]][kind] = tensor.to(self.params[key].device, copy=True)
        self.best = best or None

    def keep(self) -> None:
        """Remember the tensors as they stand as the best so far."""
        self.best = {k: p.detach().to("cpu", copy=True) for k, p in self.params.items()}

    @torch.no_grad()
    def restore_best(self) -> None:
        """Go back to the best tensors, where others have followed; the last word of a variant, not a step of its training."""
        if self.best is not None:
            for k, p in self.params.items():
                p.copy_(self.best[k])
            self.best = None

    def trained(self) -> dict[str, Tensor]:
        """The tensors as they stand, detached."""
        return {k: p.detach() for k, p in self.params.items()}


def _cut(examples: Sequence[Example], max_tokens: int) -> Iterator[list[Example]]:
    """Micro-batches of at most max_tokens tokens; rows of similar length together, so attention pads little. A row is never cut: its
    segments stay together, and a longer one stands alone."""
    part: list[Example] = []
    tokens = 0
    for e in sorted(examples, key=lambda e: e.tokens):
        if part and tokens + e.tokens > max_tokens:
            yield part
            part, tokens = [], 0
        part.append(e)
        tokens += e.tokens
    if part:
        yield part


def _dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    return int.from_bytes(hashlib.sha256(np.array([seed, step, micro_batch], dtype=np.int64).tobytes()).digest()[:4], "little")
