"""The text tower of a multimodal base: of a model that also sees or hears, the causal language model alone.

Its class is the one that transformers has for the config of the text. Weights of the other parts are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from trimtab.bases.folder import read_header, weight_files
from trimtab.bases.load_hooks import forget_quantization, load_options
from trimtab.bases.recipes import refuse_packed
from trimtab.bases.shared_load import ByLayer
from trimtab.bases.stored import Packing
from trimtab.bases.stored_formats import settings_of, without_settings
from trimtab.errors import BaseError
from trimtab.places.shards import Shards

IN_BOTH_DIRECTIONS = ("paligemma",)
"""Families that read a prompt in both directions, which their text tower alone does not."""
NAMES = {r"^language_model\.lm_head\.": "lm_head."} | dict.fromkeys(
    (r"^language_model\.model\.", r"^model\.language_model\.", r"^model\.text_model\."), "model."
)
"""What folders call the text tower's tensors -> what its own class calls them."""


KIN: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen2_vl_text": ("qwen2", {}),
    "qwen2_5_vl_text": ("qwen2", {}),
    "qwen3_vl_text": ("qwen3", {}),
    "glm4v_text": ("glm4", {"attention_bias": True}),
    "glm4v_moe_text": ("glm4_moe", {}),
}
"""Text towers without a causal language model of their own -> the family that computes the same of text, and what their config leaves
unsaid. They place a token by three numbers, which are equal where there is text alone."""
OF_THREE = ("mrope_section", "mrope_interleaved")


def text_config(config: Any) -> Any:
    """The config of a base's causal language model: that of the text tower where the base has more, else the config itself. BaseError where
    the tower alone would not do what the whole does with text."""
    text = config.get_text_config()
    if text is config:
        return config
    if config.model_type in IN_BOTH_DIRECTIONS:
        raise BaseError(
            f"{config.model_type} models read a prompt in both directions: only causal attention is supported",
            fix="use the language model that it was made from",
        )
    if text.model_type in KIN:
        text = _of_kin(text)
    if type(text) not in AutoModelForCausalLM._model_mapping:
        raise BaseError(
            f"the text tower of this {config.model_type} model is a {text.model_type}, of which transformers has no causal language model",
            fix="use a base of text alone",
        )
    text.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", getattr(text, "tie_word_embeddings", False)))
    return text


def _of_kin(text: Any) -> Any:
    """The config of the family that computes the same of text."""
    family, unsaid = KIN[text.model_type]
    said = {k: v for k, v in text.to_dict().items() if k not in ("model_type", "architectures", "transformers_version")}
    rope = {k: v for k, v in (said.get("rope_parameters") or {}).items() if k not in OF_THREE}
    if rope.get("rope_type") == "mrope":
        rope["rope_type"] = "default"
    heads = {"head_dim": said.get("head_dim") or text.hidden_size // text.num_attention_heads}
    return AutoConfig.for_model(family, **{**said, **heads, **unsaid, "rope_parameters": rope})


def _names_of_the_whole(config: Any, text: Any) -> None:
    """Let transformers put together a tower's weights as it does the whole model's, where it has a table for the whole alone."""
    if text.model_type == f"{config.model_type}_text" and get_checkpoint_conversion_mapping(text.model_type) is None:
        whole = get_checkpoint_conversion_mapping(config.model_type) or []
        own = [t for t in whole if not all(p.startswith("^") for p in t.source_patterns)]  # those are of prefixes, which `NAMES` has
        if own:
            register_checkpoint_conversion_mapping(text.model_type, own)


def load_causal(
    folder: Path,
    *,
    device: torch.device | None = None,
    quantize: str | None = None,
    experts: bool = True,
    shards: Shards | None = None,
    **options: Any,
) -> Any:
    """What `AutoModelForCausalLM.from_pretrained` returns for a folder; for a multimodal one, its text tower. Layers that the folder has
    packed are packed; quantize: a format that dense ones are brought into, experts: experts too. device: where the weights go, dense ones
    straight from the files; None: the CPU. shards: share the model out while it is read."""
    options |= {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    settings, text = settings_of(config, folder), text_config(config)
    if text is not config:
        stored = [t.name for file in weight_files(folder) for t in read_header(file)]
        text.tie_word_embeddings = not any(name.endswith("lm_head.weight") for name in stored)
        if isinstance(config.dtype, torch.dtype) and text.dtype is None:
            text.dtype = config.dtype
        options |= {"config": text, "key_mapping": NAMES}
        _names_of_the_whole(config, text)
    refuse_packed(quantize, settings, str(folder))
    packed = settings is not None or quantize is not None
    by_layer = None if shards is None else ByLayer(folder, shards, device or torch.device("cpu"))
    if by_layer is not None and not packed:
        options |= load_options(by_layer)
    if packed:
        dtype = text.dtype if options.get("dtype") == "auto" else options.get("dtype")
        packing = Packing(folder, dtype or torch.float32, settings, quantize, NAMES if text is not config else {}, experts, by_layer)
        options |= {"config": without_settings(text), "dtype": packing.dtype} | load_options(packing)
    there = device is not None and device.type != "cpu"
    if there and not packed and shards is None:
        options["device_map"] = {"": device}
    made = AutoModelForCausalLM.from_pretrained(folder, **options)
    model: Any = made[0] if isinstance(made, tuple) else made
    if packed or by_layer is not None:
        forget_quantization(model)
    if by_layer is not None:
        by_layer.finish(model)
    elif packed and there:
        model.to(device)
    if text is not config and hasattr(model, "_weight_conversions"):
        del model._weight_conversions  # by which the tower would be written under the names of the whole
    return made
