"""What a base's folder must have, checked before transformers reads it: config, complete safetensors, tokenizer, no pickle.

Only headers are read, so the check takes milliseconds. It replaces a crash deep inside a loader by a list of what is there and what is
missing. Every file that transformers may read must be a regular file of plausible size: transformers would wait endlessly for a pipe, and
would read a device or a huge file until memory is full. Links are followed, since a hub cache consists of them.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import BaseError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
MAX_HEADER_BYTES = 100 * 2**20
MAX_BYTES = {".jinja": 2**20, ".json": 2**24, ".model": 2**27, ".txt": 2**27}
"""By suffix, of a file that transformers reads whole. Published tokenizers have at most 40 MB, templates 100 kB."""
MAX_BYTES_OF = {"tokenizer.json": 2**27, "vocab.json": 2**27, INDEX_FILE: 2**26}

FEW_LAYERS = 1000
"""So many are built in a moment, whatever the files hold of them."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `file`, absolute byte range [`start`, `stop`), safetensors' `dtype` name ("BF16"), `shape`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors that one safetensors file declares. Raises ValueError if it is truncated, over-long or no safetensors file."""
    size = _size(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"{path.name} is not a whole safetensors file ({size:,} bytes)")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"{path.name} has a header that is not a JSON object")
    data, tensors = 8 + length, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            start, stop = entry["data_offsets"]
            tensors.append(StoredTensor(name, str(entry["dtype"]), tuple(entry["shape"]), path, data + start, data + stop))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path.name} describes the tensor {name!r} wrongly") from error
    expected = max((t.stop for t in tensors), default=data)
    if expected != size:
        raise ValueError(f"{path.name} holds {size:,} bytes where its header promises {expected:,}: it is truncated or damaged")
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would read, existing or not: `model.safetensors`, else the index's shards, else none.

    Raises ValueError if the index is unreadable or names a file outside the folder.
    """
    if (folder / SINGLE_FILE).exists() or not (folder / INDEX_FILE).exists():
        return [folder / SINGLE_FILE] if (folder / SINGLE_FILE).exists() else []
    index = read_json(folder / INDEX_FILE)
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{INDEX_FILE} has no weight_map")
    shards = sorted({str(name) for name in names.values()})
    if foreign := [name for name in shards if name != os.path.basename(name)]:
        raise ValueError(f"{INDEX_FILE} names files outside the folder: {foreign[:3]}")
    return [folder / name for name in shards]


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file. Raises ValueError naming the file where it is anything else, or larger than such a file can be."""
    if (problem := _problem(path)) is not None:
        raise ValueError(problem)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number of 5,000 digits, nested too deeply
        raise ValueError(f"{path.name} is not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds {type(value).__name__} where a JSON object belongs")
    return value


def folder_problems(folder: Path) -> list[str]:
    """Everything that keeps `folder` from being a base, one line each; empty if it is one."""
    problems = [found for path in _read_whole(folder) if (found := _problem(path)) is not None]
    if problems:
        return problems
    problems = _config_problems(folder) + _weight_problems(folder) or _layer_problems(folder)
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        problems.append(f"no tokenizer (looked for {', '.join(TOKENIZER_FILES)})")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / name).exists():
            try:
                read_json(folder / name)
            except ValueError as error:
                problems.append(str(error))
    return problems


def _read_whole(folder: Path) -> Iterator[Path]:
    """The files that transformers may read whole: configs, tokenizers, templates (named ones lie in a folder of their own)."""
    for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        if path.suffix in MAX_BYTES and not path.is_dir():
            yield path


def _problem(path: Path) -> str | None:
    """Why a file is not read whole, or None if it may be."""
    most = MAX_BYTES_OF.get(path.name, MAX_BYTES.get(path.suffix, MAX_BYTES[".json"]))
    try:
        size = _size(path)
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    except ValueError as error:
        return str(error)
    return None if size <= most else f"{path.name} has {size:,} bytes; at most {most:,} are read"


def _size(path: Path) -> int:
    """Bytes of a regular file. Raises ValueError on anything else, OSError if it is not there. What the kernel makes up as it is read calls
    itself regular, and may have no end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or os.path.realpath(path).startswith(("/proc/", "/sys/")):
        raise ValueError(f"{path.name} is not a regular file")
    return status.st_size


def _config_problems(folder: Path) -> list[str]:
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            return ["no config.json, but an adapter_config.json: this is an adapter's folder, not a base's"]
        return ["no config.json"]
    try:
        config = read_json(folder / "config.json")
    except ValueError as error:
        return [str(error)]
    problems = [] if isinstance(config.get("model_type"), str) else ["config.json names no model_type"]
    return problems + packing_problems(config)


def packing_problems(config: dict[str, Any]) -> list[str]:
    """What is wrong with how a config says that layers are packed."""
    found = config.get("quantization_config")
    if found is None or isinstance(found, dict):
        return []
    return [f"config.json has quantization_config: {json.dumps(found)[:40]}, where a JSON object belongs"]


def _weight_problems(folder: Path) -> list[str]:
    try:
        files = weight_files(folder)
    except ValueError as error:
        return [str(error)]
    if not files:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
        if pickles:
            return [
                f"weights only as pickle ({', '.join(pickles[:3])}), which can run code when read: refused; convert them to safetensors"
            ]
        others = sorted(p.name for p in folder.iterdir() if p.suffix == ".safetensors")
        meant = f"; if {others[0]} has them, rename it to {SINGLE_FILE}" if len(others) == 1 else ""
        return [f"no weights: neither {SINGLE_FILE} nor {INDEX_FILE}{meant}"]
    problems = []
    for path in files:
        if not path.exists():
            problems.append(f"missing shard {path.name}, which {INDEX_FILE} names")
            continue
        try:
            read_header(path)
        except (OSError, ValueError) as error:
            problems.append(str(error))
    return problems


def _layer_problems(folder: Path) -> list[str]:
    """Of a config that names more layers than there are tensors: each would be built before the first is missed."""
    config, tensors = read_json(folder / "config.json"), sum(len(read_header(file)) for file in weight_files(folder))
    for found in (config, config.get("text_config")):
        layers = found.get("num_hidden_layers") if isinstance(found, dict) else None
        if isinstance(layers, int) and layers > max(tensors, FEW_LAYERS):
            return [f"config.json has num_hidden_layers: {layers}, and there are {tensors:,} tensors"]
    return []


def check_folder(folder: Path, *, name: str) -> None:
    """Raise BaseError listing every problem and what the folder holds, unless `folder` is a readable base. `name`: as the user wrote it."""
    problems = folder_problems(folder)
    if not problems:
        return
    held = sorted(p.name for p in folder.iterdir())
    shown = ", ".join(held[:12]) + (f" and {len(held) - 12} more" if len(held) > 12 else "")
    raise BaseError(
        f"{name!r} is not a base that can be read: {folder}",
        problems=[*problems, f"the folder holds: {shown or 'nothing'}"],
        fix="pass a folder with config.json, model.safetensors (or its shards with their index) and tokenizer.json, "
        "as `save_pretrained` writes it.",
    )
