"""Merge an adapter into the base's weights, and write the result as a model folder that needs neither adapter nor trimtab.

The base in memory is not touched. Its stored weights are read again, merged in fp32, rounded once to the dtype that they are stored in,
written beside the target, read back, and compared with base and adapter on token sequences, with both computed in fp32. Only then does
the folder get its name.

Weights are mapped from files, and a merged matrix takes the place of its pages. The comparison makes fp32 weights layer by layer.
So about one copy of the stored weights is in memory at a time.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.bases.by_layer import in_float32_by_layer
from trimtab.bases.copies import copied
from trimtab.bases.progress import quiet_transformers
from trimtab.bases.quantization_notes import quantization_settings
from trimtab.bases.text_tower import load_causal
from trimtab.bases.weights import Weight, claimed, norm_weight, weight_of
from trimtab.bases.weights.dense import Dense
from trimtab.bases.weights.experts import Experts
from trimtab.errors import NotMergeable
from trimtab.methods import Method
from trimtab.methods.base import Site
from trimtab.model import Base
from trimtab.store.staging import staged

if TYPE_CHECKING:
    from trimtab.store.in_memory import AdapterInMemory

AT_A_TIME = 2**22
"""Numbers of a matrix that are merged in fp32 at once, where its rows do not depend on each other."""
PROBE_LENGTHS = (1, 7, 24)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Largest RMS difference of logits, relative to the spread of the logits, that rounding the merged weights to a dtype explains."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    max_difference: of any logit, merged model against base with adapter. relative: RMS difference over the logits' spread. allowed: what
    `relative` may be at most, since the weights were rounded. dtype: of the written weights. untied: whether the output head got weights of
    its own, because the adapter changes it or the embedding. quantized: in which format the base was, if it was merged into the dense
    matrices of its folder.
    """

    folder: Path
    max_difference: float
    relative: float
    allowed: float
    dtype: str
    untied: bool
    quantized: str = ""


def merge_into(adapter: AdapterInMemory, folder: str | Path) -> MergeReport:
    """Write base + adapter as a model folder: config, generation config, tokenizer, safetensors.

    NotMergeable, and nothing left, where the method cannot be folded into weights or the written model does not compute what base and
    adapter do. AdapterError if the folder holds files already.
    """
    base = adapter.base
    if adapter.head is not None:
        raise NotMergeable(
            f"the adapter has a head of its own ({adapter.head.module}), and the base has no module for it",
            fix="use it beside the base: `trimtab score`, Base.scores",
        )
    method, params = adapter.method.export(adapter.params)
    sites = method.sites(base.spec)
    _refuse_unmergeable(base, method, sites)
    with staged(folder) as work, quiet_transformers():
        model = fresh_copy(base)
        untied = _untie(model, base, sites)
        sizes = {m.name: max(math.prod(shape) for shape in m.parameters.values()) for m in base.spec.modules.values()}
        for site in sorted(sites, key=lambda s: -sizes[s.name]):  # a large matrix gets its fp32 copy while the others are still in files
            tensors = {t: params[site.key(t)].detach().cpu() for t in site.shapes}
            if site.experts:
                _merge_experts(model, method, site, tensors)
            else:
                _merge_site(model.get_submodule(site.name), method, site, tensors, base.spec.model_type)
        dtype = model.dtype
        model.save_pretrained(work)
        if base.tokenizer is not None:
            base.tokenizer.save_pretrained(work)
        del model
        gc.collect()
        largest, relative = _difference(adapter, work)
        allowed = TOLERANCE.get(dtype, 0.0)
        if not relative <= allowed:
            raise NotMergeable(
                f"the merged model does not compute what base and adapter do: logits differ by up to {largest:.3g}, "
                f"{relative:.2%} of their standard deviation in RMS (allowed for {dtype}: {allowed:.2%})",
                fix="serve the adapter beside the base; or merge on the base loaded and stored in float32",
            )
    return MergeReport(Path(folder), largest, relative, allowed, str(dtype).removeprefix("torch."), untied, base.packed_as)


def _refuse_unmergeable(base: Base, method: Method, sites: list[Site]) -> None:
    if any(not s.name for s in sites):
        reason = f"a {method.name} adapter puts keys and values before token 0, and no weight of the base can stand for those"
        raise NotMergeable(reason, fix="serve the adapter beside the base")
    if not method.mergeable or method.invocation:
        site = sites[0]
        method.merge(site, torch.empty(0, dtype=torch.float32), None, {})  # raises, with the method's own reason
        raise NotMergeable(f"{method.name} adapters cannot be merged into the base")
    stored = {m.name for s in sites if (m := base.attached.weights.of.get(s.name)) is not None and not m.stored_dense}
    if stored and not _has_dense_source(base):
        raise NotMergeable(
            f"the base's weights are stored as {', '.join(sorted(stored))}: a merged matrix would have to be rounded to that anew",
            fix="merge on the same base unquantised (--base THAT --base-differs); or serve the adapter beside this one",
        )


def _has_dense_source(base: Base) -> bool:
    """Whether a base that is packed in memory was made of a folder whose matrices are dense."""
    return base.path is not None and quantization_settings(base.path) is None


def fresh_copy(base: Base) -> Any:
    """The base's weights once more, as they are stored, on the CPU, without hosts. They are mapped from the base's files, which are read as
    the weights are. A base that has no folder is copied as it is loaded."""
    return copied(base.model).cpu() if base.path is None else _read(base.path)


def fresh_in_float32(base: Base) -> Any:
    """The base's model once more in fp32 on the CPU, without hosts, holding the weights of one layer at a time (`bases.by_layer`)."""
    return in_float32_by_layer(base.model if base.path is None else _read(base.path)).eval()


def _read(folder: Path) -> Any:
    return load_causal(folder, dtype="auto")


def _untie(model: Any, base: Base, sites: list[Site]) -> bool:
    """Give a tied head its own weights if the adapter acts on the embedding or on the head, since it changes one of them only."""
    spec = base.spec
    if not spec.tied_head or not {spec.embedding, spec.head} & {s.name for s in sites}:
        return False
    weight_of(model.get_submodule(spec.head)).untie()
    model.config.tie_word_embeddings = False
    return True


@torch.no_grad()
def _merge_site(module: Any, method: Method, site: Site, params: dict[str, Tensor], model_type: str) -> None:
    bias, matrix = getattr(module, "bias", None), Dense(module) if site.router else claimed(module)
    if matrix is None:
        norm_H = norm_weight(module)
        merged, bias_O = method.merge(site, norm_H, bias, params)
        _finite(norm_H.copy_(merged), site)
    elif method.of_rows(site, params, slice(1)) is not None:
        _merge_rows(matrix, method, site, params)
        return
    else:
        merged, bias_O = method.merge(site, matrix.dense(), bias, params)
        matrix.write(merged)  # which rounds: there is no third matrix
        _finite(matrix.dense(), site)
    if bias is not None:
        assert bias_O is not None, f"{type(method).__name__}.merge lost the bias of {site.name}"
        _finite(bias.copy_(bias_O), site)
    elif bias_O is not None and bool(bias_O.any()):
        raise NotMergeable(
            f"{site.name} has no bias in this {model_type} base, and what the {method.name} adapter adds there is one",
            fix="serve the adapter beside the base",
        )


def _merge_rows(matrix: Weight, method: Method, site: Site, params: dict[str, Tensor]) -> None:
    """A few rows at a time: the matrix of a large vocabulary is never in memory in fp32."""
    count, width = matrix.shape
    step = max(1, AT_A_TIME // width)
    for first in range(0, count, step):
        rows = slice(first, min(first + step, count))
        part = method.of_rows(site, params, rows)
        assert part is not None
        merged, _ = method.merge(site, matrix.dense(rows), None, part)
        matrix.write(merged, rows)
    _finite(matrix.dense(), site)


@torch.no_grad()
def _merge_experts(model: Any, method: Method, site: Site, params: dict[str, Tensor]) -> None:
    """All experts of one parameter, in fp32 at once."""
    module, _, name = site.name.rpartition(".")
    experts = Experts(model.get_submodule(module), name)
    dense_EOI = torch.stack([experts.dense(e).float() for e in range(site.experts)])
    merged, _ = method.merge(site, dense_EOI, None, params)
    for e, weight_OI in enumerate(merged):
        experts.write(e, weight_OI)
        _finite(experts.dense(e), site)


def _finite(written: Tensor, site: Site) -> None:
    if not all(bool(torch.isfinite(end)) for end in torch.aminmax(written)):  # of a large matrix, `isfinite` makes three more
        raise NotMergeable(f"{site.name}: merged values do not fit {written.dtype}", fix="serve the adapter beside the base")


@torch.no_grad()
def _difference(adapter: AdapterInMemory, folder: Path) -> tuple[float, float]:
    """(largest, RMS relative to the logits' spread) difference of logits between the model in `folder` and the adapter on its base."""
    wanted = probed(in_float32(adapter))
    merged = Base(in_float32_by_layer(_read(folder)).eval(), adapter.base.tokenizer)
    return apart(merged.logits(probes(merged)), wanted)


def in_float32(adapter: AdapterInMemory) -> AdapterInMemory:
    """The same adapter on a base that computes in fp32 on the CPU: its own, or `fresh_in_float32`, whose matrices are those of the base's
    folder also where the base was quantised while it was loaded. In bf16 two right ways of computing a
    trained adapter may differ by a fifth of the logits' spread, which would hide a wrong weight and refuse right ones."""
    base = adapter.base
    if base.dtype == torch.float32 and base.device.type == "cpu" and not (base.packed_as and _has_dense_source(base)):
        return adapter
    with quiet_transformers():
        model = fresh_in_float32(base)
    exact = Base(model, base.tokenizer, name=base.name, path=base.path, fingerprint=base.fingerprint)
    return type(adapter)(exact, adapter.method, {k: t.detach().cpu() for k, t in adapter.params.items()}, verified=adapter.verified)


def probes(base: Base) -> list[list[int]]:
    """Sequences of token ids on which two ways of computing an adapter are compared."""
    generator = torch.Generator().manual_seed(0)
    lengths = [min(n, base.spec.max_positions) for n in PROBE_LENGTHS]
    return [torch.randint(base.spec.vocab_size, (n,), generator=generator).tolist() for n in lengths]


def probed(adapter: AdapterInMemory) -> list[Tensor]:
    """The logits of base and adapter on the probes, from the adapter's tensors as they are now."""
    sequences = probes(adapter.base)
    return adapter.base.logits(sequences, adapters=[adapter] * len(sequences))


def apart(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> tuple[float, float]:
    """(largest, RMS relative to the spread of `theirs`) difference of the logits of several sequences."""
    wanted = torch.cat(list(theirs)).float()
    difference = torch.cat(list(ours)).float() - wanted
    return float(difference.abs().max()), float(difference.square().mean().sqrt()) / (float(wanted.std()) or 1.0)
