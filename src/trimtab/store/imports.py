"""Bring in adapters that others wrote: AdapterHub's folders, and peft's of any age, which need no import and may have one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.errors import AdapterError
from trimtab.store.adapter import Adapter
from trimtab.store.adapterhub import is_adapterhub, read_adapterhub
from trimtab.store.files import Refusal, open_folder
from trimtab.store.folder import CONFIG, PICKLES, WEIGHTS

if TYPE_CHECKING:
    from trimtab.model import Base

CONVERT = (
    'python -c "import torch; from safetensors.torch import save_file; '
    "save_file(torch.load('adapter_model.bin', weights_only=True), 'adapter_model.safetensors')\""
)
"""Makes a safetensors file of a pickle, with torch's reader that runs no code."""


@dataclass(frozen=True)
class Imported:
    """An adapter that was brought in. source: "peft" or "adapterhub". changes: what is not as it was in the folder, in words."""

    adapter: Adapter
    source: str
    changes: tuple[str, ...]


def import_folder(path: str | Path, base: Base) -> Imported:
    """Read a folder of peft's, of any age, or of AdapterHub's `adapters`. Save the adapter to keep it as trimtab's.

    AdapterError, with every finding, if something in it cannot be carried over, or is refused as in any folder.
    """
    where = f"adapter {str(path)!r}"
    with open_folder(path) as folder:
        names = folder.names()
        try:
            config = folder.read_json(CONFIG)[0] if CONFIG in names else {}
        except Refusal as error:
            raise AdapterError(f"{where} is refused", problems=[str(error)]) from error
        if is_adapterhub(config):
            method, params, notes = read_adapterhub(folder, config, base, where)
            return Imported(Adapter(base, method, params, verified=False), "adapterhub", notes)
        pickles = [n for n in names if n in PICKLES]
        if pickles and WEIGHTS not in names:
            problems = [f"{n} is a pickle, which can run code when it is read; it never is here" for n in pickles]
            raise AdapterError(f"{where} is refused", problems=problems, fix=f"in that folder, if you trust it: {CONVERT}; rm {pickles[0]}")
        adapter = Adapter.read(folder, base, where)
    return Imported(adapter, "peft", adapter.warnings)
