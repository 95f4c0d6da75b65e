"""`trimtab plan … --device`: what training and serving take on devices of a kind, with what each figure assumes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab.errors import ConfigError

if TYPE_CHECKING:
    from trimtab.bases.shapes import Architecture
    from trimtab.cost.devices import Device
    from trimtab.cost.ranks import Fit, RanksPlan, Trainee
    from trimtab.cost.replica import ReplicaPlan
    from trimtab.methods import Head, Method
    from trimtab.train.config import RunConfig

RUN_FILES = (".yaml", ".yml")


@dataclass(frozen=True)
class Fleet:
    """The devices that are planned for."""

    device: str
    ranks: int
    price_per_hour: float | None
    share_of_peak: float | None

    @property
    def shares(self) -> tuple[float, float] | None:
        return None if self.share_of_peak is None else (self.share_of_peak, self.share_of_peak)


@dataclass(frozen=True)
class Planned:
    """adapter: the variant, or the method, of which `serving` serves adapters."""

    title: str
    adapter: str
    training: RanksPlan
    serving: ReplicaPlan

    def to_dict(self) -> dict[str, Any]:
        parts = {"training": self.training.to_dict(), "serving": self.serving.to_dict()}
        return {"title": self.title, "adapter": self.adapter, "device": vars(self.training.device)} | {
            name: {k: v for k, v in part.items() if k != "device"} for name, part in parts.items()
        }


def is_run_file(name: str) -> bool:
    return Path(name).suffix.lower() in RUN_FILES


def show_table(as_json: bool) -> None:
    """The devices that are known."""
    from trimtab.cli.tables import print_table
    from trimtab.cost.devices import DEVICES

    if as_json:
        click.echo(json.dumps([vars(d) for d in DEVICES], indent=2))
        return
    headings = ("device", "GB", "TFLOP/s", "memory GB/s", "link GB/s", "link", "source")
    rows = [
        (d.name, *(f"{n:,.4g}" for n in (d.memory_bytes / 1e9, d.flops / 1e12, d.read_bytes / 1e9, d.link_bytes / 1e9)), d.link, d.source)
        for d in DEVICES
    ]
    print_table(headings, [*rows, ("cpu", "", "", "", "", "", "this machine, measured when it is asked for")], right=headings[1:5])


def plan_run(path: str, fleet: Fleet, as_json: bool) -> None:
    """Of all variants of a run file, together. Its rows are read, as `trimtab check` reads them."""
    from trimtab.cli.terminal import say
    from trimtab.cost.plan import plan
    from trimtab.cost.ranks import plan_ranks
    from trimtab.cost.replica import plan_replica
    from trimtab.methods import FullConfig
    from trimtab.train.check import checked, read_base
    from trimtab.train.config import RunConfig

    run = RunConfig.load(path)
    status = (lambda text: None) if as_json else (lambda text: say(text, err=True))
    report, need = checked(run, status=status)
    if report.errors or need is None:
        problems = [f"{f.where}: {f.message}" for f in report.errors] or ["no variant has rows"]
        raise ConfigError(f"{path} cannot be planned", problems=problems, fix=f"trimtab check {path} says more")
    base = read_base(run.base, status, run.quantize)[1]
    dtype = _dtype(run.dtype, fleet.device, base)
    device = _device(fleet, base, dtype)
    trainees = [_trainee(run, v.name, report.variants) for v in run.variants]
    training = plan_ranks(
        base,
        trainees,
        device,
        ranks=fleet.ranks,
        dtype=dtype,
        max_tokens=run.max_tokens,
        longest=need.longest,
        again=run.activation_checkpointing,
        price_per_hour=fleet.price_per_hour,
        shares=fleet.shares,
    )
    served = next((v for v in run.variants if not isinstance(v.method, FullConfig)), run.variants[0])
    length = min(base.spec.max_positions, max(need.longest, 1) + run.evaluate.max_new_tokens)
    adapter = plan(base, served.method, dtype=_name(dtype), head=served.objective.head)
    replica = plan_replica(
        base, adapter, device, replicas=fleet.ranks, dtype=dtype, length=length, price_per_hour=fleet.price_per_hour, shares=fleet.shares
    )
    title = f"{path}: {len(run.variants)} variants on {run.base} in {_name(dtype)}{_packed(run.quantize)}"
    _print(Planned(title, served.name, training, replica), as_json)


def plan_base(architecture: Architecture, method: Method, head: Head | None, fleet: Fleet, as_json: bool, **options: Any) -> None:
    """Of a method on a base, by the sizes that the command is given."""
    from trimtab.cost.plan import plan
    from trimtab.cost.ranks import plan_ranks, trainee
    from trimtab.cost.replica import plan_replica

    dtype = _dtype(options["dtype"], fleet.device, architecture)
    device = _device(fleet, architecture, dtype)
    bare = plan(architecture, method, dtype=_name(dtype), batch_tokens=options["batch_tokens"], sequence_length=options["sequence_length"])
    adapter = bare if head is None else plan(architecture, method, dtype=_name(dtype), head=head)
    length, again, variants = options["sequence_length"], options["activation_checkpointing"], options["variants"]
    tokens = -(-options["batch_tokens"] // variants)
    one = trainee(
        architecture,
        method,
        optimizer=options["optimizer"],
        head=head,
        trainable=adapter.trainable,
        tokens_per_step=tokens,
        length=length,
        again=again,
    )
    training = plan_ranks(
        architecture,
        [one] * variants,
        device,
        ranks=fleet.ranks,
        dtype=dtype,
        max_tokens=options["batch_tokens"],
        longest=length,
        again=again,
        whole_run=False,
        price_per_hour=fleet.price_per_hour,
        shares=fleet.shares,
    )
    replica = plan_replica(
        architecture,
        adapter,
        device,
        replicas=fleet.ranks,
        dtype=dtype,
        length=length,
        price_per_hour=fleet.price_per_hour,
        shares=fleet.shares,
    )
    several = f", {variants} variants together" * (variants > 1)
    title = f"{architecture.name} in {_name(dtype)}, {method.name}{several}, steps of {options['batch_tokens']:,} tokens"
    _print(Planned(title, method.name, training, replica), as_json)


def _device(fleet: Fleet, base: Architecture, dtype: Any) -> Device:
    from trimtab.cost.devices import find_device

    if fleet.ranks < 1:
        raise ConfigError(f"--ranks {fleet.ranks}: must be at least 1", fix="give the number of processes, each with a device of its own")
    return find_device(fleet.device, base.spec, dtype, fleet.ranks)


def _dtype(named: str | None, device: str, base: Architecture) -> Any:
    """As it would be there: bfloat16 on a GPU unless another is named, on this machine what it multiplies natively."""
    import torch

    from trimtab.bases import resolve_dtype

    if device != "cpu" and named is None:
        return torch.bfloat16
    found = resolve_dtype(named, torch.device("cpu"))
    return base.dtype if isinstance(found, str) else found


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _packed(quantize: str | None) -> str:
    return f", its linear layers in {quantize}" if quantize else ""


def _trainee(run: RunConfig, name: str, estimates: Sequence[Any]) -> Trainee:
    from trimtab.cost.ranks import Trainee

    v = next(v for v in run.variants if v.name == name)
    e = next(e for e in estimates if e.name == name)
    mean = e.tokens_per_epoch / e.rows_per_epoch
    return Trainee(v.method, v.options.optimizer, v.objective.head, e.trainable, e.tokens, e.steps, e.tokens_per_step, e.flops, mean)


def _print(planned: Planned, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(planned.to_dict(), indent=2))
        return
    from trimtab.cli.terminal import say

    t, s = planned.training, planned.serving
    d = t.device
    say(planned.title)
    say(
        f"{t.ranks} × {d.name}: {d.memory_bytes / 1e9:,.4g} GB, {d.flops / 1e12:,.3g} TFLOP/s, memory {d.read_bytes / 1e9:,.4g} GB/s, "
        f"link {d.link_bytes / 1e9:,.3g} GB/s in each direction ({d.link}); source: {d.source}"
    )
    _print_training(t)
    _print_serving(s, planned.adapter)


def _print_training(t: RanksPlan) -> None:
    from trimtab.cli.tables import print_table
    from trimtab.cli.terminal import say

    say(
        f"\ntraining, on each of {t.ranks} ranks: forwards of at most {t.forward_tokens:,} tokens, rows of at most {t.longest:,}", bold=True
    )
    kinds = ("whole", "sharded") if t.ranks > 1 and t.shardable else ("whole",)
    fits: Mapping[str, Fit] = {"whole": t.whole, "sharded": t.sharded}
    rows: list[tuple[str, ...]] = [
        ("base", *(_gb(fits[k].base) for k in kinds)),
        ("gathered layers", *(_gb(fits[k].gathered) for k in kinds)),
        ("adapters and gradients", *(_gb(fits[k].adapters) for k in kinds)),
        ("optimizer", *(_gb(fits[k].optimizer) for k in kinds)),
        ("activations", *(_gb(fits[k].activations) for k in kinds)),
        ("all of it", *(f"{_gb(fits[k].total)}{'' if fits[k].fits else ': does not fit'}" for k in kinds)),
        ("can be used", *(_gb(fits[k].usable) for k in kinds)),
        ("largest micro-batch", *(_micro_batch(fits[k]) for k in kinds)),
        ("tokens/s, all ranks", *(_span(t.tokens_per_s[k]) for k in kinds)),
    ]
    if t.hours is not None:
        rows.append(("time", *(_time(t.hours[k]) for k in kinds)))
    if t.cost is not None:
        rows.append(("cost", *(_span(t.cost[k]) for k in kinds)))
    if t.cost_per_million is not None:
        rows.append(("cost of 10⁶ tokens", *(_span(t.cost_per_million[k]) for k in kinds)))
    print_table(("", *(f"base {k}" for k in kinds)), [r for r in rows if any(c not in ("", "0.00 GB") for c in r[1:])], right=())
    if t.hours is not None:
        say(f"{t.tokens:,} tokens in {t.steps:,} steps, {t.flops:.3g} FLOPs in all")
    if t.ranks > 1:
        gathered = f"; sharded, each receives {t.gathered_bytes / 1e9:,.3g} GB of the base a forward and its backward"
        say(f"all-reduce: {t.all_reduce_bytes / 1e6:,.4g} MB of fp32 gradients a step{gathered}")
    _print_assumed(t.assumes)


def _print_serving(s: ReplicaPlan, adapter: str) -> None:
    from trimtab.cli.tables import print_table
    from trimtab.cli.terminal import say

    say(f"\nserving, one server a device: sequences of {s.length:,} tokens, prompt and answer together", bold=True)
    if not s.fits:
        say(f"does not fit: base {_gb(s.base_bytes)}, work space {_gb(s.work_bytes)}, of {_gb(int(s.device.memory_bytes))}")
    else:
        say(f"base {_gb(s.base_bytes)}, work space {_gb(s.work_bytes)}")
        say(f"keys and values: {_gb(s.kv_bytes)} for {s.kv_tokens:,} tokens, which is {s.streams} sequences at a time")
        if s.adapter_bytes is None:
            say(f"{adapter}: a whole model each, which share no base")
        else:
            say(f"adapters like {adapter}: {s.adapter_bytes / 1e6:,.4g} MB each, {s.resident:,} in {_gb(s.adapter_budget_bytes)}")
        headings = ["streams", "tokens/s", *(["cost of 10⁶ tokens"] if s.decoding[0].cost_per_million else [])]
        rows = [(f"{d.streams}", _span(d.tokens_per_s), *([_span(d.cost_per_million)] if d.cost_per_million else [])) for d in s.decoding]
        print_table(headings, rows, right=headings)
        times = f"; all of it times {s.replicas} for {s.replicas} servers" if s.replicas > 1 else ""
        say(f"prompts: {_span(s.prompt_tokens_per_s)} tokens/s{times}")
    _print_assumed(s.assumes)


def _print_assumed(assumes: Sequence[str]) -> None:
    from trimtab.cli.terminal import say

    say("assumed:")
    for text in assumes:
        say(f"  - {text}")


def _micro_batch(fit: Fit) -> str:
    if not fit.most_rows:
        return "not one row"
    return f"{fit.most_tokens:,} tokens, {fit.most_rows:,} row{'s' * (fit.most_rows > 1)}"


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"


def _span(span: tuple[float, float] | None) -> str:
    if span is None:
        return "-"
    low, high = map(_short, span)
    return low if low == high else f"{low} to {high}"


def _time(hours: tuple[float, float] | None) -> str:
    if hours is None:
        return "-"
    factor, unit = (3600, "s") if hours[1] < 1 / 60 else (60, "min") if hours[1] < 1 else (1, "h")
    return f"{_span((hours[0] * factor, hours[1] * factor))} {unit}"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
