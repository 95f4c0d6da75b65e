"""How programs write packed layers: by a folder's `quantization_config`, what reads them, and how many bits an entry takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.bases.quantization_notes import settings_beside
from trimtab.bases.recipes import BITS
from trimtab.bases.spec import Kind
from trimtab.bases.weights import compressed, four_bit, fp8, gguf_blocks, int4, int8, mxfp4
from trimtab.bases.weights.packed import PackedLinear
from trimtab.errors import BaseError

Read = Callable[[Mapping[str, Tensor], tuple[int, int], Tensor | None, torch.dtype, Mapping[str, Any]], PackedLinear]


@dataclass(frozen=True)
class Stored:
    """How a program writes packed layers, or the experts alone. marks: ends of tensors' names that only packed ones have. read: tensors by
    their names after the module's, shape, bias, dtype, the folder's `quantization_config` -> the layer; ValueError where they do not fit
    each other."""

    marks: tuple[str, ...]
    read: Read
    experts: bool = False


def _plain(read: Callable[..., PackedLinear]) -> Read:
    return lambda tensors, shape, bias, dtype, _: read(tensors, shape, bias, dtype)


STORED: Mapping[str, Stored] = {
    "bitsandbytes_4bit": Stored((".weight.absmax",), _plain(four_bit.read)),
    "bitsandbytes_8bit": Stored((".SCB",), _plain(int8.read)),
    "fp8": Stored((".weight_scale_inv", ".weight_scale"), fp8.read),
    "fbgemm_fp8": Stored((".weight_scale",), fp8.read),
    "compressed-tensors": Stored((".weight_packed", ".weight_scale"), compressed.read),
    "gptq": Stored((".qweight",), int4.read_gptq),
    "awq": Stored((".qweight",), int4.read_awq),
    "mxfp4": Stored(("_blocks",), mxfp4.read, experts=True),
    "gguf": Stored(tuple(f".{name}" for name in gguf_blocks.BLOCKS), _plain(gguf_blocks.read)),
}
"""`quant_method` of a config, with the number of bits where one program has two ways -> how its layers are read."""


def method_of(settings: Mapping[str, Any]) -> str:
    """The key of `STORED` for a `quantization_config`. BaseError where that program's layers are not read."""
    method = str(settings.get("quant_method"))
    if method == "bitsandbytes" or settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        method = "bitsandbytes_8bit" if settings.get("load_in_8bit") else "bitsandbytes_4bit"
    if method not in STORED:
        raise BaseError(
            f"the base is quantised in a way that trimtab does not read: quant_method {method!r}",
            fix=f"use a base that is quantised with one of {', '.join(STORED)}, or the dense one with `quantize: nf4`",
        )
    if method == "compressed-tensors":
        compressed.check_settings(settings)
    return method


def bits_of(settings: Mapping[str, Any]) -> float:
    """How many bits an entry of a packed layer takes, as far as a `quantization_config` tells."""
    method = method_of(settings)
    if method == "bitsandbytes_4bit":
        return BITS["nf4-double" if settings.get("bnb_4bit_use_double_quant") else "nf4"]
    if method in ("gptq", "awq"):
        try:
            bits, size = int4.told(settings)
        except ValueError as error:
            fix = "check that config.json is whole, or quantize_config.json or quant_config.json where the folder has it"
            raise BaseError(f"the base's quantization_config cannot be read: {error}", fix=fix) from None
        return max(bits, 4) + (40 / size if size else 0)
    if method == "compressed-tensors":
        return compressed.bits_of(settings)
    if method == "mxfp4":
        return 4.25
    bits = settings.get("bits", 8)  # of a .gguf file it is trimtab that writes them
    return float(bits) if method == "gguf" and type(bits) in (int, float) and 0 < bits <= 32 else 8.0


def kinds_of(settings: Mapping[str, Any]) -> tuple[Kind, ...]:
    """What a folder with this `quantization_config` has packed, as kinds of a `Spec`'s modules."""
    method = method_of(settings)
    if STORED[method].experts:
        return ("experts",)
    return ("linear",) if method == "gguf" or in_an_order(settings) else ("linear", "experts")


def in_an_order(settings: Mapping[str, Any]) -> bool:
    """Whether the groups of inputs are in an order of each matrix' own, so that experts do not stay packed. One group has no order."""
    schemes = settings.get("config_groups")
    found = [s.get("weights") for s in schemes.values() if isinstance(s, Mapping)] if isinstance(schemes, Mapping) else []
    several = settings.get("group_size", 128) not in (-1, None)
    return bool(settings.get("desc_act") and several) or any(
        isinstance(w, Mapping) and w.get("actorder") in ("group", "dynamic") for w in found
    )


def settings_of(config: Any, folder: Path | None) -> dict[str, Any] | None:
    """A config's `quantization_config` as a dict, or what a file beside it says in its folder; None where the base is dense."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        made = None if folder is None else settings_beside(folder)
    else:
        made = found if isinstance(found, dict) else found.to_dict()
    if made is not None:
        method_of(made)
    return made


def without_settings(config: Any) -> Any:
    """A config without its `quantization_config`: how to read the weights is `Packing`'s to know."""
    vars(config).pop("quantization_config", None)
    return config
