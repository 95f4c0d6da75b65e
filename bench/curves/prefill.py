"""Prefill of one long prompt: our forward over a KV cache, and transformers' own with SDPA."""

from __future__ import annotations

from curves.curve import Curve, Point, attention_flops, cpu_seconds, linear_flops, random_llama

CHUNK = 2048
"""Rows of a forward, as generation and the engine feed a long prompt."""
SHORT, LAYERS = 1024, 30


def ours(tokens: int) -> list[float | str]:
    import torch

    from trimtab.forward.batch import BASE, Piece
    from trimtab.forward.kv_cache import PagedKV
    from trimtab.forward.packs import Mix
    from trimtab.model import Base

    base, ids, size = Base(random_llama(), None), torch.arange(tokens) % 1000, 16
    spec, blocks = base.spec, list(range(-(-tokens // size)))

    def prefill() -> None:
        cache = PagedKV(spec.num_layers, len(blocks), size, *spec.kv_shape, base.dtype, base.device)
        for a in range(0, tokens, CHUNK):
            batch = base.batch([Piece(ids[a : a + CHUNK], BASE, slot=blocks, past=a)], Mix([]), cache=cache)
            hidden = base.attached.forward(batch)
        base.attached.head(hidden[-1:], batch, [batch.total - 1])

    with torch.inference_mode():
        prefill()
        return [tokens / cpu_seconds(prefill, 2)]


def transformers(tokens: int) -> list[float | str]:
    import torch

    plain, ids = random_llama(), torch.arange(tokens)[None] % 1000
    plain.set_attn_implementation("sdpa")
    with torch.inference_mode():
        plain(ids, logits_to_keep=1)
        return [tokens / cpu_seconds(lambda: plain(ids, logits_to_keep=1), 2)]


def by_arithmetic(tokens: int) -> float:
    """The speed over that at 1,024 tokens if each multiplication took equally long, attention's and those of linear layers."""
    return flops(SHORT) / flops(tokens)


def flops(tokens: int) -> float:
    return linear_flops(LAYERS) + attention_flops(LAYERS, tokens)


def limit(point: Point) -> str:
    return f"{by_arithmetic(point.value):.2f} of the speed at {SHORT:,} by arithmetic" if point.value > SHORT else ""


CURVE = Curve(
    what="one prompt through a random Llama of 135M parameters in bf16",
    grows="tokens",
    points=[Point(f"{n:,}", n, long=n > 4096) for n in (64, 1024, 4096, 8192)],
    columns=["tokens a CPU s"],
    ours=ours,
    peers={"transformers, SDPA": transformers},
    limit=limit,
)
