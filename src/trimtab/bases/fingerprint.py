"""A base's name by content: one sha256 over its stored tensors, whatever files they lie in.

    content(t)  = sha256(dtype, shape, raw little-endian bytes of t)
    fingerprint = "sha256:" + sha256(lines "name content(t)\\n", names sorted)

Sharding and key order do not count. An output head that is tied to the embedding counts once, whether or not a folder stores it twice;
one that differs although the config says "tied" counts, because it would be used. dtype names are safetensors' ("BF16").
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import torch

from trimtab.atomic import atomic_write
from trimtab.bases.cache import cache_dir
from trimtab.bases.folder import StoredTensor, read_header, read_json, weight_files
from trimtab.bases.weights import stored_parts
from trimtab.errors import BaseError
from trimtab.ops.native import compute_alone
from trimtab.places.shards import shards_of

T = TypeVar("T")
C = TypeVar("C")
OUTPUT_HEAD = "lm_head.weight"
THREADS, CHUNK_BYTES = 8, 4 * 2**20
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
# Text on which tokenizers part: contractions, digits, runs of blanks before digits, newlines, accents, CJK, emoji, code.
PROBE = "Don't  2024-01-02\n\n1. été  naïve\tx=3.14;  if (a_b!=0){ return; }\r\n 東京 🙂   end ' quote' 100,000 HTTPServer"


def fingerprint_folder(path: Path | str, stopped: Event | None = None) -> str:
    """The "sha256:…" of the tensors in a base's folder; kept in the cache by the files' names, sizes, times and inodes.

    The time of change and the inode too: archives and image layers give all files one time, and two revisions of a model have one size.

    stopped: once it is set, by another thread, nothing more is read. Raises BaseError if the files cannot be read, or not to their end.
    """
    folder = Path(path).absolute()
    try:
        files = weight_files(folder)
        states = [(f.name, f.stat()) for f in [*files, folder / "config.json"]]
        stamp = [[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for name, s in states]
        note = cache_dir() / "fingerprints" / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.json"
        if (known := _read_note(note, stamp)) is not None:
            return known
        stored = {t.name: t for file in files for t in read_header(file)}
        contents = dict(zip(stored, _each(stored.values(), partial(_content_of_stored, stopped=stopped)), strict=True))
        found = _combine(contents, tied=_is_tied(folder))
    except (OSError, ValueError) as error:
        raise BaseError(f"the base in {folder} cannot be fingerprinted: {error}", fix="fetch or copy the folder anew.") from error
    _write_note(note, {"folder": str(folder), "stamp": stamp, "fingerprint": found})
    return found


def fingerprint_model(model: Any) -> str:
    """The "sha256:…" of a model's matrices as they are stored, its other parameters and its persistent buffers by the same formula, under
    the names of `state_dict()`.

    Equal to its folder's fingerprint where the model was loaded in its stored dtype. Tensors on a GPU are copied, and matrices that lie
    otherwise than in their files packed anew, one at a time on each thread. Raises ValueError on a dtype that safetensors cannot name.
    """
    state, tied = model.state_dict(), bool(getattr(model.config, "tie_word_embeddings", False))
    head = state.get(OUTPUT_HEAD) if tied else None
    twice = head is not None and any(n != OUTPUT_HEAD and _is_same_memory(t, head) for n, t in state.items())

    shared_out = shards_of(model) is not None

    def content(part: Callable[[], dict[str, torch.Tensor]]) -> dict[str, str]:
        own = {name: t for name, t in part().items() if not (twice and name == OUTPUT_HEAD)}
        return {name: _content_of_tensor(t, shared_out) for name, t in own.items()}

    parts = stored_parts(model)
    found = [content(part) for part in parts] if shared_out else _each(parts, content)  # a unit is there at a time
    return _combine({name: c for own in found for name, c in own.items()}, tied=tied)


def tokenizer_digest(tokenizer: Any) -> str:
    """The "sha256:…" of what turns text into ids: vocabulary, merges, added tokens, and the ids of a fixed probe text.

    The probe stands for normalizer and pre-tokenizer, whose spelling differs between library versions where their effect does not.
    """
    facts: dict[str, Any] = {"vocab": sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0]))}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        merges = json.loads(backend.to_str())["model"].get("merges") or []
        facts["merges"] = [m.split(" ") if isinstance(m, str) else m for m in merges]
    facts["added"] = sorted((i, t.content, bool(t.special)) for i, t in tokenizer.added_tokens_decoder.items())
    facts["probe"] = tokenizer.encode(PROBE, add_special_tokens=False)
    return _sha256_of_json(facts)


def template_digest(tokenizer: Any) -> str | None:
    """The "sha256:…" of the chat template's text (of all of them, where a tokenizer names several); None if there is no template."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    if isinstance(template, str):
        return "sha256:" + hashlib.sha256(template.encode()).hexdigest()
    return _sha256_of_json(template)


def _each(parts: Iterable[T], content: Callable[[T], C]) -> list[C]:
    """The content of each, on several threads: hashing lets others run."""
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), initializer=compute_alone) as pool:
        return list(pool.map(content, parts))


def _combine(contents: dict[str, str], *, tied: bool) -> str:
    head = contents.get(OUTPUT_HEAD)
    if tied and head is not None and any(n != OUTPUT_HEAD and c == head for n, c in contents.items()):
        contents = {name: content for name, content in contents.items() if name != OUTPUT_HEAD}
    lines = "".join(f"{json.dumps(name)} {contents[name]}\n" for name in sorted(contents))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def _start(dtype: str, shape: Iterable[int]) -> Any:
    return hashlib.sha256(json.dumps([dtype, [int(n) for n in shape]]).encode() + b"\n")


def _content_of_stored(tensor: StoredTensor, stopped: Event | None = None) -> str:
    digest, left = _start(tensor.dtype, tensor.shape), tensor.stop - tensor.start
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        while left > 0:
            if stopped is not None and stopped.is_set():
                raise ValueError("it was stopped")
            chunk = file.read(min(CHUNK_BYTES, left))
            if not chunk:
                raise ValueError(f"{tensor.file.name} ends inside the tensor {tensor.name!r}")
            digest.update(chunk)
            left -= len(chunk)
    return str(digest.hexdigest())


def _content_of_tensor(tensor: torch.Tensor, passing: bool = False) -> str:
    """passing: its memory is to shrink afterwards, which that of what numpy has seen cannot."""
    if tensor.dtype not in DTYPE_NAMES:
        raise ValueError(f"a tensor of dtype {tensor.dtype} cannot be fingerprinted")
    digest = _start(DTYPE_NAMES[tensor.dtype], tensor.shape)
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    for chunk in raw.split(CHUNK_BYTES):
        digest.update((chunk.clone() if passing else chunk).numpy())
    return str(digest.hexdigest())


def _is_same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = a.untyped_storage()._cdata == b.untyped_storage()._cdata and a.storage_offset() == b.storage_offset()
    return same and a.shape == b.shape and a.dtype == b.dtype


def _is_tied(folder: Path) -> bool:
    """config.json's word on tying; where it is silent, the default of its model type, which transformers knows."""
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    from transformers import AutoConfig

    return bool(getattr(AutoConfig.from_pretrained(folder, trust_remote_code=False), "tie_word_embeddings", False))


def _sha256_of_json(value: Any) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _read_note(note: Path, stamp: list[list[Any]]) -> str | None:
    try:
        kept = read_json(note)
    except ValueError:
        return None
    found = kept.get("fingerprint")
    return found if kept.get("stamp") == stamp and isinstance(found, str) and found.startswith("sha256:") else None


def _write_note(note: Path, value: dict[str, Any]) -> None:
    """Keep a result for next time. If the cache cannot be written, the result is computed again next time."""
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(note) as file:
            file.write(json.dumps(value).encode())
