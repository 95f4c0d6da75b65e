"""Clones: variants that are made from another one of the same run, with some settings changed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from trimtab.errors import ConfigError, nearest
from trimtab.methods import BY_NAME
from trimtab.objectives import OBJECTIVES
from trimtab.train.config import RunConfig, variant_from
from trimtab.train.control import Clone
from trimtab.train.options import DataConfig, VariantConfig
from trimtab.train.runfile import read_value

ALONE = "train it as a run of its own: `trimtab runs clone` with --write FILE writes its run file"
"""What to do with a clone that a run in progress cannot take."""
TOGETHER = "are compared at the same step"


def described(v: VariantConfig) -> dict[str, Any]:
    """A variant's settings as plain JSON values, such as `cloned_from` takes them. `lr` is None where it is the method's preset."""
    told = {"data": v.data, "method": v.method.name, "objective": v.objective.name}
    return told | {"fields": {**v.method.to_dict(), **v.objective.to_dict()}, "options": v.options.model_dump(mode="json")}


def changes_of(texts: Sequence[str]) -> dict[str, Any]:
    """Settings that are written KEY=VALUE, the value in YAML, as `--set` has them. ConfigError that lists every one that is not."""
    found, problems = dict[str, Any](), list[str]()
    for text in texts:
        key, is_one, value = text.partition("=")
        try:
            if not is_one or not key.strip():
                raise ValueError("write KEY=VALUE")
            found[key.strip()] = read_value(value)
            json.dumps(found[key.strip()])  # control.json is to hold it
        except TypeError:
            problems.append(f"{text[:80]}: neither a number, a text, a switch, nor a list or mapping of these")
        except (ValueError, yaml.YAMLError) as error:
            problems.append(f"{text[:80]}: {error}")
    if problems:
        raise ConfigError("these settings cannot be read", problems=problems, fix="write them as in a run file, such as lr=1e-4")
    return found


def cloned_from(name: str, told: Mapping[str, Any], changes: Mapping[str, Any], data: Mapping[str, DataConfig | None]) -> VariantConfig:
    """The variant `name`: what `described` told of another one, with changes. Where the method or the objective changes, the old one's
    fields go. data, errors: as of `variant_from`."""
    fields, options = dict(told["fields"]), dict(told["options"])
    for key, known in (("method", BY_NAME), ("objective", OBJECTIVES)):
        if changes.get(key, told[key]) != told[key]:
            gone = {f.name for f in dataclasses.fields(known[told[key]])}
            fields = {k: v for k, v in fields.items() if k not in gone}
            options = {k: v for k, v in options.items() if key != "objective" or k != "valid_metric"}
    own = {"data": told["data"], "method": told["method"], "objective": told["objective"], **fields, **changes}
    return variant_from(name, own, options, data)


def with_clone(run: RunConfig, name: str, clone: Clone) -> RunConfig:
    """The run with one variant more. ConfigError where it cannot have it."""
    there = {v.name: v for v in run.variants}
    if name in there:
        raise ConfigError(f"{name!r} is a variant of this run already", fix="give the clone another name")
    if clone.of not in there:
        raise ConfigError(f"clone of {clone.of!r}: no variant of this run{nearest(clone.of, there)}", fix=f"one of {', '.join(there)}")
    made = cloned_from(name, described(there[clone.of]), clone.changes, run.data)
    return run.model_copy(update={"variants": [*run.variants, made]})


def with_clones(run: RunConfig, clones: Mapping[str, Any]) -> RunConfig:
    """The run with the clones that have joined it before. clones: as a checkpoint or summary.json has them."""
    for name, value in clones.items():
        run = with_clone(run, name, Clone.from_dict(value))
    return run
