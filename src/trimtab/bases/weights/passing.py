"""A parameter in float32 whose values are in memory only while somebody holds it. `bases/by_layer.py` makes models of such parameters."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from trimtab.bases.weights.base import Weight
from trimtab.memory import release_mapped

_NOTHING = torch.zeros((), dtype=torch.float32)


class Passing(nn.Parameter):
    """Values of `source`, a tensor or a matrix in whatever format. At rest it is zeros that take one number's memory. What is read of the
    source leaves the process's memory again where it is mapped from a file."""

    source: Tensor | Weight
    _holders: int

    @classmethod
    def of(cls, source: Tensor | Weight) -> Self:
        made = cls(_NOTHING.expand(source.shape), requires_grad=False)
        made.source, made._holders = source, 0
        return made

    def hold(self) -> None:
        """Make the values, if nobody holds them yet."""
        if self._holders == 0:
            self.data = self.values()
        self._holders += 1

    def let_go(self) -> None:
        """Let the values go, if nobody else holds them."""
        self._holders -= 1
        if self._holders == 0:
            self.data = _NOTHING.expand(self.shape)
            self._release()

    def values(self) -> Tensor:
        """The values, held or not."""
        if self._holders:
            return self.data
        stored = self.source.dense() if isinstance(self.source, Weight) else self.source.detach()
        made = stored.to("cpu", torch.float32)
        if made.data_ptr() != stored.data_ptr():
            self._release()
        return made

    def _release(self) -> None:
        if isinstance(self.source, Tensor):
            release_mapped(self.source.data_ptr(), self.source.nbytes)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """A parameter like any other, for whoever will write to it."""
        return nn.Parameter(self.values().clone(), self.requires_grad)
