"""`trimtab import-config`"""

from __future__ import annotations

import json
from pathlib import Path

import click

from trimtab.cli.options import json_option, write_new
from trimtab.cli.terminal import say


@click.command("import-config")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="The run file to write; without it, it is printed.")
@click.option(
    "--from",
    "program",
    help='Whose settings FILE has, if it does not show: axolotl, llama-factory, trl, peft or unsloth. "trl dpo" names TRL\'s trainer too.',
)
@click.option(
    "--data",
    help="A file of rows, in the place of those that FILE names, or where it names none. Its path starts at the run file's folder.",
)
@click.option("--base", help="The base, in the place of the one that FILE names, or where it names none.")
@click.option("--strict", is_flag=True, help="Exit with 2 if any key is not carried over.")
@json_option("Print JSON: the run file's content, and what became of the other keys.")
@click.pass_context
def import_config(
    ctx: click.Context, file: Path, out: Path | None, program: str | None, data: str | None, base: str | None, strict: bool, as_json: bool
) -> None:
    """Write a run file from another program's settings (YAML or JSON): axolotl, LLaMA-Factory, TRL, peft, Unsloth.

    \b
    Example:
      trimtab import-config axolotl.yml --out run.yaml
      trimtab import-config adapter_config.json --data rows.jsonl
      trimtab import-config dpo.yaml --from "trl dpo" --base smollm2-135m-instruct

    Every key is carried over, or named with the reason. Keys that are not carried, and those that need nothing here, stand as comments in
    the run file. Without --out its paths start at FILE's folder. If a key cannot be carried and the run would be another training without
    it, no run file is written (exit code 2).
    """
    from trimtab.train.imported import content, read_settings, run_text

    carry = read_settings(file, program, data, out and out.parent, base)
    failed = bool(carry.refused or (strict and carry.lost))
    if as_json:
        notes = {name: [[n.key, n.value, n.why] for n in getattr(carry, name)] for name in ("refused", "lost", "idle")}
        click.echo(json.dumps({"ok": not failed, "program": carry.program, "run": content(carry), **notes}, indent=1, default=str))
        ctx.exit(2 if failed else 0)
    for note in carry.refused:
        say(str(note), err=True, bold=True, mark="error:", colour="red")
    for note in carry.lost:
        say(str(note), err=True, mark="not carried over:", colour="yellow")
    if carry.refused:
        say("no run file is written: without these keys it would be another training", err=True)
    elif out is None:
        click.echo(run_text(carry, file.name), nl=False)
    else:
        write_new(out, run_text(carry, file.name))
    ctx.exit(2 if failed else 0)
