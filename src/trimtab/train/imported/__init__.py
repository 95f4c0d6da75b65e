"""Settings of axolotl, LLaMA-Factory, TRL, peft and Unsloth as a run file: every key is carried over, needs nothing here, or is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from trimtab.errors import ConfigError, nearest, printable
from trimtab.train.imported import axolotl, llama_factory, trl, unsloth
from trimtab.train.imported.aims import TRAINERS
from trimtab.train.imported.carry import Carry, Note
from trimtab.train.runfile import read_yaml, shown

PROGRAMS: Mapping[str, Callable[[Carry, str | None], None]] = {
    "axolotl": axolotl.carry,
    "llama-factory": llama_factory.carry,
    "trl": trl.carry,
    "peft": trl.carry_adapter,
    "unsloth": unsloth.carry,
}
WITH_TRAINERS = ("trl", "unsloth")
"""Programs whose settings do not always say which trainer reads them."""


def program_of(settings: Mapping[str, Any]) -> str | None:
    """Whose settings these are, by keys that only one of the programs has; None where that cannot be told."""
    keys = settings.keys()
    if "peft_type" in keys:
        return "peft"
    if "base_model" in keys:
        return "axolotl"
    if "model_name_or_path" in keys:
        own = {"stage", "finetuning_type", "template", "dataset", "cutoff_len", "lora_rank"}
        return "llama-factory" if keys & own else "trl"
    if isinstance(settings.get("training"), Mapping) or ("model_name" in keys and "max_seq_length" in keys):
        return "unsloth"
    return None


STRANGERS: Mapping[str, str] = {
    "distributed_type": "accelerate's, which say how many processes run a training: `trimtab train --ranks N` says that here",
    "zero_optimization": "DeepSpeed's, which say how a training is spread: `shard: true` and `trimtab train --ranks N` say that here",
    "model_class": "of LLaMA-Factory's v1, which are not read: write those of its other version",
}
"""Keys of files that are not settings of a training -> whose they are."""


def read_settings(
    path: Path, program: str | None = None, data: str | None = None, root: Path | None = None, base: str | None = None
) -> Carry:
    """What becomes of a file of settings (YAML or JSON). program: whose they are, where the file does not tell; "trl dpo": and which of its
    trainers reads them. data: a path of rows, in the place of those that they name, or do not name. root: the run file's folder, where
    that is another one. base: in the place of the one that they name, or do not name. ConfigError where it is no such file."""
    settings = read_yaml(path, "settings")
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{path}: settings are a mapping, this is {shown(settings)}", fix="name a YAML or JSON file of settings")
    program, _, command = (program or program_of(settings) or "").partition(" ")
    if program not in PROGRAMS:
        if not program and (whose := next((text for key, text in STRANGERS.items() if key in settings), "")):
            raise ConfigError(f"{path}: these settings are {whose}", fix="name the file of settings of the training")
        known = ", ".join(PROGRAMS)
        why = f"{program!r} is none of {known}{nearest(program, PROGRAMS)}" if program else f"they look like none of {known}"
        raise ConfigError(f"{path}: whose settings these are is not known: {why}", fix="say it: --from axolotl, or another of them")
    if command and (program not in WITH_TRAINERS or command not in TRAINERS):
        fix = f"--from {program}" if program not in WITH_TRAINERS else f"one of {', '.join(TRAINERS)}{nearest(command, TRAINERS)}"
        raise ConfigError(f"--from {program} {command}: {program} has no trainer {command!r} that is known here", fix=fix)
    given = {str(k): v for k, v in settings.items()}
    carry = Carry(program, given, path.parent, path.parent if root is None else root, command=command)
    PROGRAMS[program](carry, data)
    if base is not None:
        carry.run["base"] = base
    elif carry.run.get("base") is None:
        carry.refuse("base", None, "the settings name no model: name it with --base")
    return carry


def content(c: Carry) -> dict[str, Any]:
    """The run file's content."""
    name = str(c.variant["method"])
    variant = {k: v for k, v in c.variant.items() if k != "data"}
    return {**c.run, "data": c.data, "variants": {name: {"data": "rows", **variant}}}


def run_text(c: Carry, came_from: str) -> str:
    """The run file as YAML, with what is not carried, and what needs nothing, as comments."""
    lines = [f"# Made by `trimtab import-config` from {came_from}, settings of {c.program}."]
    for title, notes in (("Not carried over", c.lost), ("Needs nothing here", c.idle)):
        lines += [f"# {title}:", *(f"#   {_one_line(n)}" for n in notes)] if notes else []
    plain = json.loads(json.dumps(content(c), default=str))
    return "\n".join(lines) + "\n" + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=140, default_flow_style=None)


def _one_line(note: Note) -> str:
    return printable(" ".join(str(note).split()))
