"""Decode over bases in 4 and 8 bits beside bf16, as streams grow: each step reads all weights once, and a quarter or half of the bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from curves.curve import Curve, Point, cpu_seconds, random_llama

FORMATS = ("bf16", "nf4", "int8")


def billion() -> Any:
    """A model of Llama's shapes with 1.04 billion parameters in bf16; all layers have the values of the first, each in its own memory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=16, tie_word_embeddings=True, **sizes)).to(torch.bfloat16)
    made = model.to_empty(device="cpu")
    first = dict(made.model.layers[0].named_parameters())
    for name, p in first.items():
        torch.nn.init.ones_(p) if p.dim() == 1 else torch.nn.init.uniform_(p, -0.02, 0.02)
        for layer in made.model.layers[1:]:
            layer.get_parameter(name).data.copy_(p)
    torch.nn.init.uniform_(made.model.embed_tokens.weight, -0.02, 0.02)
    torch.nn.init.ones_(made.model.norm.weight)
    made.tie_weights()
    made.model.rotary_emb = type(made.model.rotary_emb)(made.config)
    return made.eval()


def packed(model: Any, name: str) -> Any:
    """The model, the linear layers of its decoder layers in this format. bf16: as it is."""
    import copy

    import torch

    from trimtab.bases.weights import FORMATS as known

    if name == "bf16":
        return model
    alike: dict[tuple[str, bytes], Any] = {}
    for layer in model.model.layers:
        for path, module in list(layer.named_modules()):
            if isinstance(module, torch.nn.Linear):
                seen = path, module.weight[0, :64].detach().float().numpy().tobytes()
                if seen not in alike:
                    alike[seen] = known[name].of_linear(module)
                parent, _, own = path.rpartition(".")
                setattr(layer.get_submodule(parent), own, copy.deepcopy(alike[seen]))
    return model


def stepper(model: Any, streams: int) -> Callable[[], object]:
    """What runs a step of so many streams of the base, each a token after 100, with its logits."""
    import torch

    from trimtab.forward.attached import Attached
    from trimtab.forward.batch import BASE, Piece, make_batch
    from trimtab.forward.kv_cache import PagedKV
    from trimtab.forward.packs import Mix

    attached = Attached(model)
    spec = attached.spec
    cache = PagedKV(spec.num_layers, 8 * streams, 16, *spec.kv_shape, attached.dtype, attached.device)
    cache.keys.normal_(), cache.values.normal_()
    ids = torch.arange(streams)[:, None] % 1000

    def step() -> object:
        with torch.inference_mode():
            pieces = [Piece(row, BASE, list(range(8 * i, 8 * i + 8)), 100) for i, row in enumerate(ids)]
            batch = make_batch(pieces, Mix([]), device=attached.device, max_positions=spec.max_positions, cache=cache)
            return attached.head(attached.forward(batch), batch, range(batch.total))

    step()
    return step


def ours(point: tuple[str, int]) -> list[float | str]:
    base, streams = point
    found: list[float | str] = []
    for name in FORMATS:
        step = stepper(packed(billion() if base == "1B" else random_llama(), name), streams)
        found.append(streams / cpu_seconds(step, 8))
        del step
    return found


CURVE = Curve(
    what="decode over the base alone, tokens a CPU second",
    grows="base, streams",
    points=[Point(f"{base}, {n}", (base, n), long=base == "1B") for base in ("135M", "1B") for n in (1, 8, 32)],
    columns=FORMATS,
    ours=ours,
    limit=lambda point: "nf4 1.5 times bf16" if point.value == ("1B", 1) else "nf4 as fast as bf16" if point.value[1] == 1 else "",
)
