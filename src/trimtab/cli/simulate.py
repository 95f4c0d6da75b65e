"""`trimtab simulate`: several servers under traffic over many adapters."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab.cli.options import OnBase, base_option, device_option, dtype_option, json_option, on_base
from trimtab.cli.terminal import say
from trimtab.errors import ConfigError
from trimtab.tables import counted

if TYPE_CHECKING:
    from trimtab.fleet.replica import Shape
    from trimtab.fleet.simulate import Simulated
    from trimtab.fleet.speed import Speed
    from trimtab.fleet.traffic import Trace

ROUTINGS = ("round-robin", "hash", "least-loaded", "affinity")
GIVEN = ("step_ms", "row_us", "adapter_us", "load_ms")


@click.command()
@click.option("--adapters", default=1000, show_default=True, help="How many there are; number i is asked for in proportion to i^-zipf.")
@click.option("--tenants", default=1, show_default=True, help="Among whom the adapters are divided.")
@click.option("--zipf", default=1.0, show_default=True, help="0: all adapters are equally popular.")
@click.option("--rate", default=1.0, show_default=True, help="Requests a second, at random times.")
@click.option("--requests", default=2000, show_default=True, help="How many come in all.")
@click.option("--prompt-tokens", default=128.0, show_default=True, help="Of a prompt, on average.")
@click.option("--answer-tokens", default=64.0, show_default=True, help="Of an answer, on average.")
@click.option("--spread", default=0.5, show_default=True, help="Deviation of the logarithm of lengths; 0: all are equally long.")
@click.option("--seed", default=0, show_default=True, help="Of the traffic.")
@click.option(
    "--trace", "path", type=click.Path(path_type=Path), help="Traffic of your own instead: lines of JSON, as --write-trace has them."
)
@click.option("--write-trace", type=click.Path(path_type=Path), help="Write the traffic into a new file.")
@click.option("--replicas", default=1, show_default=True, help="Servers.")
@click.option(
    "--routing", "routings", multiple=True, type=click.Choice(ROUTINGS), help="How a request finds its server. Repeatable; by default all."
)
@click.option("--resident", default=64, show_default=True, help="Adapters that fit into a server's memory.")
@click.option("--kv-tokens", default=65536, show_default=True, help="Tokens whose keys and values fit into a server's memory.")
@click.option("--max-running", default=64, show_default=True, help="As in `trimtab serve`.")
@click.option("--max-queued", default=256, show_default=True, help="As in `trimtab serve`.")
@click.option("--warm-up", default=0.2, show_default=True, help="Part of the requests, the first ones, that are not counted.")
@click.option("--step-ms", type=float, help="Given instead of measured: milliseconds of a step with one row.")
@click.option("--row-us", default=0.0, help="With --step-ms: microseconds of each further row of a step, of prompts too.")
@click.option("--adapter-us", default=0.0, help="With --step-ms: microseconds of each adapter in a step.")
@click.option("--load-ms", default=0.0, help="With --step-ms: milliseconds of reading an adapter.")
@click.option("--speed", "speed_file", type=click.Path(path_type=Path), help="Speeds that --write-speed has written, instead of measuring.")
@click.option("--write-speed", type=click.Path(path_type=Path), help="Write the speeds that were measured into a new file.")
@base_option
@dtype_option
@device_option
@json_option("Print JSON; seconds and bytes.")
@on_base
def simulate(on: OnBase, **options: Any) -> None:
    """What servers would do under traffic: hit rate of adapters in memory, load, time to the first and the last token.

    \b
    Example:
      trimtab simulate --adapters 1000 --tenants 20 --rate 4 --replicas 2
      trimtab simulate --adapters 100000 --tenants 1000 --rate 100 --replicas 16 --step-ms 20 --row-us 30 --load-ms 30

    The servers' scheduler, queues, shares and memory of adapters are the real ones; time is simulated. How long a step and a load take is
    measured for about a minute on --base, with fresh LoRAs of rank 16, on this machine, also through a server and its streams; or it is
    given: --step-ms and its kin, or --speed.
    """
    from trimtab.fleet.replica import Shape
    from trimtab.fleet.simulate import simulate as run

    asked = Asked(**options)
    trace = _trace(asked)
    shape = Shape(
        resident=asked.resident,
        kv_tokens=asked.kv_tokens,
        max_running=asked.max_running,
        max_queued=asked.max_queued,
    )
    speed = _speed(asked, on, shape)
    found = [
        run(trace, shape, speed, replicas=asked.replicas, routing=routing, warm_up=asked.warm_up) for routing in asked.routings or ROUTINGS
    ]
    if asked.as_json:
        click.echo(json.dumps({"speed": asdict(speed), "shape": asdict(shape), "simulated": [f.to_dict() for f in found]}, indent=2))
        return
    _show(asked, trace, shape, speed, found)


@dataclass(frozen=True)
class Asked:
    """The options, beside those of the base."""

    adapters: int
    tenants: int
    zipf: float
    rate: float
    requests: int
    prompt_tokens: float
    answer_tokens: float
    spread: float
    seed: int
    path: Path | None
    write_trace: Path | None
    replicas: int
    routings: tuple[str, ...]
    resident: int
    kv_tokens: int
    max_running: int
    max_queued: int
    warm_up: float
    step_ms: float | None
    row_us: float
    adapter_us: float
    load_ms: float
    speed_file: Path | None
    write_speed: Path | None
    as_json: bool


def _trace(asked: Asked) -> Trace:
    from trimtab.fleet.traffic import Trace, Traffic

    if asked.path is not None:
        trace = Trace.read(asked.path)
    else:
        names = ("adapters", "tenants", "zipf", "rate", "requests", "prompt_tokens", "answer_tokens", "spread", "seed")
        trace = Traffic(**{name: getattr(asked, name) for name in names}).trace()
    if asked.write_trace is not None:
        _write_new(asked.write_trace, trace.lines())
    return trace


def _speed(asked: Asked, on: OnBase, shape: Shape) -> Speed:
    """Given, read or measured. ConfigError where more than one is asked for."""
    from trimtab.fleet.speed import Speed

    given = [f"--{name.replace('_', '-')}" for name in GIVEN if getattr(asked, name)]
    if given and asked.step_ms is None:
        raise ConfigError(f"{', '.join(given)}: of no use without --step-ms", fix="add --step-ms, or leave them out and let it be measured")
    if asked.step_ms is not None and asked.speed_file is not None:
        raise ConfigError("--step-ms and --speed both say how long a step takes", fix="leave out one of them")
    if asked.step_ms is not None:
        return Speed.given(asked.step_ms / 1e3, asked.row_us / 1e6, asked.adapter_us / 1e6, asked.load_ms / 1e3)
    if asked.speed_file is not None:
        return Speed.read(asked.speed_file)
    from trimtab.fleet.measured import measure
    from trimtab.fleet.served import with_server

    base = on.open()
    say("measuring steps on this machine, for about half a minute", err=True)
    speed, size = measure(base, shape)
    speed = with_server(base, speed, shape, _of_serve(on), status=lambda text: say(text, err=True))
    speed = replace(speed, source=f"{speed.source}; {size * shape.resident / 1e9:.3g} GB for {shape.resident} adapters")
    if asked.write_speed is not None:
        _write_new(asked.write_speed, json.dumps(asdict(speed), indent=1) + "\n")
    return speed


def _of_serve(on: OnBase) -> list[str]:
    """The options of `trimtab serve` that say the same of the base."""
    given = {"--base": on.base_name, "--dtype": on.dtype, "--device": on.device, "--quantize": on.quantize}
    return [word for option, value in given.items() if value is not None for word in (option, value)]


def _write_new(path: Path, text: str) -> None:
    from trimtab.atomic import write_new

    try:
        write_new(path, text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", fix="name another file, which is not there yet") from error


def _show(asked: Asked, trace: Trace, shape: Shape, speed: Speed, found: list[Simulated]) -> None:
    from trimtab.cli.tables import print_table

    used, tenants = len(set(trace.adapter.tolist())), len(set(trace.tenant.tolist()))
    tokens = f"prompts of {trace.prompt.mean():,.0f} and answers of {trace.answer.mean():,.0f} tokens on average"
    say(f"{len(trace):,} requests in {trace.at[-1]:,.0f} s, of {counted(tenants, 'tenant')} for {counted(used, 'adapter')}, with {tokens}")
    say(
        f"{counted(asked.replicas, 'server')}: {shape.resident:,} adapters, keys and values of {shape.kv_tokens:,} tokens in memory, "
        f"{shape.max_running} answers at a time, {shape.max_queued} more may wait"
    )
    headings = ("routing", "hit rate", "first p50 s", "p95", "whole p50 s", "p95", "tokens/s", "refused", "busy", "waiting", "took s")
    rows = [
        (
            f.routing,
            f"{f.hit_rate:.3f}",
            *(f"{s:.3g}" for times in (f.first_s, f.total_s) for s in times.values()),
            f"{f.tokens_per_s:,.0f}",
            f"{f.refused:,}",
            _range([r.busy for r in f.replicas], ".2f"),
            _range([r.waiting for r in f.replicas], ".1f"),
            f"{f.took_s:.1f}",
        )
        for f in found
    ]
    print_table(headings, rows, right=headings[1:])
    say("hit rate: part of the requests for which no adapter had to be read; busy, waiting: least to most of the servers")
    used_gb = max(f.memory_bytes for f in found) / 1e9
    say(f"the first {asked.warm_up:.0%} of the requests are not in hit rate and times; the simulation took {used_gb:.2f} GB")
    say(f"steps: {speed.source}")
    rows_ms = ", ".join(f"{n}: {s * 1e3:.4g}" for n, s in zip(speed.rows, speed.seconds, strict=True))
    say(f"  - milliseconds by rows of a step: {rows_ms}")
    each = {"sequence": speed.sequence_s, "adapter": speed.adapter_s, "token in the cache": speed.context_s}
    each["mix of adapters that is put together"] = speed.mix_s
    say(f"  - and more for each {', '.join(f'{name} {s * 1e6:.3g} µs' for name, s in each.items())}")
    load_ms = " or ".join(dict.fromkeys(f"{speed.of_load(busy) * 1e3:.3g} ms" for busy in (False, True)))
    beside = ", without and beside steps" if speed.busy_load_s is not None else ""
    say(f"  - reading an adapter takes {load_ms}{beside}; steps take {speed.slowed:.0%} longer meanwhile")
    say("assumed: no prompt begins as another, no drafts, no grammars; adapters are equally large, and a router knows what servers hold")


def _range(values: list[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low}–{high}"
