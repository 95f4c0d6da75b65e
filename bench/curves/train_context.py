"""A training step of LoRA as its one row grows: our step, and transformers with SDPA and peft, which computes the same loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from curves.curve import SIZES, Curve, Point, attention_flops, cpu_seconds, linear_flops, random_llama, training_step

LAYERS, VOCABULARY = 6, 8192
SHORT = 2048


def model() -> Any:
    """Six layers; few words, so that a long row's logits fit."""
    return random_llama(layers=LAYERS, vocab_size=VOCABULARY)


def our_step(model: Any, tokens: int) -> Callable[[], None]:
    """A step on a row of so many tokens."""
    import numpy as np

    from trimtab.data import Example
    from trimtab.methods import LoraConfig
    from trimtab.model import Base

    row = Example(np.arange(tokens, dtype=np.int32) % 1000, np.arange(tokens) > 0, "row", (0, 0))
    return training_step(Base(model, None), [LoraConfig(r=16)], [row])


def peft_step(plain: Any, tokens: int) -> Callable[[], None]:
    """The same by transformers and peft."""
    import torch
    from peft import LoraConfig, get_peft_model

    plain.train()
    plain.set_attn_implementation("sdpa")
    trained: Any = get_peft_model(plain, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = torch.arange(tokens)[None] % 1000
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        trained(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def speed(step: Callable[[], None], tokens: int, repeats: int = 1) -> list[float | str]:
    """Tokens a CPU second, after a step."""
    step()
    return [tokens / cpu_seconds(step, repeats)]


def ours(tokens: int) -> list[float | str]:
    return speed(our_step(model(), tokens), tokens)


def peft(tokens: int) -> list[float | str]:
    return speed(peft_step(model(), tokens), tokens)


def by_arithmetic(tokens: int) -> float:
    """The speed over that at 2,048 tokens if each multiplication took equally long, attention's and those of linear layers."""
    return flops(SHORT) / flops(tokens)


def flops(tokens: int) -> float:
    """Of a token in forward and backward. Frozen matrices give no gradient, so the backward takes as many as the forward. Attention's takes
    5 products where the forward takes 2: it computes the scores again. What LoRA adds, 6% of the rest, is left out."""
    head = 2.0 * SIZES["hidden_size"] * VOCABULARY
    return 2 * (linear_flops(LAYERS) + head) + 3.5 * attention_flops(LAYERS, tokens)


def limit(point: Point) -> str:
    return f"{by_arithmetic(point.value):.2f} of the speed at {SHORT:,} by arithmetic" if point.value > SHORT else ""


CURVE = Curve(
    what="a step of LoRA r16 on one row, six layers of the bundled base's shapes in bf16",
    grows="tokens of the row",
    points=[Point(f"{n:,}", n, long=n > 2048) for n in (512, 2048, 8000)],
    columns=["tokens a CPU s"],
    ours=ours,
    peers={"transformers, SDPA and peft": peft},
    limit=limit,
)
