"""The command line: one thin file a command, each loaded when it is called, so that `--help` needs no torch.

A user's mistake (`TrimtabError`) is printed with its fix and exits with code 2; anything else is a bug of ours and shows its traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import click

from trimtab.cli.unknown import refuse_unknown
from trimtab.errors import TrimtabError, printable
from trimtab.memory import explained
from trimtab.version import __version__

COMMANDS = {
    "demo": "Train three adapters together on the bundled base and see what they do.",
    "doctor": "Say what this machine has, and what to do about what is missing.",
    "init": "Write a first run file for a file of rows: columns, splits and labels are guessed.",
    "import-config": "Write a run file from settings of axolotl, LLaMA-Factory, TRL, peft or Unsloth.",
    "plan": "Parameters, file sizes and memory of any method on any base, without weights.",
    "check": "Read all that a run file names and say what is wrong with it, before training.",
    "rows": "Rows as training gets them, with what is supervised; those that are dropped, and why.",
    "train": "Train every variant of a run file together on one frozen base.",
    "runs": "Stop, pause, resume or clone variants of a run while the others go on.",
    "sweep": "Search for the best settings: many trials trained together, the worst stopped early.",
    "eval": "Score the base and any adapters on held-out rows, side by side in one pass.",
    "compare": "Several runs side by side: what each variant costs and scores.",
    "generate": "Answer a prompt with the base or an adapter.",
    "score": "Score texts by an adapter that classifies them, or that says how good an answer is.",
    "chat": "Talk to the base or an adapter.",
    "export": "Write an adapter as another program wants it: peft, vLLM, llama.cpp, or merged.",
    "merge": "Fold an adapter into the base's weights: an ordinary model folder.",
    "quantize": "Write a base with its linear layers in 4 or 8 bits, as bitsandbytes reads it.",
    "serve": "Serve the base and many adapters over OpenAI's HTTP API.",
    "studio": "A page in the browser: runs while they train, their rows and answers, new runs, the store.",
    "simulate": "Several servers under traffic over many adapters: hit rate, load, latency, by routing.",
    "tenants": "Who may use a server: tenants, their API keys, what they have used.",
    "adapters": "Publish adapters into the store by name and version; list, compare, move and remove them.",
    "store": "The folder in which published adapters are kept: make, verify, clean it.",
    "completion": "Print a script that completes trimtab's commands in bash, zsh or fish.",
}


class Terminated(KeyboardInterrupt):
    """SIGTERM came. Like Ctrl-C it unwinds the command, so that what is half written goes."""


LOST_S = 0.05


@contextmanager
def unwound_by_sigterm() -> Iterator[None]:
    """SIGTERM raises `Terminated` inside. Commands that end in their own way (train, sweep, serve) put their handlers in its place.

    Python only prints an error that is raised while an object is finalized (`__del__`), and goes on. So this one, and Ctrl-C's, comes again
    a moment later, and at the end of a command that ends before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise Terminated

    coming: dict[type[BaseException], threading.Timer] = {}

    def come(kind: type[BaseException]) -> None:
        del coming[kind]  # first: it may be lost again at once
        os.kill(os.getpid(), signal.SIGTERM if kind is Terminated else signal.SIGINT)

    def unraisable(lost: sys.UnraisableHookArgs) -> None:
        if not isinstance(lost.exc_value, KeyboardInterrupt):
            hook(lost)
        elif (kind := type(lost.exc_value)) not in coming:
            coming[kind] = again = threading.Timer(LOST_S, come, (kind,))
            again.daemon = True
            again.start()

    before, hook = signal.signal(signal.SIGTERM, end), sys.unraisablehook
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        for again in list(coming.values()):  # later it would end the program that has called the command
            again.cancel()
        signal.signal(signal.SIGTERM, before)
        sys.unraisablehook = hook
    for kind in coming:
        raise kind


class Commands(click.Group):
    """Loads `trimtab.cli.<name>` when the command is called; turns a user's mistake into exit code 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        file = name.replace("-", "_")
        return getattr(import_module(f"trimtab.cli.{file}"), file) if name in COMMANDS else None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        refuse_unknown(ctx, args, COMMANDS)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> object:
        try:
            try:
                Path.cwd()
            except OSError as e:  # torch would end the process: "oneMKL FATAL ERROR: Cannot load …/libtorch_cpu.so"
                raise TrimtabError(f"the directory in which this runs is not there any more ({e})", fix="cd into one that is.") from e
            less = "give it less to do at a time, or make memory free"
            with unwound_by_sigterm(), explained(lambda: f"running `trimtab {ctx.invoked_subcommand}`", less):
                return super().invoke(ctx)
        except TrimtabError as e:
            click.echo(f"{click.style('error:', fg='red', bold=True)} {printable(str(e))}", err=True)
            ctx.exit(e.exit_code)
        except KeyboardInterrupt as e:  # click would exit with 1
            click.echo("interrupted", err=True)
            ctx.exit(143 if isinstance(e, Terminated) else 130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="trimtab")
def main() -> None:
    """Train small adapters on a frozen language model, keep them as checked folders, run many of them on one base.

    Start with `trimtab demo`.
    """
