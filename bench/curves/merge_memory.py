"""Memory of writing a merged model folder, beside the bytes of the weights. What a merge of a tiny base takes is subtracted."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from curves.curve import Curve, Point

SHAPES = {
    "tiny": {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 300},
    "0.06B": {"num_hidden_layers": 12, "hidden_size": 512, "intermediate_size": 1536, "vocab_size": 32_000},
    "0.5B": {"num_hidden_layers": 24, "hidden_size": 896, "intermediate_size": 4864, "vocab_size": 151_936},
}
MAKE = """
import sys, json, torch, transformers
sizes = json.loads(sys.argv[1]) | {"num_key_value_heads": 2, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None}
config = transformers.Qwen2Config(**{"num_attention_heads": sizes["hidden_size"] // 32} | sizes)
torch.set_default_dtype(torch.bfloat16)
transformers.Qwen2ForCausalLM(config).save_pretrained(sys.argv[2])
from tokenizers import Tokenizer, models
letters = Tokenizer(models.BPE(vocab={chr(i): i for i in range(256)}, merges=[]))
transformers.PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(sys.argv[2])
"""
MERGE = """
import sys, resource, time, torch
from trimtab.methods import LoraConfig
from trimtab.model import load_base
from trimtab.store import Adapter
base = load_base(sys.argv[1], dtype="auto", device="cpu")
adapter = Adapter.create(base, LoraConfig(r=8))
for tensor in adapter.params.values():
    tensor += 0.01
adapter.merge_into(sys.argv[1] + "-merged")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.process_time())
"""


def make(sizes: dict[str, int], folder: str) -> str:
    """A random Qwen2 in bf16 and a tokenizer of letters, written into a folder."""
    subprocess.run([sys.executable, "-c", MAKE, json.dumps(sizes), folder], check=True)
    return folder


def merge(name: str) -> tuple[int, float, int]:
    """(peak bytes, seconds of CPU, bytes of the weights) of a process that loads a base and merges an adapter."""
    with tempfile.TemporaryDirectory() as folder:
        base = make(SHAPES[name], str(Path(folder, "base")))
        told = subprocess.run([sys.executable, "-c", MERGE, base], check=True, capture_output=True, text=True).stdout.split()
        return int(told[-2]), float(told[-1]), Path(base, "model.safetensors").stat().st_size


def ours(name: str) -> list[float | str]:
    peak, seconds, weights = merge(name)
    return [weights / 1e9, peak / 1e9, (peak - merge("tiny")[0]) / weights, seconds]


CURVE = Curve(
    what="a LoRA of rank 8 on all linear layers merged into a random Qwen2 stored in bf16",
    grows="base",
    points=[Point(name, name, long=name == "0.5B") for name in SHAPES if name != "tiny"],
    columns=["weights, GB", "peak, GB", "peak / weights", "CPU s"],
    ours=ours,
    limit=lambda point: "1.0 times the weights",
)
