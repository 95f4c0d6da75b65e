"""Decode beside llama.cpp on the same .gguf file: base and one LoRA, one stream and several, tokens for each CPU second, one thread.

    python bench/llama_cpp.py --python VENV/bin/python            # VENV has xllamacpp, which is llama.cpp as a wheel
    python bench/llama_cpp.py --python VENV/bin/python --formats Q8_0 --streams 1 --tokens 8

The file is the bundled base's, its matrices packed anew in each format (the bundled Q4_1 is none that trimtab keeps packed). The LoRA is
random, r 16 on all linear layers, and exported as .gguf. What the prompts take is subtracted: a run of one new token is taken from one of
many. Embedding and head are packed in the file. llama.cpp multiplies them so, trimtab has them in bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PROMPT = 100
RANK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="an interpreter that has xllamacpp; without it trimtab alone is measured")
    parser.add_argument("--formats", nargs="+", default=["Q4_0", "Q8_0"])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--side", choices=("trimtab", "llama.cpp"), help=argparse.SUPPRESS)
    parser.add_argument("--files", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        decode = ours if args.side == "trimtab" else theirs
        print("\n" + json.dumps(decode(*args.files, args.streams, args.tokens)))
        return
    print("| file | adapter | streams | trimtab | llama.cpp | ratio |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.formats:
            model, adapter = Path(folder, f"{kind}.gguf"), Path(folder, f"{kind}-lora")
            pack(model, kind)
            lora(model, adapter)
            files = [str(model), str(adapter / "adapter.gguf")]
            mine = measure(sys.executable, "trimtab", files, args)
            other = measure(args.python, "llama.cpp", files, args) if args.python else [None] * len(mine)
            for (name, streams, rate), them in zip(mine, other, strict=True):
                beside = f"{them[2]:.1f} | {rate / them[2]:.2f}" if them else "– | –"
                print(f"| {kind} | {name} | {streams} | {rate:.1f} | {beside} |", flush=True)


def measure(python: str, side: str, files: Sequence[str], args: argparse.Namespace) -> list[Any]:
    """(base or LoRA, streams, tokens a CPU second) of one side, in a process of its own."""
    command = [python, __file__, "--side", side, "--files", *files, "--tokens", str(args.tokens), "--streams", *map(str, args.streams)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side}: {done.stderr[-2000:]}")
    return list(json.loads(done.stdout.strip().splitlines()[-1]))


def pack(file: Path, kind: str) -> None:
    """The bundled base's file with its matrices packed as `kind`; all else as it is."""
    import gguf
    from gguf.quants import dequantize, quantize

    from trimtab.bases.bundled import find_gguf

    source = find_gguf()
    assert source is not None, "load the bundled base once, so that its file is there"
    reader = gguf.GGUFReader(source)
    architecture = str(reader.get_field("general.architecture").contents())
    writer = gguf.GGUFWriter(str(file), architecture)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    to = gguf.GGMLQuantizationType[kind]
    for t in reader.tensors:
        values = dequantize(t.data, t.tensor_type)
        if values.ndim == 2:
            writer.add_tensor(t.name, quantize(values, to), raw_dtype=to)
        else:
            writer.add_tensor(t.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def lora(model: Path, folder: Path) -> None:
    """A random LoRA on the base of a file, as .gguf and in `folder`/peft."""
    import torch

    from trimtab.methods import LoraConfig
    from trimtab.model import load_base
    from trimtab.store import Adapter
    from trimtab.store.export import export

    adapter = Adapter.create(load_base(str(model), dtype="bfloat16", quantize="gguf", device="cpu"), LoraConfig(r=RANK))
    adapter.params = {k: t + 0.01 * torch.randn(t.shape) for k, t in adapter.params.items()}
    export(adapter, folder, "gguf")
    adapter.save(folder / "peft")


def rates(run: Callable[[int], object], streams: int, tokens: int) -> float:
    """Tokens a CPU second, all threads of the process: of a run of `tokens` new ones less one of a single one; the better of two."""

    def seconds(n: int) -> float:
        began = time.process_time()
        run(n)
        return time.process_time() - began

    run(2)
    return max(streams * (tokens - 1) / (seconds(tokens) - seconds(1)) for _ in range(2))


def prompts(streams: int) -> list[list[int]]:
    return [[1 + (7 * i + j) % 4000 for j in range(PROMPT)] for i in range(streams)]


def ours(model: str, adapter: str, streams: Sequence[int], tokens: int) -> list[Any]:
    from trimtab.decode.generate import Sampling, generate
    from trimtab.model import load_base
    from trimtab.store import Adapter

    base, found = load_base(model, dtype="bfloat16", quantize="gguf", device="cpu"), []
    for name, one in (("base", None), ("LoRA", Adapter.load(Path(adapter).parent / "peft", base))):
        for n in streams:
            mix, members = base.mix([one] * n)

            def run(new: int, n: int = n, mix: Any = mix, members: Any = members) -> object:
                return generate(base.attached, mix, members, prompts(n), Sampling(new), set())

            found.append((name, n, rates(run, n, tokens)))
    return found


def theirs(model: str, adapter: str, streams: Sequence[int], tokens: int) -> list[Any]:
    import xllamacpp

    found = []
    for name, files in (("base", []), ("LoRA", [adapter])):
        for n in streams:
            params = xllamacpp.CommonParams()
            params.model.path = model
            params.n_ctx, params.n_parallel, params.warmup = n * 512, n, False
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
            if files:
                params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(file, 1.0) for file in files]
            server = xllamacpp.Server(params)

            def run(new: int, n: int = n, server: Any = server) -> object:
                asked = [{"prompt": p, "max_tokens": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False} for p in prompts(n)]
                with ThreadPoolExecutor(n) as pool:
                    return list(pool.map(server.handle_completions, asked))

            found.append((name, n, rates(run, n, tokens)))
    return found


if __name__ == "__main__":
    main()
