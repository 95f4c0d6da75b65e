"""From a sweep file to its trials: a run whose variants are not written by hand but are the points of a search."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trimtab.data.sources import taken
from trimtab.errors import ConfigError
from trimtab.methods import BY_NAME
from trimtab.train.changes import with_changes
from trimtab.train.config import RunConfig, completed, named_data, unreadable
from trimtab.train.options import TrainOptions, VariantConfig
from trimtab.train.runfile import read_yaml
from trimtab.train.search import SweepOptions, hyperparameters, methods_of, objectives_of, read_options

DRAWS = 50
"""Times that a random search draws for each trial before it takes what it has found for all that there is."""
LONG_NAME = 14
"""Fields with longer names stand in a trial's name by their initials."""


@dataclass(frozen=True)
class Trial:
    """One point of the search. values: of the searched fields, where its method has them. fields: its whole entry as a variant."""

    name: str
    values: dict[str, Any]
    fields: dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """A sweep file, expanded. run: the run whose variants are the trials. content: the file, for the winner's own run file. left_out:
    combinations that were another one written otherwise. from_memory: the base is a model of the program, and nothing holds the same."""

    run: RunConfig
    options: SweepOptions
    trials: list[Trial]
    content: Mapping[str, Any]
    left_out: int
    from_memory: bool = False

    @classmethod
    def load(cls, path: str | Path, changes: Sequence[str] = (), absent: Mapping[str, Any] | None = None) -> Sweep:
        """Read a sweep file. changes, absent: as in `RunConfig.load`. ConfigError that lists everything wrong with it."""
        path = Path(path)
        content = with_changes(read_yaml(path, "sweep file"), changes, str(path))
        return cls.from_dict(completed(content, absent or {}), root=path.parent, where=str(path))

    @classmethod
    def from_dict(cls, content: Any, *, root: str | Path = Path(), where: str = "sweep") -> Sweep:
        """Build from a mapping of a sweep file's shape; relative paths are taken from `root`."""
        if not isinstance(content, Mapping) or "sweep" not in content:
            raise ConfigError(f"{where} has no `sweep`", fix="add it (see examples/sweep.yaml); a run file is trained with `trimtab train`")
        if "variants" in content:
            raise ConfigError(f"{where} has `variants` beside `sweep`", fix="remove them: sweep.search says what is tried")
        root, content = Path(root), _filled(content)
        try:
            options = read_options(content, where)
        except ConfigError as e:
            raise ConfigError(e.message, problems=[*e.problems, *_beside(content, root)], fix=e.fix) from None
        trials = list(_trials(options, content))
        run = _expand(content, trials, root, where)
        distinct: dict[str, tuple[Trial, VariantConfig]] = {}
        for trial, v in zip(trials, run.variants, strict=True):
            distinct.setdefault(_meaning(v), (trial, v))
        kept = list(distinct.values())
        run = run.model_copy(update={"variants": [v for _, v in kept]})
        return cls(run, options, [t for t, _ in kept], content, len(trials) - len(kept))

    def into(self, out: str | Path) -> Sweep:
        """The same, written elsewhere: into a folder, or under a URL."""
        return dataclasses.replace(self, run=self.run.writing_to(out), content={**self.content, "out": str(out)})

    def on(self, base: str) -> Sweep:
        """The same, on another base."""
        return dataclasses.replace(self, run=self.run.model_copy(update={"base": base}), content={**self.content, "base": base})

    def why_no_run_file(self, name: str) -> str | None:
        """Why no run file can train one trial alone; None where one can."""
        (v,) = (v for v in self.run.variants if v.name == name)
        what = ["its base"] if self.from_memory else []
        what += ["its rows"] if any(s.rows is not None for split in self.run.data[v.data].splits.values() for s in split) else []
        return f"{' and '.join(what)} stand in the memory of a program, where no file can name them" if what else None

    def run_file(self, name: str) -> str | None:
        """The run file, to stand where the sweep file stands, that trains one trial alone. None where there can be none."""
        if self.why_no_run_file(name):
            return None
        (trial,) = (t for t in self.trials if t.name == name)
        content = {k: v for k, v in self.content.items() if k not in ("sweep", "data")}
        data = str(trial.fields["data"])
        content |= {"out": f"{content['out']}-{name}", "data": {data: self.content["data"][data]}, "variants": {name: trial.fields}}
        plain = json.loads(json.dumps(content, default=str))  # what YAML knows no name for, and no two uses of one list
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=140, default_flow_style=None)


def _filled(content: Mapping[str, Any]) -> dict[str, Any]:
    """A sweep file with its rows read, its only data set named, and named in what all trials share."""
    content = {**content, "data": named_data(taken(content.get("data")))}
    data, said = content["data"], content["sweep"]
    if isinstance(data, Mapping) and len(data) == 1 and isinstance(said, Mapping) and isinstance(said.get("variant"), Mapping):
        content["sweep"] = {**said, "variant": {"data": next(iter(data)), **said["variant"]}}
    return content


def _trials(options: SweepOptions, content: Mapping[str, Any]) -> Iterator[Trial]:
    """Every combination once. A field that only another of the searched methods has is left out of a trial."""
    own = {f for m in methods_of(options) for f in hyperparameters(m)} - set(TrainOptions.model_fields)
    given: dict[str, Any] = {"valid_metric": options.metric} | ({"eval_every": options.halving.every} if options.halving else {})
    seen: set[str] = set()
    names: set[str] = set()
    for values in _grid(options) if options.kind == "grid" else _random(options, content):
        method = str(values.get("method", options.variant.get("method")))
        has = set(hyperparameters(BY_NAME[method]))
        values = {k: v for k, v in values.items() if k not in own or k in has}
        fields = {k: v for k, v in (options.variant | values).items() if k not in own or k in has} | given
        if (text := json.dumps(fields, sort_keys=True, default=str)) not in seen:
            seen.add(text)
            yield Trial(_name(values, names), values, fields)
        if len(seen) == options.trials:
            return


def _grid(options: SweepOptions) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*options.search.values()):
        yield dict(zip(options.search, values, strict=True))


def _random(options: SweepOptions, content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Draws without end but for one; the first n of them do not depend on how many are asked for."""
    seed = options.seed if options.seed is not None else content.get("seed", 0)
    generator = random.Random(str(seed))
    for _ in range(DRAWS * (options.trials or 0)):
        yield {field: _draw(generator, said, _whole(field, options)) for field, said in options.search.items()}


def _draw(generator: random.Random, said: Any, whole: bool) -> Any:
    """One of a list, or a number between min and max, evenly or in its logarithm; three digits are as many as a person would write."""
    if isinstance(said, list):
        return generator.choice(said)
    low, high = said["min"], said["max"]
    drawn = math.exp(generator.uniform(math.log(low), math.log(high))) if said.get("log") else generator.uniform(low, high)
    value = round(drawn) if whole else float(f"{drawn:.3g}")
    return min(max(value, low), high)


def _whole(field: str, options: SweepOptions) -> bool:
    """Whether whole numbers are drawn for a field: where it takes no others, or takes both and is searched between such."""
    if field in TrainOptions.model_fields:
        kinds, said = str(TrainOptions.model_fields[field].annotation), options.search[field]
        ends = said.values() if isinstance(said, Mapping) else ()
        return "float" not in kinds or ("int" in kinds and all(isinstance(x, int) for x in ends))
    owners = [*methods_of(options), *objectives_of(options)]
    return not any(f.name == field and "float" in str(f.type) for owner in owners for f in dataclasses.fields(owner))


def _name(values: Mapping[str, Any], taken: set[str]) -> str:
    """Short, readable, a valid variant's name, and no other trial's: "lr0.001-r8"."""
    parts = [_plain(v) if k == "method" else f"{k if len(k) <= LONG_NAME else _initials(k)}{_plain(v)}" for k, v in values.items()]
    stem = re.sub(r"[^a-z0-9._-]+", "-", "-".join(parts).lower()).strip("-")[:56] or "trial"
    name = next(n for n in itertools.chain([stem], (f"{stem}-{i}" for i in itertools.count(2))) if n not in taken)
    taken.add(name)
    return name


def _initials(field: str) -> str:
    return "".join(word[0] for word in field.split("_"))


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _expand(content: Mapping[str, Any], trials: Sequence[Trial], root: Path, where: str) -> RunConfig:
    """The run whose variants are the trials. ConfigError where it is none; what is wrong with several trials is said once."""
    rest = {k: v for k, v in content.items() if k != "sweep"}
    try:
        return RunConfig.from_dict(rest | {"variants": {t.name: t.fields for t in trials}}, root=root, where=where)
    except ConfigError as e:
        raise ConfigError(f"{where} cannot be swept", problems=by_trial(e.problems, [t.name for t in trials])) from None


def _beside(content: Mapping[str, Any], root: Path) -> list[str]:
    """What is wrong with the rest of a sweep file, where `sweep` itself cannot be read."""
    rest, data = {k: v for k, v in content.items() if k != "sweep"}, content.get("data")
    stand_in = {"data": next(iter(data), None) if isinstance(data, Mapping) else None, "method": "full"}
    try:
        run = RunConfig.from_dict(rest | {"variants": {"x": stand_in}}, root=root)
    except ConfigError as e:
        return [p for p in e.problems if not p.startswith("variants.x")]
    return [line for n, d in run.data.items() for error in unreadable(n, d, root, run.variants) for line in error.among_others()]


def by_trial(problems: Iterable[str], names: Sequence[str]) -> list[str]:
    """Findings on `variants.<trial>…`, each with all trials that it concerns."""
    concerned: dict[str, list[str]] = {}
    for problem in problems:
        of = [n for n in names if problem.startswith((f"variants.{n}.", f"variants.{n}:"))]
        name = max(of, key=len, default="")  # names hold dots
        concerned.setdefault(problem.removeprefix(f"variants.{name}").lstrip(".: ") if name else problem, []).append(name)
    return [
        text if who == [""] else f"every trial: {text}" if len(who) == len(names) else f"trial {', '.join(who)}: {text}"
        for text, who in concerned.items()
    ]


def _meaning(v: VariantConfig) -> str:
    """Equal for trials that would train the same."""
    return json.dumps([v.method.name, v.method.to_dict(), v.aim, v.options.model_dump() | {"lr": v.lr}], sort_keys=True, default=str)
