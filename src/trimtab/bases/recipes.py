"""The names of the formats that a dense base can be quantised to while it is loaded, and what they take; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.errors import ConfigError, nearest

_SCALE, _DOUBLE_SCALE = 32 / 64, 8 / 64 + 32 / (64 * 256)
BITS: Mapping[str, float] = {
    "nf4": 4 + _SCALE,
    "fp4": 4 + _SCALE,
    "nf4-double": 4 + _DOUBLE_SCALE,
    "fp4-double": 4 + _DOUBLE_SCALE,
    "int8": 8.0,
}
"""Format -> bits that an entry takes, with its part of the scales."""
GGUF = "gguf"
"""In place of a format: keep the blocks of a .gguf file."""
NAMES = (*BITS, GGUF)
SMALLEST = "nf4"
"""What messages name where a base does not fit as it is."""


def check_quantize(name: str | None, base: str = "") -> None:
    """ConfigError if this is none of `NAMES`, or is `GGUF` and the base, as the user names it, is no .gguf file."""
    if name is not None and name not in NAMES:
        raise ConfigError(f"quantize {name!r} is no format for a base{nearest(name, NAMES)}", fix=f"use one of {', '.join(NAMES)}")
    if name == GGUF and base and not base.lower().endswith(".gguf"):
        raise ConfigError(f"quantize {GGUF!r} keeps the blocks of a .gguf file, and {base!r} is none", fix=f"use one of {', '.join(BITS)}")


def refuse_packed(name: str | None, settings: Mapping[str, Any] | None, base: str) -> None:
    """ConfigError if a base that is packed by its own settings is to be packed once more."""
    if name is not None and settings is not None:
        raise ConfigError(
            f"quantize {name!r}: the base in {base} is quantised already ({settings.get('quant_method')})",
            fix="leave `quantize` out, or use the dense base",
        )
