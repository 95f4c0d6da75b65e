"""Ranks that share a base out: what each of them has of it in memory, at rest, while it is loaded and while it trains.

    python bench/shards.py                       # one process, then 2 ranks that have the whole base, then 2 that have a part
    python bench/shards.py --ranks 3 --layers 4 --formats float32
    python bench/shards.py --experts 16 --hidden 1024       # 3-D weights of experts, of which a token is sent to two

A random Llama is written to a temporary folder in bfloat16, with the widths of a 1.1B one; with --experts a Qwen3-MoE. Each rank is a
fresh process with one thread, and trains a LoRA on all linear layers for some steps of 2 rows. Bytes are those of the rank that has most.
"counted" adds up the tensors of the base; the other columns are the process's memory (its own and mapped pages) less what it had before
the base. "loaded" is the highest that it was while the base was loaded, "trains" what it is after the last step. In bfloat16 a process
that has the whole base maps its file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
FORMATS = {"float32": {"dtype": "float32"}, "bfloat16": {"dtype": "bfloat16"}, "nf4": {"dtype": "bfloat16", "quantize": "nf4"}}
COLUMNS = ("counted", "at rest", "loaded", "trains")
STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=0, help="of each layer; 0: none")
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        as_rank(args.rank)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder), args.layers, args.hidden, args.experts)
        print("| base | processes | " + " | ".join(f"{c}, GB" for c in COLUMNS) + " | s a step |", flush=True)
        print("|---" * (len(COLUMNS) + 3) + "|", flush=True)
        for name in args.formats:
            for ranks, shard in ((1, False), (args.ranks, False), (args.ranks, True)):
                found = measured(Path(folder), FORMATS[name] | {"shard": shard}, ranks)
                who = "1" if ranks == 1 else f"{ranks}, each a part" if shard else f"{ranks}, each all"
                cells = [f"{max(f[c] for f in found) / 1e9:.2f}" for c in COLUMNS]
                print(f"| {name} | {who} | {' | '.join(cells)} | {max(f['seconds'] for f in found):.2f} |", flush=True)


def write_base(folder: Path, layers: int, hidden: int, experts: int) -> None:
    import torch
    from curves.curve import bundled_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": 4, "max_position_embeddings": 2048}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    shared = {"vocab_size": 49152, "tie_word_embeddings": True, "dtype": "bfloat16", **sizes, **heads}
    if experts:
        config = Qwen3MoeConfig(num_experts=experts, num_experts_per_tok=2, moe_intermediate_size=hidden // 2, head_dim=64, **shared)
        Qwen3MoeForCausalLM(config).save_pretrained(folder / "base")
    else:
        LlamaForCausalLM(LlamaConfig(**shared)).save_pretrained(folder / "base")
    bundled_tokenizer().save_pretrained(folder / "base")
    rows = [{"prompt": "word " * 12 + str(i), "completion": "answer " * 40} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def measured(folder: Path, keys: dict[str, Any], ranks: int) -> list[dict[str, float]]:
    """What each rank says."""
    data, lora = {"rows": {"train": "rows.jsonl"}}, {"lora": {"method": "lora", "data": "rows", "max_steps": STEPS, "batch_size": 2}}
    run = {"base": str(folder / "base"), "out": f"out-{os.urandom(4).hex()}", "data": data, "variants": lora, "checkpoint_every": None}
    (folder / "run.json").write_text(json.dumps(run | keys | {"evaluate": {"generate": False}, "activation_checkpointing": True}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent / 'src'}"}
    done = subprocess.run(
        [*command, str(Path(__file__)), "--rank", str(folder)], env=environment, check=False, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def as_rank(folder: Path) -> None:
    from contextlib import contextmanager

    import psutil
    from curves.curve import peak_bytes

    from trimtab import bases
    from trimtab.places.ranks import joined
    from trimtab.places.shards import shards_of
    from trimtab.train import RunConfig, train
    from trimtab.train.listen import Silent

    process, said, seconds, load = psutil.Process(), dict[str, float](), list[float](), bases.load

    def loaded(*args: Any, **kwargs: Any) -> Any:
        said["before"] = process.memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        found = load(*args, **kwargs)
        said["loaded"] = peak_bytes() - said["before"]
        return found

    class Timed(Silent):
        def step(self, line: Any) -> None:
            seconds.append(line["seconds"])

    @contextmanager
    def beside(prepared: Any) -> Any:
        model = prepared.base.model
        tensors = {id(t): t for m in model.modules() for own in (m._parameters, m._buffers) for t in own.values() if t is not None}
        shards = shards_of(model)
        said["counted"] = sum(t.nbytes for t in (tensors.values() if shards is None else shards.kept(model)))
        said["at rest"] = process.memory_info().rss - said["before"]
        yield lambda: said.update(trains=process.memory_info().rss - said["before"])

    bases.load = loaded
    with joined() as place:
        run = RunConfig.from_dict(json.loads((folder / "run.json").read_text()), root=folder)
        train(run, place=place, beside=beside, listener=Timed())
    rank = os.environ.get("RANK", "0")
    said["seconds"] = statistics.median(seconds[1:]) if seconds else 0.0
    (folder / f"{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
