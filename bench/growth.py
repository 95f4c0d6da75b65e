"""Curves: what a piece of work costs as it grows, beside the limit that memory and arithmetic set.

    python bench/growth.py                             # all curves of bench/curves
    python bench/growth.py prefill turns --quick       # some of them, without their longest points
    python bench/growth.py prefill --before ../old     # and the same points with the code of another checkout

A curve is a file of bench/curves (`curve.py` says what it holds). Each point runs in a fresh process with one thread, unless the curve says
otherwise, with the random bases and rows that the curve makes; no model hub is reached. A curve prints one table, the limit in its last
column. Times are seconds of CPU of all threads, memory is the peak of the process.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from curves.curve import Curve  # noqa: E402


def main() -> None:
    names = sorted(p.stem for p in (HERE / "curves").glob("*.py") if p.stem not in ("__init__", "curve"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(names)}")
    parser.add_argument("--before", type=Path, help="a checkout whose src is measured as well")
    parser.add_argument("--quick", action="store_true", help="without the longest points")
    parser.add_argument("--point", nargs=3, metavar=("CURVE", "SIDE", "INDEX"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        name, side, index = args.point
        print("\n" + json.dumps(load(name).measure(side, int(index))))
        return
    if wrong := [n for n in args.names if n not in names]:
        parser.error(f"no curve {', '.join(wrong)}; there are {', '.join(names)}")
    for name in args.names or names:
        print(table(load(name), name, args.before, args.quick), flush=True)


def load(name: str) -> Curve:
    curve: Curve = importlib.import_module(f"curves.{name}").CURVE
    return curve


def table(curve: Curve, name: str, before: Path | None, quick: bool) -> str:
    """The curve as a Markdown table: a row a point; this tree's numbers, the old one's, the peers', the limit."""
    trees = {"trimtab": HERE.parent, **({"before": before.resolve()} if before else {})}
    head = [curve.grows, *(f"{side}: {c}" for side in (*trees, *curve.peers) for c in curve.columns), "limit"]
    lines = [f"## {name}: {curve.what}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for i, point in enumerate(curve.points):
        if point.long and quick:
            continue
        cells = [c for side in trees for c in run(curve, name, "trimtab", i, trees[side])]
        cells += [c for side in curve.peers for c in run(curve, name, side, i, trees["trimtab"])]
        lines.append("| " + " | ".join([point.name, *cells, curve.limit(point)]) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join([*lines, ""])


def run(curve: Curve, name: str, side: str, index: int, tree: Path) -> list[str]:
    """One point in a process of its own; what failed stands in the first cell."""
    env = os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": str(curve.threads)}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(HERE / "growth.py"), "--point", name, side, str(index)]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=curve.timeout_s)
        values = json.loads(done.stdout.strip().splitlines()[-1]) if not done.returncode else [last(done.stderr)]
    except subprocess.TimeoutExpired:
        values = [f"more than {curve.timeout_s} s"]
    cells = [v if isinstance(v, str) else f"{v:,.4g}" for v in values]
    return cells + [""] * (len(curve.columns) - len(cells))


def last(stderr: str) -> str:
    return (stderr.strip().splitlines() or ["no message"])[-1].replace("|", "/")[:120]


if __name__ == "__main__":
    main()
