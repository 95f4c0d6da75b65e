"""Load a base: a frozen transformers causal LM with its tokenizer, in a dtype and on a device that suit the machine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Event
from typing import Any

import torch
from transformers import AutoTokenizer

from trimtab.bases.fingerprint import fingerprint_folder, fingerprint_model
from trimtab.bases.fits import refuse_too_large
from trimtab.bases.folder import read_header, weight_files
from trimtab.bases.locate import locate
from trimtab.bases.progress import Progress, quiet_transformers, reporting
from trimtab.bases.recipes import GGUF, check_quantize
from trimtab.bases.text_tower import load_causal
from trimtab.errors import BaseError, ConfigError, TrimtabError, first_of, nearest
from trimtab.memory import explained, ran_out
from trimtab.places.shards import Shards

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
CPU_FLAGS_WITH_BF16_DOT = frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})


@dataclass(frozen=True, eq=False)
class LoadedBase:
    """A base ready to be attached to. Every parameter is frozen; nothing may change them.

    name: as the user gave it. path: folder with safetensors and tokenizer, readable by transformers. model: transformers causal LM in
    eval mode. fingerprint: "sha256:…" of the folder's tensors, or of what was made of them where they were quantised. dtype, device: of the
    model's parameters.
    """

    name: str
    path: Path
    model: Any
    tokenizer: Any
    fingerprint: str
    dtype: torch.dtype
    device: torch.device


def load(
    name_or_path: str,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    quantize: str | None = None,
    experts: bool = True,
    progress: Progress | None = None,
    shards: Shards | None = None,
) -> LoadedBase:
    """Find, fetch or convert, check and load the base `name_or_path` (bundled name, folder, .gguf file, hub id).

    dtype: "float32", "bfloat16", "float16", "auto" (as stored) or a torch dtype; None picks bfloat16 where the machine multiplies it
    natively, else float32. device: "cpu", "cuda", "cuda:1"; None picks cuda where there is one. quantize: a format that the linear layers
    are packed in while they are read ("nf4", "int8", …; "gguf" keeps the blocks of a .gguf file). experts: whether these are packed too.
    progress: called with one line a slow step. shards: share the base out over ranks while it is read; each of them calls this.

    Raises BaseError if the base cannot be found or read, ConfigError on a dtype or device that is not to be had, OutOfMemory, before a
    weight is read, if they do not fit.
    """
    on = resolve_device(device)
    wanted = resolve_dtype(dtype, on)
    check_quantize(quantize, name_or_path)
    with reporting(progress) as report:
        path = locate(name_or_path, report, packed=quantize == GGUF)
    quantize = None if quantize == GGUF else quantize
    refuse_too_large(name_or_path, path, wanted, on, quantize, shards)
    hashing: AbstractContextManager[Future[str] | None] = (
        nullcontext() if quantize else _hashing(path)
    )  # reads the files that are read for the model
    with quiet_transformers(), explained(f"loading the base {name_or_path!r}", lambda: _what_fits(path, wanted)), hashing as hashed:
        tokenizer = _load_tokenizer(name_or_path, path)
        options = {"quantize": quantize, "experts": experts, "shards": shards}
        model = _load_model(name_or_path, path, wanted, on, options).eval().requires_grad_(False)
        fingerprint = fingerprint_model(model) if hashed is None else hashed.result()
        return LoadedBase(name_or_path, path, model, tokenizer, fingerprint, model.dtype, on)


@contextmanager
def _hashing(path: Path) -> Iterator[Future[str]]:
    """A folder's fingerprint, computed on a thread of its own. The thread ends with what is inside: where that fails, the process need not
    wait for all files to be read."""
    stopped = Event()
    with ThreadPoolExecutor(1, thread_name_prefix="trimtab-hash") as pool:
        try:
            yield pool.submit(fingerprint_folder, path, stopped)
        finally:
            stopped.set()


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | str:
    """The dtype to load in, or "auto" for the stored one. Raises ConfigError listing what is accepted."""
    if dtype is None:
        return default_dtype(device)
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        known = [*DTYPES, "auto"]
        meant = f": write {SHORT_DTYPES[dtype]}" if dtype in SHORT_DTYPES else nearest(dtype, known)
        raise ConfigError(f"dtype {dtype!r} is not one for a base{meant}", fix=f"use one of {', '.join(known)}.")
    return DTYPES[dtype]


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device to load on: cuda where there is one, else cpu, unless one is named. Raises ConfigError if it is not to be had."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is not one that torch knows", fix="use cpu, cuda or cuda:N.") from error
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {str(found)!r} is not supported", fix="use cpu, cuda or cuda:N.")
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise ConfigError(f"device {str(found)!r} is not there: torch sees {count} CUDA devices", fix="use cpu, or run `trimtab doctor`.")
    return found


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where `device` multiplies it natively, else float32."""
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_has_bf16()
    return torch.bfloat16 if native else torch.float32


@cache
def cpu_has_bf16() -> bool:
    """Whether this CPU has bf16 dot products (AVX512-BF16, AMX, Arm BF16) and torch's oneDNN uses them."""
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
    except (AttributeError, RuntimeError):
        return False
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask() for ask in asked if ask is not None) or not CPU_FLAGS_WITH_BF16_DOT.isdisjoint(_cpu_flags())


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.partition(":")[2].split()}


def _load_tokenizer(name: str, path: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a tokenizer's files can be wrong in as many ways as there are tokenizers
        if isinstance(error, TrimtabError) or ran_out(error):
            raise
        raise _unreadable(name, path, "tokenizer", error) from error


def _load_model(name: str, path: Path, dtype: torch.dtype | str, device: torch.device, options: Mapping[str, Any]) -> Any:
    """The model on the device, with every weight from the files. transformers fills missing weights with random numbers; here they are an
    error."""
    try:
        model, info = load_causal(path, device=device, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except Exception as error:  # unknown model_type, wrong shapes, not a causal LM, code of its own: the text says which
        if isinstance(error, TrimtabError) or ran_out(error):
            raise
        raise _unreadable(name, path, "model", error) from error
    missing = sorted(info["missing_keys"])
    wrong = sorted(info["mismatched_keys"])  # transformers would name none of them in its error
    if missing or wrong:
        found = [f"missing tensor {key}" for key in missing]
        found += [f"{key} is {list(stored)} where {list(built)} belongs" for key, stored, built in wrong]
        raise BaseError(
            f"{name!r} does not hold all weights of its model: {path}",
            problems=first_of(found, 10),
            fix="fetch the folder anew, or check that config.json belongs to these weights.",
        )
    return model


def _what_fits(path: Path, dtype: torch.dtype | str) -> str:
    """The memory that a base of this folder needs in each dtype, and what to do if there is not enough."""
    tensors = [t for file in weight_files(path) for t in read_header(file)]
    numbers = sum(math.prod(t.shape) for t in tensors)
    sizes = {name: numbers * kept.itemsize for name, kept in DTYPES.items() if name != "float16"}
    asked = f", and dtype {str(dtype).removeprefix('torch.')} was asked for" if dtype is not torch.bfloat16 else ""
    needs = " and ".join(f"{size / 1e9:.3g} GB in {name}" for name, size in sizes.items())
    return f"its weights take {needs}{asked}; use a smaller dtype or a smaller base, or make memory free"


def _unreadable(name: str, path: Path, what: str, error: Exception) -> BaseError:
    return BaseError(
        f"transformers cannot read the {what} of {name!r} in {path}: {type(error).__name__}: {error}",
        fix="use a causal language model whose architecture transformers has built in; code that comes with a model is never run.",
    )
