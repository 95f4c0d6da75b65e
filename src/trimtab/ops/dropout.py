"""Dropout whose masks are a function of numbers that each row brings along, on every device the same.

A mask is a hash of (row's key, column, site). So a row is dropped alike beside any other rows, in any order, on any number of ranks, and
again in the backward, and no random number generator outlives a step. The hash is lowbias32 (C. Wellons, "Prospecting for hash functions").

Dimensions: R rows, I columns.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_HALF = 0x7FFFFFFF
_ROUNDS = ((16, 0x21F0AAAD), (15, 0xD35A2D97 - (1 << 32)))
"""Shift, and factor as a signed number of 32 bits."""


def row_keys(seed: int, rows: int) -> np.ndarray:
    """int32 [rows]: the keys of the rows of whatever this seed stands for."""
    numbers = (np.arange(rows, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(seed)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # splitmix64
    return ((numbers ^ (numbers >> np.uint64(27))) >> np.uint64(32)).astype(np.uint32).view(np.int32)


def dropout(x: Tensor, p: float, keys_R: Tensor | None, site: int) -> Tensor:
    """Inverted dropout of x [R, I]: x ∘ m / (1 - p), m ~ Bernoulli(1 - p). keys_R: int32, the rows' keys; None: x as it is. site: which
    layer asks, so that layers do not drop alike."""
    return x if keys_R is None or p == 0.0 else x * kept(keys_R, x.shape[-1], p, site).to(x.dtype).mul_(1.0 / (1.0 - p))


def kept(keys_R: Tensor, columns: int, p: float, site: int) -> Tensor:
    """bool [R, columns]: what is not dropped."""
    column_I = torch.arange(columns, dtype=torch.int32, device=keys_R.device)
    h_RI = keys_R.unsqueeze(-1) ^ (column_I * 0x2C1B3C6D + int(row_keys(site, 1)[0]))
    for shift, factor in _ROUNDS:
        h_RI.bitwise_xor_((h_RI >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(factor)
    h_RI.bitwise_xor_((h_RI >> 15) & 0x1FFFF)
    return h_RI.bitwise_and_(_HALF) >= round(p * (_HALF + 1))
