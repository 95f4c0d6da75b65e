"""What an adapter_config.json names and this base lacks, and options that only training needed: ignored, each with a warning.

People write one config for many bases (`target_modules: [q_proj, c_attn, query_key_value]`), and trainers leave their own options in it.
peft ignores such names silently. Ignoring them is safe here because the tensors decide: if a name meant something, the file has tensors for
it. These then belong to no module and are refused (`tensors.layout_problems`). Run files are read elsewhere and stay strict.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trimtab.bases.spec import Spec
from trimtab.methods.base import Site
from trimtab.methods.targets import matches, parameters_of_experts, stray_keys
from trimtab.patterns import regex_problem
from trimtab.store.names import short_repr

TRAINING_ONLY = frozenset(
    {"runtime_config", "megatron_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"}
)
"""LoRA's options that say where it ran, how its tensors began or how its gradients were stored. It is in the tensors by now."""
SHOWN = 8


def training_leftovers(config: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {short_repr(config[key])} mattered in training only" for key in sorted(TRAINING_ONLY & set(config)) if config[key]]


def without_strangers(fields: Mapping[str, Any], spec: Spec) -> tuple[dict[str, Any], list[str]]:
    """A config's fields, of the right types, without names that match no module of the base; and a warning for each option with such names.

    Where nothing would be left to act on, the option stays as it is, for the method to refuse.
    """
    found, warnings = dict(fields), list[str]()
    if saved := found.get("modules_to_save"):
        found["modules_to_save"], stray = _saved_names(saved, spec)
        warnings += [f"modules_to_save: {_listed(stray)} in this base, left out"] if stray else []
    for option in ("target_modules", "target_parameters", "feedforward_modules", "exclude_modules"):
        wanted = found.get(option)
        if not wanted or wanted == "all-linear" or (isinstance(wanted, str) and regex_problem(wanted)):
            continue
        names = [wanted] if isinstance(wanted, str) else list(wanted)
        there = [m.name for m in parameters_of_experts(spec)] if option == "target_parameters" else spec.modules
        kept = [n for n in names if any(matches(m, wanted if isinstance(wanted, str) else [n]) for m in there)]
        last = option == "target_modules" or (option == "target_parameters" and not found.get("target_modules"))
        if len(kept) == len(names) or (last and not kept):
            continue
        warnings.append(f"{option}: {_listed(n for n in names if n not in kept)} in this base, left out")
        found[option] = kept if kept or option == "feedforward_modules" else None
    layers = found.get("layers_to_transform")
    if isinstance(layers, list):
        there = [i for i in layers if 0 <= i < spec.num_layers]
        if there and len(there) < len(layers):
            gone = [str(i) for i in layers if i not in there]
            warnings.append(f"layers_to_transform: layers {', '.join(gone[:SHOWN])} are not in this base of {spec.num_layers}, left out")
            found["layers_to_transform"] = there
    return found, warnings


def _saved_names(names: Sequence[str], spec: Spec) -> tuple[list[str] | None, list[str]]:
    """(`modules_to_save` as the methods here read it, those of its names that match no module).

    peft takes every module whose name ends in the text ("norm" also matches "input_layernorm", and "q_norm" in Qwen3), and everything
    inside a container ("mlp"). Such a name is replaced by the full names of the modules that it means.
    """
    containers = {".".join(parts[:i]) for m in spec.modules for parts in (m.split("."),) for i in range(1, len(parts))}
    kept, stray = list[str](), list[str]()
    for name in names:
        inside = tuple(f"{c}." for c in containers if name and c.endswith(name))
        meant = [m for m in spec.modules if name and (m.endswith(name) or m.startswith(inside))]
        kept += [name] if meant and meant == [m for m in spec.modules if matches(m, [name])] else meant
        stray += [] if meant else [name]
    return list(dict.fromkeys(kept)) or None, stray


def without_stray_keys(fields: Mapping[str, Any], spec: Spec, targeted: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The same for keys of rank_pattern and alpha_pattern that match none of the modules acted on."""
    found, warnings = dict(fields), list[str]()
    for option in ("rank_pattern", "alpha_pattern"):
        pattern = found.get(option) or {}
        some = bool(stray_keys(spec, option, pattern, targeted))  # a table may have an entry for each module: one look for all of them
        stray = {key for key in pattern if some and stray_keys(spec, option, {key: None}, targeted)}
        if stray:
            warnings.append(f"{option}: {_listed(k for k in pattern if k in stray)} that the adapter acts on, left out")
        found[option] = {key: value for key, value in pattern.items() if key not in stray}
    return found, warnings


def high_ranks(sites: Sequence[Site], spec: Spec) -> list[str]:
    """One warning where ranks are above a module's smaller side: it is computed as it is, but could be compressed without loss."""
    sides = {s.name: min(spec.modules[s.name].in_features, spec.modules[s.name].out_features) for s in sites if not s.saved}
    high = [s for s in sites if not s.saved and s.rank > sides[s.name]]
    if not high:
        return []
    first = high[0]
    return [
        f"rank {first.rank} is above the smaller side, {sides[first.name]}, of {first.name} ({len(high)} modules in all have such ranks)"
    ]


def _listed(names: Iterable[str]) -> str:
    found = list(dict.fromkeys(names))
    shown = ", ".join(short_repr(n) for n in found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
    return f"{shown} {'matches' if len(found) == 1 else 'match'} no module"
