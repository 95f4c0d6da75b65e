"""Joint training beside solo runs: 8 variants of mixed methods on three data sets, on one frozen base.

    python bench/train_joint.py [--data ../shared/data/tenants] [--steps 6]

One process trains all 8 together, then each alone in a process of its own. Printed: wall time and peak memory of both, and the largest
relative difference between a variant's losses in the joint run and alone (--dtype float32; bf16 rounds differently in other company).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DESKS = Path(__file__).parent.parent / "examples" / "desks"
VARIANTS: dict[str, dict[str, Any]] = {
    "lora-r16": {"data": 0, "method": "lora", "r": 16, "lr": 1e-3},
    "lora-r64": {"data": 1, "method": "lora", "r": 64, "lr": 5e-4},
    "dora-r8": {"data": 2, "method": "lora", "r": 8, "use_dora": True, "lr": 1e-3},
    "ia3": {"data": 0, "method": "ia3", "lr": 1e-2},
    "houlsby": {"data": 1, "method": "bottleneck", "lr": 1e-3},
    "parallel": {"data": 2, "method": "bottleneck", "variant": "parallel", "scaling": 4.0, "lr": 1e-3},
    "prompt": {"data": 0, "method": "prompt", "num_virtual_tokens": 20, "lr": 3e-2},
    "prefix": {"data": 1, "method": "prefix", "num_virtual_tokens": 30, "lr": 5e-3},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DESKS, help="a folder with NAME/train.jsonl for three names")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only is not None:
        print(json.dumps(run(args, args.only or list(VARIANTS))))
        return
    joint = _fresh(args, [])
    solo = {name: _fresh(args, [name]) for name in VARIANTS}
    gaps = {
        name: max(abs(a - b) / abs(b) for a, b in zip(joint["losses"][name], s["losses"][name], strict=True)) for name, s in solo.items()
    }
    peak = max(s["peak_gb"] for s in solo.values())
    figures = {
        "variants": len(VARIANTS),
        "steps": args.steps,
        "dtype": args.dtype,
        "joint_s": joint["seconds"],
        "solo_s": round(sum(s["seconds"] for s in solo.values()), 1),
        "joint_peak_gb": joint["peak_gb"],
        "largest_solo_peak_gb": peak,
        "peak_ratio": round(joint["peak_gb"] / peak, 2),
        "largest_relative_loss_gap": {n: float(f"{g:.2g}") for n, g in gaps.items()},
    }
    print(json.dumps(figures, indent=1))


def run(args: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Train these variants together; seconds are those of the steps."""
    import trimtab

    sets = sorted(p.parent for p in args.data.resolve().glob("*/train.jsonl"))[:3]
    common = {"max_steps": args.steps, "batch_size": 16, "max_length": 1024, "last_turn_only": True}
    variants = {n: VARIANTS[n] | common | {"data": sets[VARIANTS[n]["data"]].name} for n in names}
    with tempfile.TemporaryDirectory() as folder:
        data = {s.name: {"train": str(s / "train.jsonl")} for s in sets if any(v["data"] == s.name for v in variants.values())}
        content = {
            "base": "smollm2-135m-instruct",
            "out": "out",
            "dtype": args.dtype,
            "data": data,
            "variants": variants,
            "checkpoint_every": None,
        }
        started = time.perf_counter()
        report = trimtab.train(trimtab.RunConfig.from_dict(content, root=Path(folder)))
        lines = [json.loads(line) for line in (report.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {n: [e["loss"] for e in lines if e["variant"] == n] for n in names}
    peak, seconds = report.summary["peak_memory_gb"], report.summary["seconds"]
    return {"seconds": seconds, "wall_s": round(time.perf_counter() - started, 1), "peak_gb": peak, "losses": losses}


def _fresh(args: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """`run` in a process of its own, so that its peak memory is its own."""
    options = ["--data", str(args.data), "--steps", str(args.steps), "--dtype", args.dtype]
    done = subprocess.run([sys.executable, __file__, *options, "--only", *names], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
