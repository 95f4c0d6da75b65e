"""`trimtab plan … --device`: what training and serving take on devices of a kind, with what each figure assumes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab.errors import ConfigError
from trimtab.tables import counted

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
    """adapter: the variant, or the method, of which `serving` serves adapters. trains_with, serves_with: where it does not fit, changes
    with each of which it would."""

    title: str
    adapter: str
    training: RanksPlan
    serving: ReplicaPlan
    trains_with: Sequence[str]
    serves_with: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        parts = {"training": self.training.to_dict(), "serving": self.serving.to_dict()}
        parts["training"] |= {"would_fit": list(self.trains_with)}
        parts["serving"] |= {"would_fit": list(self.serves_with)}
        return {"title": self.title, "adapter": self.adapter, "device": vars(self.training.device)} | {
            name: {k: v for k, v in part.items() if k != "device"} for name, part in parts.items()
        }


@dataclass(frozen=True)
class Asked:
    """What is planned, so that it can be planned with something else. make_trainees: the variants on a base, as another packing may count
    them; served: the method of the adapters that are served. sizes: `max_tokens` and `longest`."""

    base: Architecture
    device: Device
    make_trainees: Callable[[Architecture], Sequence[Trainee]]
    served: Method
    head: Head | None
    fleet: Fleet
    dtype: Any
    length: int
    sizes: Mapping[str, Any]
    again: bool
    whole_run: bool

    def training(self) -> RanksPlan:
        from trimtab.cost.ranks import plan_ranks

        return plan_ranks(
            self.base,
            self.make_trainees(self.base),
            self.device,
            ranks=self.fleet.ranks,
            dtype=self.dtype,
            again=self.again,
            whole_run=self.whole_run,
            price_per_hour=self.fleet.price_per_hour,
            shares=self.fleet.shares,
            **self.sizes,
        )

    def serving(self) -> ReplicaPlan:
        from trimtab.cost.plan import plan
        from trimtab.cost.replica import plan_replica

        adapter = plan(self.base, self.served, dtype=_name(self.dtype), head=self.head)
        return plan_replica(
            self.base,
            adapter,
            self.device,
            replicas=self.fleet.ranks,
            dtype=self.dtype,
            length=self.length,
            price_per_hour=self.fleet.price_per_hour,
            shares=self.fleet.shares,
        )

    def planned(self, title: str, adapter: str, keys: bool) -> Planned:
        """keys: whether changes are named as keys of a run file, or as options of the command."""
        training, serving = self.training(), self.serving()
        trains = [] if _trains(training) else [name for name, other in self._others(keys) if _trains(other.training())]
        serves = [] if serving.fits else [name for name, other in self._others(keys, served=True) if other.serving().fits]
        return Planned(title, adapter, training, serving, trains, serves)

    def _others(self, keys: bool, served: bool = False) -> Iterator[tuple[str, Asked]]:
        """(what is changed, the same with it): one change each, the smaller ones first."""
        from trimtab.bases.recipes import BITS, SMALLEST
        from trimtab.cost.devices import DEVICES
        from trimtab.methods import FullConfig

        full = any(isinstance(t.method, FullConfig) for t in self.make_trainees(self.base))
        if not served:
            if not self.again:
                yield ("activation_checkpointing: true" if keys else "--activation-checkpointing"), replace(self, again=True)
            tokens, longest = self.sizes["max_tokens"], self.sizes["longest"]
            smaller = [replace(self, sizes={**self.sizes, "max_tokens": n}) for n in _halves(tokens) if n >= longest]
            if (fits := next((one for one in smaller if _trains(one.training())), None)) is not None:
                yield (f"max_tokens: {fits.sizes['max_tokens']}" if keys else f"--batch-tokens {fits.sizes['max_tokens']}"), fits
        if self.base.spec.packed_bits is None and not full:
            packed = replace(self.base, spec=self.base.spec.packed(BITS[SMALLEST]))
            yield (f"quantize: {SMALLEST}" if keys else f"--quantize {SMALLEST}"), replace(self, base=packed)
        larger = [d for d in sorted(DEVICES, key=lambda d: d.memory_bytes) if d.memory_bytes > self.device.memory_bytes]
        others = (replace(self, device=d) for d in larger if self.dtype.itemsize == 2)
        if (enough := next((o for o in others if (o.serving().fits if served else _trains(o.training()))), None)) is not None:
            yield f"--device {enough.device.name}", enough
        if not served and not full:
            ranks = (replace(self, fleet=replace(self.fleet, ranks=n)) for n in (2, 4, 8) if n > self.fleet.ranks)
            if (several := next((o for o in ranks if _trains(o.training())), None)) is not None:
                yield f"--ranks {several.fleet.ranks} with shard: true", several


def _halves(n: int) -> Iterator[int]:
    while (n := n // 2) >= 64:
        yield n


def _trains(plan: RanksPlan) -> bool:
    return plan.whole.fits or (plan.ranks > 1 and plan.sharded.fits and plan.shardable)


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
    served = next((v for v in run.variants if not isinstance(v.method, FullConfig)), run.variants[0])
    length = min(base.spec.max_positions, max(need.longest, 1) + run.evaluate.max_new_tokens)
    sizes = {"max_tokens": run.max_tokens, "longest": need.longest}
    asked = Asked(
        base,
        device,
        lambda _: trainees,
        served.method,
        served.objective.head,
        fleet,
        dtype,
        length,
        sizes,
        run.activation_checkpointing,
        True,
    )
    title = f"{path}: {counted(len(run.variants), 'variant')} on {run.base}, {_kept(base, dtype)}"
    _print(asked.planned(title, served.name, keys=True), as_json)


def plan_base(architecture: Architecture, method: Method, head: Head | None, fleet: Fleet, as_json: bool, **options: Any) -> None:
    """Of a method on a base, by the sizes that the command is given."""
    from trimtab.cost.plan import plan
    from trimtab.cost.ranks import trainee

    dtype = _dtype(options["dtype"], fleet.device, architecture)
    device = _device(fleet, architecture, dtype)
    length, again, variants = options["sequence_length"], options["activation_checkpointing"], options["variants"]
    tokens = -(-options["batch_tokens"] // variants)
    trainable = plan(architecture, method, dtype=_name(dtype), head=head).trainable
    own: dict[str, Any] = {"trainable": trainable, "tokens_per_step": tokens, "length": length, "again": again, "head": head}

    def trainees(base: Architecture) -> list[Trainee]:
        return [trainee(base, method, optimizer=options["optimizer"], **own)] * variants

    sizes = {"max_tokens": options["batch_tokens"], "longest": length}
    asked = Asked(architecture, device, trainees, method, head, fleet, dtype, length, sizes, again, False)
    several = f", {variants} variants together" * (variants > 1)
    title = f"{architecture.name}, {_kept(architecture, dtype)}, {method.name}{several}, steps of {options['batch_tokens']:,} tokens"
    _print(asked.planned(title, method.name, keys=False), as_json)


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


def _kept(base: Architecture, dtype: Any) -> str:
    bits = base.spec.packed_bits
    return f"in {_name(dtype)}" if bits is None else f"its linear layers in {bits:.3g} bits, the rest in {_name(dtype)}"


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
    _print_training(t, planned.trains_with)
    _print_serving(s, planned.adapter, planned.serves_with)


def _print_training(t: RanksPlan, would_fit: Sequence[str]) -> None:
    from trimtab.cli.tables import print_table
    from trimtab.cli.terminal import say

    where = f"on each of {t.ranks} ranks" if t.ranks > 1 else "on one device"
    say(f"\ntraining, {where}: forwards of at most {t.forward_tokens:,} tokens, rows of at most {t.longest:,}", bold=True)
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
    if not _trains(t):
        _print_fitting(would_fit)
    if t.hours is not None:
        say(f"{t.tokens:,} tokens in {t.steps:,} steps, {t.flops:.3g} FLOPs in all")
    if t.ranks > 1:
        gathered = f"; sharded, each receives {t.gathered_bytes / 1e9:,.3g} GB of the base a forward and its backward"
        say(f"all-reduce: {t.all_reduce_bytes / 1e6:,.4g} MB of fp32 gradients a step{gathered}")
    _print_assumed(t.assumes)


def _print_serving(s: ReplicaPlan, adapter: str, would_fit: Sequence[str]) -> None:
    from trimtab.cli.tables import print_table
    from trimtab.cli.terminal import say

    say(f"\nserving, one server a device: sequences of {s.length:,} tokens, prompt and answer together", bold=True)
    if not s.fits:
        say(f"does not fit: base {_gb(s.base_bytes)}, work space {_gb(s.work_bytes)}, of {_gb(int(s.device.memory_bytes))}")
        _print_fitting(would_fit)
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


def _print_fitting(changes: Sequence[str]) -> None:
    from trimtab.cli.terminal import say

    if changes:
        say(f"would fit with one of: {'; '.join(changes)}")
    else:
        say("no single change would make it fit: a smaller base, shorter rows, or several of: quantize, a lower rank, fewer tokens a step")


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
