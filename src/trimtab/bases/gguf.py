"""Turns a .gguf file, once, into a folder that transformers reads fast: bf16 safetensors, config, tokenizer with its chat template.

transformers unpacks the blocks. This file corrects the rest: the quantization note in the config, digits in tokenizers of the "smollm"
kind, the tokenizer's length limit, and end and padding tokens in the generation config.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from contextlib import redirect_stderr
from importlib import metadata
from pathlib import Path
from typing import Any

from trimtab.bases.cache import cache_dir, locked, whole_folder
from trimtab.bases.folder import folder_problems
from trimtab.bases.gguf_header import refuse_damage
from trimtab.bases.progress import Progress, quiet_transformers
from trimtab.errors import BaseError, TrimtabError, first_of

SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
"""How llama.cpp names the parts of a model that it has split."""
NOTE_FILE = "trimtab_base.json"
CHUNK_BYTES = 16 * 2**20
# Vocabularies whose merges were learnt with every digit on its own before GPT-2's split (llama.cpp's list). transformers applies GPT-2's
# split alone, which cuts "\n\n1." or "  7" into other tokens than the model was trained on.
SPLITS_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
# Unpacked in fp32 below this size, so that the bf16 values do not depend on a loader's inner precision; above it memory matters more.
UNPACK_IN_FP32_BYTES = 2**30


def sha256_of_file(path: Path) -> str:
    """Hex sha256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def converted_folder(stem: str, sha256: str) -> Path:
    """Where the base converted from a .gguf file of this content lies in the cache, whether or not it is there yet."""
    return cache_dir() / "bases" / f"{stem}-{sha256[:12]}"


def is_converted(folder: Path) -> bool:
    """Whether `folder` holds a finished conversion that can still be read."""
    return (folder / NOTE_FILE).exists() and not folder_problems(folder)


def folder_for_gguf(path: Path, progress: Progress, *, packed: bool = False) -> Path:
    """The cached folder for any .gguf file, converted at first use and keyed by its content. packed: the blocks of linear layers stay as
    they are.

    Raises BaseError if the file is no GGUF, or of an architecture that transformers cannot unpack.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise BaseError(f"{str(path)!r} is not a GGUF file: it does not start with the letters GGUF", fix="fetch the file anew.")
    _refuse_parts(path)
    sha256 = sha256_of_file(path)
    folder = converted_folder(_plain(path.stem) + ("-packed" if packed else ""), sha256)
    convert(path, folder, sha256=sha256, progress=progress, packed=packed)
    return folder


def convert(path: Path, folder: Path, *, sha256: str, progress: Progress, packed: bool = False) -> None:
    """Write `folder` from the .gguf file `path` unless it is there already; whole or not at all, one process at a time.

    sha256: hex digest of `path`, written into the folder's note. Raises BaseError if the file cannot be unpacked.
    """
    if is_converted(folder):
        return
    with locked(folder.name, progress):
        if is_converted(folder):
            return
        reader = _reader_of(path)
        _refuse_kinds(path, reader)
        progress(f"unpacking {path.name} ({path.stat().st_size / 1e6:.0f} MB), once")
        try:
            with quiet_transformers():
                if not packed:
                    with redirect_stderr(io.StringIO()):  # the unpacker draws a bar of its own that no setting turns off
                        model, tokenizer = _unpack(path)
                progress(f"writing {folder}")
                with whole_folder(folder) as work:
                    if packed:
                        from trimtab.bases.gguf_packed import write_packed  # which loads torch

                        tokenizer = _tokenizer(path, write_packed(path, reader, work, progress))
                    else:
                        model.save_pretrained(work)
                    tokenizer.save_pretrained(work)
                    note = {"source": path.name, "source_sha256": sha256, "transformers": metadata.version("transformers")}
                    for saved in work.iterdir():
                        saved.chmod(0o644)  # safetensors writes 0600, which would lock others out of a shared cache
                    (work / NOTE_FILE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        except TrimtabError:
            raise
        except Exception as error:  # transformers and gguf raise anything from KeyError to RuntimeError on a file they do not know
            raise BaseError(
                f"the GGUF file {str(path)!r} cannot be unpacked: {type(error).__name__}: {error}",
                fix="use a file of an architecture that transformers unpacks (llama, qwen2, qwen3, mistral, gemma2, gemma3, phi3, gpt2), "
                "or pass the model's safetensors folder.",
            ) from error


def _refuse_parts(path: Path) -> None:
    """BaseError for one of several files that a model was split into."""
    if SPLIT.search(path.name):
        raise BaseError(
            f"{path.name!r} is one of several parts of a model, which are not read",
            fix="make one file of them: `llama-gguf-split --merge FIRST_PART OUT`.",
        )


def _refuse_kinds(path: Path, reader: Any) -> None:
    """BaseError, with the tensors, for numbers in blocks that the package gguf cannot dequantise."""
    from gguf.quants import _type_traits

    read = {"F32", "F16", *(kind.name for kind in _type_traits)}
    wrong = [f"{t.name} is {t.tensor_type.name}" for t in reader.tensors if t.tensor_type.name not in read]
    if wrong:
        raise BaseError(
            f"the GGUF file {str(path)!r} has tensors that cannot be dequantised",
            problems=first_of(wrong, 10),
            fix=f"use a file whose tensors are of {', '.join(sorted(read))}.",
        )


def _reader_of(path: Path) -> Any:
    """gguf's reader of a file. With 150,000 tokens in it, it takes some seconds to begin."""
    from gguf import GGUFReader

    refuse_damage(path)
    try:
        return GGUFReader(path)
    except Exception as error:  # it raises whatever a wrong number leads to
        raise BaseError(
            f"the GGUF file {str(path)!r} cannot be read: {type(error).__name__}: {error}", fix="fetch the file anew."
        ) from error


def _unpack(path: Path) -> tuple[Any, Any]:
    """The dense bf16 model and the tokenizer in a .gguf file, ready to be saved."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    from trimtab.bases.load_hooks import forget_quantization

    dtype = torch.float32 if path.stat().st_size < UNPACK_IN_FP32_BYTES else torch.bfloat16
    plan: dict[str, Any] = {}
    if (gguf_config := getattr(transformers, "GgufConfig", None)) is not None:
        plan["quantization_config"] = gguf_config(dequantize=True)  # else newer versions keep the blocks packed for some architectures
    options: dict[str, Any] = {"gguf_file": path.name, "dtype": dtype, "trust_remote_code": False, "output_loading_info": True, **plan}
    model, info = AutoModelForCausalLM.from_pretrained(path.parent, **options)
    if missing := sorted(info["missing_keys"]):  # which transformers fills with random numbers
        raise BaseError(f"{path.name} has no tensors for {', '.join(missing[:5])}", fix="fetch the file anew.")
    if wild := [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]:
        raise BaseError(f"{path.name} has numbers that are not finite in {', '.join(wild[:5])}", fix="fetch the file anew.")
    packed = [name for name, p in model.named_parameters() if not p.is_floating_point()]
    if packed:
        raise BaseError(f"{path.name} stays packed after unpacking: {packed[:3]}", fix="pass the model's safetensors folder instead.")
    model = model.to(torch.bfloat16)
    forget_quantization(model)
    vars(model.config).pop("_model_name_or_path", None)
    model.config.dtype = torch.bfloat16
    tokenizer = _tokenizer(path, model.config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _tokenizer(path: Path, config: Any) -> Any:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    if _pre_tokenizer_kind(path) in SPLITS_DIGITS and getattr(tokenizer, "backend_tokenizer", None) is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int):
        tokenizer.model_max_length = limit
    return tokenizer


def _pre_tokenizer_kind(path: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    return str(field.contents()) if field is not None else None


def _plain(stem: str) -> str:
    """A file's stem as a folder name: letters, digits, dot, dash and underscore, at most 60 of them."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in stem)[:60].strip(".") or "base"
