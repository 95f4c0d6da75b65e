"""Settings of TRL's GRPO, as TRL and axolotl have them: their batches count answers, ours the prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trimtab.train.imported.carry import Carry, number

FIELDS = (
    *("beta", "loss_type", "importance_sampling_level", "epsilon", "epsilon_high", "delta", "num_iterations"),
    *("max_completion_length", "temperature", "top_p", "top_k", "min_p", "mask_truncated_completions"),
)
"""Fields of the same name and meaning."""
IDLE: Mapping[str, str] = {
    **dict.fromkeys(
        ("use_vllm", "vllm_mode", "vllm_server_host", "vllm_server_port", "vllm_server_base_url", "vllm_server_timeout", "vllm_dtype"),
        "answers are drawn by the forward that trains",
    ),
    **dict.fromkeys(
        ("vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size", "vllm_enable_sleep_mode", "vllm_device"),
        "answers are drawn by the forward that trains",
    ),
    **dict.fromkeys(
        ("vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "use_transformers_continuous_batching"),
        "answers are drawn by the forward that trains",
    ),
    **dict.fromkeys(("log_completions", "num_completions_to_print", "log_unique_prompts"), "held-out answers stand in the run's folder"),
    "use_bias_correction_kl": "the distance from the base is always weighted with the ratio",
}


def groups(c: Carry, take: Callable[[str, Any], Any], where: str) -> None:
    """The objective grpo. take(key, default): takes a setting. where: stands before their keys in messages."""
    count = number(take("num_generations", None)) or 8
    fields = {name: (where + name, number(take(name, None))) for name in FIELDS}
    if fields["max_completion_length"][1] is None:
        fields["max_completion_length"] = (where + "max_completion_length", 512)  # TRL's default
    scaled = take("scale_rewards", None)
    fields["scale_rewards"] = (where + "scale_rewards", {True: "group", False: "none"}.get(scaled, scaled))
    fields["num_generations"] = (where + "num_generations", count)
    c.objective("grpo", f"{where}num_generations", fields)
    names, weights = take("reward_funcs", None), take("reward_weights", None)
    names = [names] if isinstance(names, str) else list(names or [])
    if not names:
        c.refuse(f"{where}reward_funcs", None, "there is nothing to reward answers by: write `rewards`, a list")
    c.variant["rewards"] = [
        {"reward": _file(str(name)), **({"weight": weights[i]} if weights and i < len(weights) else {})} for i, name in enumerate(names)
    ]
    if names:
        c.lose(f"{where}reward_funcs", names, "a reward is named FILE.py:FUNCTION, and its code runs when `trusted: true` is added to it")
    answers = int(c.variant.get("batch_size", 8)) * int(c.variant.get("gradient_accumulation_steps", 1))
    if answers % count:
        c.refuse(f"{where}num_generations", count, f"a step has {answers} answers, which are no whole number of groups")
    else:
        c.variant |= {"batch_size": answers // count, "gradient_accumulation_steps": 1}
    for key in ("steps_per_generation", "generation_batch_size"):
        if (value := take(key, None)) is not None:
            c.lose(where + key, value, "answers are drawn for one optimizer step, and used for num_iterations of them")


def _file(name: str) -> str:
    """A function as trimtab names it, from a dotted name."""
    module, _, function = name.rpartition(".")
    return f"{module.replace('.', '/') or 'rewards'}.py:{function}"
