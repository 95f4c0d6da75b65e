"""A LoRA as a GGUF file for llama.cpp: its names, its metadata, its order of rows.

llama.cpp rotates neighbouring features where transformers rotates halves, so its converters reorder the rows of q and k within each head;
B has those rows. Tensors are named blk.N.attn_q.weight.lora_a and .lora_b; llama.cpp scales by adapter.lora.alpha / rank, which is 1 here.
Verified with llama.cpp for Llama models; other architectures are refused.

Dimensions: I in, O out, R rank, D features of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import torch
from torch import Tensor

from trimtab.bases.spec import Spec
from trimtab.errors import AdapterError
from trimtab.methods.base import Site

if TYPE_CHECKING:
    from trimtab.store.adapter import Adapter

GGUF = "adapter.gguf"
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA}


def gguf_problems(adapter: Adapter) -> list[str]:
    """Why llama.cpp could not run this adapter on this base, beyond what no LoRA of another program can be."""
    model_type = adapter.base.spec.model_type
    return (
        [] if model_type in ARCHITECTURES else [f"GGUF adapters are written for {', '.join(ARCHITECTURES)}, and this base is {model_type}"]
    )


def write_gguf(file: Path, adapter: Adapter, spec: Spec) -> None:
    """Write a LoRA of one rank and scaling 1, fp32. The base's architecture must be in `ARCHITECTURES`."""
    writer = gguf.GGUFWriter(str(file), gguf.MODEL_ARCH_NAMES[ARCHITECTURES[spec.model_type]])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.sites[0].rank))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for site, name, heads in _placed(adapter, spec):
        A_RI, B_OR = (adapter.params[site.key(t)].detach().float().cpu() for t in site.shapes)
        writer.add_tensor(f"{name}.weight.lora_a", A_RI.contiguous().numpy())
        writer.add_tensor(f"{name}.weight.lora_b", _halves_to_pairs(B_OR, heads).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(file: Path, adapter: Adapter, spec: Spec) -> dict[str, Tensor]:
    """The tensors of a file that `write_gguf` wrote, by `Site.key` of the adapter that it was written from."""
    found = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(str(file)).tensors}
    params: dict[str, Tensor] = {}
    for site, name, heads in _placed(adapter, spec):
        key_A, key_B = (site.key(t) for t in site.shapes)
        try:
            A_RI, B_OR = found.pop(f"{name}.weight.lora_a"), found.pop(f"{name}.weight.lora_b")
        except KeyError as missing:
            raise AdapterError(f"{file} lacks {missing}") from missing
        params |= {key_A: A_RI, key_B: _pairs_to_halves(B_OR, heads)}
    if found:
        raise AdapterError(f"{file} holds {', '.join(found)}, which belong to no module")
    return params


def _placed(adapter: Adapter, spec: Spec) -> Iterator[tuple[Site, str, int]]:
    """(site, llama.cpp's name of the module, how many heads its rows are reordered in; 0: not at all)."""
    names: Any = gguf.get_tensor_name_map(ARCHITECTURES[spec.model_type], spec.num_layers)
    heads = {"q_proj": spec.layers[0].num_heads, "k_proj": spec.layers[0].num_kv_heads}
    for site in adapter.sites:
        name = names.get_name(site.name)
        assert name is not None, f"the gguf package has no name for {site.name}"
        yield site, name, heads.get(site.name.rpartition(".")[2], 0)


def _halves_to_pairs(B_OR: Tensor, heads: int) -> Tensor:
    """Rows within each head from (0 … D/2-1, D/2 … D-1) to (0, D/2, 1, D/2+1, …)."""
    return B_OR.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(B_OR.shape) if heads else B_OR


def _pairs_to_halves(B_OR: Tensor, heads: int) -> Tensor:
    return B_OR.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(B_OR.shape) if heads else B_OR
