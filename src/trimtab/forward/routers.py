"""Routers of experts under adapters: what stands in for the forward of a module that chooses experts for each row.

A router gives several results (logits, weights, the numbers of experts), which are no sums of a base's part and an adapter's. So an edit
gives it other parameters, and the rows of each adapter run through it by themselves. Before an adapter may act there, `row_by_row` shows
that a router treats each row alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trimtab.bases.weights.dense import Dense
from trimtab.errors import BaseError
from trimtab.forward.hosts import Around, AtHand, Host, called
from trimtab.memory import ran_out


class RouterHost(Host):
    """Stands in for the forward of one router. Its matrix is dense in every base: packing leaves routers as they are."""

    def __init__(self, at_hand: AtHand, name: str, module: Any, index: int):
        super().__init__(at_hand, name, module, Dense(module), index)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        batch = self.at_hand.batch
        groups = batch.mix.groups.get(self.name) if batch is not None else None
        if batch is None or not groups:
            return self.original(x, *args, **kwargs)
        if x.shape[:-1].numel() != batch.total:
            raise BaseError(
                f"{self.name} is called with {x.shape[:-1].numel()} rows of the {batch.total} of a batch: adapters cannot act there"
            )
        around = Around(self.module, self.matrix, self.index, self.original, self.original)
        parts: list[tuple[int, int, Callable[[Tensor], Any]]] = []
        for group in groups:
            rows = batch.rows(group.members)
            for span in rows.spans if rows is not None else ():
                changed = partial(around.with_parameters, group.packs.items[span.slot].tensors)
                parts.append((span.start, span.stop, called(changed, args, kwargs)))
        return in_parts(x, parts, called(self.original, args, kwargs))


def in_parts(x: Tensor, parts: Sequence[tuple[int, int, Callable[[Tensor], Any]]], otherwise: Callable[[Tensor], Any]) -> Any:
    """What a router gives for all rows of x, where each part (first row, the one after its last, how to run it) is run by itself, and the
    rows between them by `otherwise`."""
    found, at, last = [], 0, x.shape[:-1].numel()
    for start, stop, run in [*sorted(parts, key=lambda p: p[0]), (last, last, otherwise)]:
        if start > at:
            found.append(otherwise(x[..., at:start, :]))
        if stop > start:
            found.append(run(x[..., start:stop, :]))
        at = stop
    if len(found) == 1:
        return found[0]
    if isinstance(found[0], Tensor):
        return torch.cat(found, -2)
    return type(found[0])(torch.cat(each, -2) for each in zip(*found, strict=True))


@torch.no_grad()
def row_by_row(router: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a router gives the same for rows alone as for all of them. It is a stand-in, called as its model calls it."""
    x, *others = args
    forward = called(partial(type(router).forward, router), others, kwargs)
    try:
        whole, middle = forward(x), x.shape[-2] // 2
        cut = in_parts(x, [(middle, middle + 1, forward)], forward)
    except Exception as error:  # it is called otherwise: the base can be used, but for adapters on its routers
        if ran_out(error):
            raise
        return False
    pairs = [(whole, cut)] if isinstance(whole, Tensor) else zip(whole, cut, strict=True)
    return all(a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-6) for a, b in pairs)
