"""`trimtab eval`"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from trimtab.cli import show
from trimtab.cli.options import OnBase, base_option, device_option, dtype_option, json_option, on_base, store_option
from trimtab.cli.terminal import print_whole, say
from trimtab.errors import ConfigError

if TYPE_CHECKING:
    from trimtab.train.evaluate import Result

COLUMNS = {
    "loss": ("loss", 3),
    "perplexity": ("ppl", 2),
    "exact_match": ("exact match, %", 1),
    "token_f1": ("F1, %", 1),
    "rouge_l": ("ROUGE-L, %", 1),
    "bleu": ("BLEU", 1),
    "valid_json": ("valid JSON, %", 1),
    "label_accuracy": ("label accuracy, %", 1),
}


@click.command("eval")
@click.argument("data")
@base_option
@click.option(
    "--adapter", "adapters", multiple=True, help="An adapter's folder, or its name in the store; give several to judge all in one pass."
)
@store_option
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
    Example:
      trimtab eval examples/desks/finance/test.jsonl --adapter examples/runs/desks/adapters/finance-ia3

    Each row asks for its last answer. Scores of adapters come with their distance to the base.
    """
    from trimtab.data import Source, peek_source
    from trimtab.forward.batch import BASE
    from trimtab.train.evaluate import Contestant, Judge, read_held_out, write_predictions

    asked, folders = _labels(labels), _names(adapters)
    with on.before_loading(adapters) as mistakes:
        with mistakes.noted():
            peek_source(Source(data), Path())
        with mistakes.noted():
            _refuse_occupied(out)
    base = on.open()
    named = {name: on.adapter(folder, base) for name, folder in folders.items()}
    held = read_held_out(base, data, asked, max_rows, lambda text: say(f"warning: {text}", err=True))
    mix, members = base.mix(list(named.values()))
    field = [Contestant(name, member, not no_generate) for name, member in zip(["base", *named], [BASE, *members], strict=True)]
    with show.listener(quiet=as_json) as listener:
        listener.status("scoring")
        judge = Judge(base.tokenizer, base.stop_ids, max_new_tokens, max_tokens, lambda n: listener.status(f"scoring: {n} tokens"))
        stem = re.sub(r"[^\w.-]+", "-", Path(data).stem)
        results = judge.judge(base.attached, mix, {stem: field}, {stem: held})
    summary = _summary(on.base_name, data, results[stem])
    if out is not None:
        write_predictions(out / "predictions", results)
        out.mkdir(parents=True, exist_ok=True)
        (out / "scores.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    if as_json:
        click.echo(json.dumps(summary, indent=1))
    else:
        _show(summary, out)


eval = evaluate  # the command's name, by which it is found


def _show(summary: Mapping[str, Any], out: Path | None) -> None:
    console = show.console()
    print_whole(console, _table(summary))
    if out is not None:
        console.print(f"saved in {out}: scores.json, predictions/", highlight=False, soft_wrap=True)


def _refuse_occupied(out: Path | None) -> None:
    if out is not None and out.exists():
        if not out.is_dir():
            raise ConfigError(f"--out {out} is a file", fix="name a folder")
        if any(out.iterdir()):
            raise ConfigError(f"--out {out} is not empty", fix="name another folder, or remove this one")


def _names(folders: Sequence[str]) -> dict[str, str]:
    """A short name of each adapter: its folder's own where that is unique, else the path, in characters that a file name takes."""
    twice = sorted({f for f in folders if folders.count(f) > 1})
    if twice:
        raise ConfigError(f"--adapter {twice[0]} is given twice", fix="name each adapter once; the base is always judged")
    own = [Path(f).name for f in folders]
    named: dict[str, str] = {}
    for name, folder in zip(own, folders, strict=True):
        if own.count(name) > 1 or name == "base":
            name = re.sub(r"[^\w.@-]+", "-", folder)
        while name in named or name == "base":
            name += "~"
        named[name] = folder
    return named


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


def _summary(base: str, data: str, results: Mapping[str, Result]) -> dict[str, Any]:
    scores = {name: r.scores for name, r in results.items()}
    before = scores["base"]
    delta = {
        name: {k: round(s[k] - before[k], 6) for k in COLUMNS if s.get(k) is not None and before.get(k) is not None}
        for name, s in scores.items()
        if name != "base"
    }
    return {"base": base, "data": data, "rows": before["rows"], "scores": scores, "delta": delta}


def _table(summary: Mapping[str, Any]) -> Table:
    """A row for the base and for each adapter, the distance to the base in brackets."""
    table = Table(title=f"{summary['data']}: {summary['rows']} rows", box=None, padding=(0, 1), header_style="bold")
    table.add_column("", overflow="fold")
    shown = [k for k in COLUMNS if k in summary["scores"]["base"]]
    for k in shown:
        table.add_column(COLUMNS[k][0], justify="right")
    for name, scores in summary["scores"].items():
        delta = summary["delta"].get(name, {})
        table.add_row(name, *(_cell(scores.get(k), delta.get(k), COLUMNS[k][1]) for k in shown))
    return table


def _cell(value: float | None, delta: float | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + ("" if delta is None else f" ({delta:+.{digits}f})")
