"""`trimtab train`"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab.cli import show
from trimtab.cli.options import cluster_options, json_option, set_option, store_option
from trimtab.cli.stopping import stopping, tell_how_to_resume, words
from trimtab.cli.terminal import say
from trimtab.errors import ConfigError
from trimtab.places.place import ONE_PROCESS, Place

if TYPE_CHECKING:
    from trimtab.train.beside import Beside
    from trimtab.train.listen import Listener


class _Port(click.IntRange):
    """A port. Where a run file stands in its place, the error says where that belongs."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and value.endswith((".yaml", ".yml")):
            self.fail(f"{value!r} is no port: write the run file before it, as `trimtab train {value} --serve`", param, ctx)
        return super().convert(value, param, ctx)


@click.command()
@click.argument("run_files", nargs=-1, required=True, metavar="RUN_FILE…", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=str), help="The run folder or URL, instead of the run file's `out`; from the current folder."
)
@click.option("--resume", is_flag=True, help="Go on from the newest good checkpoint in the run folder.")
@click.option(
    "--extend", is_flag=True, help="With --resume: train on to a larger `epochs` or `max_steps`, also where the run has finished."
)
@set_option("variants.v.lr=1e-4")
@store_option
@click.option(
    "--serve",
    "port",
    is_flag=False,
    flag_value=8000,
    type=_Port(0, 65535),
    metavar="[PORT]",
    help="Serve the base and the variants at this port of 127.0.0.1 (8000; 0: any free one) while they train.",
)
@click.option("--ranks", type=click.IntRange(1), metavar="N", help="Share the rows of every step among N processes of this machine.")
@click.option(
    "--max-restarts",
    type=click.IntRange(0),
    default=0,
    metavar="K",
    help="With --ranks: start all ranks again, up to K times, where one has failed; they go on from the newest checkpoint.",
)
@click.option("--shard", is_flag=True, help="With --ranks: each holds a part of the base, for bases that do not fit; as `shard: true`.")
@cluster_options
@json_option("Print summary.json at the end, and no progress.")
@click.pass_context
def train(
    ctx: click.Context,
    run_files: tuple[Path, ...],
    ranks: int | None,
    max_restarts: int,
    shard: bool,
    address: str | None,
    cpus: int | None,
    **options: Any,
) -> None:
    """Train every variant of RUN_FILE together on one frozen base, score it beside the base on the test rows, and save it.

    \b
    Example:
      trimtab train examples/desks.yaml
      trimtab train examples/desks.yaml --resume
      trimtab train examples/desks.yaml --resume --extend --set defaults.epochs=4

    The run folder holds adapters/<variant>/ (peft's format), checkpoints/, metrics.jsonl, predictions/, summary.json and report.html; `out`
    starts at the run file's folder, so that of the example is examples/runs/desks. With `store: acme` in the run file its adapters are
    published as acme/<variant>. `trimtab check` says beforehand what a run would do.
    With --serve, `trimtab train RUN.yaml --serve` answers as `trimtab serve --local` does, with the variants' names as models and their
    tensors as they stand between two steps; requests wait for the step that runs, and the server ends with the training.
    With --ranks 4, four processes of this machine (on GPUs: a GPU each) share the rows of every step and train what one would. Several
    machines: `torchrun --nnodes 2 --nproc-per-node 8 … -m trimtab train RUN.yaml` on each of them. N may change with --resume.
    With --ray ADDRESS each of several run files trains on a node of a Ray cluster; the nodes share the folders that the files name.
    Ctrl-C or SIGTERM ends a run after the current step, with a checkpoint (exit code 130 or 143); a second one ends it at once.
    """
    if shard and ranks is None:
        raise click.UsageError("--shard is of no use without --ranks; under torchrun, write `shard: true` in the run file")
    if shard:
        options["changes"] = (*options["changes"], "shard=true")
    if address is not None:
        _refuse_beside_ray(run_files, ranks, options)
        from trimtab.cli.train_ray import train_on_ray

        del options["port"]
        train_on_ray(ctx, run_files, address, cpus, **options)
        return
    if len(run_files) > 1:
        raise click.UsageError("several run files train on a cluster, each on a node: --ray ADDRESS (--ray local: this machine alone)")
    asked = _Asked(run_files[0], **options)
    if asked.extend and not asked.resume:
        raise click.UsageError("--extend is of no use without --resume")
    if max_restarts and ranks is None:
        raise click.UsageError("--max-restarts is of no use without --ranks; torchrun has an option of this name")
    if ranks is not None:
        from trimtab.train.config import RunConfig, refuse_idle_ranks

        refuse_idle_ranks(RunConfig.load(asked.run_file, asked.changes), ranks)
        from trimtab.places.launch import launch

        ctx.exit(launch(["train", *asked.words()], ranks, max_restarts))
    with ExitStack() as stack:
        place = stack.enter_context(_place())
        stack.enter_context(place.told())
        code = _train(place, asked)
    ctx.exit(code)  # after the ranks have left each other: a process that ends with their threads may be aborted


@dataclass(frozen=True)
class _Asked:
    """The command's options, by their names, but those that say how many processes there are."""

    run_file: Path
    out: str | None
    resume: bool
    extend: bool
    changes: tuple[str, ...]
    root: Path | None
    port: int | None
    as_json: bool

    def words(self) -> list[str]:
        """The command's arguments."""
        flags = {"--resume": self.resume, "--extend": self.extend, "--json": self.as_json, f"--serve={self.port}": self.port is not None}
        return [*words([self.run_file], self.out, self.root, self.changes), *(flag for flag, given in flags.items() if given)]


def _refuse_beside_ray(files: Sequence[Path], ranks: int | None, options: dict[str, Any]) -> None:
    for name, given in (("--ranks", ranks is not None), ("--serve", options["port"] is not None)):
        if given:
            raise click.UsageError(f"{name} does not go with --ray, where a run file is one process on one node")
    if options["extend"] and not options["resume"]:
        raise click.UsageError("--extend is of no use without --resume")
    if options["out"] is not None and len(files) > 1:
        raise click.UsageError("--out is for one run file: each of several has its own `out`")


def _place() -> AbstractContextManager[Place]:
    """One process, or the ranks that torchrun has started."""
    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        return nullcontext(ONE_PROCESS)
    from trimtab.places.ranks import joined

    return joined()


def _train(place: Place, asked: _Asked) -> int:
    """In this process, as what it is of the place. The exit code."""
    from trimtab.train import RunConfig

    run = RunConfig.load(asked.run_file, asked.changes)  # before torch is loaded: a mistake in it is told at once
    if asked.out is not None:
        run = run.writing_to(asked.out)
    from trimtab.places.launch import end_of_rank
    from trimtab.train import train
    from trimtab.train.beside import alone
    from trimtab.train.checkpoint import steps_of
    from trimtab.train.interrupt import Interrupted, Stop

    if asked.port is not None and run.shard and place.ranks > 1:
        raise ConfigError("--serve: no rank holds the base that `shard` shares out", fix="leave --serve out, or take `shard` away")
    stop = Stop()
    try:
        with stopping(stop, quiet=not place.first), show.listener(quiet=asked.as_json or not place.first) as listener, ExitStack() as parts:
            beside = alone if asked.port is None or not place.first else parts.enter_context(_serving(asked.port, listener))
            resume, extend, root = asked.resume or place.restarted, asked.extend, asked.root
            with place.told():  # that it was interrupted, too
                report = train(run, listener=listener, resume=resume, extend=extend, stop=stop, store=root, beside=beside, place=place)
    except Interrupted as e:
        code = end_of_rank(e.exit_code, place.first) if place.ranks > 1 else e.exit_code
        if not place.first:
            return code
        saved = steps_of(run.out)[:1]
        say(f"{e}; {f'saved in {saved[0]}' if saved else 'nothing was saved yet'}", err=True)
        if place.here == place.ranks:  # of several machines, torchrun's command is the user's
            ranks = ["--ranks", str(place.ranks)] if place.ranks > 1 else []
            tell_how_to_resume("train", [asked.run_file], asked.out, asked.root, asked.changes, more=ranks)
        return code
    if not place.first:
        return 0
    if asked.as_json:
        click.echo(json.dumps(report.summary, indent=1))
        return 0
    console = show.console()
    from trimtab.train.score_table import gain

    console.print(show.score_table(report.summary))
    s = report.summary
    if told := gain(s):
        console.print(told, highlight=False, markup=False)
    console.print(
        f"{s['tokens']:,} tokens in {s['seconds']:.0f} s: {s['tokens_per_s']} tokens/s, peak memory {s['peak_memory_gb']} GB",
        highlight=False,
    )
    console.print(f"saved in {report.where}: adapters/, metrics.jsonl, summary.json, report.html", highlight=False, soft_wrap=True)
    if published := [v["published"] for v in s["variants"].values() if "published" in v]:
        console.print(f"published: {', '.join(published)}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _serving(port: int, listener: Listener) -> AbstractContextManager[Beside]:
    from trimtab.cli.serve import check_packages

    check_packages()
    from trimtab.cli.train_serve import serving

    return serving(port, listener)
