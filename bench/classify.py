"""Classification by a head against imitating the labels' names: accuracy, and the time of training and of judging.

    python bench/classify.py --data ../shared/data/banking77 --out runs/classify

The same rows, base, LoRA and steps for both. `head`: objective classify, one score a label. `names`: the label as the answer, chosen among
all labels by likelihood. Each trains alone, in a process's time of all its threads; judging is of the test rows, after training.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import trimtab
from trimtab.forward.batch import BASE
from trimtab.train.evaluate import Contestant, Judge
from trimtab.train.finish import held_out
from trimtab.train.prepare import Prepared, prepare

WAYS: dict[str, dict[str, Any]] = {
    "head": {"objective": "classify", "valid_metric": "accuracy"},
    "names": {"valid_metric": "loss"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with train.jsonl, valid.jsonl and test.jsonl: text, label")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=3000, help="training rows")
    parser.add_argument("--held", type=int, default=400, help="valid rows, and test rows")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    rows = {s: (args.data / f"{s}.jsonl").read_text(encoding="utf-8").splitlines() for s in ("train", "valid", "test")}
    labels = sorted({json.loads(line)["label"] for line in rows["train"]})
    for split, lines in rows.items():
        kept = lines[: args.rows if split == "train" else args.held]
        (args.out / f"{split}.jsonl").write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    base = trimtab.load_base(args.base)
    found = {name: measured(name, way, base, labels, args) for name, way in WAYS.items()}
    print(f"{'':8} {'accuracy':>9} {'macro F1':>9} {'training':>10} {'judging':>9} {'tokens a step':>14}   (CPU s; {args.held} test rows)")
    for name, f in found.items():
        f1 = f"{100 * f['macro_f1']:9.2f}" if "macro_f1" in f else f"{'':9}"
        print(f"{name:8} {f['accuracy']:9.2f} {f1} {f['train_cpu_s']:10.1f} {f['judge_cpu_s']:9.1f} {f['tokens_a_step']:14.0f}")
    (args.out / "found.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measured(name: str, way: dict[str, Any], base: trimtab.Base, labels: list[str], args: argparse.Namespace) -> dict[str, Any]:
    columns = {"columns": {"text": "text", "label": "label"}}
    files = {s: [{"path": f"{s}.jsonl", **columns}] for s in ("train", "valid")}
    variant = {"data": "rows", "method": "lora", "epochs": args.epochs, "batch_size": args.batch, "lr": args.lr, "max_length": 256}
    content = {
        "base": args.base,
        "out": name,
        "data": {"rows": {**files, "labels": labels}},
        "variants": {name: variant | way},
        "evaluate": {"generate": False},
    }
    run = trimtab.RunConfig.from_dict(content, root=args.out.absolute())
    start = time.process_time()
    report = trimtab.train(run, base=base)
    trained = time.process_time() - start
    content["data"]["rows"] = {
        "train": files["valid"],
        "valid": files["valid"],
        "test": [{"path": "test.jsonl", **columns}],
        "labels": labels,
    }  # type: ignore[index]
    prepared: Prepared = prepare(trimtab.RunConfig.from_dict(content | {"out": f"{name}-test"}, root=args.out.absolute()), base)
    held, adapter = held_out(prepared, "rows", "test"), report.adapters[name]
    mix, (member,) = base.mix([adapter])
    judge = Judge(base.tokenizer, base.stop_ids, 1, run.max_tokens, base=base.attached)
    start = time.process_time()
    contestant = Contestant(name, member, generates=False, chooses=True, objective=prepared.variants[0].config.objective)
    scores = judge.judge(base.attached, mix, {"rows": [contestant]}, {"rows": held})["rows"][name].scores
    judged = time.process_time() - start
    assert member != BASE
    variant_of = report.summary["variants"][name]
    told = {"train_cpu_s": trained, "judge_cpu_s": judged, "tokens_a_step": variant_of["tokens"] / variant_of["steps"]}
    if "label_accuracy" in scores:
        return told | {"accuracy": scores["label_accuracy"]}
    return told | {"accuracy": 100 * scores["accuracy"], "macro_f1": scores["macro_f1"]}


if __name__ == "__main__":
    main()
