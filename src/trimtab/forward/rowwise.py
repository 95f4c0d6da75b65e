"""Faster forwards for modules whose formula is known: RMSNorm, gated MLPs and rotary attention, as Llama and similar families have them.

A module is chosen by its class in transformers. Its forward is replaced only after a comparison: both forwards run on a stand-in of the
module, with their backwards. If they differ by more than rounding (another version of transformers, an option that is not handled), the
class keeps its own. This file knows nothing of adapters: projections are called as modules, so that their hosts see every row. The row-wise
kernels that the forwards run may be replaced by compiled ones, after a comparison too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from trimtab import ops
from trimtab.bases.structure import window_of
from trimtab.bases.weights import first_weight, norm_weight, weight_of
from trimtab.errors import ConfigError
from trimtab.forward.attention import AttentionPlan, attend, refuse_changes
from trimtab.forward.kv_cache import Run
from trimtab.forward.replica import alike, altered, as_near, kind, ours, small_config, stand_in
from trimtab.memory import release_freed
from trimtab.ops import compiled, native

CHECKED = (7, 140)
"""Rows of the sequences on which forwards are compared: more than a window, and more than attention takes at a time."""
LLAMA_LIKE = ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3")
Forward = Callable[..., Any]
_agreed: dict[Hashable, bool] = {}
"""Modules that were compared."""


@dataclass
class RowWise:
    """The kernels that the fast forwards of one model run; they may be exchanged between any two forwards."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = ops.rms_norm
    swiglu: Callable[[Tensor, Tensor], Tensor] = ops.swiglu
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = ops.rotate

    def become(self, other: RowWise) -> None:
        """Run the other's kernels from the next forward on."""
        self.rms_norm, self.swiglu, self.rotate = other.rms_norm, other.swiglu, other.rotate


COMPILED = RowWise(compiled.rms_norm, compiled.swiglu, compiled.rotate)


def install(model: Any, row_wise: RowWise) -> list[str]:
    """Put fast forwards in place that run these kernels; returns the names of the classes that got one. Modules that are built alike are
    compared once in a process."""
    built, names = alike(model), dict[str, None]()
    compared = len(_agreed)
    for module in model.modules():
        fast = None if altered(module) else _fast_forward(module, row_wise)
        if fast is None:
            continue
        weight = first_weight(module)
        known = built, kind(module), weight.dtype, weight.device
        if known not in _agreed:
            _agreed[known] = _agrees(module)
        if _agreed[known]:
            module.forward, names[type(module).__name__] = fast, None
    if len(_agreed) > compared:
        release_freed()
    return list(names)


def _fast_forward(module: Any, row_wise: RowWise) -> Forward | None:
    """A module's fast forward where there is one: a method, as its class's own is, that runs on a copy of the module as well."""
    name = type(module).__name__
    found = None
    if name.endswith("RMSNorm") and name.removesuffix("RMSNorm") in LLAMA_LIKE:
        found = _rms_norm(row_wise)
    elif name.endswith("MLP") and name.removesuffix("MLP") in LLAMA_LIKE and _is_silu(module):
        found = _gated(module, row_wise)
    elif name in ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"):
        found = _attention(module, row_wise)
    return found and MethodType(ours(found), module)


def _rms_norm(row_wise: RowWise) -> Forward:
    return lambda norm, x: row_wise.rms_norm(x, norm_weight(norm), norm.variance_epsilon)


def _is_silu(mlp: Any) -> bool:
    x = torch.linspace(-3, 3, 7, dtype=torch.float32)
    return torch.equal((mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn)(x), silu(x))


def _gated(module: Any, row_wise: RowWise) -> Forward:
    if hasattr(module, "gate_up_proj"):

        def fused(mlp: Any, x: Tensor) -> Tensor:
            gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
            return mlp.down_proj(row_wise.swiglu(gate, up))

        return fused
    return lambda mlp, x: mlp.down_proj(row_wise.swiglu(mlp.gate_proj(x), mlp.up_proj(x)))


def _attention(module: Any, row_wise: RowWise) -> Forward:
    """Projections, rotation and attention on flat rows [T, heads, D]: no transposes to and from [1, heads, T, D]."""
    original, D = module.forward, module.head_dim
    window = window_of(module)
    normed = hasattr(module, "q_norm")

    def forward(
        module: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], trimtab_plan: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if trimtab_plan is None:
            return original(hidden_states, position_embeddings, **kwargs)  # which says what is wrong
        refuse_changes(kwargs)
        T, (cos_TD, sin_TD) = hidden_states.shape[1], (p[0] for p in position_embeddings)
        q_THD, k_THD, v_THD = (p(hidden_states).view(T, -1, D) for p in (module.q_proj, module.k_proj, module.v_proj))
        if normed:
            q_THD, k_THD = module.q_norm(q_THD), module.k_norm(k_THD)
        q_THD, k_THD = row_wise.rotate(q_THD, cos_TD, sin_TD), row_wise.rotate(k_THD, cos_TD, sin_TD)
        out_THD = attend(q_THD, k_THD, v_THD, trimtab_plan, module.layer_idx, module.scaling, None, window)
        return module.o_proj(out_THD.reshape(1, T, -1)), None

    return forward


def _agrees(module: Any) -> bool:
    """Whether the fast forward of modules of this kind gives what their own gives, and the same gradients, up to rounding."""
    weight = first_weight(module)
    config = small_config(module.config) if hasattr(module, "config") else None
    with torch.inference_mode(False), torch.enable_grad():
        small = stand_in(module, weight.dtype, config)
        fast = _fast_forward(small, RowWise())
        assert fast is not None
        found = [_with_gradients(small, forward, inputs) for forward, inputs in zip((fast, small.forward), _inputs(small), strict=True)]
        del small, fast  # before the larger one is made
        exact = stand_in(module, torch.float32, config)
        found.append(_with_gradients(exact, exact.forward, _inputs(exact)[1]))
    return all(as_near(*three) for three in zip(*found, strict=True))


def _inputs(module: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what our forward of attention is told, what transformers' own is told) of `CHECKED` sequences."""
    if not hasattr(module, "q_proj"):
        return {}, {}
    weight, T = weight_of(module.q_proj), sum(CHECKED)
    angle_TD = torch.rand(1, T, module.head_dim // 2, generator=torch.Generator().manual_seed(1), dtype=torch.float32).repeat(1, 1, 2)
    turned = tuple(x.to(torch.bfloat16).to(weight.device, weight.dtype) for x in (angle_TD.cos(), angle_TD.sin()))
    starts = [sum(CHECKED[:i]) for i in range(len(CHECKED))]
    plan = AttentionPlan([Run(a, a + n, ((a, a + n),)) for a, n in zip(starts, CHECKED, strict=True)], weight.device)
    place_T, sequence_T = torch.arange(T), torch.tensor(CHECKED).cumsum(0)
    sequence_T = torch.bucketize(place_T, sequence_T, right=True)
    back_TT = place_T[:, None] - place_T[None]
    seen_TT = (sequence_T[:, None] == sequence_T[None]) & (back_TT >= 0)
    window = window_of(module)
    if window is not None:
        seen_TT &= back_TT < window
    mask = torch.zeros(1, 1, T, T, dtype=torch.float32).masked_fill(~seen_TT, torch.finfo(weight.dtype).min).to(weight.device, weight.dtype)
    return {"position_embeddings": turned, "trimtab_plan": plan}, {"position_embeddings": turned, "attention_mask": mask}


def _with_gradients(module: Any, forward: Forward, inputs: dict[str, Any]) -> list[Tensor]:
    """A module's result on random rows, and the gradients of these rows and of its vectors. Norms read rows so small that epsilon shows."""
    weight = first_weight(module)
    vectors = [p.requires_grad_() for p in module.parameters() if p.dim() == 1]
    size = getattr(module, "variance_epsilon", 1.0) ** 0.5
    shape = (1, sum(CHECKED) if inputs else CHECKED[0], weight.shape[-1])
    x, dy = (torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float32).to(torch.bfloat16) for i in (0, 1))
    leaf = (size * x).to(torch.bfloat16).to(weight.device, weight.dtype).requires_grad_()
    y = forward(leaf, **inputs)
    y = y[0] if isinstance(y, tuple) else y
    return [y.detach(), *torch.autograd.grad(y, [leaf, *vectors], dy.to(y.device, y.dtype))]


def compile_row_wise(dtype: torch.dtype, device: torch.device) -> tuple[RowWise, str]:
    """(kernels for a model of this dtype on this device, in words which they are): compiled ones where there are no native ones.

    ConfigError where torch.compile does not work here, or what it makes gives other results.
    """
    with torch.no_grad():
        if native.available(torch.empty(0, dtype=dtype, device=device)):
            return RowWise(), "nothing is compiled: the native kernels of this CPU do what would be"
    try:
        off = _compare_row_wise(dtype, device)
    except Exception as error:  # torch.compile calls compilers, and fails in as many ways
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(
            f"compile = true: torch.compile does not work on {device}",
            problems=[f"{type(error).__name__}: {said[0] if said else ''}"],
            fix="remove `compile`, or install what it needs: a C++ compiler for a CPU, triton and a C compiler for a GPU",
        ) from error
    if off:
        raise ConfigError(f"compile = true: what torch.compile makes of {', '.join(off)} gives other results", fix="remove `compile`")
    return COMPILED, "norms, gates and rotations are compiled"


def _compare_row_wise(dtype: torch.dtype, device: torch.device) -> Sequence[str]:
    """The kernels whose compiled form differs from the other by more than rounding, on random rows, forwards or backwards."""
    generator, off = torch.Generator().manual_seed(0), []

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(device, dtype)

    wide, heads, angles = [random(1, 5, 48) for _ in range(3)], random(5, 2, 16), [random(5, 16) for _ in range(2)]
    cases: dict[str, tuple[list[Tensor], list[Any]]] = {
        "rms_norm": (wide[:1], [random(48), 1e-5]),
        "swiglu": (wide[:2], []),
        "rotate": ([heads], angles),
    }
    for name, (inputs, rest) in cases.items():
        dy = wide[2].flatten()[: inputs[0].numel()].view_as(inputs[0])
        ways = (COMPILED, dtype), (RowWise(), dtype), (RowWise(), torch.float32)
        found = [_kernel_with_gradients(getattr(kernels, name), inputs, rest, dy, computed) for kernels, computed in ways]
        if not all(as_near(*three) for three in zip(*found, strict=True)):
            off.append(name)
    return off


def _kernel_with_gradients(
    kernel: Callable[..., Tensor], inputs: list[Tensor], rest: list[Any], dy: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        y = kernel(*leaves, *(r.to(dtype) if isinstance(r, Tensor) else r for r in rest))
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]
