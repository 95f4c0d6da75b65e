"""What a run starts from: nothing, or the newest good checkpoint of the same run. Nothing on disk changes before all has been checked."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from trimtab.atomic import clear_unfinished, is_unfinished, take_name
from trimtab.bases import fingerprint_model
from trimtab.errors import ConfigError, DataError, writing_into
from trimtab.model import Base
from trimtab.objectives.grpo import Grpo
from trimtab.paths import user_path
from trimtab.rewards.asked import file_of
from trimtab.train.checkpoint import Checkpoint, Damaged, folder_of, newest_checkpoint, steps_of
from trimtab.train.clone import with_clones
from trimtab.train.config import RunConfig
from trimtab.train.control import CONTROL
from trimtab.train.hold import LOCK, Hold, Occupied, held
from trimtab.train.listen import Listener
from trimtab.train.past import PLAN
from trimtab.train.prepare import Prepared, Splits, read_splits

FREE = {"out", "root", "variants", "checkpoint_every", "keep_checkpoints", "track", "store", "activation_checkpointing", "shard"}
"""Keys of a run that a resumed one may change, since no number depends on them; variants are compared one by one."""
BEFORE = {"compile": False, "quantize": None}
"""What settings were that older checkpoints do not name, as there was no choice."""
UNSAID: Mapping[str, Any] = {
    "optimizer": "adamw",
    "neftune_noise_alpha": None,
    "init_lora_weights": True,
    "eva_config": {},
    "alora_invocation_tokens": None,
    "target_parameters": None,
    "target_experts": None,
    "distil_temperature": 1.0,
}
"""What settings of a variant are that older checkpoints do not name; they are left out where they are so."""
LEFT_OVER = ("adapters", "checkpoints", "metrics.jsonl", PLAN, CONTROL, LOCK, "tensorboard", "wandb")
"""What a run leaves that was interrupted before its first checkpoint."""


def settings(run: RunConfig) -> dict[str, Any]:
    """Every setting that decides what a run computes and writes: dotted key -> plain JSON value."""
    content: dict[str, Any] = run.model_dump(mode="json", exclude=FREE)
    content["variants"] = {
        v.name: {"data": v.data, "method": v.method.name, **v.method.to_dict(), **v.aim, **v.options.model_dump(mode="json"), "lr": v.lr}
        for v in run.variants
    }
    for settings_of in content["variants"].values():
        for key in [k for k, value in UNSAID.items() if k in settings_of and settings_of[k] == value]:
            del settings_of[key]
    # of several variants the order counts too: it is the order of rows in the joint batch, and sums of floats depend on it
    content["order of variants"] = [v.name for v in run.variants]
    for source in (s for d in content["data"].values() for split in ("train", "valid", "test") for s in d[split]):
        for key in [k for k in ("limit", "held", "held_out", "rows") if not source[k]]:
            del source[key]  # as in checkpoints from before there were these
        del source["max_dropped"]  # whether a run begins; its rows have their digest
    for data in content["data"].values():
        for key in ("split", "columns", "system", "max_dropped"):
            del data[key]  # its sources have it
    found: dict[str, Any] = {}
    for key, value in _flat(json.loads(json.dumps(content)), ""):
        while key in found:  # names hold dots: the field r of a variant v.rank_pattern, and the key r of v's rank_pattern
            key += "'"
        found[key] = value
    return found


def identity(prepared: Prepared, fingerprint: str) -> dict[str, Any]:
    """What must be equal for a run to go on: its settings, and what it computes with. fingerprint: of the base as it is loaded. `clones`,
    where there are some: what makes the run of its run file."""
    base = prepared.base
    content = {"base": fingerprint, "dtype": str(base.dtype).removeprefix("torch."), "device": base.device.type}
    for name, splits in prepared.data.items():
        for split in ("train", "valid", "test"):
            if (dataset := getattr(splits, split)) is not None:
                content[f"data.{name}.{split}"] = dataset.digest
    content |= {f"teacher.{v.name}": v.reference.source for v in prepared.variants if v.reference and v.reference.source}
    for v in prepared.variants:
        if isinstance(v.config.objective, Grpo):
            files = {r.reward: file for r in v.config.objective.rewards if (file := file_of(r, prepared.run.root)) is not None}
            content |= {f"reward.{v.name}.{name}": hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    clones = {"clones": prepared.clones} if prepared.clones else {}
    return {"settings": settings(prepared.run), "content": content} | clones


def refuse_other_content(run: RunConfig, base: Base, then: Mapping[str, Any], what: str, listener: Listener) -> None:
    """ConfigError where a finished run was trained on another base, or on other rows than its sources hold now. then: what its folder says.

    Rows that cannot be read any more are only warned of: what they have taught is there all the same.
    """
    data, then = dict[str, Splits](), {k: v for k, v in then.items() if k != "device" and not k.startswith(("teacher.", "reward."))}
    for name in dict.fromkeys(v.data for v in run.variants):
        try:
            data[name] = read_splits(run, name, run.data[name], base)
        except DataError as e:
            listener.warning(f"whether data.{name} is still what was trained on cannot be told: {e.message}")
            then = {k: v for k, v in then.items() if k not in {f"data.{name}.{split}" for split in ("train", "valid", "test")}}
    now = identity(Prepared(run, base, data, []), fingerprint_model(base.model))["content"]
    refuse_changes(then, {k: v for k, v in now.items() if k != "device"}, what)


def _lengths(run: RunConfig) -> dict[str, Any]:
    """The settings that say how long a run is, by their keys in `settings`."""
    return {f"variants.{v.name}.{key}": getattr(v.options, key) for v in run.variants for key in ("epochs", "max_steps")}


def is_longer(run: RunConfig) -> bool:
    """Whether the run file asks a finished run for other epochs or steps than it had."""
    then = json.loads((run.out / "summary.json").read_text(encoding="utf-8")).get("settings", {})
    return any(then.get(key) != value for key, value in _lengths(run).items())


def refuse_shorter(start: Checkpoint, prepared: Prepared) -> None:
    """ConfigError where variants are asked for fewer steps than they have made."""
    done = {v.name: int(start.variants[v.name]["progress"]["step"]) for v in prepared.variants}
    short = [
        f"variants.{v.name}: {v.total_steps} steps are asked for, {n} are done"
        for v in prepared.variants
        if (n := done[v.name]) > v.total_steps
    ]
    if short:
        raise ConfigError("a run can be extended, not cut", problems=short, fix="ask for more epochs or steps, or start a run of its own")


def find_start(run: RunConfig, resume: bool, extend: bool = False) -> Checkpoint | None:
    """The checkpoint that the run goes on from, or None where it starts anew. extend: epochs and steps may differ from those before.

    ConfigError where `out` holds something else, where no checkpoint verifies, or where the run file has changed since.
    """
    out = run.out
    refuse_no_folder(out)
    names = sorted(p.name for p in out.iterdir()) if out.exists() else []
    if names and not resume:
        going = ", or go on with it: --resume (from Python resume=True)" if steps_of(out) else ""
        raise ConfigError(
            f"out = {str(out)!r} is not empty: a run never overwrites another",
            fix=f"name another folder in `out`, or remove this one{going}",
        )
    try:
        found = newest_checkpoint(out)
    except Damaged as reasons:
        fix = f"put a good copy into {folder_of(out)}, or start anew with another `out`"
        raise ConfigError(f"no checkpoint in {folder_of(out)} verifies", problems=str(reasons).splitlines(), fix=fix) from None
    if found is not None:
        run = with_clones(run, found.identity.get("clones", {}))
        free = _lengths(run) if extend else {}
        then, now = ({k: v for k, v in s.items() if k not in free} for s in (found.identity["settings"], settings(run)))
        refuse_changes(then, now, "the run file has changed since its checkpoint")
        return found
    others = [n for n in names if n not in LEFT_OVER and not is_unfinished(n)]
    others += [f"adapters/{p.name}" for p in (out / "adapters").glob("*") if not is_unfinished(p.name)]
    if others:
        raise ConfigError(
            f"there is no checkpoint in {str(out)!r} to resume from, and it holds {', '.join(others[:5])}, which a new run would overwrite",
            fix="name another folder in `out`, or remove this one",
        )
    return None


def refuse_no_folder(out: Path) -> None:
    """ConfigError where `out` cannot be made a folder that can be written."""
    user_path(out, ConfigError, "out")
    there = next(p for p in (out, *out.absolute().parents) if os.path.lexists(p))
    if not there.is_dir():
        what = f"out = {str(out)!r}" if there == out else f"out = {str(out)!r}: {there}"
        raise ConfigError(f"{what} is not a folder", fix="name a folder in `out`, one that is not there yet or is empty")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write into out = {str(out)!r}: {there} may not be written", fix="name a folder that can be written")


def refuse_changes(then: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    """ConfigError that lists every key whose value differs, the old and the new one."""
    then = {k: v for k, v in BEFORE.items() if k in now} | {**then}
    keys = [k for k in dict.fromkeys([*then, *now]) if then.get(k) != now.get(k) or (k in then) != (k in now)]
    if keys:
        problems = [f"{k}: was {then[k]!r}" if k not in now else f"{k}: was {then.get(k)!r}, is {now[k]!r}" for k in keys]
        raise ConfigError(what, problems=problems, fix=_fix(keys))


def _fix(keys: Sequence[str]) -> str:
    more = ", or train on with --extend" if all(k.endswith((".epochs", ".max_steps")) for k in keys) else ""
    return f"undo the change (values of --set must be given again){more}, or start a run of its own with another `out`"


@contextmanager
def occupied(out: Path, start: Checkpoint | None, warn: Callable[[str], None]) -> Iterator[Hold]:
    """The run folder, made and held for this process alone; what a killed one has left half-written is gone, damaged checkpoints are set
    aside under another name. ConfigError where another process holds it or it cannot be written. warn: see `held`."""
    with ExitStack() as entered:
        with writing_into(out):
            (out / "adapters").mkdir(parents=True, exist_ok=True)
            hold = entered.enter_context(held(out, warn))
        if steps_of(out)[:1] != ([*start.rejected, start.path][:1] if start else []):
            raise Occupied(f"another process has just trained into out = {str(out)!r}", fix="resume once more")
        for path in start.rejected if start else ():
            take_name(path, path.with_name(f"damaged-{path.name}-{os.urandom(4).hex()}"))
        for folder in (out, out / "adapters", folder_of(out)):
            clear_unfinished(folder)
        yield hold


def _flat(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner
