"""A run file that is formed step by step on the page: what can be chosen, its text, and what is wrong with each of its fields."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from trimtab.bases.bundled import BUNDLED_NAMES
from trimtab.bases.recipes import NAMES as QUANTIZED
from trimtab.errors import ConfigError
from trimtab.hyperparameters import Hyperparameters
from trimtab.methods import BY_NAME
from trimtab.objectives import OBJECTIVES
from trimtab.train.config import RunConfig
from trimtab.train.initial import guess, run_text
from trimtab.train.options import TrainOptions

PLACE = re.compile(r"([a-z_]+(?:\.[\w-]+)*)(?:\[\d+\])?(?: = |: )")
"""The part of a run file with which a finding begins."""
TRAINING = ("lr", "epochs", "max_steps", "batch_size", "gradient_accumulation_steps", "max_length", "schedule", "warmup_steps", "optimizer")
"""Training options that are asked for; all others stay what they are by default, and can be written into the file."""
HEADS = ("classify", "reward", "stepwise", "distil", "grpo")
"""Objectives that need settings which no form of a few fields holds: rewards, teachers, labels."""


def choices() -> dict[str, Any]:
    """What the page offers: bases, methods and objectives with those of their fields that are a number, a word or a switch."""
    return {
        "bases": list(BUNDLED_NAMES),
        "quantize": list(QUANTIZED),
        "methods": [_told(cls) | {"lr": cls.preset_lr} for cls in BY_NAME.values()],
        "objectives": [_told(cls) for cls in OBJECTIVES.values() if cls.name not in HEADS],
        "training": list(_training()),
    }


def guessed(path: str, root: Path, base: str) -> dict[str, Any]:
    """A first run file for data, as `trimtab init` writes it. path: from `root`, where the file will lie."""
    found = guess(path, root)
    content = yaml.safe_load(run_text(found, base))
    content["out"] = free_name(content["out"].rpartition("/")[2], root)
    return {"content": content, "said": found.said, "rows": found.rows}


def free_name(name: str, root: Path) -> str:
    """A name for a run folder that nothing in `root` has, as a file of runs neither."""
    taken = (n for n in range(1, 1000) if not (root / _numbered(name, n)).exists() and not (root / f"{_numbered(name, n)}.yaml").exists())
    return _numbered(name, next(taken, 1000))


def _numbered(name: str, n: int) -> str:
    return name if n == 1 else f"{name}-{n}"


def formed(content: Mapping[str, Any], said: Sequence[str], root: Path) -> dict[str, Any]:
    """The run file's text, and its findings, each with the part of the file that it is about ("" where that is not told)."""
    return {"text": text_of(content, said), "problems": list(problems(content, root))}


def text_of(content: Mapping[str, Any], said: Sequence[str] = ()) -> str:
    lines = [f"# {line}" for text in said for line in text.splitlines()]
    plain = json.loads(json.dumps(content))
    body = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)
    return "\n".join([*lines, body]) if lines else body


def problems(content: Mapping[str, Any], root: Path) -> Iterator[dict[str, str]]:
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


def _told(cls: type[Hyperparameters]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    fields = [_field(f.name, hints[f.name], f.default) for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING]
    return {"name": cls.name, "fields": [f for f in fields if f is not None]}


def _training() -> Iterator[dict[str, Any]]:
    for name in TRAINING:
        option = TrainOptions.model_fields[name]
        if (field := _field(name, option.annotation, option.default)) is not None:
            yield field | {"says": option.description or ""}


def _field(name: str, hint: Any, default: Any) -> dict[str, Any] | None:
    """A field as a form has it; None for lists, mappings and what is of several kinds."""
    kinds = [k for k in (get_args(hint) if get_origin(hint) is not Literal and get_args(hint) else (hint,)) if k is not type(None)]
    words = [w for k in kinds if get_origin(k) is Literal for w in get_args(k)]
    if words:
        return {"name": name, "kind": "word", "default": default, "words": words} if default is None or default in words else None
    if kinds == [bool]:
        return {"name": name, "kind": "switch", "default": default}
    if set(kinds) <= {int, float} and kinds:
        return {"name": name, "kind": "number", "default": default, "whole": float not in kinds}
    return None
