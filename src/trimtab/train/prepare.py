"""From a run file to what a run works with: the base, the rows of every data set, the variants. Nothing is written here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from trimtab.data import Dataset, Example, answer_of, load_examples, summarise_dropped
from trimtab.data.prompts_alone import Asked
from trimtab.data.reading import tokenizer_state
from trimtab.data.rows import Parts, Row, RowId
from trimtab.errors import ConfigError, DataError, Mistakes
from trimtab.forward.packs import last_occurrence
from trimtab.methods import FullConfig, LoraConfig
from trimtab.model import Base
from trimtab.objectives import Objective
from trimtab.objectives.classify import Classify, in_order
from trimtab.places.place import ONE_PROCESS, Place
from trimtab.store import Adapter
from trimtab.train.config import RunConfig
from trimtab.train.eva import begin
from trimtab.train.full import FullVariant
from trimtab.train.listen import Listener
from trimtab.train.losses import Reference
from trimtab.train.options import DataConfig, TrainOptions, VariantConfig
from trimtab.train.teachers import References, references_of
from trimtab.train.variant import Rows, Variant


@dataclass
class Splits:
    """A data set, read and encoded. answers: the distinct ones of the training rows, where its labels are found among them. asked: of
    training rows that are prompts alone, what rewards are told of them."""

    train: Dataset
    valid: Dataset | None
    test: Dataset | None
    answers: set[str]
    asked: Mapping[RowId, Asked] = field(default_factory=dict)

    @property
    def read(self) -> dict[str, Dataset]:
        """The splits that there are, by name."""
        found = {"train": self.train, "valid": self.valid, "test": self.test}
        return {name: dataset for name, dataset in found.items() if dataset is not None}


@dataclass
class Prepared:
    """A run that is ready to train. references: by data set and split. place: where it runs. clones: the variants that are not in the run
    file but have joined since, as plain JSON."""

    run: RunConfig
    base: Base
    data: dict[str, Splits]
    variants: list[Variant]
    references: Mapping[tuple[str, str], References] = field(default_factory=dict)
    place: Place = ONE_PROCESS
    clones: dict[str, Any] = field(default_factory=dict)


def set_up(run: RunConfig, base: Base, listener: Listener) -> None:
    """Make the base's forward what the run asks for. ConfigError where torch.compile does not work here."""
    base.attached.activation_checkpointing = run.activation_checkpointing
    if run.compile:
        listener.status("compiling")
    if text := base.attached.compile(run.compile):
        listener.status(text)


def prepare(run: RunConfig, base: Base, place: Place = ONE_PROCESS) -> Prepared:
    """Read and check everything. TrimtabError where data, methods and base do not fit together."""
    data, mistakes = dict[str, Splits](), Mistakes()
    for name in [n for n in run.data if any(v.data == n for v in run.variants)]:
        with mistakes.noted():
            data[name] = read_splits(run, name, run.data[name], base)
    mistakes.refuse("these data cannot be trained on")
    refuse_long(run, base, data)
    refuse_uninvoked(run, data)
    configs = [headed(v, run.data[v.data], data[v.data], f"data.{v.data}") for v in run.variants]
    told = references_of(run, base, {name: splits.read for name, splits in data.items()}, place)
    references = [told[v.data, "train"].get(v.objective.taught_by) for v in run.variants]
    variants = [make_variant(run, base, v, data[v.data].train.examples, r) for v, r in zip(configs, references, strict=True)]
    return Prepared(run, base, data, variants, told, place)


def read_splits(run: RunConfig, name: str, config: DataConfig, base: Base) -> Splits:
    """Read and encode a data set's splits. Its options are those of the variants that train on it, which must agree."""
    max_length, last_turn_only, parts, differ = row_options(run, name)
    if differ is not None:
        raise ConfigError(f"data.{name}: {differ.message}", fix=differ.fix)
    found, mistakes, state = dict[str, Dataset](), Mistakes(), tokenizer_state(base.tokenizer)
    answers, asked = set[str | None](), dict[RowId, Asked]()
    samples = any(v.objective.sampled_at is not None for v in run.variants if v.data == name)

    def hear(row: Row) -> None:
        if config.labels == "auto":
            answers.add(answer_of(row))
        if row.asked is not None:
            asked[row.id] = row.asked

    for split, sources in config.splits.items():
        with mistakes.noted():
            found[split] = load_examples(
                sources,
                base.tokenizer,
                root=run.root,
                max_length=max_length,
                seed=run.seed,
                last_turn_only=last_turn_only or split != "train",  # held-out rows ask for their last answer
                keep_rows=split != "train",  # as questions
                hear=hear if samples or config.labels == "auto" else None,
                vocab_size=base.spec.vocab_size,
                parts=parts,
                state=state,
            )
    mistakes.refuse(f"data.{name} cannot be used")
    return Splits(found["train"], found.get("valid"), found.get("test"), {a for a in answers if a is not None}, asked)


def row_options(run: RunConfig, name: str) -> tuple[int, bool, Parts, ConfigError | None]:
    """(max_length, last_turn_only, how a record becomes segments) of the variants that train on a data set, and what is wrong where they
    differ: the first are taken."""
    options = {(v.options.max_length, v.options.last_turn_only, v.objective.parts) for v in run.variants if v.data == name}
    what = "its variants differ in max_length, in last_turn_only, or in how their objectives read a row"
    differ = ConfigError(what, fix="give them the same, or name the data twice")
    first = min(options, default=(TrainOptions().max_length, False, Objective.parts), key=lambda o: o[:2])
    return *first, differ if len(options) > 1 else None


def headed(v: VariantConfig, config: DataConfig, splits: Splits, where: str) -> VariantConfig:
    """The variant, its objective with the labels that its head has. DataError where rows have others."""
    if not isinstance(v.objective, Classify):
        return v
    found = {name: set(dataset.examples.roles) for name, dataset in splits.read.items()}
    v = labelled(v, config, found["train"])
    classes = classes_of(v, config, found["train"])
    known = set(classes)
    strange = {name: sorted(labels - known) for name, labels in found.items() if labels - known}
    if strange:
        lines = [f"{where}.{name}: {', '.join(map(repr, labels[:10]))}" for name, labels in strange.items()]
        fix = f"correct these rows, or list all labels: data.NAME.labels: [{', '.join(classes[:3])}, …]"
        raise DataError(f"{v.name}: rows have labels that its head lacks", problems=lines, fix=fix)
    return v


def labelled(v: VariantConfig, config: DataConfig, found: set[str]) -> VariantConfig:
    """A variant that classifies, its objective with the labels of its head; others as they are. Arguments and refusal as `classes_of`."""
    if not isinstance(v.objective, Classify):
        return v
    return v.model_copy(update={"objective": replace(v.objective, classes=classes_of(v, config, found))})


def classes_of(v: VariantConfig, config: DataConfig, found: set[str]) -> tuple[str, ...]:
    """The labels of a variant's head, in order. found: those of the training rows. DataError where it is one."""
    assert isinstance(v.objective, Classify)
    classes = v.objective.classes or (tuple(config.labels) if isinstance(config.labels, list) else in_order(found))
    if len(classes) < 2:
        raise DataError(f"data.{v.data}: all training rows have the label {', '.join(classes)!r}", fix="a head needs two labels or more")
    return classes


def refuse_long(run: RunConfig, base: Base, data: dict[str, Splits]) -> None:
    """DataError that names the rows which, with a method's virtual tokens before them, are longer than the base has positions."""
    problems = []
    for v in run.variants:
        room = base.spec.max_positions - getattr(v.method, "num_virtual_tokens", 0) - v.objective.answer_tokens
        long = [(s.examples, int(i)) for s in data[v.data].read.values() for i in np.flatnonzero(s.examples.longest > room)]
        problems += [f"{v.name}: {e.origin} has {e.longest} tokens, room is for {room}" for e in (rows[i] for rows, i in long[:5])]
        problems += [f"{v.name}: … and {len(long) - 5} more"] if len(long) > 5 else []
    if problems:
        raise DataError(
            f"rows are longer than the {base.spec.max_positions} positions of this base", problems=problems, fix="lower max_length"
        )


def refuse_uninvoked(run: RunConfig, data: dict[str, Splits]) -> None:
    """DataError that names the training rows in which an aLoRA is not called: they would train nothing."""
    problems = []
    for v in run.variants:
        rows = data[v.data].train.examples
        without = uninvoked(v, rows)
        problems += [f"{v.name}: {origin}" for origin in without[:5]]
        problems += [f"{v.name}: … and {len(without) - 5} more of {len(rows)}"] if len(without) > 5 else []
    if problems:
        raise DataError("rows lack the invocation of their aLoRA", problems=problems, fix=INVOKE)


INVOKE = "give every row the tokens of alora_invocation_tokens (the ids that the tokenizer gives them within the row), or leave it out"


def uninvoked(v: VariantConfig, rows: Sequence[Example]) -> list[str]:
    """The origins of the rows in which a variant's aLoRA is not called; none where it is no aLoRA."""
    ids = v.method.invocation
    return [e.origin for e in rows if any(last_occurrence(ids, s.ids) == len(s.ids) for s in e.segments)] if ids else []


def make_variant(run: RunConfig, base: Base, config: VariantConfig, examples: Sequence[Example], reference: Reference | None) -> Variant:
    """A fresh variant, its adapter initialised from its seed."""
    if isinstance(config.method, FullConfig):
        return FullVariant(config, base, examples, run.seed, run.max_tokens, reference)
    seed = config.options.seed if config.options.seed is not None else run.seed
    if isinstance(config.method, LoraConfig) and config.method.init_lora_weights == "eva":
        method, params = begin(base, config.method, Rows(examples, config.options.batch_size, seed), run.max_tokens, seed)
        head = config.objective.head
        params |= head.init(base.spec, torch.Generator().manual_seed(seed)) if head else {}
        fresh, config = Adapter(base, method, params, head=head), config.model_copy(update={"method": method})
    else:
        fresh = Adapter.create(base, config.method, seed=seed, head=config.objective.head)
    return Variant(config, base.attached, fresh.sites, fresh.params, examples, run.seed, run.max_tokens, reference, head=fresh.head)


def warn_of_rows(prepared: Prepared, listener: Listener) -> None:
    """Say which rows were left out, what no row uses, and what about the template may spoil training: in the words of `check`."""
    warnings = {w for splits in prepared.data.values() for w in splits.train.warnings if not w.startswith("note:")}
    for warning in sorted(warnings):
        listener.warning(warning)
    for name, splits in prepared.data.items():
        for split, dataset in splits.read.items():
            for note in dataset.notes:
                listener.note(f"data.{name}.{split}: {note}")
            if dataset.dropped:
                listener.warning(f"data.{name}.{split}: left out {'; '.join(summarise_dropped(dataset.dropped))}")
