"""A step of N ranks beside a step of one process with as many threads: what splitting a step's rows over processes costs or saves.

    python bench/ranks.py                       # 1 rank with 2 threads and 2 ranks with 1 thread each, in turn, twice: 3 minutes
    python bench/ranks.py --ranks 4 --threads 8 --steps 10 --repeat 3

All train the same run: a LoRA of rank 16 on all linear layers of the bundled base in bfloat16, with rows of 60 to 380 tokens. Both kinds
take turns, and each is started anew, so that what else the machine does meets both. tokens/s is of the median step, the first two left out.
On a machine that others use it says little. CPU seconds for 1,000 tokens are of all threads of all ranks, and hardly depend on others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of all ranks together")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        as_rank(args.rank)
        return
    kinds = [(1, args.threads), (args.ranks, args.threads // args.ranks)]
    found: dict[tuple[int, int], list[dict[str, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_run(folder, args.base, args.steps, args.batch)
        for _ in range(args.repeat):
            for kind in kinds:
                found[kind].append(measured(folder, *kind))
                print(json.dumps({"ranks": kind[0], "threads each": kind[1]} | found[kind][-1]), file=sys.stderr, flush=True)
    print("| ranks | threads each | tokens/s | CPU s for 1,000 tokens |\n|---|---|---|---|")
    for (ranks, threads), runs in found.items():
        speed, cost = (statistics.median(run[name] for run in runs) for name in ("tokens_per_s", "cpu_s"))
        print(f"| {ranks} | {threads} | {speed:,.0f} | {cost:.3f} |")
    one, many = (found[kind] for kind in kinds)
    faster = [b["tokens_per_s"] / a["tokens_per_s"] for a, b in zip(one, many, strict=True)]
    dearer = [b["cpu_s"] / a["cpu_s"] for a, b in zip(one, many, strict=True)]
    print(
        f"{args.ranks} ranks against one, run by run: speed {spread(faster)}, CPU {spread(dearer)}; load average {os.getloadavg()[0]:.1f}"
    )


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def write_run(folder: Path, base: str, steps: int, batch: int) -> None:
    rows = [{"prompt": "word " * (20 + 37 * i % 160), "completion": "answer " * (40 + 53 * i % 180)} for i in range(4 * batch)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lora = {"method": "lora", "data": "rows", "max_steps": steps + WARM_UP, "batch_size": batch}
    run = {"base": base, "dtype": "bfloat16", "device": "cpu", "data": {"rows": {"train": "rows.jsonl"}}, "variants": {"lora": lora}}
    (folder / "run.json").write_text(json.dumps(run | {"checkpoint_every": None, "evaluate": {"generate": False}}))


def measured(folder: Path, ranks: int, threads: int) -> dict[str, float]:
    """tokens_per_s of the median step, and cpu_s: CPU seconds of all ranks for 1,000 tokens."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": f"{HERE.parent / 'src'}"}
    done = subprocess.run(
        [*command, str(Path(__file__)), "--rank", str(folder)], env=environment, check=False, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    marks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    first = marks[0]  # every rank counts the tokens of all
    steps = [(b[0] - a[0], b[2] - a[2]) for a, b in zip(first[WARM_UP - 1 :], first[WARM_UP:], strict=False)]
    tokens = first[-1][2] - first[WARM_UP - 1][2]
    cpu = sum(own[-1][1] - own[WARM_UP - 1][1] for own in marks)
    return {"tokens_per_s": round(statistics.median(n / s for s, n in steps), 1), "cpu_s": round(1000 * cpu / tokens, 4)}


def as_rank(folder: Path) -> None:
    from trimtab.places.ranks import joined
    from trimtab.train import RunConfig, train

    marks: list[tuple[float, float, int]] = []

    @contextmanager
    def beside(prepared: Any) -> Iterator[Callable[[], None]]:
        progress = prepared.variants[0].progress
        yield lambda: marks.append((time.perf_counter(), time.process_time(), progress.tokens))

    with joined() as place:
        run = RunConfig.from_dict(json.loads((folder / "run.json").read_text()) | {"out": "unused"}, root=folder)
        out = place.once(lambda: folder / f"out-{os.urandom(4).hex()}")
        train(run.writing_to(out), place=place, beside=beside)
    (folder / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(marks))


if __name__ == "__main__":
    main()
