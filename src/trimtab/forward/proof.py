"""Proves a base before it is used: what trimtab computes of it is what its own class computes.

Both run on a small stand-in of the model in fp32. Two sequences of random tokens, one as the base has it and one with every module edited,
go through transformers' own forward one by one, and through the mixed forward together: at once, and in chunks through a KV cache. They are
longer than the stand-in's sliding window. What was read of the structure is checked on the way.

It does not see what begins only after more tokens than run here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trimtab.bases.spec import Spec
from trimtab.bases.structure import read_spec
from trimtab.errors import BaseError, TrimtabError
from trimtab.forward.attached import Attached
from trimtab.forward.batch import BASE, Batch, Piece, make_batch
from trimtab.forward.packs import Mix
from trimtab.forward.replica import FAR, apart, kind
from trimtab.forward.small import in_chunks, random_ids, small_model
from trimtab.memory import ran_out
from trimtab.methods.base import Site
from trimtab.methods.ia3 import IA3Config

CHUNKS = ((7, 6, 1), (5, 1, 7))
"""How many tokens of each sequence enter in each of three forwards; the stand-in's window is 8."""
MEMBERS = (BASE, 0)
"""The first sequence is the base's, the second is edited."""
SHOWN = 8

_proved: set[Hashable] = set()


def prove(model: Any) -> None:
    """BaseError, with what differs, where trimtab does not compute what this model's class computes. Models that are built alike are
    compared once in a process."""
    spec, config = read_spec(model), model.config.to_dict()
    known = type(model), kind(model), str({k: v for k, v in config.items() if k not in ("dtype", "_name_or_path")})
    if known not in _proved:
        if problems := _problems(model, spec):
            raise BaseError(
                f"trimtab does not compute this {spec.model_type} base as transformers does",
                problems=problems,
                fix="use another base, or a version of transformers that trimtab is tested with (`trimtab doctor` says whether yours is)",
            )
        _proved.add(known)


@torch.no_grad()
def _problems(model: Any, spec: Spec) -> list[str]:
    """What differs. Where edits alone make a difference, each module is tried by itself."""
    small = partial(small_model, model, spec, torch.float32)
    try:
        one = small()
        sites = _sites(read_spec(one))
        problems = _differences(one, sites)
        if problems and not _differences(small(), {}):
            problems = [p for site, width in sites.items() for p in _differences(small(), {site: width})] or problems
    except TrimtabError:
        raise
    except Exception as error:  # a model may fail in as many ways as it is unlike others
        if ran_out(error):
            raise
        return [f"{type(error).__name__}: {error}"]
    return problems[:SHOWN]


def _sites(spec: Spec) -> dict[str, int]:
    """The modules that an adapter may act on, and how many features each gives."""
    rows = {m.name: m.out_features for m in spec.modules.values() if m.kind != "experts" and m.vectors == 1}
    return rows | dict.fromkeys(spec.mlps, spec.hidden_size)


def _differences(small: Any, sites: Mapping[str, int]) -> list[str]:
    """Where a small model is not what its spec says; else where its mixed forward, edited at these sites, is apart from transformers' own.
    The model is attached."""
    spec, ids = read_spec(small), [row.to(small.device) for row in random_ids([sum(chunk) for chunk in CHUNKS])]
    gains = {s: 0.3 * torch.randn(n, generator=torch.Generator().manual_seed(i)).to(small.device) for i, (s, n) in enumerate(sites.items())}
    modules = [m.name for m in spec.modules.values() if m.kind != "experts"]
    results: dict[str, list[Any]] = {name: [] for name in [*modules, *spec.mlps, *(layer.attention for layer in spec.layers)]}
    with _through(small, {name: partial(_kept, kept) for name, kept in results.items()}):
        wanted = [small(input_ids=ids[0][None], use_cache=False).logits[0]]
    if misread := _misread(spec, results, len(ids[0])):
        return misread
    with _through(small, {site: partial(_scaled, gain) for site, gain in gains.items()}):
        wanted.append(small(input_ids=ids[1][None], use_cache=False).logits[0])
    found = _mixed(Attached(small, fast=False), ids, gains)
    edited = f"with {next(iter(sites)) if len(sites) == 1 else 'its modules'} edited"
    return [
        f"a sequence {what}, {way}: logits are off by {off:.2g} of their size"
        for way, rows in found.items()
        for what, got, want in zip((f"of the base beside one {edited}", edited), rows, wanted, strict=True)
        if not (off := apart(got, want)) <= FAR[torch.float32]
    ]


def _misread(spec: Spec, results: Mapping[str, list[Any]], tokens: int) -> list[str]:
    """What modules did otherwise than the spec says: each is called once, for every token's row, and what an attention's output projection
    gives is the attention's result."""
    problems = []
    for name in [*spec.modules, *spec.mlps]:
        if name in results:
            rows = [r.shape[:-1].numel() if isinstance(r, Tensor) else 0 for r in results[name]]
            expected = tokens * (spec.modules[name].vectors if name in spec.modules else 1)
            if rows != [expected]:
                problems.append(f"{name} gives {rows} rows of {tokens} tokens, where [{expected}] were expected")
    for layer in spec.layers if not problems else ():
        result = results[layer.attention][0]
        if not torch.equal(result if isinstance(result, Tensor) else result[0], results[layer.attention_output][0]):
            problems.append(f"{layer.attention} changes what {layer.attention_output} gives")
    return problems


def _mixed(attached: Attached, ids: Sequence[Tensor], gains: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """Logits of both sequences in one batch, each module of the second scaled by 1 + its gain: in words how -> for each sequence."""
    scales = {f"{site}.ia3_l": (1 + gain)[:, None] for site, gain in gains.items()}
    sites = [Site(site, {"ia3_l": (len(gain), 1)}) for site, gain in gains.items()]
    mix = Mix([attached.pack(IA3Config(), scales, sites)])

    def logits(batch: Batch) -> Tensor:
        return attached.head(attached.forward_plain(batch), batch, range(batch.total))

    pieces = [Piece(row, member) for row, member in zip(ids, MEMBERS, strict=True)]
    batch = make_batch(pieces, mix, device=attached.device, max_positions=attached.spec.max_positions)
    at_once = logits(batch)
    return {
        "at once": [at_once[a:b] for a, b in batch.where],
        "in chunks through a KV cache": in_chunks(attached, logits, ids, CHUNKS, mix, MEMBERS),
    }


def _kept(results: list[Any], result: Any) -> Any:
    results.append(result)
    return result


def _scaled(gain: Tensor, result: Tensor) -> Tensor:
    return result * (1 + gain)


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
