"""The shapes of bases, without their weights: sizes known by name, or any config that transformers can build a causal LM from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from trimtab.bases.folder import packing_problems, read_json
from trimtab.bases.gguf_header import refuse_damage
from trimtab.bases.locate import HUB_ID
from trimtab.bases.progress import quiet_transformers
from trimtab.bases.recipes import BITS, GGUF, check_quantize, refuse_packed
from trimtab.bases.spec import Spec
from trimtab.bases.stored_formats import bits_of, kinds_of, settings_of, without_settings
from trimtab.bases.structure import read_spec
from trimtab.bases.text_tower import text_config
from trimtab.errors import BaseError, nearest
from trimtab.paths import user_path


def _shape(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, positions: int, **rest: Any) -> dict[str, Any]:
    """The fields that Llama and its relatives share, under transformers' names."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = dict(zip((*names, "max_position_embeddings"), (vocab, hidden, inner, layers, heads, kv_heads, positions), strict=True))
    return {"tie_word_embeddings": False, "dtype": "bfloat16"} | sizes | rest


_TIED = {"tie_word_embeddings": True}
PRESETS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "smollm2-135m-instruct": ("LlamaConfig", _shape(49152, 576, 1536, 30, 9, 3, 8192, **_TIED)),
    "llama-2-7b": ("LlamaConfig", _shape(32000, 4096, 11008, 32, 32, 32, 4096, dtype="float16")),
    "llama-2-13b": ("LlamaConfig", _shape(32000, 5120, 13824, 40, 40, 40, 4096, dtype="float16")),
    "llama-2-70b": ("LlamaConfig", _shape(32000, 8192, 28672, 80, 64, 8, 4096, dtype="float16")),
    "llama-3.1-8b": ("LlamaConfig", _shape(128256, 4096, 14336, 32, 32, 8, 131072)),
    "llama-3.2-1b": ("LlamaConfig", _shape(128256, 2048, 8192, 16, 32, 8, 131072, **_TIED)),
    "llama-3.2-3b": ("LlamaConfig", _shape(128256, 3072, 8192, 28, 24, 8, 131072, **_TIED)),
    "qwen2.5-0.5b": ("Qwen2Config", _shape(151936, 896, 4864, 24, 14, 2, 32768, **_TIED)),
    "qwen2.5-1.5b": ("Qwen2Config", _shape(151936, 1536, 8960, 28, 12, 2, 32768, **_TIED)),
    "qwen2.5-7b": ("Qwen2Config", _shape(152064, 3584, 18944, 28, 28, 4, 32768)),
    "qwen3-0.6b": ("Qwen3Config", _shape(151936, 1024, 3072, 28, 16, 8, 40960, head_dim=128, **_TIED)),
    "qwen3-8b": ("Qwen3Config", _shape(151936, 4096, 12288, 36, 32, 8, 40960, head_dim=128)),
    "mistral-7b": ("MistralConfig", _shape(32000, 4096, 14336, 32, 32, 8, 32768)),  # v0.1; later ones have 768 more words
    "gemma-2-2b": ("Gemma2Config", _shape(256000, 2304, 9216, 26, 8, 4, 8192, head_dim=256, **_TIED)),
    "gpt2": ("GPT2Config", {"dtype": "float32"}),  # transformers' defaults are this model
}
"""Shapes known by name, from the models' public cards: transformers' config class and what matters of its fields."""


@dataclass(frozen=True)
class Architecture:
    """A base's shape. name: as given. parameters: the base's, tied ones counted once. dtype: as its config says, else bfloat16."""

    name: str
    spec: Spec
    parameters: int
    dtype: torch.dtype


def read_architecture(name: str, quantize: str | None = None) -> Architecture:
    """The shape of a base: a name in `PRESETS` (the bundled base's among them), a folder or its config.json, a .gguf file, or a hub id.

    quantize: a format that its layers are packed in while it is loaded.

    Only the config is read; the model is built on the meta device, without weights. BaseError if there is no such base, or its family is
    not supported.
    """
    with quiet_transformers():
        whole = _read_config(name)
        settings, config = settings_of(whole, _folder_of(name)), without_settings(text_config(whole))
        try:
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except Exception as error:  # sizes that do not fit each other, not a causal LM: transformers' text says which
            raise _unreadable(name, error) from error
    spec = read_spec(model)
    refuse_packed(quantize, settings, name)
    if settings is not None or quantize is not None:
        check_quantize(quantize, name)
        if quantize == GGUF:  # the blocks of the whole file, of which the layers are the most
            bits = 8 * Path(name).stat().st_size / spec.num_parameters
        else:
            bits = BITS[quantize] if quantize is not None else bits_of(settings or {})
        spec = spec.packed(bits) if settings is None else spec.packed(bits, kinds_of(settings))
    stored = getattr(config, "dtype", None)
    return Architecture(name, spec, spec.num_parameters, stored if isinstance(stored, torch.dtype) else torch.bfloat16)


def _read_config(name: str) -> Any:
    if name in PRESETS:
        cls, fields = PRESETS[name]
        return getattr(transformers, cls)(**fields)
    path = user_path(name, BaseError, "base")
    options: dict[str, Any] = {"trust_remote_code": False}
    source: str | Path = name
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BaseError(f"the folder {name!r} has no config.json", fix="pass a folder that holds a base's config.json, or that file.")
        source = path
        _check(path / "config.json", name)
    elif path.is_file():
        source = path.parent if path.suffix.lower() == ".gguf" else path
        options |= {"gguf_file": path.name} if source != path else {}
        if source == path:
            _check(path, name)
        else:
            refuse_damage(path)
    elif not HUB_ID.fullmatch(name):
        raise _unknown(name, "neither a known name, nor a folder or file here, nor written like a hub id (org/name)")
    try:
        return transformers.AutoConfig.from_pretrained(source, **options)
    except Exception as error:  # no network, gated, not JSON, unknown model_type, code of its own: the text says which
        if source != name:
            raise _unreadable(name, error) from error
        raise _unknown(name, f"a hub id whose config could not be had: {_first_line(error)}") from error


def _folder_of(name: str) -> Path | None:
    """The folder that a config is read from, where it is one here."""
    if name in PRESETS:
        return None
    path = user_path(name, BaseError, "base")
    found = path if path.is_dir() else path.parent if path.is_file() and path.suffix.lower() == ".json" else None
    return found if found is not None and (found / "config.json").is_file() else None


def _check(config: Path, name: str) -> None:
    """BaseError if a config is no JSON of the size that a config has, or says of packed layers what nobody can read."""
    try:
        problems = packing_problems(read_json(config))
    except ValueError as error:
        raise BaseError(f"the config of {name!r} cannot be read: {error}", fix="fetch the file anew.") from error
    if problems:
        raise BaseError(f"the config of {name!r} cannot be read: {problems[0]}", fix="fetch the file anew.")


def _unknown(name: str, why: str) -> BaseError:
    hint = nearest(name.rpartition("/")[2].lower(), PRESETS)
    return BaseError(
        f"there is no architecture {name!r}{hint}",
        problems=[why],
        fix=f"use one of {', '.join(PRESETS)}; a folder or a config.json (offline, fetch that one file elsewhere: no weights are needed); "
        "or a hub id.",
    )


def _unreadable(name: str, error: Exception) -> BaseError:
    return BaseError(
        f"transformers cannot build a causal language model from the config of {name!r}: {_first_line(error)}",
        fix="use the config.json of a causal language model whose architecture transformers has built in; code that comes with a model is "
        "never run.",
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0][:300]}"
