"""Hosts: what stands in for a module's forward and asks the batch at hand which edits touch it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.func import functional_call

from trimtab.forward.batch import Batch

if TYPE_CHECKING:
    from trimtab.forward.attached import Attached


class Around:
    """A module of the base as an edit sees it (`methods.base.Around`): `call` runs it, or it with the edits before this one."""

    def __init__(self, module: Any, site: int, call: Callable[[Tensor], Tensor], original: Callable[[Tensor], Tensor]):
        self.module, self.site, self._call, self._original = module, site, call, original

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

    def with_parameters(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The module alone, computed with these parameters in place of its own."""
        return functional_call(_Original(self.module, self._original), {f"module.{k}": v for k, v in parameters.items()}, (x,))

    @property
    def weight_OI(self) -> Tensor:
        return weight_OI(self.module)

    @property
    def bias_O(self) -> Tensor | None:
        return getattr(self.module, "bias", None)


class _Original(nn.Module):
    """A module under its own forward: calling the module itself would reach the host that stands in for it, and never end."""

    def __init__(self, module: nn.Module, original: Callable[[Tensor], Tensor]):
        super().__init__()
        self.module, self.original = module, original

    def forward(self, x: Tensor) -> Tensor:
        return self.original(x)


def weight_OI(module: Any) -> Tensor:
    """A module's weight as (out, in): transformers' Conv1D keeps (in, out). Embeddings keep (V, H)."""
    return module.weight.T if type(module).__name__ == "Conv1D" else module.weight


class Host:
    """Stands in for one module's forward."""

    of_trimtab = True  # see `replica.altered`

    def __init__(self, attached: Attached, name: str, module: Any, index: int):
        self.attached, self.name, self.module, self.index, self.original = attached, name, module, index, module.forward

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        batch = self.attached.batch
        groups = batch.mix.groups.get(self.name) if batch is not None else None
        if batch is None or not groups:
            return self.original(x, *args, **kwargs)
        original = partial(self.original, *args, **kwargs) if args or kwargs else self.original
        leading = x.shape[:-1] if x.is_floating_point() else x.shape  # [1, T, I]; [T, I] inside an edited block; [1, T] token ids
        y_TO = self.edited(x.flatten(0, -2) if x.is_floating_point() else x.flatten(), batch, original)
        return y_TO.view(*leading, y_TO.shape[-1])

    def edited(self, x_TI: Tensor, batch: Batch, original: Callable[[Tensor], Tensor]) -> Tensor:
        """The module on flat rows with the edits of the batch around it; original: how to run the module itself."""
        around = Around(self.module, self.index, original, original)
        for group in batch.mix.groups[self.name]:
            rows = batch.rows(group.members)
            if rows is not None:
                around = Around(self.module, self.index, partial(group.kernel, base=around, packs=group.packs, rows=rows), original)
        return around(x_TI)
