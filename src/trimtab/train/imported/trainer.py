"""What transformers' TrainingArguments say, which several programs take as they are."""

from __future__ import annotations

from collections.abc import Mapping

from trimtab.train.imported.carry import Carry, number

_LOGS, _LOADER = "metrics.jsonl and report.html are always written", "rows are read once, and tokens are cached"
HUGGING_FACE: Mapping[str, str] = {
    **dict.fromkeys(("overwrite_output_dir", "save_only_model", "save_strategy", "save_safetensors"), "a run never overwrites another"),
    **dict.fromkeys(("run_name", "logging_dir", "logging_strategy", "logging_first_step", "disable_tqdm"), _LOGS),
    **dict.fromkeys(("dataloader_num_workers", "dataloader_pin_memory", "dataset_num_proc", "remove_unused_columns"), _LOADER),
    **dict.fromkeys(("ddp_timeout", "ddp_find_unused_parameters", "local_rank"), "a run is one process"),
    **dict.fromkeys(("group_by_length", "pad_to_multiple_of", "padding_free"), "rows are never padded"),
    **dict.fromkeys(("per_device_eval_batch_size", "eval_accumulation_steps"), "validation is bounded by `max_tokens`"),
    **dict.fromkeys(("gradient_checkpointing_kwargs", "attn_implementation", "use_liger_kernel", "tf32"), "trimtab has kernels of its own"),
    **dict.fromkeys(("use_cpu", "no_cuda"), "write `device`"),
    "optim_target_modules": "it is off",
}


def trainer(c: Carry, *, length: int = 2048, lr: float = 5e-5, epochs: float = 3) -> None:
    """Carry what a TrainingArguments has, with its defaults where ours differ. length, lr, epochs: of the program, where it says none."""
    c.run["out"] = c.take("output_dir", "runs/imported")
    c.option("lr", "learning_rate", number(c.take("learning_rate", lr)))
    c.option("epochs", "num_train_epochs", number(c.take("num_train_epochs", epochs)))
    if isinstance(steps := number(c.take("max_steps")), int) and steps > 0:
        c.option("max_steps", "max_steps", steps)
    c.option("batch_size", "per_device_train_batch_size", number(c.take("per_device_train_batch_size", 8)))
    c.option("gradient_accumulation_steps", "gradient_accumulation_steps", number(c.take("gradient_accumulation_steps", 1)))
    for name in ("cutoff_len", "max_seq_length", "max_length"):
        if (given := number(c.take(name))) is not None:
            length = given
    c.option("max_length", "max_length", length)
    c.renamed("weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "seed", "neftune_noise_alpha")
    steps, ratio = number(c.take("warmup_steps")), number(c.take("warmup_ratio"))
    c.option("warmup_steps", "warmup_steps" if steps else "warmup_ratio", steps or ratio or 0)
    c.schedule("lr_scheduler_type", c.take("lr_scheduler_type", "linear"))
    c.optimizer("optim", c.take("optim", "adamw_torch"))
    c.dtype(c.take("bf16"), c.take("fp16"))
    c.pace()
    c.option("eval_every", "eval_steps", number(c.take("eval_steps")))
    for key in ("eval_strategy", "evaluation_strategy"):
        if (when := c.take(key)) not in (None, "no", "steps", "epoch"):
            c.lose(key, when, "validation comes once an epoch, or every eval_every steps")
    if c.take("load_best_model_at_end") is False:
        c.variant["keep_best"] = False
    reports = c.take("report_to", [])
    c.track("report_to", reports, [r for r in ([reports] if isinstance(reports, str) else reports) if r not in ("none", "all")])
