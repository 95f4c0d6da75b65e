"""A clone as a run of its own: the run file that makes it, from what its run's folder tells."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trimtab.errors import ConfigError, nearest, printable
from trimtab.hyperparameters import Hyperparameters
from trimtab.train.clone import cloned_from
from trimtab.train.config import RunConfig
from trimtab.train.options import VALIDATION, EvalOptions, VariantConfig
from trimtab.train.past import plan_of
from trimtab.train.subject import of_folder

OF_RUN = ("dtype", "max_tokens", "compile", "log_every")
"""Settings of a run that its clone takes on, where they are not the usual ones."""


def run_file_of(folder: Path, of: str, name: str, changes: Mapping[str, Any], file: Path) -> str:
    """The text of `file`, a run file with the clone `name` of the variant `of` as its one variant. ConfigError where the folder does not
    tell of the variant, a setting is wrong, or the paths of the run would lead elsewhere from `file`."""
    plan = plan_of(folder)
    shown, variants, flat = printable(str(folder)), plan.get("variants"), plan.get("settings")
    if not isinstance(variants, dict) or not isinstance(flat, dict):
        raise ConfigError(f"{shown}: no run of a trimtab that clones has begun in it", fix="name the folder that such a run writes to")
    if of not in variants:
        raise ConfigError(f"{printable(of[:80])!r}: no variant of this run{nearest(of, variants)}", fix=f"one of {', '.join(variants)}")
    try:
        told, root = of_folder(folder)
        config = cloned_from(name, variants[of], changes, dict.fromkeys(told["data"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"run.json in {shown} is not as trimtab writes it ({type(error).__name__}: {error})"
        raise ConfigError(what, fix="write the run file by hand") from error
    if file.absolute().parent.resolve() != root.resolve():
        raise ConfigError(
            f"the paths of this run start at {printable(str(root))}", fix=f"write the file there: {printable(str(root / file.name))}"
        )
    data = told["data"][config.data]
    content: dict[str, Any] = {"base": told["base"], "out": f"{folder.absolute().name}-{name}"}
    content |= {key: told[key] for key in ("seed", "quantize") if told.get(key)}
    usual = {key: field.default for key, field in RunConfig.model_fields.items()}
    content |= {key: flat[key] for key in OF_RUN if key in flat and flat[key] != usual[key]}
    scoring = {k: flat[f"evaluate.{k}"] for k, f in EvalOptions.model_fields.items() if flat.get(f"evaluate.{k}", f.default) != f.default}
    content |= {"evaluate": scoring} if scoring else {}
    content |= {"data": {config.data: data}, "variants": {name: _own(config, "valid" in data or any("split" in s for s in data["train"]))}}
    RunConfig.from_dict(content, root=root, where=f"a run of {name} alone")
    head = f"# {name}: a clone of {of} in {shown}. Train it: trimtab train {printable(str(file))}\n"
    return head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _own(v: VariantConfig, validated: bool) -> dict[str, Any]:
    """A variant as a run file has it, without what is usual. validated: whether there are valid rows, without which some options are of no
    use."""
    options = v.options.model_dump(mode="json", exclude_defaults=True)
    if v.options.valid_metric == v.objective.judged_by or not validated:
        options.pop("valid_metric", None)
    kept = {k: x for k, x in options.items() if validated or k not in VALIDATION}
    objective = {"objective": v.objective.name} if v.aim else {}
    return {"data": v.data, "method": v.method.name, **_unusual(v.method), **objective, **_unusual(v.objective), **kept}


def _unusual(values: Hyperparameters) -> dict[str, Any]:
    usual = {f.name: f.default for f in dataclasses.fields(values)}
    plain = values.to_dict()
    return {
        k: list(x) if isinstance(x, tuple) else x
        for k, x in plain.items()
        if getattr(values, k) != usual.get(k) and x not in (None, (), {})
    }
