"""A run file that is formed step by step on the page: what can be chosen, its text, and what is wrong with each of its fields."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from trimtab.bases.bundled import BUNDLED_NAMES
from trimtab.bases.recipes import NAMES as QUANTIZED
from trimtab.errors import ConfigError
from trimtab.hyperparameters import Hyperparameters
from trimtab.methods import BY_NAME
from trimtab.objectives import OBJECTIVES, Objective
from trimtab.paths import real_path, user_path
from trimtab.rewards.builtin import REWARDS
from trimtab.rewards.spec import OPTIONS, Rewards
from trimtab.train.config import RunConfig
from trimtab.train.dry import unrewarded
from trimtab.train.initial import guess, run_text
from trimtab.train.options import TrainOptions, VariantConfig
from trimtab.train.subject import OUTSIDE

PLACE = re.compile(r"([a-z_]+(?:\.[\w-]+)*)(?:\[\d+\])?(?: = |: )")
"""The part of a run file with which a finding begins."""
TRAINING = ("lr", "epochs", "max_steps", "batch_size", "gradient_accumulation_steps", "max_length", "schedule", "warmup_steps", "optimizer")
"""Training options that are asked for; all others stay what they are by default, and can be written into the file."""

KINDS = ("number", "numbers", "word", "switch", "text", "list", "rewards")
"""Kinds of fields that a form can hold. A word may be several, in a list."""


def choices() -> dict[str, Any]:
    """What the page offers: bases, built-in rewards, methods and objectives, with those of their fields that a form can hold. reads: of an
    objective, which others read rows as it does; these can share a data set. metrics: what a variant of it can be judged by."""
    return {
        "bases": list(BUNDLED_NAMES),
        "quantize": list(QUANTIZED),
        "methods": [_told(cls, ("number", "word", "switch")) | {"lr": cls.preset_lr} for cls in BY_NAME.values()],
        "objectives": [_told(cls) | _as_objective(cls) for cls in OBJECTIVES.values()],
        "rewards": [_reward(name) for name in REWARDS],
        "training": list(_training()),
    }


def guessed(path: str, root: Path, base: str) -> dict[str, Any]:
    """A first run file for data, as `trimtab init` writes it. path: from `root`, where the file will lie."""
    found = guess(path, root)
    content = yaml.safe_load(run_text(found, base))
    content["out"] = free_name(content["out"].rpartition("/")[2], root)
    return {"content": content, "said": found.said, "rows": found.rows, "objectives": list(found.objectives), "answered": found.answered}


def free_name(name: str, root: Path) -> str:
    """A name for a run folder that nothing in `root` has, as a file of runs neither."""
    taken = (n for n in range(1, 1000) if not (root / _numbered(name, n)).exists() and not (root / f"{_numbered(name, n)}.yaml").exists())
    return _numbered(name, next(taken, 1000))


def _numbered(name: str, n: int) -> str:
    return name if n == 1 else f"{name}-{n}"


def formed(content: Mapping[str, Any], said: Sequence[str], root: Path, allowed: Sequence[Path] | None = None) -> dict[str, Any]:
    """The run file's text, and its findings, each with the part of the file that it is about ("" where that is not told). allowed: folders
    in which files of rewards are looked for; None: anywhere."""
    return {"text": text_of(content, said), "problems": list(problems(content, root, allowed))}


def text_of(content: Mapping[str, Any], said: Sequence[str] = ()) -> str:
    lines = [f"# {line}" for text in said for line in text.splitlines()]
    plain = json.loads(json.dumps(content))
    body = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)
    return "\n".join([*lines, body]) if lines else body


def problems(content: Mapping[str, Any], root: Path, allowed: Sequence[Path] | None = None) -> Iterator[dict[str, str]]:
    """What `trimtab train` would refuse before it reads any rows."""
    try:
        run = RunConfig.from_dict(content, root=root, where="the run file")
    except ConfigError as error:
        for text in error.problems or (error.message,):
            found = PLACE.match(text)
            yield {"where": found[1] if found else "", "text": text}
        return
    if run.out.exists() and (not run.out.is_dir() or any(run.out.iterdir())):
        yield {"where": "out", "text": f"out = {content.get('out')!r}: there is something in it already; name another folder"}
    for v in run.variants:
        where = f"variants.{v.name}"
        strange = [r for r in _files_of_rewards(v) if allowed is not None and not _is_inside(r, root, allowed)]
        if strange:
            yield {"where": f"{where}.rewards", "text": f"{where}.rewards: {OUTSIDE}: {', '.join(strange)}"}
        elif (absent := unrewarded(v, root, where)) is not None:
            yield {"where": f"{where}.rewards", "text": absent.message}


def _files_of_rewards(variant: VariantConfig) -> list[str]:
    return [r.file for r in getattr(variant.objective, "rewards", ()) if r.file is not None]


def _is_inside(name: str, root: Path, allowed: Sequence[Path]) -> bool:
    """Whether a file lies in one of the folders, links followed; no more of it is looked at."""
    path = real_path(user_path(name, ConfigError, "reward", root), ConfigError, "reward")
    return any(path.is_relative_to(folder) for folder in allowed)


def _reward(name: str) -> dict[str, Any]:
    """A built-in reward: what it rewards, and its options with whether it needs them."""
    parameters = inspect.signature(REWARDS[name]).parameters
    options = [{"name": n, "needed": parameters[n].default is inspect.Parameter.empty} for n in OPTIONS if n in parameters]
    return {"name": name, "options": options}


def _told(cls: type[Hyperparameters], kinds: Collection[str] = KINDS) -> dict[str, Any]:
    plain, whole = get_type_hints(cls), get_type_hints(cls, include_extras=True)
    hints = {name: hint if whole[name] != Rewards else Rewards for name, hint in plain.items()}
    fields = [_field(f.name, hints[f.name], f.default) for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING]
    return {"name": cls.name, "fields": [f for f in fields if f is not None and f["kind"] in kinds]}


def _as_objective(cls: type[Objective]) -> dict[str, Any]:
    return {"reads": f"{cls.parts.__module__}.{cls.parts.__qualname__}", "metrics": list(cls.metrics), "lr_scale": cls.lr_scale}


def _training() -> Iterator[dict[str, Any]]:
    for name in TRAINING:
        option = TrainOptions.model_fields[name]
        if (field := _field(name, option.annotation, option.default)) is not None:
            yield field | {"says": option.description or ""}


def _field(name: str, hint: Any, default: Any) -> dict[str, Any] | None:
    """A field as a form has it; None for mappings and what is of several kinds."""
    if hint == Rewards:
        return {"name": name, "kind": "rewards", "default": None}
    kinds = [k for k in (get_args(hint) if get_origin(hint) is not Literal and get_args(hint) else (hint,)) if k is not type(None)]
    words = [w for k in kinds if get_origin(k) is Literal for w in get_args(k)]
    if words:
        several = {"several": True} if any(get_origin(k) is tuple and get_origin(get_args(k)[0]) is Literal for k in kinds) else {}
        told = {"name": name, "kind": "word", "default": default, "words": words, **several}
        return told if default is None or default in words else None
    if kinds == [bool]:
        return {"name": name, "kind": "switch", "default": default}
    if kinds == [str]:
        return {"name": name, "kind": "text", "default": default}
    if kinds == [tuple[str, ...]]:
        return {"name": name, "kind": "list", "default": None}
    if kinds == [tuple[float, ...]]:
        return {"name": name, "kind": "numbers", "default": None}
    if set(kinds) <= {int, float} and kinds:
        return {"name": name, "kind": "number", "default": default, "whole": float not in kinds}
    return None
