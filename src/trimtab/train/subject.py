"""What rows are looked at for: a run file, the folder of a run, or data that no run file names yet. Each becomes a `RunConfig`.

A run's folder says in run.json what its sources are and where their paths start. Of its variants only what decides how rows are read is
taken: length, turns, objective.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trimtab.bases.bundled import BUNDLED_NAMES
from trimtab.data.sources import HUB, KEYS, holds_rows, sources_in
from trimtab.errors import BaseError, ConfigError, DataError
from trimtab.objectives import OBJECTIVES, Sft
from trimtab.paths import real_path, user_path
from trimtab.train.config import RunConfig, named_data
from trimtab.train.initial import guess, run_text
from trimtab.train.past import load, plan_of
from trimtab.train.run_folders import is_file, is_run

OUTSIDE = "outside of the folders that this page may show"
NAME_IT = "name the folder when the page is started: trimtab studio RUNS --data FOLDER"
SPLITS = ("train", "valid", "test")
RUN_FILES = (".yaml", ".yml")
Content = Mapping[str, Any]


def run_of(subject: Path, base: str) -> RunConfig:
    """The run of a run file, a run's folder, or data: for these a run file is guessed as `trimtab init` does it, on `base`."""
    content, root = content_of(subject, base)
    return RunConfig.from_dict(content, root=root, where=str(subject))


def content_of(subject: Path, base: str) -> tuple[Content, Path]:
    """(what a run file would say, where its paths start). TrimtabError where there is no such thing, or it says nothing of rows."""
    if subject.is_dir() and is_run(subject):
        return of_folder(subject)
    if subject.suffix.lower() in RUN_FILES:
        from trimtab.train.runfile import read_yaml

        content = read_yaml(subject, "run file")
        if not isinstance(content, Mapping):
            raise ConfigError(f"{subject}: a mapping is expected", fix="name a run file, a run's folder, or a file of rows")
        return content, subject.parent
    found = guess(subject.name, subject.parent)
    return yaml.safe_load(run_text(found, base)), subject.parent


def of_folder(folder: Path) -> tuple[Content, Path]:
    """A run file's data and variants, from what a run has written. ConfigError where it has written none of it."""
    plan = plan_of(folder)
    told = load(folder / "summary.json") if is_file(folder / "summary.json") else plan
    flat = told.get("settings") if isinstance(told, dict) else None
    if not isinstance(flat, dict) or not isinstance(flat.get("base"), str):
        raise ConfigError(f"{folder} does not say which rows its run has read", fix="name its run file: it was trained by an older trimtab")
    data = {key[5:-6]: dict(_splits(flat, key[5:-6])) for key in flat if key.startswith("data.") and key.endswith(".train")}
    names = flat.get("order of variants")
    variants = {str(name): dict(_variant(flat, str(name))) for name in (names if isinstance(names, list) else ())}
    content = {"base": flat["base"], "out": str(folder), "data": data, "variants": variants, "seed": flat.get("seed") or 0}
    if flat.get("quantize") is not None:
        content["quantize"] = flat["quantize"]
    root = plan.get("root")
    return content, Path(root) if isinstance(root, str) else _likely_root(folder, data)


def _splits(flat: Content, name: str) -> Iterator[tuple[str, Any]]:
    for split in SPLITS:
        sources = flat.get(f"data.{name}.{split}")
        kept = [s for s in sources if isinstance(s, dict) and not s.get("held_out")] if isinstance(sources, list) else []
        if kept:
            yield split, [_source(s) for s in kept]
    if flat.get(f"data.{name}.labels") is not None:
        yield "labels", flat[f"data.{name}.labels"]


def _source(told: Content) -> dict[str, Any]:
    source = {key: told[key] for key in KEYS if told.get(key) not in (None, {}) and key != "rows"}
    return source | ({"split": told["held"]} if told.get("held") else {})


def _variant(flat: Content, name: str) -> Iterator[tuple[str, Any]]:
    """What decides how its rows are read. The method is not among it."""
    own = {key.removeprefix(f"variants.{name}."): value for key, value in flat.items() if key.startswith(f"variants.{name}.")}
    yield "method", "lora"
    objective = OBJECTIVES.get(str(own.get("objective", Sft.name)), Sft)
    for key in ("data", "objective", "max_length", "last_turn_only", *(f.name for f in dataclasses.fields(objective))):
        if own.get(key) is not None:
            yield key, own[key]


def _likely_root(folder: Path, data: Content) -> Path:
    """Where relative paths start, for runs that do not say it: the nearest folder above in which the first source is."""
    first = next((s["path"] for splits in data.values() for s in splits.get("train", ()) if isinstance(s.get("path"), str)), "")
    return next((above for above in folder.parents if first and (above / first).exists()), folder.parent)


def refuse_outside(content: Content, root: Path, allowed: Sequence[Path]) -> None:
    """DataError where a source lies outside the folders that may be shown, links followed; before anything of it is read."""
    data = named_data(content.get("data"))
    outside = list[str]()
    for config in data.values() if isinstance(data, Mapping) else ():
        splits = {"train": config} if holds_rows(config) or not isinstance(config, Mapping) else config
        for value in [splits[s] for s in SPLITS if splits.get(s)]:
            for source in sources_in(value, "")[0]:
                if source.rows is None and not source.path.startswith(HUB):
                    path = real_path(user_path(source.path, DataError, "path", root), DataError, "path")
                    outside += [] if any(path.is_relative_to(folder) for folder in allowed) else [source.path]
    if outside:
        raise DataError(f"{OUTSIDE}: {', '.join(dict.fromkeys(outside))}", fix=NAME_IT)


def refuse_base_outside(base: Any, allowed: Sequence[Path], own: str) -> None:
    """BaseError where a base is a path outside the folders that may be shown, links followed; before anything of it is read. The same
    answer whether it is there or not. own: the base that the page was started with, wherever it lies."""
    if not isinstance(base, str) or base == own or base in BUNDLED_NAMES:
        return
    path = user_path(base, BaseError, "base")
    if not (base.startswith(("/", "~")) or {".", ".."}.intersection(base.split("/")) or os.path.lexists(path)):
        return  # a name of the hub, or none of anything
    if not any(real_path(path, BaseError, "base").is_relative_to(folder) for folder in allowed):
        raise BaseError(f"{OUTSIDE}: base = {base!r}", fix=f"{NAME_IT}, or --base")
