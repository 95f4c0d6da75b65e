"""The head of an adapter's folder: peft's SEQ_CLS and TOKEN_CLS, whose config says neither its labels nor its size: the tensors do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from trimtab.errors import AdapterError
from trimtab.methods import Head
from trimtab.methods.head import NAMES, TASKS, unnamed
from trimtab.store.files import AdapterFolder
from trimtab.store.header import Entry, read_header
from trimtab.store.keys import modern
from trimtab.store.tensors import PREFIX

MAX_LABELS = 100_000


def head_in(config: Mapping[str, Any], folder: AdapterFolder, weights: str, where: str) -> Head | None:
    """The head that a folder of peft's holds; None where its task has none. AdapterError if it has two. Refusal as `read_header`."""
    if config.get("task_type") not in TASKS.values():
        return None
    with folder.open_unhashed(weights) as (file, size):
        entries = {modern(e.name, dict.fromkeys(NAMES, "")): e for e in read_header(file, size, weights)[0]}
    found = [name for name in NAMES if f"{PREFIX}{name}.weight" in entries]
    if len(found) > 1:
        raise AdapterError(f"{where} holds two heads: {' and '.join(found)}", fix="save it anew with one of them")
    if not found:
        return None
    shape = entries[f"{PREFIX}{found[0]}.weight"].shape
    if len(shape) != 2 or not 1 <= shape[0] <= MAX_LABELS:
        raise AdapterError(f"{where}: {found[0]}.weight has shape {shape}, and a head has [labels, hidden size]")
    every = config["task_type"] == TASKS[True]
    return Head(unnamed(shape[0]), every, found[0], f"{PREFIX}{found[0]}.bias" in entries)


def without_head(config: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter's config says of its method alone. peft names every head that there may be, beside the modules that are trained."""
    saved = config.get("modules_to_save")
    rest = [name for name in saved if name not in NAMES] if isinstance(saved, list) else saved
    return {**config, "task_type": "CAUSAL_LM", "modules_to_save": rest or None}


def differs(config: Mapping[str, Any], head: Head | None) -> bool:
    """Whether the config describes another head than trimtab.json does, as far as it says."""
    saved = config.get("modules_to_save")
    if head is None:
        return config.get("task_type") in TASKS.values()
    return config.get("task_type") != head.task or not isinstance(saved, list) or head.module not in saved


def leftovers(entries: Iterable[Entry], head: Head | None) -> set[str]:
    """Tensors of the untrained head, which older versions of peft save beside the trained one; nothing reads them."""
    return {e.name for e in entries if head and e.name.startswith(f"{PREFIX}{head.module}.base_layer.")}
