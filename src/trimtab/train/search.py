"""What stands under `sweep` in a sweep file: the template of the trials, what is searched, and how.

    sweep:
      variant: {data: support, method: lora, r: 16}   # what all trials share: keys of a variant
      search: {lr: [3.0e-4, 1.0e-3], r: [8, 16]}      # lists; for kind random also {min: 1.0e-4, max: 1.0e-2, log: true}
      halving: {keep: 0.5, every: 20}                 # optional

Everything else in the file is as in a run file, `variants` excepted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimtab.errors import ConfigError, nearest
from trimtab.foreign import method_answer
from trimtab.hyperparameters import Hyperparameters
from trimtab.methods import BY_NAME, Method
from trimtab.objectives import OBJECTIVES, Objective, Sft
from trimtab.train.config import HOMES
from trimtab.train.halving import Halving
from trimtab.train.options import Metric, TrainOptions
from trimtab.train.runfile import explain, shown, unknown_keys

MAX_TRIALS = 512
FIXED = {
    "data": "trials are compared on one data set",
    "max_length": "it decides which rows are held out, and trials are compared on the same ones",
    "last_turn_only": "it decides how a data set is read, which a run does once",
    "valid_metric": "trials are compared by one metric: name it in sweep.metric",
    "objective": "losses of different objectives do not compare",
}
"""Keys of a variant that cannot be searched, and why."""


class SweepOptions(BaseModel):
    """What stands under `sweep`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    variant: dict[str, Any] = Field(description="what all trials share: keys of a variant in a run file")
    search: dict[str, Any] = Field(min_length=1, description="field -> list of values, or {min, max, log} to draw from")
    kind: Literal["grid", "random"] = Field("grid", description="all combinations, or `trials` draws")
    trials: int | None = Field(None, ge=1, le=MAX_TRIALS, description="of a random search")
    seed: int | None = Field(None, ge=0, description="of a random search's draws; None: the run's")
    metric: Metric = Field("loss", description="what trials are ranked by, measured on the valid rows")
    halving: Halving | None = Field(None, description="stop the worst trials at rungs; None: all train to their end")
    memory_gb: float | None = Field(None, gt=0, description="trials train together in groups whose estimate fits this; None: in one")


def read_options(content: Mapping[str, Any], where: str) -> SweepOptions:
    """What a sweep file's `sweep` says. ConfigError that lists everything that is wrong with it, whatever the values of its fields."""
    said = content["sweep"]
    if not isinstance(said, Mapping):
        raise ConfigError(f"{where}: sweep: expected a mapping with variant and search, found {shown(said)}")
    problems = unknown_keys(said, SweepOptions.model_fields, "sweep", HOMES)
    try:
        options = SweepOptions(**{k: v for k, v in said.items() if k in SweepOptions.model_fields})
    except ValidationError as e:
        raise ConfigError(f"{where} cannot be swept", problems=problems + explain(e, "sweep")) from None
    problems += [*_template(options, content), *_draws(options)]
    if problems:
        raise ConfigError(f"{where} cannot be swept", problems=problems)
    return options


def _template(options: SweepOptions, content: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the fields that trials share and that are searched, whatever their values."""
    methods, unknown = methods_of(options), [m for m in _asked(options) if not isinstance(m, str) or m not in BY_NAME]
    yield from (f"sweep: there is no method {shown(m)}{method_answer(m, BY_NAME)}: one of {', '.join(BY_NAME)}" for m in unknown)
    known = ["data", "method", "objective", *TrainOptions.model_fields]
    known += [f for owner in [*methods, *objectives_of(options)] for f in hyperparameters(owner)]
    if not unknown:
        yield from unknown_keys(options.variant, known, "sweep.variant", HOMES)
        yield from unknown_keys(options.search, known, "sweep.search", HOMES)
    if "method" not in options.variant and "method" not in options.search:
        yield "sweep.variant: 'method' is missing, and it is not searched"
    if isinstance(options.search.get("method"), Mapping):
        yield "sweep.search.method: expected a list of methods"
    yield from (f"sweep.search.{k}: cannot be searched: {FIXED[k]}" for k in options.search if k in FIXED)
    found, data = content.get("data"), options.variant.get("data")
    found = found if isinstance(found, Mapping) else {}
    if data not in found:
        yield f"sweep.variant.data = {data!r}{nearest(str(data), found)}: one of {', '.join(map(str, found)) or 'none'}"
    elif not isinstance(found[data], Mapping) or not (found[data].get("valid") or _holds_out(found[data])):
        yield f"data.{data} has no valid rows, by which trials are ranked: add `valid` or `split` to it"
    defaults = content.get("defaults")
    said = {"sweep.variant": options.variant, "sweep.search": options.search, "defaults": defaults if isinstance(defaults, Mapping) else {}}
    for where, keys in said.items():
        if "valid_metric" in keys and where != "sweep.search":
            yield f"{where}.valid_metric: {FIXED['valid_metric']}"
        if options.halving and "eval_every" in keys:
            yield f"{where}.eval_every: with halving, validation comes every sweep.halving.every = {options.halving.every} steps"


def _holds_out(data: Mapping[str, Any]) -> bool:
    """Whether a data set or one of its training sources holds out valid rows."""
    train = data.get("train")
    sources = [data, *(train if isinstance(train, list | tuple) else [train])]
    return any(isinstance(s, Mapping) and isinstance(s.get("split"), int | float) for s in sources)


def _draws(options: SweepOptions) -> Iterator[str]:
    """What is wrong with the values to try, whatever their fields."""
    grid = options.kind == "grid"
    for field, values in options.search.items():
        where = f"sweep.search.{field}"
        if isinstance(values, Mapping):
            yield from [f"{where}: a range is drawn from by kind: random; a grid needs a list"] if grid else _range(where, values)
        elif not isinstance(values, list) or not values:
            yield f"{where}: expected a list of values{'' if grid else ', or {min, max, log}'}, found {values!r}"
    if grid and options.trials is not None:
        yield "sweep.trials: a grid tries all combinations; kind: random takes `trials`"
    if grid and options.seed is not None:
        yield "sweep.seed: a grid draws nothing; the seed of training stands in `seed` or in a variant"
    if not grid and options.trials is None:
        yield "sweep.trials is missing: how many a random search draws"
    size = math.prod(len(v) for v in options.search.values() if isinstance(v, list))
    if grid and size > MAX_TRIALS:
        yield f"sweep.search has {size:,} combinations, a sweep takes {MAX_TRIALS}: shorten the lists, or use kind: random"


def _range(where: str, said: Mapping[str, Any]) -> Iterator[str]:
    yield from unknown_keys(said, ("min", "max", "log"), where)
    ends = [said.get(k) for k in ("min", "max")]
    low, high = (x if isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) else None for x in ends)
    if low is None or high is None or low >= high:
        yield f"{where}: min and max must be numbers, min below max, found {ends[0]!r} and {ends[1]!r}"
    elif said.get("log") and low <= 0:
        yield f"{where}: log needs a min above 0, found {low!r}"
    if not isinstance(said.get("log", False), bool):
        yield f"{where}.log = {said['log']!r}: true or false"


def _asked(options: SweepOptions) -> list[Any]:
    """The methods of the trials, as the file names them."""
    found = options.search.get("method", [options.variant["method"]] if "method" in options.variant else [])
    return found if isinstance(found, list) else []


def methods_of(options: SweepOptions) -> list[type[Method]]:
    """The methods of the trials."""
    return [BY_NAME[m] for m in _asked(options) if isinstance(m, str) and m in BY_NAME]


def objectives_of(options: SweepOptions) -> list[type[Objective]]:
    """The objective of the trials; all where they name one that there is not."""
    name = str(options.variant.get("objective", Sft.name))
    return [OBJECTIVES[name]] if name in OBJECTIVES else list(OBJECTIVES.values())


def hyperparameters(owner: type[Hyperparameters]) -> list[str]:
    """The names of a method's or an objective's fields."""
    return [f.name for f in dataclasses.fields(owner)]
