"""What a page costs that follows a run of many variants while it trains: the browser's main thread, the server, and the training.

    python bench/live_page.py --variants 32 --steps 10000
    python bench/live_page.py --training --pairs 6

A run folder is written with so many lines of metrics, and opened in Chromium by `trimtab studio`. Then every variant makes steps, a line
each, while a trace is taken. Printed are the tasks of the page's main thread: their CPU time, which other programs do not add to, and their
time by the clock, as well as the CPU that the server takes. A task of more than 16 ms costs a frame at 60 frames a second.

With `--training` a real training runs on this machine, of the bundled base on rows of one length. An open page follows it for some steps,
and none for as many, in turn; which comes first alternates. Printed are, for each pair and as the median of all, what a step takes by the
clock and of the training's CPU time, with the page against without it. Times by the clock hold every other program of the machine. What the
browser and the server take themselves is printed beside them.

The first paint is that of a browser that has just started, with nothing in its cache; the first one is the server's first answer too.

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
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import psutil
from playwright.sync_api import Browser, Page, Playwright, sync_playwright

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


def browser_cpu_s() -> float:
    """CPU time of all processes of the browsers that this one has started, s."""
    took = 0.0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if "chrom" in process.name():
                times = process.cpu_times()
                took += times.user + times.system
    return took


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


@contextmanager
def studio(root: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of `trimtab studio`, and its process."""
    command = [sys.executable, "-m", "trimtab", "studio", str(root), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert server.stdout is not None
        told = ""
        while not (found := re.search(r"http://\S+", told)):
            told = server.stdout.readline()
            assert told, "trimtab studio has ended"
        yield found[0], server
    finally:
        server.terminate()
        server.wait()


def launched(p: Playwright) -> Browser:
    return p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])


def first_paint(p: Playwright, url: str) -> float:
    """ms from the beginning of the navigation, in a browser that is started for it."""
    browser = launched(p)
    page = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
    page.goto(url)
    page.get_by_role("heading", name="Runs").wait_for()
    painted = float(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
    browser.close()
    return painted


def paints(p: Playwright, url: str, times: int) -> None:
    found = [first_paint(p, url) for _ in range(times)]
    print(f"first paint: {found[0]:.0f} ms at first, median of {times} {statistics.median(found):.0f}, slowest {max(found):.0f} ms")


def measure(args: argparse.Namespace, root: Path) -> None:
    draw = random.Random(0)
    write_run(root / "run", args.variants, args.steps, draw)
    size = (root / "run" / "metrics.jsonl").stat().st_size
    follows = f"then {args.rate:g} steps/s of each for {args.seconds:g} s"
    print(f"{args.variants} variants x {args.steps:,} steps, {size / 1e6:.0f} MB of metrics; {follows}")
    with studio(root) as (url, server), sync_playwright() as p:
        paints(p, url, args.paints)
        browser = launched(p)
        page = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
        page.goto(url)
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


# ---- what the training loses -------------------------------------------------

KINDS = ("clock", "CPU")
RUN_FILE = """
base: smollm2-135m-instruct
out: run
data: {{rows: {{train: rows.jsonl}}}}
defaults: {{max_steps: {steps}, batch_size: {rows}, max_length: 256, schedule: constant}}
evaluate: {{max_new_tokens: 1}}
variants:
{variants}
"""


@contextmanager
def training(root: Path, args: argparse.Namespace) -> Iterator[subprocess.Popen[bytes]]:
    """A training of rows of one length, so that every step is the same work."""
    talk = [{"role": "user", "content": "Say it again. " * 6}, {"role": "assistant", "content": "As you like. " * 6}]
    (root / "rows.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 64)
    variants = "\n".join(f"  v{n}: {{data: rows, method: lora, r: 8}}" for n in range(args.train_variants))
    (root / "run.yaml").write_text(RUN_FILE.format(steps=1_000_000, rows=args.train_rows, variants=variants))
    with (root / "training.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "trimtab", "train", "run.yaml"], cwd=root, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def steps_made(root: Path, process: subprocess.Popen[bytes]) -> int:
    assert process.poll() is None, (root / "training.log").read_text()
    file = root / "run" / "metrics.jsonl"
    if not file.exists():
        return 0
    with file.open("rb") as lines:
        lines.seek(max(0, file.stat().st_size - 4096))
        found = re.findall(rb'"step": (\d+)', lines.read())
    return int(found[-1]) if found else 0


def until(root: Path, process: subprocess.Popen[bytes], step: int) -> int:
    """Waits for a step, which may be passed by then."""
    while (made := steps_made(root, process)) < step:
        time.sleep(0.01)
    return made


def window(root: Path, process: subprocess.Popen[bytes], steps: int) -> tuple[float, float]:
    """(seconds by the clock, CPU seconds) of a step, over so many of them. It begins and ends as a step has just been written."""
    first = until(root, process, steps_made(root, process) + 1)
    clock, cpu = time.monotonic(), cpu_s(process.pid)
    last = until(root, process, first + steps)
    return (time.monotonic() - clock) / (last - first), (cpu_s(process.pid) - cpu) / (last - first)


def loss_of_training(args: argparse.Namespace, root: Path) -> None:
    print(f"{args.train_variants} variants x {args.train_rows} rows; {args.pairs} pairs of {args.window} steps with a page, and without")
    pairs, taken = [], [0.0, 0.0, 0.0]
    with studio(root) as (url, server), training(root, args) as process, sync_playwright() as p:
        until(root, process, args.window)  # until it is warm
        browser = launched(p)
        for pair in range(args.pairs):
            found = {}
            for opened in (True, False) if pair % 2 == 0 else (False, True):
                context = browser.new_context(viewport={"width": 1440, "height": 900})
                if opened:
                    page = context.new_page()
                    page.goto(url)
                    page.get_by_role("link", name="run", exact=True).click()
                    page.get_by_role("heading", name="Curves").wait_for(timeout=120_000)
                    page.wait_for_timeout(1000 * args.away + 2000)
                before = (time.monotonic(), browser_cpu_s(), cpu_s(server.pid))
                found[opened] = window(root, process, args.window)
                if opened:
                    after = (time.monotonic(), browser_cpu_s(), cpu_s(server.pid))
                    taken = [t + b - a for t, a, b in zip(taken, before, after, strict=True)]
                context.close()
            pairs.append((found[True], found[False]))
            told = [
                f"{name} {1000 * of:.0f} : {1000 * out:.0f} ms ({of / out - 1:+.1%})"
                for name, of, out in zip(KINDS, *pairs[-1], strict=True)
            ]
            print(f"pair {pair + 1}: {', '.join(told)}", flush=True)
        browser.close()
        print(f"browser: {taken[1] / taken[0]:.1%} of a core, server: {taken[2] / taken[0]:.1%}")
    for n, name in enumerate(KINDS):
        ratios = sorted(of[n] / out[n] - 1 for of, out in pairs)
        print(f"{name} of a step, with the page: median {statistics.median(ratios):+.1%}, from {ratios[0]:+.1%} to {ratios[-1]:+.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10_000, help="of each variant, before it is followed")
    parser.add_argument("--rate", type=float, default=10.0, help="steps of each variant a second, then")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--paints", type=int, default=5, help="browsers that are started to see the first paint")
    parser.add_argument("--training", action="store_true", help="what a training loses to an open page, and nothing else")
    parser.add_argument("--pairs", type=int, default=6, help="of --training")
    parser.add_argument("--window", type=int, default=40, help="steps with the page, and without, in each pair")
    parser.add_argument(
        "--away", type=float, default=0.0, help="s before each: after 20 without keyboard and pointer the page reads less often"
    )
    parser.add_argument("--train-variants", type=int, default=2)
    parser.add_argument("--train-rows", type=int, default=1, help="of each variant in a step")
    parser.add_argument("--save", type=Path, help="write the trace to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (loss_of_training if args.training else measure)(args, Path(folder))


if __name__ == "__main__":
    main()
