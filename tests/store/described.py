"""Adapter folders read a second time, with nothing of trimtab's readers: strict JSON, a tensor's bytes where the header puts them, scaling
and places by peft's rules. What loads must equal this; where it is not sound, it must not have loaded."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.store.mutate import CONFIG, NOTE, WEIGHTS
from trimtab.methods import METHODS, LoraConfig
from trimtab.methods.base import Method
from trimtab.model import Base

PREFIX = "base_model.model."


def described(path: Path, base: Base) -> tuple[Method, dict[str, Tensor]]:
    """Method and tensors of a folder that is sound. AssertionError where it is not: then it must not have loaded."""
    for name in (CONFIG, WEIGHTS):
        assert _regular(path / name), f"{name} is no regular file"
    config, tensors = _strict((path / CONFIG).read_bytes()), _tensors((path / WEIGHTS).read_bytes())
    if (path / NOTE).exists() or (path / NOTE).is_symlink():
        note = _strict((path / NOTE).read_bytes())
        assert _regular(path / NOTE)
        assert {n: note["files"][n] for n in (CONFIG, WEIGHTS)} == {n: digest((path / n).read_bytes()) for n in (CONFIG, WEIGHTS)}
        recorded = fingerprint(path)
        assert not isinstance(recorded, str) or recorded in ("", base.fingerprint), "made for another base"
    assert isinstance(config.get("task_type"), str | None) and not config.get("some_future_option")
    kind = config["peft_type"]
    virtual = kind in ("PROMPT_TUNING", "PREFIX_TUNING")
    assert virtual or any(bool(t.any()) for t in tensors.values()), "all zero"
    return DESCRIBED[kind](config, tensors), {k.removeprefix(PREFIX): t for k, t in tensors.items()}


def _regular(file: Path) -> bool:
    """A regular file, or a link to one in the same folder."""
    return stat.S_ISREG(file.stat().st_mode) and file.resolve().parent == file.parent.resolve()


def fingerprint(path: Path) -> Any:
    """What the note says of the base, None where it does not."""
    recorded = _strict((path / NOTE).read_bytes()).get("base") if (path / NOTE).exists() else None
    return recorded.get("fingerprint") if isinstance(recorded, dict) else None


def digest(data: Any) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _strict(data: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs), "a key stands twice"
        return dict(pairs)

    def constant(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    found = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=constant)
    assert isinstance(found, dict)
    return found


def _tensors(data: bytes) -> dict[str, Tensor]:
    size = int.from_bytes(data[:8], "little")
    header, values = _strict(data[8 : 8 + size]), data[8 + size :]
    header.pop("__metadata__", None)
    found, covered = {}, 0
    for name, e in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        assert e["data_offsets"][0] == covered, "a gap or an overlap"
        raw = values[covered : (covered := e["data_offsets"][1])]
        array = {
            "F32": lambda r: np.frombuffer(r, "<f4"),
            "F16": lambda r: np.frombuffer(r, "<f2").astype("<f4"),
            "BF16": lambda r: (np.frombuffer(r, "<u2").astype("<u4") << 16).view("<f4"),
        }[e["dtype"]](raw)
        assert np.isfinite(array).all() and array.size
        found[name] = torch.from_numpy(array.copy()).reshape(e["shape"])
    assert covered == len(values), "bytes that belong to no tensor"
    return found


def _modules(tensors: dict[str, Tensor], ending: str) -> dict[str, Tensor]:
    """module -> its tensor of this kind."""
    return {k.removeprefix(PREFIX).removesuffix(ending): t for k, t in tensors.items() if k.endswith(ending)}


def _first(patterns: Any, name: str, default: float) -> float:
    """peft's rule for rank_pattern and alpha_pattern."""
    return next((v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", name)), default)


def _lora(config: dict[str, Any], tensors: dict[str, Tensor]) -> Method:
    ranks = {name: a.shape[0] for name, a in _modules(tensors, ".lora_A.weight").items()}
    _refuse_bools(config, "r", "lora_alpha")
    assert all(r == _first(config.get("rank_pattern"), n, 8 if config.get("r") is None else config["r"]) for n, r in ranks.items())
    default = 8 if config.get("lora_alpha") is None else config["lora_alpha"]
    alphas = {n: float(_first(config.get("alpha_pattern"), n, default)) for n in ranks}
    switches = {k: config.get(k) or False for k in ("use_rslora", "use_dora")}
    assert all(v in (True, False) and isinstance(v, bool) for v in switches.values()), switches
    assert switches["use_dora"] == bool(_modules(tensors, ".lora_magnitude_vector"))
    literal = {n: re.escape(n) for n in ranks}
    return LoraConfig(
        target_modules=tuple(ranks), rank_pattern={literal[n]: r for n, r in ranks.items()},
        alpha_pattern={literal[n]: a for n, a in alphas.items()}, **switches,
    )  # fmt: skip


def _refuse_bools(config: dict[str, Any], *keys: str) -> None:
    assert not any(isinstance(config.get(k), (bool, str)) for k in keys), "no number"


def _ia3(config: dict[str, Any], tensors: dict[str, Tensor]) -> Method:
    vectors = _modules(tensors, ".ia3_l")
    wide = tuple(n for n, t in vectors.items() if t.shape[0] == 1)
    named = config.get("feedforward_modules")
    named = ["down_proj"] if named is None else named
    assert set(wide) == {
        n for n in vectors if (re.fullmatch(named, n) if isinstance(named, str) else any(n == k or n.endswith(f".{k}") for k in named))
    }
    return METHODS["IA3"](target_modules=tuple(vectors), feedforward_modules=wide)


def _prompt(config: dict[str, Any], tensors: dict[str, Tensor]) -> Method:
    _refuse_bools(config, "num_virtual_tokens")
    assert config["num_virtual_tokens"] == len(tensors["prompt_embeddings"])
    return METHODS["PROMPT_TUNING"](num_virtual_tokens=config["num_virtual_tokens"], prompt_tuning_init="RANDOM")


def _prefix(config: dict[str, Any], tensors: dict[str, Tensor]) -> Method:
    _refuse_bools(config, "num_virtual_tokens")
    assert config["num_virtual_tokens"] == len(tensors["prompt_embeddings"])
    return METHODS["PREFIX_TUNING"](num_virtual_tokens=config["num_virtual_tokens"], prefix_init="RANDOM")


def _bottleneck(config: dict[str, Any], tensors: dict[str, Tensor]) -> Method:
    _refuse_bools(config, "scaling", "reduction_factor", "dropout")
    fields = {
        k: config[k] for k in ("variant", "reduction_factor", "non_linearity", "scaling", "dropout", "layers_to_transform") if k in config
    }
    return METHODS["BOTTLENECK"](**fields)


DESCRIBED = {"LORA": _lora, "IA3": _ia3, "PROMPT_TUNING": _prompt, "PREFIX_TUNING": _prefix, "BOTTLENECK": _bottleneck}
