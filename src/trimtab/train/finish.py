"""The end of a run: trained adapters, their scores beside the base, the run folder's files."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from typing import Any, Literal

import torch

from trimtab.data.labels import labels_among
from trimtab.errors import first_of
from trimtab.forward.batch import BASE
from trimtab.forward.packs import Mix
from trimtab.objectives import Objective
from trimtab.rewards.asked import Rewarded
from trimtab.store import Adapter
from trimtab.train.evaluate import Contestant, HeldOut, Judge, Results, ask, samples, write_predictions
from trimtab.train.full import FullVariant
from trimtab.train.listen import Listener
from trimtab.train.prepare import Prepared
from trimtab.train.report import peak_memory_gb, variant_summary
from trimtab.train.rewarding import Rewarding
from trimtab.train.variant import Variant

Scores = dict[str, dict[str, Any]]
"""data set -> contestant ("base" or a variant) -> scores"""


def adapter_of(prepared: Prepared, variant: Variant) -> Adapter:
    """The trained adapter, as it is saved and served."""
    method, params = variant.method.export(variant.trained())
    return Adapter(prepared.base, method, params, head=variant.head)


def test_rows(prepared: Prepared) -> dict[str, HeldOut]:
    """The test rows of each data set that has some. Read before training, so that rows which cannot be asked stop a run at its start."""
    return {name: held_out(prepared, name, "test") for name, splits in prepared.data.items() if splits.test}


def evaluate(
    prepared: Prepared,
    adapters: dict[str, Adapter],
    lost: Container[str],
    held: dict[str, HeldOut],
    rewarded: Rewarded,
    listener: Listener,
) -> Scores:
    """Scores of the base and of all variants that are not lost on test rows; their predictions go into the run folder."""
    run, base = prepared.run, prepared.base
    mix, numbers = base.mix(list(adapters.values()))
    member = dict(zip(adapters, numbers, strict=True))
    generates = run.evaluate.generate
    fields = {name: [Contestant("base", BASE, generates, objective=_shared(prepared, name))] for name in held}
    for v in prepared.variants:
        if v.name in member and v.config.data in held:
            fields[v.config.data].append(Contestant(v.name, member[v.name], generates, objective=v.config.objective))

    def on_answer(n: int) -> None:
        listener.status(f"scoring on held-out rows: {n} tokens")

    judge = Judge(
        base.tokenizer,
        base.stop_ids,
        run.evaluate.max_new_tokens,
        run.max_tokens,
        on_answer,
        base.attached,
        Rewarding(base, rewarded),
        prepared.place,
    )
    results = judge.judge(base.attached, mix, fields, held)
    for v in prepared.variants:
        if isinstance(v, FullVariant) and v.name not in lost and (data := v.config.data) in held:
            alone = Contestant(v.name, BASE, generates, objective=v.config.objective)
            results[data] |= judge.judge(v.attached, Mix([]), {data: [alone]}, held)[data]
    return _scores(prepared, results)


def _shared(prepared: Prepared, data: str) -> Objective | None:
    """The objective of a data set's variants, by which the base is scored too; None where they differ, since such losses do not compare,
    and where they read a head, which the base has not."""
    first, *others = [v.config.objective for v in prepared.variants if v.config.data == data]
    return first if all(o == first for o in others) and not first.reads_head else None


def _scores(prepared: Prepared, results: Results) -> Scores:
    """The scores with their first predictions, and the path of all of them in the run folder."""
    paths = prepared.place.once(lambda: write_predictions(prepared.run.out / "predictions", results))
    scored: Scores = {}
    for data, by_name in results.items():
        for name, result in by_name.items():
            path = paths.get((data, name))
            kept = {"predictions": str(path.relative_to(prepared.run.out))} if path else {}
            scored.setdefault(data, {})[name] = result.scores | kept | {"samples": samples(result.predictions)}
    return scored


def held_out(prepared: Prepared, name: str, split: Literal["valid", "test"]) -> HeldOut:
    """A data set's valid or test rows: to measure the loss on, and as questions to answer. DataError where labels do not fit them."""
    run, config, dataset = prepared.run, prepared.run.data[name], getattr(prepared.data[name], split)
    assert dataset is not None
    labels = [] if any(v.objective.reads_head for v in run.variants if v.data == name) else config.labels or []
    if labels == "auto":
        labels = labels_among(prepared.data[name].answers, f"data.{name}")
    base, where, examples = prepared.base, f"data.{name}.{split}", dataset.examples[: run.evaluate.max_rows]
    held = ask(examples, dataset.rows, labels, base.tokenizer, where, base.spec.vocab_size)
    return replace(held, references=prepared.references.get((name, split), {}))


def save(prepared: Prepared, adapters: dict[str, Adapter]) -> tuple[dict[str, int], dict[str, str]]:
    """Save every variant in the run folder, before scoring, which may take long. Returns the bytes of each one's tensors on disk, and for
    each one that cannot be saved, why."""
    sizes, lost = dict[str, int](), dict[str, str]()
    for v in prepared.variants:
        folder = prepared.run.out / "adapters" / v.name
        tensors = v.weights if isinstance(v, FullVariant) else adapters[v.name].params
        odd = [name for name, t in tensors.items() if not bool(torch.isfinite(t).all())]
        if odd:
            lost[v.name] = f"cannot be saved: values that are not finite in {', '.join(first_of(odd, 3))}"
            continue
        if isinstance(v, FullVariant):
            v.save(folder, prepared.base.tokenizer)
        else:
            adapters[v.name].save(folder, run=_provenance(prepared, v, {}))
        sizes[v.name] = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    return sizes, lost


def note_scores(prepared: Prepared, adapters: dict[str, Adapter], scored: Scores) -> None:
    """Write the scores beside each adapter."""
    for v in prepared.variants:
        if v.name in adapters:
            adapters[v.name].save(prepared.run.out / "adapters" / v.name, run=_provenance(prepared, v, scored))


def _provenance(prepared: Prepared, v: Variant, scored: Scores) -> dict[str, Any]:
    """What trimtab.json says of how an adapter came to be."""
    scores = scored.get(v.config.data, {})
    metrics, before = ({k: x for k, x in scores.get(n, {}).items() if k not in ("samples", "predictions")} for n in (v.name, "base"))
    options = v.config.options.model_dump() | {"lr": v.config.lr, "seed": v.seed} | v.config.aim
    digest = prepared.data[v.config.data].train.digest
    told = {"metrics": metrics, "base_metrics": before}
    return {"variant": v.name, "options": options, "steps": v.progress.step, "data_digest": digest} | told


def summarise(prepared: Prepared, scored: Scores, sizes: dict[str, int], seconds: float, fingerprints: dict[str, str]) -> dict[str, Any]:
    """summary.json. seconds: the time of all steps. fingerprints: of the base's tensors before and after."""
    run, base, variants = prepared.run, prepared.base, prepared.variants
    tokens = sum(v.progress.tokens for v in variants)
    return {
        "base": base.name or run.base,  # one that is loaded already is used whatever the run file names
        "base_parameters": base.spec.num_parameters,
        "base_bytes": base.spec.weight_bytes(base.dtype),
        "base_fingerprint": fingerprints,
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": str(base.device),
        "seconds": round(seconds, 3),
        "tokens": tokens,
        "tokens_per_s": round(tokens / seconds, 1) if seconds else None,
        "peak_memory_gb": round(peak_memory_gb(base.device), 3),
        "base_scores": {d: by_name["base"] for d, by_name in scored.items() if "base" in by_name},
        "variants": {
            v.name: variant_summary(v, scored.get(v.config.data, {}).get(v.name, {}), sizes.get(v.name, 0))
            | (_validation(v) if v.name in sizes else {"saved_step": None})
            for v in variants
        },
    }


def _validation(v: Variant) -> dict[str, Any]:
    """What validation said of a variant. saved_step: the step whose tensors are saved."""
    p, o = v.progress, v.config.options
    if not p.valid:
        return {"saved_step": p.step}
    best: dict[str, Any] = {
        "metric": o.valid_metric,
        "best": p.best_metric,
        "best_step": p.best_step,
        "finished_early": p.finished_early or None,
    }
    tied = [x["step"] for x in p.valid if x[o.valid_metric] == p.best_metric and x["step"] != p.best_step]
    best |= {"tied_steps": tied} if tied and p.best_metric is not None else {}
    kept = o.keep_best and p.best_metric is not None
    return {"saved_step": p.best_step if kept else p.step, "valid": best | {"base": p.base_valid, "history": p.valid}}
