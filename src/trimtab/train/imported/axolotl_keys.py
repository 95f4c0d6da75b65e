"""What becomes of those keys of axolotl that have nothing of ours to be carried to."""

from __future__ import annotations

from collections.abc import Mapping

_KERNEL = "trimtab has kernels of its own"
_ROWS = "rows are never padded, and enter a forward by their length"
_LOGS = "metrics.jsonl and report.html are always written"
_KEPT = "checkpoints are for going on, and come every checkpoint_every steps"
_CACHE = "tokens are cached in any case"
_LOADS = "the base is loaded by its own config"
_MEMORY = "it saves memory, and changes no number; `max_tokens` and `activation_checkpointing` bound memory here"

IDLE: Mapping[str, str] = {
    **dict.fromkeys(("flash_attention", "xformers_attention", "sdp_attention", "flex_attention", "eager_attention"), _KERNEL),
    **dict.fromkeys(("attn_implementation", "flex_attn_compile_kwargs", "gemma4_hybrid_attn_impl", "fused_attn_kernel"), _KERNEL),
    **dict.fromkeys(("flash_attn_cross_entropy", "flash_attn_rms_norm", "flash_attn_fuse_mlp", "flash_optimum", "sage_attention"), _KERNEL),
    **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel", "cut_cross_entropy"), _KERNEL),
    **dict.fromkeys(("liger_rope", "liger_rms_norm", "liger_rms_norm_gated", "liger_glu_activation", "liger_layer_norm"), _KERNEL),
    **dict.fromkeys(("liger_fused_linear_cross_entropy", "liger_cross_entropy", "chunked_cross_entropy", "use_kernels"), _KERNEL),
    **dict.fromkeys(("use_scattermoe", "use_sonicmoe", "experts_implementation", "use_dsv4_kernels", "use_glm_dsa_kernels"), _KERNEL),
    **dict.fromkeys(("dsv4_fp4_grouped_mode", "torch_compile_mode", "torch_compile_backend", "tiled_mlp", "tf32"), _KERNEL),
    **dict.fromkeys(("pad_to_sequence_len", "eval_sample_packing", "group_by_length", "sample_packing_eff_est", "batch_flattening"), _ROWS),
    **dict.fromkeys(
        ("sample_packing_seq_len_multiplier", "total_num_tokens", "sample_packing_group_size", "pretrain_multipack_attn"), _ROWS
    ),
    **dict.fromkeys(("sample_packing_sequentially", "multipack_real_batches", "max_packed_sequence_len", "pad_to_multiple_of"), _ROWS),
    **dict.fromkeys(("wandb_name", "wandb_entity", "wandb_watch", "wandb_log_model", "wandb_run_id", "wandb_mode"), _LOGS),
    **dict.fromkeys(("include_tkps", "include_tokens_per_second", "use_otel_metrics", "otel_metrics_host", "otel_metrics_port"), _LOGS),
    **dict.fromkeys(("save_strategy", "save_only_model", "save_safetensors", "save_first_step"), _KEPT),
    **dict.fromkeys(("dataset_prepared_path", "dataset_processes", "dataset_num_proc", "dataset_keep_in_memory"), _CACHE),
    **dict.fromkeys(("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "streaming"), _CACHE),
    **dict.fromkeys(("streaming_multipack_buffer_size", "skip_prepare_dataset", "remove_unused_columns"), _CACHE),
    **dict.fromkeys(("model_type", "tokenizer_type", "low_cpu_mem_usage", "device_map", "is_llama_derived_model"), _LOADS),
    **dict.fromkeys(("is_mistral_derived_model", "is_falcon_derived_model", "is_qwen_derived_model", "tokenizer_use_fast"), _LOADS),
    **dict.fromkeys(("tokenizer_legacy", "base_model_config", "experimental_skip_move_to_device", "base_model_ignore_patterns"), _LOADS),
    **dict.fromkeys(("gradient_checkpointing_kwargs", "activation_offloading", "lora_on_cpu", "selective_checkpointing"), _MEMORY),
    **dict.fromkeys(("gc_steps", "torch_empty_cache_steps", "layer_offloading", "gpu_memory_limit", "max_memory"), _MEMORY),
    **dict.fromkeys(
        ("local_rank", "ddp_timeout", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "accelerator_config"), "a run is one process"
    ),
    **dict.fromkeys(("eval_batch_size", "eval_max_new_tokens", "eval_table_size"), "validation is bounded by `max_tokens` and `evaluate`"),
    **dict.fromkeys(("do_causal_lm_eval", "eval_causal_lm_metrics"), "loss and perplexity of held-out rows are always reported"),
    "eot_tokens": "the end of a turn is found by the chat template, and always learnt",
    "shuffle_merged_datasets": "rows of all sources are drawn in one order",
    "lora_fan_in_fan_out": "it is told from the module",
    "hf_use_auth_token": "the login of huggingface_hub is used",
    "freeze_mm_modules": "the text tower alone is loaded",
    "qlora_sharded_model_loading": "a run is one process",
    "peft_autocast_adapter_dtype": "adapters train in fp32",
    "auto_resume_from_checkpoints": "write --resume",
    **dict.fromkeys(("vllm", "expert_parallel_token_capacity", "gptq_disable_exllama", "llama4_linearized_experts"), _KERNEL),
    **dict.fromkeys(("debug", "test_value", "strict"), "it says nothing of the training"),
    **dict.fromkeys(("cls_model_config", "torch_dtype", "full_finetune"), _LOADS),
}

_DEVICES = "`trimtab train --ranks N` says how many processes share a batch: this is that of one"
_TRAINS = "it changes the training, and there is nothing like it here"
_IMAGES = "images and sound are not read: rows with them are left out, and the text tower alone is trained"
_PUSH = "nothing is uploaded: `trimtab adapters push` does that"
_TOKENIZER = "the base's own tokenizer is used as it is"

LOST: Mapping[str, str] = {
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "fsdp_version", "fsdp_final_state_dict_type", "ddp"), _DEVICES),
    **dict.fromkeys(
        ("dp_shard_size", "dp_replicate_size", "tensor_parallel_size", "context_parallel_size", "expert_parallel_size"), _DEVICES
    ),
    **dict.fromkeys(("sequence_parallel_degree", "use_ray", "ray_num_workers", "expert_parallel_num_nvl_bytes"), _DEVICES),
    **dict.fromkeys(("cosine_min_lr_ratio", "cosine_constant_lr_ratio", "eta_min", "lr_quadratic_warmup"), _TRAINS),
    **dict.fromkeys(("embedding_lr", "embedding_lr_scale", "lr_groups", "optim_args", "optim_target_modules"), _TRAINS),
    **dict.fromkeys(("lisa_step_interval", "lisa_layers_attribute", "relora_prune_ratio", "fp8_enable_fsdp_float8_all_gather"), _TRAINS),
    **dict.fromkeys(("jagged_restart_steps", "jagged_restart_warmup_steps", "jagged_restart_anneal_steps"), _TRAINS),
    **dict.fromkeys(("curriculum_sampling", "dataset_exact_deduplication", "min_sample_len", "drop_system_message"), _TRAINS),
    **dict.fromkeys(("use_eaft", "eaft_alpha", "eaft_k", "loraplus_lr_embedding", "peft", "fix_untrained_tokens"), _TRAINS),
    **dict.fromkeys(("processor_type", "image_size", "image_resize_algorithm"), _IMAGES),
    **dict.fromkeys(("hub_model_id", "hub_strategy", "push_dataset_to_hub"), _PUSH),
    **dict.fromkeys(("tokens", "tokenizer_config", "tokenizer_use_mistral_common", "resize_token_embeddings_to_32x"), _TOKENIZER),
    **dict.fromkeys(("added_tokens_overrides", "chat_template_jinja", "chat_template_kwargs", "shrink_embeddings"), _TOKENIZER),
    **dict.fromkeys(("loss_watchdog_threshold", "loss_watchdog_patience"), "only a loss that is not finite stops a variant"),
    "trust_remote_code": "code that comes with a model is not run: a base that needs it is refused",
    "revision_of_model": "the newest revision is loaded: download the one that is meant, and name its folder",
    "resume_from_checkpoint": "a run goes on from its own folder: --resume",
    "metric_for_best_model": "validation judges by the loss: write valid_metric for another",
    "default_system_message": "write `system` at the sources",
    "quantize_moe_experts": "whether experts are packed is decided by the base's format",
    **dict.fromkeys(
        ("model_quantization_config", "model_quantization_config_kwargs"), "the base is read in the format in which it is stored"
    ),
    **dict.fromkeys(
        ("use_swanlab", "swanlab_project", "swanlab_mode", "swanlab_workspace"), "there are tensorboard and wandb: write `track`"
    ),
    **dict.fromkeys(("swanlab_experiment_name", "swanlab_description", "swanlab_log_completions"), "there are tensorboard and wandb"),
    **dict.fromkeys(("swanlab_completion_log_interval", "swanlab_completion_max_buffer"), "there are tensorboard and wandb"),
    **dict.fromkeys(("model_config", "nvfp4_merge_aware"), "the base is used as its own config says"),
    "context_parapllel_size": "axolotl does not know this key either (context_parallel_size)",
    "gptq": "the base is read in the format in which it is stored",
}

_OTHER = "it trains something else, and there is nothing like it here"

REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("qat", "relora", "lisa_n_layers", "diffusion", "reinit_weights", "llmcompressor", "use_onebitllms", "fp8"), _OTHER),
    "ebft": _OTHER,
    "unfrozen_parameters": "parts of a base are trained by adapters: name them in target_modules or modules_to_save",
    "lora_model_dir": "an adapter that is trained already is not trained on",
}
"""Without these the run file would be another training than the one that is meant."""
