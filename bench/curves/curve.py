"""What a file of this folder holds: a `CURVE`, whose `ours` and `peers` get a point's value and return a number (or text) a column.

These functions import what they measure inside, and warm up what is not to be measured. `random_llama`, `bundled_tokenizer` and
`training_step` are what several of them measure, `cpu_seconds` and `peak_bytes` measure. `linear_flops` and `attention_flops` say what
arithmetic a token costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Measure = Callable[[Any], Sequence[float | str]]

SIZES = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
"""The bundled base's shapes; its heads have 64 numbers."""
HEAD_DIM = 64


@dataclass(frozen=True)
class Point:
    """name: as the table shows it. value: what the functions get. long: left out by --quick."""

    name: str
    value: Any
    long: bool = False


@dataclass(frozen=True)
class Curve:
    """what: the work, one line. grows: head of the first column. threads: of OpenMP. timeout_s: of one point."""

    what: str
    grows: str
    points: Sequence[Point]
    columns: Sequence[str]
    ours: Measure
    limit: Callable[[Point], str]
    peers: Mapping[str, Measure] = field(default_factory=dict)
    threads: int = 1
    timeout_s: int = 600

    def measure(self, side: str, index: int) -> list[float | str]:
        function = self.ours if side == "trimtab" else self.peers[side]
        return list(function(self.points[index].value))


def random_llama(layers: int = 30, vocab_size: int = 49152) -> Any:
    """A random model of the bundled base's shapes (135M parameters where it has all layers), in bf16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocab_size, num_hidden_layers=layers, max_position_embeddings=16384, tie_word_embeddings=True, **SIZES)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def linear_flops(layers: int) -> float:
    """Of a token in the forward: the linear layers of `random_llama` without its head, two for each weight."""
    hidden, inside = SIZES["hidden_size"], SIZES["intermediate_size"]
    attended, keys = (SIZES[f"num_{kind}_heads"] * HEAD_DIM for kind in ("attention", "key_value"))
    return 2.0 * layers * hidden * (2 * attended + 2 * keys + 3 * inside)


def attention_flops(layers: int, tokens: int) -> float:
    """Of a token in the forward, the mean over a text of so many: scores, and the sum of values, over the tokens up to its own."""
    return 4.0 * layers * SIZES["num_attention_heads"] * HEAD_DIM * (tokens + 1) / 2


def bundled_tokenizer() -> Any:
    from transformers import AutoTokenizer

    from trimtab.bases.locate import locate

    return AutoTokenizer.from_pretrained(locate("smollm2-135m-instruct", lambda line: None))


def training_step(base: Any, methods: Sequence[Any], rows: Sequence[Any], max_tokens: int = 16384) -> Callable[[], None]:
    """What runs a step of fresh adapters of these methods together, each on all these `Example`s. Memory is kept as in a run: else blocks
    that are larger than what was freed before cost a page fault every 4 KB, and the joint step's are."""
    from trimtab.store import Adapter
    from trimtab.train.heap import Heap
    from trimtab.train.options import TrainOptions, VariantConfig
    from trimtab.train.step import run_step
    from trimtab.train.variant import Variant

    options, variants, heap = TrainOptions(batch_size=len(rows), max_steps=99, warmup_steps=0), [], Heap()
    for i, method in enumerate(methods):
        config, fresh = VariantConfig(name=f"v{i}", data="rows", method=method, options=options), Adapter.create(base, method)
        variants.append(Variant(config, base.attached, fresh.sites, fresh.params, list(rows), seed=0, max_tokens=max_tokens))

    def step() -> None:
        batches = {v: v.next_batch() for v in variants}
        for variant, found in run_step(batches, max_tokens=max_tokens).items():
            variant.step(found.loss, found.grad_norm, batches[variant], 1.0)
        heap.after_step()

    return step


def cpu_seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """CPU seconds of one run of `work`, all threads of this process: the least of so many runs."""
    found = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found)


def peak_bytes(process: int | str = "self") -> int:
    """The most memory that a process has had resident so far, or since "5" was written to its `clear_refs`."""
    return int(Path(f"/proc/{process}/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
