"""From a run file to what a run works with: the base, the rows of every data set, the variants. Nothing is written here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.data import Dataset, Example, load_examples, summarise_dropped
from trimtab.data.dataset import tokenizer_state
from trimtab.data.rows import Parts
from trimtab.errors import ConfigError, DataError, Mistakes
from trimtab.methods import FullConfig
from trimtab.model import Base
from trimtab.objectives import Objective
from trimtab.store import Adapter
from trimtab.train.config import RunConfig
from trimtab.train.full import FullVariant
from trimtab.train.listen import Listener
from trimtab.train.losses import Reference, base_log_probabilities
from trimtab.train.options import DataConfig, TrainOptions, VariantConfig
from trimtab.train.variant import Variant


@dataclass
class Splits:
    """A data set, read and encoded."""

    train: Dataset
    valid: Dataset | None
    test: Dataset | None


@dataclass
class Prepared:
    """A run that is ready to train."""

    run: RunConfig
    base: Base
    data: dict[str, Splits]
    variants: list[Variant]


def set_up(run: RunConfig, base: Base, listener: Listener) -> None:
    """Make the base's forward what the run asks for. ConfigError where torch.compile does not work here."""
    base.attached.activation_checkpointing = run.activation_checkpointing
    if run.compile:
        listener.status("compiling")
    if text := base.attached.compile(run.compile):
        listener.status(text)


def prepare(run: RunConfig, base: Base) -> Prepared:
    """Read and check everything. TrimtabError where data, methods and base do not fit together."""
    data, mistakes = dict[str, Splits](), Mistakes()
    for name in [n for n in run.data if any(v.data == n for v in run.variants)]:
        with mistakes.noted():
            data[name] = read_splits(run, name, run.data[name], base)
    mistakes.refuse("these data cannot be trained on")
    refuse_long(run, base, data)
    references = {name: reference_of(run, name, splits.train.examples, base) for name, splits in data.items()}
    return Prepared(run, base, data, [make_variant(run, base, v, data[v.data].train.examples, references[v.data]) for v in run.variants])


def reference_of(run: RunConfig, name: str, examples: Sequence[Example], base: Base) -> Reference:
    """The base's log-probabilities of a data set's rows; empty where no variant on it has an objective that needs them."""
    needed = any(v.objective.needs_reference for v in run.variants if v.data == name)
    return base_log_probabilities(base.attached, examples, run.max_tokens) if needed else {}


def read_splits(run: RunConfig, name: str, config: DataConfig, base: Base) -> Splits:
    """Read and encode a data set's splits. Its options are those of the variants that train on it, which must agree."""
    max_length, last_turn_only, parts, differ = row_options(run, name)
    if differ is not None:
        raise ConfigError(f"data.{name}: {differ.message}", fix=differ.fix)
    found, mistakes, state = dict[str, Dataset](), Mistakes(), tokenizer_state(base.tokenizer)
    for split, sources in config.splits.items():
        with mistakes.noted():
            found[split] = load_examples(
                sources,
                base.tokenizer,
                root=run.root,
                max_length=max_length,
                seed=run.seed,
                last_turn_only=last_turn_only or split != "train",  # held-out rows ask for their last answer
                keep_rows=split != "train" or config.labels == "auto",  # as questions, and to find the labels in
                vocab_size=base.spec.vocab_size,
                parts=parts,
                state=state,
            )
    mistakes.refuse(f"data.{name} cannot be used")
    return Splits(found["train"], found.get("valid"), found.get("test"))


def row_options(run: RunConfig, name: str) -> tuple[int, bool, Parts, ConfigError | None]:
    """(max_length, last_turn_only, how a record becomes segments) of the variants that train on a data set, and what is wrong where they
    differ: the first are taken."""
    options = {(v.options.max_length, v.options.last_turn_only, v.objective.parts) for v in run.variants if v.data == name}
    what = "its variants differ in max_length, in last_turn_only, or in how their objectives read a row"
    differ = ConfigError(what, fix="give them the same, or name the data twice")
    first = min(options, default=(TrainOptions().max_length, False, Objective.parts), key=lambda o: o[:2])
    return *first, differ if len(options) > 1 else None


def refuse_long(run: RunConfig, base: Base, data: dict[str, Splits]) -> None:
    """DataError that names the rows which, with a method's virtual tokens before them, are longer than the base has positions."""
    problems = []
    for v in run.variants:
        room = base.spec.max_positions - getattr(v.method, "num_virtual_tokens", 0)
        splits = [s for s in vars(data[v.data]).values() if s is not None]
        long = [(s.examples, i) for s in splits for i in np.flatnonzero(s.examples.longest > room)]
        problems += [f"{v.name}: {e.origin} has {e.longest} tokens, room is for {room}" for e in (rows[i] for rows, i in long[:5])]
        problems += [f"{v.name}: … and {len(long) - 5} more"] if len(long) > 5 else []
    if problems:
        raise DataError(
            f"rows are longer than the {base.spec.max_positions} positions of this base", problems=problems, fix="lower max_length"
        )


def make_variant(run: RunConfig, base: Base, config: VariantConfig, examples: Sequence[Example], reference: Reference) -> Variant:
    """A fresh variant, its adapter initialised from its seed."""
    if isinstance(config.method, FullConfig):
        return FullVariant(config, base, examples, run.seed, run.max_tokens, reference)
    seed = config.options.seed if config.options.seed is not None else run.seed
    fresh = Adapter.create(base, config.method, seed=seed)
    return Variant(config, base.attached, fresh.sites, fresh.params, examples, run.seed, run.max_tokens, reference)


def warn_of_rows(prepared: Prepared, listener: Listener) -> None:
    """Say which rows were left out, what no row uses, and what about the template may spoil training."""
    warnings = {w for splits in prepared.data.values() for w in splits.train.warnings if not w.startswith("note:")}
    for warning in sorted(warnings):
        listener.warning(warning)
    for name, splits in prepared.data.items():
        for split, dataset in vars(splits).items():
            if dataset is None:
                continue
            for note in dataset.notes:
                listener.warning(f"data.{name}.{split}: {note}")
            if dataset.dropped:
                listener.warning(f"data.{name}.{split}: left out {'; '.join(summarise_dropped(dataset.dropped))}")
