"""Random blocks as GGUF has them, of numbers about as large as a small model's weights."""

from __future__ import annotations

import numpy as np

from trimtab.bases.weights.gguf_blocks import BLOCKS

HALVES = {"q4_0": (0,), "q8_0": (0,), "q4_k": (0, 2), "q6_k": (208,)}
"""Where a block has fp16 numbers: whole numbers at random are not always finite there."""
SIZE = {"q4_0": 0.02, "q8_0": 0.002, "q4_k": 0.0003, "q6_k": 0.0001}


def random_blocks(kind: str, outputs: int, inputs: int, seed: int = 0) -> np.ndarray:
    """uint8 [outputs, bytes of a row]."""
    random, (block, size) = np.random.default_rng(seed), BLOCKS[kind]
    blocks = random.integers(0, 256, (outputs, inputs // block, size), dtype=np.uint8)
    for at in HALVES[kind]:
        size = SIZE[kind] * (7.5 if (kind, at) == ("q4_k", 2) else 1)  # what is taken off is about the mean
        halves = random.uniform(0.5, 1.5, (*blocks.shape[:2], 1)) * size
        blocks[..., at : at + 2] = halves.astype(np.float16).view(np.uint8)
    return blocks.reshape(outputs, -1)
