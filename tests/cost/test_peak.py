"""What `plan` and `check` say of a run's memory, beside the peak of a process that trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.tiny import VOCAB, tiny_tokenizer
from trimtab.compiler import find_compiler

SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024}
RUN = """
import ctypes, json, sys
from pathlib import Path
import psutil
from trimtab.bases.shapes import read_architecture
from trimtab.cost.plan import plan
from trimtab.methods import BY_NAME
from trimtab.train import RunConfig, train
from trimtab.train.check import check

folder, method, quantize, scored = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "scored"

def run(base, steps):
    variant = {"method": method, "max_length": 512, "batch_size": 8, "max_steps": steps}
    content = {"base": base, "out": f"out-{base}", "dtype": "bfloat16", "device": "cpu", "variants": {"v": variant}}
    content |= {"data": {"a": {"train": "a.jsonl"} | ({"valid": "v.jsonl", "test": "v.jsonl"} if scored else {})}}
    content |= {"evaluate": {"generate": True, "max_new_tokens": 32}} if scored else {}
    content |= {"quantize": quantize} if quantize else {}
    return RunConfig.from_dict(content, root=folder)

train(run("warm", 1))  # imports, and what is built and compared once
estimate = check(run("base", 3)).estimate
shape = read_architecture(str(folder / "base"), quantize or None)
planned = plan(shape, BY_NAME[method](), batch_tokens=estimate.forward_tokens, sequence_length=512)
ctypes.CDLL(None).malloc_trim(0)  # what the small run has freed would serve this one, and is not part of its peak
before = psutil.Process().memory_info().rss
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
train(run("base", 3))
peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024 - before
print(json.dumps([planned.train_peak_bytes, *estimate.memory_bytes, peak]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or find_compiler()[0] is None, reason="no /proc, or no C++ compiler")
@pytest.mark.parametrize(
    ("method", "quantize", "scored"),
    [(m, "", False) for m in ("lora", "ia3", "bottleneck", "prefix")]
    + [("bottleneck", "nf4", False), ("prefix", "nf4", False), ("lora", "", True)],
)
def test_a_run_takes_what_plan_and_check_say(tmp_path: Path, method: str, quantize: str, scored: bool) -> None:
    """Steps of 4,096 tokens. The limits are those that `plan` and `check` promise: within 15%, and within a range 1.3 wide."""
    for name, layers in (("warm", 1), ("base", 12)):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCAB, num_hidden_layers=layers, tie_word_embeddings=True, **SIZES))
        model.bfloat16().save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    row = {"prompt": "x" * 255, "completion": "x" * 229} if scored else {"text": "x" * 511}  # and what the roles take
    for name, rows in (("a", 32), ("v", 8)):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * rows)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, str(tmp_path), method, quantize, "scored" if scored else "trained"]
    said = subprocess.run(command, env=environment, cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True).stdout
    planned, least, most, peak = json.loads(said.splitlines()[-1])
    assert scored or 0.85 <= planned / peak <= 1.15, (planned, peak)  # `plan` knows no scoring
    assert least <= peak <= most <= 1.3 * least, (least, peak, most)
