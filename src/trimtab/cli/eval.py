"""`trimtab eval`"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from trimtab.cli import show
from trimtab.cli.options import OnBase, base_option, device_option, dtype_option, json_option, on_base, store_option
from trimtab.cli.terminal import print_whole, say
from trimtab.errors import ConfigError, DataError

if TYPE_CHECKING:
    from trimtab.model import Base
    from trimtab.objectives import Objective
    from trimtab.store import Adapter
    from trimtab.train.evaluate import HeldOut, Result

COLUMNS = {
    "loss": ("loss", 3),
    "perplexity": ("ppl", 2),
    "exact_match": ("exact match, %", 1),
    "token_f1": ("F1, %", 1),
    "rouge_l": ("ROUGE-L, %", 1),
    "bleu": ("BLEU", 1),
    "valid_json": ("valid JSON, %", 1),
    "label_accuracy": ("label accuracy, %", 1),
    "tool_calls": ("tool calls, %", 1),
    "rewards/accuracies": ("reward accuracy", 3),
    "rewards/margins": ("reward margin", 3),
    "accuracy": ("accuracy", 3),
    "macro_f1": ("macro F1", 3),
    "margin": ("margin", 3),
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

    Each row asks for its last answer. Scores of adapters come with their distance to the base. Adapters that were trained towards
    preferences are measured by their own objective if DATA holds the rows that it reads, such as pairs.
    """
    from trimtab.forward.batch import BASE
    from trimtab.train.evaluate import Contestant, Judge, read_held_out, write_predictions

    asked, folders = _labels(labels), _names(adapters)
    with on.before_loading(adapters) as mistakes:
        with mistakes.noted():
            _reader(data)
        with mistakes.noted():
            _refuse_occupied(out)
    base = on.open()
    named = {name: on.adapter(folder, base) for name, folder in folders.items()}
    aims = _aims(data, list(named.values()))
    held = read_held_out(base, data, asked, max_rows, lambda text: say(f"warning: {text}", err=True), aims, max_tokens)
    mix, members = base.mix(list(named.values()))
    alike = all(aim == aims[0] for aim in aims) and not aims[0].reads_head
    of_base = aims[0] if alike else None  # losses of different objectives do not compare, and the base has no head
    judged = zip(["base", *named], [BASE, *members], [of_base, *(aims if named else ())], strict=True)
    field = [Contestant(name, member, not no_generate, objective=aim) for name, member, aim in judged]
    _refuse_without_room(base, list(named.values()), held, max_tokens, 0 if no_generate else max_new_tokens)
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


def _reader(data: str, own: Sequence[Objective] = ()) -> Objective:
    """The first objective that reads such rows: one of `own`, imitation, any other. DataError, why the first does not, where none does."""
    from trimtab.data import Source, peek_source
    from trimtab.objectives import Sft

    errors: list[DataError] = []
    for way in [*own, Sft(), *_others()]:
        try:
            peek_source(Source(data), Path(), way.parts)
            return way
        except DataError as error:
            errors.append(error)
    raise errors[0]


def _others() -> Iterator[Objective]:
    """Each objective that can measure the base: it reads no head, and has no field without a default, as rewards have none."""
    from trimtab.objectives import OBJECTIVES

    for cls in OBJECTIVES.values():
        if not cls.reads_head:
            with suppress(ConfigError):
                yield cls()


def _aims(data: str, adapters: Sequence[Adapter]) -> list[Objective]:
    """By which objective each adapter is measured on such rows: its own where that reads them. One objective where there is no adapter."""
    from trimtab.objectives import Sft

    own = [_judged_by(a) for a in adapters]
    own = [Sft() if aim.taught_by or aim.sampled_at else aim for aim in own]  # whose teacher may be gone; whose rewards may be code
    if len({aim.reads_head for aim in own}) > 1:
        raise ConfigError("adapters with a head are measured by it, and others by their answers", fix="measure them in two commands")
    reads = _reader(data, own)
    return [aim if aim.parts is reads.parts else reads for aim in own] or [reads]


def _judged_by(adapter: Adapter) -> Objective:
    """The objective of its run; of a head from elsewhere the one that reads it."""
    from trimtab.objectives import aimed_at
    from trimtab.objectives.classify import Classify
    from trimtab.objectives.reward import Reward

    aim = aimed_at((adapter.info.get("run") or {}).get("options") or {})
    if adapter.head is None or aim.reads_head or adapter.head.every_token:
        return aim
    return Reward() if len(adapter.head.labels) == 1 else Classify(classes=adapter.head.labels)


def _refuse_without_room(base: Base, adapters: Sequence[Adapter], held: HeldOut, max_tokens: int, answer: int) -> None:
    """OutOfMemory, with what would fit, where scoring cannot have the memory that it needs. answer: its length; 0: there is none."""
    from trimtab.bases.fits import most_bytes
    from trimtab.cost.activations import packed_sizes
    from trimtab.cost.room import Pass, halves
    from trimtab.memory import OutOfMemory

    who, virtual = 1 + len(adapters), max((int(getattr(a.method, "num_virtual_tokens", 0)) for a in adapters), default=0)
    tokens, longest = sum(e.tokens for e in held.examples), max(e.tokens for e in held.examples)
    packed = sum(packed_sizes(base.spec, base.dtype)) if base.device.type == "cpu" else 0

    def needed(max_tokens: int, answer: int) -> int:
        asked = who * len(held.questions) if answer or held.labels else 0
        one = Pass(who * tokens, longest, asked, answer, midway=False)
        return one.bytes(base.spec, base.dtype, max_tokens, virtual, base.device) + packed * bool(asked)

    free = most_bytes(base.device)
    if (need := needed(max_tokens, answer)) <= free:
        return
    fits = [f"--max-tokens {n}" for n in halves(max_tokens) if n >= max(64, longest) and needed(n, answer) <= free][:1]
    fits += [f"--max-new-tokens {n}" for n in halves(answer) if needed(max_tokens, n) <= free][:1]
    fits += ["--no-generate"] if answer and needed(max_tokens, 0) <= free else []
    raise OutOfMemory(
        f"scoring does not fit: it needs {need / 1e9:.3g} GB beside the base, and {free / 1e9:.3g} GB are free on {base.device}",
        fix=f"give {' or '.join(fits)}; or make memory free." if fits else "make memory free.",
    )


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
    shown = [k for k in COLUMNS if any(k in scores for scores in summary["scores"].values())]
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
