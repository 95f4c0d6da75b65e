"""`trimtab.train`, `trimtab.check` and `trimtab.sweep`: runs whose rows and settings stand in a program, or in a file.

The arguments are the keys of a run file, with their defaults; `run_file.md` describes them.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from trimtab.cli.stopping import stopping
from trimtab.errors import ConfigError
from trimtab.methods import Method
from trimtab.model import Base, load_base
from trimtab.python import progress as shown
from trimtab.python.arguments import with_known_keywords
from trimtab.train.callbacks import Callback, Calling
from trimtab.train.check import check as check_run
from trimtab.train.checkpoint import steps_of
from trimtab.train.config import RunConfig, completed
from trimtab.train.findings import CheckReport
from trimtab.train.interrupt import Interrupted, Stop
from trimtab.train.listen import Listener
from trimtab.train.loop import Report
from trimtab.train.loop import train as run_training
from trimtab.train.sweep import SweepReport
from trimtab.train.sweep import sweep as run_sweep
from trimtab.train.trials import Sweep

Run: TypeAlias = RunConfig | Mapping[str, Any] | str | Path
KEYS: Mapping[str, Any] = {
    "data": None,
    "variants": None,
    "defaults": None,
    "evaluate": None,
    "seed": 0,
    "dtype": None,
    "device": None,
    "quantize": None,
    "shard": False,
    "max_tokens": 4096,
    "activation_checkpointing": False,
    "compile": False,
    "log_every": 1,
    "track": (),
    "checkpoint_every": 100,
    "keep_checkpoints": 2,
    "store": None,
}
"""Keys of a run file but base and out, and what they are where they are not given."""


@with_known_keywords
def train(
    run: Run | None = None,
    *,
    base: Base | Any | str | None = None,
    tokenizer: Any = None,
    data: Any = None,
    variants: Mapping[str, Mapping[str, Any] | Method] | None = None,
    out: str | Path | None = None,
    defaults: Mapping[str, Any] | None = None,
    evaluate: Mapping[str, Any] | None = None,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
    quantize: str | None = None,
    shard: bool = False,
    max_tokens: int = 4096,
    activation_checkpointing: bool = False,
    compile: bool = False,
    log_every: int = 1,
    track: Sequence[str] = (),
    checkpoint_every: int | float | None = 100,
    keep_checkpoints: int = 2,
    store: str | None = None,
    changes: Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
    progress: bool | None = None,
    listener: Listener | None = None,
    resume: bool = False,
    extend: bool = False,
    store_root: str | Path | None = None,
) -> Report:
    """Train every variant of a run together on one frozen base, score it, save it under `out`.

        trimtab.train(base="smollm2-135m-instruct", out="runs/support", data=rows, variants={"lora": {"method": "lora", "r": 16}})
        trimtab.train("run.yaml")

    run: a run file's path, a mapping of its shape, or a RunConfig. Without it the keys of a run file are arguments: base, out, data,
    variants and the others. Relative paths then start at the current folder.
    base: a name, a folder, a `Base`, or a causal language model of transformers with its `tokenizer`. Beside a run: in place of its own,
    which the run then need not name; the same holds for out.
    data: rows, or {"train": …, "valid": …, "test": …, "columns": …}, or several such data sets by name. Rows are a list of dicts, a
    generator, a pandas DataFrame, a `datasets.Dataset`, or the path of a file. They are read once, before anything else is done.
    variants: by name, a mapping of a variant's keys, or a method such as `trimtab.LoraConfig(r=16)`. Where there is one data set, a variant
    need not name it.
    changes: values that replace those of a run file, each "key.key=value". callbacks: told as the run goes. progress: show how far it is;
    None: in notebooks and terminals. listener: hears what callbacks and progress hear, and more. resume, extend: as of `trimtab train`.
    store: the namespace to publish to. store_root: the folder of that store.
    Ctrl-C, or interrupting the notebook's kernel, ends the run after the current step with a checkpoint (`Interrupted`); a second one ends
    it at once. TrimtabError where run, rows, base, store or disk are at fault.
    """
    keys = {k: v for k, v in locals().items() if k in KEYS}
    config = _config("train", run, base, out, keys, changes)
    loaded = _loaded(base, tokenizer, keys)
    stop = Stop()
    with shown.of(progress, listener) as inner, _interruptible(stop):
        told = Calling(inner, callbacks, stop)
        try:
            report = run_training(config, base=loaded, listener=told, resume=resume, extend=extend, stop=stop, store=store_root)
        except Interrupted:
            if told.error is not None:
                how = (
                    "with its checkpoint; resume=True goes on"
                    if steps_of(config.out)
                    else "before its first checkpoint; resume=True begins it again"
                )
                told.error.add_note(f"raised by a callback: the run in {config.out} has ended {how}")
                raise told.error from None
            raise
    for callback in callbacks:
        callback.on_end(report)
    return report


@with_known_keywords
def check(
    run: Run | None = None,
    *,
    base: str | None = None,
    data: Any = None,
    variants: Mapping[str, Mapping[str, Any] | Method] | None = None,
    out: str | Path | None = None,
    defaults: Mapping[str, Any] | None = None,
    evaluate: Mapping[str, Any] | None = None,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
    quantize: str | None = None,
    shard: bool = False,
    max_tokens: int = 4096,
    activation_checkpointing: bool = False,
    compile: bool = False,
    log_every: int = 1,
    track: Sequence[str] = (),
    checkpoint_every: int | float | None = 100,
    keep_checkpoints: int = 2,
    store: str | None = None,
    changes: Sequence[str] = (),
    rows: int = 2,
) -> CheckReport:
    """What a run would train on and what it would cost. Reads everything, loads no weights, writes nothing.

    The arguments are those of `train`; base is a name or a folder, as a model in memory is not read. rows: how many rows of each training
    source are rendered. The report has `errors`, `warnings`, `findings`, and `to_dict()`. TrimtabError where the run or the base cannot be
    read.
    """
    keys = {k: v for k, v in locals().items() if k in KEYS}
    return check_run(_config("check", run, base, out, keys, changes), rows=rows)


@with_known_keywords
def sweep(
    what: Sweep | Mapping[str, Any] | str | Path | None = None,
    *,
    base: Base | Any | str | None = None,
    tokenizer: Any = None,
    data: Any = None,
    sweep: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    defaults: Mapping[str, Any] | None = None,
    evaluate: Mapping[str, Any] | None = None,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
    quantize: str | None = None,
    shard: bool = False,
    max_tokens: int = 4096,
    activation_checkpointing: bool = False,
    compile: bool = False,
    log_every: int = 1,
    track: Sequence[str] = (),
    checkpoint_every: int | float | None = 100,
    keep_checkpoints: int = 2,
    changes: Sequence[str] = (),
    progress: bool | None = None,
    resume: bool = False,
) -> SweepReport:
    """Train all trials of a search together on one frozen base, rank them by their valid rows, score the best on the test rows.

        trimtab.sweep(base=…, out=…, data={"train": rows, "split": 0.1}, sweep={"variant": {"method": "lora"}, "search": {"r": [8, 16]}})

    what: a sweep file's path, a mapping of its shape, or a `Sweep`. sweep: what stands under this key of a sweep file. The other arguments
    are those of `train`.
    """
    keys = {k: v for k, v in locals().items() if k in KEYS}
    stop, found = Stop(), _sweep(what, sweep, base, out, keys, changes)
    loaded = _loaded(base, tokenizer, keys)
    if loaded is not None and loaded.path is None and not Path(loaded.name).is_file():
        found = replace(found, from_memory=True)
    with shown.of(progress, None) as listener, _interruptible(stop):
        return run_sweep(found, base=loaded, listener=listener, resume=resume, stop=stop)


def _config(name: str, run: Run | None, base: Any, out: str | Path | None, keys: Mapping[str, Any], changes: Sequence[str]) -> RunConfig:
    """The run that the arguments of a function mean. name: the function's."""
    if run is None:
        return RunConfig.from_dict(_content(base, out, keys, changes), where=f"trimtab.{name}")
    _refuse_both(name, keys, isinstance(run, str | Path), changes)
    absent = {"base": _name(base), "out": out}
    config = RunConfig.load(run, changes, absent) if isinstance(run, str | Path) else RunConfig.of(completed(run, absent))
    if isinstance(base, str | Path):
        config = config.model_copy(update={"base": str(base)})
    return config if out is None else config.writing_to(out)


def _sweep(what: Any, sweep: Any, base: Any, out: str | Path | None, keys: Mapping[str, Any], changes: Sequence[str]) -> Sweep:
    if what is None:
        return Sweep.from_dict(_content(base, out, keys, changes) | {"sweep": sweep}, where="trimtab.sweep")
    _refuse_both("sweep", {**keys, "sweep": sweep}, isinstance(what, str | Path), changes)
    absent = {"base": _name(base), "out": out}
    if isinstance(what, str | Path):
        found = Sweep.load(what, changes, absent)
    else:
        found = what if isinstance(what, Sweep) else Sweep.from_dict(completed(what, absent))
    if isinstance(base, str | Path):
        found = found.on(str(base))
    return found if out is None else found.into(Path(out))


def _given(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that were given. Rows are compared with nothing."""
    return {k: v for k, v in keys.items() if (v is not None if KEYS.get(k) is None else v != KEYS[k])}


def _content(base: Any, out: str | Path | None, keys: Mapping[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """The arguments as a run file's mapping. What was not given is left away, so that what is missing is said as of a file."""
    if changes:
        raise ConfigError("changes: of a run file, and there is none", fix="give the values as they are to be")
    content = _given(keys) | {"base": _name(base), "out": out}
    if "track" in content:
        content["track"] = list(content["track"])
    return {k: v for k, v in content.items() if v is not None} | ({"checkpoint_every": None} if keys["checkpoint_every"] is None else {})


def _refuse_both(name: str, keys: Mapping[str, Any], is_file: bool, changes: Sequence[str]) -> None:
    if both := list(_given(keys)):
        fix = 'change its values with changes=["seed=3"]' if is_file else "put them into it"
        raise ConfigError(f"trimtab.{name}: {', '.join(both)} given beside a run", fix=fix)
    if changes and not is_file:
        raise ConfigError("changes: of a run file, and a run was given", fix="put the values into it")


def _name(base: Any) -> str | None:
    """What a run calls its base."""
    from trimtab.model import IN_MEMORY

    if base is None or isinstance(base, str | Path):
        return None if base is None else str(base)
    return str(getattr(base, "name", None) or getattr(base, "name_or_path", None) or IN_MEMORY)


def _loaded(base: Any, tokenizer: Any, keys: Mapping[str, Any]) -> Base | None:
    """The base, where it is one or is made of a model."""
    if base is None or isinstance(base, str | Path):
        if tokenizer is not None:
            raise ConfigError("a tokenizer was given, and no loaded model", fix="give both: base=model, tokenizer=tokenizer")
        return None
    if given := [k for k in ("dtype", "device", "quantize") if keys[k] is not None]:
        raise ConfigError(f"{', '.join(given)}: of a base that is loaded by the run, and a loaded one was given", fix="load it so")
    if not isinstance(base, Base):
        return load_base(base, tokenizer=tokenizer)
    if tokenizer is not None:
        raise ConfigError("a tokenizer was given beside a Base, which has its own", fix="take it away")
    return base


@contextmanager
def _interruptible(stop: Stop) -> Iterator[None]:
    """Ctrl-C asks the run to end, where nobody else has a use for it."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours:
        yield
        return
    with stopping(stop, signals=(signal.SIGINT,)):
        yield
