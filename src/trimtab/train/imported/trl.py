"""Settings of TRL's command line (a YAML file for `trl sft --config`), and peft's adapter_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.foreign import method_answer
from trimtab.methods import BY_NAME
from trimtab.methods.base import METHODS
from trimtab.train.imported.aims import aim_of, aimed
from trimtab.train.imported.carry import Carry, is_off, number
from trimtab.train.imported.groups import IDLE as DRAWN_HERE
from trimtab.train.imported.sources import in_column, located, source
from trimtab.train.imported.trainer import HUGGING_FACE, trainer

IDLE: Mapping[str, str] = {
    **HUGGING_FACE,
    **DRAWN_HERE,
    **dict.fromkeys(("use_peft", "lora_task_type", "bnb_4bit_quant_storage"), "there is one way here"),
    **dict.fromkeys(
        ("dataset_streaming", "eos_token", "pad_token", "padding_side"),
        "rows are never padded, and tokens are cached",
    ),
    **dict.fromkeys(
        ("precompute_ref_log_probs", "precompute_ref_batch_size", "sync_ref_model"), "the base's log-probabilities are computed once"
    ),
    **dict.fromkeys(("assistant_only_loss", "completion_only_loss"), "answers alone are supervised"),
}
LOST: Mapping[str, str] = {
    **dict.fromkeys(
        ("packing", "packing_strategy"), "a batch is counted in rows, not in packed sequences: raise batch_size to keep its size"
    ),
    **dict.fromkeys(("trust_remote_code",), "code that comes with a model is not run: a base that needs it is refused"),
    **dict.fromkeys(("model_revision",), "the newest revision is loaded: download the one that is meant, and name its folder"),
    **dict.fromkeys(("truncation_mode", "max_prompt_length", "chat_template_path"), "there is nothing like it here"),
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config", "accelerate_config", "num_processes"),
        "`trimtab train --ranks N` says how many processes share a batch: this is that of one",
    ),
    **dict.fromkeys(("push_to_hub", "hub_model_id"), "nothing is uploaded: `trimtab adapters push` does that"),
}
_OTHER = "there is nothing like it here"
REFUSED: Mapping[str, str] = dict.fromkeys(
    ("f_divergence_type", "ld_alpha", "use_weighting", "normalize_advantages", "reward_clip_range", "entropy_coef", "use_adaptive_entropy"),
    _OTHER,
)
"""Without these it is another objective."""
PLAIN = {"task_type": "CAUSAL_LM", "inference_mode": True, "revision": "main", "init_lora_weights": True}


def carry(c: Carry, data: str | None) -> None:
    c.run["base"] = c.take("model_name_or_path")
    aim = aim_of(c, None)
    validates = any(not is_off(c.given.get(key)) for key in ("eval_strategy", "evaluation_strategy"))
    trainer(c, length=1024, lr={"sft": 2e-5, "reward": 1e-4}.get(aim, 1e-6))
    if c.take("gradient_checkpointing", True):
        c.run["activation_checkpointing"] = True
    used = c.take("use_peft", False) or any(k in c.given for k in ("lora_r", "lora_alpha", "lora_target_modules"))
    c.variant["method"] = "lora" if used else "full"
    if used:
        for ours, default in (("r", 16), ("lora_alpha", 32), ("lora_dropout", 0.05)):
            key = ours if ours.startswith("lora_") else f"lora_{ours}"
            c.method_field(ours, key, number(c.take(key, default)))
        c.variant["target_modules"] = c.take("lora_target_modules")
        c.method_field("modules_to_save", "lora_modules_to_save", c.take("lora_modules_to_save"))
        c.method_field("target_parameters", "lora_target_parameters", c.take("lora_target_parameters"))
        for ours in ("use_dora", "use_rslora"):
            c.method_field(ours, ours, c.take(ours))
    kind, double = c.take("bnb_4bit_quant_type"), c.take("use_bnb_nested_quant")
    c.quantised(c.take("load_in_4bit"), c.take("load_in_8bit"), kind=kind, double=double)
    if (kind := c.take("dtype", c.take("torch_dtype"))) not in (None, "auto"):
        c.run["dtype"] = kind
    aimed(c, aim)
    if aim == "sft" and c.given.get("assistant_only_loss") is not True and c.given.get("completion_only_loss") is not True:
        c.lose("assistant_only_loss", False, "answers alone are supervised; TRL learns whole conversations unless it is asked not to")
    _data(c, data, validates)
    c.end(IDLE, LOST, REFUSED)


def _data(c: Carry, data: str | None, validates: bool) -> None:
    """validates: TRL validates on the split `test`, unless another one is named, where `eval_strategy` is not `no`."""
    c.set_aside(data, "dataset_name", "datasets")
    named, config = c.take("dataset_name"), c.take("dataset_config")
    mixture, split, test = c.take("datasets"), c.take("dataset_train_split", "train"), c.take("dataset_test_split")
    found: list[Any] = []
    for i, entry in enumerate([{"path": named, "name": config, "split": split}] if named else mixture or []):
        entry = dict(entry)
        place, part = located(entry.pop("path"), c, entry.pop("name", None)), entry.pop("split", None)
        for key, value in entry.items():
            c.lose(f"datasets[{i}].{key}", value, "it is not carried over")
        found.append(source(place, split=part if place.startswith("hf:") and part != "train" else None))
    train = in_column(c, found or ([data] if data else []))
    rows: dict[str, Any] = {"train": train}
    if size := c.take("test_split_size"):
        rows["split"] = size
    elif validates and found:
        first = {"path": train[0]} if isinstance(train[0], str) else train[0]
        if first["path"].startswith("hf:"):
            rows["valid"] = [first | {"split": test or "test"}]
        else:
            c.lose("dataset_test_split", test or "test", "a file has no splits: name the rows to validate on in `valid`")
    elif test:
        c.needless("dataset_test_split", test, "there is no validation")
    if not rows["train"]:
        c.refuse("dataset_name", None, "there are no rows to train on: name them with --data")
    c.data["rows"] = rows


def carry_adapter(c: Carry, data: str | None) -> None:
    """peft's adapter_config.json: a base, a method and its fields."""
    kind = str(c.take("peft_type"))
    cls = METHODS.get(kind)
    c.run |= {"base": c.take("base_model_name_or_path"), "out": "runs/imported"}
    if cls is None:
        c.refuse("peft_type", kind, f"there is no such method{method_answer(kind, BY_NAME)}")
        return
    c.variant["method"] = cls.name
    for key in list(c.given):
        value = c.take(key)
        if value is False and key == "init_lora_weights":
            c.lose(key, value, "B begins with zeros, as with true")
        if value is None or value is False or value in ({}, []) or (key == "bias" and value == "none"):
            continue
        if key in ("peft_version", "auto_mapping") or (key in PLAIN and value == PLAIN[key]):
            c.needless(key, value, "it says nothing of the training")
        else:
            c.method_field(key, key, value)
    c.data["rows"] = {"train": [data] if data else []}
    if not data:
        c.refuse("data", None, "an adapter's config names no rows: name them with --data")
