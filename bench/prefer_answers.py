"""Whether DPO helps after imitation: answers of a tenant preferred to the wrong ones that an imitating adapter gives itself.

    python bench/prefer_answers.py --data ../shared/data/tenants/support --out runs/prefer

1. LoRA imitates the training rows (their last answers). It is merged into a copy of the base, from which DPO begins and measures.
2. The merged base answers the prompts of training and valid rows. Where it is wrong, the row's answer is chosen and its own rejected.
3. DPO variants train together on these pairs. The best step by the valid pairs' reward accuracy is kept.
4. All answer the test rows. Printed: exact match and F1 of the base, of imitation and of each variant; reward accuracy on valid pairs.

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
    parser.add_argument("--rows", type=int, default=1000, help="training rows, of imitation and to answer")
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
    imitated = imitate(args)
    merged, counts = trimtab.load_base(str(args.out / "merged")), {}
    for split in ("train", "valid"):
        file = args.out / f"pairs-{split}.jsonl"
        if not file.exists():
            write(file, pairs(merged, rows[split], args.max_new_tokens))
        counts[split] = len(file.read_text(encoding="utf-8").splitlines())
    print(json.dumps({"pairs": counts, "of": {s: len(rows[s]) for s in counts}}), flush=True)
    show(imitated, prefer(args))


def imitate(args: argparse.Namespace) -> dict[str, Any]:
    """The summary; the adapter is merged into OUT/merged."""
    if (args.out / "sft" / "summary.json").exists():
        adapter, base = args.out / "sft" / "adapters" / "sft", trimtab.load_base(args.base)
        if not (args.out / "merged").exists():
            Adapter.load(adapter, base).merge_into(args.out / "merged")
        return dict(json.loads((args.out / "sft" / "summary.json").read_text(encoding="utf-8")))
    lora = {"data": "rows", "method": "lora", "last_turn_only": True, "epochs": 2}
    report = run(args, args.base, "sft", {"rows": {"train": "train.jsonl", "test": "test.jsonl"}}, {"sft": lora})
    Adapter.load(report.out / "adapters" / "sft", report.base).merge_into(args.out / "merged")
    return report.summary


def prefer(args: argparse.Namespace) -> dict[str, Any]:
    data = {"pairs": {"train": "pairs-train.jsonl", "valid": "pairs-valid.jsonl"}}
    own = {"method": "lora", "data": "pairs", "max_steps": args.steps, "batch_size": 8, "warmup_steps": 5, "eval_every": 10}
    variants = {n: own | {"valid_metric": "rewards/accuracies"} | VARIANTS[n] for n in args.variants}
    report = run(args, str(args.out / "merged"), "dpo", data, variants)
    return report.summary | {"test": tested(args, report)}


def tested(args: argparse.Namespace, report: Any) -> dict[str, Any]:
    """The trained adapters' answers to the test rows, scored."""
    from trimtab.data.scores import exact_match, token_f1

    talks = read(args.data / "test.jsonl")[: args.held]
    prompts, references = [report.base.encode_messages(talk[:-1]) for talk in talks], [talk[-1]["content"].strip() for talk in talks]
    found = {}
    for name, adapter in report.adapters.items():
        said = report.base.generate(prompts, [adapter] * len(prompts), max_new_tokens=args.max_new_tokens)
        found[name] = {"exact_match": exact_match(said, references), "token_f1": token_f1(said, references)}
    return found


def run(args: argparse.Namespace, base: str, name: str, data: dict[str, Any], variants: dict[str, Any]) -> Any:
    evaluate = {"max_new_tokens": args.max_new_tokens}
    content = {"base": base, "out": name, "data": data, "variants": variants, "evaluate": evaluate}
    return trimtab.train(trimtab.RunConfig.from_dict(content, root=args.out.absolute()))


def pairs(base: trimtab.Base, talks: list[list[dict[str, str]]], max_new_tokens: int) -> list[dict[str, Any]]:
    """A row's answer, and what the base says where it is wrong."""
    said = base.generate([base.encode_messages(talk[:-1]) for talk in talks], max_new_tokens=max_new_tokens)
    wrong = [(t, s.strip()) for t, s in zip(talks, said, strict=True) if s.strip() and s.strip() != t[-1]["content"].strip()]
    return [{"prompt": t[:-1], "chosen": t[-1:], "rejected": [{"role": "assistant", "content": s}]} for t, s in wrong]


def show(imitated: dict[str, Any], preferred: dict[str, Any]) -> None:
    before = imitated["base_scores"]["rows"], imitated["variants"]["sft"]["scores"]
    print(f"{'':10} exact match  F1     reward accuracy on valid pairs, at step")
    for name, scores in zip(("base", "imitation"), before, strict=True):
        print(f"{name:10} {scores['exact_match']:11.2f}  {scores['token_f1']:5.2f}")
    for name, v in preferred["variants"].items():
        told, scores = v["valid"], preferred["test"][name]
        print(f"{name:10} {scores['exact_match']:11.2f}  {scores['token_f1']:5.2f}  {told['best']:.3f}, {told['best_step']}")


def read(path: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> int:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return len(rows)


if __name__ == "__main__":
    main()
