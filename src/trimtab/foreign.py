"""Names that people bring from peft, transformers, TRL, axolotl, LLaMA-Factory and Unsloth, and what they are called here.

None of them is taken for ours in silence: each is answered by an error that says what to write.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches

from trimtab.errors import nearest

OURS: Mapping[str, Collection[str]] = {
    # training options
    "lr": ("learning_rate", "base_lr", "peak_lr"),
    "epochs": ("num_train_epochs", "num_epochs", "n_epochs"),
    "max_steps": ("steps", "num_steps", "train_steps", "max_train_steps", "num_train_steps", "iters"),
    "batch_size": (
        "per_device_train_batch_size",
        "per_device_batch_size",
        "per_gpu_train_batch_size",
        "train_batch_size",
        "micro_batch_size",
        "micro_batch",
        "minibatch_size",
        "bsz",
    ),
    "gradient_accumulation_steps": (
        "gradient_accumulation",
        "gradient_accumulation_step",
        "grad_accumulation_steps",
        "grad_accumulation",
        "grad_accum_steps",
        "grad_accum",
        "accumulate_grad_batches",
        "accumulation_steps",
    ),
    "schedule": ("lr_scheduler_type", "lr_scheduler", "lr_schedule", "scheduler", "scheduler_type"),
    "warmup_steps": ("num_warmup_steps", "lr_warmup_steps", "warmup", "warmup_iters"),
    "loraplus_lr_ratio": ("loraplus_ratio", "lora_plus_lr_ratio"),
    "max_grad_norm": ("max_gradient_norm", "max_norm", "gradient_clipping", "gradient_clip_val", "clip_grad_norm", "grad_clip"),
    "adam_beta1": ("beta1", "adam_b1"),
    "adam_beta2": ("beta2", "adam_b2"),
    "adam_epsilon": ("adam_eps", "eps", "epsilon"),
    "max_length": (
        "max_seq_length",
        "max_seq_len",
        "sequence_len",
        "sequence_length",
        "cutoff_len",
        "model_max_length",
        "max_len",
        "seq_len",
    ),
    "eval_every": ("eval_steps", "eval_interval", "steps_per_eval", "validation_steps", "val_check_interval"),
    "valid_metric": ("metric_for_best_model", "eval_metric"),
    "patience": ("early_stopping_patience", "early_stopping"),
    "keep_best": ("load_best_model_at_end", "save_best", "keep_best_model"),
    "optimizer": ("optim", "optimizer_type", "optim_type"),
    "neftune_noise_alpha": ("neftune_alpha", "noisy_embedding_alpha"),
    "seed": ("random_seed", "data_seed"),
    # methods and their fields
    "method": ("adapter", "adapter_type", "peft_type", "peft_method", "peft", "finetuning_type", "fine_tune_type"),
    "r": ("lora_r", "rank", "lora_rank", "lora_dim"),
    "lora_alpha": ("alpha", "lora_scale"),
    "lora_dropout": ("dropout",),
    "dropout": ("lora_dropout", "adapter_dropout"),
    "use_dora": ("dora",),
    "use_rslora": ("rslora", "rs_lora"),
    "target_modules": ("lora_target_modules", "lora_target", "lora_targets", "lora_modules", "targets", "modules"),
    "modules_to_save": ("lora_modules_to_save", "additional_target", "additional_trainable_modules"),
    "layers_to_transform": ("peft_layers_to_transform", "lora_layers"),
    "num_virtual_tokens": ("virtual_tokens", "num_soft_tokens", "prompt_length", "prefix_length", "pre_seq_len", "num_tokens"),
    # the run
    "base": ("base_model", "model", "model_id", "model_name", "model_name_or_path", "base_model_name_or_path", "model_path"),
    "out": ("output_dir", "output", "output_path", "out_dir", "save_path", "adapter_path"),
    "data": ("dataset", "datasets", "dataset_name"),
    "defaults": ("training", "train_args", "training_arguments", "training_args", "sft"),
    "dtype": ("torch_dtype", "precision", "compute_dtype", "mixed_precision"),
    "max_tokens": ("max_batch_tokens", "tokens_per_batch", "batch_tokens"),
    "activation_checkpointing": ("gradient_checkpointing", "grad_checkpoint", "use_gradient_checkpointing"),
    "compile": ("torch_compile",),
    "log_every": ("logging_steps", "log_steps", "steps_per_report"),
    "checkpoint_every": ("save_steps", "save_every", "checkpoint_steps"),
    "keep_checkpoints": ("save_total_limit",),
    "track": ("report_to", "logger", "loggers"),
    "evaluate": ("eval", "evaluation"),
    "max_rows": ("max_samples", "num_samples", "max_eval_samples"),
    "max_new_tokens": ("max_completion_tokens", "generation_max_length"),
    # data sets and sources
    "train": ("train_file", "train_files", "train_data", "train_path", "train_dataset", "training_data"),
    "valid": ("validation", "val", "dev", "eval_file", "valid_file", "val_file", "validation_file", "eval_dataset", "val_data"),
    "test": ("test_file", "test_data", "test_path", "test_dataset"),
    "path": ("file", "files", "file_name", "data_files", "data_path", "name"),
    "columns": ("column_mapping", "column_map", "field_mapping"),
    "system": ("system_prompt", "system_message", "default_system"),
    "format": ("ds_type", "file_type"),
    "weight": ("ratio", "sampling_weight", "probability"),
}
"""Our key -> what others call it."""

_QUANTISED = "write `quantize: nf4` (4 bits) or `quantize: int8` at the top of the run file; a base that is stored so needs no key"
_DTYPE = "write `dtype: bfloat16` or `dtype: float16` at the top of the run file"
_GONE: Mapping[str, str] = {
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantization", "quantization_bit", "bits", "qlora", "use_qlora"), _QUANTISED),
    **dict.fromkeys(("bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant", "quantization_config"), _QUANTISED),
    **dict.fromkeys(("bf16", "fp16", "half"), _DTYPE),
    "lora": "write `method: lora` and its fields, such as `r: 16`, beside the other keys of a variant",
    "warmup_ratio": "write warmup_steps, which below 1 is a part of all steps",
    "lora_target_linear": "write `target_modules: all-linear`, which is the default",
    **dict.fromkeys(("packing", "sample_packing", "pad_to_sequence_len", "group_by_length"), "rows are never padded here: take it away"),
    **dict.fromkeys(("task_type", "trust_remote_code", "inference_mode", "fan_in_fan_out"), "there is no choice here: take it away"),
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config", "ddp"), "take it away; `trimtab train RUN.yaml --ranks N` trains in several processes"
    ),
    **dict.fromkeys(("per_device_eval_batch_size", "eval_batch_size"), "validation is bounded by max_tokens, as training is: take it away"),
}
"""What has no key of ours, and what to do about it."""

_METHODS: Mapping[str, str] = {
    **dict.fromkeys(("dora", "use_dora"), "DoRA is `method: lora` with `use_dora: true`"),
    **dict.fromkeys(("rslora", "rs_lora"), "rank-stabilised LoRA is `method: lora` with `use_rslora: true`"),
    "qlora": "QLoRA is LoRA on a 4-bit base: write `method: lora`, and `quantize: nf4` at the top of the run file",
    **dict.fromkeys(("prompt_tuning", "prompttuning", "soft_prompt", "p_tuning"), "write `method: prompt`"),
    **dict.fromkeys(("prefix_tuning", "prefixtuning", "p_tuning_v2"), "write `method: prefix`"),
    **dict.fromkeys(("adapter", "adapters", "houlsby", "pfeiffer", "seq_bn", "double_seq_bn"), "write `method: bottleneck`"),
    **dict.fromkeys(("full_finetune", "full_finetuning", "full_fine_tuning", "fft", "sft", "none"), "write `method: full`"),
    **dict.fromkeys(("(ia)3", "ia_3", "ia³", "(ia)³"), "write `method: ia3`"),
}


def answer(key: object, known: Iterable[str], homes: Mapping[str, str] | None = None) -> str:
    """What to write instead of an unknown key, as ": …" or " (did you mean …?)"; "" where nobody can tell.

    known: the keys that there are in this place. homes: keys that there are elsewhere -> where.
    """
    known, homes = list(known), homes or {}
    plain = _plain(key)
    called = [plain, *(ours for ours, theirs in OURS.items() if plain in theirs)]
    if here := [ours for ours in called if ours in known]:
        return f": write {here[-1]}"
    if plain in _GONE:
        return f": {_GONE[plain]}"
    if near := get_close_matches(str(key), known, n=1, cutoff=0.9):
        return f" (did you mean {near[0]!r}?)"
    if there := [ours for ours in called if ours in homes]:
        ours = there[0]
        return f": {'it' if ours == plain else ours} belongs {homes[ours]}"
    return nearest(str(key), known)


def method_answer(name: object, known: Iterable[str]) -> str:
    """The same for the name of a method that there is not."""
    known, plain = list(known), _plain(name)
    if not isinstance(name, str):
        return ""
    if plain in known:
        return f": write {plain}"
    return f": {_METHODS[plain]}" if plain in _METHODS else nearest(str(name), known)


def _plain(word: object) -> str:
    return str(word).strip().lower().replace("-", "_").replace(" ", "_")
