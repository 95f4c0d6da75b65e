"""A training step of LoRA as its one row grows: our step, and transformers with SDPA and peft, which computes the same loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from curves.curve import Curve, Point, cpu_seconds, random_llama, training_step


def model() -> Any:
    """Six layers; few words, so that a long row's logits fit."""
    return random_llama(layers=6, vocab_size=8192)


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


CURVE = Curve(
    what="a step of LoRA r16 on one row, six layers of the bundled base's shapes in bf16",
    grows="tokens of the row",
    points=[Point(f"{n:,}", n, long=n > 2048) for n in (512, 2048, 8000)],
    columns=["tokens a CPU s"],
    ours=ours,
    peers={"transformers, SDPA and peft": peft},
    limit=lambda point: "0.7 of the speed at 2,048" if point.value > 2048 else "",
)
