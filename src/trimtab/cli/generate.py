"""`trimtab generate`"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab.cli.options import OnBase, base_option, device_option, dtype_option, json_option, on_base, sampling_options, store_option
from trimtab.cli.terminal import say
from trimtab.errors import ConfigError

if TYPE_CHECKING:
    from trimtab.model import Base
    from trimtab.store import Adapter


@click.command()
@click.argument("prompts", nargs=-1)
@base_option
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    help="An adapter's folder, its name in the store, or a sum (name+0.5*other); give several to hear each, in one mixed batch. "
    "'base' is the base itself.",
)
@store_option
@click.option(
    "--file", "file", type=click.Path(path_type=Path), help="A JSONL file of prompts instead: a line is {prompt | messages, adapter, …}."
)
@click.option("--out", type=click.Path(path_type=Path), help="With --file: where its answers go, a line each, in the same order.")
@click.option("--system", help="A system message before the prompt.")
@sampling_options
@dtype_option
@device_option
@json_option("Print a JSON list of {prompt, adapter, text}.")
@on_base
def generate(
    prompts: tuple[str, ...],
    on: OnBase,
    adapters: tuple[str, ...],
    file: Path | None,
    out: Path | None,
    system: str | None,
    sampling: dict[str, Any],
    as_json: bool,
) -> None:
    """Answer PROMPTS with the base, or with each --adapter.

    \b
    Example:
      trimtab generate --adapter examples/runs/desks/adapters/support-lora "How do I cancel an invoice?"
      trimtab generate --adapter base --adapter acme/support@2 "How do I cancel an invoice?"
      trimtab generate --file prompts.jsonl --out answers.jsonl

    Every prompt and every adapter run in one mixed batch. A file may be long: its lines go through the serving engine.
    """
    if bool(prompts) == (file is not None) or (file is None) != (out is None) or (file is not None and len(adapters) > 1):
        raise click.UsageError("give PROMPTS; or --file and --out, with at most one --adapter, which answers the lines that name none")
    if file is not None and out is not None:
        _answer_file(file, out, on, (*adapters, "base")[0], system, sampling, as_json)
        return
    from trimtab.decode.generate import Sampling

    with on.before_loading(_single(adapters)):
        pass  # nothing else is asked for
    base = on.open()
    names = list(adapters) or ["base"]
    loaded = {n: _adapter(n, on, base) for n in names}
    asked = [(p, n) for p in prompts for n in names]
    ids = base.generate_ids([base.encode_prompt(p, system) for p, _ in asked], [loaded[n] for _, n in asked], Sampling(**sampling))
    texts = [base.tokenizer.decode(i, skip_special_tokens=True) for i in ids]
    if as_json:
        click.echo(json.dumps([{"prompt": p, "adapter": n, "text": t} for (p, n), t in zip(asked, texts, strict=True)], indent=1))
        return
    for (p, n), text in zip(asked, texts, strict=True):
        if len(asked) > 1:
            say(f"{n}: {p}" if len(prompts) > 1 else n, bold=True)
        say(text)


def _single(names: Iterable[str]) -> list[str]:
    """The adapters that these name: each one of a sum."""
    from trimtab.serve.composed import names_in

    return [part for name in names if name != "base" for part, _ in (None if Path(name).is_dir() else names_in(name)) or [(name, 1.0)]]


def _adapter(name: str, on: OnBase, base: Base) -> Adapter | None:
    """The adapter or the sum of adapters of this name; None for the base."""
    from trimtab.serve.composed import served_sum

    if name == "base":
        return None
    if _single([name]) == [name]:
        return on.adapter(name, base)
    found = served_sum(name, base, on.root)
    return None if found is None else found.load()


def _answer_file(file: Path, out: Path, on: OnBase, adapter: str, system: str | None, sampling: dict[str, Any], as_json: bool) -> None:
    from trimtab.serve.engine import Engine
    from trimtab.serve.offline import answer_file, read_lines
    from trimtab.serve.request import SamplingParams

    defaults = SamplingParams(max_tokens=sampling.pop("max_new_tokens"), **sampling)
    lines = read_lines(file)
    named = {line.adapter or adapter for _, line in lines}
    with on.before_loading(_single(sorted(named))) as mistakes, mistakes.noted():
        if out.is_dir() or not out.absolute().parent.is_dir():
            raise ConfigError(f"--out {out} cannot be written", fix="name a file, in a folder that is there")
    engine = Engine(on.open())
    try:
        summary = answer_file(file, out, engine, defaults=defaults, adapter=adapter, system=system, store=on.root)
    finally:
        engine.close()
    if as_json:
        click.echo(json.dumps(asdict(summary) | {"out": str(out)}))
    else:
        say(f"{summary.answers} answers, {summary.failed} of them failed; {summary.new_tokens} new tokens; {out}")
