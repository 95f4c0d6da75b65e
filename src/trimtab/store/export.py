"""Hand an adapter to another program: a plain folder for peft, a LoRA folder for vLLM, a merged model, a GGUF file for llama.cpp.

    peft     adapter_config.json and adapter_model.safetensors, as peft itself would write them
    vllm     the same for LoRA with one rank from vLLM's list and scaling 1 for all modules: what differs by module is folded into B and
             padded with zeros, since not every version of vLLM reads patterns
    gguf     adapter.gguf, LoRA on the linear layers of a Llama model
    merged   an ordinary model folder (`store.merge`)

What was written is read back before it gets its name: by trimtab, and by peft where it is installed and the format is its own. The logits
are compared with those of base and adapter in memory. None of these folders holds trimtab.json: what reads them knows nothing of it;
`Adapter.save` writes one that does.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as format_tensors
from torch import Tensor

from trimtab.bases.by_layer import held
from trimtab.bases.locate import HUB_ID
from trimtab.bases.progress import quiet_transformers
from trimtab.errors import AdapterError, ConfigError, nearest
from trimtab.methods import LoraConfig
from trimtab.methods.base import Site
from trimtab.model import Base
from trimtab.store.adapter import Adapter
from trimtab.store.card import VLLM_RANKS
from trimtab.store.config_write import config_from_method
from trimtab.store.factors import Factors, factors_of, lora_from_factors
from trimtab.store.folder import CONFIG, WEIGHTS
from trimtab.store.gguf_lora import GGUF, gguf_problems, read_gguf, write_gguf
from trimtab.store.merge import TOLERANCE, apart, fresh_in_float32, in_float32, merge_into, probed, probes
from trimtab.store.staging import staged
from trimtab.store.tensors import file_key

FORMATS = ("peft", "vllm", "merged", "gguf")
ALLOWED = TOLERANCE[torch.float32]
"""Difference of logits that is rounding: what is written has fp32 tensors, and both sides compute in fp32."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it was compared with base and adapter in memory.

    files: name -> bytes. rank: of all modules, where the format has one. checked: what read it back ("trimtab", "peft", …).
    relative: the largest RMS difference of logits over their spread that any of these showed; allowed: what it may be at most.
    """

    folder: Path
    format: str
    files: dict[str, int]
    rank: int | None
    checked: tuple[str, ...]
    relative: float
    allowed: float


def export(adapter: Adapter, folder: str | Path, format: str = "peft", *, base_name: str | None = None) -> ExportReport:
    """Write an adapter for another program (see above for the formats) into a new folder, read it back, compare.

    base_name: what adapter_config.json is to call the base: vLLM finds adapters by the name that it was given for its model. By default the
    base's hub id, else its folder.
    ConfigError for an unknown format. AdapterError, with every reason, if the format cannot hold the adapter, what was written does not
    compute what base and adapter do, or the folder holds files; NotMergeable for `merged`. Nothing is left behind then.
    """
    check_format(format)
    if format == "merged":
        merged = merge_into(adapter, folder)
        return ExportReport(merged.folder, format, _sizes(merged.folder), None, ("transformers",), merged.relative, merged.allowed)
    adapter = Adapter(adapter.base, *adapter.method.export(adapter.params), verified=adapter.verified, head=adapter.head)
    _refuse(adapter, format)
    with staged(folder) as work:
        if format == "gguf":
            plain = _uniform(adapter, _largest_rank(adapter))
            write_gguf(work / GGUF, plain, adapter.base.spec)
            checked, relative = _check_gguf(adapter, plain, work / GGUF)
        else:
            plain = adapter if format == "peft" else _uniform(adapter, next(r for r in VLLM_RANKS if r >= _largest_rank(adapter)))
            _write_plain(work, plain, base_name or _base_name(adapter.base))
            checked, relative = _check_folder(adapter, work)
        files = _sizes(work)
    rank = plain.sites[0].rank if format != "peft" else None
    return ExportReport(Path(folder), format, files, rank, checked, relative, ALLOWED)


def check_format(format: str) -> None:
    """ConfigError if there is no such format."""
    if format not in FORMATS:
        raise ConfigError(f"format = {format!r}{nearest(format, FORMATS)}", fix=f"one of {', '.join(FORMATS)}")


def _refuse(adapter: Adapter, format: str) -> None:
    """AdapterError, with every reason, if a format cannot hold an adapter."""
    if format == "peft":
        problems = [] if adapter.method.in_peft else [f"peft has no {adapter.method.name} adapters"]
        problems += [f"it has a head, whose folder peft reads as it is ({adapter.head.task})"] if adapter.head else []
        fix = "save it as it is"
    else:
        problems = _plain_lora_problems(adapter.method, adapter.sites, adapter.base)
        problems += (gguf_problems if format == "gguf" else _vllm_problems)(adapter)
        fix = (
            "merge it instead: format merged"
            if adapter.method.mergeable and not adapter.method.invocation
            else "serve it beside the base: `trimtab serve`"
        )
    if problems:
        raise AdapterError(f"this {adapter.method.name} adapter cannot be exported for {format}", problems=problems, fix=fix)


def _plain_lora_problems(method: Any, sites: Sequence[Site], base: Base) -> list[str]:
    """What other programs do not support: anything but two matrices beside a linear layer."""
    if not isinstance(method, LoraConfig):
        return [f"it knows LoRA, and this is {method.name}"]
    problems = ["it has no DoRA"] if method.use_dora else []
    problems += ["its LoRA is on for every token, and this aLoRA after its invocation tokens alone"] if method.invocation else []
    problems += ["its LoRA acts on modules, and this one also on parameters of experts"] if method.target_parameters else []
    problems += [f"it has no modules_to_save, and {s.name} was trained in full" for s in sites if s.saved]
    for site in sites:
        if not site.saved and site.name in (base.spec.embedding, base.spec.head):
            problems.append(f"its LoRA acts in the layers only, and {site.name} is outside")
    return problems


def _vllm_problems(adapter: Adapter) -> list[str]:
    problems = []
    if any(m.kind == "conv1d" for m in adapter.base.spec.modules.values()):
        problems.append(f"vLLM has no LoRA for {adapter.base.spec.model_type}")
    if isinstance(adapter.method, LoraConfig) and (rank := _largest_rank(adapter)) > VLLM_RANKS[-1]:
        problems.append(f"its largest rank is {VLLM_RANKS[-1]}, and this one has {rank}: compress it first")
    return problems


def _largest_rank(adapter: Adapter) -> int:
    return max(s.rank for s in adapter.sites if not s.saved)


def _uniform(adapter: Adapter, rank: int) -> Adapter:
    """The same LoRA with one rank everywhere and scaling 1: scaling folded into B, the rest zeros."""
    padded = {}
    for name, f in factors_of(adapter).items():
        more = rank - f.rank
        A, B = torch.nn.functional.pad(f.A_RI, (0, 0, 0, more)), torch.nn.functional.pad(f.B_OR, (0, more))
        padded[name] = Factors(A, B)
    return Adapter(adapter.base, *lora_from_factors(adapter.base, padded))


def _write_plain(work: Path, adapter: Adapter, base_name: str | None) -> None:
    config = config_from_method(adapter.method, adapter.sites, adapter.base.spec, base_name)
    tensors = {
        file_key(s, t): adapter.params[s.key(t)].detach().to("cpu", torch.float32).contiguous() for s in adapter.sites for t in s.shapes
    }
    (work / CONFIG).write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n", encoding="utf-8")
    (work / WEIGHTS).write_bytes(format_tensors(tensors, metadata={"format": "pt"}))


def _base_name(base: Base) -> str | None:
    if HUB_ID.fullmatch(base.name) and not Path(base.name).exists():
        return base.name
    return str(base.path) if base.path is not None else base.name or None


def _sizes(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in sorted(folder.iterdir())}


# ---- reading back ----


def _check_folder(adapter: Adapter, work: Path) -> tuple[tuple[str, ...], float]:
    """(who read the folder, the largest relative difference of logits). AdapterError if that is more than rounding explains."""
    exact = in_float32(adapter)
    wanted = probed(exact)
    found = {"trimtab": probed(Adapter.load(work, exact.base))}
    if find_spec("peft") is not None:
        found["peft"] = _by_peft(exact.base, work)
    return tuple(found), _compare({who: apart(logits, wanted) for who, logits in found.items()})


def _check_gguf(adapter: Adapter, plain: Adapter, file: Path) -> tuple[tuple[str, ...], float]:
    """The file's tensors, read by the gguf package and with llama.cpp's order of rows undone, in the place of the adapter's."""
    exact = in_float32(adapter)
    back = Adapter(exact.base, plain.method, read_gguf(file, plain, adapter.base.spec))
    return ("gguf",), _compare({"gguf": apart(probed(back), probed(exact))})


def _compare(found: dict[str, tuple[float, float]]) -> float:
    problems = [
        f"read by {who}, logits differ by up to {largest:.3g}, {relative:.2%} of their standard deviation in RMS (allowed: {ALLOWED:.2%})"
        for who, (largest, relative) in found.items()
        if not relative <= ALLOWED
    ]
    if problems:
        raise AdapterError("what was exported does not compute what base and adapter do, and was not kept", problems=problems)
    return max(relative for _, relative in found.values())


@torch.no_grad()
def _by_peft(base: Base, folder: Path) -> list[Tensor]:
    """Logits of the probes, from peft's reading of the folder on a fresh copy of the base with transformers' own attention."""
    from peft import PeftModel

    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft explains itself at length
        model = fresh_in_float32(base)
        outside = [model.get_input_embeddings(), model.get_output_embeddings()]  # peft's DoRA reads their weights where they do not run
        model = PeftModel.from_pretrained(model, str(folder)).eval()
        with held(*outside):
            return [model(input_ids=torch.tensor([i])).logits[0, -len(i) :] for i in probes(base)]
