"""What `check` says of better and worse answers, and of labels: how long they are, how many of each there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from trimtab.data.pairs import DESIRABLE, REJECTED, UNDESIRABLE
from trimtab.errors import DataError
from trimtab.objectives.classify import Classify
from trimtab.objectives.kto import Kto
from trimtab.objectives.preference import CHOSEN
from trimtab.tables import counted
from trimtab.train.findings import Finding, Split
from trimtab.train.options import DataConfig, VariantConfig
from trimtab.train.prepare import classes_of

UNEVEN = 10
"""If the commonest label has more than this times the rows of the rarest, accuracy says little of the rare ones."""
ONE_SIDED = 0.8
"""If one of the two answers is the longer one in this share of the pairs, a model can tell them apart by length alone."""


def answer_findings(splits: Sequence[Split], variants: Sequence[VariantConfig], config: DataConfig) -> Iterator[Finding]:
    """Of a data set's rows, train first; nothing where answers are neither paired nor marked, nor labelled."""
    split, roles = splits[0], splits[0].examples.roles
    yield from _unjudged(splits, variants)
    if any(v.objective.reads_head for v in variants):
        yield from _labels(splits, [v for v in variants if isinstance(v.objective, Classify)], config)
        return
    if {CHOSEN, REJECTED} <= set(roles):
        yield _lengths(split)
    if DESIRABLE in roles or UNDESIRABLE in roles:
        yield from _marks(split, variants)


def _unjudged(splits: Sequence[Split], variants: Sequence[VariantConfig]) -> Iterator[Finding]:
    """Metrics that the valid rows do not tell, which would stop the run at its start."""
    for split in splits:
        roles = _counts(split) if split.name == "valid" else {}
        for v in variants if roles else ():
            if why := v.objective.unjudged(v.options.valid_metric, roles):
                yield Finding("error", f"variants.{v.name}.valid_metric", f"{split.where}: {why}")


def _labels(splits: Sequence[Split], variants: Sequence[VariantConfig], config: DataConfig) -> Iterator[Finding]:
    """How many training rows each label has, and labels of other rows that heads lack, which would stop the run at its start."""
    train, *held = splits
    counts = _counts(train)
    if not counts or not variants:
        return
    common, rare = max(counts, key=lambda n: counts[n]), min(counts, key=lambda n: counts[n])
    text = f"{len(counts)} labels; most rows have {common!r} ({counts[common]}), fewest {rare!r} ({counts[rare]})"
    uneven = counts[common] > UNEVEN * counts[rare]
    fix = "judge by valid_metric: macro_f1, or give rows of rare labels a source with a larger weight." if uneven else ""
    yield Finding("warning" if uneven else "note", train.where, text, fix=fix)
    for v in variants:
        try:
            classes_of(v, config, set(counts))
        except DataError as error:
            yield Finding("error", f"variants.{v.name}", error.message, fix=error.fix)
    known = set(variants[0].objective.classes or (config.labels if isinstance(config.labels, list) else counts))  # type: ignore[attr-defined]
    for split in splits:
        if strange := sorted(_counts(split).keys() - known):
            message = (
                f"{counted(len(strange), 'label')} that a head lacks, as no training row has them"
                if split in held
                else "labels that are not listed"
            )
            yield Finding.of(
                "error", split.where, message, [repr(x) for x in strange], "correct these rows, or list all labels (data.NAME.labels)."
            )
    if unused := sorted(known - counts.keys()):
        yield Finding.of("warning", train.where, f"{counted(len(unused), 'label')} that no training row has", [repr(x) for x in unused])


def _counts(split: Split) -> dict[str, int]:
    """role -> rows that have a segment of it."""
    found = {role: int((split.examples.targets_of(role) > 0).sum()) for role in split.examples.roles}
    return {role: n for role, n in found.items() if n}


def _lengths(split: Split) -> Finding:
    chosen, rejected = split.examples.targets_of(CHOSEN), split.examples.targets_of(REJECTED)
    longer, shorter = float((chosen > rejected).mean()), float((chosen < rejected).mean())
    text = (
        f"{len(chosen)} pairs: the chosen answer has {int(np.median(chosen))} tokens (median), the rejected one {int(np.median(rejected))}"
    )
    if max(longer, shorter) < ONE_SIDED:
        return Finding("note", split.where, f"{text}; the chosen one is longer in {longer:.0%}")
    what = (
        f"{text}; the chosen one is {'longer' if longer > shorter else 'shorter'} in {max(longer, shorter):.0%}, so length tells them apart"
    )
    fix = "add pairs of equal length, or divide by length: loss_type: sigmoid_norm, or objective: simpo."
    return Finding("warning", split.where, what, fix=fix)


def _marks(split: Split, variants: Sequence[VariantConfig]) -> Iterator[Finding]:
    good, bad = (int((split.epoch.targets_of(role) > 0).sum()) for role in (DESIRABLE, UNDESIRABLE))
    yield Finding("note", split.where, f"{good} answers are wanted, {bad} are not")
    for v in variants:
        o = v.objective
        if not isinstance(o, Kto):
            continue
        where = f"variants.{v.name}"
        if o.loss_type == "kto" and v.options.batch_size * v.options.gradient_accumulation_steps == 1:
            text = "steps of one row: kto estimates its KL from answers of other rows, and there are none"
            yield Finding("warning", where, text, fix="set batch_size: 8.")
        if not good or not bad:
            continue
        ratio = o.desirable_weight * good / (o.undesirable_weight * bad)
        if not 1 <= ratio <= 4 / 3 + 1e-9:
            text = f"desirable_weight · {good} : undesirable_weight · {bad} is {ratio:.2f} : 1; the paper wants 1 to 1.33"
            fix = (
                f"desirable_weight: {o.undesirable_weight * bad / good:.3g}"
                if ratio < 1
                else f"undesirable_weight: {ratio * o.undesirable_weight / 1.15:.3g}"
            )
            yield Finding("warning", where, text, fix=f"set {fix}.")
