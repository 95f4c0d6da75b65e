"""The typed parts of a run file: how a variant trains, a data set, the scores, a variant, the run.

Each class is the YAML's keys, the defaults and the documentation.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from trimtab.bases.recipes import NAMES
from trimtab.data import SCORES, Source, dropped_problem, part_problem
from trimtab.errors import nearest
from trimtab.hyperparameters import NO_SWITCH, switch_for_number
from trimtab.methods import Method
from trimtab.objectives import Objective, Sft, directions
from trimtab.store.names import RULE, is_word
from trimtab.train.sinks import missing

CHOICE = "label_accuracy"
GENERATED = (*SCORES,)
"""Scores of generated answers."""


def _is_metric(name: str) -> str:
    known = [*directions(), *GENERATED, CHOICE]
    if name not in known:
        raise ValueError(f"not a metric{nearest(name, known)}: one of {', '.join(known)}")
    return name


Metric: TypeAlias = Annotated[str, AfterValidator(_is_metric)]
"""What validation can judge by: the loss, a metric of the objective, a score of generated answers, the accuracy of the likeliest label."""


def lower_is_better(metric: str) -> bool:
    """Whether a run judges by the lowest value of a metric."""
    return not directions().get(metric, True)


VALIDATION = ("eval_every", "valid_metric", "patience", "keep_best")


OptimizerName: TypeAlias = Literal["adamw", "adamw8bit", "adafactor", "muon", "sgd"]
"""`train.optimizers` makes them."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, value: Any, info: ValidationInfo) -> Any:
        if switch_for_number(value, cls.model_fields[info.field_name or ""].annotation):
            raise ValueError(NO_SWITCH)
        return value


def whole_or_part(steps: float | None) -> float | None:
    """A number of steps, checked: a whole one, or a part of all steps below 1."""
    if steps is not None and steps >= 1 and steps % 1 != 0:
        raise ValueError("a whole number of steps, or a part of all steps below 1")
    return int(steps) if steps is not None and steps >= 1 else steps


def steps_of(steps: float, total_steps: int) -> int:
    """A number of steps, where below 1 it is a part of so many in all: rounded up, as transformers does."""
    return math.ceil(steps * total_steps) if steps < 1 else int(steps)


FASTEST = 10.0
"""Learning rates are below this, LoRA+'s too."""


class TrainOptions(Strict):
    """How one variant trains. Given under `defaults` for all, or in a variant for itself."""

    lr: float | None = Field(None, gt=0, lt=FASTEST, description="peak learning rate; None: the method's preset, scaled by the objective")
    epochs: float = Field(2, gt=0, allow_inf_nan=False, description="passes over the training rows; ignored where max_steps is set")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps, instead of epochs")
    batch_size: int = Field(16, ge=1, description="rows of one batch")
    gradient_accumulation_steps: int = Field(1, ge=1, le=65_536, description="batches of one optimizer step")
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="decay of the learning rate after warm-up")
    warmup_steps: int | float = Field(0, ge=0, description="steps over which the learning rate rises from 0; below 1: this part of all")
    loraplus_lr_ratio: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="LoRA+ (arXiv:2402.12354): the rate of the B matrices is this times lr; lora only, embeddings keep lr",
    )
    optimizer: OptimizerName = Field("adamw", description="what steps; its state is counted by `trimtab plan --optimizer`")
    neftune_noise_alpha: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="NEFTune (arXiv:2310.05914): embeddings of training rows get noise of ±this / √(tokens · width)",
    )
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="decoupled decay; with sgd, a part of the gradient")
    max_grad_norm: float = Field(1.0, gt=0, description="the gradient's norm over all of the variant's tensors is clipped to this")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first decay rate")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second decay rate")
    adam_epsilon: float = Field(1e-8, gt=0, allow_inf_nan=False, description="AdamW's epsilon")
    max_length: int = Field(1024, ge=2, description="longer rows are counted and left out, never cut")
    last_turn_only: bool = Field(False, description="supervise the last assistant turn only")
    eval_every: int | float | None = Field(
        None, gt=0, description="steps between validations, where the data has valid rows; below 1: this part of all; None: an epoch"
    )
    valid_metric: Metric = Field("loss", description="what validation judges by; the scores of answers are generated, in the mixed batch")
    patience: int | None = Field(None, ge=1, description="validations without improvement before the variant finishes; None: never")
    keep_best: bool = Field(True, description="save the step that validated best, where there are valid rows; false: the last step")
    seed: int | None = Field(None, ge=0, description="start values, order of rows, dropout; None: the run's seed")

    @field_validator("warmup_steps", "eval_every")
    @classmethod
    def _whole_or_part(cls, steps: float | None) -> float | None:
        return whole_or_part(steps)

    def warmup(self, total_steps: int) -> int:
        """Optimizer steps of warm-up, of so many in all."""
        return steps_of(self.warmup_steps, total_steps)

    def total_steps(self, rows: int, again: int = 1) -> int:
        """Optimizer steps of a variant whose epoch draws `rows` rows. A step takes batches of one epoch and the next where they meet.
        again: steps on the same rows."""
        return self.max_steps or self._steps(self.epochs, rows) * again

    def eval_steps(self, rows: int, again: int = 1) -> int:
        """Optimizer steps between validations: `eval_every`, or an epoch."""
        if self.eval_every is None:
            return self._steps(1, rows) * again
        return steps_of(self.eval_every, self.total_steps(rows, again))

    def rows_of_step(self, rows: int) -> int:
        """Rows of an optimizer step, of an epoch of `rows`."""
        return min(self.batch_size, rows) * self.gradient_accumulation_steps

    def _steps(self, epochs: float, rows: int) -> int:
        return max(1, math.ceil(epochs * math.ceil(rows / self.batch_size) / self.gradient_accumulation_steps))


SplitName: TypeAlias = Literal["train", "valid", "test"]


class DataConfig(Strict):
    """One data set: train, and optionally valid and test; each a path, or a list of sources with weights.

    train: rows to train on. valid: rows for validation while the run trains. test: rows for the scores after training.

    columns, system, max_dropped: of every source that has none of its own.
    split: so many rows of each training source (below 1: this part of them) are held out as valid rows; a source's own `split` goes first.
    labels: of a classification, to be judged by their likelihoods: a list, or "auto" for the distinct answers of the training rows.
    """

    train: list[Source]
    valid: list[Source] = []
    test: list[Source] = []
    columns: dict[str, str] = {}
    system: str | None = None
    split: float | None = None
    max_dropped: float | None = None
    labels: list[str] | Literal["auto"] | None = None

    @property
    def splits(self) -> dict[SplitName, list[Source]]:
        """The sources of the splits that there are, train first."""
        found: dict[SplitName, list[Source]] = {"train": self.train, "valid": self.valid, "test": self.test}
        return {name: sources for name, sources in found.items() if sources}

    @model_validator(mode="after")
    def _hold_out(self) -> DataConfig:
        """Give the training sources their split, and make sources of what they hold out."""
        if self.split is not None and (text := part_problem(self.split)):
            raise ValueError(f"split = {self.split}: {text}")
        if text := dropped_problem(self.max_dropped):
            raise ValueError(f"max_dropped = {self.max_dropped}: {text}")
        for name in ("train", "valid", "test"):
            shared = [self._with_shared(s) for s in getattr(self, name)]
            object.__setattr__(self, name, shared)
        train = [replace(s, held=s.held or self.split or 0) for s in self.train]
        valid = [replace(s, weight=1.0, held_out=True) for s in train if s.held]
        if valid and self.valid and self.valid != valid:
            raise ValueError("`valid` is given, and `split` holds out valid rows too: take one of them away")
        if any(s.held and not s.held_out for s in [*self.valid, *self.test]):
            raise ValueError("`split` with a number belongs to training sources: it holds out a part of them as valid rows")
        object.__setattr__(self, "train", train)
        object.__setattr__(self, "valid", valid or self.valid)
        return self

    def _with_shared(self, s: Source) -> Source:
        allowed = self.max_dropped if s.max_dropped is None else s.max_dropped
        return replace(s, columns=s.columns or self.columns, system=s.system or self.system, max_dropped=allowed)

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: list[str] | str | None) -> list[str] | str | None:
        if isinstance(labels, list) and (len(labels) < 2 or len({x.strip() for x in labels} - {""}) < len(labels)):
            raise ValueError("labels are at least two, distinct and not empty")
        return labels


class EvalOptions(Strict):
    """The scores after training, where base and every adapter answer the test rows in one mixed batch; the limits hold for validation
    too."""

    generate: bool = Field(True, description="answer test rows by greedy generation and score the answers")
    max_rows: int | None = Field(None, ge=1, description="score the first rows only, of valid and of test")
    max_new_tokens: int = Field(96, ge=1, description="length of an answer at most")


class VariantConfig(Strict):
    """One variant: which data, which method, towards what, how it trains.

    data: a name under `data` of the run. method: lora, ia3, bottleneck, prompt, prefix or full. objective: what it is trained towards.
    """

    name: str
    data: str
    method: Method
    options: TrainOptions
    objective: Objective = Sft()

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    @property
    def lr(self) -> float:
        return self.options.lr if self.options.lr is not None else self.method.preset_lr * self.objective.lr_scale

    @property
    def asks(self) -> tuple[bool, bool]:
        """Whether validation needs generated answers, and whether it needs likeliest labels."""
        metric = self.options.valid_metric
        return metric in GENERATED, metric == CHOICE

    @property
    def aim(self) -> dict[str, Any]:
        """The objective and its fields, as settings and notes write them; nothing for plain `sft`, as before there was a choice."""
        return {} if self.objective == Sft() else {"objective": self.objective.name, **self.objective.to_dict()}


class RunOptions(Strict):
    """A whole run; `RunConfig` reads it."""

    base: str = Field(description="bundled name, folder, hub id, or .gguf file")
    out: Path = Field(description="the run folder; it must be empty or absent")
    data: dict[str, DataConfig] = Field(description="name -> data set")
    variants: list[VariantConfig] = Field(description="name -> variant; all train together")
    seed: int = Field(0, ge=0, description="for variants without a seed of their own, and for the choice of rows of fractional sources")
    dtype: str | None = Field(None, description="of the base: float32, bfloat16, float16, auto (as stored); None: by the hardware")
    device: str | None = Field(None, description="cpu, cuda, cuda:1; None: CUDA if there is one")
    quantize: str | None = Field(
        None, description="pack the base's linear layers while it is loaded: nf4, fp4, int8, nf4-double, fp4-double"
    )
    shard: bool = Field(False, description="ranks hold a part of the base's matrices each, and bring a layer together while it is used")
    max_tokens: int = Field(4096, ge=64, description="tokens of one forward: bounds memory, however many variants train together")
    activation_checkpointing: bool = Field(
        False, description="keep each layer's input only and run the layer again in the backward: less memory, a forward more a step"
    )
    compile: bool = Field(False, description="compile the row-wise parts of the layers where no native kernels run them: on a GPU")
    log_every: int = Field(1, ge=1, description="a line in metrics.jsonl every so many steps")
    evaluate: EvalOptions = Field(EvalOptions(), description="scores after training, and limits of validation")
    track: list[Literal["tensorboard", "wandb"]] = Field([], description="where the lines of metrics.jsonl go too: tensorboard, wandb")
    checkpoint_every: int | float | None = Field(
        100, gt=0, description="joint steps between checkpoints, and one at the end; below 1: this part of all; None: only on a signal"
    )
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints that stay; older ones are removed")
    store: str | None = Field(None, description="publish the trained adapters to the store, as <this namespace>/<variant>; None: not")
    root: Path = Path()

    @field_validator("quantize")
    @classmethod
    def _format(cls, quantize: str | None) -> str | None:
        if quantize is not None and quantize not in NAMES:
            raise ValueError(f"not a format{nearest(quantize, NAMES)}: one of {', '.join(NAMES)}")
        return quantize

    @field_validator("checkpoint_every")
    @classmethod
    def _whole_or_part(cls, steps: float | None) -> float | None:
        return whole_or_part(steps)

    @field_validator("store")
    @classmethod
    def _namespace(cls, store: str | None) -> str | None:
        if store is not None and not is_word(store):
            raise ValueError(f"not a namespace: {RULE}")
        return store

    @field_validator("track")
    @classmethod
    def _installed(cls, track: list[str]) -> list[str]:
        if problems := [p for name in track if (p := missing(name))]:
            raise ValueError("; ".join(problems))
        return list(dict.fromkeys(track))
