"""`trimtab eval`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from trimtab.cli import show
from trimtab.cli.options import OnBase, base_option, device_option, dtype_option, json_option, on_base, store_option
from trimtab.cli.terminal import print_whole
from trimtab.errors import ConfigError


@click.command("eval")
@click.argument("data")
@base_option
@click.option(
    "--adapter", "adapters", multiple=True, help="An adapter's folder, or its name in the store; give several to judge all in one pass."
)
@store_option
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="OURS=THEIRS",
    help="A column that DATA calls otherwise: prompt=question; may be repeated.",
)
@click.option("--system", help="A system turn for rows that have none.")
@click.option("--format", "file_format", help="Of DATA if its name does not say it: jsonl, json, csv, parquet or text.")
@click.option("--split", help="Of a data set of the hub; by default train.")
@click.option("--labels", help="A classification's labels, as a,b,c; auto: the distinct answers of the rows. Judged by their likelihoods.")
@click.option("--max-rows", type=click.IntRange(1), help="The first rows only.")
@click.option("--max-new-tokens", default=96, show_default=True, type=click.IntRange(1), help="Length of an answer at most.")
@click.option("--max-tokens", default=4096, show_default=True, type=click.IntRange(64), help="Tokens of one forward: bounds memory.")
@click.option("--no-generate", is_flag=True, help="No answers: loss and perplexity, and the labels' accuracy.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Write scores.json and predictions/<data>-<adapter>.jsonl into this new folder."
)
@dtype_option
@device_option
@json_option("Print the scores as JSON.")
@on_base
def evaluate(
    data: str,
    on: OnBase,
    adapters: tuple[str, ...],
    columns: tuple[str, ...],
    system: str | None,
    file_format: str | None,
    split: str | None,
    labels: str | None,
    max_rows: int | None,
    max_new_tokens: int,
    max_tokens: int,
    no_generate: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Score the base and each --adapter on the rows of DATA (a file, a folder or hf:org/name): all in one pass of mixed batches.

    \b
    Examples:
      trimtab eval examples/desks/finance/test.jsonl --adapter examples/runs/desks/adapters/finance-ia3
      trimtab eval examples/halyard/tickets-test.csv --column prompt=question --column completion=answer --adapter acme/support

    Each row asks for its last answer. Scores of adapters come with their distance to the base. Adapters that were trained towards
    preferences are measured by their own objective if DATA holds the rows that it reads, such as pairs.
    """
    from trimtab.data import Source
    from trimtab.train.scoring import Asked, reader, refuse_occupied, short_names
    from trimtab.train.scoring import evaluate as score

    source = Source(data, columns=_columns(columns), system=system, format=file_format, split=split)
    asked = Asked(source, _labels(labels), max_rows, max_new_tokens, max_tokens, not no_generate, _flag)
    folders = short_names(adapters)
    with on.before_loading(adapters) as mistakes:
        with mistakes.noted():
            reader(asked.source)
        with mistakes.noted():
            refuse_occupied(out)
    base = on.open()
    named = {name: on.adapter(folder, base) for name, folder in folders.items()}
    with show.listener(quiet=as_json) as listener:
        found = score(base, named, asked, listener, called=on.base_name, out=out)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=1))
        return
    console = show.console()
    table = found.table().rich()
    table.box, table.padding, table.header_style, table.columns[0].overflow = None, (0, 1), "bold", "fold"
    print_whole(console, table)
    if out is not None:
        answers = ", predictions/" if (out / "predictions").is_dir() else ""
        console.print(f"saved in {out}: scores.json{answers}", highlight=False, soft_wrap=True)


eval = evaluate  # the command's name, by which it is found


def _flag(name: str, value: Any) -> str:
    """An option of the command, as a message writes it."""
    return "--no-generate" if name == "generate" else f"--{name.replace('_', '-')} {value}"


def _columns(pairs: tuple[str, ...]) -> dict[str, str]:
    """Our column names -> the file's."""
    found: dict[str, str] = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not (ours and equals and theirs):
            raise ConfigError(f"--column {pair}: not two names", fix="write our name and the file's: --column prompt=question")
        if ours in found:
            raise ConfigError(f"--column {ours}: given twice, as {found[ours]} and {theirs}", fix="leave one out")
        found[ours] = theirs
    return found


def _labels(text: str | None) -> list[str] | Any:
    """ "auto", or the labels between commas."""
    if text is None or text.strip() == "auto":
        return [] if text is None else "auto"
    labels = [x.strip() for x in text.split(",")]
    if len(labels) < 2 or len(set(labels) - {""}) < len(labels):
        raise ConfigError(
            f"--labels {text!r}: labels are at least two, distinct and not empty", fix="write --labels yes,no or --labels auto"
        )
    return labels
