"""Run by an interpreter that has vLLM: greedy tokens of a model under a LoRA folder, from token ids.

    python vllm_generate.py MODEL-FOLDER LORA-FOLDER MAX-RANK DTYPE '[[1, 2, …], …]' NEW-TOKENS

Prints {"tokens": …, "base": …}: of the LoRA and, in the same run, of the model alone.
"""

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main(model: str, folder: str, rank: int, dtype: str, sequences: list[list[int]], new: int) -> None:
    options = {"max_model_len": 512, "max_num_seqs": 8, "enforce_eager": True, "skip_tokenizer_init": True}
    llm = LLM(model=model, dtype=dtype, enable_lora=True, max_loras=1, max_lora_rank=rank, **options)
    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": s} for s in sequences]
    found = {}
    for name, request in (("base", None), ("tokens", LoRARequest("adapter", 1, folder))):
        outputs = llm.generate(prompts, sampling, lora_request=request, use_tqdm=False)
        found[name] = [list(o.outputs[0].token_ids) for o in outputs]
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], json.loads(sys.argv[5]), int(sys.argv[6]))
