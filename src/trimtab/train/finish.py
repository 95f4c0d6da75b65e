"""The end of a run: trained adapters, their scores beside the base, the run folder's files."""

from __future__ import annotations

from typing import Any

from trimtab.batch import BASE
from trimtab.data import Example, prompt_and_reference, read_source
from trimtab.store import Adapter
from trimtab.train.evaluate import Contestant, Question, compare
from trimtab.train.full import FullVariant
from trimtab.train.listen import Listener
from trimtab.train.prepare import Prepared
from trimtab.train.report import peak_memory_gb, variant_summary
from trimtab.train.variant import Variant

Scores = dict[str, dict[str, Any]]
"""data set -> contestant ("base" or a variant) -> scores"""


def adapter_of(prepared: Prepared, variant: Variant) -> Adapter:
    """The trained adapter, as it is saved and served."""
    method, params = variant.method.export(variant.trained())
    return Adapter(prepared.base, method, params)


def evaluate(prepared: Prepared, adapters: dict[str, Adapter], listener: Listener) -> Scores:
    """Scores of the base and of all variants, for the data sets that have test rows."""
    run, base = prepared.run, prepared.base
    held_out = {name: _held_out(prepared, name) for name, splits in prepared.data.items() if splits.test}
    mix, numbers = base.mix(list(adapters.values()))
    member = dict(zip(adapters, numbers, strict=True))
    fields = {name: [Contestant("base", BASE)] for name in held_out}
    for v in prepared.variants:
        if v.name in member and v.config.data in held_out:
            fields[v.config.data].append(Contestant(v.name, member[v.name]))

    def decode(ids: list[int]) -> str:
        return str(base.tokenizer.decode(ids, skip_special_tokens=True))

    def on_answer(n: int) -> None:
        listener.status(f"scoring on held-out rows: {n} tokens")

    def compared(attached: Any, who: dict[str, list[Contestant]]) -> Scores:
        limits = run.evaluate.max_new_tokens, run.max_tokens
        return compare(attached, mix, who, held_out, base.stop_ids, decode, *limits, on_answer)

    scored = compared(base.attached, fields)
    for v in prepared.variants:
        if isinstance(v, FullVariant) and v.config.data in held_out:
            scored[v.config.data] |= compared(v.attached, {v.config.data: [Contestant(v.name, BASE)]})[v.config.data]
    return scored


def _held_out(prepared: Prepared, name: str) -> tuple[list[Example], list[Question]]:
    """A data set's test rows: to measure the loss on, and as questions to answer."""
    run, test = prepared.run, prepared.data[name].test
    assert test is not None
    examples = test.examples[: run.evaluate.max_rows]
    if not run.evaluate.generate:
        return examples, []
    rows = {row.origin: row for source in run.data[name].test for row in read_source(source, run.root)[0]}
    return examples, [Question(*prompt_and_reference(rows[e.origin], prepared.base.tokenizer)) for e in examples]


def save(prepared: Prepared, adapters: dict[str, Adapter], scored: Scores) -> dict[str, int]:
    """Save every variant in the run folder; returns the bytes of each one's tensors on disk."""
    sizes = {}
    for v in prepared.variants:
        folder = prepared.run.out / "adapters" / v.name
        if isinstance(v, FullVariant):
            v.save(folder, prepared.base.tokenizer)
        else:
            adapters[v.name].save(folder, run=_provenance(prepared, v, scored))
        sizes[v.name] = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    return sizes


def _provenance(prepared: Prepared, v: Variant, scored: Scores) -> dict[str, Any]:
    """What trimtab.json says of how an adapter came to be."""
    metrics = {k: x for k, x in scored.get(v.config.data, {}).get(v.name, {}).items() if k != "samples"}
    options = v.config.options.model_dump() | {"lr": v.config.lr, "seed": v.seed}
    digest = prepared.data[v.config.data].train.digest
    return {"variant": v.name, "options": options, "steps": v.progress.step, "data_digest": digest, "metrics": metrics}


def summarise(prepared: Prepared, scored: Scores, sizes: dict[str, int], seconds: float, fingerprints: dict[str, str]) -> dict[str, Any]:
    """summary.json. seconds: the time of all steps. fingerprints: of the base's tensors before and after."""
    run, base, variants = prepared.run, prepared.base, prepared.variants
    tokens = sum(v.progress.tokens for v in variants)
    return {
        "base": run.base,
        "base_parameters": base.spec.num_parameters,
        "base_bytes": sum(p.numel() * p.element_size() for p in base.model.parameters()),
        "base_fingerprint": fingerprints,
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": str(base.device),
        "seconds": round(seconds, 3),
        "tokens": tokens,
        "tokens_per_s": round(tokens / seconds, 1) if seconds else None,
        "peak_memory_gb": round(peak_memory_gb(base.device), 3),
        "base_scores": {d: by_name["base"] for d, by_name in scored.items() if "base" in by_name},
        "variants": {v.name: variant_summary(v, scored.get(v.config.data, {}).get(v.name, {}), sizes[v.name]) for v in variants},
    }
