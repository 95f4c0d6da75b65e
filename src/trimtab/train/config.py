"""Reading a run file: every mistake in it, and every data file that cannot be read, in one error.

Every unknown key is refused with what to write instead. Paths in a run file are relative to the file's own folder.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import PrivateAttr, ValidationError

from trimtab.data import has_bleu, peek_source, sources_in
from trimtab.data.sources import KEYS as SOURCE_KEYS
from trimtab.data.sources import Source, holds_rows
from trimtab.errors import AdapterError, ConfigError, DataError, TrimtabError, nearest
from trimtab.foreign import method_answer
from trimtab.methods import BY_NAME, Method
from trimtab.methods.targets import as_list, listed
from trimtab.objectives import OBJECTIVES, Objective, Sft, directions
from trimtab.paths import is_url, user_path
from trimtab.train.changes import with_changes
from trimtab.train.optimizers import WITHOUT_ADAM
from trimtab.train.options import FASTEST, VALIDATION, DataConfig, EvalOptions, RunOptions, TrainOptions, VariantConfig
from trimtab.train.runfile import explain, read_yaml, shown, unknown_keys

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
WITHOUT_MATRICES = ("ia3", "prompt", "prefix")
"""Methods whose tensors are vectors of modules, or what stands before token 0."""


class RunConfig(RunOptions):
    """A whole run. `RunConfig.load(path)` reads a run file, `RunConfig.from_dict` a mapping of the same shape."""

    _url: str | None = PrivateAttr(default=None)

    @property
    def url(self) -> str | None:
        """Where the run is, if that is no folder of this machine; `out` is its working copy then (`train.mirror`)."""
        return self._url

    def writing_to(self, out: str | Path) -> Self:
        """The same with another `out`: a folder, or a URL."""
        found = self.model_copy(update={"out": _working_copy(str(out)) if is_url(out) else Path(out)})
        found._url = str(out) if is_url(out) else None
        return found

    @classmethod
    def of(cls, run: RunConfig | Mapping[str, Any] | str | Path) -> RunConfig:
        """A run as callers name it: itself, a run file's path, or a mapping of a run file's shape."""
        if isinstance(run, str | Path):
            return cls.load(run)
        return run if isinstance(run, RunConfig) else cls.from_dict(run)

    @classmethod
    def load(cls, path: str | Path, changes: Sequence[str] = (), absent: Mapping[str, Any] | None = None) -> RunConfig:
        """Read a run file. changes: values that replace the file's, each "key.key=value". absent: of keys that the file does not have.
        ConfigError that lists all that is wrong."""
        path = Path(path)
        content = with_changes(read_yaml(path, "run file"), changes, str(path))
        return cls.from_dict(completed(content, absent or {}), root=path.parent, where=str(path))

    @classmethod
    def from_dict(cls, content: Any, *, root: str | Path = Path(), where: str = "run") -> RunConfig:
        """Build from a mapping of a run file's shape; relative paths are taken from `root`.

        ConfigError that lists everything that is wrong with it, and with it the data files that cannot be read. A mapping that is right is
        not compared with the file system: `before.mistakes` does that.
        """
        if not isinstance(content, Mapping):
            raise ConfigError(
                f"{where}: expected a mapping with the keys base, out, data, variants, found {type(content).__name__}",
                fix="give a run file's path, or a mapping as docs/run-file.md shows; rows stand in files that `data` names",
            )
        if "sweep" in content:
            raise ConfigError(f"{where} is a sweep file: it has `sweep`", fix="run it with `trimtab sweep`")
        root = Path(root)
        problems: list[str] = []
        fields = dict(content)
        known = [*(n for n in cls.model_fields if n != "root"), "defaults"]
        problems += unknown_keys(fields, known, "", HOMES)
        if isinstance(scoring := fields.get("evaluate"), Mapping):
            problems += unknown_keys(scoring, EvalOptions.model_fields, "evaluate", HOMES)
            fields["evaluate"] = {k: v for k, v in scoring.items() if k in EvalOptions.model_fields}
        defaults = _defaults(fields.pop("defaults", None), problems)
        fields["data"] = named_data(fields.get("data"))
        data = {name: _data(name, value, problems) for name, value in _mapping(fields, "data", problems)}
        variants = [_variant(name, value, defaults, data, problems) for name, value in _mapping(fields, "variants", problems)]
        rest = {k: v for k, v in fields.items() if k in known and k not in ("data", "variants")}
        whole = {n: d for n, d in data.items() if d is not None}
        try:
            run = cls(**_rooted(rest, root, problems), data=whole, variants=[v for v in variants if v is not None], root=root)
            if not problems:
                run._url = str(fields["out"]) if is_url(fields.get("out")) else None
                return run
        except ValidationError as e:
            problems += explain(e, "")
        made = [v for v in variants if v is not None]
        errors = [error for name, config in whole.items() for error in unreadable(name, config, root, made)]
        raise ConfigError(f"{where} cannot be run", problems=[*problems, *(line for e in errors for line in e.among_others())])


def completed(content: Any, absent: Mapping[str, Any]) -> Any:
    """A run file's mapping with the values of keys that it does not have."""
    return {**{k: v for k, v in absent.items() if v is not None}, **content} if isinstance(content, Mapping) else content


def unreadable(name: str, data: DataConfig, root: Path, variants: Sequence[VariantConfig]) -> list[TrimtabError]:
    """What is wrong with the files of a data set: missing, empty, of an unknown kind, or without the columns that rows need. variants: the
    run's, whose objectives say which columns those are."""
    found: list[TrimtabError] = []
    parts = next((v.objective.parts for v in variants if v.data == name), Objective.parts)
    for split, sources in data.splits.items():
        for source in sources:
            try:
                peek_source(source, root, parts)
            except DataError as e:
                found.append(DataError(f"data.{name}.{split}: {e.message}", problems=e.problems, fix=e.fix))
    return found


def refuse_idle_ranks(run: RunConfig, ranks: int, rows: Mapping[str, int] | None = None) -> None:
    """ConfigError where there are more ranks than rows in a step of all variants, so that some would have nothing to do. rows: of an epoch
    of each variant; None where they are not known yet: then no step has more than it is said to have."""
    whole = [v.options.rows_of_step(v.options.batch_size if rows is None else rows[v.name]) for v in run.variants]
    most = sum(n * max(1, v.objective.answers) for n, v in zip(whole, run.variants, strict=True))
    if ranks > most:
        fix = f"start at most {most} ranks, or raise batch_size or gradient_accumulation_steps"
        raise ConfigError(f"{ranks} ranks share the rows of a step, and a step of this run has {most}", fix=fix)


_VARIANT = "in a variant, or under `defaults`"
HOMES = {
    **{name: "in a variant" for cls in BY_NAME.values() for name in (f.name for f in dataclasses.fields(cls))},
    **dict.fromkeys(("method", "objective", "data"), "in a variant"),
    **dict.fromkeys(TrainOptions.model_fields, _VARIANT),
    **dict.fromkeys(EvalOptions.model_fields, "under `evaluate`"),
    **dict.fromkeys(DataConfig.model_fields, "in a data set, under `data`"),
    **dict.fromkeys(SOURCE_KEYS, "in a source of a data set"),
    **dict.fromkeys((n for n in (*RunConfig.model_fields, "defaults") if n not in ("root", "data", "seed")), "at the top of the run file"),
}
"""Where each key of a run file stands."""


def _mapping(fields: dict[str, Any], key: str, problems: list[str]) -> list[tuple[str, Any]]:
    value = fields.get(key)
    if not isinstance(value, Mapping) or not value:
        problems.append(f"{key}: expected a mapping with at least one entry, found {shown(value)}")
        return []
    bad = [n for n in value if not isinstance(n, str) or not NAME.fullmatch(n)]
    problems += [f"{key}: {shown(n)} is not a name: lower-case letters, digits, '.', '_' and '-', at most 63" for n in bad]
    return [(n, v) for n, v in value.items() if n not in bad]


ONLY = "data"
"""The name of the data set of a run that has one and gives it no name."""


def named_data(data: Any) -> Any:
    """The data sets by name, where `data` is rows, or the splits of one data set."""
    if holds_rows(data):
        return {ONLY: {"train": data}}
    if isinstance(data, Mapping) and "train" in data and not (isinstance(data["train"], Mapping) and "train" in data["train"]):
        return {ONLY: data}
    return data


def _data(name: str, value: Any, problems: list[str]) -> DataConfig | None:
    where = f"data.{name}"
    if holds_rows(value):
        value = {"train": value}
    if not isinstance(value, Mapping):
        problems.append(f"{where}: expected a mapping with train, valid, test, found {shown(value)}")
        return None
    problems += unknown_keys(value, DataConfig.model_fields, where, HOMES)
    splits: dict[str, list[Source]] = {}
    for split in ("train", "valid", "test"):
        given = value.get(split)
        if given is not None and not (isinstance(given, str | list | Mapping) and not given):
            splits[split], found = sources_in(given, f"{where}.{split}")
            problems += found
    if "train" not in splits:
        problems.append(f"{where}: 'train' is missing")
    try:
        shared = {k: value[k] for k in ("columns", "system", "labels", "split", "max_dropped") if value.get(k) is not None}
        return DataConfig(**{"train": [], **splits}, **shared)
    except ValidationError as e:
        problems += explain(e, where)
        return DataConfig(**{n: [dataclasses.replace(s, held=0) for s in sources] for n, sources in {"train": [], **splits}.items()})


def _options(fields: Mapping[str, Any], where: str, problems: list[str]) -> dict[str, Any]:
    """Those of `fields` that are training options of a right value; the others become findings."""
    own = {k: v for k, v in fields.items() if k in TrainOptions.model_fields}
    try:
        TrainOptions(**own)
        return own
    except ValidationError as e:
        problems += explain(e, where)
        wrong = {err["loc"][0] for err in e.errors() if err["loc"]}
        return {k: v for k, v in own.items() if k not in wrong}


def _defaults(value: Any, problems: list[str]) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        problems.append(f"defaults: expected a mapping, found {shown(value)}")
        return {}
    problems += unknown_keys(value, TrainOptions.model_fields, "defaults", HOMES)
    return _options(value, "defaults", problems)


def _variant(name: str, value: Any, defaults: Mapping[str, Any], data: Mapping[str, Any], problems: list[str]) -> VariantConfig | None:
    where = f"variants.{name}"
    if isinstance(value, Method):
        value = {"method": value}
    if isinstance(value, Mapping) and isinstance(method := value.get("method"), Method):
        value = {**method.to_dict(), **value, "method": method.name}
    if not isinstance(value, Mapping):
        problems.append(f"{where}: expected a mapping, found {shown(value)}")
        return None
    if name == "base":
        problems.append(f"{where}: 'base' stands for the base among the scores: name the variant otherwise")
    fields = dict(value)
    source = fields.pop("data", next(iter(data)) if len(data) == 1 else None)
    if not isinstance(source, str) or source not in data:
        problems.append(f"{where}.data = {shown(source)}{nearest(str(source), data)}: one of {', '.join(data)}")
        source = ""
    objective = _objective(where, fields, problems)
    method = _method(where, fields, [type(objective)] if objective else OBJECTIVES.values(), problems)
    own = _options(fields, where, problems)
    judged_by = {"valid_metric": objective.judged_by} if objective else {}
    options = TrainOptions(**{**judged_by, **defaults, **own})
    problems += [f"{where}.{p}" for p in _misfits(options, fields, method, data.get(source), source)]
    if method is None or objective is None:
        return None
    no_loss = {"loss"} if objective.sampled_at is None else set()
    if options.valid_metric in directions().keys() - objective.metrics.keys() - no_loss:
        has = ", ".join(objective.metrics) or "none of its own"
        problems.append(f"{where}.valid_metric = {options.valid_metric!r}: no metric of objective {objective.name}, which has {has}")
    if objective.reads_head and method.name == "full":
        problems.append(f"{where}.objective = {objective.name!r}: a head is a part of an adapter, and method full has none")
        return None
    config = VariantConfig(name=name, data=source, method=method, options=options, objective=objective)
    problems += [f"{where}.{p}" for p in _too_fast(config)]
    return config


def _too_fast(config: VariantConfig) -> list[str]:
    """Rates at which no optimizer settles, and tensors may end as no numbers at all."""
    options, found = config.options, []
    ratio = options.loraplus_lr_ratio or 1.0
    if config.lr * ratio >= FASTEST:
        found.append(f"loraplus_lr_ratio = {ratio:g}: the B matrices' rate would be {config.lr * ratio:g}; at most {FASTEST:g}")
    elif config.lr * ratio * options.weight_decay > 2:
        found.append(
            f"weight_decay = {options.weight_decay:g}: times the rate of {config.lr * ratio:g} it is above 2, so each step would make the "
            "tensors larger"
        )
    return found


def variant_from(name: str, value: Mapping[str, Any], options: Mapping[str, Any], data: Mapping[str, DataConfig | None]) -> VariantConfig:
    """A variant of its own: its mapping as in a run file, and options for what that does not say. data: those that it may train on; None:
    nothing is known of one but its name. ConfigError that lists all that is wrong."""
    problems = [] if NAME.fullmatch(name) else [f"{shown(name)} is not a name: lower-case letters, digits, '.', '_' and '-', at most 63"]
    made = _variant(name, value, options, data, problems)
    if problems or made is None:
        raise ConfigError(f"{shown(name)} cannot be made", problems=problems, fix="correct these settings")
    return made


def _objective(where: str, fields: Mapping[str, Any], problems: list[str]) -> Objective | None:
    """The objective of a variant; what is wrong with its name and the values of its fields."""
    name = fields.get("objective", Sft.name)
    if not isinstance(name, str) or name not in OBJECTIVES:
        problems.append(f"{where}.objective = {shown(name)}{nearest(str(name), OBJECTIVES)}: one of {', '.join(OBJECTIVES)}")
        return None
    cls = OBJECTIVES[name]
    try:
        return cls(**{k: v for k, v in fields.items() if k in (f.name for f in dataclasses.fields(cls))})
    except ConfigError as e:
        problems += [f"{where}.{p}" for p in e.problems]
        return cls.some()


def _method(where: str, fields: Mapping[str, Any], objectives: Iterable[type[Objective]], problems: list[str]) -> Method | None:
    """The method of a variant; what is wrong with its name and fields, and the variant's keys that are neither these, nor options, nor
    fields of the objectives."""
    aims = [f.name for o in objectives for f in dataclasses.fields(o)]
    name, keys = fields.get("method"), [*TrainOptions.model_fields, "data", "method", "objective", *aims]
    every = {f.name: cls.name for cls in BY_NAME.values() for f in dataclasses.fields(cls)}
    if not isinstance(name, str) or name not in BY_NAME:
        problems.append(f"{where}.method = {shown(name)}{method_answer(name, BY_NAME)}: one of {', '.join(BY_NAME)}")
        if str(name).lower() not in BY_NAME:
            problems += unknown_keys(fields, [*every, *keys], where, HOMES)
            return None
    cls = BY_NAME[str(name).lower()]
    hyper = [f.name for f in dataclasses.fields(cls)]
    elsewhere = {f: f"to method {owner}, this is {cls.name}" for f, owner in every.items()}
    problems += unknown_keys(fields, [*hyper, *keys], where, HOMES | elsewhere)
    lists = {k: v for k in ("target_modules", "exclude_modules") if isinstance(v := fields.get(k), str) and listed(v)}
    problems += [f"{where}.{k} = {v!r} is one string; {as_list(listed(v) or [])}" for k, v in lists.items()]
    try:
        return cls(**{k: v for k, v in fields.items() if k in hyper})
    except ConfigError as e:
        problems += [f"{where}.{p}" for p in e.problems]
        return None


def _misfits(options: TrainOptions, own: Mapping[str, Any], method: Method | None, data: DataConfig | None, source: str) -> list[str]:
    """Options that would do nothing, or cannot be done. own: what the variant says itself; `defaults` may speak to others."""
    found = []
    if options.loraplus_lr_ratio is not None and method is not None and method.name != "lora":
        found.append(f"loraplus_lr_ratio = {options.loraplus_lr_ratio}: LoRA+ needs method lora, this is {method.name}")
    if options.optimizer == "muon" and method is not None and method.name in WITHOUT_MATRICES:
        found.append(f"optimizer = 'muon': {method.name} has no matrices of modules, which is what Muon steps; AdamW would do all")
    if options.optimizer == "muon" and getattr(method, "target_parameters", None):
        found.append("optimizer = 'muon': target_parameters keep the matrices of all experts in one tensor, which Muon would step as one")
    if options.optimizer == "sgd" and options.lr is None:
        found.append("optimizer = 'sgd': the presets are for optimizers that scale their steps: write lr")
    if options.optimizer in WITHOUT_ADAM:
        found += [f"{k}: {options.optimizer} has no such rate: take it away" for k in ADAM if k in own]
    if data is not None and not data.valid:
        found += [f"{k}: data.{source} has no valid rows: add `valid` to it" for k in VALIDATION if k in own]
    elif data is not None and options.valid_metric == "label_accuracy" and data.labels is None:
        found.append(f"valid_metric = 'label_accuracy': data.{source} has no labels: add `labels: auto`, or a list")
    if options.valid_metric == "bleu" and not has_bleu():
        found.append("valid_metric = 'bleu': needs the package sacrebleu: pip install 'trimtab[eval]'")
    return found


def _rooted(fields: dict[str, Any], root: Path, problems: list[str]) -> dict[str, Any]:
    out = fields.get("out")
    if not isinstance(out, str | Path):
        return fields
    if is_url(out):
        try:
            return fields | {"out": _working_copy(str(out))}
        except ConfigError as e:
            problems += e.among_others()
            return fields | {"out": Path(out)}
    try:
        return fields | {"out": user_path(out, ConfigError, "out", root)}
    except ConfigError as e:
        problems += e.among_others()
        return fields | {"out": Path(out)}


def _working_copy(url: str) -> Path:
    """The folder of this machine for an `out` that is a URL. ConfigError where the URL names no folder."""
    from trimtab.store.remotes.snapshot import working_copy

    try:
        return working_copy(url)
    except AdapterError as e:
        raise ConfigError(f"out = {e.message}", problems=e.problems, fix=e.fix) from e
