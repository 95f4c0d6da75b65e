"""What items share: a random base made on the device, points that fail alone, times of work that a device does later."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_LLAMA = {"vocab_size": 32_000, "max_position_embeddings": 16_384, "tie_word_embeddings": False}
BASES: dict[str, dict[str, Any]] = {
    "1B": _LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
    "7B": _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
}
"""Shapes of Llama 3.2 1B and of Mistral 7B, with a vocabulary of 32,000."""
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass(frozen=True)
class Setting:
    """tiny: sizes for trying the script, at which a point takes a second. deadline: of time.monotonic(); points after it are left out."""

    device: str
    tiny: bool
    deadline: float

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def wait(self) -> None:
        import torch

        if self.on_gpu:
            torch.cuda.synchronize()

    def config(self, size: str) -> dict[str, Any]:
        return BASES[size] | (TINY | {"num_key_value_heads": 2} if self.tiny else {})


def random_model(setting: Setting, size: str) -> Any:
    """A Llama of these sizes in bf16 with random weights, which the device draws."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(setting.device):
            return LlamaForCausalLM(LlamaConfig(**setting.config(size))).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def tokenizer() -> Any:
    """A small one: ids that it does not know have no text."""
    sys.path.insert(0, str(ROOT))
    from tests.tiny import tiny_tokenizer

    return tiny_tokenizer()


def random_base(setting: Setting, size: str) -> Any:
    from trimtab.model import Base

    return Base(random_model(setting, size), tokenizer(), name=f"random-{size}")


def random_ids(setting: Setting, size: str, rows: int, length: int) -> list[list[int]]:
    import numpy as np

    return np.random.default_rng(0).integers(5, setting.config(size)["vocab_size"], (rows, length)).tolist()


def seconds(setting: Setting, work: Callable[[], object], repeats: int = 10) -> float:
    """Wall time of one run of `work`: the mean of so many after one that warms up, the device's work included."""
    work()
    setting.wait()
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    setting.wait()
    return (time.perf_counter() - began) / repeats


def gemm_flops(setting: Setting, size: int = 8192) -> float:
    """Floating point operations a second of a product of square matrices in bf16."""
    import torch

    n = 256 if setting.tiny else size
    a, b = (torch.randn(n, n, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / seconds(setting, lambda: a @ b)


def tell(**figures: Any) -> None:
    """One line of the result."""
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}), flush=True)


def run_points(setting: Setting, item: str, points: Mapping[str, Callable[[], Mapping[str, Any]]]) -> None:
    """A line for each point: its figures and the peak of the device's memory, or why there are none. What a point held is freed."""
    import torch

    for name, work in points.items():
        if time.monotonic() > setting.deadline:
            tell(item=item, point=name, skipped="no time was left")
            continue
        if setting.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            figures = dict(work())
        except Exception as error:  # whatever goes wrong, the next point is another one
            said = str(error).strip().splitlines()
            figures = {"failed": f"{type(error).__name__}: {said[0] if said else ''}"[:300]}
        peak = {"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if setting.on_gpu else {}
        tell(item=item, point=name, **figures, **peak)
        gc.collect()
        if setting.on_gpu:
            torch.cuda.empty_cache()
