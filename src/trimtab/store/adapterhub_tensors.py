"""The tensors of AdapterHub's folders: which belong there, and what they are as tensors of trimtab's methods. What may be carried over is
decided by `store.adapterhub`; here options are read as they are.

Names: `LAYERS.N.attention_adapters.adapters.NAME.adapter_down.0.weight` (behind attention) and `….output_adapters.…` (behind the MLP);
`MODULE.loras.NAME.lora_A`. Dimensions: I in, O out, r rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.bases.spec import Spec
from trimtab.errors import AdapterError
from trimtab.methods import BottleneckConfig, IA3Config, Method
from trimtab.store.combine_edits import reduction_factor
from trimtab.store.factors import Factors, lora_from_factors, short_targets

if TYPE_CHECKING:
    from trimtab.model import Base

Shapes = dict[str, tuple[int, ...]]
ACTIVATIONS = {name: name for name in ("relu", "silu", "gelu", "tanh", "sigmoid", "leakyrelu", "linear")} | {"swish": "silu"}
"""Their non-linearities -> ours. Their gelu is the exact one; gelu_new, the approximation by tanh, is not here."""


@dataclass(frozen=True)
class Tensors:
    """What adapter.safetensors holds. name: the adapter's, which stands in each tensor's name. where: for errors."""

    name: str
    found: Mapping[str, Tensor]
    where: str

    def check(self, wanted: Shapes) -> None:
        """AdapterError that lists missing, left-over and mis-shaped tensors; one too where none is wanted."""
        problems = [f"{n} is missing; the config asks for it, of shape {shape}" for n, shape in wanted.items() if n not in self.found]
        for n, tensor in self.found.items():
            if n not in wanted:
                problems.append(f"{n} {tuple(tensor.shape)} belongs to no module that the config names on this base")
            elif tuple(tensor.shape) != wanted[n]:
                problems.append(f"{n} has shape {tuple(tensor.shape)}; the config and this base ask for {wanted[n]}")
        if problems or not wanted:
            raise AdapterError(f"{self.where} is refused", problems=problems[:12] or ["it holds no tensors of this adapter"])


def layers_of(options: Mapping[str, Any], spec: Spec) -> list[int]:
    """The layers that the adapter acts on."""
    left_out = options["leave_out"] if isinstance(options["leave_out"], list) else []
    return [i for i in range(spec.num_layers) if i not in left_out]


def carry_bottleneck(options: Mapping[str, Any], tensors: Tensors, base: Base) -> tuple[Method, dict[str, Tensor]]:
    """Theirs behind the attention only becomes a Houlsby adapter whose part behind the MLP adds nothing."""
    spec = base.spec
    layers = layers_of(options, spec)
    method = BottleneckConfig(
        variant="houlsby" if options["mh_adapter"] else "pfeiffer",
        reduction_factor=reduction_factor(spec.hidden_size, max(1, int(spec.hidden_size // options["reduction_factor"]))),
        non_linearity=ACTIVATIONS[options["non_linearity"]],
        scaling=options["scaling"],
        layers_to_transform=None if len(layers) == spec.num_layers else tuple(layers),
    )
    places = {layer.attention_output: f"{layer.name}.attention_adapters" for layer in spec.layers}
    if options["output_adapter"]:
        places |= {layer.mlp: f"{layer.name}.output_adapters" for layer in spec.layers if layer.mlp is not None}
    sites = method.sites(spec)
    theirs = {
        s.key(t): f"{places[s.name]}.adapters.{tensors.name}.{t.replace('adapter_down.', 'adapter_down.0.')}"
        for s in sites
        if s.name in places
        for t in s.shapes
    }
    tensors.check({theirs[s.key(t)]: shape for s in sites if s.name in places for t, shape in s.shapes.items()})
    params = {s.key(t): torch.zeros(shape, dtype=torch.float32) for s in sites for t, shape in s.shapes.items()}
    return method, params | {key: tensors.found[name] for key, name in theirs.items()}


def carry_lora(options: Mapping[str, Any], tensors: Tensors, base: Base) -> tuple[Method, dict[str, Tensor]]:
    """ΔW = alpha/r · B A, the scaling folded into B; where one module holds q, k and v, the pairs of all three side by side."""
    r, wanted = int(options["r"]), Shapes()
    pairs: dict[str, tuple[str, str]] = {}
    for module in _modules(options, tensors, base.spec):
        m, thirds = base.spec.modules[module], _thirds(options, module)
        count, rows = sum(thirds), m.out_features // len(thirds)
        A, B = pairs[module] = f"{module}.loras.{tensors.name}.lora_A", f"{module}.loras.{tensors.name}.lora_B"
        wanted |= {A: (count * r, m.in_features), B: (count * rows, r)}
    tensors.check(wanted)
    factors = {}
    for module, (A, B) in pairs.items():
        B_OR = _spread(tensors.found[B].double(), _thirds(options, module))
        factors[module] = Factors(tensors.found[A].double(), options["alpha"] / r * B_OR)
    return lora_from_factors(base, factors)


def carry_ia3(options: Mapping[str, Any], tensors: Tensors, base: Base) -> tuple[Method, dict[str, Tensor]]:
    """y = alpha · l ∘ (W x + b): theirs scales outputs only, of down-projections too."""
    modules = _modules(options, tensors, base.spec)
    theirs = {f"{m}.ia3_l": f"{m}.loras.{tensors.name}.lora_B" for m in modules}
    tensors.check({theirs[f"{m}.ia3_l"]: (base.spec.modules[m].out_features, 1) for m in modules})
    method = IA3Config(target_modules=short_targets(base.spec, modules), feedforward_modules=())
    return method, {key: options["alpha"] * tensors.found[name].float() for key, name in theirs.items()}


def _modules(options: Mapping[str, Any], tensors: Tensors, spec: Spec) -> list[str]:
    """The linear layers of which the file has any tensor, in every layer that is not left out: where one is missing, `check` says so."""
    pattern = re.compile(rf"{re.escape(spec.layer_list)}\.\d+\.(.+)\.loras\.{re.escape(tensors.name)}\.lora_[AB]")
    kinds = dict.fromkeys(match[1] for n in tensors.found if (match := pattern.fullmatch(n)))
    names = [f"{spec.layers[i].name}.{kind}" for i in layers_of(options, spec) for kind in kinds]
    return [n for n in names if n in spec.linears]


def _thirds(options: Mapping[str, Any], module: str) -> list[bool]:
    """Which of the matrices that a module holds are adapted: q, k and v in GPT-2's c_attn, else the only one."""
    return [x in options["attn_matrices"] for x in "qkv"] if module.endswith(".c_attn") else [True]


def _spread(B_OR: Tensor, thirds: Sequence[bool]) -> Tensor:
    """B of the adapted matrices, stacked in the file, as one B: each with columns of its own, zero rows where a matrix is not adapted."""
    count = sum(thirds)
    blocks = iter(torch.block_diag(*B_OR.chunk(count)).chunk(count))
    return torch.cat([next(blocks) if adapted else B_OR.new_zeros(B_OR.shape[0] // count, count * B_OR.shape[1]) for adapted in thirds])
