"""Checkpoints: everything that the rest of a run depends on, so that it continues bit-exactly after a kill, a full disk or a power cut.

    out/checkpoints/step-00000123/
      <variant>.safetensors      adapter, optimizer and best tensors, by `Variant.state`'s names
      state.json                 where the run stood, what run it is, each variant's progress and position in its rows
      manifest.json              sha256 and size of each file above; written last

A folder is written under another name, every file of it is fsynced, it gets its name, and its parent is fsynced. Only then are older ones
removed. So a folder with a step's name is a complete checkpoint, and later damage is found by its manifest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from trimtab.atomic import clear_unfinished, step_aside
from trimtab.bases.fingerprint import DTYPE_NAMES
from trimtab.store.staging import staged
from trimtab.train.report import Mark
from trimtab.train.variant import Progress, Variant

STATE, MANIFEST = "state.json", "manifest.json"
VERSION = 1
NAME = re.compile(r"step-[0-9]{8,}")


@dataclass(frozen=True)
class Moment:
    """Where a run stands between two joint steps. seconds: the time of all steps. metrics: how far metrics.jsonl is."""

    step: int
    seconds: float
    metrics: Mark


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has verified. identity: what run it is of (`train.resume.identity`). rejected: newer ones, each with what is wrong
    with it."""

    path: Path
    moment: Moment
    identity: dict[str, Any]
    variants: dict[str, Any]
    rejected: dict[Path, str]


class Damaged(Exception):
    """A checkpoint that does not verify; the text is the reason."""


def folder_of(out: Path) -> Path:
    return out / "checkpoints"


def named(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:08d}"


def steps_of(out: Path) -> list[Path]:
    """The checkpoints' folders, newest first."""
    found = [p for p in folder_of(out).iterdir() if NAME.fullmatch(p.name)] if folder_of(out).is_dir() else []
    return sorted(found, key=lambda p: -int(p.name.removeprefix("step-")))


def write_checkpoint(
    out: Path, moment: Moment, identity: Mapping[str, Any], variants: Sequence[Variant], keep: int, check: Callable[[], None] = lambda: None
) -> Path:
    """Write a checkpoint, then remove all but the newest `keep`. TrimtabError where it cannot be written; nothing of it is left then.
    check: called once its files are written; where it raises, the checkpoint gets no name."""
    target = folder_of(out) / named(moment.step)
    facts = {v.name: {"progress": asdict(v.progress), "epoch": v.rows.epoch, "position": v.rows.position} for v in variants}
    state = {"version": VERSION, "moment": asdict(moment), "identity": identity, "variants": facts}
    with staged(target) as work:
        files = {f"{v.name}.safetensors": _write(work / f"{v.name}.safetensors", _tensor_bytes(v.state())) for v in variants}
        files[STATE] = _write(work / STATE, [_json_bytes(state)])
        _write(work / MANIFEST, [_json_bytes({"files": files})])
        check()
    for old in steps_of(out)[keep:]:
        step_aside(old)  # under its name a checkpoint is whole to the last
    clear_unfinished(folder_of(out))
    return target


def newest_checkpoint(out: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, None where there is none at all. Damaged, with a line for each, where none verifies."""
    rejected: dict[Path, str] = {}
    for path in steps_of(out):
        try:
            state = _verify(path)
            moment = state["moment"]
            mark = Mark(**moment.pop("metrics"))
            return Checkpoint(path, Moment(**moment, metrics=mark), state["identity"], state["variants"], rejected)
        except Damaged as reason:
            rejected[path] = str(reason)
    if rejected:
        raise Damaged("\n".join(f"{path.name}: {reason}" for path, reason in rejected.items()))
    return None


def restore_variants(checkpoint: Checkpoint, variants: Sequence[Variant]) -> None:
    """Bring newly made variants to the state of the checkpoint's."""
    for v in variants:
        facts = checkpoint.variants[v.name]
        v.restore(load_file(checkpoint.path / f"{v.name}.safetensors"))
        v.progress = Progress(**facts["progress"])
        v.rows.seek(facts["epoch"], facts["position"])


def _verify(path: Path) -> dict[str, Any]:
    """The content of state.json, every file having been read and compared with the manifest. Damaged otherwise."""
    try:
        data = (path / MANIFEST).read_bytes()
        files = json.loads(data)["files"]
        if data != _json_bytes({"files": files}) or STATE not in files:
            raise Damaged(f"{MANIFEST} is not as it was written")
        for name, said in files.items():
            found = _digest(path / name)
            if found != said:
                raise Damaged(f"{name} has {found['size']:,} bytes and {found['sha256']}; {MANIFEST} says {said}")
        state = json.loads((path / STATE).read_bytes())
    except FileNotFoundError as error:
        raise Damaged(f"{Path(error.filename).name} is missing") from None
    except OSError as error:
        raise Damaged(f"cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError):
        raise Damaged(f"{MANIFEST} is not readable") from None
    if state["version"] != VERSION:
        raise Damaged(f"it is of format {state['version']}; this version of trimtab reads {VERSION}")
    return state


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": file.tell()}


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file, which `staged` will fsync; returns its entry in the manifest."""
    sha, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            sha.update(chunk)
            size += len(chunk)
    return {"sha256": sha.hexdigest(), "size": size}


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file, tensor by tensor: the library's writer holds all of them in memory once more, and hides a full disk's errno."""
    header, at = {}, 0
    for name, t in tensors.items():
        header[name] = {
            "dtype": DTYPE_NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [at, at := at + t.numel() * t.element_size()],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for t in tensors.values():
        yield t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
