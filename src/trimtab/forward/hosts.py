"""Hosts: objects that replace a module's forward, and ask which edits of the thread's batch act on the module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from threading import local
from types import MethodType
from typing import Any

from torch import Tensor

from trimtab.bases.weights import Weight
from trimtab.errors import BaseError
from trimtab.forward.batch import Batch
from trimtab.forward.packs import Group


class AtHand(local):
    """The batch that one base runs on the calling thread. Hosts ask for it, because the models call the modules that they stand in for with
    hidden states alone; everything else is given its batch."""

    batch: Batch | None = None

    @contextmanager
    def running(self, batch: Batch) -> Iterator[None]:
        """This batch is at hand on this thread, and afterwards the one that was."""
        previous, self.batch = self.batch, batch
        try:
            yield
        finally:
            self.batch = previous


class Around:
    """A module of the base as an edit sees it (`methods.base.Around`): `call` runs it, or it with the edits before this one.

    matrix: the module's weight, None where it has none (a norm, an MLP).
    """

    def __init__(
        self, module: Any, matrix: Weight | None, site: int, call: Callable[[Tensor], Tensor], original: Callable[[Tensor], Tensor]
    ):
        self.module, self.matrix, self.site, self._call, self._original = module, matrix, site, call, original

    def __call__(self, x: Tensor) -> Tensor:
        return self._call(x)

    @property
    def plain(self) -> bool:
        """Whether calling this runs the frozen module alone, no other edit before it."""
        return self._call is self._original

    @property
    def row_scale(self) -> Tensor | float:
        """What an embedding multiplies its rows with (Gemma 3 does), so that an addition to the weight is scaled as the weight is."""
        return getattr(self.module, "embed_scale", 1.0)

    def with_parameters(self, parameters: Mapping[str, Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module alone, computed with these parameters in place of its own. They are put into a copy of the module, because other
        threads may run the module itself meanwhile."""
        alone = copy(self.module)
        vars(alone)["_parameters"] = {**self.module._parameters, **parameters}
        forward = self.module.forward
        own = forward.method if isinstance(forward, Host) else forward
        return own.__func__(alone, x, *args, **kwargs)

    @property
    def bias_O(self) -> Tensor | None:
        return getattr(self.module, "bias", None)


def called(forward: Callable[..., Any], others: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[Tensor], Any]:
    """A module's forward on other rows, with what its model gives it behind them."""
    return (lambda x: forward(x, *others, **kwargs)) if others or kwargs else forward


class Host:
    """Stands in for one module's forward.

    block: whether it is a part of a layer, which runs on rows in the shape in which they came, and not a leaf, which runs on flat rows.
    written: whether others write into its result, which autograd refuses where it is a view.
    """

    of_trimtab = True  # see `replica.altered`

    def __init__(
        self, at_hand: AtHand, name: str, module: Any, matrix: Weight | None, index: int, *, block: bool = False, written: bool = False
    ):
        self.at_hand, self.name, self.module, self.matrix, self.index = at_hand, name, module, matrix, index
        self.block, self.written = block, written
        self.original = module.forward

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        batch = self.at_hand.batch
        groups = batch.mix.groups.get(self.name) if batch is not None else None
        if batch is None or not groups:
            return self.original(x, *args, **kwargs)
        original = called(self.original, args, kwargs)
        leading = x.shape[:-1] if x.is_floating_point() else x.shape  # [1, T, I]; [T, I] inside an edited block; [1, T] token ids
        others: list[Any] = []  # what a block gives beside its result, as some with experts do

        def in_its_shape(x_TI: Tensor) -> Tensor:
            y = original(x_TI.view(*leading, x_TI.shape[-1]))
            y, *others[:] = y if isinstance(y, tuple) else (y,)
            return y.flatten(0, -2)

        y_TO = self.edited(x.flatten(0, -2) if x.is_floating_point() else x.flatten(), batch, in_its_shape if self.block else original)
        y = y_TO.view(*leading, y_TO.shape[-1])
        if self.written and y.requires_grad:
            y = y.clone()
        return (y, *others) if others else y

    @property
    def method(self) -> MethodType:
        """The module's forward before it got a host, which can be bound to another module. BaseError where it is no method."""
        if not isinstance(self.original, MethodType):
            raise BaseError(
                f"{self.name} has a forward of its own, which cannot run with an adapter's copy of the module's parameters",
                fix="take the module out of modules_to_save, or load a copy of the base whose modules nobody has changed",
            )
        return self.original

    def edited(self, x_TI: Tensor, batch: Batch, original: Callable[[Tensor], Tensor], groups: Sequence[Group] | None = None) -> Tensor:
        """The module on flat rows with the edits of the batch around it, or with those of some groups. original: how to run the module
        itself."""
        around = Around(self.module, self.matrix, self.index, original, original)
        for group in batch.mix.groups[self.name] if groups is None else groups:
            rows = batch.rows(group.members)
            if rows is not None:
                call = partial(group.kernel, base=around, packs=group.packs, rows=rows)
                around = Around(self.module, self.matrix, self.index, call, original)
        return around(x_TI)
