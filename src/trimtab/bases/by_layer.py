"""A model in float32 that holds the weights of one layer at a time: for comparisons of a base that is too large to be held twice.

Its parameters are made from a loaded model's while a decoder layer, or a module outside of the layers, runs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from trimtab.bases.copies import bare_config
from trimtab.bases.structure import read_spec
from trimtab.bases.weights import claimed
from trimtab.bases.weights.passing import Passing
from trimtab.memory import release_freed


def in_float32_by_layer(model: Any) -> Any:
    """The same class and config on the CPU in float32. Matrices of every format are dense ones, and what no file stores is computed in
    float32, not cast from what the model has. What is tied is tied. `model` must stay as it is while this one is used."""
    with torch.random.fork_rng(devices=[]), _WithoutMatrices():
        made = type(model)(bare_config(model))
    theirs, kept, passing = dict(model.named_modules()), model.state_dict(), dict[int, Passing]()
    for at, module in made.named_modules():
        own, matrix = theirs[at], claimed(theirs[at])
        for name in [n for n, p in module._parameters.items() if p is not None]:
            if matrix is not None and not matrix.stored_dense and name == "weight":
                module._parameters[name] = passing.setdefault(id(own), Passing.of(matrix))
                continue
            parameter = own._parameters[name]
            source = parameter.source if isinstance(parameter, Passing) else parameter  # `model` may itself be one that holds a layer
            module._parameters[name] = passing.setdefault(id(parameter), Passing.of(source))
        for name in module._buffers:
            if (buffer := kept.get(f"{at}.{name}")) is not None:
                module._buffers[name] = buffer.to("cpu", torch.float32 if buffer.is_floating_point() else buffer.dtype)
    _hold_while_running(made)
    made.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    return made.train(model.training).requires_grad_(False)


@contextmanager
def held(*modules: nn.Module) -> Iterator[None]:
    """The weights of these modules, and of all that is in them, are in memory."""
    parameters = [p for m in modules for p in m.parameters()]
    _take(parameters)
    try:
        yield
    finally:
        _leave(parameters)


def _hold_while_running(model: Any) -> None:
    layers = list(model.get_submodule(read_spec(model).layer_list))
    inside = {id(m) for layer in layers for m in layer.modules()}
    for part in [*layers, *(m for m in model.modules() if id(m) not in inside and m._parameters)]:
        deep = id(part) in inside
        part.register_forward_pre_hook(lambda m, _, deep=deep: _take(m.parameters(deep)))
        part.register_forward_hook(lambda m, _, __, deep=deep: _leave(m.parameters(deep)), always_call=True)


def _take(parameters: Iterable[Any]) -> None:
    for p in parameters:
        if isinstance(p, Passing):
            p.hold()


def _leave(parameters: Iterable[Any]) -> None:
    for p in parameters:
        if isinstance(p, Passing):
            p.let_go()
    release_freed()  # small things lie between what was freed, so that the next layer's weights would not fit there


class _WithoutMatrices(TorchFunctionMode):
    """What is made empty, to be filled later, has no memory: the weights of layers, not what a constructor computes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})
