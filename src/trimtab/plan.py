"""What a method costs on a base, computed from the architecture alone: parameters, file sizes, memory. No weights are read or allocated.

    plan(read_architecture("llama-2-7b"), LoraConfig(r=16, target_modules=["q_proj", "v_proj"])).trainable    # 8_388_608

Parameters and file sizes are exact: the sum over `method.sites(spec)`, which is what a real attach makes. Memory is an estimate: a sum of
the terms that `plan` and `activation_bytes` spell out. Sizes are bytes; MB and GB, where shown, are 10⁶ and 10⁹.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from trimtab.bases import resolve_dtype
from trimtab.bases.locate import HUB_ID
from trimtab.bases.progress import quiet_transformers
from trimtab.errors import BaseError, ConfigError, nearest
from trimtab.methods import FullConfig, Method
from trimtab.methods.base import Site
from trimtab.spec import Module, Spec, read_spec

QUERY_BLOCK, LOSS_ROWS = 256, 1024
"""Queries of one attention block, logits alive at a time: those of `ops`, which a test compares."""
MOMENT_BYTES = 8
"""AdamW's two fp32 moments of one trainable parameter."""


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

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one stored parameter."""
        return self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """One method on one base. `variants` adapters train, or are served, together; all else is as the names say.

    Of one adapter: trainable (numbers), adapter_file_bytes (fp32, as saved), adapter_file_bytes_bf16.
    Of training all variants: base_bytes, weight_bytes (adapters in fp32 and packed), gradient_bytes, optimizer_bytes, activation_bytes;
    their sum is train_peak_bytes. Of serving them all: serve_adapter_bytes, serve_kv_bytes (of batch_tokens tokens); serve_peak_bytes also
    holds the base and work space.
    full: the same of full fine-tuning, None where the method is that.
    """

    base: str
    method: str
    hyperparameters: Mapping[str, Any]
    dtype: str
    batch_tokens: int
    sequence_length: int
    variants: int
    base_parameters: int
    trainable: int
    adapter_file_bytes: int
    adapter_file_bytes_bf16: int
    base_bytes: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    train_peak_bytes: int
    serve_adapter_bytes: int
    serve_kv_bytes: int
    serve_peak_bytes: int
    full: Plan | None = None

    @property
    def percent(self) -> float:
        """Trainable parameters, % of the base's."""
        return 100.0 * self.trainable / self.base_parameters

    def row(self) -> dict[str, Any]:
        """What a table of plans shows, as plain numbers: method, trainable, percent, and bytes."""
        shown = ("method", "trainable", "percent", "adapter_file_bytes", "optimizer_bytes", "train_peak_bytes", "serve_peak_bytes")
        return {name: getattr(self, name) for name in shown}

    def to_dict(self) -> dict[str, Any]:
        """All fields and percent, as plain JSON values."""
        return dataclasses.asdict(self) | {"percent": self.percent, "full": self.full.to_dict() if self.full else None}


def rows(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """One `Plan.row` for each plan, in their order."""
    return [p.row() for p in plans]


# ---- the architecture ------------------------------------------------------------


def read_architecture(name: str) -> Architecture:
    """The shape of a base: a name in `PRESETS` (the bundled base's among them), a folder or its config.json, a .gguf file, or a hub id.

    Only the config is read; the model is built on the meta device, without weights. BaseError where there is no such base, or its family is
    not supported.
    """
    with quiet_transformers():
        config = _read_config(name)
        try:
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except Exception as error:  # sizes that do not fit each other, not a causal LM: transformers' text says which
            raise _unreadable(name, error) from error
    spec = read_spec(model)
    stored = getattr(config, "dtype", None)
    return Architecture(name, spec, spec.num_parameters, stored if isinstance(stored, torch.dtype) else torch.bfloat16)


def _read_config(name: str) -> Any:
    if name in PRESETS:
        cls, fields = PRESETS[name]
        return getattr(transformers, cls)(**fields)
    path = Path(name).expanduser()
    options: dict[str, Any] = {"trust_remote_code": False}
    source: str | Path = name
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BaseError(f"the folder {name!r} has no config.json", fix="pass a folder that holds a base's config.json, or that file.")
        source = path
    elif path.is_file():
        source = path.parent if path.suffix.lower() == ".gguf" else path
        options |= {"gguf_file": path.name} if source != path else {}
    elif not HUB_ID.fullmatch(name):
        raise _unknown(name, "neither a known name, nor a folder or file here, nor written like a hub id (org/name)")
    try:
        return transformers.AutoConfig.from_pretrained(source, **options)
    except Exception as error:  # no network, gated, not JSON, unknown model_type, code of its own: the text says which
        if source != name:
            raise _unreadable(name, error) from error
        raise _unknown(name, f"a hub id whose config could not be had: {_first_line(error)}") from error


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


# ---- the plan ------------------------------------------------------------


def plan(
    architecture: Architecture,
    method: Method,
    *,
    dtype: str = "bfloat16",
    batch_tokens: int = 4096,
    sequence_length: int = 512,
    variants: int = 1,
) -> Plan:
    """What `method` costs on `architecture`. dtype: the base's, or "auto": as stored. batch_tokens: rows of a step, all variants together.

    With P trainable parameters of an adapter, N of the base, b bytes of dtype, n variants:

        adapter:  base N·b,  weights n·P·(4 + b),  gradients n·4·P,  optimizer n·8·P,  activations: see `activation_bytes`
        full:     base N·b,  gradients N·b,  optimizer N·8, and N·4 more for an fp32 master copy where b < 4; n train one after another

    Serving: base + n adapters as they lie in memory (b for each number; a prefix or prompt as keys and values) + keys and values of
    batch_tokens tokens + work space of a forward of batch_tokens rows; n fully fine-tuned models share no base. ConfigError where the
    method does not fit the base, or a number is out of range.
    """
    _check(architecture.spec, batch_tokens=batch_tokens, sequence_length=sequence_length, variants=variants)
    resolved = resolve_dtype(dtype, torch.device("cpu"))
    kept = resolved if isinstance(resolved, torch.dtype) else architecture.dtype
    compute = _plan_full if isinstance(method, FullConfig) else _plan_adapter
    options: dict[str, Any] = {"dtype": dtype, "batch_tokens": batch_tokens, "sequence_length": sequence_length, "variants": variants}
    full = None if isinstance(method, FullConfig) else plan(architecture, FullConfig(), **options)
    costs = compute(architecture.spec, method, kept, batch_tokens, sequence_length, variants)
    training = ("base_bytes", "weight_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes")
    return Plan(
        base=architecture.name,
        method=method.name,
        hyperparameters=method.to_dict(),
        dtype=str(kept).removeprefix("torch."),
        batch_tokens=batch_tokens,
        sequence_length=sequence_length,
        variants=variants,
        base_parameters=architecture.parameters,
        train_peak_bytes=sum(costs[name] for name in training),
        full=full,
        **costs,
    )


def _check(spec: Spec, **numbers: int) -> None:
    problems = [f"{name} = {value}: must be at least 1" for name, value in numbers.items() if value < 1]
    if numbers["sequence_length"] > spec.max_positions:
        problems.append(f"sequence_length = {numbers['sequence_length']}: this base has {spec.max_positions} positions")
    if problems:
        raise ConfigError("this plan cannot be made", problems=problems)


def _plan_adapter(spec: Spec, method: Method, dtype: torch.dtype, tokens: int, length: int, variants: int) -> dict[str, int]:
    sites = method.sites(spec)
    params = {site.key(name): torch.empty(shape, device="meta") for site in sites for name, shape in site.shapes.items()}
    trainable = sum(t.numel() for t in params.values())
    saved_method, saved = method.export(params)
    prefix = saved_method.prefix(spec, saved, dtype)
    key_of = "{}" if prefix else "base_model.model.{}"  # peft's names
    shapes = {key_of.format(name): tuple(t.shape) for name, t in saved.items()}
    kv = 2 * spec.num_layers * spec.kv_width * dtype.itemsize
    base, b = spec.num_parameters * dtype.itemsize, dtype.itemsize
    resident = variants * (prefix.length * kv if prefix else b * sum(t.numel() for t in saved.values()))
    virtual = prefix.length if prefix else 0
    computed = variants * virtual if prefix and prefix.embeds_NH is not None else 0  # a prompt's embeddings are rows of the batch
    return {
        "trainable": trainable,
        "adapter_file_bytes": file_bytes(shapes, torch.float32),
        "adapter_file_bytes_bf16": file_bytes(shapes, torch.bfloat16),
        "base_bytes": base,
        "weight_bytes": variants * trainable * (4 + b),
        "gradient_bytes": variants * trainable * 4,
        "optimizer_bytes": variants * trainable * MOMENT_BYTES,
        "activation_bytes": activation_bytes(spec, sites, dtype, tokens + computed, length, virtual=virtual),
        "serve_adapter_bytes": resident,
        "serve_kv_bytes": tokens * kv,
        "serve_peak_bytes": base + resident + tokens * kv + _forward_bytes(spec, b, tokens, length),
    }


def _plan_full(spec: Spec, method: Method, dtype: torch.dtype, tokens: int, length: int, variants: int) -> dict[str, int]:
    sites = [Site(m.name, m.parameters, saved=True) for m in spec.modules.values()]
    shapes = {s.key(name): shape for s in sites for name, shape in s.shapes.items() if not (spec.tied_head and s.name == spec.family.head)}
    n, b = spec.num_parameters, dtype.itemsize
    kv = tokens * 2 * spec.num_layers * spec.kv_width * b
    return {
        "trainable": n,
        "adapter_file_bytes": file_bytes(shapes, torch.float32),
        "adapter_file_bytes_bf16": file_bytes(shapes, torch.bfloat16),
        "base_bytes": n * b,
        "weight_bytes": 0,
        "gradient_bytes": n * b,
        "optimizer_bytes": n * (MOMENT_BYTES + (4 if b < 4 else 0)),
        "activation_bytes": activation_bytes(spec, sites, dtype, tokens, length),
        "serve_adapter_bytes": variants * n * b,
        "serve_kv_bytes": kv,
        "serve_peak_bytes": variants * n * b + kv + _forward_bytes(spec, b, tokens, length),
    }


def file_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Size of a safetensors file of tensors of these names and shapes, all of one dtype: 8 bytes, the JSON header padded to 8, the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    code, at = {4: "F32", 2: "BF16"}[dtype.itemsize], 0
    for name, shape in sorted(shapes.items()):
        stop = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    return 8 + math.ceil(len(json.dumps(header, separators=(",", ":"))) / 8) * 8 + at


# ---- activations ------------------------------------------------------------


def activation_bytes(spec: Spec, sites: Sequence[Site], dtype: torch.dtype, tokens: int, length: int, *, virtual: int = 0) -> int:
    """Bytes of activations at the peak of a step of `tokens` rows in sequences of `length`: what the layers keep (`kept_bytes`), the
    supervised rows' hidden states and their gradient, 2·b·H a row (all rows taken as supervised), and the largest of three passing things:

        head       LOSS_ROWS rows of logits, twice in fp32 (logsumexp makes a copy), twice more where they are soft-capped
        attention  in one layer's backward, a block of queries: fp32 probabilities, their gradient, the product of both, and that in dtype
        MLP        in one layer's backward, the gradients of 3·M + 2·H features a row

    An allocator's slack is not counted: measured on the bundled base on a CPU, real peaks are 6–12% above, and up to 25% where glibc's heap
    keeps what was freed.
    """
    b, inner = dtype.itemsize, _mlp(spec)[0]
    capped = 8 if spec.final_softcap is not None else 0
    head = min(tokens, LOSS_ROWS) * spec.vocab_size * (8 + capped)
    attention = tokens * spec.num_heads * min(length, QUERY_BLOCK, tokens) * (12 + b)
    mlp = tokens * b * (3 * inner + 2 * spec.hidden_size)
    kept = kept_bytes(spec, sites, dtype, tokens, length, virtual=virtual)
    return kept + tokens * 2 * b * spec.hidden_size + max(head, attention, mlp)


def kept_bytes(spec: Spec, sites: Sequence[Site], dtype: torch.dtype, tokens: int, length: int, *, virtual: int = 0) -> int:
    """Bytes that the layers keep between forward and backward. For each row, in each layer from the first that an adapter touches:

        norms      4·width each for an RMSNorm, which computes in fp32; b·width for a LayerNorm
        attention  b·(2·A + 2·K): queries, keys, values, output; scores are formed again in the backward. Keys and values also for
                   `virtual` tokens before each sequence
        MLP        b·3·M where gated (gate, its activation, up), b·4·M where not (GPT-2's tanh-GELU)
        edits      b·width of what their tensors must remember: see `_remembered`

    b bytes of dtype, A heads·head_dim, K kv_heads·head_dim, M the MLP's inner width. A frozen linear keeps nothing. Sequences are taken as
    equally long, so nothing is padded; the first layer is counted whole, though an adapter behind its attention needs less of it.
    """
    b, width, (inner, gated) = dtype.itemsize, spec.num_heads * spec.head_dim, _mlp(spec)
    first = min((_layer(spec, s.name) for s in sites), default=0)
    live = spec.num_layers - first
    norms = [m for m in spec.modules.values() if m.kind == "norm" and m.layer is not None and m.layer >= first]
    norm_bytes = sum(_norm_width(spec, m) * (b if "bias" in m.parameters else 4) for m in norms)
    per_row = norm_bytes + live * b * (2 * width + (3 if gated else 4) * inner) + b * _remembered(spec, sites)
    return tokens * per_row + live * 2 * b * spec.kv_width * (tokens + virtual * math.ceil(tokens / length))


def _forward_bytes(spec: Spec, b: int, tokens: int, length: int) -> int:
    """Work space of a forward that keeps nothing: hidden states, one MLP or one block of attention, a row of logits for each sequence."""
    sequences = math.ceil(tokens / length)
    attention = tokens * (spec.num_heads * min(length, QUERY_BLOCK, tokens) * 8 + b * 2 * spec.num_heads * spec.head_dim)
    return tokens * 2 * b * spec.hidden_size + max(tokens * b * 3 * _mlp(spec)[0], attention) + sequences * spec.vocab_size * 4


def _mlp(spec: Spec) -> tuple[int, bool]:
    """(M, gated): the MLP's inner width, which its last linear reads, and whether what comes before makes two of them."""
    linears = [m for m in spec.modules.values() if m.kind in ("linear", "conv1d") and m.name.startswith(spec.mlps[0] + ".")]
    inner = linears[-1].in_features
    return inner, sum(m.out_features for m in linears[:-1]) >= 2 * inner


def _norm_width(spec: Spec, module: Module) -> int:
    """Features of one row that a norm sees; those of queries and keys run head by head."""
    return module.out_features * {"q_norm": spec.num_heads, "k_norm": spec.num_kv_heads}.get(module.name.rpartition(".")[2], 1)


def _layer(spec: Spec, name: str) -> int:
    """The first layer whose activations an adapter at `name` needs: its own, 0 before all (prefixes too), the number of layers behind."""
    prefix = spec.family.layers + "."
    if name.startswith(prefix):
        return int(name.removeprefix(prefix).partition(".")[0])
    module = spec.modules.get(name)
    return 0 if module is None or module.kind == "embedding" else spec.num_layers


def _remembered(spec: Spec, sites: Sequence[Site]) -> int:
    """Features of one row that the edits keep, told from shapes alone: a matrix [out, in] keeps its input, a scale (a vector, or a matrix
    with a side of 1) what it scales, a bias nothing. Modules of a block that read the same input (q, k, v; gate, up) keep it once. Prefixes
    keep nothing here."""
    total, inputs = 0, set()
    for site in (s for s in sites if s.name):
        module = spec.modules.get(site.name)
        if module is not None and module.kind == "embedding":
            total += site.rank  # token ids weigh nothing
            continue
        for name, shape in site.shapes.items():
            if name.rpartition(".")[2] == "bias":
                continue
            if len(shape) == 1 or (1 in shape and not site.rank and not site.saved):
                total += _norm_width(spec, module) if module is not None and module.kind == "norm" else max(shape)
                continue
            width = shape[0] if site.saved and module is not None and module.kind == "conv1d" else shape[-1]
            if module is None or width != module.in_features:
                total += width
            elif (key := (site.name.rpartition(".")[0], site.name in spec.attention_outputs, width)) not in inputs:
                inputs.add(key)
                total += width
    return total
