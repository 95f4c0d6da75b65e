"""A second model with the weights of a loaded one. Hosts that the loaded one has are not copied.

`Module.to(dtype)` and `Module.float()` cannot be used, because they cast buffers along with the parameters. Rotary frequencies are such
buffers: in bfloat16 a token at position 400 gets the angles of one at 399 or 401.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def copied(model: Any) -> Any:
    """The same class and config with a copy of every parameter and buffer, each in its dtype and on its device, stored in a file or not.
    What was tied is tied. It attends as transformers does ("eager")."""
    with torch.device("meta"):
        made = type(model)(bare_config(model))
    copies: dict[int, Tensor] = {}  # one for each tensor of the original, so that tied ones stay tied

    def copy_of(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in copies:
            fresh = tensor.detach().clone()
            copies[id(tensor)] = nn.Parameter(fresh, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fresh
        return copies[id(tensor)]

    for theirs, ours in zip(model.modules(), made.modules(), strict=True):
        for name, parameter in theirs._parameters.items():
            ours._parameters[name] = copy_of(parameter)  # type: ignore[assignment]
        for name, buffer in theirs._buffers.items():
            ours._buffers[name] = copy_of(buffer)
        ours.training = theirs.training
    made.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    return made


def bare_config(model: Any) -> Any:
    """A copy of a model's config, with an attention of transformers' own."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"  # ours is not its own to be saved with; every family has this one
    return config
