"""`trimtab train`"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trimtab.cli import show
from trimtab.cli.options import json_option, store_option

if TYPE_CHECKING:
    from trimtab.train.beside import Beside
    from trimtab.train.interrupt import Stop
    from trimtab.train.listen import Listener

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SHOW_CURSOR = "\x1b[?25h"  # rich hides it; a second signal leaves no time to bring it back


@click.command()
@click.argument("run_file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The run folder, instead of the run file's `out`; from the current folder.")
@click.option("--resume", is_flag=True, help="Go on from the newest good checkpoint in the run folder.")
@store_option
@click.option(
    "--serve",
    "port",
    is_flag=False,
    flag_value=8000,
    type=click.IntRange(0, 65535),
    metavar="[PORT]",
    help="Serve the base and the variants at this port of 127.0.0.1 (8000; 0: any free one) while they train.",
)
@json_option("Print summary.json at the end, and no progress.")
@click.pass_context
def train(ctx: click.Context, run_file: Path, out: Path | None, resume: bool, root: Path | None, port: int | None, as_json: bool) -> None:
    """Train every variant of RUN_FILE together on one frozen base, score it beside the base on the test rows, and save it.

    \b
    Example:
      trimtab train examples/desks.yaml
      trimtab train examples/desks.yaml --resume

    The run folder holds adapters/<variant>/ (peft's format), checkpoints/, metrics.jsonl, predictions/, summary.json and report.html; `out`
    starts at the run file's folder, so that of the example is examples/runs/desks. With `store: acme` in the run file its adapters are
    published as acme/<variant>. `trimtab check` says beforehand what a run would do.
    With --serve, `trimtab train RUN.yaml --serve` answers as `trimtab serve --local` does, with the variants' names as models and their
    tensors as they stand between two steps; requests wait for the step that runs, and the server ends with the training.
    Ctrl-C or SIGTERM ends a run after the current step, with a checkpoint (exit code 130 or 143); a second one ends it at once.
    """
    from trimtab.train import RunConfig

    run = RunConfig.load(run_file)  # before torch is loaded: a mistake in it is told at once
    if out is not None:
        run = run.model_copy(update={"out": out})
    from trimtab.train import train
    from trimtab.train.beside import alone
    from trimtab.train.checkpoint import steps_of
    from trimtab.train.interrupt import Interrupted, Stop

    stop = Stop()
    try:
        with stopping(stop), show.listener(quiet=as_json) as listener, ExitStack() as open_parts:
            beside = alone if port is None else open_parts.enter_context(_serving(port, listener))
            report = train(run, listener=listener, resume=resume, stop=stop, store=root, beside=beside)
    except Interrupted as e:
        saved = steps_of(run.out)[:1]
        click.echo(f"{e}; {f'saved in {saved[0]}' if saved else 'nothing was saved yet'}", err=True)
        tell_how_to_resume("train", run_file, out, root)
        ctx.exit(e.exit_code)
    if as_json:
        click.echo(json.dumps(report.summary, indent=1))
        return
    console = show.console()
    console.print(show.score_table(report.summary))
    s = report.summary
    console.print(
        f"{s['tokens']:,} tokens in {s['seconds']:.0f} s: {s['tokens_per_s']} tokens/s, peak memory {s['peak_memory_gb']} GB",
        highlight=False,
    )
    console.print(f"saved in {report.out}: adapters/, metrics.jsonl, summary.json, report.html", highlight=False, soft_wrap=True)
    if published := [v["published"] for v in s["variants"].values() if "published" in v]:
        console.print(f"published: {', '.join(published)}", highlight=False, markup=False, soft_wrap=True)


def _serving(port: int, listener: Listener) -> AbstractContextManager[Beside]:
    from trimtab.cli.serve import check_packages

    check_packages()
    from trimtab.cli.train_serve import serving

    return serving(port, listener)


def tell_how_to_resume(command: str, file: Path, out: Path | None, root: Path | None = None) -> None:
    """Print the command that goes on where an interrupted one has stopped."""
    again = ["trimtab", command, str(file), *(["--out", str(out)] if out is not None else [])]
    again += [*(["--store", str(root)] if root is not None else []), "--resume"]
    click.echo(f"go on with: {shlex.join(again)}", err=True)


@contextmanager
def stopping(stop: Stop) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask the run to stop; a second one is the system's to handle. What stood before is put back at the end."""
    if threading.current_thread() is not threading.main_thread():  # Python lets only the main thread handle signals
        yield
        return

    def handle(signum: int, frame: object) -> None:
        for s in SIGNALS:
            signal.signal(s, signal.SIG_DFL)
        text = "\nending after this step, with a checkpoint; once more ends at once\n" if stop.stepping else "\n"
        os.write(2, (SHOW_CURSOR * sys.stderr.isatty() + text).encode())  # print may be what the signal has interrupted
        stop.ask(signum)

    before = {s: signal.signal(s, handle) for s in SIGNALS}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
