"""Every method written a second time, as plainly as possible: hooks on transformers' own model, its own attention, autograd, one sequence.

Nothing here calls trimtab's kernels, packs or attention, so that a formula that is wrong in trimtab differs from it, in the forward and in
the gradients.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from trimtab.store import Adapter

ACTIVATIONS = {"relu": torch.relu, "gelu": F.gelu, "silu": F.silu}


def plain_logits(model: nn.Module, adapter: Adapter | None, ids: list[int]) -> Tensor:
    """Logits [T, V] of one sequence under one adapter; differentiable in the adapter's tensors."""
    return _plain(model, adapter, ids)[0]


def plain_hidden(model: nn.Module, adapter: Adapter | None, ids: list[int]) -> Tensor:
    """Hidden states [T, H] after the final norm, of the same."""
    return _plain(model, adapter, ids)[1]


def _plain(model: nn.Module, adapter: Adapter | None, ids: list[int]) -> tuple[Tensor, Tensor]:
    with ExitStack() as hooks:
        extra, skip = ({}, 0) if adapter is None else PLAIN[adapter.method.peft_type](model, adapter, ids, hooks)
        told = {"input_ids": torch.tensor([ids]), "use_cache": False, "output_hidden_states": True}
        out = model(**(told | extra))
        return out.logits[0, skip:], out.hidden_states[-1][0, skip:]


def _tensors(adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    """module name -> its tensors by short name."""
    found: dict[str, dict[str, Tensor]] = {}
    for site in adapter.sites:
        found[site.name] = {t: adapter.params[site.key(t)] for t in site.shapes}
    return found


def _edit(model: nn.Module, name: str, hooks: ExitStack, edit: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
    module = model.get_submodule(name)

    def hook(m: nn.Module, args: Any, y: Any) -> Any:
        return (edit(m, args[0], y[0]), *y[1:]) if isinstance(y, tuple) else edit(m, args[0], y)

    hooks.callback(module.register_forward_hook(hook).remove)


def _weight(module: nn.Module) -> Tensor:
    return module.weight.T if type(module).__name__ == "Conv1D" else module.weight


def _saved(model: nn.Module, name: str, t: dict[str, Tensor], hooks: ExitStack) -> bool:
    if set(t) - {"weight", "bias"}:
        return False
    module = model.get_submodule(name)

    def edit(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return torch.func.functional_call(_Unhooked(m), {f"m.{k}": v for k, v in t.items()}, (x,))

    hooks.callback(module.register_forward_hook(lambda m, args, y: edit(m, args[0], y)).remove)
    return True


class _Unhooked(nn.Module):
    """Calls a module's forward without its hooks."""

    def __init__(self, m: nn.Module):
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        return self.m.forward(x)


def _lora(model: nn.Module, adapter: Adapter, ids: list[int], hooks: ExitStack) -> tuple[dict[str, Any], int]:
    method: Any = adapter.method
    for name, t in _tensors(adapter).items():
        if _saved(model, name, t, hooks):
            continue
        A, B = (t["lora_embedding_A"], t["lora_embedding_B"]) if "lora_embedding_A" in t else (t["lora_A.weight"], t["lora_B.weight"])
        r, old = A.shape[0], t["lora_B.start"] @ t["lora_A.start"] if "lora_A.start" in t else 0.0  # a start that is taken away again
        alpha = 2 * method.r if method.lora_alpha is None else method.lora_alpha
        alpha = next((v for k, v in method.alpha_pattern.items() if re.search(k, name)), alpha)
        s = alpha / math.sqrt(r) if method.use_rslora else alpha / r
        if "lora_embedding_A" in t:

            def edit(m: nn.Module, x: Tensor, y: Tensor, A: Tensor = A, B: Tensor = B, s: float = s) -> Tensor:
                return y + s * getattr(m, "embed_scale", 1.0) * F.one_hot(x, A.shape[1]).float() @ A.T @ B.T

        elif method.use_dora:

            def edit(
                m: nn.Module,
                x: Tensor,
                y: Tensor,
                A: Tensor = A,
                B: Tensor = B,
                s: float = s,
                g: Tensor = t["lora_magnitude_vector"],
                old: Any = old,
            ) -> Tensor:
                V = _weight(m) + s * (B @ A - old)
                out = x @ V.T * (g / V.detach().norm(dim=1))
                return out if m.bias is None else out + m.bias

        else:

            def edit(m: nn.Module, x: Tensor, y: Tensor, A: Tensor = A, B: Tensor = B, s: float = s, old: Any = old) -> Tensor:
                return y + s * (x @ (B @ A - old).T)

        _edit(model, name, hooks, edit)
    return {}, 0


def _ia3(model: nn.Module, adapter: Adapter, ids: list[int], hooks: ExitStack) -> tuple[dict[str, Any], int]:
    for name, t in _tensors(adapter).items():
        if _saved(model, name, t, hooks):
            continue
        scale = t["ia3_l"]
        if scale.shape[0] == 1:  # (1, I): the input of a feed-forward module
            hook = model.get_submodule(name).register_forward_pre_hook(lambda m, args, scale=scale: (args[0] * scale[0], *args[1:]))
            hooks.callback(hook.remove)
        else:
            _edit(model, name, hooks, lambda m, x, y, scale=scale: y * scale[:, 0])
    return {}, 0


def _bottleneck(model: nn.Module, adapter: Adapter, ids: list[int], hooks: ExitStack) -> tuple[dict[str, Any], int]:
    method: Any = adapter.method
    f = ACTIVATIONS[method.non_linearity]
    for name, t in _tensors(adapter).items():

        def edit(m: nn.Module, x: Tensor, y: Tensor, t: dict[str, Tensor] = t) -> Tensor:
            h = x if method.variant == "parallel" else y
            hidden = f(h @ t["adapter_down.weight"].T + t["adapter_down.bias"])
            return y + method.scaling * (hidden @ t["adapter_up.weight"].T + t["adapter_up.bias"])

        _edit(model, name, hooks, edit)
    return {}, 0


def _prompt(model: nn.Module, adapter: Adapter, ids: list[int], hooks: ExitStack) -> tuple[dict[str, Any], int]:
    prompt = adapter.params["prompt_embeddings"]
    real = model.get_input_embeddings()(torch.tensor(ids))
    return {"input_ids": None, "inputs_embeds": torch.cat([prompt, real])[None]}, len(prompt)


def _prefix(model: nn.Module, adapter: Adapter, ids: list[int], hooks: ExitStack) -> tuple[dict[str, Any], int]:
    p, spec = adapter.params, adapter.base.spec
    if "embedding.weight" in p:
        hidden = torch.tanh(p["embedding.weight"] @ p["transform.0.weight"].T + p["transform.0.bias"])
        flat = hidden @ p["transform.2.weight"].T + p["transform.2.bias"]
    else:
        flat = p["prompt_embeddings"]
    cache, n, (heads, dim) = DynamicCache(), len(flat), spec.kv_shape
    for layer, pair in enumerate(flat.split(2 * heads * dim, dim=1)):
        key, value = (x.reshape(n, heads, dim).transpose(0, 1)[None] for x in pair.split(heads * dim, dim=1))
        cache.update(key, value, layer)
    return {"past_key_values": cache, "use_cache": True, "position_ids": torch.arange(n, n + len(ids))[None]}, 0


PLAIN = {"LORA": _lora, "IA3": _ia3, "BOTTLENECK": _bottleneck, "PROMPT_TUNING": _prompt, "PREFIX_TUNING": _prefix}
