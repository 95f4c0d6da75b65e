"""Writes an adapter folder: peft's two files, `trimtab.json` and a card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import ConfigError, nearest
from trimtab.methods import Head, Method
from trimtab.store.card import CARD, is_untouched, make_card
from trimtab.store.config_write import config_from_method
from trimtab.store.note import make_note
from trimtab.store.staging import staged
from trimtab.store.tensors import PREFIX, beside_routers, expected, value_problems

if TYPE_CHECKING:
    from torch import Tensor

    from trimtab.model import Base

from trimtab.store.files import digest_of
from trimtab.store.folder import CONFIG, NOTE, REPLACEABLE, WEIGHTS, refuse


def write_folder(
    target: str | Path,
    method: Method,
    params: Mapping[str, Tensor],
    base: Base,
    run: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    head: Head | None = None,
) -> Path:
    """Write an adapter as peft's folder plus trimtab.json and a card, in one step: a whole folder is there, or what was there before.

    Training-time aids are folded away first, and values rounded to dtype. AdapterError if values are not finite, do not fit the dtype,
    or the target holds other files, a README.md that trimtab did not write or that was edited among them.
    """
    import torch
    from safetensors.torch import save as format_tensors

    method, params = method.export(params)
    sites = method.sites(base.spec) + ([head.site(base.spec)] if head else [])
    tensors = {name: params[key].detach().to("cpu", torch.float32).contiguous() for name, (key, _) in expected(sites).items()}
    where = f"cannot save {target}"
    refuse(where, value_problems(tensors, {}, base, edits=False), fix="train again from the last good checkpoint")
    tensors = _rounded(tensors, dtype, where)
    tensors |= {PREFIX + name: base.parameter(name).detach().cpu().clone() for name in beside_routers(sites, base)}
    config = config_from_method(method, sites, base.spec, base.name or (str(base.path) if base.path else None), head)
    files = {
        CONFIG: json.dumps(dict(sorted(config.items())), indent=2).encode() + b"\n",
        WEIGHTS: format_tensors(tensors, metadata={"format": "pt"}),
    }
    note = make_note(method, base, {name: digest_of(data) for name, data in files.items()}, run, head)
    files[NOTE] = json.dumps(note, indent=2, allow_nan=False).encode() + b"\n"
    files[CARD] = make_card(method, note, sites, len(files[WEIGHTS]), head)
    replaceable = (*REPLACEABLE, CARD) if is_untouched(Path(target) / CARD) else REPLACEABLE
    with staged(target, may_replace=replaceable) as work:
        for name, data in files.items():
            (work / name).write_bytes(data)
    return Path(target)


def _rounded(tensors: Mapping[str, Tensor], dtype: str, where: str) -> dict[str, Tensor]:
    import torch

    from trimtab.bases.load import DTYPES

    if dtype not in DTYPES:
        raise ConfigError(f"{where}: dtype = {dtype!r}{nearest(dtype, DTYPES)}", fix=f"one of {', '.join(DTYPES)}")
    rounded = {name: t.to(DTYPES[dtype]) for name, t in tensors.items()}
    problems = [f"{name} has values that do not fit {dtype}" for name, t in rounded.items() if not bool(torch.isfinite(t).all())]
    problems += [f"{name} would be all zero in {dtype}" for name, t in rounded.items() if tensors[name].any() and not t.any()]
    refuse(where, problems, fix="store it as float32 or bfloat16")
    return rounded
