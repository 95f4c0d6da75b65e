"""Classes of transformers that compute a little otherwise under their old names, as another version of it might."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def deviate(model: Any, part: str, how: Callable[[Callable[..., Any], Any], Callable[..., Any]]) -> Any:
    """Give every module of the model whose class's name ends with `part` a class of the same name whose forward is how(forward, module)."""
    for module in list(model.modules()):
        cls = type(module)
        if cls.__name__.endswith(part):

            def forward(self: Any, *args: Any, _own: Any = cls.forward, **kwargs: Any) -> Any:
                return how(lambda *a, **k: _own(self, *a, **k), self)(*args, **kwargs)

            module.__class__ = type(cls.__name__, (cls,), {"forward": forward})
    return model


def with_setting(name: str, factor: float) -> Callable[..., Any]:
    """The forward with another value of a setting, which on the module stays as it is."""

    def how(own: Callable[..., Any], module: Any) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            value = getattr(module, name)
            setattr(module, name, value * factor)
            try:
                return own(*args, **kwargs)
            finally:
                setattr(module, name, value)

        return forward

    return how


def sees_one_less(own: Callable[..., Any], module: Any) -> Callable[..., Any]:
    """Attention in which no token sees the oldest that it saw."""

    def forward(hidden_states: Tensor, position_embeddings: Any, attention_mask: Tensor | None, **kwargs: Any) -> Any:
        if attention_mask is None:  # attached: a plan says who sees whom
            return own(hidden_states, position_embeddings, None, **kwargs)
        seen = attention_mask == 0
        oldest = seen & (seen.cumsum(-1) == 1) & (seen.sum(-1, keepdim=True) > 1)
        return own(hidden_states, position_embeddings, attention_mask.masked_fill(oldest, torch.finfo(attention_mask.dtype).min), **kwargs)

    return forward


def other_gradient(own: Callable[..., Any], module: Any) -> Callable[..., Any]:
    """The same result with a tenth more of its gradient."""

    def more(y: Tensor) -> Tensor:
        return y + 0.1 * (y - y.detach())

    def forward(*args: Any, **kwargs: Any) -> Any:
        y = own(*args, **kwargs)
        return (more(y[0]), *y[1:]) if isinstance(y, tuple) else more(y)

    return forward


def gate_of_another_shape(own: Callable[..., Any], module: Any) -> Callable[..., Any]:
    return lambda x: own(x) + 0.05 * module.down_proj(module.up_proj(x))
