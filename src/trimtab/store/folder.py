"""Reading and writing an adapter folder: peft's two files and `trimtab.json`.

Reading goes from cheap to dear: the JSON files, the base that they were made for, the config against the base, the header against the
config, and only then the tensors' values. At each step everything that is wrong is reported at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as format_tensors
from torch import Tensor

from trimtab.bases.load import DTYPES
from trimtab.errors import AdapterError, ConfigError, nearest
from trimtab.methods import METHODS, Method
from trimtab.methods.base import Site
from trimtab.store.card import CARD, is_untouched, make_card
from trimtab.store.config_read import method_from_config
from trimtab.store.config_write import config_from_method
from trimtab.store.files import Folder, Refusal, open_folder, read_exactly
from trimtab.store.header import Entry, read_header
from trimtab.store.note import fit_problems, make_note, method_of, recorded_fingerprint
from trimtab.store.staging import staged
from trimtab.store.tensors import PREFIX, copies_of_base, expected, file_key, layout_problems, value_problems

if TYPE_CHECKING:
    from trimtab.model import Base

CONFIG, WEIGHTS, NOTE = "adapter_config.json", "adapter_model.safetensors", "trimtab.json"
PICKLES = tuple(f"adapter_model.{ending}" for ending in ("bin", "pt", "pth", "ckpt", "pkl", "pickle"))
REPLACEABLE = (CONFIG, WEIGHTS, NOTE)
MAX_PROBLEMS = 12
T = TypeVar("T")


def write_folder(
    target: str | Path,
    method: Method,
    params: Mapping[str, Tensor],
    base: Base,
    run: Mapping[str, Any] | None = None,
    dtype: str = "float32",
) -> Path:
    """Write an adapter as peft's folder plus trimtab.json and a card, in one step: a whole folder is there, or what was there before.

    Training-time aids are folded away first, and values rounded to dtype. AdapterError where values are not finite, do not fit the dtype,
    or the target holds other files, a README.md that trimtab did not write or that was edited among them.
    """
    method, params = method.export(params)
    sites = method.sites(base.spec)
    tensors = {file_key(s, t): params[s.key(t)].detach().to("cpu", torch.float32).contiguous() for s in sites for t in s.shapes}
    where = f"cannot save {target}"
    _refuse(where, value_problems(tensors, {}, base, edits=False), fix="train again from the last good checkpoint")
    tensors = _rounded(tensors, dtype, where)
    config = config_from_method(method, sites, base.spec, base.name or (str(base.path) if base.path else None))
    files = {
        CONFIG: json.dumps(dict(sorted(config.items())), indent=2).encode() + b"\n",
        WEIGHTS: format_tensors(tensors, metadata={"format": "pt"}),
    }
    note = make_note(method, base, {name: _digest(data) for name, data in files.items()}, run)
    files[NOTE] = json.dumps(note, indent=2, allow_nan=False).encode() + b"\n"
    files[CARD] = make_card(method, note, sites, len(files[WEIGHTS]))
    replaceable = (*REPLACEABLE, CARD) if is_untouched(Path(target) / CARD) else REPLACEABLE
    with staged(target, may_replace=replaceable) as work:
        for name, data in files.items():
            (work / name).write_bytes(data)
    return Path(target)


def _rounded(tensors: Mapping[str, Tensor], dtype: str, where: str) -> dict[str, Tensor]:
    if dtype not in DTYPES:
        raise ConfigError(f"{where}: dtype = {dtype!r}{nearest(dtype, DTYPES)}", fix=f"one of {', '.join(DTYPES)}")
    rounded = {name: t.to(DTYPES[dtype]) for name, t in tensors.items()}
    problems = [f"{name} has values that do not fit {dtype}" for name, t in rounded.items() if not bool(torch.isfinite(t).all())]
    problems += [f"{name} would be all zero in {dtype}" for name, t in rounded.items() if tensors[name].any() and not t.any()]
    _refuse(where, problems, fix="store it as float32 or bfloat16")
    return rounded


def read_folder(path: str | Path, base: Base) -> tuple[Method, dict[str, Tensor], dict[str, Any], bool]:
    """(method, tensors by `Site.key` in fp32 on the CPU, trimtab.json's content, whether that vouches for the folder on this base).

    AdapterError, with every finding, where anything is missing, left over, damaged, hostile, made for another base or not supported.
    """
    with open_folder(path) as folder:
        return read_opened(folder, base, f"adapter {str(path)!r}")


def read_opened(folder: Folder, base: Base, where: str) -> tuple[Method, dict[str, Tensor], dict[str, Any], bool]:
    """`read_folder` for a folder that is open, or that a store keeps as blobs. where: what errors call the adapter."""
    config, config_bytes, note = _read_json(folder, where)
    if note is not None:
        _refuse(
            f"{where} does not fit this base", fit_problems(note, base), fix="load it on the base, tokenizer and template of its training"
        )
    method = _method(config, note, base, where)
    sites = _sites(method, base, where)
    tensors, copies, digest = _read_tensors(folder, sites, base, where)
    if note is not None:
        _refuse(
            f"{where} is not what was saved", _damage(note, {CONFIG: _digest(config_bytes), WEIGHTS: digest}), fix="fetch or copy it anew"
        )
    _refuse(f"{where} is refused", value_problems(tensors, copies, base, edits=bool(sites[0].name)))
    params = {key: tensors[name].float() for name, (key, _) in expected(sites).items()}
    return method, params, note or {}, note is not None and recorded_fingerprint(note) == (base.fingerprint or None)


def survey(folder: Folder, where: str) -> tuple[dict[str, Any], dict[str, Any] | None, list[Entry]]:
    """(adapter_config.json, trimtab.json, the weights' entries) of an adapter whose base is not at hand, checked as far as that goes.

    AdapterError, with every finding, where no base would accept it: damaged or hostile files, other methods, values that are not finite.
    """
    config, config_bytes, note = _read_json(folder, where)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in METHODS:
        fix = f"methods there are: {', '.join(METHODS)}"
        raise AdapterError(f"{where}: peft_type = {str(kind)[:80]!r} is not a method that trimtab has", fix=fix)
    if note is not None and _noted_method(note, where).peft_type != kind:
        raise AdapterError(f"{where}: adapter_config.json and trimtab.json describe different adapters", fix="fetch or copy it anew")

    def read() -> tuple[list[Entry], bytes]:
        with folder.open(WEIGHTS) as (file, size):
            entries, head = read_header(file, size, WEIGHTS)
            return entries, head + read_exactly(file, _data_bytes(entries), WEIGHTS)

    entries, data = _collected(read, where)
    if note is not None:
        found = {CONFIG: _digest(config_bytes), WEIGHTS: _digest(data)}
        _refuse(f"{where} is not what was saved", _damage(note, found), fix="fetch or copy it anew")
    tensors = parse_tensors(data)
    problems = [f"{n} has values that are not finite" for n, t in tensors.items() if not bool(torch.isfinite(t).all())]
    if any(name.startswith(PREFIX) for name in tensors) and not any(bool(t.any()) for t in tensors.values()):
        problems.append(f"all {len(tensors)} tensors are zero: the adapter does nothing")
    _refuse(f"{where} is refused", problems)
    return config, note, entries


def _read_json(folder: Folder, where: str) -> tuple[dict[str, Any], bytes, dict[str, Any] | None]:
    names, problems = set(folder.names()), []
    pickles = sorted(names & set(PICKLES))
    problems += [f"{n} is a pickle, which can run code when it is read; it never is here" for n in pickles]
    problems += [f"{n} is missing" for n in (CONFIG, WEIGHTS) if n not in names]
    found: dict[str, tuple[dict[str, Any], bytes]] = {}
    for name in (CONFIG, NOTE):
        if name in names:
            try:
                found[name] = folder.read_json(name)
            except (Refusal, OSError) as error:
                problems.append(str(error))
    if CONFIG in found and found[CONFIG][0].get("peft_type") is None and "config" in found[CONFIG][0]:
        problems = []  # AdapterHub's: its weights have another name too, and one reason is enough
    fix = (
        "convert the weights to safetensors where they were made, and remove the pickle"
        if pickles
        else "a folder as peft's save_pretrained writes it is needed"
    )
    _refuse(f"{where} is refused", problems, fix=fix)
    return *found[CONFIG], found[NOTE][0] if NOTE in found else None


def _method(config: Mapping[str, Any], note: Mapping[str, Any] | None, base: Base, where: str) -> Method:
    """The note's method where there is one, and then the config must describe the same one: other programs read only the config."""
    described = method_from_config(config, base.spec, where)
    if note is None:
        return described
    method = _noted_method(note, where)
    same = described.peft_type == method.peft_type and _sites(described, base, where) == _sites(method, base, where)
    # where peft has the method, its other spellings of one thing are seen at the sites; else the config holds the very fields
    if not same or not (method.in_peft or described == method):
        raise AdapterError(f"{where}: adapter_config.json and trimtab.json describe different adapters", fix="fetch or copy it anew")
    return method


def _noted_method(note: Mapping[str, Any], where: str) -> Method:
    try:
        return method_of(note, where)
    except ConfigError as error:
        raise AdapterError(error.message, problems=error.problems, fix=error.fix) from error


def _sites(method: Method, base: Base, where: str) -> list[Site]:
    try:
        sites = method.sites(base.spec)
    except ConfigError as error:
        raise AdapterError(f"{where} does not fit this base: {error.message}", problems=error.problems, fix=error.fix) from error
    if not sites:
        raise AdapterError(f"{where} touches no module of this base")
    return sites


def _read_tensors(folder: Folder, sites: list[Site], base: Base, where: str) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """(tensors by name in the file, those that are the base's own, the file's digest)."""

    def read() -> tuple[dict[str, Tensor], dict[str, str], str]:
        with folder.open(WEIGHTS) as (file, size):
            entries, head = read_header(file, size, WEIGHTS)
            copies = copies_of_base(entries, sites, base)
            _refuse(
                f"{where} is refused", layout_problems(entries, sites, copies), fix="check that config, weights and base belong together"
            )
            data = head + read_exactly(file, _data_bytes(entries), WEIGHTS)
        return parse_tensors(data), copies, _digest(data)

    return _collected(read, where)


def _data_bytes(entries: list[Entry]) -> int:
    return max((e.stop for e in entries), default=0)


def _damage(note: Mapping[str, Any], files: Mapping[str, str]) -> list[str]:
    recorded = note.get("files")
    if not isinstance(recorded, dict):
        return [f"{NOTE} records no digests"]
    return [f"{name} has {found}; {NOTE} records {recorded.get(name)}" for name, found in files.items() if recorded.get(name) != found]


def _collected(read: Callable[[], T], where: str) -> T:
    try:
        return read()
    except Refusal as error:
        problems = str(error).splitlines()
    except OSError as error:
        problems = [f"{WEIGHTS} cannot be read: {error.strerror}"]
    _refuse(f"{where} is refused", problems)
    raise AssertionError("not reached")


def _refuse(message: str, problems: list[str], *, fix: str = "") -> None:
    if problems:
        shown = problems[:MAX_PROBLEMS] + ([f"… and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else [])
        raise AdapterError(message, problems=shown, fix=fix)


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
