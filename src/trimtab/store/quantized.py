"""A dense base written with packed linear layers, as bitsandbytes stores them: a folder that transformers reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import nn

from trimtab.bases import load
from trimtab.bases.fingerprint import fingerprint_folder
from trimtab.bases.weights import stored_state
from trimtab.bases.weights.packed import PackedLinear
from trimtab.errors import BaseError
from trimtab.store.staging import staged


@dataclass(frozen=True)
class QuantizeReport:
    """What was written. dense: modules whose matrices are as they were. bytes: of the weights. fingerprint: of the new base, which is that
    of the dense one loaded with `quantize`."""

    folder: Path
    to: str
    packed: int
    dense: tuple[str, ...]
    bytes: int
    fingerprint: str


def write_quantized(base: str, folder: Path, to: str, *, dtype: str = "auto") -> QuantizeReport:
    """Write `base` (a name, folder or hub id) with its linear layers packed in the format `to` (see `bases.recipes.BITS`). dtype: of what
    stays dense, and what the layers compute in; "auto": as stored.

    Embedding, output head, norms and experts stay dense: bitsandbytes packs no experts. What is written has the
    fingerprint of what was computed, else BaseError, and nothing is left. ConfigError where the format is not known, or the base is packed
    already.
    """
    loaded = load(base, dtype=dtype, device="cpu", quantize=to, experts=False)
    linear = {n: m for n, m in loaded.model.named_modules() if isinstance(m, nn.Linear | PackedLinear)}
    dense = tuple(n for n, m in linear.items() if not isinstance(m, PackedLinear))
    with staged(folder) as work:
        tied = list(loaded.model.all_tied_weights_keys)
        save_torch_state_dict(stored_state(loaded.model), work, shared_tensors_to_discard=tied)
        config = loaded.model.config.to_dict() | {"quantization_config": _settings(to, loaded.dtype, dense)}
        (work / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
        if loaded.model.generation_config is not None:
            loaded.model.generation_config.save_pretrained(work)
        loaded.tokenizer.save_pretrained(work)
        if (found := fingerprint_folder(work)) != loaded.fingerprint:
            raise BaseError(f"what was written has fingerprint {found}, and what was computed {loaded.fingerprint}", fix="try again")
        size = sum(f.stat().st_size for f in work.glob("*.safetensors"))
    return QuantizeReport(Path(folder), to, len(linear) - len(dense), dense, size, loaded.fingerprint)


def _settings(to: str, dtype: torch.dtype, dense: tuple[str, ...]) -> dict[str, Any]:
    """transformers' `quantization_config`."""
    four, name = to != "int8", str(dtype).removeprefix("torch.")
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "bnb_4bit_quant_type": to.partition("-")[0] if four else "nf4",
        "bnb_4bit_use_double_quant": to.endswith("-double"),
        "bnb_4bit_compute_dtype": name,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": list(dense),
    }
