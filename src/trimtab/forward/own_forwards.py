"""Forwards for classes of transformers that cannot run as they are.

Some attention classes compute their scores themselves, without transformers' attention interface. Here they go through `attention.py`. The
rest of what they do, rotary embeddings among it, is the classes' own code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trimtab.forward import attention
from trimtab.forward.replica import ours


def install(model: Any) -> None:
    """Give the modules of these classes their forwards; others keep theirs."""
    for module in model.modules():
        forward = FORWARDS.get(f"{type(module).__module__}.{type(module).__name__}")
        if forward is not None:
            module.forward = ours(partial(forward, module))


def gptj(module: Any, hidden_states: Tensor, *, position_ids: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
    """GPT-J: rotary embeddings over the first features of a head, in pairs side by side."""
    q, k, v = (
        module._split_heads(projection(hidden_states), module.num_attention_heads, module.head_dim, True)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )  # [1, T, heads, D]
    sin, cos = module._get_embed_positions(position_ids)[0][position_ids].to(k.dtype).chunk(2, -1)
    width, rotate = module.rotary_dim or module.head_dim, _rotary_of(module)
    q, k = (torch.cat([rotate(x[..., :width], sin, cos), x[..., width:]], -1) for x in (q, k))
    return _attend(module, q, k, v, 1 / float(module.scale_attn), module.out_proj)


def falcon(
    module: Any, hidden_states: Tensor, alibi: Tensor | None, attention_mask: Tensor | None, *, position_embeddings: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Falcon. Its newer layers repeat keys and values for the query heads that share them: one of each is kept."""
    attention.refuse_changes({"alibi": alibi})
    q, k, v = module._split_heads(module.query_key_value(hidden_states))  # [1, T, heads, D]
    share = module.num_heads // module.num_kv_heads if module.new_decoder_architecture else 1
    k, v = k[:, :, ::share], v[:, :, ::share]
    q, k = _rotary_of(module)(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
    return _attend(module, q.transpose(1, 2), k.transpose(1, 2), v, module.head_dim**-0.5, module.dense)


def _attend(module: Any, q: Tensor, k: Tensor, v: Tensor, scaling: float, output: Callable[[Tensor], Tensor]) -> tuple[Tensor, None]:
    """The projected result [1, T, H], of queries, keys and values [1, T, heads, D]."""
    result, _ = attention.forward(module, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, scaling)
    return output(result.flatten(2)), None


def _rotary_of(module: Any) -> Callable[..., Any]:
    """The rotary embedding of the class's own file."""
    rotate: Callable[..., Any] = sys.modules[type(module).__module__].apply_rotary_pos_emb
    return rotate


FORWARDS: dict[str, Callable[..., tuple[Tensor, None]]] = {
    "transformers.models.gptj.modeling_gptj.GPTJAttention": gptj,
    "transformers.models.falcon.modeling_falcon.FalconAttention": falcon,
}
"""By name, so that no family's file is imported for another's sake."""
