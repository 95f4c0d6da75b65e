"""Whether reinforcement helps after imitation: GRPO with an exact-match reward on a tenant, from an adapter that has imitated its answers.

    python bench/reward_answers.py --data ../shared/data/tenants/finance --out runs/rewarded

1. LoRA imitates the first training rows. It is merged into a copy of the base, from which GRPO begins.
2. GRPO draws 8 answers to each of 8 prompts in a step, and rewards those that are the row's own. The best step by the reward of the valid
   rows is kept.
3. Printed: the reward of drawn answers over the steps, and exact match on valid and test rows, of imitation and of each variant.

Curves are in OUT/grpo/report.html. The defaults take about ten minutes on a quiet machine with a few cores. If OUT has a merged base
already, the run begins with it: `--name` is the folder of its GRPO.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import trimtab
from trimtab.store import Adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with train.jsonl, valid.jsonl and test.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=600, help="training rows that are imitated")
    parser.add_argument("--held", type=int, default=150, help="valid rows, and test rows")
    parser.add_argument("--steps", type=int, default=60, help="of GRPO")
    parser.add_argument("--prompts", type=int, default=8, help="of a step")
    parser.add_argument("--answers", type=int, default=8, help="to each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--lr", type=float, nargs="+", default=[5e-5, 1e-4], help="a variant each; they train together")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="a variant for each of these and each --lr: other rows, other draws"
    )
    parser.add_argument("--name", default="grpo", help="of the folder that GRPO writes")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", None), ("valid", args.held), ("test", args.held)):
        lines = (args.data / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (args.out / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    (args.out / "imitated.jsonl").write_text("".join((args.out / "train.jsonl").open(encoding="utf-8").readlines()[: args.rows]))
    if not (args.out / "merged").exists():
        imitate(args)
    show(args, reinforce(args))


def imitate(args: argparse.Namespace) -> None:
    """The adapter is merged into OUT/merged."""
    lora = {"data": "rows", "method": "lora", "last_turn_only": True, "epochs": 2}
    report = run(args, args.base, "sft", {"rows": {"train": "imitated.jsonl"}}, {"sft": lora})
    Adapter.load(report.out / "adapters" / "sft", report.base).merge_into(args.out / "merged")


def reinforce(args: argparse.Namespace) -> Any:
    aim = {"objective": "grpo", "num_generations": args.answers, "max_completion_length": args.max_new_tokens, "rewards": "exact_match"}
    own = {"data": "rows", "method": "lora", "max_steps": args.steps, "batch_size": args.prompts, "eval_every": max(1, args.steps // 6)}
    own |= {"schedule": "constant", "warmup_steps": min(3, args.steps)}
    variants = {f"lr-{lr:g}-seed-{seed}": own | aim | {"lr": lr, "seed": seed} for lr in args.lr for seed in args.seeds}
    data = {"rows": {split: f"{split}.jsonl" for split in ("train", "valid", "test")}}
    return run(args, str(args.out / "merged"), args.name, data, variants)


def run(args: argparse.Namespace, base: str, name: str, data: dict[str, Any], variants: dict[str, Any]) -> Any:
    content = {"base": base, "out": name, "data": data, "variants": variants, "evaluate": {"max_new_tokens": args.max_new_tokens}}
    return trimtab.train(trimtab.RunConfig.from_dict(content, root=args.out.absolute()))


def show(args: argparse.Namespace, report: Any) -> None:
    lines = [json.loads(line) for line in (report.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    before = report.summary["base_scores"]["rows"]["reward"]
    tenth = max(1, args.steps // 6)
    print(f"{'':16} reward of drawn answers, each {tenth} steps")
    for name, v in report.summary["variants"].items():
        drawn = [line["reward"] for line in lines if line["variant"] == name and "reward" in line]
        print(
            f"{name:16} " + " ".join(f"{sum(part) / len(part):.3f}" for i in range(0, len(drawn), tenth) if (part := drawn[i : i + tenth]))
        )
        valid = [(x["step"], round(x["reward"], 3)) for x in v["valid"]["history"]]
        print(f"{'':16} valid: imitation {v['valid']['base']['reward']:.3f}, at steps {valid}")
        print(f"{'':16} test: imitation {before:.3f}, step {v['saved_step']} {v['scores']['reward']:.3f}")


if __name__ == "__main__":
    main()
