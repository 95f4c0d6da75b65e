"""Whether DPO helps after imitation: answers of a tenant preferred to the wrong ones that an imitating adapter gives itself.

    python bench/prefer_answers.py --data ../shared/data/tenants/support --out runs/prefer

1. LoRA imitates the first training rows (their last answers). It is merged into a copy of the base, from which DPO begins and measures.
2. The merged base answers prompts of further training rows, which it has not imitated, and of valid and test rows. The row's answer is
   chosen. Its own is rejected where it is wrong; where it is right, a wrong one that is drawn at temperature 1. Pairs of mistakes alone
   would teach never to say what is said too often, even where it is right.
3. DPO variants train together on these pairs. The best step by the valid pairs' reward accuracy is kept.
4. Printed of imitation and of each variant, with 95% intervals and McNemar's test over the same rows:
   - own mistakes: the share of test pairs whose row's answer has the larger log-probability. Imitation has few of these right, as it
     prefers its own answer; a change of any kind raises that a little.
   - other answers: the same against an answer to another row, drawn at random, of all test rows. Here imitation has no handicap.
   - exact match of greedy answers to all test rows.

Curves are in OUT/dpo/report.html. If OUT has the adapter that imitates, the pairs, or the variants already, they are used.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from paired import told

import trimtab
from trimtab.data import Source, load_examples
from trimtab.objectives.dpo import Dpo
from trimtab.store import Adapter
from trimtab.train.measure import log_probabilities_of

VARIANTS: dict[str, dict[str, Any]] = {
    "dpo": {"objective": "dpo", "beta": 0.1, "lr": 5e-5},
    "dpo-sft": {"objective": "dpo", "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2], "lr": 3e-4},
    "ipo": {"objective": "dpo", "loss_type": "ipo", "beta": 0.5, "lr": 5e-5},
    "orpo": {"objective": "orpo", "lr": 1e-4},
}
FILES = {"own mistakes": "pairs", "other answers": "others"}
"""What is measured over pairs, and the file of them."""
DRAWN = 2
"""Answers that are drawn where the likeliest one is right."""
TOGETHER = 64
"""Prompts that are answered at the same time: their keys and values take memory."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with train.jsonl, valid.jsonl and test.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=400, help="training rows that are imitated")
    parser.add_argument("--asked", type=int, default=400, help="further training rows that are answered for pairs")
    parser.add_argument("--valid", type=int, default=60, help="valid rows, which choose the step")
    parser.add_argument("--held", type=int, default=400, help="test rows")
    parser.add_argument("--steps", type=int, default=80, help="of DPO")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    of_train = read(args.data / "train.jsonl")
    rows = {
        "train": of_train[: args.rows],
        "asked": of_train[args.rows : args.rows + args.asked],
        "valid": read(args.data / "valid.jsonl")[: args.valid],
        "test": read(args.data / "test.jsonl")[: args.held],
    }
    write(args.out / "train.jsonl", [{"prompt": talk[:-1], "completion": talk[-1:]} for talk in rows["train"]])
    imitate(args)
    merged, counts = trimtab.load_base(str(args.out / "merged")), {}
    for split in ("asked", "valid", "test"):
        talks, said = rows[split], said_to(args, merged, split, rows[split])
        if split != "test":
            said = with_wrong_ones(args, merged, split, talks, said)
        counts[split] = write(args.out / f"pairs-{split}.jsonl", wrong(talks, said))
    print(json.dumps({"pairs": counts, "of": {s: len(rows[s]) for s in counts}}), flush=True)
    show(args, merged, prefer(args, merged), rows["test"], {m["content"] for talk in of_train for m in talk[-1:]})


def imitate(args: argparse.Namespace) -> None:
    """The adapter is merged into OUT/merged."""
    adapter = args.out / "sft" / "adapters" / "sft"
    if not adapter.exists():
        lora = {"data": "rows", "method": "lora", "last_turn_only": True, "epochs": 2}
        run(args, args.base, "sft", {"rows": {"train": "train.jsonl"}}, {"sft": lora})
    if not (args.out / "merged").exists():
        Adapter.load(adapter, trimtab.load_base(args.base)).merge_into(args.out / "merged")


def prefer(args: argparse.Namespace, merged: trimtab.Base) -> dict[str, Adapter]:
    """The variants, each at its best step."""
    data = {"pairs": {"train": "pairs-asked.jsonl", "valid": "pairs-valid.jsonl"}}
    own = {"method": "lora", "data": "pairs", "max_steps": args.steps, "batch_size": 8, "warmup_steps": 5, "eval_every": 10}
    variants = {n: own | {"valid_metric": "rewards/accuracies"} | VARIANTS[n] for n in args.variants}
    if not (args.out / "dpo" / "summary.json").exists():
        run(args, str(args.out / "merged"), "dpo", data, variants)
    return {n: Adapter.load(args.out / "dpo" / "adapters" / n, merged) for n in args.variants}


def run(args: argparse.Namespace, base: str, name: str, data: dict[str, Any], variants: dict[str, Any]) -> Any:
    content = {"base": base, "out": name, "data": data, "variants": variants, "evaluate": {"generate": False}}
    return trimtab.train(trimtab.RunConfig.from_dict(content, root=args.out.absolute()))


def answers(args: argparse.Namespace, base: trimtab.Base, adapter: Adapter | None, talks: list[Any], temperature: float = 0.0) -> list[str]:
    found: list[str] = []
    for at in range(0, len(talks), TOGETHER):
        prompts = [base.encode_messages(talk[:-1]) for talk in talks[at : at + TOGETHER]]
        options = {"max_new_tokens": args.max_new_tokens, "temperature": temperature, "seed": at}
        found += base.generate(prompts, [adapter] * len(prompts), **options)
    return [said.strip() for said in found]


def said_to(args: argparse.Namespace, base: trimtab.Base, split: str, talks: list[Any]) -> list[str]:
    found: list[str] = kept(args.out / f"answers-{split}.json", lambda: answers(args, base, None, talks))
    return found


def with_wrong_ones(args: argparse.Namespace, base: trimtab.Base, split: str, talks: list[Any], said: list[str]) -> list[str]:
    """What is said, and where that is right a wrong answer that is drawn, if there is one."""
    right = [i for i, (talk, s) in enumerate(zip(talks, said, strict=True)) if s == talk[-1]["content"].strip()]
    asked = [talks[i] for i in right for _ in range(DRAWN)]
    drawn = kept(args.out / f"drawn-{split}.json", lambda: answers(args, base, None, asked, temperature=1.0))
    instead = {i: [s for s in drawn[n * DRAWN : (n + 1) * DRAWN] if s != said[i]] for n, i in enumerate(right)}
    return [(instead.get(i) or [s])[0] for i, s in enumerate(said)]


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """What a file holds, which is made first where it is not there."""
    if not file.exists():
        file.write_text(json.dumps(make()), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def wrong(talks: list[Any], said: list[str]) -> list[dict[str, Any]]:
    """Pairs of a row's answer and what is said instead of it."""
    both = [(t, s) for t, s in zip(talks, said, strict=True) if s and s != t[-1]["content"].strip()]
    return [{"prompt": t[:-1], "chosen": t[-1:], "rejected": [{"role": "assistant", "content": s}]} for t, s in both]


@torch.no_grad()
def preferred(base: trimtab.Base, adapter: Adapter | None, file: Path) -> list[float]:
    """For each pair, 1 where the chosen answer has the larger log-probability."""
    examples = load_examples([Source(str(file))], base.tokenizer, root=Path(), max_length=1024, parts=Dpo.parts).examples
    mix, (member,) = base.mix([adapter])
    found = []
    for i in range(len(examples)):
        segments = examples[i].segments
        logp_R = log_probabilities_of(base.attached, mix, [(member, s) for s in segments])
        chosen, rejected = logp_R.split([int(s.supervised.sum()) for s in segments])
        found.append(float(chosen.sum() > rejected.sum()))
    return found


def show(args: argparse.Namespace, base: trimtab.Base, adapters: dict[str, Adapter], talks: list[Any], known: set[str]) -> None:
    draw = random.Random(0)
    others = [draw.choice(sorted(known - {talk[-1]["content"]})) for talk in talks]
    write(args.out / "others-test.jsonl", wrong(talks, others))

    def found(name: str) -> dict[str, list[float]]:
        adapter = adapters.get(name)
        pairs = {what: preferred(base, adapter, args.out / f"{stem}-test.jsonl") for what, stem in FILES.items()}
        said = answers(args, base, adapter, talks)
        return pairs | {"exact match": [float(s == t[-1]["content"].strip()) for s, t in zip(said, talks, strict=True)]}

    def figures(name: str) -> dict[str, list[float]]:
        of_name: dict[str, list[float]] = kept(args.out / f"found-{name}.json", lambda: found(name))
        return of_name

    before = figures("imitation")
    told_of = json.loads((args.out / "dpo" / "summary.json").read_text(encoding="utf-8"))["variants"]
    for name in adapters:
        valid = told_of[name]["valid"]
        print(f"{name}, step {valid['best_step']}, reward accuracy on valid pairs {valid['best']:.3f}; test rows:")
        for what, after in figures(name).items():
            print(f"    {what:14} of {len(after)}: {told(before[what], after)}", flush=True)


def read(path: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> int:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return len(rows)


if __name__ == "__main__":
    main()
