"""From an `adapter_config.json`, peft's or ours, to a method.

Fields that are missing get peft's defaults, not trimtab's. An option that changes the mathematics and that trimtab does not have is refused
by name, so that an adapter that loads computes what it computed where it was trained. An option without effect on this base gives a
warning.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast, get_type_hints

from pydantic import TypeAdapter, ValidationError

from trimtab.bases.spec import Spec
from trimtab.errors import AdapterError, ConfigError, nearest
from trimtab.methods import METHODS, IA3Config, LoraConfig, Method, PrefixTuningConfig, PromptTuningConfig
from trimtab.methods.targets import key_problem, matches, saved_sites, select
from trimtab.store.foreign import TRAINING_ONLY, high_ranks, training_leftovers, without_strangers, without_stray_keys
from trimtab.store.names import short_repr

MAX_ENTRIES, MAX_TEXT = 4096, 4096
"""Entries of a list or a pattern table, characters of a name or regular expression, that a config may hold."""

COMMON = frozenset({"peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version"})
IGNORED: Mapping[str, frozenset[str]] = {
    # how tensors were initialised or where they were trained: it is in the tensors by now
    "LORA": TRAINING_ONLY | {"fan_in_fan_out", "init_lora_weights", "megatron_core", "qalora_group_size"},
    "IA3": frozenset({"fan_in_fan_out", "init_ia3_weights"}),
    "PROMPT_TUNING": frozenset({"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}),
    "PREFIX_TUNING": frozenset({"prefix_projection", "encoder_hidden_size", "init_weights"}),
}
CHECKED: Mapping[str, frozenset[str]] = {
    "LORA": frozenset({"bias", "layers_pattern", "ensure_weight_tying"}),
    "PROMPT_TUNING": frozenset({"num_transformer_submodules", "num_layers", "token_dim", "num_attention_heads"}),
    "PREFIX_TUNING": frozenset({"num_transformer_submodules", "num_layers", "token_dim", "num_attention_heads"}),
}
HARMLESS_INITS = ("gaussian", "orthogonal", "eva", "mica")
"""init_lora_weights besides true and false that leave the base's weights alone. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change them."""


def method_from_config(config: Mapping[str, Any], spec: Spec, where: str) -> tuple[Method, list[str]]:
    """(the method that an adapter_config.json asks for, a warning for all that it names and that means nothing on this base).

    AdapterError, with every finding, if it asks for what trimtab does not have.
    """
    kind = config.get("peft_type")
    if kind is None and "config" in config:
        fix = "trimtab adapters import FOLDER TARGET carries it over where trimtab has the same mathematics"
        raise AdapterError(
            f"{where}: adapter_config.json is one of AdapterHub's `adapters` package (version {config.get('version')!r}), not peft's",
            fix=fix,
        )
    if not isinstance(kind, str) or kind not in METHODS:
        known = ", ".join(METHODS)
        hint = nearest(kind, METHODS) if isinstance(kind, str) else ""
        raise AdapterError(f"{where}: peft_type = {kind!r} is not a method that trimtab has{hint}", fix=f"methods there are: {known}")
    cls = METHODS[kind]
    fields = {f.name for f in dataclasses.fields(cls)}
    if kind == "PREFIX_TUNING":
        fields -= {"prefix_projection", "encoder_hidden_size"}  # what is saved is the projection's output
    fields -= {"init_lora_weights", "eva_config"}  # where training started
    known_keys = COMMON | IGNORED.get(kind, frozenset()) | CHECKED.get(kind, frozenset()) | fields
    problems = [
        f"{key} = {short_repr(value)} is not supported" for key, value in config.items() if key not in known_keys and not _neutral(value)
    ]
    problems += _text_problems(config, fields) or type_problems(cls, {k: config[k] for k in config if k in fields})
    warnings = training_leftovers(config) if kind == "LORA" else []
    task = config.get("task_type")
    if not isinstance(task, str | None):
        problems.append(f"task_type = {short_repr(task)} is no name of a task")
    elif task not in (None, "CAUSAL_LM"):
        warnings.append(f"task_type = {short_repr(task)}: it is read as CAUSAL_LM, since its tensors fit this base")
    problems += _CHECKS.get(kind, lambda config, spec, warnings: [])(config, spec, warnings)
    if not problems:
        try:
            return (_READERS[kind](config, spec, warnings) if cls.in_peft else _read_own(cls, config)), warnings
        except ConfigError as error:
            problems = list(error.problems) or [error.message]
    raise AdapterError(f"{where}: adapter_config.json cannot be used", problems=problems)


def type_problems(cls: type[Method], fields: Mapping[str, Any]) -> list[str]:
    """Fields whose JSON value is not of the field's own type, one line each. A run file may say "8" for 8; of a file that other programs
    read too, each would make something else of "no" for a switch, or of true for a scaling."""
    problems, kind = [], cast(Any, cls)  # dataclasses have a __hash__ that type checkers do not see
    for name, types in _json_types(kind).items():
        if fields.get(name) is not None:
            try:
                types.validate_json(json.dumps(fields[name]), strict=True)
            except ValidationError as error:
                reasons = "; ".join(dict.fromkeys(e["msg"] for e in error.errors()[:3]))
                problems.append(f"{name} = {short_repr(fields[name])}: {reasons}")
    return problems


@lru_cache
def _json_types(cls: type[Method]) -> dict[str, TypeAdapter]:
    hints = get_type_hints(cls)
    return {f.name: TypeAdapter(hints[f.name]) for f in dataclasses.fields(cls)}


def _neutral(value: Any) -> bool:
    """Whether an option that trimtab does not know is off."""
    return value is None or value is False or value in ("", [], {})


def _text_problems(config: Mapping[str, Any], fields: set[str]) -> list[str]:
    """Names and regular expressions from a file are matched against every module: bound their number and length."""
    problems = []
    for key in sorted(fields & set(config)):
        value = config[key]
        texts = [value] if isinstance(value, str) else list(value) if isinstance(value, (list, dict)) else []
        if len(texts) > MAX_ENTRIES or any(isinstance(t, str) and len(t) > MAX_TEXT for t in texts):
            problems.append(
                f"{key} has {len(texts):,} entries or one that is too long; at most {MAX_ENTRIES:,} of {MAX_TEXT:,} characters are read"
            )
        elif key.endswith("_pattern") and isinstance(value, dict):
            problems += [f"{key}: {short_repr(t)} {problem}" for t in texts if isinstance(t, str) and (problem := key_problem(t))]
    return problems


def _lora_problems(config: Mapping[str, Any], spec: Spec, warnings: list[str]) -> list[str]:
    problems, bias = [], config.get("bias") or "none"
    if bias in ("all", "lora_only") and not any("bias" in m.parameters for m in spec.modules.values()):
        warnings.append(f"bias = {bias!r}: this base has no biases")
    elif bias != "none":
        problems.append(f"bias = {short_repr(bias)}: trained biases are not supported, only 'none'")
    init = config.get("init_lora_weights", True)
    if not isinstance(init, bool) and init is not None and str(init).lower() not in HARMLESS_INITS:
        problems.append(
            f"init_lora_weights = {init!r} changed the base's weights in initialising, so the adapter does not fit the base as it is; "
            "save it with peft's path_initial_model_for_weight_conversion"
        )
    layer_name = spec.layer_list.rpartition(".")[2]
    pattern = config.get("layers_pattern")
    if pattern not in (None, [], "", layer_name, [layer_name]):
        found = warnings if config.get("layers_to_transform") in (None, []) else problems
        found.append(f"layers_pattern = {short_repr(pattern)}: this base's layers are {layer_name!r}")
    if config.get("ensure_weight_tying") and spec.tied_head:
        problems.append("ensure_weight_tying = True is not supported on a base whose head is tied to its embedding")
    return problems


def _virtual_problems(config: Mapping[str, Any], spec: Spec, warnings: list[str]) -> list[str]:
    prefix = config["peft_type"] == "PREFIX_TUNING"
    wanted = {"num_transformer_submodules": 1, "num_layers": spec.num_layers, "token_dim": spec.kv_width if prefix else spec.hidden_size}
    if prefix:
        wanted["num_attention_heads"] = spec.kv_shape[0]
    problems = [
        f"{k} = {short_repr(config[k])}: this base needs {v}" for k, v in wanted.items() if config.get(k) is not None and config[k] != v
    ]
    if config.get("num_virtual_tokens") is None:
        problems.append("num_virtual_tokens is missing")
    return problems


def _fields(cls: type[Method], config: Mapping[str, Any]) -> dict[str, Any]:
    """The config's values for the method's fields; null and peft's other spellings of "not set" left out."""
    meant = {"feedforward_modules"} | ({"target_modules"} if config.get("target_parameters") else set())  # where an empty list means: none
    names = [f.name for f in dataclasses.fields(cls) if f.name not in ("init_lora_weights", "eva_config")]
    return {n: config[n] for n in names if n in config and not (config[n] is None or (config[n] == [] and n not in meant))}


def _read_lora(config: Mapping[str, Any], spec: Spec, warnings: list[str]) -> Method:
    fields, strange = without_strangers({"r": 8, "lora_alpha": 8, "target_modules": None} | _fields(LoraConfig, config), spec)
    # which modules it acts on is known without the patterns, and must be, to tell which of their keys match none
    places = _without_saved(LoraConfig(**fields | {"rank_pattern": {}, "alpha_pattern": {}}), spec)
    fields, stray = without_stray_keys(fields, spec, [s.named for s in places.sites(spec) if not s.saved])
    method = replace(places, rank_pattern=fields["rank_pattern"], alpha_pattern=fields["alpha_pattern"])
    warnings += strange + stray + high_ranks(method.sites(spec), spec)
    return method


def _read_ia3(config: Mapping[str, Any], spec: Spec, warnings: list[str]) -> Method:
    fields, strange = without_strangers(_fields(IA3Config, config), spec)
    warnings += strange
    return _without_saved(IA3Config(**fields), spec)


def _without_saved(method: Any, spec: Spec) -> Any:
    """peft lets modules_to_save win over target_modules; here the two must not overlap, so name the rest."""
    saved = {s.name for s in saved_sites(spec, method.modules_to_save)}
    targets = method.target_modules
    if not saved or targets is None or not any(matches(n, targets) if targets != "all-linear" else n in spec.linears for n in saved):
        return method
    layers = getattr(method, "layers_to_transform", None)
    kinds = ("linear", "conv1d", "embedding")
    rest = [m.name for m in select(spec, targets, excluded=method.exclude_modules, layers=layers, kinds=kinds) if m.name not in saved]
    return replace(method, target_modules=tuple(rest), exclude_modules=None)


def _read_prompt(config: Mapping[str, Any], spec: Spec, warnings: list[str]) -> Method:
    return PromptTuningConfig(num_virtual_tokens=config["num_virtual_tokens"], prompt_tuning_init="RANDOM")


def _read_prefix(config: Mapping[str, Any], spec: Spec, warnings: list[str]) -> Method:
    return PrefixTuningConfig(num_virtual_tokens=config["num_virtual_tokens"], prefix_init="RANDOM")


def _read_own(cls: type[Method], config: Mapping[str, Any]) -> Method:
    """A method that peft lacks: its fields stand in the config as they are."""
    return cls(**{f.name: config[f.name] for f in dataclasses.fields(cls) if f.name in config})


_CHECKS: Mapping[str, Callable[[Mapping[str, Any], Spec, list[str]], list[str]]] = {
    "LORA": _lora_problems,
    "PROMPT_TUNING": _virtual_problems,
    "PREFIX_TUNING": _virtual_problems,
}
_READERS: Mapping[str, Callable[[Mapping[str, Any], Spec, list[str]], Method]] = {
    "LORA": _read_lora,
    "IA3": _read_ia3,
    "PROMPT_TUNING": _read_prompt,
    "PREFIX_TUNING": _read_prefix,
}
