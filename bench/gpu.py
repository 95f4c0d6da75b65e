"""What trimtab does on a GPU, within twelve minutes: a JSON line for each point, on random bases that the device makes.

    python bench/gpu.py                                       # all items, in this order
    python bench/gpu.py --items device verdicts training-1B   # some of them
    python bench/gpu.py --device cpu --tiny                   # tries the script where there is no GPU

Each item runs in a process of its own, which is ended when the item's time is over. So neither an error nor a lack of memory nor a kernel
that never returns takes anything from the others. Nothing is downloaded. trl with peft and vLLM are measured too where they are installed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from on_gpu import decoding, loading, machine, training
from on_gpu.common import ROOT, Setting

SIZES = ("1B", "7B")
GRACE_S = 15
"""So long after its deadline an item may finish the point that it has begun."""
ITEMS: dict[str, tuple[int, Callable[[Setting], None]]] = {
    "device": (20, machine.device),
    "verdicts": (40, machine.verdicts),
    "bandwidth": (20, machine.bandwidth),
    "gemm": (20, machine.gemm),
    "laws": (90, machine.laws),
    **{f"training-{size}": (90, partial(training.training, size=size)) for size in SIZES},
    **{f"decoding-{size}": (80, partial(decoding.decoding, size=size)) for size in SIZES},
    "loading-1B": (40, partial(loading.loading, size="1B")),
    "trl-1B": (40, partial(training.trl, size="1B")),
    "vllm-1B": (90, partial(decoding.vllm, size="1B")),
}
"""name -> (seconds that it may take, what it does)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes at which everything ends within a minute")
    parser.add_argument("--items", nargs="+", choices=ITEMS, default=list(ITEMS), metavar="ITEM", help=f"of {', '.join(ITEMS)}")
    parser.add_argument("--minutes", type=float, default=12.0, help="for all items together")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    for name in args.items:
        limit = min(ITEMS[name][0], end - time.monotonic() - GRACE_S)
        if limit <= 0:
            print(json.dumps({"item": name, "skipped": "no time was left"}), flush=True)
        elif (why := run(name, Setting(args.device, args.tiny, time.monotonic() + limit), limit + GRACE_S)) is not None:
            print(json.dumps({"item": name, "failed": why}), flush=True)


def run(name: str, setting: Setting, limit: float) -> str | None:
    """Run an item in a process of its own; why it did not end well. Nothing before this has touched the device, so it can be forked."""
    process = multiprocessing.get_context("fork").Process(target=_item, args=(name, setting))
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        return f"ended after {limit:.0f} s"
    return None if process.exitcode == 0 else f"its process ended with {process.exitcode}"


def _item(name: str, setting: Setting) -> None:
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    try:
        ITEMS[name][1](setting)
    except Exception as error:  # told, and the next item is another process
        print(json.dumps({"item": name, "failed": f"{type(error).__name__}: {error}"[:300]}), flush=True)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
