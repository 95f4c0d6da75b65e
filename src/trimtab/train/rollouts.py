"""Answers before a step: every variant that learns from its own answers draws them, all in one mixed batch, and they are rewarded.

The tensors that draw are those that the step then trains, in the same process. A draw is a function of (seed, step, row, number of the
answer), so it is the same alone, among other variants, and after a resume.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab import ops
from trimtab.data import Example
from trimtab.decode.generate import Sampling, generate
from trimtab.decode.sampling import drawn_from
from trimtab.forward.attached import Attached
from trimtab.forward.batch import BASE
from trimtab.forward.packs import Mix
from trimtab.objectives.base import SAMPLE
from trimtab.objectives.grpo import Grpo, mean, spread
from trimtab.rewards.asked import Rewarded
from trimtab.train.drawn import Drawn, counted, in_rows, origin_of
from trimtab.train.finish import adapter_of
from trimtab.train.full import FullVariant
from trimtab.train.measure import log_probabilities_of
from trimtab.train.prepare import Prepared
from trimtab.train.rewarding import Rewarding, total
from trimtab.train.samples import Sample
from trimtab.train.variant import StepBatch, Variant, cut


@dataclass
class Answer:
    """An answer as it is drawn. ids: with the stop token, if it has ended. logps, entropies: of each token, by the sampler."""

    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Asked:
    """A prompt to answer. again: the how many-th time that its row is drawn in the step."""

    variant: Variant
    member: int
    prompt: Example
    again: int

    @property
    def cost(self) -> int:
        """Tokens, at most."""
        o = _objective(self.variant)
        return len(self.prompt.ids) + o.num_generations * o.max_completion_length

    def generator(self, number: int) -> random.Random:
        """Of one of its answers."""
        return _generator(self.variant.seed, self.variant.progress.step, *self.prompt.row, self.again, number)


class Rollouts:
    """Draws for a run's variants. rewarded: asks their rewards."""

    def __init__(self, prepared: Prepared, rewarded: Rewarded):
        self._prepared, self._rewarded = prepared, rewarded

    def filled(self, batches: Mapping[Variant, StepBatch]) -> dict[Variant, StepBatch]:
        """The batches, with answers in the place of prompts."""
        due = [v for v in batches if v.config.objective.sampled_at is not None and v.drawn is None]
        found = dict(batches)
        for attached in dict.fromkeys(v.attached for v in due):
            mine = {v: batches[v].examples for v in due if v.attached is attached}
            for v, answers in self._draw(attached, mine).items():
                found[v] = self._learnt(v, mine[v], answers)
        return found

    def _draw(self, attached: Attached, prompts: Mapping[Variant, Sequence[Example]]) -> dict[Variant, list[Answer]]:
        """The answers of each variant, num_generations to each of its prompts."""
        base = self._prepared.base
        adapters = [None if isinstance(v, FullVariant) else adapter_of(self._prepared, v) for v in prompts]
        mix, numbers = base.mix(adapters) if any(adapters) else (Mix([]), [BASE] * len(adapters))
        asked = list[_Asked]()
        for (v, examples), member in zip(prompts.items(), numbers, strict=True):
            again = Counter[tuple[int, int]]()
            for e in examples:
                again[e.row] += 1
                asked.append(_Asked(v, member, e, again[e.row]))
        drawn = self._prepared.place.each([a.cost for a in asked], lambda mine: self._answers(attached, mix, [asked[i] for i in mine]))
        found: dict[Variant, list[Answer]] = {v: [] for v in prompts}
        for a, answers in zip(asked, drawn, strict=True):
            found[a.variant] += answers
        return found

    def _answers(self, attached: Attached, mix: Mix, asked: Sequence[_Asked]) -> list[list[Answer]]:
        """The answers to each of some prompts."""
        if not asked:
            return []
        each = [(a, g) for a in asked for g in range(_objective(a.variant).num_generations)]
        members, prompts = [a.member for a, _ in each], [a.prompt.ids.tolist() for a, _ in each]
        how, generators = [_sampling(_objective(a.variant)) for a, _ in each], [a.generator(g) for a, g in each]
        answers = [Answer() for _ in each]

        def on_draw(order: Sequence[int], logits_BV: Tensor, id_B: Tensor) -> None:
            told = drawn_from(logits_BV, id_B, [how[i].temperature for i in order])
            for i, token, logp, entropy in zip(order, *ops.to_host([id_B, *told]), strict=True):
                answers[i].ids.append(token)
                answers[i].logps.append(logp)
                answers[i].entropies.append(entropy)

        generate(attached, mix, members, prompts, how, self._stop_ids, generators=generators, on_draw=on_draw)
        at = iter(answers)
        return [[next(at) for _ in range(_objective(a.variant).num_generations)] for a in asked]

    @cached_property
    def _stop_ids(self) -> set[int]:
        return self._rewarding.stop_ids

    @cached_property
    def _rewarding(self) -> Rewarding:
        return Rewarding(self._prepared.base, self._rewarded)

    def _learnt(self, v: Variant, prompts: Sequence[Example], answers: Sequence[Answer]) -> StepBatch:
        """The step on these answers."""
        objective, known = _objective(v), self._prepared.data[v.config.data].asked
        G = objective.num_generations
        each = [e for e in prompts for _ in range(G)]
        samples = [_sample(e, a) for e, a in zip(each, answers, strict=True)]
        rewards_KN = self._prepared.place.once(
            lambda: self._rewarding.ask(objective, [known[e.row] for e in each], each, [a.ids for a in answers], v.progress.step)
        )
        reward_N = total(objective, rewards_KN)
        ended = np.array([a.ids[-1] in self._stop_ids for a in answers])
        judged = reward_N
        distance = {}
        if objective.in_reward and objective.beta:
            samples = self._measured(v, objective, samples)
            apart = np.array([float((s.old_R - s.base_R).sum()) for s in samples if s.old_R is not None and s.base_R is not None])
            judged, distance = reward_N - objective.beta * apart, {"kl": float(apart.sum() / sum(s.targets_here for s in samples))}
            samples = [replace(s, old_R=None) for s in samples]  # the first step's own forward says it
        advantage_N = objective.advantages(judged.reshape(-1, G)).reshape(-1)
        samples = [replace(s, advantage=float(a)) for s, a in zip(samples, advantage_N, strict=True)]
        counts_N = ended if objective.mask_truncated_completions else np.ones(len(samples), dtype=bool)
        learns_N = counts_N & ((advantage_N != 0) | (objective.beta != 0 and not objective.in_reward))  # else its gradient is 0
        learnt = [s for s, learns in zip(samples, learns_N, strict=True) if learns]
        if not distance and objective.beta:
            learnt = self._measured(v, objective, learnt)
        at = iter(learnt)
        groups = [[next(at) for learns in learns_N[i : i + G] if learns] for i in range(0, len(samples), G)]
        targets = sum(s.targets_here for s, counts in zip(samples, counts_N, strict=True) if counts)
        counts = counted(len(prompts), len(samples), targets, sum(s.targets_here for s in learnt))
        v.drawn = Drawn(in_rows(groups, v.max_tokens), counts, objective.num_iterations)
        metrics = _metrics(objective, rewards_KN, reward_N, judged, answers, ended) | distance
        return v.batch_of(v.drawn.rows, counts, metrics)

    @torch.no_grad()
    def _measured(self, v: Variant, objective: Grpo, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with what the variant, and the base, give them before the step, as far as the objective wants it."""
        found = list(samples)
        packed = v.pack()
        who = [("old_R", v.attached, Mix([packed] if packed else []), 0 if packed else BASE)] if objective.needs_old else []
        who += [("base_R", v.base, Mix([]), BASE)] if objective.beta else []
        places = {id(s.ids): i for i, s in enumerate(found)}
        each = in_rows(([s] for s in samples), v.max_tokens)
        parts = [[s for i in part for s in each[i].segments] for part in cut(each, v.max_tokens)]

        def measure(numbers: Sequence[int]) -> list[list[dict[str, Any]]]:
            """Of each segment of some parts."""
            told = []
            for segments in (parts[n] for n in numbers):
                own: list[dict[str, Any]] = [{} for _ in segments]
                for name, attached, mix, member in who:
                    logp_R = log_probabilities_of(attached, mix, [(member, s) for s in segments], objective.temperature)
                    for values, part in zip(own, logp_R.cpu().split([int(s.supervised.sum()) for s in segments]), strict=True):
                        values[name] = part.float().numpy()
                told.append(own)
            return told

        costs = [sum(len(s.ids) for s in segments) for segments in parts]
        for segments, own in zip(parts, self._prepared.place.each(costs, measure), strict=True):
            for s, values in zip(segments, own, strict=True):
                found[places[id(s.ids)]] = replace(found[places[id(s.ids)]], **values)
        return found


def _objective(v: Variant) -> Grpo:
    assert isinstance(v.config.objective, Grpo)
    return v.config.objective


def _sampling(o: Grpo) -> Sampling:
    return Sampling(o.max_completion_length, o.temperature, o.top_p, o.top_k, min_p=o.min_p)


def _generator(*what: int) -> random.Random:
    return random.Random(hashlib.sha256(np.array(what, dtype=np.int64).tobytes()).digest())


def _sample(prompt: Example, answer: Answer) -> Sample:
    ids = np.concatenate([prompt.ids, np.array(answer.ids, dtype=np.int32)])
    supervised = np.arange(len(ids)) >= len(prompt.ids)
    return Sample(ids, supervised, origin_of(prompt.row[1]), prompt.row, SAMPLE, drawn_R=np.array(answer.logps, dtype=np.float32))


def _metrics(
    objective: Grpo, rewards_KN: np.ndarray, reward_N: np.ndarray, judged_N: np.ndarray, answers: Sequence[Answer], ended: np.ndarray
) -> dict[str, float]:
    """What is logged of answers, under TRL's names; what cannot be told is left out."""
    lengths = np.array([len(a.ids) for a in answers])
    groups = judged_N.reshape(-1, objective.num_generations)
    equal = np.isclose(spread(groups, None if objective.scale_rewards == "batch" and not objective.in_reward else 1), 0)
    found = {"reward": mean(reward_N, 0), "reward_std": spread(reward_N, 0), "frac_reward_zero_std": equal.mean()}
    for reward, values in zip(objective.rewards, rewards_KN, strict=True):
        found |= {f"rewards/{reward.label}/mean": mean(values, 0), f"rewards/{reward.label}/std": spread(values, 0)}
    found |= {"completions/mean_length": lengths.mean(), "completions/min_length": lengths.min(), "completions/max_length": lengths.max()}
    found |= {"completions/clipped_ratio": 1 - ended.mean(), "entropy": sum(sum(a.entropies) for a in answers) / lengths.sum()}
    plain = {k: float(np.asarray(x).reshape(-1)[0]) for k, x in found.items()}
    return {k: x for k, x in plain.items() if math.isfinite(x)}
