"""Which trials of a sweep train together: as many as fit into memory, by an estimate from shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.bases.shapes import Architecture
from trimtab.cost.plan import plan
from trimtab.errors import ConfigError
from trimtab.methods import FullConfig
from trimtab.model import Base
from trimtab.train.config import RunConfig


@dataclass(frozen=True)
class Group:
    """Trials that train together. estimated_bytes: of memory at the peak: the base, all that belongs to each of them, activations."""

    folder: str
    trials: list[str]
    estimated_bytes: int


@dataclass(frozen=True)
class Cost:
    """Bytes of one trial. own: of all that belongs to it alone. activations: of a full forward of its rows."""

    own: int
    activations: int


def plan_groups(run: RunConfig, base: Base, longest: int, memory_gb: float | None, at_least: int = 1) -> list[Group]:
    """Consecutive trials that fit `memory_gb` together, of about equal number; where it is None, all that `at_least` groups leave together.
    longest: tokens of the longest row, all its sequences. at_least: how many groups there should be, as far as there are trials.
    ConfigError that names each trial that does not fit the base, or does not fit the memory even alone.

    The estimate: the base as it is loaded, what each trial owns, and the activations of the greediest. The process itself (0.4 GB) and an
    allocator's slack come on top: on a CPU up to a sixth of the activations, and without a compiler (`ops.reuse`) as much again, as in
    12 steps of six LoRAs.
    """
    costs = _costs(run, base, longest)
    fixed = base.spec.weight_bytes(base.dtype)

    def needs(names: Sequence[str]) -> int:
        return fixed + sum(costs[n].own for n in names) + max(costs[n].activations for n in names)

    budget = memory_gb * 1e9 if memory_gb is not None else math.inf
    if alone := [f"trial {n} needs {needs([n]) / 1e9:.3g} GB alone" for n in costs if needs([n]) > budget]:
        fix = "raise it, or lower max_tokens (tokens of one forward)"
        raise ConfigError(f"sweep.memory_gb = {memory_gb:g}: some trials do not fit", problems=alone, fix=fix)
    share = math.ceil(len(costs) / min(at_least, len(costs)))
    groups = _split(list(costs), lambda names: len(names) <= share and needs(names) <= budget)
    most = math.ceil(len(costs) / len(groups))  # evenly: a last group of one trial would have nobody to halve
    even = _split(list(costs), lambda names: len(names) <= most and needs(names) <= budget)
    chosen = even if len(even) == len(groups) else groups
    return [Group(f"group-{i}", names, needs(names)) for i, names in enumerate(chosen, 1)]


def _split(names: Sequence[str], fits: Callable[[list[str]], bool]) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    for n in names:
        if groups[-1] and not fits([*groups[-1], n]):
            groups.append([])
        groups[-1].append(n)
    return groups


def _costs(run: RunConfig, base: Base, longest: int) -> dict[str, Cost]:
    """What each trial costs. With P trainable parameters and b bytes of the base's dtype it owns P·(4 weights + b packed + 4 gradients +
    4 best so far), the first two again for a start that it subtracts, and its optimizer's state; full fine-tuning has its own copy and
    gradients in the base's dtype, 2·b. Activations: see `cost.plan`, at the tokens of one forward."""
    rows = sum(v.options.batch_size * v.options.gradient_accumulation_steps for v in run.variants)
    tokens = max(longest, min(run.max_tokens, rows * longest))
    shape = Architecture(base.name, base.spec, base.spec.num_parameters, base.dtype)
    length, costs, problems = min(longest, base.spec.max_positions), {}, []
    for v in run.variants:
        try:
            dtype, again = str(base.dtype).removeprefix("torch."), run.activation_checkpointing
            options: dict[str, Any] = {"dtype": dtype, "activation_checkpointing": again, "device": base.device}
            options |= {"optimizer": v.options.optimizer, "head": v.objective.head}
            p = plan(shape, v.method, batch_tokens=tokens, sequence_length=length, **options)
        except ConfigError as e:
            more = f" (and {len(e.problems) - 1} more)" if len(e.problems) > 1 else ""
            problems.append(f"trial {v.name}: {e.message}: {e.problems[0]}{more}" if e.problems else f"trial {v.name}: {e.message}")
            continue
        b, full = base.dtype.itemsize, isinstance(v.method, FullConfig)
        state = p.optimizer_bytes - (4 * p.trainable if full and b < 4 else 0)  # a plan counts fp32 masters among it
        own = (p.trainable * (4 + 2 * b) if full else p.weight_bytes) + 4 * p.trainable * (1 + v.options.keep_best)
        costs[v.name] = Cost(own + state, p.activation_bytes)
    if problems:
        raise ConfigError("these trials do not fit the base", problems=problems, fix="take these values out of sweep.search")
    return costs
