"""What variants measure themselves against, computed once for each split: the base's log-probabilities, and those of teachers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from trimtab.bases import BUNDLED_NAMES, fingerprint_model
from trimtab.data import Dataset
from trimtab.data.reading import tokenizer_state
from trimtab.data.token_store import Examples
from trimtab.errors import AdapterError, BaseError, ConfigError
from trimtab.forward.attached import Attached
from trimtab.forward.batch import BASE
from trimtab.forward.packs import Mix
from trimtab.model import Base, load_base
from trimtab.objectives.base import Taught
from trimtab.places.place import ONE_PROCESS, Place
from trimtab.store import Adapter
from trimtab.train.config import RunConfig
from trimtab.train.losses import Reference
from trimtab.train.measure import base_log_probabilities, likeliest
from trimtab.train.options import VariantConfig

References: TypeAlias = Mapping[Taught | None, Reference]
"""`Objective.taught_by` -> what the teacher says; None -> what the base says."""


def measured_by(variants: Iterable[VariantConfig]) -> list[tuple[str, Taught | None]]:
    """(data set, `Objective.taught_by`, or None for the base) of all that variants measure themselves against."""
    needing = [v for v in variants if v.objective.needs_reference or v.objective.taught_by]
    return list(dict.fromkeys((v.data, v.objective.taught_by) for v in needing))


def references_of(
    run: RunConfig, base: Base, data: Mapping[str, Mapping[str, Dataset]], place: Place = ONE_PROCESS
) -> Mapping[tuple[str, str], References]:
    """What the run's variants need, by data set and split; of held-out ones the rows that are judged. data: data set -> split -> rows.
    Each teacher is loaded once. ConfigError where there is no such teacher, or it has other tokens."""
    limit = run.evaluate.max_rows
    rows = {(n, name): d.examples[: None if name == "train" else limit] for n in data for name, d in data[n].items()}
    needed = [(key, split) for name, key in measured_by(run.variants) for split in rows if split[0] == name]
    found: dict[tuple[str, str], dict[Taught | None, Reference]] = {split: {} for split in rows}
    for teacher in dict.fromkeys(key and key.teacher for key, _ in needed):
        mine = [(key, split) for key, split in needed if (key and key.teacher) == teacher]
        said = _said_by(teacher, [(key, rows[split]) for key, split in mine], run, base, place)
        for (key, split), reference in zip(mine, said, strict=True):
            found[split][key] = reference
    return found


def _said_by(
    teacher: str | None, asked: Sequence[tuple[Taught | None, Examples]], run: RunConfig, base: Base, place: Place
) -> list[Reference]:
    """What a teacher says of each of some rows, or the base of the rows' tokens (None). Another base is gone afterwards."""
    if teacher is None:
        return [base_log_probabilities(base.attached, rows, run.max_tokens, place) for _, rows in asked]
    attached, mix, member, digest = _teacher(teacher, run.root, base)
    vocab = min(base.spec.vocab_size, attached.spec.vocab_size)
    said = [
        likeliest(attached, mix, member, rows, min(k.tokens, vocab), vocab, run.max_tokens, k.temperature, place) for k, rows in asked if k
    ]
    return [replace(reference, source=digest) for reference in said]


def _teacher(name: str, root: Path, base: Base) -> tuple[Attached, Mix, int, str]:
    """(the model that it runs on, its mix and member there, what it is)"""
    if name == "base":
        return base.attached, Mix([]), BASE, ""
    path = root / name
    where = str(path) if path.exists() else name
    is_base = name in BUNDLED_NAMES or (path / "config.json").exists() or name.endswith(".gguf")
    problems = []
    try:
        if not is_base:
            adapter = Adapter.load(where, base)
            mix, (member,) = base.mix([adapter])
            sha = hashlib.sha256()
            for key in sorted(adapter.params):
                sha.update(key.encode() + adapter.params[key].cpu().numpy().tobytes())
            return base.attached, mix, member, f"sha256:{sha.hexdigest()}"
    except AdapterError as error:
        problems.append(f"as an adapter: {error.message}")
    try:
        other = load_base(where, device=base.device)
    except BaseError as error:
        problems.append(f"as a base: {error.message}")
        fix = "name a base, or an adapter on the run's base: a folder, or a name in the store"
        raise ConfigError(f"teacher = {name!r} cannot be used", problems=problems, fix=fix) from error
    if tokenizer_state(other.tokenizer)[0] != tokenizer_state(base.tokenizer)[0]:
        fix = "distil from a model of the same family; what a teacher of other tokens writes can be imitated (sft)"
        raise ConfigError(f"teacher = {name!r} has another tokenizer than the base {base.name!r}", fix=fix)
    return other.attached, Mix([]), BASE, fingerprint_model(other.model)
