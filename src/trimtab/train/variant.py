"""A variant: one adapter under training, with its own order of rows, dropout, optimizer, schedule and clipping.

Nothing in here depends on whether other variants train as well. So a joint run gives each the result that it would get alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.data import Example, order
from trimtab.forward.attached import Attached
from trimtab.forward.packs import PackedAdapter
from trimtab.methods import Head
from trimtab.methods.base import Method, Site
from trimtab.objectives import Counts
from trimtab.train.drawn import Drawn
from trimtab.train.losses import Reference
from trimtab.train.optimizers import Optimizers
from trimtab.train.options import VariantConfig

LORA_B = "lora_B.weight"
"""LoRA's up-projection, by its name in `Site.shapes`."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows of an optimizer step that enter one forward together. seeds: of each row's dropout and noise."""

    examples: Sequence[Example]
    seeds: Sequence[int]

    @property
    def tokens(self) -> int:
        return sum(e.tokens for e in self.examples)


@dataclass(frozen=True)
class StepBatch:
    """All rows of one optimizer step, in the order in which they were drawn, and cut into micro-batches. counts: what the loss is a mean
    over. metrics: what is known of the rows before the step. Rows that are prompts to be answered first have no micro-batches yet."""

    examples: Sequence[Example]
    micro_batches: Sequence[MicroBatch]
    counts: Counts
    metrics: Mapping[str, float] = field(default_factory=dict)

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

    attached: the model that it runs on: the shared base, or (full fine-tuning) its own. base: the shared one. params: fp32 leaves, by
    `Site.key`; trained_params: those that train. best: the tensors of the best validation, on the CPU; None where there is none or where
    params are these. reference: what the base or a teacher says of the rows, where the objective needs it. drawn: answers of its own that
    it is learning from. head: its own, where the objective reads one.
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
        base: Attached | None = None,
        head: Head | None = None,
    ):
        self.reference, self.base, self.head = reference, base or attached, head
        self.config, self.attached, self.sites, self.max_tokens = config, attached, sites, max_tokens
        self.seed = config.options.seed if config.options.seed is not None else seed
        self.params = {k: p.detach().clone() for k, p in params.items()}
        fixed = {s.key(name) for s in sites for name in s.fixed}
        self.trained_params = {k: p.requires_grad_() for k, p in self.params.items() if k not in fixed}
        self.rows = Rows(examples, config.options.batch_size, self.seed)
        o = config.options
        self.total_steps = o.total_steps(len(examples), config.objective.steps_on_rows)
        self.optimizers = Optimizers(o, self._groups(), attached.spec)
        self.progress = Progress()
        self.best: dict[str, Tensor] | None = None
        self.drawn: Drawn | None = None

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

    def _groups(self) -> list[tuple[dict[str, Tensor], float]]:
        """Parameters with the ratio of their rate to the schedule's: 1, and LoRA+'s for the B matrices (Hayou et al. 2024)."""
        ratio = self.config.options.loraplus_lr_ratio
        if ratio is None:
            return [(self.trained_params, 1.0)]
        keys = {site.key(LORA_B) for site in self.sites if not site.saved and LORA_B in site.shapes}
        b, others = ({k: p for k, p in self.trained_params.items() if (k in keys) is inside} for inside in (True, False))
        return [(others, 1.0), (b, ratio)]

    def pack(self) -> PackedAdapter | None:
        """The adapter as this forward runs it, with the graph to its parameters; None where the rows are the model's own (full
        fine-tuning)."""
        return self.attached.pack(self.method, self.params, self.sites)

    def next_batch(self) -> StepBatch:
        """Draw the rows of the next optimizer step; of an objective that samples, prompts, or the answers that it still learns from."""
        if self.drawn is not None:
            return self.batch_of(self.drawn.rows, self.drawn.counts)
        examples = [e for _ in range(self.config.options.gradient_accumulation_steps) for e in self.rows.take()]
        if self.config.objective.sampled_at is not None:
            return StepBatch(examples, [], Counts.of(examples))
        return self.batch_of(examples, Counts.of(examples))

    def batch_of(self, rows: Sequence[Example], counts: Counts, metrics: Mapping[str, float] | None = None) -> StepBatch:
        """These rows as a step, cut into micro-batches."""
        seeds = [_row_seed(self.seed, self.progress.step, i) for i in range(len(rows))]
        micro_batches = [MicroBatch([rows[i] for i in part], [seeds[i] for i in part]) for part in cut(rows, self.max_tokens)]
        return StepBatch(rows, micro_batches, counts, metrics or {})

    def noise(self, rows: MicroBatch) -> list[tuple[int, float]]:
        """NEFTune's noise of each segment of some rows: (seed, bound α / √(tokens · width)); empty without it. The seed is the row's and
        the segment's number in the row."""
        alpha, width = self.config.options.neftune_noise_alpha, self.attached.spec.hidden_size
        if alpha is None:
            return []
        segments = [(seed + i, s) for seed, e in zip(rows.seeds, rows.examples, strict=True) for i, s in enumerate(e.segments)]
        return [(seed, alpha / math.sqrt(len(s.ids) * width)) for seed, s in segments]

    def learning_rate(self) -> float:
        """The rate of the next step: linear warm-up from 0, then the schedule down to 0 at the last step."""
        o, step = self.config.options, self.progress.step
        warmup = o.warmup(self.total_steps)
        if step < warmup:
            return self.config.lr * (step + 1) / warmup
        done = (step - warmup) / max(1, self.total_steps - warmup)
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
        if not batch.micro_batches:  # answers of which none is better than another: a gradient of 0, and the optimizer's own motion
            for t in self.trained_params.values():
                t.grad = torch.zeros_like(t)
        lr = self.learning_rate()
        self.optimizers.step(lr)
        self.clear()
        self.drawn = self.drawn and self.drawn.after_step()
        p.step, p.tokens, p.seconds = p.step + 1, p.tokens + batch.tokens, p.seconds + seconds
        p.supervised_tokens += batch.counts.targets
        p.losses.append(loss)
        return {"loss": loss, "grad_norm": norm, "lr": lr}

    def gradients(self) -> list[Tensor]:
        """The gradients of the parameters that have one."""
        return [p.grad for p in self.params.values() if p.grad is not None]

    def clear(self) -> None:
        self.optimizers.clear()

    def standing(self) -> Callable[[], bool]:
        """Before a step: what takes it back. It says whether it has: a step that was made stays."""
        step, epoch, position, drawn = self.progress.step, self.rows.epoch, self.rows.position, self.drawn

        def back() -> bool:
            if self.progress.step == step:
                self.rows.seek(epoch, position)
                self.drawn = drawn
                self.clear()
            return self.progress.step == step

        return back

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the rest of the run depends on, not copied: "param/KEY", "best/KEY" and the optimizer's "exp_avg/KEY", ….

        There is no more state than these, `progress` and the place in `rows`: the order of rows, dropout, draws and the learning rate are
        functions of seed and step, and no random number generator outlives a step.
        """
        found = {f"param/{k}": p.detach() for k, p in self.params.items()}
        found |= {f"{kind}/{key}": t for kind, key, t in self.optimizers.state()}
        found |= {f"drawn/{k}": t for k, t in (self.drawn.tensors() if self.drawn else {}).items()}
        return found | {f"best/{k}": t for k, t in (self.best or {}).items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take on what `state` gave; the tensors are copied."""
        self.optimizers.forget()
        best, drawn = dict[str, Tensor](), dict[str, Tensor]()
        for name, tensor in state.items():
            kind, _, key = name.partition("/")
            if kind == "param":
                self.params[key].copy_(tensor)
            elif kind == "best":
                best[key] = tensor.to("cpu", copy=True)
            elif kind == "drawn":
                drawn[key] = tensor
            else:
                self.optimizers.restore(kind, key, tensor)
        self.best = best or None
        self.drawn = Drawn.of(drawn) if drawn else None

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


def cut(examples: Sequence[Example], max_tokens: int) -> Iterator[list[int]]:
    """The numbers of the rows of micro-batches of at most max_tokens tokens; rows of similar length together, so attention pads little. A
    row is never cut: its segments stay together, and a longer one stands alone."""
    part: list[int] = []
    tokens = 0
    for i in sorted(range(len(examples)), key=lambda i: examples[i].tokens):
        if part and tokens + examples[i].tokens > max_tokens:
            yield part
            part, tokens = [], 0
        part.append(i)
        tokens += examples[i].tokens
    if part:
        yield part


def _row_seed(seed: int, step: int, row: int) -> int:
    """row: its place in the step's order."""
    return int.from_bytes(hashlib.sha256(np.array([seed, step, row], dtype=np.int64).tobytes()).digest()[:4], "little")
