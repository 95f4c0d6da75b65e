"""Whether reinforcement helps after imitation: GRPO with an exact-match reward on a tenant, from an adapter that has imitated its answers.

    python bench/reward_answers.py --data ../shared/data/tenants/finance --out runs/rewarded

1. LoRA imitates the first training rows. It is merged into a copy of the base, from which GRPO begins.
2. GRPO draws 8 answers to each of 8 prompts in a step, and rewards those that are the row's own. The best step by the reward of the valid
   rows is kept.
3. Printed: the reward of drawn answers over the steps, and on test rows, of imitation and of each variant, with 95% intervals over rows:
   the reward of drawn answers, which GRPO raises, four to each row; and exact match of the greedy answer, with McNemar's test. Of several
   seeds the mean of each row is told too.

Curves are in OUT/grpo/report.html. The defaults take about ten minutes on a quiet machine with a few cores. If OUT has a merged base
already, the run begins with it: `--name` is the folder of its GRPO, which is not trained again. Several names are measured together.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from paired import told

import trimtab
from trimtab.store import Adapter

DRAWN = 4
"""Answers to each test row."""
TOGETHER = 64
"""Test rows that are answered at the same time: their keys and values take memory."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with train.jsonl, valid.jsonl and test.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=200, help="training rows that are imitated")
    parser.add_argument("--valid", type=int, default=100, help="valid rows, which choose the step")
    parser.add_argument("--held", type=int, default=400, help="test rows")
    parser.add_argument("--steps", type=int, default=60, help="of GRPO")
    parser.add_argument("--prompts", type=int, default=8, help="of a step")
    parser.add_argument("--answers", type=int, default=8, help="to each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4], help="a variant each; they train together")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="a variant for each of these and each --lr: other rows, other draws"
    )
    parser.add_argument("--name", nargs="+", default=["grpo"], help="of the folder that GRPO writes, and of others that are there")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", None), ("valid", args.valid), ("test", args.held)):
        lines = (args.data / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (args.out / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    (args.out / "imitated.jsonl").write_text("".join((args.out / "train.jsonl").open(encoding="utf-8").readlines()[: args.rows]))
    if not (args.out / "merged").exists():
        imitate(args)
    if not (args.out / args.name[0] / "summary.json").exists():
        reinforce(args)
    show(args)


def imitate(args: argparse.Namespace) -> None:
    """The adapter is merged into OUT/merged."""
    lora = {"data": "rows", "method": "lora", "last_turn_only": True, "epochs": 2}
    report = run(args, args.base, "sft", {"rows": {"train": "imitated.jsonl"}}, {"sft": lora})
    Adapter.load(report.out / "adapters" / "sft", report.base).merge_into(args.out / "merged")


def reinforce(args: argparse.Namespace) -> None:
    aim = {"objective": "grpo", "num_generations": args.answers, "max_completion_length": args.max_new_tokens, "rewards": "exact_match"}
    own = {"data": "rows", "method": "lora", "max_steps": args.steps, "batch_size": args.prompts, "eval_every": max(1, args.steps // 6)}
    own |= {"schedule": "constant", "warmup_steps": min(3, args.steps)}
    variants = {f"lr-{lr:g}-seed-{seed}": own | aim | {"lr": lr, "seed": seed} for lr in args.lr for seed in args.seeds}
    data = {"rows": {split: f"{split}.jsonl" for split in ("train", "valid")}}
    run(args, str(args.out / "merged"), args.name[0], data, variants)


def run(args: argparse.Namespace, base: str, name: str, data: dict[str, Any], variants: dict[str, Any]) -> Any:
    content = {"base": base, "out": name, "data": data, "variants": variants, "evaluate": {"generate": False}}
    return trimtab.train(trimtab.RunConfig.from_dict(content, root=args.out.absolute()))


def show(args: argparse.Namespace) -> None:
    base = trimtab.load_base(str(args.out / "merged"))
    rows = [json.loads(line)["messages"] for line in (args.out / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    before, tenth = measured(args, base, None, rows, args.out / "found-imitation.json"), max(1, args.steps // 6)
    found: dict[str, dict[str, list[float]]] = {}
    for out in (args.out / name for name in args.name):
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for name, v in json.loads((out / "summary.json").read_text(encoding="utf-8"))["variants"].items():
            drawn = [line["reward"] for line in lines if line["variant"] == name and "reward" in line]
            parts = " ".join(f"{np.mean(drawn[i : i + tenth]):.3f}" for i in range(0, len(drawn), tenth))
            print(f"{name}: reward of drawn answers, each {tenth} steps: {parts}")
            valid = [(x["step"], round(x["reward"], 3)) for x in v["valid"]["history"]]
            print(f"    valid, greedy: imitation {v['valid']['base']['reward']:.3f}, at steps {valid}")
            after = measured(args, base, Adapter.load(out / "adapters" / name, base), rows, out / f"found-{name}.json")
            found[f"{out.name}/{name}"] = after
            print(f"    step {v['saved_step']}, {compared(before, after)}", flush=True)
    if len(found) > 1:
        means = {what: np.mean([f[what] for f in found.values()], axis=0).tolist() for what in before}
        print(f"mean of {len(found)}: {compared(before, means)}")


def compared(before: dict[str, list[float]], after: dict[str, list[float]]) -> str:
    return "; ".join(f"test, {what}, of {len(before[what])}: {told(before[what], after[what])}" for what in before)


def measured(args: argparse.Namespace, base: trimtab.Base, adapter: Adapter | None, rows: list[Any], file: Path) -> dict[str, list[float]]:
    """Of each test row, the reward of drawn answers and of the greedy one. Kept in a file."""
    if not file.exists():
        prompts = [base.encode_messages(row[:-1]) for row in rows]
        wanted = [row[-1]["content"].strip() for row in rows]

        def right(times: int, temperature: float) -> list[float]:
            said: list[str] = []
            for at in range(0, len(prompts), TOGETHER):
                asked = [p for p in prompts[at : at + TOGETHER] for _ in range(times)]
                options = {"max_new_tokens": args.max_new_tokens, "temperature": temperature, "seed": at}
                said += base.generate(asked, [adapter] * len(asked), **options)
            equal = [float(s.strip() == w) for s, w in zip(said, (w for w in wanted for _ in range(times)), strict=True)]
            return np.reshape(equal, (-1, times)).mean(axis=1).tolist()

        file.write_text(json.dumps({"drawn": right(DRAWN, 1.0), "greedy": right(1, 0.0)}))
    found: dict[str, list[float]] = json.loads(file.read_text())
    return found


if __name__ == "__main__":
    main()
