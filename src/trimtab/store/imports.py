"""Bring in adapters that others wrote: peft's folders with names of old, and AdapterHub's. What peft writes today needs no import.

Names that peft, its trainers or torch put around a tensor's own are taken away: the adapter's name (`lora_A.default.weight`), wrappers
(`_orig_mod.`, `module.`, `modules_to_save.default.`), a missing `base_model.model.`. Then the folder goes through every check that others
go through.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load as parse_tensors
from safetensors.torch import save as format_tensors

from trimtab.errors import AdapterError
from trimtab.store.adapter import Adapter
from trimtab.store.adapterhub import is_adapterhub, read_adapterhub
from trimtab.store.files import Folder, Refusal, open_folder, read_exactly
from trimtab.store.folder import CONFIG, NOTE, PICKLES, WEIGHTS, read_opened
from trimtab.store.header import read_header
from trimtab.store.tensors import PREFIX

if TYPE_CHECKING:
    from trimtab.model import Base

CONVERT = (
    'python -c "import torch; from safetensors.torch import save_file; '
    "save_file(torch.load('adapter_model.bin', weights_only=True), 'adapter_model.safetensors')\""
)
"""Makes a safetensors file of a pickle, with torch's reader that runs no code."""
OWN = r"lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|ia3_l"
_NAMED = re.compile(rf"\.({OWN})\.(?!weight$)([^.]+)(?=$|\.weight$)")
_SAVED = re.compile(r"\.modules_to_save\.([^.]+)\.(?=(?:weight|bias)$)")
_PROMPT = re.compile(r"(?:.*\.)?prompt_encoder\.([^.]+)\.embedding\.weight")


@dataclass(frozen=True)
class Imported:
    """An adapter that was brought in. source: "peft" or "adapterhub". changes: what is not as it was in the folder, in words."""

    adapter: Adapter
    source: str
    changes: tuple[str, ...]


def import_folder(path: str | Path, base: Base) -> Imported:
    """Read a folder of peft's, of any age, or of AdapterHub's `adapters`. Save the adapter to keep it as trimtab's.

    AdapterError, with every finding, where something in it cannot be carried over, or is refused as in any folder.
    """
    where = f"adapter {str(path)!r}"
    with open_folder(path) as folder:
        names = folder.names()
        try:
            config, config_bytes = folder.read_json(CONFIG) if CONFIG in names else ({}, b"")
        except Refusal as error:
            raise AdapterError(f"{where} is refused", problems=[str(error)]) from error
        if is_adapterhub(config):
            method, params, notes = read_adapterhub(folder, config, base, where)
            return Imported(Adapter(base, method, params, verified=False), "adapterhub", notes)
        pickles = [n for n in names if n in PICKLES]
        if pickles and WEIGHTS not in names:
            problems = [f"{n} is a pickle, which can run code when it is read; it never is here" for n in pickles]
            raise AdapterError(f"{where} is refused", problems=problems, fix=f"in that folder, if you trust it: {CONVERT}; rm {pickles[0]}")
        renamed = {} if NOTE in names or WEIGHTS not in names else _renamed(folder, where)
        if not renamed:
            return Imported(Adapter.load(path, base), "peft", ())
        with tempfile.TemporaryDirectory() as rewritten:
            _rewrite(folder, config_bytes, renamed, Path(rewritten))
            with open_folder(rewritten) as today:
                method, params, _, _ = read_opened(today, base, where)
    first = next((old, new) for old, new in renamed.items() if old != new)
    count = sum(old != new for old, new in renamed.items())
    changes = (f"{count} of {len(renamed)} tensors have peft's names of today: {first[0]} is now {first[1]}",)
    adapter = Adapter(base, method, {k: t.to(base.device) for k, t in params.items()}, verified=False)
    return Imported(adapter, "peft", changes)


def _renamed(folder: Folder, where: str) -> dict[str, str]:
    """Every tensor's name -> its name in peft's files of today; {} where none differs. AdapterError where two would have one name."""
    try:
        with folder.open(WEIGHTS) as (file, size):
            entries, _ = read_header(file, size, WEIGHTS)
    except (Refusal, OSError) as error:
        raise AdapterError(f"{where} is refused", problems=str(error).splitlines()) from error
    names = [e.name for e in entries]
    adapters = sorted({match[match.lastindex or 0] for n in names for p in (_NAMED, _SAVED, _PROMPT) if (match := p.search(n))})
    if len(adapters) > 1:
        raise AdapterError(f"{where} holds several adapters: {', '.join(adapters[:8])}", fix="save each into a folder of its own")
    found = {n: modern(n) for n in names}
    _refuse_twins(found, where)
    return found if any(old != new for old, new in found.items()) else {}


def _refuse_twins(found: dict[str, str], where: str) -> None:
    twins = [n for n, new in found.items() if list(found.values()).count(new) > 1] if len(set(found.values())) < len(found) else []
    if twins:
        raise AdapterError(f"{where} is refused", problems=[f"{n} and others are all {found[n]}" for n in twins[:8]])


def modern(name: str) -> str:
    """A tensor's name as peft 0.21 writes it."""
    if _PROMPT.fullmatch(name):
        return "prompt_embeddings"
    name = name.removeprefix("module.").replace("_orig_mod.", "")
    name = _NAMED.sub(r".\1", name)
    name = re.sub(r"\.(lora_embedding_[AB]|lora_magnitude_vector|ia3_l)\.weight$", r".\1", name)
    name = _SAVED.sub(".", name).replace(".original_module.", ".base_layer.")
    return name if name.startswith(PREFIX) or name == "prompt_embeddings" else PREFIX + name


def _rewrite(folder: Folder, config: bytes, renamed: dict[str, str], target: Path) -> None:
    with folder.open(WEIGHTS) as (file, size):
        entries, head = read_header(file, size, WEIGHTS)
        tensors = parse_tensors(head + read_exactly(file, max((e.stop for e in entries), default=0), WEIGHTS))
    (target / CONFIG).write_bytes(config)
    (target / WEIGHTS).write_bytes(format_tensors({renamed[n]: t for n, t in tensors.items()}, metadata={"format": "pt"}))
