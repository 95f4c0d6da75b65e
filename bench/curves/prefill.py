"""Prefill of one long prompt: our forward over a KV cache, and transformers' own with SDPA."""

from __future__ import annotations

from typing import Any

from curves.curve import Curve, Point, cpu_seconds

CHUNK = 2048
"""Rows of a forward, as generation and the engine feed a long prompt."""


def model() -> Any:
    """A random Llama of 135M parameters, in bf16, the shapes of the bundled base."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(vocab_size=49152, max_position_embeddings=16384, tie_word_embeddings=True, **sizes)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def ours(tokens: int) -> list[float | str]:
    import torch

    from trimtab.forward.attention import PagedKV
    from trimtab.forward.batch import BASE, Piece
    from trimtab.forward.packs import Mix
    from trimtab.model import Base

    base, ids, size = Base(model(), None), torch.arange(tokens) % 1000, 16
    spec, blocks = base.spec, list(range(-(-tokens // size)))

    def prefill() -> None:
        cache = PagedKV(spec.num_layers, len(blocks), size, spec.num_kv_heads, spec.head_dim, base.dtype, base.device)
        for a in range(0, tokens, CHUNK):
            batch = base.batch([Piece(ids[a : a + CHUNK], BASE, slot=blocks, past=a)], Mix([]), cache=cache)
            hidden = base.attached.forward(batch)
        base.attached.head(hidden[-1:], batch, [batch.total - 1])

    with torch.inference_mode():
        prefill()
        return [tokens / cpu_seconds(prefill, 2)]


def transformers(tokens: int) -> list[float | str]:
    import torch

    plain, ids = model(), torch.arange(tokens)[None] % 1000
    plain.set_attn_implementation("sdpa")
    with torch.inference_mode():
        plain(ids, logits_to_keep=1)
        return [tokens / cpu_seconds(lambda: plain(ids, logits_to_keep=1), 2)]


CURVE = Curve(
    what="one prompt through a random Llama of 135M parameters in bf16",
    grows="tokens",
    points=[Point(f"{n:,}", n, long=n > 4096) for n in (64, 1024, 4096, 8192)],
    columns=["tokens a CPU s"],
    ours=ours,
    peers={"transformers, SDPA": transformers},
    limit=lambda point: "0.7 of the speed at 1,024" if point.value > 1024 else "",
)
