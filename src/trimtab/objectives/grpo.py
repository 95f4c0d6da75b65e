"""Reinforcement by groups of samples: GRPO (arXiv:2402.03300) and its relatives. Answers are drawn, rewarded, and compared with each other.

With R the rewards of the G answers to one prompt, and π_old the variant when it drew them:

    A    group: (R − mean) / (std of the group + 1e-4)      batch: the same with the std of all answers of the step      none: R − mean
         rloo: R − mean of the others (arXiv:2402.14740)
    ρ    importance_sampling_level token: exp(log π − log π_old), of each token
                                   sequence: exp(mean over tokens of it), of the answer        GSPO (arXiv:2507.18071)
         rloo: exp(sum over tokens of it)
    ℓ    −min(min(ρ, delta) A, clip(ρ, 1 − epsilon, 1 + epsilon_high) A)
         cispo: −clip(ρ, max epsilon_high) A log π, the clipped ratio being a constant        (arXiv:2506.13585)
    k    e^d − d − 1 with d = log π_base − log π, times ρ; ℓ gets beta · k of each token
         rloo: beta · Σ (log π_old − log π_base) is taken from the reward instead

    grpo              mean over answers of means over tokens of ℓ
    dapo, bnpo, cispo mean over the tokens of all answers                                     DAPO (arXiv:2503.14476)
    dr_grpo           sum over tokens / (answers · max_completion_length)                     (arXiv:2503.20783)
    rloo              mean over answers

Means are over the whole optimizer step. Numbers are those of TRL's GRPOTrainer and RLOOTrainer. log π is of the temperature that answers
are drawn at. Logged here: "kl", and the share of tokens (answers, where ρ is of the answer) whose ratio is clipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from trimtab.data.prompts_alone import prompt_alone
from trimtab.data.rows import Record
from trimtab.decode.settings import cut_problems
from trimtab.objectives.base import LEARNT, SAMPLE, Objective, Segments
from trimtab.objectives.preference import above_zero
from trimtab.rewards.spec import Reward, Rewards

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

EPSILON = 1e-4
"""Added to the standard deviation of rewards."""


@dataclass(frozen=True, kw_only=True)
class Grpo(Objective):
    """rewards: what answers are judged by. loss_type: how the terms of tokens and answers are added up. importance_sampling_level:
    whether a ratio is of a token or of an answer. scale_rewards: by whose standard deviation advantages are divided. beta: weight of the
    distance from the base. epsilon: how far a ratio may move from 1. epsilon_high: the same, above 1; None: as epsilon. delta: the bound
    of ratios whose advantage is negative; None: there is none. num_generations: G, answers to each prompt. max_completion_length: tokens
    of an answer at most. temperature, top_p, top_k, min_p: of the draw. num_iterations: optimizer steps on the same answers.
    mask_truncated_completions: answers without an end do not count. reward_time_limit: seconds for one call of a reward, unless the
    reward has its own."""

    name: ClassVar[str] = "grpo"
    lr_scale: ClassVar[float] = 0.02
    judged_by: ClassVar[str] = "reward"
    metrics: ClassVar[Mapping[str, bool]] = {"reward": True}

    rewards: Rewards = ()
    loss_type: Literal["dapo", "grpo", "bnpo", "dr_grpo", "cispo", "rloo"] = "dapo"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    num_iterations: int = 1
    num_generations: int = 8
    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    mask_truncated_completions: bool = False
    reward_time_limit: float = 30.0

    def problems(self) -> list[str]:
        found = [] if self.rewards else ["rewards: name at least one, such as `rewards: [exact_match]`"]
        found += [p for n in ("temperature", "reward_time_limit") for p in above_zero(n, getattr(self, n))]
        found += [p for n in ("delta", "epsilon_high") if (v := getattr(self, n)) is not None for p in above_zero(n, v)]
        found += [f"{n} = {v}: must be at least 0" for n in ("beta", "epsilon") if (v := getattr(self, n)) < 0]
        found += cut_problems(self)
        found += [f"{n} = {v}: must be at least {m}" for n, m in _LEAST.items() if (v := getattr(self, n)) < m]
        names = [r.label for r in self.rewards]
        found += [f"rewards: two are called {n!r}: give one of them a `name`" for n in dict.fromkeys(names) if names.count(n) > 1]
        if self.loss_type in ("rloo", "cispo") and self.delta is not None:
            found.append(f"delta = {self.delta}: loss_type {self.loss_type} has no second bound")
        if self.loss_type == "rloo" and self.importance_sampling_level == "sequence":
            found.append("importance_sampling_level = 'sequence': loss_type rloo has a ratio of its own")
        return found

    @classmethod
    def some(cls) -> Self:
        return cls(rewards=(Reward(reward="exact_match"),))

    @property
    def sampled_at(self) -> float:
        return self.temperature

    @property
    def answers(self) -> int:
        return self.num_generations

    @property
    def steps_on_rows(self) -> int:
        return self.num_iterations

    @property
    def answer_tokens(self) -> int:
        return self.max_completion_length

    @property
    def passes_before(self) -> int:
        return self.needs_old + (self.beta != 0)

    @property
    def in_reward(self) -> bool:
        """Whether the distance from the base is part of the reward, not of the loss."""
        return self.loss_type == "rloo"

    @property
    def needs_old(self) -> bool:
        """Whether the log-probabilities of answers are wanted before the first step on them. Later steps on them have those of its forward,
        so that its ratios are exactly 1."""
        return self.in_reward and self.beta != 0

    @staticmethod
    def parts(record: Record) -> Mapping[str, Record]:
        return prompt_alone(record)

    def advantages(self, reward_BG: np.ndarray) -> np.ndarray:
        """[B, G]: how much better each answer is than the other ones to its prompt. NaN is no reward: its advantage is 0."""
        import numpy as np

        with np.errstate(invalid="ignore", divide="ignore"):
            if self.loss_type == "rloo":
                others = (~np.isnan(reward_BG)).sum(1, keepdims=True) - 1
                found = reward_BG - (np.nansum(reward_BG, 1, keepdims=True) - reward_BG) / others
                return np.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0)
            found = reward_BG - mean(reward_BG, 1)
            if self.scale_rewards != "none":
                found = found / (spread(reward_BG, 1 if self.scale_rewards == "group" else None) + EPSILON)
        return np.nan_to_num(found, nan=0.0)

    def loss(self, logp_R: Tensor, ref_R: Tensor | None, segments: Segments) -> tuple[Tensor, dict[str, Tensor]]:
        import torch

        known, length_S, counts = segments.samples, segments.lengths(), segments.of_all
        assert known is not None
        B, N = counts.segments_of[SAMPLE], max(1, counts.targets)

        def each_token(values_S: Tensor) -> Tensor:
            return values_S.repeat_interleave(length_S.long(), output_size=len(logp_R))

        log_R = logp_R - (logp_R.detach() if known.old_R is None else known.old_R)
        whole = self.loss_type == "rloo" or self.importance_sampling_level == "sequence"
        advantage = known.advantage_S if whole else each_token(known.advantage_S)
        if whole:
            log_S = segments.sums(log_R)
            ratio = (log_S if self.loss_type == "rloo" else log_S / length_S).exp()
        else:
            ratio = log_R.exp()
        low, high = self.epsilon, self.epsilon if self.epsilon_high is None else self.epsilon_high
        metrics: dict[str, Tensor] = {}
        if known.drawn_R is not None and known.old_R is None:
            metrics[APART] = (logp_R.detach() - known.drawn_R).abs().sum() / max(1, counts.targets_of[LEARNT])

        def shares(**found: Tensor) -> None:
            metrics.update({name: hit.float().sum() / (B if whole else N) for name, hit in found.items()})

        if self.loss_type == "cispo":
            bounded = ratio.clamp(max=high).detach()
            shares(cispo_clip_ratio=(ratio > high) & (advantage > 0))
            loss_R = -(each_token(bounded * advantage) if whole else bounded * advantage) * logp_R
        else:
            first = ratio if self.delta is None else ratio.clamp(max=self.delta)
            too_low, too_high = (first < 1 - low) & (advantage < 0), (first > 1 + high) & (advantage > 0)
            shares(**dict(zip(CLIPPED, (too_low, too_high, too_low | too_high), strict=True)))
            found = -torch.min(first * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
            if self.loss_type == "rloo":
                return found.sum() / B, metrics
            loss_R = each_token(found) if whole else found
        if self.beta:
            assert known.base_R is not None
            apart_R = known.base_R - logp_R
            kl_R = (apart_R.exp() - apart_R - 1) * (each_token(ratio) if whole else ratio)
            metrics["kl"] = kl_R.detach().sum() / N
            loss_R = loss_R + self.beta * kl_R
        if self.loss_type == "grpo":
            return (segments.sums(loss_R) / length_S).sum() / B, metrics
        return loss_R.sum() / (B * self.max_completion_length if self.loss_type == "dr_grpo" else N), metrics


CLIPPED = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")
APART = "sampling/sampling_logp_difference/mean"
"""|Δ log p| of a token between the sampler and the trainer, at the first step on the answers."""
_LEAST = {"num_iterations": 1, "num_generations": 2, "max_completion_length": 1}


def mean(values: np.ndarray, axis: int | None) -> np.ndarray:
    """Over what is not NaN, with the axis kept; NaN where nothing is left."""
    import numpy as np

    there = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nansum(values, axis, keepdims=True) / there.sum(axis, keepdims=True)


def spread(values: np.ndarray, axis: int | None) -> np.ndarray:
    """The standard deviation of a sample, over what is not NaN, with the axis kept; NaN where fewer than two are left."""
    import numpy as np

    count = (~np.isnan(values)).sum(axis, keepdims=True)
    with np.errstate(all="ignore"):
        return np.sqrt(np.nansum((values - mean(values, axis)) ** 2, axis, keepdims=True) / np.where(count > 1, count - 1, np.nan))
