"""What a page costs that follows a run of many variants while it trains: the browser's main thread, and the server.

    python bench/live_page.py --variants 32 --steps 10000

A run folder is written with so many lines of metrics, and opened in Chromium by `trimtab studio`. Then every variant makes steps, a line
each, while a trace is taken. Printed are the tasks of the page's main thread: their CPU time, which other programs do not add to, and their
time by the clock, as well as the CPU that the server takes. A task of more than 16 ms costs a frame at 60 frames a second.

Needs playwright and chromium. `--save FILE` keeps the trace, which chrome://tracing and ui.perfetto.dev show.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

from playwright.sync_api import Page, sync_playwright

FRAME_MS = 1000 / 60
CATEGORIES = ["toplevel", "devtools.timeline", "blink.user_timing", "__metadata"]


def line(variant: int, step: int, draw: random.Random) -> str:
    """One step of one variant, as `trimtab train` writes it."""
    loss = 4 * math.exp(-step / (500 + 100 * variant)) + 0.3 + draw.random() * 0.1
    numbers = {"loss": loss, "grad_norm": 1 + draw.random(), "lr": 1e-3, "tokens": 500, "supervised_tokens": 200}
    return json.dumps({"variant": f"v{variant}", "step": step, "epoch": 0, **numbers, "seconds": 0.4, "tokens_per_s": 4000.0}) + "\n"


def write_run(folder: Path, variants: int, steps: int, draw: random.Random) -> None:
    folder.mkdir(parents=True)
    plan = {"base": "a base", "steps": {f"v{v}": 2 * steps for v in range(variants)}, "settings": {"seed": 0}}
    (folder / "run.json").write_text(json.dumps(plan))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            file.writelines(line(v, step, draw) for v in range(variants))


def follow(page: Page, file: TextIO, args: argparse.Namespace, draw: random.Random) -> int:
    """Makes `rate` steps a second for `seconds`; how many were made."""
    begun, made = time.monotonic(), 0
    while (passed := time.monotonic() - begun) < args.seconds:
        while made < passed * args.rate:
            made += 1
            file.writelines(line(v, args.steps + made, draw) for v in range(args.variants))
        file.flush()
        page.wait_for_timeout(100)
    return made


def cpu_s(pid: int) -> float:
    """CPU time of a process, s."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main_thread(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """The tasks of the thread that runs the page's script."""
    events = trace["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    drawn = {(e["pid"], e["tid"]) for e in events if e["name"] in ("FireAnimationFrame", "FunctionCall")}
    main = {key for key in drawn if names.get(key) == "CrRendererMain"}
    return [e for e in events if e.get("ph") == "X" and e["name"].endswith("RunTask") and (e["pid"], e["tid"]) in main]


def quantiles(values: list[float]) -> str:
    ordered = sorted(values)
    at = [ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.5, 0.95, 0.99)]
    return f"median {at[0]:.2f}, 95% {at[1]:.2f}, 99% {at[2]:.2f}, longest {ordered[-1]:.2f} ms"


def measure(args: argparse.Namespace, root: Path) -> None:
    draw = random.Random(0)
    write_run(root / "run", args.variants, args.steps, draw)
    size = (root / "run" / "metrics.jsonl").stat().st_size
    follows = f"then {args.rate:g} steps/s of each for {args.seconds:g} s"
    print(f"{args.variants} variants x {args.steps:,} steps, {size / 1e6:.0f} MB of metrics; {follows}")
    command = [sys.executable, "-m", "trimtab", "studio", str(root), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert server.stdout is not None
        told = ""
        while not (found := re.search(r"http://\S+", told)):
            told = server.stdout.readline()
            assert told, "trimtab studio has ended"
        with sync_playwright() as p:
            browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
            page.goto(found[0])
            paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0]?.startTime")
            print(f"first paint after {paint:.0f} ms")
            page.get_by_role("link", name="run", exact=True).click()
            begun = time.monotonic()
            total = f"{args.variants * args.steps:,} of {2 * args.variants * args.steps:,} steps"
            page.get_by_text(total).wait_for(timeout=180_000)
            page.wait_for_timeout(3000)
            print(f"all lines are there after {time.monotonic() - begun - 3:.1f} s")
            with (root / "run" / "metrics.jsonl").open("a") as file:
                browser.start_tracing(page=page, categories=CATEGORIES)
                cpu, since = cpu_s(server.pid), time.monotonic()
                made = follow(page, file, args, draw)
                share = (cpu_s(server.pid) - cpu) / (time.monotonic() - since)
                trace = browser.stop_tracing()
            browser.close()
    finally:
        server.terminate()
        server.wait()
    if args.save:
        args.save.write_bytes(trace)
    tasks = main_thread(json.loads(trace))
    assert tasks, "the trace has no tasks"
    worked = [t for t in tasks if t["dur"] >= 200]  # others are a timer's, or a message's
    cpu_ms, clock_ms = [t.get("tdur", t["dur"]) / 1000 for t in worked], [t["dur"] / 1000 for t in worked]
    print(f"{made * args.variants:,} lines came; tasks of the page's main thread, CPU: {quantiles(cpu_ms)}")
    print(f"  by the clock: {quantiles(clock_ms)}")
    late, busy = sum(ms > FRAME_MS for ms in cpu_ms), sum(cpu_ms) / args.seconds / 10
    print(f"  {late} of {len(cpu_ms)} tasks take more than a frame of CPU; {busy:.1f}% of a core in all")
    print(f"server: {share:.2%} of a core")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10_000, help="of each variant, before it is followed")
    parser.add_argument("--rate", type=float, default=10.0, help="steps of each variant a second, then")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--save", type=Path, help="write the trace to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(folder))


if __name__ == "__main__":
    main()
