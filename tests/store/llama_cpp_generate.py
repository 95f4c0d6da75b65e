"""Run by an interpreter that has xllamacpp (llama.cpp as a wheel): greedy tokens of a GGUF model, up to an end of turn,
without and with a GGUF LoRA.

    python llama_cpp_generate.py MODEL.gguf ADAPTER.gguf '[[1, 2, …], …]' NEW-TOKENS

Prints {"base": …, "adapter": …}, each {"tokens": the new tokens of each sequence, "first": (token, logprob) of the likeliest first tokens}.
Keys and values are kept in fp32.
"""

import json
import sys

import xllamacpp


def generate(model: str, adapter: str | None, sequences: list[list[int]], new: int) -> dict:
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.warmup = 1024, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    server = xllamacpp.Server(params)
    found: dict = {"tokens": [], "first": []}
    for sequence in sequences:
        asked = {"prompt": sequence, "max_tokens": new, "temperature": 0, "logprobs": 5, "cache_prompt": False}
        said = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
        found["tokens"].append([t["id"] for t in said])
        found["first"].append([(t["id"], t["logprob"]) for t in said[0]["top_logprobs"]])
    return found


def main(model: str, adapter: str, sequences: list[list[int]], new: int) -> None:
    print("RESULT " + json.dumps({"base": generate(model, None, sequences, new), "adapter": generate(model, adapter, sequences, new)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]))
