"""`trimtab.merge` and `trimtab.export`: an adapter as other programs want it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.errors import ConfigError
from trimtab.model import Base, load_base
from trimtab.python.arguments import with_known_keywords
from trimtab.store import Adapter
from trimtab.store.export import ExportReport, check_format
from trimtab.store.export import export as write
from trimtab.store.merge import MergeReport
from trimtab.store.staging import check_target
from trimtab.train.scoring import short_names


@with_known_keywords
def merge(
    adapter: Adapter | str | Path,
    folder: str | Path,
    *,
    base: Base | Any | str | None = None,
    tokenizer: Any = None,
    quantize: str | None = None,
    base_differs: bool = False,
    store_root: str | Path | None = None,
) -> MergeReport:
    """Fold an adapter into its base's weights and write an ordinary model folder, which is read back and compared before it gets its name.

    adapter: an `Adapter`, which knows its base; or a folder or a name in the store (store_root, else the default one), with the `base` that
    it is for. quantize: as in its training. NotMergeable, with the reason, where the weights cannot hold it; nothing is left then.
    """
    check_target(Path(folder))
    return _loaded(adapter, base, tokenizer, quantize, base_differs, store_root).merge_into(folder)


@with_known_keywords
def export(
    adapter: Adapter | str | Path,
    folder: str | Path,
    format: str = "peft",
    *,
    base: Base | Any | str | None = None,
    tokenizer: Any = None,
    call_base: str | None = None,
    quantize: str | None = None,
    base_differs: bool = False,
    store_root: str | Path | None = None,
) -> ExportReport:
    """Write an adapter for another program, read it back and compare: peft, vllm, merged or gguf.

    adapter, base, quantize, base_differs, store_root: as of `merge`. call_base: what the folder calls its base, as vLLM's name for the
    model; by default its hub id or folder. AdapterError, with every reason, where the format cannot hold it; nothing is left then.
    """
    check_format(format)
    check_target(Path(folder))
    return write(_loaded(adapter, base, tokenizer, quantize, base_differs, store_root), folder, format, base_name=call_base)


def by_name(adapters: Mapping[str, Adapter | str | Path] | Sequence[str | Path]) -> dict[str, Adapter | str | Path]:
    """Adapters by name; of a list, by the names of their folders. ConfigError where one is called as the base is."""
    every = adapters if isinstance(adapters, Mapping) else short_names([str(a) for a in adapters])
    named: dict[str, Adapter | str | Path] = {**every}
    if "base" in named:
        raise ConfigError("adapters: 'base' stands for the base itself", fix="name the adapter otherwise")
    return named


def _loaded(
    adapter: Adapter | str | Path, base: Any, tokenizer: Any, quantize: str | None, base_differs: bool, root: str | Path | None
) -> Adapter:
    """The adapter on its base. One that is loaded for this is as it is stored, mapped from its files."""
    if isinstance(adapter, Adapter):
        if base is not None:
            raise ConfigError("a base was given beside an Adapter, which has its own", fix="take it away")
        return adapter
    if base is None:
        raise ConfigError(f"the adapter {str(adapter)!r} is a name, and the base that it is for is missing", fix="give base=…")
    if isinstance(base, str | Path):
        base = load_base(str(base), tokenizer=tokenizer, dtype="auto", device="cpu", quantize=quantize, base_differs=base_differs)
    elif not isinstance(base, Base):
        base = load_base(base, tokenizer=tokenizer, quantize=quantize, base_differs=base_differs)
    return Adapter.load(adapter, base, store=root)
