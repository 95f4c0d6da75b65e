"""Damage to adapter folders: the weights' header and values, and the files themselves. Importing this adds to `mutate.MUTATIONS`."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tests.store.mutate import CONFIG, EITHER, NOTE, REFUSED, SAME, WEIGHTS, Files, join, mutation, pick, split

# ---- the weights ----


def _entries(header: Mapping[str, Any]) -> list[str]:
    return [k for k in header if k != "__metadata__"]


@mutation
def edit_a_header_entry(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    header, values = split(files[WEIGHTS])
    entry = header[rng.choice(_entries(header))]
    shape, (start, stop) = entry["shape"], entry["data_offsets"]
    changes: list[dict[str, Any]] = [
        {"shape": [0, *shape[1:]], "data_offsets": [start, start]},
        {"shape": [0, *shape]},
        {"shape": [-shape[0], *shape[1:]]},
        {"shape": [shape[0] + 1, *shape[1:]]},
        {"shape": [2**47, 2**47]},
        {"dtype": rng.choice(["F64", "I64", "I8", "F8_E4M3", "BOOL", "Q4", "f32", ""])},
        {"data_offsets": [start + 4, stop + 4]},
        {"data_offsets": [stop, start]},
        {"data_offsets": [start - 2**40, stop]},
        {"data_offsets": [0, 2**63]},
        {"more": 1},
    ]
    entry |= rng.choice(changes)
    files[WEIGHTS] = join(header, values)
    return REFUSED


@mutation
def rename_a_tensor(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    header, values = split(files[WEIGHTS])
    old = rng.choice(_entries(header))
    new = rng.choice(
        [old + "x", "x" + old, "../" + old, "a/" + old, "base_model.model.x." + old, old.upper(), "x" * 600, "", "a..b", old + "\0"]
    )
    files[WEIGHTS] = join({(new if k == old else k): v for k, v in header.items()}, values)
    return REFUSED


@mutation
def swap_two_tensors(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    """Another adapter, soundly written: without a note, or with one that says so, it is what the folder is."""
    header, values = split(files[WEIGHTS])
    a, b = rng.choices(_entries(header), k=2)
    header[a], header[b] = header[b], header[a]
    files[WEIGHTS] = join(header, values)
    return EITHER


@mutation
def drop_or_add_a_tensor(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    header, values = split(files[WEIGHTS])
    if rng.random() < 0.5:
        last = max(_entries(header), key=lambda k: header[k]["data_offsets"][0])
        values = values[: header.pop(last)["data_offsets"][0]]
    else:
        name = rng.choice(["extra", "base_model.model.lm_head.lora_A.weight", "base_model.model.model.layers.9.self_attn.q_proj.ia3_l"])
        header[name] = {"dtype": "F32", "shape": [1, 4], "data_offsets": [len(values), len(values) + 16]}
        values += struct.pack("<4f", 1, 2, 3, 4)
    files[WEIGHTS] = join(header, values)
    return REFUSED


@mutation
def change_metadata(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    """Strings that nobody reads, or padding before the data as the format allows it."""
    header, values = split(files[WEIGHTS])
    header["__metadata__"] = rng.choice([{}, {"format": "pt"}, {"format": "np", "a": "b"}, {"x": "<script>"}])
    files[WEIGHTS] = join(json.dumps(header).encode() + b" " * rng.randrange(16), values)
    return SAME


@mutation
def lie_about_the_header(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    claim = rng.choice([0, 1, 2**20 + 1, 2**40, 2**63, 2**64 - 1, len(files[WEIGHTS]), len(files[WEIGHTS]) - 7])
    files[WEIGHTS] = struct.pack("<Q", claim) + files[WEIGHTS][8:]
    return REFUSED


@mutation
def not_finite(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    header, values = split(files[WEIGHTS])
    raw = np.frombuffer(values, "<f4").copy()
    raw[rng.randrange(len(raw))] = rng.choice([math.nan, math.inf, -math.inf])
    files[WEIGHTS] = join(header, raw.tobytes())
    return REFUSED


@mutation
def other_values(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    """Another adapter; all zero it is none."""
    header, values = split(files[WEIGHTS])
    raw = np.frombuffer(values, "<f4").copy()
    raw = raw * rng.choice([np.float32(x) for x in (0, 0.5, 1, -1)])
    files[WEIGHTS] = join(header, raw.tobytes())
    return EITHER


@mutation
def half_precision(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    header, values = split(files[WEIGHTS])
    raw = np.frombuffer(values, "<f4")
    brain = rng.random() < 0.5
    data = (raw.view("<u4") >> 16).astype("<u2").tobytes() if brain else raw.astype("<f2").tobytes()
    for name in _entries(header):
        header[name] |= {"dtype": "BF16" if brain else "F16", "data_offsets": [n // 2 for n in header[name]["data_offsets"]]}
    files[WEIGHTS] = join(header, data)
    return EITHER


# ---- the files themselves ----


@mutation
def swap_files(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    """One file of another adapter: of another method, or of the same one in other sizes."""
    name, other = pick(rng, files), rng.choice(list(others.values()))
    files[name] = other[name]
    return EITHER


@mutation
def confuse_files(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    a, b = rng.sample([CONFIG, WEIGHTS], 2) if NOTE not in files else rng.sample([CONFIG, WEIGHTS, NOTE], 2)
    files[a], files[b] = files[b], files[a]
    return REFUSED


@mutation
def lose_a_file(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    name = pick(rng, files)
    del files[name]
    return REFUSED if name != NOTE else EITHER


@mutation
def odd_file(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    """Something that is no regular file under the name of one; a link to a file in the folder is as good as the file."""
    name = pick(rng, files)
    content = files[name]
    assert isinstance(content, bytes)

    def link(path: Path) -> None:
        target = path.with_name("." + path.name)
        target.write_bytes(content)
        path.symlink_to(target.name)

    makers: list[Callable[[Path], None]] = [
        link, Path.mkdir, os.mkfifo, lambda p: p.symlink_to("/etc/passwd"), lambda p: p.symlink_to(p), lambda p: p.symlink_to("/dev/zero"),
    ]  # fmt: skip
    made = files[name] = rng.choice(makers)
    return SAME if made is link else REFUSED


@mutation
def extra_file(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    """What nobody reads is not read, a pickle under a name that loaders know included."""
    pickle = rng.random() < 0.4
    name = rng.choice(
        ["adapter_model.bin", "adapter_model.pt"] if pickle else ["README.md", "optimizer.pt", "config.json", ".hidden", "x" * 200]
    )
    files[name] = rng.choice([rng.randbytes(50), b"\x80\x04cos\nsystem\n(S'x'\ntR."])
    return SAME


def sparse(path: Path) -> None:
    """A terabyte that takes no room: whoever reads it whole has no memory left."""
    with path.open("wb") as file:
        file.truncate(2**40)


@mutation
def huge_file(rng: Random, files: Files, others: Mapping[str, Files]) -> str:
    name = rng.choice([*files, "optimizer.pt"])
    files[name] = sparse
    return REFUSED if name != "optimizer.pt" else SAME
