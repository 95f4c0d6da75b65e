"""Faster forwards for modules whose formula is known: RMSNorm, gated MLPs and rotary attention, as Llama and its kin write them.

What is known is a class name of transformers; what is trusted is a comparison: before a forward is put in place of a class's own, both are
run on a few random rows, and where they differ (another version of transformers, an option not thought of) the class keeps its own. Nothing
here knows of adapters: projections are called as modules, so that their hosts see every row. The row-wise kernels that they run may be
exchanged for compiled ones, after a comparison too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from trimtab import ops
from trimtab.attention import Plan, Run, attend, refuse_changes
from trimtab.errors import ConfigError
from trimtab.ops import compiled, native

LLAMA_LIKE = ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3")
Forward = Callable[..., Any]


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
    """Put fast forwards in place that run these kernels; returns the names of the classes that got one."""
    made: dict[str, bool] = {}
    for module in model.modules():
        name = type(module).__name__
        fast = _fast_forward(module, name, row_wise)
        if fast is None:
            continue
        if name not in made:
            made[name] = _agrees(module, fast)
        if made[name]:
            module.forward = fast
    return [name for name, good in made.items() if good]


def _fast_forward(module: Any, name: str, row_wise: RowWise) -> Forward | None:
    if name.endswith("RMSNorm") and name.removesuffix("RMSNorm") in LLAMA_LIKE:
        return _rms_norm(module, row_wise)
    if name.endswith("MLP") and name.removesuffix("MLP") in LLAMA_LIKE and _is_silu(module):
        return _gated(module, row_wise)
    if name in ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"):
        return _attention(module, row_wise)
    return None


def _rms_norm(norm: Any, row_wise: RowWise) -> Forward:
    return lambda x: row_wise.rms_norm(x, norm.weight, norm.variance_epsilon)


def _is_silu(mlp: Any) -> bool:
    x = torch.linspace(-3, 3, 7)
    return torch.equal((mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn)(x), silu(x))


def _gated(mlp: Any, row_wise: RowWise) -> Forward:
    if hasattr(mlp, "gate_up_proj"):

        def fused(x: Tensor) -> Tensor:
            gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
            return mlp.down_proj(row_wise.swiglu(gate, up))

        return fused
    return lambda x: mlp.down_proj(row_wise.swiglu(mlp.gate_proj(x), mlp.up_proj(x)))


def _attention(module: Any, row_wise: RowWise) -> Forward:
    """Projections, rotation and attention on flat rows [T, heads, D]: no transposes to and from [1, heads, T, D]."""
    original, D = module.forward, module.head_dim
    window = module.sliding_window if hasattr(module, "sliding_window") else getattr(module.config, "sliding_window", None)
    normed = hasattr(module, "q_norm")

    def forward(
        hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], trimtab_plan: Any = None, **kwargs: Any
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


@torch.no_grad()
def _agrees(module: Any, fast: Forward) -> bool:
    """Whether both forwards give the same on random rows, up to rounding."""
    weight = next(module.parameters())
    generator = torch.Generator(weight.device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=weight.device, dtype=torch.float32).to(weight.dtype)

    inputs: dict[str, Any] = {}
    if hasattr(module, "q_proj"):
        angle = torch.rand(1, 5, module.head_dim // 2, generator=generator, device=weight.device).repeat(1, 1, 2)
        inputs = {"position_embeddings": (angle.cos().to(weight.dtype), angle.sin().to(weight.dtype)), "attention_mask": None}
        inputs["trimtab_plan"] = Plan([Run(0, 3, ((0, 3),)), Run(3, 5, ((3, 5),))], weight.device)
    width = weight.shape[-1] if weight.dim() > 1 else len(weight)
    x = random(1, 5, width)
    ours, theirs = (f(x, **inputs) for f in (fast, module.forward))
    ours, theirs = (y[0] if isinstance(y, tuple) else y for y in (ours, theirs))
    tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
    return bool(((ours - theirs).abs().max() <= tolerance * theirs.abs().max()).item())


def compile_row_wise(weight: Tensor) -> tuple[RowWise, str]:
    """(kernels for a model with weights like this, in words which they are): compiled ones where there are no native ones.

    ConfigError where torch.compile does not work here, or what it makes gives other results.
    """
    with torch.no_grad():
        if native.available(weight):
            return RowWise(), "nothing is compiled: the native kernels of this CPU do what would be"
    try:
        off = _compare_row_wise(weight)
    except Exception as error:  # torch.compile calls compilers, and fails in as many ways
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(
            f"compile = true: torch.compile does not work on {weight.device}",
            problems=[f"{type(error).__name__}: {said[0] if said else ''}"],
            fix="remove `compile`, or install what it needs: a C++ compiler for a CPU, triton and a C compiler for a GPU",
        ) from error
    if off:
        raise ConfigError(f"compile = true: what torch.compile makes of {', '.join(off)} gives other results", fix="remove `compile`")
    return COMPILED, "norms, gates and rotations are compiled"


def _compare_row_wise(weight: Tensor) -> Sequence[str]:
    """The kernels whose compiled form differs from the other by more than rounding, on random rows, forwards or backwards."""
    generator, off = torch.Generator().manual_seed(0), []

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)

    wide, heads, angles = [random(1, 5, 48) for _ in range(3)], random(5, 2, 16), [random(5, 16) for _ in range(2)]
    cases: dict[str, tuple[list[Tensor], list[Any]]] = {
        "rms_norm": (wide[:1], [random(48), 1e-5]),
        "swiglu": (wide[:2], []),
        "rotate": ([heads], angles),
    }
    for name, (inputs, rest) in cases.items():
        results = []
        for kernels in (COMPILED, RowWise()):
            with torch.enable_grad():
                leaves = [x.clone().requires_grad_() for x in inputs]
                y = getattr(kernels, name)(*leaves, *rest)
                results.append([y.detach(), *torch.autograd.grad(y, leaves, wide[2].flatten()[: y.numel()].view_as(y))])
        tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
        if not all(bool((a - b).abs().max() <= tolerance * b.abs().max()) for a, b in zip(*results, strict=True)):
            off.append(name)
    return off
