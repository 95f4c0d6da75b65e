"""A GRPO step beside trl + peft: 8 prompts with 8 answers of 64 tokens each, LoRA r=16 on all linear layers of the bundled base, bf16, one
thread.

    python bench/reinforce.py --data ../shared/data/tenants/finance/train.jsonl

trl draws with its own generation path, transformers' `generate`. Both sides are given the same rewards (the share of letters "e"), and both
draw exactly --tokens tokens: the end token cannot come. Each side runs in fresh processes, in turns. Figures are seconds of CPU time of a
step, the least over steps and repetitions, peak memory, and of trimtab |Δ log p| of a token between sampler and trainer.
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

LR = 1e-5
REWARD = """
def letters(completions, **_):
    texts = [c[0]["content"] for c in completions]
    return [t.count("e") / (1 + len(t)) for t in texts]
"""


def main() -> None:
    args = _arguments()
    if args.side:
        print(json.dumps((trl if args.side == "trl" else trimtab)(args)))
        return
    found: dict[str, list[dict[str, Any]]] = {"trl": [], "trimtab": []}
    for _ in range(args.repeat):
        for side, told in found.items():
            told.append(_run(args, side))
            print(json.dumps({"side": side} | told[-1]), flush=True)
    least = {side: min(s for t in told for s in t["steps_s"]) for side, told in found.items()}
    peaks = {side: max(t["peak_gb"] for t in told) for side, told in found.items()}
    print(json.dumps({"step_s": least, "ratio": round(least["trl"] / least["trimtab"], 2), "peak_gb": peaks}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="rows with messages, whose last one is an answer")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--answers", type=int, default=8, help="to each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--side", choices=("trl", "trimtab"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(args: argparse.Namespace, side: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side]
    for name in ("data", "steps", "prompts", "answers", "tokens"):
        command += [f"--{name}", str(getattr(args, name))]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return told


def prompts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The prompts of the first rows."""
    lines = args.data.read_text(encoding="utf-8").splitlines()[: args.steps * args.prompts]
    return [{"prompt": json.loads(line)["messages"][:-1]} for line in lines]


def trimtab(args: argparse.Namespace) -> dict[str, Any]:
    import trimtab as tt
    from trimtab.train import rewarding, variant
    from trimtab.train.listen import Silent

    variant.order = lambda n, seed, epoch: range(n)  # as given
    rewarding.Rewarding.stop_ids = frozenset()  # nothing ends an answer
    marks, lengths, apart = list[float](), list[float](), list[float]()

    class Clock(Silent):
        def begin(self, *told: Any) -> None:
            marks.append(time.process_time())

        def step(self, line: Any) -> None:
            marks.append(time.process_time())
            lengths.append(line["completions/mean_length"])
            apart.extend(x for k, x in line.items() if k == "sampling/sampling_logp_difference/mean")  # where an answer is learnt

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in prompts(args)), encoding="utf-8")
        (root / "rewards.py").write_text(REWARD, encoding="utf-8")
        lora = {"method": "lora", "r": 16, "lora_alpha": 32, "target_modules": "all-linear", "lr": LR}
        aim = {
            "objective": "grpo",
            "num_generations": args.answers,
            "max_completion_length": args.tokens,
            "rewards": [{"reward": "rewards.py:letters", "trusted": True}],
        }
        content = {
            "base": "smollm2-135m-instruct",
            "out": "out",
            "dtype": "bfloat16",
            "data": {"rows": {"train": "rows.jsonl"}},
            "variants": {"v": lora | aim | {"data": "rows", "max_steps": args.steps, "batch_size": args.prompts, "schedule": "linear"}},
        }
        tt.train(tt.RunConfig.from_dict(content, root=root), listener=Clock())
    return _told(marks, lengths) | {"logp_difference": apart}


def trl(args: argparse.Namespace) -> dict[str, Any]:
    import datasets
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from trimtab import bases

    path = bases.locate("smollm2-135m-instruct", lambda text: None)
    marks, lengths = list[float](), list[float]()

    class Clock(TrainerCallback):
        def on_train_begin(self, *told: Any, **more: Any) -> None:
            marks.append(time.process_time())

        def on_step_end(self, *told: Any, **more: Any) -> None:
            marks.append(time.process_time())

        def on_log(self, _: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            lengths.extend([float(logs["completions/mean_length"])] if "completions/mean_length" in logs else [])

    space: dict[str, Any] = {}
    exec(REWARD, space)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=args.prompts * args.answers, num_generations=args.answers, max_steps=args.steps,
            max_completion_length=args.tokens, generation_kwargs={"min_new_tokens": args.tokens}, learning_rate=LR, logging_steps=1,
            report_to="none", use_cpu=True, bf16=True, gradient_checkpointing=False, save_strategy="no", shuffle_dataset=False,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16),
            reward_funcs=space["letters"],
            args=config,
            train_dataset=datasets.Dataset.from_list(prompts(args)),
            processing_class=AutoTokenizer.from_pretrained(path),
            peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"),
            callbacks=[Clock()],
        )
        trainer.train()
    return _told(marks, lengths)


def _told(marks: list[float], lengths: list[float]) -> dict[str, Any]:
    steps = [round(b - a, 3) for a, b in itertools.pairwise(marks)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6 * 1.024
    return {"steps_s": steps, "before_s": round(marks[0], 2), "peak_gb": round(peak, 2), "mean_length": lengths}


if __name__ == "__main__":
    main()
