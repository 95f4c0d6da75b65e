"""The run file: one typed class is the YAML's keys, the defaults and the documentation. Every unknown key is refused with the nearest
known one.

Paths in a run file are relative to the file's own folder.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from trimtab.data import Source, has_bleu, parse_sources
from trimtab.errors import ConfigError, nearest
from trimtab.methods import BY_NAME, Method
from trimtab.store.names import RULE, is_word
from trimtab.train.runfile import explain, read_yaml, unknown_keys
from trimtab.train.sinks import missing

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
Metric = Literal["loss", "exact_match", "token_f1", "rouge_l", "bleu", "valid_json", "label_accuracy"]
"""What validation can judge by: the loss, a score of generated answers, or the accuracy of the likeliest label."""
VALIDATION = ("eval_every", "valid_metric", "patience", "keep_best")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainOptions(_Strict):
    """How one variant trains. Given under `defaults` for all, or in a variant for itself."""

    lr: float | None = Field(None, gt=0, lt=10, description="peak learning rate; None: the method's preset")
    epochs: float = Field(2, gt=0, description="passes over the training rows; ignored where max_steps is set")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps, instead of epochs")
    batch_size: int = Field(16, ge=1, description="rows of one micro-batch")
    gradient_accumulation_steps: int = Field(1, ge=1, description="micro-batches of one optimizer step")
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="decay of the learning rate after warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises from 0")
    loraplus_lr_ratio: float | None = Field(
        None, gt=0, description="LoRA+ (arXiv:2402.12354): the rate of the B matrices is this times lr; lora only, embeddings keep lr"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled decay")
    max_grad_norm: float = Field(1.0, gt=0, description="the gradient's norm over all of the variant's tensors is clipped to this")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first decay rate")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second decay rate")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    max_length: int = Field(1024, ge=2, description="longer rows are counted and left out, never cut")
    last_turn_only: bool = Field(False, description="supervise the last assistant turn only")
    eval_every: int | None = Field(None, ge=1, description="steps between validations, where the data has valid rows; None: an epoch")
    valid_metric: Metric = Field("loss", description="what validation judges by; the scores of answers are generated, in the mixed batch")
    patience: int | None = Field(None, ge=1, description="validations without improvement before the variant finishes; None: never")
    keep_best: bool = Field(True, description="save the step that validated best, where there are valid rows; false: the last step")
    seed: int | None = Field(None, ge=0, description="start values, order of rows, dropout; None: the run's seed")


class DataConfig(_Strict):
    """One data set: train, and optionally valid and test; each a path, or a list of sources with weights.

    labels: of a classification, to be judged by their likelihoods: a list, or "auto" for the distinct answers of the training rows.
    """

    train: list[Source]
    valid: list[Source] = []
    test: list[Source] = []
    labels: list[str] | Literal["auto"] | None = None

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: list[str] | str | None) -> list[str] | str | None:
        if isinstance(labels, list) and (len(labels) < 2 or len({x.strip() for x in labels} - {""}) < len(labels)):
            raise ValueError("labels are at least two, distinct and not empty")
        return labels


class EvalOptions(_Strict):
    """The scores after training, where base and every adapter answer the test rows in one mixed batch; the limits hold for validation
    too."""

    generate: bool = Field(True, description="answer test rows by greedy generation and score the answers")
    max_rows: int | None = Field(None, ge=1, description="score the first rows only, of valid and of test")
    max_new_tokens: int = Field(96, ge=1, description="length of an answer at most")


class VariantConfig(_Strict):
    """One variant: which data, which method, how it trains."""

    name: str
    data: str
    method: Method
    options: TrainOptions

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    @property
    def lr(self) -> float:
        return self.options.lr if self.options.lr is not None else self.method.preset_lr


class RunConfig(_Strict):
    """A whole run. `RunConfig.load(path)` reads a run file, `RunConfig.from_dict` a mapping of the same shape."""

    base: str
    out: Path
    data: dict[str, DataConfig]
    variants: list[VariantConfig]
    seed: int = Field(0, ge=0)
    dtype: str | None = None
    device: str | None = None
    max_tokens: int = Field(4096, ge=64, description="tokens of one forward: bounds memory, however many variants train together")
    activation_checkpointing: bool = Field(
        False, description="keep each layer's input only and run the layer again in the backward: less memory, a forward more a step"
    )
    compile: bool = Field(False, description="compile the row-wise parts of the layers where no native kernels run them: on a GPU")
    log_every: int = Field(1, ge=1, description="a line in metrics.jsonl every so many steps")
    evaluate: EvalOptions = EvalOptions()
    track: list[Literal["tensorboard", "wandb"]] = Field([], description="where the lines of metrics.jsonl go too: tensorboard, wandb")
    checkpoint_every: int | None = Field(
        100, ge=1, description="joint steps between checkpoints, and one at the end; None: only on a signal"
    )
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints that stay; older ones are removed")
    store: str | None = Field(None, description="publish the trained adapters to the store, as <this namespace>/<variant>; None: not")
    root: Path = Path()

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

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Read a run file. ConfigError that lists everything wrong with it."""
        path = Path(path)
        content = read_yaml(path, "run file")
        return cls.from_dict(content, root=path.parent, where=str(path))

    @classmethod
    def from_dict(cls, content: Any, *, root: Path = Path(), where: str = "run") -> RunConfig:
        """Build from a mapping of a run file's shape; relative paths are taken from `root`."""
        if not isinstance(content, Mapping):
            raise ConfigError(f"{where}: expected a mapping with the keys base, out, data, variants, found {type(content).__name__}")
        if "sweep" in content:
            raise ConfigError(f"{where} is a sweep file: it has `sweep`", fix="run it with `trimtab sweep`")
        problems: list[str] = []
        fields = dict(content)
        known = [*(n for n in cls.model_fields if n != "root"), "defaults"]
        problems += unknown_keys(fields, known, "")
        defaults = fields.pop("defaults", None) or {}
        data = {name: _data(name, value, problems) for name, value in _mapping(fields, "data", problems)}
        variants = [_variant(name, value, defaults, data, problems) for name, value in _mapping(fields, "variants", problems)]
        if not problems:
            try:
                rest = {k: v for k, v in fields.items() if k not in ("data", "variants")}
                return cls(**_rooted(rest, root), data=data, variants=variants, root=root)
            except ValidationError as e:
                problems += explain(e, "")
        raise ConfigError(f"{where} cannot be run", problems=problems)


def _mapping(fields: dict[str, Any], key: str, problems: list[str]) -> list[tuple[str, Any]]:
    value = fields.get(key)
    if not isinstance(value, Mapping) or not value:
        problems.append(f"{key}: expected a mapping with at least one entry, found {value!r}")
        return []
    bad = [n for n in value if not isinstance(n, str) or not NAME.fullmatch(n)]
    problems += [f"{key}: {n!r} is not a name: lower-case letters, digits, '.', '_' and '-', at most 63" for n in bad]
    return [(n, v) for n, v in value.items() if n not in bad]


def _data(name: str, value: Any, problems: list[str]) -> DataConfig | None:
    where = f"data.{name}"
    if not isinstance(value, Mapping):
        problems.append(f"{where}: expected a mapping with train, valid, test, found {value!r}")
        return None
    problems += unknown_keys(value, DataConfig.model_fields, where)
    if not value.get("train"):
        problems.append(f"{where}: 'train' is missing")
    splits: dict[str, list[Source]] = {}
    for split in ("train", "valid", "test"):
        if value.get(split):
            try:
                splits[split] = parse_sources(value[split], where=f"{where}.{split}")
            except ConfigError as e:
                problems += e.problems or [e.message]
    if not splits.get("train"):
        return None
    try:
        return DataConfig(**splits, labels=value.get("labels"))
    except ValidationError as e:
        problems += explain(e, where)
        return DataConfig(**splits)


def _variant(name: str, value: Any, defaults: Any, data: Mapping[str, Any], problems: list[str]) -> VariantConfig | None:
    where = f"variants.{name}"
    for what, found in (("defaults", defaults), (where, value)):
        if not isinstance(found, Mapping):
            problems.append(f"{what}: expected a mapping, found {found!r}")
            return None
    problems += [p for p in unknown_keys(defaults, TrainOptions.model_fields, "defaults") if p not in problems]
    fields = dict(value)
    method, source = fields.pop("method", None), fields.pop("data", None)
    if name == "base":
        problems.append(f"{where}: 'base' stands for the base among the scores: name the variant otherwise")
    if method not in BY_NAME:
        problems.append(f"{where}.method = {method!r}{nearest(str(method), BY_NAME)}: one of {', '.join(BY_NAME)}")
        return None
    if source not in data:
        problems.append(f"{where}.data = {source!r}{nearest(str(source), data)}: one of {', '.join(data)}")
    cls = BY_NAME[method]
    hyper = [f.name for f in dataclasses.fields(cls)]
    found = unknown_keys(fields, [*hyper, *TrainOptions.model_fields, "data", "method"], where)
    problems += found
    try:
        built = cls(**{k: v for k, v in fields.items() if k in hyper})
    except ConfigError as e:
        problems += [f"{where}.{p}" for p in e.problems]
        return None
    try:
        options = TrainOptions(**{k: v for k, v in {**defaults, **fields}.items() if k in TrainOptions.model_fields})
    except ValidationError as e:
        problems += explain(e, where)
        return None
    problems += [f"{where}.{p}" for p in _misfits(options, fields, built, data.get(source), str(source))]
    return VariantConfig(name=name, data=str(source), method=built, options=options)


def _misfits(options: TrainOptions, own: Mapping[str, Any], method: Method, data: DataConfig | None, source: str) -> list[str]:
    """Options that would do nothing, or cannot be done. own: what the variant says itself; `defaults` may speak to others."""
    found = []
    if options.loraplus_lr_ratio is not None and method.name != "lora":
        found.append(f"loraplus_lr_ratio = {options.loraplus_lr_ratio}: LoRA+ needs method lora, this is {method.name}")
    if data is not None and not data.valid:
        found += [f"{k}: data.{source} has no valid rows: add `valid` to it" for k in VALIDATION if k in own]
    elif data is not None and options.valid_metric == "label_accuracy" and data.labels is None:
        found.append(f"valid_metric = 'label_accuracy': data.{source} has no labels: add `labels: auto`, or a list")
    if options.valid_metric == "bleu" and not has_bleu():
        found.append("valid_metric = 'bleu': needs the package sacrebleu: pip install 'trimtab[eval]'")
    return found


def _rooted(fields: dict[str, Any], root: Path) -> dict[str, Any]:
    return fields | ({"out": root / fields["out"]} if isinstance(fields.get("out"), str) else {})
