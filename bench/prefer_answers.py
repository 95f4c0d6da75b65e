"""Whether DPO helps after imitation: answers of a tenant preferred to the wrong ones that an imitating adapter gives itself.

    python bench/prefer_answers.py --data ../shared/data/tenants/support --out runs/prefer

1. LoRA imitates the training rows (their last answers). It is merged into a copy of the base, from which DPO begins and measures.
2. The merged base answers the prompts of training and valid rows. Where it is wrong, the row's answer is chosen and its own rejected.
3. DPO variants train together on these pairs. The best step by the valid pairs' reward accuracy is kept.
4. All answer the test rows. Printed: exact match and F1 of imitation and of each variant; reward accuracy on valid pairs. Where DPO begins
   both answers have the reward 0, so that no pair counts as right; half is chance.

Curves are in OUT/dpo/report.html. The defaults take some minutes on a quiet machine with a few cores; --rows takes fewer rows. If OUT has
the adapter that imitates, or the pairs, already, they are used.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import trimtab
from trimtab.store import Adapter

VARIANTS: dict[str, dict[str, Any]] = {
    "dpo": {"objective": "dpo", "beta": 0.1, "lr": 5e-5},
    "dpo-sft": {"objective": "dpo", "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2], "lr": 1e-4},
    "ipo": {"objective": "dpo", "loss_type": "ipo", "beta": 0.5, "lr": 5e-5},
    "orpo": {"objective": "orpo", "lr": 1e-4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with train.jsonl, valid.jsonl and test.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=1000, help="training rows, of imitation")
    parser.add_argument("--asked", type=int, help="of these, how many are answered for pairs; all where nothing is said")
    parser.add_argument("--held", type=int, default=400, help="valid rows, and test rows")
    parser.add_argument("--steps", type=int, default=80, help="of DPO")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = {split: read(args.data / f"{split}.jsonl") for split in ("train", "valid", "test")}
    rows = {split: talks[: args.rows if split == "train" else args.held] for split, talks in rows.items()}
    for split, talks in rows.items():
        write(args.out / f"{split}.jsonl", [{"prompt": talk[:-1], "completion": talk[-1:]} for talk in talks])
    imitate(args)
    merged, counts = trimtab.load_base(str(args.out / "merged")), {}
    asked = {"train": rows["train"][: args.asked], "valid": rows["valid"]}
    for split, talks in asked.items():
        file = args.out / f"pairs-{split}.jsonl"
        if not file.exists():
            write(file, pairs(merged, talks, args.max_new_tokens))
        counts[split] = len(file.read_text(encoding="utf-8").splitlines())
    print(json.dumps({"pairs": counts, "of": {s: len(talks) for s, talks in asked.items()}}), flush=True)
    show(args, merged, prefer(args), rows["test"])


def imitate(args: argparse.Namespace) -> None:
    """The adapter is merged into OUT/merged."""
    adapter = args.out / "sft" / "adapters" / "sft"
    if not adapter.exists():
        lora = {"data": "rows", "method": "lora", "last_turn_only": True, "epochs": 2}
        run(args, args.base, "sft", {"rows": {"train": "train.jsonl"}}, {"sft": lora})
    if not (args.out / "merged").exists():
        Adapter.load(adapter, trimtab.load_base(args.base)).merge_into(args.out / "merged")


def prefer(args: argparse.Namespace) -> Any:
    data = {"pairs": {"train": "pairs-train.jsonl", "valid": "pairs-valid.jsonl"}}
    own = {"method": "lora", "data": "pairs", "max_steps": args.steps, "batch_size": 8, "warmup_steps": 5, "eval_every": 10}
    variants = {n: own | {"valid_metric": "rewards/accuracies"} | VARIANTS[n] for n in args.variants}
    return run(args, str(args.out / "merged"), "dpo", data, variants)


def tested(args: argparse.Namespace, base: trimtab.Base, adapter: Any, talks: list[list[dict[str, str]]]) -> str:
    """Answers to the test rows, scored."""
    from trimtab.data.scores import exact_match, token_f1

    prompts, references = [base.encode_messages(talk[:-1]) for talk in talks], [talk[-1]["content"].strip() for talk in talks]
    said = base.generate(prompts, [adapter] * len(prompts), max_new_tokens=args.max_new_tokens)
    return f"{exact_match(said, references):11.2f}  {token_f1(said, references):5.2f}"


def run(args: argparse.Namespace, base: str, name: str, data: dict[str, Any], variants: dict[str, Any]) -> Any:
    content = {"base": base, "out": name, "data": data, "variants": variants, "evaluate": {"generate": False}}
    return trimtab.train(trimtab.RunConfig.from_dict(content, root=args.out.absolute()))


def pairs(base: trimtab.Base, talks: list[list[dict[str, str]]], max_new_tokens: int) -> list[dict[str, Any]]:
    """A row's answer, and what the base says where it is wrong."""
    said = base.generate([base.encode_messages(talk[:-1]) for talk in talks], max_new_tokens=max_new_tokens)
    wrong = [(t, s.strip()) for t, s in zip(talks, said, strict=True) if s.strip() and s.strip() != t[-1]["content"].strip()]
    return [{"prompt": t[:-1], "chosen": t[-1:], "rejected": [{"role": "assistant", "content": s}]} for t, s in wrong]


def show(args: argparse.Namespace, merged: trimtab.Base, report: Any, talks: list[list[dict[str, str]]]) -> None:
    print(f"{'':10} exact match  F1     reward accuracy on valid pairs, at step")
    print(f"{'imitation':10} {tested(args, merged, None, talks)}", flush=True)
    for name, v in report.summary["variants"].items():
        told = v["valid"]
        print(f"{name:10} {tested(args, report.base, report.adapters[name], talks)}  {told['best']:.3f}, {told['best_step']}", flush=True)


def read(path: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> int:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return len(rows)


if __name__ == "__main__":
    main()
