"""Proves a base before it is used: what trimtab computes of it is what its own class computes.

Both run on a small stand-in of the model in fp32. Two sequences of random tokens, one as the base has it and one with every module edited,
go through transformers' own forward one by one, and through the mixed forward together: at once, and in chunks through a KV cache. They are
longer than the stand-in's sliding window. What was read of the structure is checked on the way.

It does not see what begins only after more tokens than run here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trimtab.bases.spec import Spec
from trimtab.bases.structure import read_spec
from trimtab.errors import BaseError, TrimtabError
from trimtab.forward.attached import Attached
from trimtab.forward.batch import BASE, Batch, Piece, make_batch
from trimtab.forward.experts import agrees
from trimtab.forward.packs import Mix
from trimtab.forward.replica import FAR, alike, apart, let_go
from trimtab.forward.routers import row_by_row
from trimtab.forward.small import TOKENS, in_chunks, random_ids, small_model
from trimtab.memory import ran_out, release_freed
from trimtab.methods.base import Site
from trimtab.methods.ia3 import IA3Config

CHUNKS = ((7, 6, 1), (5, 1, 7))
"""How many tokens of each sequence enter in each of three forwards; the stand-in's window is 8."""
TOKENS_RUN = sum(CHUNKS[0])
"""Of the first sequence."""
MEMBERS = (BASE, 0)
"""The first sequence is the base's, the second is edited."""
SHOWN = 8
CHOSEN = ("experts", "router")
"""Kinds of modules that are not edited as others are: what they give depends on a choice. Each has a comparison of its own."""

_proved: dict[Hashable, frozenset[str]] = {}
"""Models that were proved: the modules of each that are not run once for each token, as `_place` names them."""


def prove(model: Any) -> Spec:
    """The model's spec, where trimtab computes what its class computes; else BaseError, with what differs. Models that are built alike are
    compared once in a process on each device."""
    spec, known = read_spec(model), (alike(model), model.device)
    if known not in _proved:
        problems, others = _compare(model, spec)
        release_freed()
        if problems:
            raise BaseError(
                f"trimtab does not compute this {spec.model_type} base as transformers does",
                problems=problems,
                fix="use another base, or a version of transformers that trimtab is tested with (`trimtab doctor` says whether yours is)",
            )
        _proved[known] = others
    return _without(spec, _proved[known])


@torch.no_grad()
def _compare(model: Any, spec: Spec) -> tuple[list[str], frozenset[str]]:
    """What differs, and the places of modules that are not run once for each token. Where edits alone make a difference, each module is
    tried by itself."""
    small = partial(small_model, model, spec, torch.float32)
    try:
        one = small()
        whole = read_spec(one)
        results = _results(one, whole)
        read = _without(
            whole, frozenset(_place(n) for n in [*_elsewhere(whole, results), *_other_experts(one, whole), *_other_routers(one, whole)])
        )
        if problems := _misread(read, results):
            return problems[:SHOWN], frozenset()
        sites = _sites(read)
        problems = _differences(one, read, sites)
        if problems and not _differences(small(), read, {}):
            problems = [p for site, width in sites.items() for p in _differences(small(), read, {site: width})] or problems
    except TrimtabError:
        raise
    except Exception as error:  # a model may fail in as many ways as it is unlike others
        if ran_out(error):
            raise
        return [f"{type(error).__name__}: {error}"], frozenset()
    return problems[:SHOWN], frozenset(_place(m.name) for m in read.modules.values() if not m.vectors)


def _place(name: str) -> str:
    """A module's name without the numbers of lists: where it is in every layer."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _without(spec: Spec, places: frozenset[str]) -> Spec:
    """The spec, with the modules at these places as those that are not run once for each token."""
    modules = {n: replace(m, vectors=0) if _place(n) in places else m for n, m in spec.modules.items()}
    return replace(spec, modules=modules) if places else spec


def _sites(spec: Spec) -> dict[str, int]:
    """The modules that an adapter may act on, and how many features each gives."""
    rows = {m.name: m.out_features for m in spec.modules.values() if m.kind not in CHOSEN and m.vectors == 1}
    return rows | dict.fromkeys(spec.mlps, spec.hidden_size)


def _ids(small: Any) -> list[Tensor]:
    return [row.to(small.device) for row in random_ids([sum(chunk) for chunk in CHUNKS])]


def _results(small: Any, spec: Spec) -> dict[str, list[Any]]:
    """What modules and parts of layers give while the first sequence runs, a result for each call."""
    modules = [m.name for m in spec.modules.values() if m.kind not in CHOSEN]
    results: dict[str, list[Any]] = {name: [] for name in [*modules, *spec.mlps, *(layer.attention for layer in spec.layers)]}
    with _through(small, {name: partial(_kept, kept) for name, kept in results.items()}):
        small(input_ids=_ids(small)[0][None], use_cache=False)
    return results


def _differences(small: Any, spec: Spec, sites: Mapping[str, int]) -> list[str]:
    """Where a small model's mixed forward, edited at these sites, is apart from transformers' own. The model is attached. Positions are
    those of a sequence's first tokens, and then the last ones that the base has."""
    gains = {
        s: 0.3 * torch.randn(n, generator=torch.Generator().manual_seed(i), dtype=torch.float32).to(small.device)
        for i, (s, n) in enumerate(sites.items())
    }
    ids, wanted, far = _ids(small), list[Tensor](), spec.max_positions - TOKENS
    starts = (0, far) if far > 0 else (0,)
    for start in starts:
        for row, edits in zip(ids, ({}, gains), strict=True):
            with _through(small, {site: partial(_scaled, gain) for site, gain in edits.items()}):
                where = torch.arange(start, start + len(row), device=row.device)[None]
                wanted.append(small(input_ids=row[None], position_ids=where, use_cache=False).logits[0])
    found = _mixed(Attached(small, fast=False), ids, gains, starts)
    let_go(small)
    wanted += wanted[:2]  # what goes through a cache starts at 0 too
    edited = f"with {next(iter(sites)) if len(sites) == 1 else 'its modules'} edited"
    return [
        f"a sequence {what}, {way}: logits are off by {off:.2g} of their size"
        for i, (way, rows) in enumerate(found.items())
        for what, got, want in zip((f"of the base beside one {edited}", edited), rows, wanted[2 * i : 2 * i + 2], strict=True)
        if not (off := apart(got, want)) <= FAR[torch.float32]
    ]


def _elsewhere(spec: Spec, results: Mapping[str, list[Any]]) -> list[str]:
    """Modules beside the parts of a layer that are not called once with each token's row: routers, experts, norms of something else."""
    parts = {spec.embedding, spec.head, *spec.attention_outputs}
    return [n for n, m in spec.modules.items() if n in results and n not in parts and _rows(results[n]) != [m.vectors * TOKENS_RUN]]


def _other_experts(small: Any, spec: Spec) -> list[str]:
    """Parameters of experts whose module computes otherwise than `forward/experts.py`."""
    parameters = [m.name for m in spec.modules.values() if m.kind == "experts"]
    known = {at: agrees(small.get_submodule(at)) for at in {p.rpartition(".")[0] for p in parameters}}
    return [p for p in parameters if not known[p.rpartition(".")[0]]]


def _other_routers(small: Any, spec: Spec) -> list[str]:
    """Routers that do not treat each row by itself, or are not called once with all of them."""
    calls: dict[str, list[tuple[tuple, dict[str, Any]]]] = {m.name: [] for m in spec.modules.values() if m.kind == "router"}
    handles = [
        small.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, kept=kept: kept.append((args, kwargs)), with_kwargs=True
        )
        for name, kept in calls.items()
    ]
    try:
        if calls:
            small(input_ids=_ids(small)[0][None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name, kept in calls.items() if not (_once(kept) and row_by_row(small.get_submodule(name), *kept[0]))]


def _once(calls: Sequence[tuple[tuple, Mapping[str, Any]]]) -> bool:
    """Whether these are one call with the row of each token."""
    return len(calls) == 1 and bool(calls[0][0]) and calls[0][0][0].shape[:-1].numel() == TOKENS_RUN


def _rows(results: Sequence[Any]) -> list[int]:
    """How many rows each call of a module gave."""
    return [r.shape[:-1].numel() if isinstance(r, Tensor) else 0 for r in results]


def _first(result: Any) -> Any:
    """What a part of a layer gives: the first of several."""
    return result[0] if isinstance(result, tuple) else result


def _misread(spec: Spec, results: Mapping[str, list[Any]]) -> list[str]:
    """What modules did otherwise than the spec says: each is called once, for every token's row, and what an attention's output projection
    gives is the attention's result."""
    problems = []
    for name in [*(n for n, m in spec.modules.items() if m.vectors), *spec.mlps]:
        if name in results:
            expected = TOKENS_RUN * (spec.modules[name].vectors if name in spec.modules else 1)
            if (rows := _rows([r if name in spec.modules else _first(r) for r in results[name]])) != [expected]:
                problems.append(f"{name} gives {rows} rows of {TOKENS_RUN} tokens, where [{expected}] were expected")
    for layer in spec.layers if not problems else ():
        if not torch.equal(_first(results[layer.attention][0]), results[layer.attention_output][0]):
            problems.append(f"{layer.attention} changes what {layer.attention_output} gives")
    return problems


def _mixed(attached: Attached, ids: Sequence[Tensor], gains: Mapping[str, Tensor], starts: Sequence[int]) -> dict[str, list[Tensor]]:
    """Logits of both sequences in one batch, each module of the second scaled by 1 + its gain: in words how -> for each sequence. starts:
    the first position, for each time that they run at once."""
    scales = {f"{site}.ia3_l": (1 + gain)[:, None] for site, gain in gains.items()}
    sites = [Site(site, {"ia3_l": (len(gain), 1)}) for site, gain in gains.items()]
    mix = Mix([attached.pack(IA3Config(), scales, sites)])

    def logits(batch: Batch) -> Tensor:
        return attached.head(attached.forward_plain(batch), batch, range(batch.total))

    pieces = [Piece(row, member) for row, member in zip(ids, MEMBERS, strict=True)]
    found = {}
    for start in starts:
        batch = make_batch(pieces, mix, device=attached.device, max_positions=attached.spec.max_positions)
        at_once = logits(replace(batch, position_T=batch.position_T + start))
        found[f"at position {start:,}" if start else "at once"] = [at_once[a:b] for a, b in batch.where]
    return found | {"in chunks through a KV cache": in_chunks(attached, logits, ids, CHUNKS, mix, MEMBERS)}


def _kept(results: list[Any], result: Any) -> Any:
    results.append(result)
    return result


def _scaled(gain: Tensor, result: Any) -> Any:
    return (result[0] * (1 + gain), *result[1:]) if isinstance(result, tuple) else result * (1 + gain)


@contextmanager
def _through(small: Any, functions: Mapping[str, Callable[[Any], Any]]) -> Iterator[None]:
    """Modules' results go through these functions for as long as this lasts."""
    modules = [(small.get_submodule(name), then) for name, then in functions.items()]
    for module, then in modules:
        module.forward = partial(_then, module.forward, then)
    try:
        yield
    finally:
        for module, _ in modules:
            del module.forward


def _then(forward: Callable[..., Any], then: Callable[[Any], Any], *args: Any, **kwargs: Any) -> Any:
    return then(forward(*args, **kwargs))
