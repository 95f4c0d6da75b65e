"""Training speed and memory beside trl + peft: the same rows in the same order, LoRA r=16 on all linear layers, bf16, batch 16.

    python bench/train_vs_trl.py --peer-python PEER/bin/python --peer ../shared/peers/trl_peft_train.py --data ../shared/data/tenants

PEER is a virtual environment of its own with torch, transformers, trl, peft and datasets. Each repetition runs the peer and trimtab in
turn, each in a fresh process; figures are medians over the repetitions, and only the ratios mean anything on a shared machine. Both
supervise the last turn only, as the peer script does, and see the rows in the order that the peer's sampler draws with its seed. Both get
the same GOMP_SPINCOUNT (see trimtab/__init__.py).

With `--quantize nf4` both train on one folder that `trimtab quantize` has written; the peer then needs bitsandbytes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import trimtab
from trimtab import bases


def main() -> None:
    args = _arguments()
    if args.ours:
        print(json.dumps(ours(args.base, args.ours, args.steps, args.batch)))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(args, packed(args.quantize, Path(folder) / "base") if args.quantize else bases.locate("smollm2-135m-instruct", print))


def packed(quantize: str, folder: Path) -> Path:
    """The bundled base, quantised into a folder."""
    command = [sys.executable, "-m", "trimtab", "quantize", "smollm2-135m-instruct", str(folder), "--to", quantize]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


def compare(args: argparse.Namespace, model: Path) -> None:
    table = []
    for name in args.sets:
        rows = (args.data / name / "train.jsonl").resolve()
        theirs, own = [], []
        for _ in range(args.repeat):
            theirs.append(peer(args, model, rows))
            own.append(_run([sys.executable, __file__, "--ours", str(rows), "--base", str(model), *sizes(args)])[0])
        table.append(summary(name, theirs, own))
        print(json.dumps(table[-1]), flush=True)
    geometric = statistics.geometric_mean(row["ratio"] for row in table)
    print(json.dumps({"geometric_mean_ratio": round(geometric, 2), "peak_ratio": round(max(row["peak_ratio"] for row in table), 2)}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default="python", help="the interpreter of the peer's environment")
    parser.add_argument("--peer", type=Path, help="trl_peft_train.py")
    parser.add_argument("--data", type=Path, help="a folder with NAME/train.jsonl")
    parser.add_argument("--sets", nargs="+", default=["finance", "legal", "support"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--quantize", choices=("nf4", "int8"), help="both train on the base in this form")
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--base", default="smollm2-135m-instruct", help=argparse.SUPPRESS)
    return parser.parse_args()


def sizes(args: argparse.Namespace) -> list[str]:
    return ["--steps", str(args.steps), "--batch", str(args.batch)]


def ours(base: str, rows: Path, steps: int, batch: int) -> dict[str, Any]:
    """One trimtab run on the first steps * batch rows, in the peer's order."""
    import torch

    from trimtab.data.token_store import Tokens
    from trimtab.train import variant

    lines = rows.read_text(encoding="utf-8").splitlines()[: steps * batch]
    drawn = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0)).tolist()  # accelerate's SeedableRandomSampler, seed 0
    variant.order = lambda n, seed, epoch: range(n)
    made = Tokens.example

    def with_line_break(tokens: Tokens, row: int) -> Any:  # trl's target ends with the line break after the end of turn
        example = made(tokens, row)
        example.supervised[-1] = True
        return example

    Tokens.example = with_line_break
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rows.jsonl").write_text("\n".join(lines[i] for i in drawn), encoding="utf-8")
        options = {"lr": 2e-4, "max_steps": steps, "batch_size": batch, "schedule": "linear", "last_turn_only": True, "max_length": 1024}
        lora = {"data": "rows", "method": "lora", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
        content = {
            "base": base,
            "out": "out",
            "dtype": "bfloat16",
            "data": {"rows": {"train": "rows.jsonl"}},
            "variants": {"lora": lora | options},
        }
        report = trimtab.train(trimtab.RunConfig.from_dict(content, root=Path(folder)))
        steps_seen = [json.loads(line) for line in (report.out / "metrics.jsonl").read_text().splitlines()]
    s = report.summary
    return {
        "tokens": s["tokens"],
        "tokens_per_s": s["tokens_per_s"],
        "peak_gb": s["peak_memory_gb"],
        "losses": [e["loss"] for e in steps_seen],
    }


def peer(args: argparse.Namespace, model: Path, rows: Path) -> dict[str, Any]:
    command = [args.peer_python, str(args.peer.resolve()), str(model), str(rows), *sizes(args)]
    figures, text = _run(command)
    losses = [float(x) for x in re.findall(r"'loss': '?([0-9.]+)", text)]
    return {"tokens": figures["real_tokens"], "tokens_per_s": figures["tokens_per_s"], "peak_gb": figures["peak_gb"], "losses": losses}


def _run(command: list[str]) -> tuple[dict[str, Any], str]:
    """The last line's JSON, and everything that was printed."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1]), done.stdout


def summary(name: str, theirs: list[dict[str, Any]], own: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, the ratio of each repetition's pair, and the largest difference of the losses."""
    ratios = [b["tokens_per_s"] / a["tokens_per_s"] for a, b in zip(theirs, own, strict=True)]
    gaps = [abs(x - y) for x, y in zip(theirs[0]["losses"], own[0]["losses"], strict=False)]
    return {
        "set": name,
        "tokens": [theirs[0]["tokens"], own[0]["tokens"]],
        "trl_tokens_per_s": statistics.median(t["tokens_per_s"] for t in theirs),
        "trimtab_tokens_per_s": statistics.median(o["tokens_per_s"] for o in own),
        "ratio": round(statistics.median(ratios), 2),
        "trl_peak_gb": theirs[0]["peak_gb"],
        "trimtab_peak_gb": own[0]["peak_gb"],
        "peak_ratio": round(own[0]["peak_gb"] / theirs[0]["peak_gb"], 2),
        "losses": {"trl": theirs[0]["losses"], "trimtab": [round(x, 4) for x in own[0]["losses"]]},
        "largest_loss_gap": round(max(gaps), 4) if gaps else None,
    }


if __name__ == "__main__":
    main()
