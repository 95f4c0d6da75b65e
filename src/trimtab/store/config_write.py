"""From a method to its `adapter_config.json`. Everything that peft would otherwise look up or guess is written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.bases.spec import Spec
from trimtab.methods import Head, IA3Config, LoraConfig, Method, PrefixTuningConfig, PromptTuningConfig
from trimtab.methods.base import Site

PEFT_VERSION = "0.21.2"
"""The version whose keys are written."""


def config_from_method(
    method: Method, sites: Sequence[Site], spec: Spec, base_name: str | None, head: Head | None = None
) -> dict[str, Any]:
    """What adapter_config.json says of a method on a base: peft's keys, or trimtab's own fields for a method that peft lacks."""
    config: dict[str, Any] = {
        "peft_type": method.peft_type,
        "task_type": head.task if head else "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "auto_mapping": None,
        "revision": None,
    }
    if not method.in_peft:
        fields = method.to_dict()
        assert not config.keys() & fields.keys(), f"a field of {type(method).__name__} has the name of one of peft's own keys"
        return config | fields | ({"modules_to_save": [head.module]} if head else {})
    config["peft_version"] = PEFT_VERSION
    if isinstance(method, LoraConfig):
        return config | _lora_config(method, sites, spec)
    if isinstance(method, IA3Config):
        return config | _ia3_config(method, sites, spec)
    return config | _virtual_config(method, spec) | {"modules_to_save": [head.module] if head else None}


def _targets(method: LoraConfig | IA3Config, sites: Sequence[Site], spec: Spec) -> str | list[str]:
    """target_modules as peft resolves it to the same modules. Anything that peft might read otherwise is written as the full names."""
    plain = method.exclude_modules is None and getattr(method, "layers_to_transform", None) is None
    plain = plain and not (method.target_modules == "all-linear" and any(s.head for s in sites))  # peft takes some heads for one of them
    plain = plain and not (method.target_modules == "all-linear" and any(m.routes for m in spec.modules.values()))  # which peft takes too
    if plain and method.target_modules is None:
        return list(spec.defaults.lora_targets)
    if plain and (method.target_modules == "all-linear" or not isinstance(method.target_modules, str)):
        return method.target_modules if isinstance(method.target_modules, str) else list(method.target_modules or ())
    return [s.name for s in sites if not s.saved and not s.experts and not s.by_weight]


def _targeted_config(method: LoraConfig | IA3Config, sites: Sequence[Site], spec: Spec) -> dict[str, Any]:
    saved = [s.name for s in sites if s.saved]
    conv1d = any(spec.modules[s.name].kind == "conv1d" for s in sites if not s.saved)
    return {"exclude_modules": None, "fan_in_fan_out": conv1d, "modules_to_save": saved or None}


def _lora_config(method: LoraConfig, sites: Sequence[Site], spec: Spec) -> dict[str, Any]:
    alphas = {k: _whole(v) for k, v in method.alpha_pattern.items()}
    return _targeted_config(method, sites, spec) | {
        "r": method.r,
        "lora_alpha": _whole(method.alpha),
        "lora_dropout": 0.0 if method.target_parameters else method.lora_dropout,  # which peft refuses there, even without training
        "target_modules": _targets(method, sites, spec),
        "rank_pattern": dict(method.rank_pattern),
        "alpha_pattern": alphas,
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_rslora": method.use_rslora,
        "use_dora": method.use_dora,
        "bias": "none",
        "lora_bias": False,
        "init_lora_weights": True,
        "trainable_token_indices": None,
        "alora_invocation_tokens": list(method.invocation) or None,
        "target_parameters": list(method.target_parameters) if method.target_parameters else None,
        "layer_replication": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "loftq_config": {},
        "eva_config": None,
        "corda_config": None,
        "use_qalora": False,
        "qalora_group_size": 16,
    }


def _ia3_config(method: IA3Config, sites: Sequence[Site], spec: Spec) -> dict[str, Any]:
    default = method.target_modules is None and method.feedforward_modules is None and method.exclude_modules is None
    names = [s.name for s in sites if not s.saved]
    return _targeted_config(method, sites, spec) | {
        "target_modules": list(spec.defaults.ia3_targets) if default else names,
        "feedforward_modules": list(spec.defaults.ia3_feedforward) if default else [s.name for s in sites if s.feedforward],
        "init_ia3_weights": True,
    }


def _virtual_config(method: Method, spec: Spec) -> dict[str, Any]:
    assert isinstance(method, (PromptTuningConfig, PrefixTuningConfig))
    config: dict[str, Any] = {
        "num_virtual_tokens": method.num_virtual_tokens,
        "num_transformer_submodules": 1,
        "num_layers": spec.num_layers,
        "modules_to_save": None,
    }
    if isinstance(method, PromptTuningConfig):
        # RANDOM: on loading, peft would otherwise ask for the tokenizer of TEXT only to overwrite what it makes of it
        start = {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None, "tokenizer_kwargs": None}
        return config | start | {"token_dim": spec.hidden_size, "num_attention_heads": spec.layers[0].num_heads}
    shape = {"token_dim": spec.kv_width, "num_attention_heads": spec.kv_shape[0]}
    return config | shape | {"encoder_hidden_size": spec.kv_width, "prefix_projection": False}


def _whole(value: float) -> float | int:
    """8 rather than 8.0, which is how peft writes an alpha."""
    return int(value) if float(value).is_integer() else value
