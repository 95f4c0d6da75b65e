"""A tiny dense base, and folders with its matrices packed by plain loops."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import FAMILIES, tiny_tokenizer


def write_dense(folder: Path, **sizes: int) -> Path:
    """A folder of a tiny Qwen2, which has biases and a tied head, in bfloat16."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **FAMILIES["qwen2"] | sizes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def words(numbers: Sequence[int], bits: int = 4, order: Sequence[int] | None = None) -> list[int]:
    """Numbers of so many bits as int32, from the lowest bits on. order: which of a word's numbers comes first, second and so on."""
    if order is None:  # one after the other, also over the ends of words
        whole = sum(number << (bits * i) for i, number in enumerate(numbers))
        cut = [whole >> (32 * k) & 0xFFFFFFFF for k in range(-(-bits * len(numbers) // 32))]
        return [value - 2**32 if value >= 2**31 else value for value in cut]
    per = 32 // bits
    found = []
    for at in range(0, len(numbers), per):
        part = numbers[at : at + per]
        value = sum(part[i] << (bits * k) for k, i in enumerate(order))
        found.append(value - 2**32 if value >= 2**31 else value)
    return found


def write_packed(
    dense: Path,
    to: Path,
    by_loop: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]],
    settings: dict[str, Any],
    change: Callable[[dict[str, Tensor]], object] = lambda t: None,
) -> dict[str, Tensor]:
    """Write the dense base packed so: module -> the matrix that its tensors hold.

    by_loop: matrix -> (a layer's tensors, the matrix that they hold). settings: `quantization_config`. change: of the tensors, before they
    are written."""
    tensors, matrices = load_file(dense / "model.safetensors"), dict[str, Tensor]()
    for name in [n.removesuffix(".weight") for n in tensors if n.endswith("proj.weight")]:
        layer, matrices[name] = by_loop(tensors.pop(f"{name}.weight"))
        tensors |= {f"{name}.{part}": t for part, t in layer.items()}
    change(tensors)
    shutil.copytree(dense, to)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    config = json.loads((to / "config.json").read_text()) | {"quantization_config": settings}
    (to / "config.json").write_text(json.dumps(config))
    return matrices
