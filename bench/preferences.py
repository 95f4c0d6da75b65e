"""A DPO step beside trl + peft: the same pairs in the same order, LoRA r=16 on all linear layers of the bundled base, bf16, one thread.

    python bench/preferences.py --data ../shared/data/tenants/support/train.jsonl

Pairs are a row's answer and another row's answer to its prompt. trl's DPOTrainer takes the reference from the same model with the adapter
off, in each step; with --precompute before the first one. trimtab computes it once for the data set, before the first step. Each side runs
in fresh processes, in turns. Figures are seconds of CPU time of a step, the least over steps and repetitions, and peak memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LR = 2e-5


def main() -> None:
    args = _arguments()
    if args.side:
        print(json.dumps((trl if args.side == "trl" else trimtab)(args.data, args.steps, args.batch, args.precompute)))
        return
    found: dict[str, list[dict[str, Any]]] = {"trl": [], "trimtab": []}
    for _ in range(args.repeat):
        for side, told in found.items():
            told.append(_run(args, side))
            print(json.dumps({"side": side} | told[-1]), flush=True)
    least = {side: min(s for t in told for s in t["steps_s"]) for side, told in found.items()}
    peaks = {side: max(t["peak_gb"] for t in told) for side, told in found.items()}
    gap = max(abs(a - b) for a, b in zip(found["trl"][0]["losses"], found["trimtab"][0]["losses"], strict=True))
    print(
        json.dumps(
            {"step_s": least, "ratio": round(least["trl"] / least["trimtab"], 2), "peak_gb": peaks, "largest_loss_gap": round(gap, 4)}
        )
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="rows with messages, whose last one is an answer")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4, help="pairs of a step")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--precompute", action="store_true", help="trl computes the reference before the first step too")
    parser.add_argument("--side", choices=("trl", "trimtab"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(args: argparse.Namespace, side: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--data", str(args.data), "--steps", str(args.steps), "--batch", str(args.batch), "--side", side]
    command += ["--precompute"] if args.precompute else []
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return told


def pairs(data: Path, count: int) -> list[dict[str, Any]]:
    """The first rows: the answer is chosen, that of the row after it rejected."""
    talks = [json.loads(line)["messages"] for line in data.read_text(encoding="utf-8").splitlines()]
    found = []
    for talk, other in itertools.pairwise(talks):
        if talk[-1]["content"] != other[-1]["content"]:
            found.append({"prompt": talk[:-1], "chosen": talk[-1:], "rejected": other[-1:]})
    return found[:count]


def trimtab(data: Path, steps: int, batch: int, precompute: bool) -> dict[str, Any]:
    import trimtab as tt
    from trimtab.train import variant
    from trimtab.train.listen import Silent

    variant.order = lambda n, seed, epoch: range(n)  # as given
    marks = list[float]()

    class Clock(Silent):
        def begin(self, *args: Any) -> None:
            marks.append(time.process_time())

        def step(self, line: Any) -> None:
            marks.append(time.process_time())

    with tempfile.TemporaryDirectory() as folder:
        rows = pairs(data, steps * batch)
        (Path(folder) / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        lora = {
            "method": "lora",
            "r": 16,
            "lora_alpha": 32,
            "target_modules": "all-linear",
            "lr": LR,
            "max_steps": steps,
            "batch_size": batch,
        }
        content = {
            "base": "smollm2-135m-instruct",
            "out": "out",
            "dtype": "bfloat16",
            "data": {"rows": {"train": "rows.jsonl"}},
            "variants": {"v": lora | {"data": "rows", "objective": "dpo", "schedule": "linear"}},
        }
        report = tt.train(tt.RunConfig.from_dict(content, root=Path(folder)), listener=Clock())
        lines = [json.loads(line) for line in (report.out / "metrics.jsonl").read_text().splitlines()]
    return _told(marks, [line["loss"] for line in lines], sum(line["tokens"] for line in lines))


def trl(data: Path, steps: int, batch: int, precompute: bool) -> dict[str, Any]:
    import datasets
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from trimtab import bases

    model = bases.locate("smollm2-135m-instruct", lambda text: None)
    marks, losses = list[float](), list[float]()

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **more: Any) -> None:
            marks.append(time.process_time())

        def on_step_end(self, *args: Any, **more: Any) -> None:
            marks.append(time.process_time())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            losses.extend([float(logs["loss"])] if "loss" in logs else [])

    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder, per_device_train_batch_size=batch, max_steps=steps, learning_rate=LR, logging_steps=1, report_to="none",
            use_cpu=True, bf16=True, gradient_checkpointing=False, save_strategy="no", train_sampling_strategy="sequential",
            precompute_ref_log_probs=precompute, disable_tqdm=True,
        )  # fmt: skip
        trainer = DPOTrainer(
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16),
            args=config,
            train_dataset=datasets.Dataset.from_list(pairs(data, steps * batch)),
            processing_class=AutoTokenizer.from_pretrained(model),
            peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"),
            callbacks=[Clock()],
        )
        trainer.train()
    return _told(marks, losses, None)


def _told(marks: list[float], losses: list[float], tokens: int | None) -> dict[str, Any]:
    steps = [round(b - a, 3) for a, b in itertools.pairwise(marks)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6 * 1.024
    return {"steps_s": steps, "before_s": round(marks[0], 2), "peak_gb": round(peak, 2), "losses": losses, "tokens": tokens}


if __name__ == "__main__":
    main()
