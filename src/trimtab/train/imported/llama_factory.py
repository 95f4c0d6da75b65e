"""Settings of LLaMA-Factory (a YAML file with `model_name_or_path` and `stage`, `template` or `finetuning_type`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.train.imported.aims import without_dropout
from trimtab.train.imported.carry import Carry, number
from trimtab.train.imported.sources import from_root, source
from trimtab.train.imported.trainer import HUGGING_FACE, trainer

_FILES = "it is for other commands than training"
IDLE: Mapping[str, str] = {
    **HUGGING_FACE,
    **dict.fromkeys(("do_train", "do_eval", "do_predict", "predict_with_generate", "plot_loss", "overwrite_cache"), "a run does it anyway"),
    **dict.fromkeys(("preprocessing_num_workers", "preprocessing_batch_size", "buffer_size", "streaming"), "tokens are cached in any case"),
    **dict.fromkeys(
        ("flash_attn", "enable_liger_kernel", "use_unsloth", "use_unsloth_gc", "use_v1_kernels"), "trimtab has kernels of its own"
    ),
    **dict.fromkeys(("infer_backend", "infer_dtype", "export_device", "export_size", "export_legacy_format"), _FILES),
    **dict.fromkeys(("quantization_method", "upcast_layernorm"), "how the base is packed is chosen by `quantize`"),
    **dict.fromkeys(("use_fast_tokenizer", "low_cpu_mem_usage", "rope_scaling"), "the base is loaded by its own config"),
    **dict.fromkeys(("neat_packing", "disable_shuffling"), "rows are never padded"),
    **dict.fromkeys(("freeze_vision_tower", "freeze_multi_modal_projector"), "the text tower alone is loaded"),
    **dict.fromkeys(
        ("bias_activation_fusion", "apply_rope_fusion", "use_distributed_optimizer", "overlap_param_gather", "overlap_grad_reduce"),
        "trimtab has kernels of its own",
    ),
    **dict.fromkeys(("moe_grouped_gemm", "moe_token_dispatcher_type", "sequence_parallel"), "trimtab has kernels of its own"),
    "gradient_checkpointing": "`disable_gradient_checkpointing` says it there",
    "mixed_precision": "`bf16` says it there",
    "recompute_granularity": "`activation_checkpointing` runs all layers again",
    "dataset_dir": "data sets were looked up there",
    "tokenized_path": "tokens are cached in any case",
}
LOST: Mapping[str, str] = {
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config", "ray_num_workers"),
        "`trimtab train --ranks N` says how many processes share a batch: this is that of one",
    ),
    **dict.fromkeys(("resize_vocab", "new_special_tokens"), "there is nothing like it here"),
    **dict.fromkeys(("image_max_pixels", "video_max_pixels", "video_fps", "video_maxlen"), "images, video and sound are not read"),
    **dict.fromkeys(("trust_remote_code",), "code that comes with a model is not run: a base that needs it is refused"),
    **dict.fromkeys(
        ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size", "context_parallel_size"),
        "how a model is spread over devices is not carried over: `trimtab train --ranks N` and `shard: true` say it here",
    ),
    **dict.fromkeys(("train_on_prompt",), "what stands before an answer is never supervised"),
}
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("use_galore", "use_apollo", "use_badam", "use_adam_mini"), "there is no such optimizer here"),
    **dict.fromkeys(
        ("use_asft_loss", "use_dft_loss", "use_eaft_loss", "use_llama_pro", "fp8", "use_kt", "mixture_of_depths", "shift_attn"),
        "there is nothing like it here",
    ),
    **dict.fromkeys(("adapter_name_or_path",), "an adapter that is trained already is not trained on"),
    **dict.fromkeys(
        ("export_dir", "export_quantization_bit"), "these are settings of an export: `trimtab merge` or `trimtab export` does that"
    ),
}
STAGES = {"sft": "sft", "pt": "sft", "dpo": "dpo", "kto": "kto", "rm": "reward", "ppo": "ppo"}
PREFERENCES = {"sigmoid": "dpo", "hinge": "dpo", "ipo": "dpo", "orpo": "orpo", "simpo": "simpo", "kto_pair": "kto"}


def carry(c: Carry, data: str | None) -> None:
    c.run["base"] = c.take("model_name_or_path")
    stage, kind = str(c.take("stage", "sft")), str(c.take("finetuning_type", "lora"))
    if kind not in ("lora", "full"):
        c.refuse("finetuning_type", kind, "there are lora and full")
    c.variant["method"] = kind if kind == "full" else "lora"
    if c.take("use_muon"):
        c.given["optim"] = "muon"
    trainer(c)
    if c.take("packing", stage == "pt"):  # on by default where plain texts are learnt
        c.lose("packing", True, "a batch is counted in rows, not in packed sequences: raise batch_size to keep its size")
    if c.variant["method"] == "lora":
        _lora(c)
    bits = number(c.take("quantization_bit"))
    kind, double = c.take("quantization_type"), c.take("double_quantization", True)
    c.quantised(bits == 4, bits == 8, ("quantization_bit", "quantization_bit"), kind=kind, double=double)
    if c.take("pure_bf16"):
        c.run["dtype"] = "bfloat16"
    if (name := c.take("template")) is not None:
        c.lose("template", name, "the base's own chat template is used, in training as in serving")
    if c.take("mask_history"):
        c.variant["last_turn_only"] = True
    if c.take("disable_gradient_checkpointing") is not True:
        c.run["activation_checkpointing"] = True
    c.lose("cutoff_len", c.variant.get("max_length"), "longer rows are left out here, LLaMA-Factory cuts them")
    if stage in ("dpo", "kto", "rm", "ppo"):
        _preference(c, stage)
    elif stage not in STAGES:
        c.refuse("stage", stage, "trimtab does not know it")
    _data(c, stage, data)
    c.end(IDLE, LOST, REFUSED)


def _lora(c: Carry) -> None:
    rank = number(c.take("lora_rank", 8))
    c.method_field("r", "lora_rank", rank)
    c.method_field("lora_alpha", "lora_alpha", number(c.take("lora_alpha", 2 * rank)))
    c.method_field("lora_dropout", "lora_dropout", number(c.take("lora_dropout", 0.0)))
    target = c.take("lora_target", "all")
    c.variant["target_modules"] = "all-linear" if target == "all" else _names(target)
    c.method_field("modules_to_save", "additional_target", _names(c.take("additional_target")))
    for ours in ("use_dora", "use_rslora"):
        c.method_field(ours, ours, c.take(ours))
    c.option("loraplus_lr_ratio", "loraplus_lr_ratio", number(c.take("loraplus_lr_ratio")))
    if c.take("pissa_init"):
        steps = number(c.take("pissa_iter", 16))
        c.method_field("init_lora_weights", "pissa_init", "pissa" if steps == -1 else f"pissa_niter_{steps}")
        c.take("pissa_convert")


def _preference(c: Carry, stage: str) -> None:
    loss, beta = c.take("pref_loss", "sigmoid"), c.take("pref_beta", 0.1)
    if stage == "rm":
        c.objective("reward", "stage", {})
    elif stage == "ppo":
        c.refuse("stage", stage, "rewards and samples of LLaMA-Factory's PPO are not carried over")
    else:
        name = "kto" if stage == "kto" else PREFERENCES.get(str(loss), str(loss))
        fields: dict[str, tuple[str, Any]] = {"beta": ("pref_beta", number(beta))}
        if name == "dpo":
            fields |= {"loss_type": ("pref_loss", [loss]), "label_smoothing": ("dpo_label_smoothing", c.take("dpo_label_smoothing"))}
        if name == "simpo":
            fields["simpo_gamma"] = ("simpo_gamma", c.take("simpo_gamma", 0.5))
        if name == "kto":
            fields |= {
                k: (f"kto_{w}_weight", c.take(f"kto_{w}_weight"))
                for k, w in (("desirable_weight", "chosen"), ("undesirable_weight", "rejected"))
            }
        c.objective(name, "pref_loss" if stage == "dpo" else "stage", fields)
        without_dropout(c, name)
        if mix := number(c.take("pref_ftx", 0)):
            c.lose("pref_ftx", mix, "write `loss_type` with sft and `loss_weights`")


def _data(c: Carry, stage: str, data: str | None) -> None:
    named = _names(c.given.get("dataset"))
    c.set_aside(data, "dataset")
    known = _descriptions(c)
    limit = number(c.take("max_samples"))
    train = [source(data, limit=limit)] if data else _sources(c, "dataset", known, limit, stage)
    if not train and not named:
        c.refuse("dataset", None, "there are no rows to train on: name them with --data")
    rows: dict[str, Any] = {"train": train}
    if valid := _sources(c, "eval_dataset", known, limit, stage):
        rows["valid"] = valid
    elif size := number(c.take("val_size", 0)):
        rows["split"] = size
    c.data["rows"] = rows


def _descriptions(c: Carry) -> Mapping[str, Any]:
    """dataset_info.json, from `dataset_dir`, which starts where the program was called: here, or above the settings."""
    folder = Path(str(c.given.get("dataset_dir") or "data"))
    for start in (Path(), c.folder, *c.folder.absolute().parents):
        file = start / folder / "dataset_info.json"
        if file.is_file():
            c.folder = file.parent
            found = json.loads(file.read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {}
    return {}


def _sources(c: Carry, key: str, known: Mapping[str, Any], limit: Any, stage: str) -> list[Any]:
    names = c.take(key)
    found = []
    instead = ": name its rows with --data" if key == "dataset" else ""
    for name in _names(names) or []:
        described = known.get(name)
        if not isinstance(described, Mapping):
            c.refuse(key, name, f"no dataset_info.json describes it (looked in {c.given.get('dataset_dir') or 'data'}){instead}")
            continue
        found.append(_source(c, name, described, limit, stage))
    return found


def _source(c: Carry, name: str, d: Mapping[str, Any], limit: Any, stage: str) -> Any:
    shared, columns, given = d.get("formatting") == "sharegpt", dict[str, str](), dict(d.get("columns") or {})
    if not shared:
        wanted = {
            "instruction": given.get("prompt"),
            "input": given.get("query"),
            "output": given.get("response"),
            "history": given.get("history"),
        }
        if stage == "pt":
            wanted = {"text": given.get("prompt")}
    else:
        wanted = {"conversations": given.get("messages")}
    wanted |= {k: given.get(k) for k in ("system", "tools", "chosen", "rejected", "kto_tag")}
    columns = {ours: theirs for ours, theirs in wanted.items() if theirs not in (None, ours)}
    for media in ("images", "videos", "audios"):
        if media in given:
            c.lose(f"dataset.{name}.{media}", given[media], "rows with images, video or sound are left out")
    path = d.get("hf_hub_url") or d.get("file_name")
    if path is None:
        c.refuse("dataset", name, "its rows are neither in a file nor on the hub")
        return None
    hub = "hf_hub_url" in d
    subset = f":{d['subset']}" if d.get("subset") else ""
    place = f"hf:{path}{subset}" if hub else from_root(c.folder / str(path), c)
    count = min((n for n in (limit, d.get("num_samples")) if n), default=None)
    return source(place, columns=columns, split=d.get("split") if hub else None, limit=count)


def _names(value: Any) -> list[str] | None:
    if value is None:
        return None
    return [v.strip() for v in value.split(",") if v.strip()] if isinstance(value, str) else list(value)
