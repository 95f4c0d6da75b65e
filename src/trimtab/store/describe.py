"""What a version's manifest says of its files, for lists: derived from the files alone, so that it can be checked against them."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from trimtab.methods import METHODS
from trimtab.store.files import AdapterFolder
from trimtab.store.folder import survey
from trimtab.store.manifest import CREATED, FACTS, MAX_ANNOTATION, PARAMETERS

DERIVED = (*FACTS.values(), PARAMETERS, CREATED)


def describe(folder: AdapterFolder, where: str) -> dict[str, str]:
    """The manifest's annotations. AdapterError, with every finding, if the folder holds what no base would accept."""
    config, note, entries = survey(folder, where)
    noted: Mapping[str, Any] = note or {}
    base = noted["base"] if isinstance(noted.get("base"), dict) else {}
    found = {
        FACTS["method"]: METHODS[config["peft_type"]].name,
        FACTS["base"]: base.get("name") or config.get("base_model_name_or_path"),
        FACTS["fingerprint"]: base.get("fingerprint"),
        PARAMETERS: str(sum(prod(e.shape) for e in entries)),
        CREATED: noted.get("created"),
    }
    return {k: v for k, v in found.items() if isinstance(v, str) and v.isprintable() and 0 < len(v) <= MAX_ANNOTATION}


def contradictions(claimed: Mapping[str, str], derived: Mapping[str, str]) -> list[str]:
    """What a manifest from elsewhere says of its files and what is not so, one line each. What it does not say is no contradiction."""
    return [
        f"its manifest says {key} = {claimed[key]!r}; its files say {derived.get(key, 'nothing')!r}"
        for key in DERIVED
        if key in claimed and claimed[key] != derived.get(key)
    ]
