"""Quality: every method at its presets on held-out rows of several tenants, and the sweeps that the presets rest on.

    python bench/quality.py --data ../shared/data/tenants                                 # two epochs of all methods, and the table
    python bench/quality.py --data ../shared/data/tenants --sets legal --methods full prefix
    python bench/quality.py --data ../shared/data/tenants --sets finance --methods lora --quantize nf4      # on a base in 4 bits
    python bench/quality.py --data ../shared/data/tenants --sweep --steps 60              # each method's learning rates, by valid rows

DATA has a folder for each set with train.jsonl, valid.jsonl and test.jsonl. All methods of a set train together on one frozen base: 16 rows
a step, cosine after 10 steps of warm-up, every answer of a conversation supervised, the last step kept. Held-out rows ask for their last
answer; scores are of all test rows, greedy. A run folder is left for each set under --out; a run that was interrupted goes on from its last
checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import trimtab
from trimtab.train.sweep import sweep
from trimtab.train.trials import Sweep

METHODS = ("lora", "bottleneck", "ia3", "prefix", "prompt", "full")
GRIDS: dict[str, dict[str, list[Any]]] = {
    "lora": {"lr": [1e-3, 2e-3, 4e-3]},
    "bottleneck": {"lr": [1e-3, 2e-3, 4e-3]},
    "ia3": {"lr": [5e-3, 2e-2, 5e-2]},
    "prefix": {"lr": [1e-2, 3e-2, 1e-1]},
    "prompt": {"lr": [0.1, 0.3, 1.0], "num_virtual_tokens": [20, 50]},
    "full": {"lr": [5e-5, 1e-4]},
}
"""What a sweep tries, around the presets. What a method is not given here has its default."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=["finance", "legal", "support"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--quantize", help="pack the base: nf4, int8, …; the run's peak of memory is printed in any case")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--steps", type=int, default=60, help="of a sweep's trial; the worst two thirds end after a third, and after two")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    args = parser.parse_args()
    print("| tenant | variant | trainable | loss | exact match, % | F1, % |\n|---|---|---|---|---|---|" if not args.sweep else SWEEP_HEAD)
    for name in args.sets:
        print("\n".join(sweeps(args, name) if args.sweep else scores(args, name)), flush=True)


SWEEP_HEAD = "| tenant | method | setting | steps | valid loss |\n|---|---|---|---|---|"


def scores(args: argparse.Namespace, name: str) -> list[str]:
    """The rows of the table for one set: the base, then each method after two epochs at its presets."""
    content = common(args, name, {"epochs": 2, "warmup_steps": 10, "keep_best": False}) | {
        "out": f"{name}-{args.quantize}" if args.quantize else name,
        "quantize": args.quantize,
        "evaluate": {"max_new_tokens": 48},
        "checkpoint_every": 25,
        "variants": {m: {"data": name, "method": m} for m in args.methods},
    }
    summary = trimtab.train(trimtab.RunConfig.from_dict(content, root=args.out.resolve()), resume=True).summary
    found = [("base", "", summary["base_scores"][name])]
    found += [(m, f"{v['trainable']:,}", v["scores"]) for m, v in summary["variants"].items()]
    print(f"{name}, {args.quantize or 'dense'}: peak {summary['peak_memory_gb']} GB", file=sys.stderr)
    return [f"| {name} | {m} | {n} | {s['loss']:.3f} | {s['exact_match']:.1f} | {s['token_f1']:.1f} |" for m, n, s in found]


def sweeps(args: argparse.Namespace, name: str) -> list[str]:
    """The rows of the table for one set: all trials of all methods, best first."""
    rows = []
    for method in args.methods:
        content = common(args, name, {"max_steps": args.steps, "warmup_steps": 5}) | {
            "out": f"{name}-{method}",
            "evaluate": {"generate": False, "max_rows": 120},
            "sweep": {
                "variant": {"data": name, "method": method},
                "search": GRIDS[method],
                "halving": {"keep": 0.34, "every": -(-args.steps // 3)},
            },
        }
        board = sweep(Sweep.from_dict(content, root=args.out.resolve()), resume=True).leaderboard
        for t in board["trials"]:
            setting = ", ".join(f"{k} {v:g}" for k, v in t["values"].items())
            rows.append(f"| {name} | {method} | {setting} | {t['steps']} | {t['valid']:.3f} |")
    return rows


def common(args: argparse.Namespace, name: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """What a run file and a sweep file share."""
    folder = (args.data / name).resolve()
    return {
        "base": "smollm2-135m-instruct",
        "data": {name: {split: str(folder / f"{split}.jsonl") for split in ("train", "valid", "test")}},
        "defaults": {"batch_size": 16, "schedule": "cosine", "max_length": 1024} | defaults,
    }


if __name__ == "__main__":
    main()
