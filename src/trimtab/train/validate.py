"""Validation while a run trains: measure variants on their valid rows, remember the best tensors, end a variant that no longer improves.

Everything that decides is in `variant.progress` and `variant.best`, so a checkpoint has it. It belongs to one variant alone, so a variant
ends at the same step alone and among others. Only a sweep's halving compares variants. Adapters are measured as they would be saved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trimtab.data import valid_json
from trimtab.errors import DataError
from trimtab.forward.attached import Attached
from trimtab.forward.batch import BASE
from trimtab.forward.packs import Mix
from trimtab.objectives import Counts
from trimtab.rewards.asked import Rewarded
from trimtab.train.ahead import Ahead, Held
from trimtab.train.evaluate import Contestant, HeldOut, Judge, Results
from trimtab.train.finish import adapter_of, held_out
from trimtab.train.full import FullVariant
from trimtab.train.halving import Halving, end_worst
from trimtab.train.listen import Listener
from trimtab.train.options import lower_is_better
from trimtab.train.prepare import Prepared
from trimtab.train.rewarding import Rewarding
from trimtab.train.sinks import Sink
from trimtab.train.variant import Variant


class Validator:
    """Validates a run's variants. rewarded: asks rewards. halving: ends the worst of them at its rungs. DataError where a data set's valid
    rows or labels cannot be judged; made before training begins."""

    def __init__(self, prepared: Prepared, rewarded: Rewarded, halving: Halving | None = None):
        self.prepared, self.halving, base, run = prepared, halving, prepared.base, prepared.run
        self.held: dict[str, HeldOut] = {name: held_out(prepared, name, "valid") for name, s in prepared.data.items() if s.valid}
        problems = [problem for v in prepared.variants if (problem := self.unfit(v))]
        if problems:
            raise DataError("these variants cannot be validated", problems=problems, fix="name another valid_metric, or other valid rows")
        self.judge = Judge(
            base.tokenizer,
            base.stop_ids,
            run.evaluate.max_new_tokens,
            run.max_tokens,
            base=base.attached,
            rewarding=Rewarding(base, rewarded),
            place=prepared.place,
        )

    def unfit(self, v: Variant) -> str | None:
        """Why the metric of a variant cannot be computed from its valid rows."""
        metric, held = v.config.options.valid_metric, self.held.get(v.config.data)
        where = f"variants.{v.name}.valid_metric = {metric!r}: data.{v.config.data}.valid"
        if held is not None and (why := v.config.objective.unjudged(metric, Counts.of(held.examples).segments_of)):
            return f"{where}: {why}"
        if held is None or not any(v.config.asks):
            return None
        references = [q.reference for q in held.questions]
        if not references:
            return f"{where} holds plain text, which has no answers to judge"
        if metric == "valid_json" and valid_json(references, references) < 100.0:
            return f"{where} has answers that are not JSON"
        return None

    def after_step(self, stepped: Iterable[Variant], metrics: Sink, listener: Listener) -> None:
        """Validate those of the variants that are due, all in one mixed pass; those that have ended go back to their best step."""
        due = [v for v in stepped if v.config.data in self.held and is_due(v)]
        if due:
            start = time.perf_counter()
            results = self._judge(due)
            seconds = round(time.perf_counter() - start, 4)
            lines = {v: record(v, _numbers(results[v.config.data][v.name].scores)) | {"seconds": seconds} for v in due}
            for v in end_worst(self.halving, due) if self.halving else ():
                lines[v]["finished_early"] = v.progress.finished_early
            for line in lines.values():
                metrics.write(line)
                listener.valid(line)
        for v in stepped:
            if not v.live:
                v.restore_best()

    def _judge(self, due: Sequence[Variant]) -> Results:
        """Results of the variants, and of the base for data sets on which it has not been judged yet, which their progress then holds. What
        reads a head has no base to compare with."""
        adapters = {v.name: adapter_of(self.prepared, v) for v in due if not isinstance(v, FullVariant)}
        mix, numbers = self.prepared.base.mix(list(adapters.values()))
        member = dict(zip(adapters, numbers, strict=True))
        fields: dict[str, list[Contestant]] = {v.config.data: [] for v in due}
        for v in due:
            if v.name in member:
                fields[v.config.data].append(_contestant(v.name, member[v.name], [v]))
        base_of: dict[Variant, str] = {}
        for v in due:
            if not self._base_valid(v) and v not in base_of and not v.config.objective.reads_head:
                alike = self._alike(v)
                base_of |= dict.fromkeys(alike, name := f"base of {v.name}")  # no variant has such a name
                fields[v.config.data].append(_contestant(name, BASE, alike))
        results = self._pass(self.prepared.base.attached, mix, fields)
        for v in due:
            if isinstance(v, FullVariant):
                results[v.config.data] |= self._pass(v.attached, Mix([]), {v.config.data: [_contestant(v.name, BASE, [v])]})[v.config.data]
            known = _numbers(results[v.config.data][base_of[v]].scores) if v in base_of else self._base_valid(v)
            v.progress.base_valid = dict(known)
        return results

    def _pass(self, attached: Attached, mix: Mix, fields: dict[str, list[Contestant]]) -> Results:
        return self.judge.judge(attached, mix, fields, self.held)

    def _alike(self, v: Variant) -> list[Variant]:
        """The variants for which the base is judged as for this one: by the same rows and the same objective."""
        of = (v.config.data, v.config.objective)
        return [other for other in self.prepared.variants if (other.config.data, other.config.objective) == of]

    def _base_valid(self, v: Variant) -> dict[str, Any]:
        return next((other.progress.base_valid for other in self._alike(v) if other.progress.base_valid), {})


def is_due(v: Variant) -> bool:
    """Whether a variant that has just stepped, or was stopped by hand, is to be validated: every `eval_every` steps (by default once per
    epoch) and at its end."""
    p = v.progress
    by_hand = p.step > 0 and bool(p.finished_early) and not _is_judged(v)
    return not p.stopped and (by_hand or p.step % every(v) == 0 or p.step == v.total_steps)


def _is_judged(v: Variant) -> bool:
    """Whether it has been validated where it stands."""
    return any(x["step"] == v.progress.step for x in v.progress.valid)


def is_owed(v: Variant) -> bool:
    """Whether a validation that was due is missing: the run ended between the step and it, as where a rank was lost."""
    return v.progress.step > 0 and is_due(v) and not _is_judged(v)


def every(v: Variant) -> int:
    """Steps between validations."""
    return v.config.options.eval_steps(len(v.rows.examples), v.config.objective.steps_on_rows)


def ahead(validator: Validator, tests: Mapping[str, HeldOut]) -> Ahead:
    """What a run has before it beside its steps."""
    run, variants = validator.prepared.run, validator.prepared.variants
    judged = [v for v in variants if v.config.data in validator.held]

    def work(held: HeldOut, contestant: Contestant) -> float:
        if contestant.objective is not None and contestant.objective.answer_tokens:
            return Held(held.examples, len(held.examples), 0, contestant.objective.answer_tokens).work(True, False)
        rows = Held(held.examples, len(held.questions), len(held.labels), run.evaluate.max_new_tokens)
        return rows.work(contestant.generates, contestant.chooses)

    valid = {v.name: work(validator.held[v.config.data], _contestant(v.name, BASE, [v])) for v in judged}
    first = sum(work(h, _contestant("", BASE, [v for v in judged if v.config.data == d])) for d, h in validator.held.items())
    scored = ((h, 1 + sum(v.config.data == d for v in variants)) for d, h in tests.items())
    scoring = sum(n * work(h, Contestant("", BASE, run.evaluate.generate)) for h, n in scored)
    return Ahead({v.name: every(v) for v in judged}, valid, first, scoring)


def record(v: Variant, scores: dict[str, Any]) -> dict[str, Any]:
    """Take a validation into the variant's progress: is it the best, is it time to end? Returns its line for metrics.jsonl.

    Of validations with the same value of the metric, the one with the lower loss is the best, and of those the earlier one. Patience counts
    the metric alone: a validation that only wins a tie is none that improves.
    """
    o, p = v.config.options, v.progress
    value, earlier = scores[o.valid_metric], [x["step"] for x in ties(v)]
    improved = value is not None and (
        p.best_metric is None or (value < p.best_metric if lower_is_better(o.valid_metric) else value > p.best_metric)
    )
    tied = value is not None and value == p.best_metric
    better = improved or (tied and _finite(scores["loss"]) < _finite(_loss_at(v, p.best_step)))
    p.valid.append({"step": p.step, **scores})
    p.bad_evals = 0 if improved else p.bad_evals + 1
    if better:
        p.best_metric, p.best_step = value, p.step
    if o.patience is not None and p.bad_evals >= o.patience and v.live:
        best = "there was none" if p.best_metric is None else f"the best was {p.best_metric:.6g} at step {p.best_step}"
        p.finished_early = f"step {p.step}: valid {o.valid_metric} has not improved in {p.bad_evals} validations, {best}"
    if better:
        v.best = None
        if o.keep_best and v.live:
            v.keep()
    line = {"event": "valid", "variant": v.name, "step": p.step, "epoch": v.rows.epoch, "metric": o.valid_metric, "best": better}
    line |= {f"valid_{k}": x for k, x in scores.items()} | {f"base_valid_{k}": p.base_valid.get(k) for k in scores}
    line |= {"ties_with": earlier} if tied else {}
    return line | ({"finished_early": p.finished_early} if p.finished_early else {})


def ties(v: Variant) -> list[dict[str, Any]]:
    """The validations that reached the best value of the metric."""
    metric, p = v.config.options.valid_metric, v.progress
    return [x for x in p.valid if p.best_metric is not None and x[metric] == p.best_metric]


def _loss_at(v: Variant, step: int) -> float | None:
    return next(x["loss"] for x in v.progress.valid if x["step"] == step)


def _finite(loss: float | None) -> float:
    return math.inf if loss is None else loss


def _contestant(name: str, member: int, judged_by: Sequence[Variant]) -> Contestant:
    """Answers and labels are asked for only where a variant's metric needs them. judged_by: variants of one objective."""
    generates, chooses = (any(asked) for asked in zip(*(v.config.asks for v in judged_by), strict=True))
    return Contestant(name, member, generates=generates, chooses=chooses, objective=judged_by[0].config.objective)


def _numbers(scores: dict[str, Any]) -> dict[str, Any]:
    """The scores as JSON can hold them: what is not finite becomes None, which is never the best."""
    return {k: x if x is not None and math.isfinite(x) else None for k, x in scores.items() if k != "rows"}
