"""Settings of Unsloth: the YAML of its studio and command line (model, data, training, lora, logging), or one flat mapping of what a
notebook gives to FastLanguageModel and the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.train.imported.carry import Carry, number
from trimtab.train.imported.llama_factory import _names
from trimtab.train.imported.sources import located
from trimtab.train.imported.trainer import HUGGING_FACE, trainer

SECTIONS = ("data", "training", "lora", "logging", "inference")
IDLE: Mapping[str, str] = {
    **HUGGING_FACE,
    **dict.fromkeys(("vision_all_linear", "finetune_vision_layers", "finetune_language_layers"), "the text tower alone is loaded"),
    **dict.fromkeys(("wandb_project", "wandb_token", "tensorboard_dir", "hf_token", "token", "enable_tensorboard"), "write `track` for it"),
    **dict.fromkeys(("format_type", "dataset_text_field"), "the form of a row is told by its columns"),
    **dict.fromkeys(("train_on_completions", "fast_inference", "gpu_memory_utilization", "full_finetuning"), "there is one way here"),
    **dict.fromkeys(("temperature", "top_p", "top_k", "min_p"), "they are of inference"),
}
LOST: Mapping[str, str] = {
    "packing": "a batch is counted in rows, not in packed sequences: raise batch_size to keep its size",
    "loftq_config": "factors begin as peft's do",
    "use_loftq": "factors begin as peft's do",
    "trust_remote_code": "code that comes with a model is not run: a base that needs it is refused",
    "chat_template": "the base's own chat template is used, in training as in serving",
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def carry(c: Carry, data: str | None) -> None:
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
    c.given.setdefault("optim", "adamw_8bit")
    trainer(c, lr=2e-4)
    full = c.take("training_type", "lora") == "full" or c.take("full_finetuning") is True
    c.variant["method"] = "full" if full else "lora"
    checkpointing = c.take("gradient_checkpointing", c.take("use_gradient_checkpointing", "unsloth"))
    if checkpointing not in (False, "none", "false"):
        c.run["activation_checkpointing"] = True
    lora = {"r": c.take("r", c.take("lora_r", 16)), "lora_alpha": c.take("lora_alpha", 16), "lora_dropout": c.take("lora_dropout", 0.0)}
    lora |= {key: c.take(key) or None for key in ("use_rslora", "use_dora", "modules_to_save")}
    modules = c.take("target_modules")
    attention, mlp = c.take("finetune_attention_modules", True), c.take("finetune_mlp_modules", True)
    if not full:
        for key, value in lora.items():
            c.method_field(key, key, number(value))
        chosen = modules if modules == "all-linear" else _names(modules or ALL) or []
        c.variant["target_modules"] = chosen if (attention and mlp) or isinstance(chosen, str) else _of(chosen, attention, mlp)
        if (bias := c.take("bias", "none")) != "none":
            c.lose("bias", bias, "biases are not trained")
    c.quantised(c.take("load_in_4bit", not full), c.take("load_in_8bit"))
    if c.take("enable_wandb"):
        c.track("enable_wandb", True, ["wandb"])
    if c.given.get("train_on_completions") is False:
        c.lose("train_on_completions", c.take("train_on_completions"), "answers alone are supervised")
    if (kind := c.take("dtype")) is not None:
        c.run["dtype"] = str(kind).removeprefix("torch.")
    _data(c, data)
    c.end(IDLE, LOST, {})


def _of(names: list[str], attention: bool, mlp: bool) -> list[str]:
    """The names of the parts that are trained."""
    of_mlp = {"gate_proj", "up_proj", "down_proj"}
    return [n for n in names if (mlp if n in of_mlp else attention)]


def _data(c: Carry, data: str | None) -> None:
    named: list[Any] = [d for d in [c.take("dataset"), *(c.take("local_dataset", []) or [])] if d]
    rows = [located(d, c) for d in named] or ([data] if data else [])
    if not rows:
        c.refuse("dataset", None, "there are no rows to train on: name them with --data")
    c.data["rows"] = {"train": rows}
