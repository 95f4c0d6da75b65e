"""`trimtab plan`: what methods cost on a base, from its architecture alone; and what they, or a run file, take on devices of a kind."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from trimtab.cli.options import json_option

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trimtab.bases.shapes import Architecture
    from trimtab.cost.plan import CostPlan
    from trimtab.methods import Method

EXAMPLE = """\b
Examples:
  trimtab plan llama-2-7b
  trimtab plan llama-2-7b --method lora --set r=16 --set 'target_modules=[q_proj, v_proj]'
  trimtab plan ./my-model/config.json --method prefix -o num_virtual_tokens=50 --json
  trimtab plan llama-3.1-8b --method lora --device h100-80gb --ranks 8 --price-per-hour 3
  trimtab plan examples/halyard.yaml --device l4-24gb
  trimtab plan --devices
"""


class _MethodOption(click.Option):
    """Its help lists the methods that there are, and asks for them only when it is shown."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        from trimtab.methods import BY_NAME

        self.help = f"One method: {', '.join(BY_NAME)}. Full fine-tuning is shown beside it. Without it: all of them."
        return super().get_help_record(ctx)


@click.command(epilog=EXAMPLE)
@click.argument("base", required=False, metavar="BASE|RUN.yaml")
@click.option("--device", help="Training and serving on devices of this kind, by their data sheets; cpu: this machine, measured.")
@click.option("--devices", "table", is_flag=True, help="Print the devices that are known, with the source of their figures.")
@click.option("--ranks", default=1, show_default=True, help="With --device: processes that train together, or servers; a device each.")
@click.option("--price-per-hour", type=float, help="With --device: of one device, in any currency.")
@click.option("--share-of-peak", type=float, help="With --device: part of its TFLOP/s that is reached, if you have measured it.")
@click.option("--method", cls=_MethodOption, metavar="NAME")
@click.option("-o", "--set", "fields", multiple=True, metavar="FIELD=VALUE", help="A field of the method, as in a run file. Repeatable.")
@click.option("--all", "everything", is_flag=True, help="Beside --method, show the other methods at their presets too.")
@click.option("--dtype", default="bfloat16", show_default=True, help="The base's: float32, bfloat16, float16, or auto (as stored).")
@click.option("--quantize", help="Pack the base's linear layers: nf4, fp4, int8, nf4-double or fp4-double.")
@click.option(
    "--batch-tokens",
    default=4096,
    show_default=True,
    help="Tokens of a step, all variants together; or in the KV cache.",
)
@click.option("--sequence-length", default=512, show_default=True, help="Tokens of one sequence.")
@click.option("--variants", default=1, show_default=True, help="Adapters trained, or served, together.")
@click.option("--activation-checkpointing", is_flag=True, help="Train with it, as in a run file: less memory, slower.")
@click.option("--optimizer", default="adamw", show_default=True, help="As in a run file: adamw, adamw8bit, adafactor, muon or sgd.")
@click.option("--labels", type=click.IntRange(min=1), help="Each adapter has a head over so many labels, a reward over one.")
@json_option("Print JSON; sizes in bytes.")
def plan(
    base: str | None,
    device: str | None,
    table: bool,
    ranks: int,
    price_per_hour: float | None,
    share_of_peak: float | None,
    method: str | None,
    fields: tuple[str, ...],
    everything: bool,
    quantize: str | None,
    labels: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Parameters, file sizes and memory of methods on BASE, without its weights.

    BASE is a known shape (llama-2-7b, qwen3-8b, …), the bundled base, a folder or its config.json, a .gguf file, or a hub id.
    Parameters and file sizes are exact; memory is an estimate. MB and GB are 10^6 and 10^9 bytes.

    With --device it says instead what fits where, tokens a second and cost, for training and for serving, and what that assumes. A run
    file may stand in the place of BASE: its rows are read, and all its variants train together. Without --device that is planned for this
    machine (cpu).
    """
    from trimtab.cli.plan_device import Fleet, is_run_file, plan_base, plan_run, show_table
    from trimtab.errors import ConfigError

    if table:
        show_table(as_json)
        return
    if base is None:
        raise ConfigError("no base is named", fix="trimtab plan BASE, or trimtab plan RUN.yaml --device NAME")
    fleet = Fleet(device or "cpu", ranks, price_per_hour, share_of_peak)
    if is_run_file(base):
        plan_run(base, fleet, as_json)
        return
    if device is None and (ranks != 1 or price_per_hour is not None or share_of_peak is not None):
        raise ConfigError(
            "--ranks, --price-per-hour and --share-of-peak say something about devices, but none is named", fix="add --device NAME"
        )
    if device is not None:
        method, everything = method or "lora", False
    methods = _methods(method, fields, everything)
    from trimtab.bases.shapes import read_architecture
    from trimtab.cost.plan import plan as make_plan
    from trimtab.methods.head import Head, unnamed

    architecture, head = read_architecture(base, quantize), Head(unnamed(labels)) if labels else None
    if device is not None:
        plan_base(architecture, methods[0], head, fleet, as_json, **options)
        return
    plans = [make_plan(architecture, m, head=head, **options) for m in methods]
    if as_json:
        click.echo(json.dumps({"base": base, "base_parameters": architecture.parameters, "plans": [p.to_dict() for p in plans]}, indent=2))
        return
    _show(architecture, plans)


def _methods(name: str | None, fields: tuple[str, ...], everything: bool) -> list[Method]:
    """The method asked for and full fine-tuning beside it, or all methods at their presets."""
    from trimtab.errors import ConfigError
    from trimtab.foreign import method_answer
    from trimtab.methods import BY_NAME

    known: Mapping[str, type[Method]] = BY_NAME
    if name is None:
        if fields:
            raise ConfigError("--set says something about a method, but none is named", fix="add --method, for example --method lora")
        return [cls() for cls in known.values()]
    if name not in known:
        raise ConfigError(f"there is no method {name!r}{method_answer(name, known)}", fix=f"use one of {', '.join(known)}")
    chosen = known[name].from_dict(_parse(fields), where=f"--method {name}")
    others = known if everything else ("full",)
    return [chosen, *(known[other]() for other in others if other != name)]


def _parse(fields: tuple[str, ...]) -> dict[str, Any]:
    """FIELD=VALUE pairs; values are YAML, as in a run file."""
    import yaml

    from trimtab.errors import ConfigError
    from trimtab.train.runfile import read_value

    own = {name: param.opts[0] for param in plan.params if isinstance(param, click.Option) for name in [param.name]}
    parsed, problems = {}, []
    for pair in fields:
        name, equals, value = pair.partition("=")
        if name in own and equals:
            problems.append(f"{name} is no field of a method, but an option of this command: write {own[name]} {value}")
            continue
        if not equals or not name:
            problems.append(f"{pair!r} is not FIELD=VALUE")
        elif name in parsed:
            problems.append(f"{name} is set twice")
        try:
            parsed[name] = read_value(value)
        except yaml.YAMLError as e:
            problems.append(f"{pair!r}: the value is not YAML: {str(e).splitlines()[0]}")
    if problems:
        raise ConfigError("--set cannot be read", problems=problems, fix="write --set r=16 or --set 'target_modules=[q_proj, v_proj]'")
    return parsed


def _show(architecture: Architecture, plans: list[CostPlan]) -> None:
    from rich.table import Table

    from trimtab.cli.terminal import Terminal, print_whole, say
    from trimtab.cost.plan import rows

    p = next((p for p in plans if p.full is not None), plans[0])  # full fine-tuning is of the dense base
    together = f", {p.variants} variants together" if p.variants > 1 else ""
    bits = architecture.spec.packed_bits
    kept = f", its linear layers in {bits:.3g} bits, the rest in {p.dtype}" if bits is not None and p.full is not None else f" in {p.dtype}"
    again = ", activations computed again in the backward" if p.activation_checkpointing else ""
    say(f"{p.base}: {p.base_parameters:,} parameters, {p.base_bytes / 1e9:.2f} GB{kept}")
    say(f"a step of {p.batch_tokens:,} tokens in sequences of {p.sequence_length:,}{together}{again}")
    say("GB are estimates; an allocator's slack comes on top")
    if bits is not None and any(q.full is None for q in plans):
        say("full is of the dense base: weights that are packed cannot be trained")
    table = Table(box=None, padding=(0, 1), header_style="bold")
    table.add_column("method")
    for heading in ("trainable", "% of base", "adapter MB", "optimizer MB", "train GB", "serve GB"):
        table.add_column(heading, justify="right")
    for r in rows(plans):
        mega = (f"{r['adapter_file_bytes'] / 1e6:,.2f}", f"{r['optimizer_bytes'] / 1e6:,.2f}")
        giga = (f"{r['train_peak_bytes'] / 1e9:,.2f}", f"{r['serve_peak_bytes'] / 1e9:,.2f}")
        table.add_row(r["method"], f"{r['trainable']:,}", f"{r['percent']:.3g}", *mega, *giga)
    print_whole(Terminal(), table)
