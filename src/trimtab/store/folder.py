"""Reads an adapter folder: peft's two files and `trimtab.json`. `save` writes one.

Reading checks the cheap things first: the JSON files, the base that they were made for, the config against the base, the header against the
config, and at the end the tensors' values. Each step reports everything that is wrong in it. What this base lacks or what is not read is a
warning: it is logged, and in `Read.warnings`.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from trimtab.errors import AdapterError, ConfigError, first_of
from trimtab.methods import METHODS, Head, Method
from trimtab.methods.base import Site
from trimtab.store.config_read import method_from_config
from trimtab.store.contents import TYPES, Contents, read_contents
from trimtab.store.files import AdapterFolder, Refusal, digest_of, read_exactly
from trimtab.store.header import Entry, read_header
from trimtab.store.heads import differs, head_in, leftovers, without_head
from trimtab.store.keys import renaming, todays_names
from trimtab.store.note import fit_problems, head_of, method_of, other_base, recorded_fingerprint
from trimtab.store.tensors import PREFIX, as_peft_has, copies_of_base, expected, layout_problems, value_problems

if TYPE_CHECKING:
    from torch import Tensor

    from trimtab.model import Base

CONFIG, WEIGHTS, NOTE = "adapter_config.json", "adapter_model.safetensors", "trimtab.json"
PICKLES = tuple(f"adapter_model.{ending}" for ending in ("bin", "pt", "pth", "ckpt", "pkl", "pickle"))
SHARD = re.compile(r"adapter_model-\d+-of-\d+\.(safetensors|bin)|adapter_model\.(safetensors|bin)\.index\.json")
REPLACEABLE = (CONFIG, WEIGHTS, NOTE)
MAX_PROBLEMS = 12
PIECE_BYTES = 2**24
T = TypeVar("T")
log = logging.getLogger(__name__)


class Read(NamedTuple):
    """An adapter as its folder holds it. params: by `Site.key`, fp32, on the CPU. info: trimtab.json's content. verified: whether that
    vouches for the folder on this base. warnings: what the folder says and what was left out, one line each. head: its own head, whose
    tensors are among params."""

    method: Method
    params: dict[str, Tensor]
    info: dict[str, Any]
    verified: bool
    warnings: tuple[str, ...]
    head: Head | None = None


def read_opened(folder: AdapterFolder, base: Base, where: str) -> Read:
    """Read an adapter's folder that is open, or that a store keeps as blobs. where: what errors call the adapter.

    AdapterError, with every finding, if anything is missing, left over, damaged, hostile, made for another base or not supported.
    """
    said = _said(folder, base, where)
    contents, copies, renamed = _read_tensors(folder, said, base, where)
    if said.note is not None:
        damage = _damage(said.note, {CONFIG: digest_of(said.config_bytes), WEIGHTS: contents.digest})
        refuse(f"{where} is not what was saved", damage, fix="fetch or copy it anew")
    refuse(f"{where} is refused", value_problems(contents.tensors, copies, base, edits=bool(said.sites[0].name), runs=contents.runs))
    params = {key: contents.tensors[name].float() for name, (key, _) in expected(said.sites).items()}
    warnings = (*said.warnings, *renamed)
    for warning in warnings:
        log.warning("%s: %s", where, warning)
    recorded = recorded_fingerprint(said.note) if said.note is not None else None
    verified = bool(recorded) and recorded == base.fingerprint
    return Read(said.method, params, said.note or {}, verified, warnings, said.head)


def check_layout(folder: AdapterFolder, base: Base, where: str) -> None:
    """Refuse all that can be refused before a tensor is read: by the JSON files, and by the header's names, shapes and sizes on this base.

    AdapterError, with every finding. What passes is no larger than an adapter on this base can be, so that it may be hashed or copied.
    """
    said = _said(folder, base, where)

    def read() -> None:
        with folder.open(WEIGHTS) as (file, size):
            _layout(read_header(file, size, WEIGHTS)[0], said, base, where)

    _collected(read, where)


class _Said(NamedTuple):
    """What the JSON files say of an adapter on this base."""

    method: Method
    sites: list[Site]
    note: dict[str, Any] | None
    config_bytes: bytes
    warnings: tuple[str, ...]
    head: Head | None


def _said(folder: AdapterFolder, base: Base, where: str) -> _Said:
    config, config_bytes, note, warnings = _read_json(folder, where)
    if note is not None:
        fix = "load it on the base, tokenizer and template of its training; --base-differs (base_differs=True) takes it on another base, "
        fix += "such as the same one in another precision"
        refuse(f"{where} does not fit this base", fit_problems(note, base), fix=fix)
        warnings += other_base(note, base)
    head = _collected(lambda: head_in(config, folder, WEIGHTS, where), where) if note is None else head_of(note, where)
    if note is not None and differs(config, head):
        raise _contradiction(where)
    method, strange = _method(without_head(config) if head else config, note, base, where)
    sites = _sites(method, base, where) + ([head.site(base.spec)] if head else [])
    return _Said(method, sites, note, config_bytes, (*warnings, *strange), head)


def own_head(folder: AdapterFolder, where: str) -> Head | None:
    """The head of an adapter by its small files alone; None where it has none. AdapterError if they are missing, damaged or hostile."""
    config, _, note, _ = _read_json(folder, where)
    return _collected(lambda: head_in(config, folder, WEIGHTS, where), where) if note is None else head_of(note, where)


def survey(folder: AdapterFolder, where: str) -> tuple[dict[str, Any], dict[str, Any] | None, list[Entry]]:
    """(adapter_config.json, trimtab.json, the weights' entries) of an adapter whose base is not at hand, checked as far as that goes.

    AdapterError, with every finding, if no base would accept it: damaged or hostile files, other methods, values that are not finite.
    """
    config, config_bytes, note, _ = _read_json(folder, where)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in METHODS:
        fix = f"methods there are: {', '.join(METHODS)}"
        raise AdapterError(f"{where}: peft_type = {str(kind)[:80]!r} is not a method that trimtab has", fix=fix)
    if note is not None and (_noted_method(note, where).peft_type != kind or differs(config, head_of(note, where))):
        raise _contradiction(where)

    entries, digest, odd, zero = _collected(lambda: _look_at_values(folder), where)
    if note is not None:
        refuse(
            f"{where} is not what was saved", _damage(note, {CONFIG: digest_of(config_bytes), WEIGHTS: digest}), fix="fetch or copy it anew"
        )
    names = _collected(lambda: todays_names(e.name for e in entries), where).values()
    problems = [f"{n} has values that are not finite" for n in odd]
    if zero and any(name.startswith(PREFIX) for name in names):
        problems.append(f"all {len(entries)} tensors are zero: the adapter does nothing")
    refuse(f"{where} is refused", problems)
    return config, note, entries


def _look_at_values(folder: AdapterFolder) -> tuple[list[Entry], str, list[str], bool]:
    """(entries, the file's digest, tensors that are not finite, whether all are zero); no more than a piece of a tensor is in memory."""
    import torch

    with folder.open(WEIGHTS) as (file, size):
        entries, head = read_header(file, size, WEIGHTS)
        sha, odd, zero = hashlib.sha256(head), dict[str, None](), True
        for entry in sorted(entries, key=lambda e: e.start):
            for start in range(entry.start, entry.stop, PIECE_BYTES):
                piece = read_exactly(file, min(PIECE_BYTES, entry.stop - start), WEIGHTS)
                sha.update(piece)
                values = torch.frombuffer(bytearray(piece), dtype=getattr(torch, TYPES[entry.dtype]))
                if not bool(torch.isfinite(values).all()):
                    odd[entry.name] = None
                zero = zero and not bool(values.any())
    return entries, f"sha256:{sha.hexdigest()}", list(odd), zero


def _read_json(folder: AdapterFolder, where: str) -> tuple[dict[str, Any], bytes, dict[str, Any] | None, list[str]]:
    """(adapter_config.json, its bytes, trimtab.json, warnings)."""
    names, problems, warnings = set(folder.names()), [], []
    pickles = sorted(names & set(PICKLES))
    if WEIGHTS in names:
        warnings = [f"{n} is a pickle and is not read; {WEIGHTS} beside it is" for n in pickles]
    else:
        problems += [f"{n} is a pickle, which can run code when it is read; it never is here" for n in pickles]
        problems += [f"{n} is part of an adapter in shards: write them into one {WEIGHTS}" for n in sorted(names) if SHARD.fullmatch(n)]
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
        if pickles and WEIGHTS not in names
        else "a folder as peft's save_pretrained writes it is needed"
    )
    refuse(f"{where} is refused", problems, fix=fix)
    return *found[CONFIG], found[NOTE][0] if NOTE in found else None, warnings


def _method(config: Mapping[str, Any], note: Mapping[str, Any] | None, base: Base, where: str) -> tuple[Method, list[str]]:
    """The note's method where there is one, and then the config must describe the same one: other programs read only the config. With it,
    warnings."""
    described, warnings = method_from_config(config, base.spec, where)
    if note is None:
        return described, warnings
    method = _noted_method(note, where)
    if described == method:
        return method, warnings
    same = described.peft_type == method.peft_type and _sites(described, base, where) == _sites(method, base, where)
    # where peft has the method, its other spellings of one thing are seen at the sites; else the config holds the very fields
    if not same or not method.in_peft:
        raise _contradiction(where)
    return method, warnings


def _contradiction(where: str) -> AdapterError:
    return AdapterError(f"{where}: adapter_config.json and trimtab.json describe different adapters", fix="fetch or copy it anew")


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


def _read_tensors(folder: AdapterFolder, said: _Said, base: Base, where: str) -> tuple[Contents, dict[str, str], list[str]]:
    """(tensors by today's names, those that are the base's own, a warning where names were others)."""

    def read() -> tuple[Contents, dict[str, str], list[str]]:
        with folder.open_unhashed(WEIGHTS) as (file, size):
            entries, head = read_header(file, size, WEIGHTS)
            names, copies = _layout(entries, said, base, where)
            found = read_contents(folder, WEIGHTS, file, entries, head)
        return found._replace(tensors={names[n]: t for n, t in found.tensors.items()}), copies, renaming(names)

    return _collected(read, where)


def _layout(entries: list[Entry], said: _Said, base: Base, where: str) -> tuple[dict[str, str], dict[str, str]]:
    """(names in the file -> today's, those that are the base's own). In a folder of ours no name is other than today's."""
    names = {e.name: e.name for e in entries}
    if said.note is None:
        names = {old: as_peft_has(new, said.sites) for old, new in todays_names(names, base.spec).items()}
    entries = [e if names[e.name] == e.name else replace(e, name=names[e.name]) for e in entries]
    unread = leftovers(entries, said.head)
    entries = [e for e in entries if e.name not in unread]
    copies = copies_of_base(entries, said.sites, base)
    problems = layout_problems(entries, said.sites, copies)
    refuse(f"{where} is refused", problems, fix="check that config, weights and base belong together")
    return names, copies


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
    refuse(f"{where} is refused", problems)
    raise AssertionError("not reached")


def refuse(message: str, problems: list[str], *, fix: str = "") -> None:
    if problems:
        raise AdapterError(message, problems=first_of(problems, MAX_PROBLEMS), fix=fix)
