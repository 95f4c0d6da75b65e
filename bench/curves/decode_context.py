"""One decode step beside long contexts: our forward over a paged KV cache, and transformers' own with SDPA over a DynamicCache."""

from __future__ import annotations

from typing import Any

from curves.curve import Curve, Point, cpu_seconds, random_llama

Shape = tuple[int, int]
"""Streams, and the tokens that each has cached."""
STEPS = 12


def kv_bytes(shape: Shape) -> int:
    """Keys and values of 30 layers, 3 heads of 64, in bf16."""
    return shape[0] * shape[1] * 30 * 2 * 3 * 64 * 2


def ours(shape: Shape) -> list[float | str]:
    import torch

    from trimtab.forward.batch import BASE, Piece
    from trimtab.forward.kv_cache import PagedKV
    from trimtab.forward.packs import Mix
    from trimtab.model import Base

    (streams, tokens), base, size = shape, Base(random_llama(), None), 16
    spec, each = base.spec, -(-(tokens + 1) // size)
    cache = PagedKV(spec.num_layers, streams * each, size, *spec.kv_shape, base.dtype, base.device)
    cache.keys.normal_(), cache.values.normal_()
    order = torch.randperm(streams * each, generator=torch.Generator().manual_seed(0)).tolist()
    places = [order[i * each : (i + 1) * each] for i in range(streams)]

    def step() -> None:
        batch = base.batch([Piece(torch.tensor([7]), BASE, slot=place, past=tokens) for place in places], Mix([]), cache=cache)
        base.attached.head(base.attached.forward(batch), batch, list(range(streams)))

    with torch.inference_mode():
        step()
        return [1000 * cpu_seconds(step, STEPS)]


def transformers(shape: Shape) -> list[float | str]:
    import torch
    from transformers import DynamicCache

    (streams, tokens), plain = shape, random_llama()
    plain.set_attn_implementation("sdpa")
    cache: Any = DynamicCache()
    for layer in range(30):
        cache.update(*(torch.randn(streams, 3, tokens, 64).bfloat16() for _ in range(2)), layer)
    ids = torch.full((streams, 1), 7)
    with torch.inference_mode():
        plain(ids, past_key_values=cache)  # each step adds a token to the cache
        return [1000 * cpu_seconds(lambda: plain(ids, past_key_values=cache), STEPS)]


CURVE = Curve(
    what="a token for each stream, a random Llama of 135M parameters in bf16",
    grows="streams x tokens cached",
    points=[Point(f"{s} x {n:,}", (s, n), long=s * n > 20000) for s, n in ((1, 100), (1, 16000), (8, 100), (8, 1000), (8, 4000))],
    columns=["CPU ms a step"],
    ours=ours,
    peers={"transformers, SDPA": transformers},
    limit=lambda point: f"{kv_bytes(point.value) / 1e6:,.0f} MB of KV at what memory gives",
)
