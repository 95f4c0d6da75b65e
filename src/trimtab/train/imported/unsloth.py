"""Settings of Unsloth: the YAML of its studio and command line (model, data, training, lora, logging), or one flat mapping of what a
notebook gives to FastLanguageModel and the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.train.imported.aims import aim_of, aimed
from trimtab.train.imported.carry import Carry, number
from trimtab.train.imported.groups import IDLE as DRAWN_HERE
from trimtab.train.imported.llama_factory import _names
from trimtab.train.imported.sources import in_column, located
from trimtab.train.imported.trainer import HUGGING_FACE, trainer
from trimtab.train.imported.trl import LOST as OF_TRAINERS
from trimtab.train.imported.trl import REFUSED as OTHERS

SECTIONS = ("data", "training", "lora", "logging", "inference")
IDLE: Mapping[str, str] = {
    **HUGGING_FACE,
    **dict.fromkeys(("vision_all_linear", "finetune_vision_layers", "finetune_language_layers"), "the text tower alone is loaded"),
    **dict.fromkeys(("wandb_project", "wandb_token", "tensorboard_dir", "hf_token", "token", "enable_tensorboard"), "write `track` for it"),
    **dict.fromkeys(("format_type",), "the form of a row is told by its columns"),
    **dict.fromkeys(("train_on_completions", "fast_inference", "gpu_memory_utilization", "full_finetuning"), "there is one way here"),
    **dict.fromkeys(("temperature", "top_p", "top_k", "min_p"), "they are of inference"),
    **DRAWN_HERE,
    **dict.fromkeys(("load_in_16bit", "device_map", "offload_embedding", "unsloth_tiled_mlp"), "the base is loaded as `dtype` says"),
    **dict.fromkeys(("unsloth_force_compile", "float8_kv_cache"), "trimtab has kernels of its own"),
    "finetune_audio_layers": "the text tower alone is loaded",
    "dataset_kwargs": "rows are read by their columns",
    "max_lora_rank": "it bounds an engine that is not used",
}
LOST: Mapping[str, str] = {
    **OF_TRAINERS,
    "packing": "a batch is counted in rows, not in packed sequences: raise batch_size to keep its size",
    "audio_input": "rows with images, video or sound are left out",
    "load_in_fp8": "a base is stored in the dtypes of `quantize`, of which fp8 is none",
    "embedding_learning_rate": "all tensors of an adapter have its `lr`",
    "loftq_config": "factors begin as peft's do",
    "use_loftq": "factors begin as peft's do",
    "trust_remote_code": "code that comes with a model is not run: a base that needs it is refused",
    "chat_template": "the base's own chat template is used, in training as in serving",
}
REFUSED: Mapping[str, str] = {
    **OTHERS,
    "audio_type": "sound is not read",
    "qat_scheme": "rounding that is trained for is not there",
}
PATCHED: Mapping[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "weight_decay": 0.001,
    "seed": 3407,
    "optim": "adamw_8bit",
    "warmup_ratio": 0.1,
}
"""Defaults that Unsloth gives to TRL's configs."""
PATCHED_GROUPS: Mapping[str, Any] = {"num_generations": 8, "loss_type": "bnpo", "beta": 0.001}
WHOLE = ("embed_tokens", "lm_head")
"""Among `target_modules` these are trained whole, not by LoRA."""
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def carry(c: Carry, data: str | None) -> None:
    flat = not isinstance(c.given.get("training"), Mapping)
    for section in SECTIONS:
        inner = c.given.pop(section, None)
        if isinstance(inner, Mapping):
            c.given |= {k: v for k, v in inner.items() if k not in c.given}
        elif inner is not None:
            c.given[section] = inner
    c.run["base"] = c.take("model") or c.take("model_name")
    for ours, theirs in (
        ("num_train_epochs", "num_epochs"),
        ("per_device_train_batch_size", "batch_size"),
        ("seed", "random_seed"),
        ("seed", "random_state"),
    ):
        if (value := c.take(theirs)) is not None:
            c.given.setdefault(ours, value)
    if "log_frequency" in c.given:
        c.given.setdefault("logging_steps", c.given.pop("log_frequency"))
    if number(c.given.get("max_steps") or 0) > 0 and not c.given.get("num_train_epochs", 1):
        del c.given["num_train_epochs"]  # 0: as many as max_steps takes
    aim = aim_of(c, "sft") if flat else "sft"
    for key, theirs in ({**PATCHED, **(PATCHED_GROUPS if aim == "grpo" else {})} if flat else {"optim": "adamw_8bit"}).items():
        if key != "warmup_ratio" or not c.given.get("warmup_steps"):
            c.given.setdefault(key, theirs)
    trainer(c, lr=5e-5 if flat else 2e-4)
    full = c.take("training_type", "lora") == "full" or c.take("full_finetuning") is True
    c.variant["method"] = "full" if full else "lora"
    checkpointing = c.take("gradient_checkpointing", c.take("use_gradient_checkpointing", "unsloth"))
    if checkpointing not in (False, "none", "false"):
        c.run["activation_checkpointing"] = True
    lora = {"r": c.take("r", c.take("lora_r", 16)), "lora_alpha": c.take("lora_alpha", 16), "lora_dropout": c.take("lora_dropout", 0.0)}
    lora |= {key: c.take(key) or None for key in ("use_rslora", "use_dora", "modules_to_save")}
    modules = c.take("target_modules")
    modules = "all-linear" if modules == ["all-linear"] else modules
    if isinstance(modules, list) and (whole := [m for m in modules if m in WHOLE]):
        modules = [m for m in modules if m not in WHOLE]
        lora["modules_to_save"] = [*whole, *(m for m in lora["modules_to_save"] or [] if m not in whole)]
    attention, mlp = c.take("finetune_attention_modules", True), c.take("finetune_mlp_modules", True)
    if not full:
        for key, value in lora.items():
            c.method_field(key, key, number(value))
        chosen = modules if modules == "all-linear" else _names(modules or ALL) or []
        c.variant["target_modules"] = chosen if (attention and mlp) or isinstance(chosen, str) else _of(chosen, attention, mlp)
        if (bias := c.take("bias", "none")) != "none":
            c.lose("bias", bias, "biases are not trained")
    c.quantised(c.take("load_in_4bit", not full), c.take("load_in_8bit"), double=True)
    if aim == "grpo" or aim == "rloo":
        _batch_of_groups(c)
    aimed(c, aim)
    if c.take("enable_wandb"):
        c.track("enable_wandb", True, ["wandb"])
    if c.given.get("train_on_completions") is False:
        c.lose("train_on_completions", c.take("train_on_completions"), "answers alone are supervised")
    if (kind := c.take("dtype")) is not None:
        c.run["dtype"] = str(kind).removeprefix("torch.")
    _data(c, data)
    c.end(IDLE, LOST, REFUSED)


def _batch_of_groups(c: Carry) -> None:
    """Unsloth makes a batch that is no whole number of groups as large as a group."""
    count, v = number(c.given.get("num_generations", 8)), c.variant
    if (v["batch_size"] * v.get("gradient_accumulation_steps", 1)) % count:
        c.needless("per_device_train_batch_size", v["batch_size"], f"Unsloth makes it {count}, the size of a group")
        v["batch_size"] = count
    if c.given.get("loss_type") == "dapo":  # as it sets them, whatever is given
        c.given |= {"mask_truncated_completions": True, "epsilon_high": 0.28}
    if c.given.get("loss_type") == "dr_grpo":
        c.given["scale_rewards"] = c.given.get("scale_rewards") is None


def _of(names: list[str], attention: bool, mlp: bool) -> list[str]:
    """The names of the parts that are trained."""
    of_mlp = {"gate_proj", "up_proj", "down_proj"}
    return [n for n in names if (mlp if n in of_mlp else attention)]


def _data(c: Carry, data: str | None) -> None:
    c.set_aside(data, "dataset", "local_dataset")
    named: list[Any] = [d for d in [c.take("dataset"), *(c.take("local_dataset", []) or [])] if d]
    rows = in_column(c, [located(d, c) for d in named] or ([data] if data else []))
    if not rows:
        c.refuse("dataset", None, "there are no rows to train on: name them with --data")
    c.data["rows"] = {"train": rows}
