"""A training step of LoRA over a base in nf4 beside bf16; beside them peft, with bitsandbytes where the base is in nf4."""

from __future__ import annotations

from typing import Any

from curves.curve import Curve, Point, random_llama
from curves.quantized_decode import packed
from curves.train_context import our_step, peft_step, speed

TOKENS = 512


def model() -> Any:
    """Four layers of the bundled base's shapes; few words."""
    return random_llama(layers=4, vocab_size=8192)


def ours(name: str) -> list[float | str]:
    return speed(our_step(packed(model(), name), TOKENS), TOKENS, 4)


def peft(name: str) -> list[float | str]:
    import torch

    plain = model()
    if name == "nf4":
        from bitsandbytes.nn import Linear4bit, Params4bit

        for layer in plain.model.layers:
            for path, module in list(layer.named_modules()):
                if isinstance(module, torch.nn.Linear):
                    parent, _, own = path.rpartition(".")
                    small = Linear4bit(
                        module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
                        compress_statistics=False,
                    )  # fmt: skip
                    small.weight = Params4bit(
                        module.weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=False, module=small
                    )
                    setattr(layer.get_submodule(parent), own, small.to("cpu"))
    return speed(peft_step(plain, TOKENS), TOKENS, 2)


CURVE = Curve(
    what=f"a step of LoRA r16 on a row of {TOKENS} tokens, four layers of the bundled base's shapes",
    grows="base",
    points=[Point(name, name) for name in ("bf16", "nf4")],
    columns=["tokens a CPU s"],
    ours=ours,
    peers={"peft, with bitsandbytes": peft},
    limit=lambda point: "0.7 of bf16's speed" if point.value == "nf4" else "",
)
