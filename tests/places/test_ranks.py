"""N ranks train what one process does: every method and objective, with dropout, accumulation, clipping, validation and early stops.

The reference is the run in one process, which the laws compare with peft, torch and TRL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.objectives import test_distil, test_heads, test_preferences
from tests.places.forked import in_ranks
from tests.store.common import stirred
from tests.train import test_rollouts
from tests.train.common import METHODS, metrics, run_file, tiny_base
from trimtab.methods import LoraConfig
from trimtab.places.place import Place
from trimtab.train import Report, RunConfig, train

TOLERANCE = 1e-6


def quick(folder: Path) -> RunConfig:
    variants = {"lora": METHODS["lora"] | {"data": "a", "gradient_accumulation_steps": 2}, "ia3": METHODS["ia3"] | {"data": "b"}}
    return validated(folder, variants, eval_every=2)


def methods(folder: Path) -> RunConfig:
    data = {n: {"data": "ab"[i % 2], "gradient_accumulation_steps": 1 + i % 3} for i, n in enumerate(METHODS)}
    starts = {
        "pissa": METHODS["lora"]
        | {"data": "a", "lora_dropout": 0.0, "init_lora_weights": "pissa", "loraplus_lr_ratio": 4.0, "neftune_noise_alpha": 5.0}
    }
    return validated(folder, {n: m | data[n] for n, m in METHODS.items()} | starts, max_tokens=120)


def ended_early(folder: Path) -> RunConfig:
    variants = {n: METHODS[n] | {"data": "a", "valid_metric": "exact_match", "patience": 1, "eval_every": 1} for n in ("lora", "full")}
    return validated(folder, variants | {"ia3": METHODS["ia3"] | {"data": "b"}}, evaluate={"max_new_tokens": 4, "max_rows": 2})


def validated(folder: Path, variants: dict[str, dict[str, Any]], eval_every: int | None = None, **keys: Any) -> RunConfig:
    content = run_file(folder, variants, **keys)
    for name in "ab":
        content["data"][name]["valid"] = f"{name}-test.jsonl"
    content["defaults"] |= {"eval_every": eval_every}
    return RunConfig.from_dict(content, root=folder)


def crossed(objectives: Mapping[str, str], but: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """Each of these objectives with every method but some; every second variant accumulates. objectives: name -> data set."""
    pairs = [(o, m) for o in objectives for m in METHODS if m not in but]
    more = [{"data": objectives[o], "objective": o, "gradient_accumulation_steps": 1 + i % 2} for i, (o, _) in enumerate(pairs)]
    return {f"{o}-{m}": METHODS[m] | own for (o, m), own in zip(pairs, more, strict=True)}


def heads(folder: Path) -> RunConfig:
    objectives = ("classify", "reward", "stepwise")
    content = run_file(folder, crossed({o: o for o in objectives}, but=("full",)), evaluate={"generate": False})
    test_heads.write_rows(folder)
    files = {"classify": "classify", "reward": "margins", "stepwise": "stepwise"}
    content["data"] |= {n: dict.fromkeys(("train", "valid", "test"), f"{f}.jsonl") for n, f in files.items()}
    content["defaults"]["max_steps"] = 3
    return RunConfig.from_dict(content, root=folder)


def distil(folder: Path) -> RunConfig:
    """From an adapter: against the base itself, losses and gradients would be rounding alone."""
    stirred(tiny_base(), LoraConfig(r=4, target_modules=("q_proj", "v_proj"))).save(folder / "teacher")
    aim = {"data": "a", "objective": "distil", "teacher": "teacher"}
    variants = {"lora": test_distil.LORA | aim | {"distil_temperature": 2.0, "teacher_tokens": 16}}
    return test_distil.config(folder, variants | {n: v | aim for n, v in crossed({"distil": "a"}).items()})


def preferences(folder: Path) -> RunConfig:
    every = crossed(dict.fromkeys(("dpo", "cpo", "simpo", "orpo"), "pairs") | {"kto": "marked"})
    return test_preferences.config(folder, test_preferences.VARIANTS | every)


def grpo(folder: Path) -> RunConfig:
    again = {"num_iterations": 2, "beta": 0.1}
    variants = {"once": test_rollouts.GRPO, "twice": test_rollouts.GRPO | again | {"lora_dropout": 0.1, "seed": 3}}
    aim = {k: v for k, v in test_rollouts.GRPO.items() if k not in METHODS["lora"]}
    return test_rollouts.config(folder, variants | {n: aim | v for n, v in crossed({"grpo": "asked"}).items()})


def steady(config: Callable[[Path], RunConfig], **options: Any) -> Callable[[Path], RunConfig]:
    """With options under which rounding stays small. AdamW makes a step of the full rate of a gradient that is rounding alone."""

    def changed(folder: Path) -> RunConfig:
        run = config(folder)
        variants = [v.model_copy(update={"options": v.options.model_copy(update=options)}) for v in run.variants]
        return run.model_copy(update={"variants": variants})

    return changed


SGD, EPSILON = {"optimizer": "sgd", "lr": 0.1}, {"adam_epsilon": 1e-3}
CASES: dict[str, Callable[[Path], RunConfig]] = {
    "quick": quick,
    "methods": steady(methods, **SGD),
    "ended_early": steady(ended_early, **SGD),
    **{f.__name__: steady(f, **EPSILON) for f in (heads, distil, preferences, grpo)},
}


def compare(one: Report, config: RunConfig, place: Place) -> None:
    """In a rank: the same run, shared among the ranks, ends with the same tensors, losses and scores."""
    name = one.out.parent.name
    many = train(config, base=tiny_base(), place=place)
    for variant, adapter in one.adapters.items():
        check_equal(many.adapters[variant].params, adapter.params, f"{name}: {variant}")
    near = {"rel": 1e-4, "abs": 5e-6}  # margins are small differences of log-probabilities, whose last bits depend on the sums' order
    assert scores(many.summary) == pytest.approx(scores(one.summary), **near), name
    if place.first:
        assert lines(many) == pytest.approx(lines(one), **near), name
        for file in (one.out / "adapters").glob("*/*.safetensors"):  # whole models too
            check_equal(load_file(many.out / "adapters" / file.parent.name / file.name), load_file(file), f"{name}: {file}")
        assert sorted(p.name for p in many.out.rglob("*")) == sorted(p.name for p in one.out.rglob("*"))


def check_equal(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], where: str) -> None:
    """Within `TOLERANCE` all together; a single tensor may be small."""
    assert mine.keys() == theirs.keys()
    apart = {key: float((mine[key] - p).norm()) for key, p in theirs.items()}
    norms = {key: float(p.norm()) for key, p in theirs.items()}
    assert math.hypot(*apart.values()) <= TOLERANCE * math.hypot(*norms.values()), (
        f"{where}: {math.hypot(*apart.values()):.2e} of {math.hypot(*norms.values()):.2e}"
    )
    for key, norm in norms.items():
        assert apart[key] <= 100 * TOLERANCE * norm, f"{where}: {key}: {apart[key] / norm:.2e}"


def scores(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What was counted and scored of each variant, and where it stopped."""
    found = {}
    for name, v in summary["variants"].items():
        found |= {f"{name} {k}": v[k] for k in ("steps", "tokens", "supervised_tokens", "saved_step")}
        found |= {f"{name} {k}": x for k, x in v["scores"].items() if isinstance(x, int | float)}
        found |= {f"{name} {k}": x for k, x in v["losses"].items()}
    return found


def lines(report: Report) -> dict[str, Any]:
    """The numbers of metrics.jsonl, less times."""
    return {
        f"{name} {i} {k}": x
        for name, own in metrics(report).items()
        for i, line in enumerate(own)
        for k, x in line.items()
        if k not in ("seconds", "tokens_per_s") and isinstance(x, int | float)
    }


def follow(names: list[str], ranks: int, folder: Path) -> None:
    ones = [train(CASES[name](folder / "one" / name), base=tiny_base()) for name in names]
    configs = [CASES[name](folder / "many" / name) for name in names]  # their rows are written before there are ranks

    def work(place: Place) -> None:
        for one, config in zip(ones, configs, strict=True):
            compare(one, config, place)

    codes = in_ranks(ranks, work, folder / "log")
    assert codes == [0] * ranks, "\n".join(p.read_text()[-3000:] for p in sorted((folder / "log").iterdir()))


def test_two_ranks_follow_one(tmp_path: Path) -> None:
    follow(["quick"], 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", [n for n in CASES if n != "quick"])
def test_ranks_follow_one(name: str, ranks: int, tmp_path: Path) -> None:
    follow([name], ranks, tmp_path)
