"""A .gguf file as a folder in which the blocks of linear layers stay packed. What is left is as `gguf.py` has it: bf16, config, tokenizer.

transformers' tables say what GGUF's tensors are called and how they are to be turned. A matrix stays packed if what is done to it moves
whole rows alone, which is compared on its dequantised entries; then the same is done to the rows of blocks. Others become dense.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trimtab.bases.progress import Progress
from trimtab.bases.weights.gguf_blocks import BLOCKS


def write_packed(path: Path, reader: Any, folder: Path, progress: Progress) -> Any:
    """Write config and weights of the .gguf file into a folder. Returns the config, for the tokenizer. reader: gguf's, of the file.
    progress: told what is not kept packed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    state, loosened = _tensors(reader, model)
    if missing := sorted(set(_wanted(model)) - {_weight(name) for name in state}):
        raise ValueError(f"the file has no tensors for {', '.join(missing[:5])}")
    if loosened:
        kinds, was, now = ", ".join(sorted(loosened)), *(sum(sizes) / 1e9 for sizes in zip(*loosened.values(), strict=True))
        progress(f"matrices of {kinds} are kept in bfloat16: {now:.3g} GB in place of {was:.3g}")
    config.dtype = torch.bfloat16
    packed = [(t, *BLOCKS[kind]) for n, t in state.items() if (kind := n.rpartition(".")[2]) in BLOCKS]
    entries = sum(t.nbytes // size * block for t, block, size in packed)
    settings = {"quant_method": "gguf", "bits": 8 * sum(t.nbytes for t, _, _ in packed) / max(1, entries)}
    described = {k: v for k, v in config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    (folder / "config.json").write_text(json.dumps(described | {"quantization_config": settings}, indent=2, default=str) + "\n")
    save_file({n: t.contiguous() for n, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
    return config


def _tensors(reader: Any, model: Any) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
    """(the model's tensors; by kind of blocks that does not stay packed, the bytes that it takes in the file and in bfloat16)."""
    from gguf.quants import dequantize
    from transformers import modeling_gguf_pytorch_utils as tables

    architecture = str(reader.get_field("general.architecture").contents())
    processor = tables.TENSOR_PROCESSORS.get(architecture, tables.TensorProcessor)(config=model.config.to_dict())
    names = tables.get_gguf_hf_weights_map(model, processor)
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()}
    beside: dict[str, Any] = {"tensors": {}}  # where the tables put what is several tensors of the file

    def turned(values: np.ndarray, name: str) -> tuple[str | None, np.ndarray]:
        done = processor.process(weights=values, name=name, tensor_key_mapping=names, parsed_parameters=beside)
        return names.get(done.name), done.weights

    state: dict[str, Tensor] = {}
    loosened: dict[str, tuple[int, int]] = {}
    for t in reader.tensors:
        kind, entries = t.tensor_type.name.lower(), dequantize(t.data, t.tensor_type)
        if not np.isfinite(entries).all():
            raise ValueError(f"the tensor {t.name} has {(~np.isfinite(entries)).sum():,} numbers that are not finite")
        name, dense = turned(entries, t.name)
        if name is None:
            continue
        if name in linear and kind in BLOCKS:
            blocks = np.asarray(turned(np.asarray(t.data), t.name)[1])
            if blocks.shape == t.data.shape and np.array_equal(dequantize(blocks, t.tensor_type), dense):
                state[f"{name.removesuffix('.weight')}.{kind}"] = torch.from_numpy(np.array(blocks))
                continue
        if t.data.dtype == np.uint8 and kind != "bf16":
            was, now = loosened.get(kind.upper(), (0, 0))
            loosened[kind.upper()] = was + t.data.nbytes, now + 2 * entries.size
        state[name] = torch.from_numpy(np.array(dense)).to(torch.bfloat16)
    return state | {name: torch.as_tensor(t).to(torch.bfloat16) for name, t in beside["tensors"].items()}, loosened


def _weight(name: str) -> str:
    module, _, last = name.rpartition(".")
    return f"{module}.weight" if last in BLOCKS else name


def _wanted(model: Any) -> list[str]:
    """The names of the parameters, without those that are tied to others."""
    tied = model.all_tied_weights_keys
    return [name for name, _ in model.named_parameters() if name not in tied]
