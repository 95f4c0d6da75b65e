"""Read folders of AdapterHub's `adapters` package (1.x): Houlsby-like bottleneck adapters, LoRA, (IA)³. This file: what is carried over.

Its adapter_config.json holds {"config", "model_type", "name", "version": "adapters.1.x"}; its weights lie in adapter.safetensors. What its
options mean was read in its source and compared with its logits. What computes something else than trimtab's methods is refused, option by
option. Its sequential adapters with original_ln_before (Pfeiffer's by default) read the sub-layer's output *plus the residual*, trimtab's
the output alone; its parallel adapters read the residual before the layer's norm, trimtab's what the MLP reads. Nor are there norms, gates,
invertible, PHM and cross-attention adapters, learnt scalings and prediction heads here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.bases.spec import Spec
from trimtab.errors import AdapterError
from trimtab.methods import Method
from trimtab.store.adapterhub_tensors import ACTIVATIONS, Tensors, carry_bottleneck, carry_ia3, carry_lora, layers_of
from trimtab.store.contents import read_contents
from trimtab.store.files import AdapterFolder, Refusal
from trimtab.store.header import read_header

if TYPE_CHECKING:
    from trimtab.model import Base

WEIGHTS, HEAD = "adapter.safetensors", "model_head.safetensors"
PICKLES = ("pytorch_adapter.bin", "pytorch_model_head.bin", "pytorch_model_adapter_fusion.bin")
SMALL_BYTES = 2**26
"""A file of that size is read whatever the base."""
FAMILIES = ("llama", "mistral", "gpt2")
"""Families that both packages have; module names and the order of residual and adapter were compared for these."""
TRAINING = frozenset(
    {"init_weights", "init_weights_seed", "dropout", "stochastic_depth", "dtype", "phm_dim", "phm_c_init", "phm_init_range", "phm_rank"}
    | {"phm_bias", "factorized_phm_W", "factorized_phm_rule", "shared_W_phm", "shared_phm_rule", "learn_phm", "hypercomplex_nonlinearity"}
    | {"adapter_residual_before_ln", "inv_adapter_reduction_factor", "architecture"}
)
"""Options that change no logit, or none as long as those that they belong to (phm_layer, ln_after, inv_adapter) are off."""
SUPPORTED: Mapping[str, Mapping[str, tuple[tuple[Any, ...], str]]] = {
    # option -> (values that are carried, what another value means)
    "bottleneck": {
        "ln_before": ((False,), "a layer norm of its own before the bottleneck"),
        "ln_after": ((False,), "a layer norm of its own behind the bottleneck"),
        "original_ln_before": ((False,), "its input is the sub-layer's output plus the residual; here it is the output alone"),
        "original_ln_after": ((True,), "the residual around the sub-layer is left out"),
        "residual_before_ln": ((True, False), "its residual is taken elsewhere"),
        "is_parallel": ((False,), "its input is the residual before the layer's norm; here a parallel adapter reads what the MLP reads"),
        "use_gating": ((False,), "a gate that depends on the whole text"),
        "inv_adapter": ((None,), "an invertible adapter behind the embedding"),
        "cross_adapter": ((False,), "adapters in cross-attention"),
        "phm_layer": ((False,), "its matrices are Kronecker products (Compacter)"),
    },
    "lora": {
        "composition_mode": (("add", "scale"), "another way of composing"),
        "use_gating": ((False,), "a gate that depends on the whole text"),
        "use_dora": ((False,), "its DoRA; trimtab has DoRA, but its magnitudes are not read from here"),
        "vera_d": ((None,), "VeRA: frozen random matrices that the file does not hold"),
        "vera_b": ((None,), "VeRA: frozen random matrices that the file does not hold"),
    },
}
READ = {
    "bottleneck": {"mh_adapter", "output_adapter", "reduction_factor", "non_linearity", "scaling", "leave_out"},
    "lora": {"r", "alpha", "attn_matrices", "selfattn_lora", "intermediate_lora", "output_lora", "leave_out"},
}


def is_adapterhub(config: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is one of the `adapters` package."""
    return config.get("peft_type") is None and "config" in config


def read_adapterhub(
    folder: AdapterFolder, config: Mapping[str, Any], base: Base, where: str
) -> tuple[Method, dict[str, Tensor], tuple[str, ...]]:
    """(method, tensors by `Site.key`, what is not carried but changes no logit). AdapterError, with every finding, where it is refused."""
    options = config.get("config")
    options = options if isinstance(options, dict) else {}
    kind = "lora" if options.get("architecture") == "lora" else "bottleneck"
    problems = _file_problems(folder.names()) + _config_problems(config, options, kind, base.spec)
    if problems:
        raise AdapterError(f"{where}, an adapter of AdapterHub's, cannot be carried over", problems=problems, fix=_fix(folder.names()))
    try:
        tensors = _read(folder, WEIGHTS, base.spec)
        problems = _head_problems(folder, base)
    except (Refusal, OSError) as error:
        raise AdapterError(f"{where} is refused", problems=str(error).splitlines()) from error
    problems += [f"{k} has values that are not finite" for k, t in tensors.items() if not bool(torch.isfinite(t).all())]
    if problems:
        raise AdapterError(f"{where} is refused", problems=problems[:12])
    carry = carry_bottleneck if kind == "bottleneck" else carry_ia3 if options["composition_mode"] == "scale" else carry_lora
    method, params = carry(options, Tensors(str(config.get("name")), tensors, where), base)
    notes = [f"dropout = {options['dropout']} is left out: it matters in training only"] if options.get("dropout") else []
    return method, params, tuple(notes)


def _read(folder: AdapterFolder, name: str, spec: Spec) -> dict[str, Tensor]:
    """A file's tensors. Refusal, before they are read, where they are more than an adapter on this base can have."""
    most = max(SMALL_BYTES, 8 * spec.num_parameters)
    with folder.open_unhashed(name) as (file, size):
        if size > most:
            raise Refusal(f"{name} has {size:,} bytes; at most {most:,} are read for this base of {spec.num_parameters:,} parameters")
        entries, head = read_header(file, size, name)
        return read_contents(folder, name, file, entries, head).tensors


def _head_problems(folder: AdapterFolder, base: Base) -> list[str]:
    """A head saved beside the adapter may only be the base's own."""
    if HEAD not in folder.names():
        return []
    own = dict(base.model.named_parameters(remove_duplicate=False))
    head = _read(folder, HEAD, base.spec)
    odd = [
        n
        for n, t in head.items()
        if n not in own or own[n].shape != t.shape or not torch.equal(t.to(own[n].dtype), base.parameter(n).cpu())
    ]
    return [f"{HEAD}: {n} is not the base's own head, and a trained head is not carried over" for n in odd]


# ---- what the config says ----


def _file_problems(names: Sequence[str]) -> list[str]:
    problems = [f"{n} is a pickle, which can run code when it is read; it never is here" for n in names if n in PICKLES]
    problems += [f"{WEIGHTS} is missing"] if WEIGHTS not in names else []
    return problems + [f"{n}: a fusion of several adapters has no counterpart" for n in names if n == "adapter_fusion_config.json"]


def _fix(names: Sequence[str]) -> str:
    if any(n in PICKLES for n in names):
        return "save it anew where it was made: model.save_adapter(folder, name, with_head=False, use_safetensors=True)"
    return "train anew with method: bottleneck or lora"


def _config_problems(config: Mapping[str, Any], options: Mapping[str, Any], kind: str, spec: Spec) -> list[str]:
    version, model_type = config.get("version"), config.get("model_type")
    problems = []
    if not isinstance(version, str) or not version.startswith("adapters."):
        problems.append(f"version = {str(version)[:40]!r}: only 'adapters.…' is read; older packages meant other things by the same words")
    if model_type != spec.model_type or spec.model_type not in FAMILIES:
        problems.append(f"model_type = {str(model_type)[:40]!r}: this base is {spec.model_type}; {', '.join(FAMILIES)} can be carried over")
    if config.get("hidden_size") not in (None, spec.hidden_size):
        problems.append(f"hidden_size = {config['hidden_size']!r}: this base has {spec.hidden_size}")
    if options.get("architecture") not in (None, "lora"):
        return [
            *problems,
            f"architecture = {str(options['architecture'])[:40]!r}: only bottleneck adapters, LoRA and (IA)³ are carried over",
        ]
    for key, value in options.items():
        if key in SUPPORTED[kind]:
            allowed, meaning = SUPPORTED[kind][key]
            if not any(value is a or (isinstance(a, str) and value == a) for a in allowed):
                problems.append(f"{key} = {str(value)[:40]!r}: {meaning}")
        elif key not in READ[kind] | TRAINING:
            problems.append(f"{str(key)[:40]} = {str(value)[:40]!r} is not known here")
    problems += [f"{key} is missing" for key in sorted((READ[kind] | set(SUPPORTED[kind])) - set(options))]
    return problems if problems else (_bottleneck_problems if kind == "bottleneck" else _lora_problems)(options, spec)


def _bottleneck_problems(options: Mapping[str, Any], spec: Spec) -> list[str]:
    problems = [] if layers_of(options, spec) else ["leave_out leaves no layer"]
    if not isinstance(options["non_linearity"], str) or options["non_linearity"] not in ACTIVATIONS:
        problems.append(f"non_linearity = {str(options['non_linearity'])[:40]!r}: carried over are {', '.join(ACTIVATIONS)}")
    if not isinstance(options["scaling"], float) or not 0 < abs(options["scaling"]) < 2**20:
        problems.append(f"scaling = {str(options['scaling'])[:40]!r}: only a number other than 0 is carried over, not a learnt scaling")
    if not _number(options["reduction_factor"]):
        problems.append(f"reduction_factor = {str(options['reduction_factor'])[:40]!r}: only one number for all layers is carried over")
    if not (options["mh_adapter"] is True or options["output_adapter"] is True):
        problems.append("neither mh_adapter nor output_adapter is on")
    return problems


def _lora_problems(options: Mapping[str, Any], spec: Spec) -> list[str]:
    problems = [] if layers_of(options, spec) else ["leave_out leaves no layer"]
    problems += [f"{k} = {str(options[k])[:40]!r}: a number above 0 is expected" for k in ("r", "alpha") if not _number(options[k])]
    problems += [f"r = {options['r']}: a whole number is expected"] if isinstance(options["r"], float) else []
    if not (isinstance(options["attn_matrices"], list) and set(map(str, options["attn_matrices"])) <= {"q", "k", "v"}):
        problems.append(f"attn_matrices = {str(options['attn_matrices'])[:40]!r}: names of q, k and v are expected")
    return problems


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 2**20
