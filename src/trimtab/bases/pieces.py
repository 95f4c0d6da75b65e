"""Experts that files hold one by one: `…experts.7.gate_proj` and so on, each with a matrix of its own, where the model has one parameter
[E, O, I] for all.

transformers' tables say what becomes of what: the experts' matrices stand one after the other, and of several for each expert (gate, up)
one below the other. Where all are packed alike they stay packed, as one `PackedLinear` of E·O rows. Else each is dequantised into place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming, rename_source_key

from trimtab.bases.weights.experts import put_dense, put_experts
from trimtab.bases.weights.packed import KINDS, PackedLinear

_EXPERT = re.compile(r"\.([0-9]{1,100})\.")
"""A number in a module's name. Python makes none of more than 4,300 digits."""
SHOWN = 3


@dataclass
class Pieces:
    """Of one parameter of experts. patterns: of the names of an expert's matrices, from the upper one down. at: (expert, number of its
    pattern) -> what files call the module. twice: those that files have under two names, as with experts.3 and experts.03. strange: how
    transformers puts them together, where that is none of the ways above."""

    patterns: list[str]
    at: dict[tuple[int, int], str] = field(default_factory=dict)
    twice: dict[str, str] = field(default_factory=dict)
    strange: str = ""

    def add(self, expert: int, pattern: str, module: str) -> None:
        before = self.at.setdefault((expert, self.patterns.index(pattern)), module)
        if before != module:
            self.twice[module] = before

    @property
    def modules(self) -> set[str]:
        """What files call all of them."""
        return {*self.at.values(), *self.twice}

    def check(self, experts: int) -> None:
        """ValueError unless each of so many experts has its matrices, and no other one."""
        if self.strange:
            raise ValueError(f"its matrices are put together by {self.strange}, which packed ones are not")
        if self.twice:
            one, other = sorted(next(iter(self.twice.items())))
            raise ValueError(f"the files have one matrix twice, as {one} and as {other}")
        if beyond := sorted({e for e, _ in self.at if e >= experts}):
            raise ValueError(f"the files have expert {beyond[0]}, where the model has experts 0 to {experts - 1}")
        lacking = experts * len(self.patterns) - len(self.at)
        wanted = ((e, k) for e in range(experts) for k in range(len(self.patterns)))  # a config may name a billion
        if missing := list(islice((at for at in wanted if at not in self.at), SHOWN)):
            names = [f"expert {e}'s {self.patterns[k].split('*.')[-1].removesuffix('.weight')}" for e, k in missing]
            rest = f" and {lacking - SHOWN:,} more" if lacking > SHOWN else ""
            raise ValueError(f"the files have no {', '.join(names)}{rest}")


class Names:
    """What the model calls what its files name, by transformers' tables. renamed: patterns of names -> what stands in their place."""

    def __init__(self, model: Any, renamed: dict[str, str]):
        transforms = get_model_conversion_mapping(model, renamed or None)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._of_pattern = {p: c for c in self._converters for p in c.source_patterns}
        self._prefix, self._state = model.base_model_prefix, model.state_dict()

    def module(self, name: str) -> str:
        """A module's name in the model; for an expert's in the files, its parameter's."""
        return self._renamed(f"{name}.weight")[0].removesuffix(".weight")

    def pieces(self, modules: Iterable[str], experts: Collection[str]) -> dict[str, Pieces]:
        """Parameter of experts -> its pieces. modules: names of modules with matrices, as the files have them."""
        found: dict[str, Pieces] = {}
        for module in modules:
            if (number := _EXPERT.findall(f".{module}.")) and len(number) > 1:
                parameter, pattern = self._renamed(f"{module}.weight")
                if pattern is not None and parameter in experts:
                    converter = self._of_pattern[pattern]
                    own = found.setdefault(parameter, Pieces(list(converter.source_patterns), strange=_strange(converter)))
                    own.add(int(number[-1]), pattern, module)
        return found

    def _renamed(self, name: str) -> tuple[str, str | None]:
        return rename_source_key(name, self._renamings, self._converters, self._prefix, self._state)


def _strange(converter: WeightConverter) -> str:
    ops = [(type(op), getattr(op, "dim", None)) for op in converter.operations]
    one_below_the_other = [(MergeModulelist, 0), (Concatenate, 1)][: 1 if len(converter.source_patterns) == 1 else 2]
    return "" if ops == one_below_the_other else ", ".join(kind.__name__ for kind, _ in ops)


def put_together(
    module: Any, name: str, shape: tuple[int, int, int], pieces: Pieces, read: Callable[[str, tuple[int, int]], PackedLinear | Tensor]
) -> None:
    """Put the experts' matrices in the place of a module's parameter `name`. shape: (E, O, I). read: (a module's name in the files,
    shape) -> its matrix. ValueError where something does not fit."""
    (experts, outputs, inputs), parts = shape, len(pieces.patterns)
    pieces.check(experts)
    if outputs % parts:
        raise ValueError(f"{parts} matrices for each expert do not make up {outputs} rows")
    each = outputs // parts, inputs
    names = [pieces.at[e, k] for e in range(experts) for k in range(parts)]
    kept: list[PackedLinear] = []
    for at in names:
        layer = read(at, each)
        if isinstance(layer, Tensor) or (kept and (layer.form, layer.block) != (kept[0].form, kept[0].block)):
            kept.clear()
            break
        kept.append(layer)
    made = KINDS[kept[0].form].below_each_other(kept) if kept else None
    if made is not None:
        made.experts = experts
        put_experts(module, name, made)
        return
    kept.clear()  # else they would stay in memory beside what is made of them
    whole: Tensor | None = None
    for number, at in enumerate(names):
        layer = read(at, each)
        own = layer if isinstance(layer, Tensor) else KINDS[layer.form](layer).dense()
        if whole is None:
            whole = torch.empty(experts, parts, *each, dtype=own.dtype)
        whole[divmod(number, parts)] = own
    assert whole is not None
    dense = whole.view(experts, outputs, inputs)
    put_dense(module, name, dense.transpose(1, 2).contiguous() if module.is_transposed else dense)
