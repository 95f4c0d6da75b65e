"""Settings of axolotl (a YAML file with `base_model`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.data.turns import ROLES
from trimtab.train.imported.aims import without_dropout
from trimtab.train.imported.axolotl_keys import IDLE, LOST, REFUSED
from trimtab.train.imported.carry import Carry, is_off, number
from trimtab.train.imported.groups import IDLE as DRAWN_HERE
from trimtab.train.imported.groups import groups
from trimtab.train.imported.sources import located, source

WORDING = "the columns are read; axolotl's wording around them is not written, prompts are rendered by the base's chat template"
TYPES: Mapping[str, Mapping[str, str]] = {
    **{key: {} for key in ("alpaca", "alpaca_w_system", "alpaca:chat", "alpaca_chat", "alpaca:instruct", "alpaca:phi", "alpaca_instruct")},
    **{key: {} for key in ("alpaca_w_system.load", "alpaca_chat.load", "alpaca_instruct.load", "alpaca:load_qa")},
    **{key: {"output": "response"} for key in ("gpteacher", "gpteacher:chat")},
    **{key: {"instruction": "INSTRUCTION", "output": "RESPONSE"} for key in ("oasst", "oasst:chat")},
    "jeopardy": {"instruction": "question", "input": "category", "output": "answer"},
}
"""Types whose rows are an instruction and an answer -> our columns for theirs."""
TALK = ("chat_template", "chat_template.default", "sharegpt", "sharegpt:chat", "sharegpt:load_role")
PAIRED: Mapping[str, Mapping[str, str]] = {
    **{f"{form}.{kind}": {} for form in ("chatml", "llama3") for kind in ("default", "ultra", "prompt_pairs")},
    **{f"{form}.intel": {"prompt": "question"} for form in ("chatml", "llama3")},
    **{f"{form}.icr": {"prompt": "input"} for form in ("chatml", "llama3")},
    **{
        f"{form}.argilla": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"}
        for form in ("chatml", "llama3")
    },
    "bradley_terry.chat_template": {},
    "chat_template.argilla": {},
}
"""Types whose rows are a better and a worse answer -> our columns for theirs."""
AIMS = {"dpo": "dpo", "ipo": "dpo", "kto": "kto", "orpo": "orpo", "simpo": "simpo", "grpo": "grpo", "gdpo": "gdpo", "ebft": "ebft"}


def carry(c: Carry, data: str | None) -> None:
    c.run["base"] = c.take("base_model")
    c.run["out"] = c.take("output_dir", "runs/axolotl")
    rate_and_steps(c)
    _adapter(c)
    _memory(c)
    _objective(c)
    _data(c, data)
    c.end(IDLE, LOST, REFUSED)


def rate_and_steps(c: Carry) -> None:
    micro, total = number(c.take("micro_batch_size", 1)), number(c.take("batch_size"))
    c.option("batch_size", "micro_batch_size", micro)
    accumulated = number(c.take("gradient_accumulation_steps", max(1, total // micro) if total else 1))
    c.option("gradient_accumulation_steps", "gradient_accumulation_steps", accumulated)
    c.option("epochs", "num_epochs", number(c.take("num_epochs", 1)))
    c.renamed(
        "max_steps",
        "lr",
        "weight_decay",
        "max_grad_norm",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_length",
        "seed",
        "neftune_noise_alpha",
    )
    steps, ratio = number(c.take("warmup_steps")), number(c.take("warmup_ratio"))
    c.option(
        "warmup_steps",
        "warmup_steps" if steps is not None else "warmup_ratio",
        steps if steps is not None else 0.03 if ratio is None else ratio,
    )
    c.schedule("lr_scheduler", c.take("lr_scheduler", "cosine"))
    c.optimizer("optimizer", c.take("optimizer", "adamw_torch_fused"))
    if c.take("sample_packing"):
        size = f"{micro} × {c.variant.get('max_length', 'sequence_len')} tokens"
        c.lose("sample_packing", True, f"a batch is counted in rows, not in packed sequences of {size}: raise batch_size to keep its size")
    if (cut := c.take("excess_length_strategy", "drop")) != "drop":
        c.lose("excess_length_strategy", cut, "rows longer than max_length are left out, never cut")


def _adapter(c: Carry) -> None:
    adapter = c.take("adapter")
    if adapter not in (None, "lora", "qlora"):
        c.refuse("adapter", adapter, "there are lora and qlora, and none for full fine-tuning")
    c.variant["method"] = "lora" if adapter else "full"
    fields = {
        **dict.fromkeys(("r", "lora_alpha", "lora_dropout", "modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform")),
        **dict.fromkeys(("use_dora", "use_rslora", "target_parameters", "init_lora_weights")),
    }
    theirs = {"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "layers_to_transform": "peft_layers_to_transform"}
    for ours in fields:
        key = theirs.get(ours, f"peft_{ours}" if ours.startswith(("use_", "init_")) else f"lora_{ours}")
        value = c.take(key)
        if adapter and value is not None and value is not False:
            c.method_field(ours, key, value)
        elif value is not None:
            c.needless(key, value, "there is no adapter" if not adapter else "it is off")
    modules, every = c.take("lora_target_modules"), c.take("lora_target_linear")
    if adapter and (every or modules is not None):
        c.variant["target_modules"] = "all-linear" if every else modules
    elif adapter:
        c.variant["target_modules"] = None  # peft's default for the model's family
    elif modules is not None or every:
        c.needless("lora_target_modules", modules or every, "there is no adapter")
    ratio = number(c.take("loraplus_lr_ratio"))
    c.option("loraplus_lr_ratio", "loraplus_lr_ratio", ratio if adapter else None)


def _memory(c: Carry) -> None:
    # axolotl packs as `bnb_config_kwargs` says, and by default with nf4 and double quantisation
    packing = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} | dict(c.take("bnb_config_kwargs", {}))
    kind, double = packing.pop("bnb_4bit_quant_type"), packing.pop("bnb_4bit_use_double_quant")
    c.quantised(c.take("load_in_4bit"), c.take("load_in_8bit"), kind=kind, double=double)
    for key, value in packing.items():
        c.needless(f"bnb_config_kwargs.{key}", value, "the base computes in its dtype, and is stored in bytes")
    bf16, fp16 = c.take("bf16", c.take("bfloat16")), c.take("fp16", c.take("float16"))
    c.dtype(bf16, fp16)
    if c.take("gradient_checkpointing"):
        c.run["activation_checkpointing"] = True
    if c.take("torch_compile") is True:
        c.run["compile"] = True
    if saves := number(c.take("saves_per_epoch")):
        if (part := _part(c, saves)) < 1:
            c.run["checkpoint_every"] = part
        else:
            c.needless("saves_per_epoch", saves, "a run always ends with a checkpoint; others come every `checkpoint_every` steps")
    c.pace()
    project, used = c.take("wandb_project"), c.take("use_wandb")
    if project and used is not False:
        c.track("wandb_project", project, ["wandb"])
    if c.take("use_tensorboard"):
        c.track("use_tensorboard", True, ["tensorboard"])
    tokens = c.take("special_tokens")
    if isinstance(tokens, Mapping) and (others := {k: v for k, v in tokens.items() if k != "pad_token" and v is not None}):
        c.lose("special_tokens", others, "the tokenizer's own are used; where they are the same, nothing differs")
    elif tokens:
        c.needless("special_tokens", tokens, "rows are never padded")
    template = c.take("chat_template")
    if str(template) not in ("None", "tokenizer_default"):
        c.lose("chat_template", template, "the base's own chat template is used, in training as in serving")
    plugins = c.take("plugins")
    kernels = ("cut_cross_entropy", "liger", "kernels", "scattermoe", "swanlab")
    strange = [p for p in plugins or [] if not any(f".{k}." in str(p).lower() for k in kernels)]
    if strange:
        c.lose("plugins", strange, "plugins of axolotl do not run here")
    elif plugins:
        c.needless("plugins", plugins, "trimtab has kernels and losses of its own")


def _objective(c: Carry) -> None:
    rl, trl = c.take("rl"), c.take("trl", {})
    beta = c.take("rl_beta", trl.get("beta"))
    if rl is not None:
        fields: dict[str, tuple[str, Any]] = {
            "beta": ("rl_beta", beta),
            "loss_type": ("dpo_loss_type", ["ipo"] if rl == "ipo" else c.take("dpo_loss_type")),
            "loss_weights": ("dpo_loss_weights", c.take("dpo_loss_weights")),
            "label_smoothing": ("dpo_label_smoothing", c.take("dpo_label_smoothing")),
            "desirable_weight": ("kto_desirable_weight", c.take("kto_desirable_weight")),
            "undesirable_weight": ("kto_undesirable_weight", c.take("kto_undesirable_weight")),
        }
        if rl == "orpo":
            fields["beta"] = ("orpo_alpha", c.take("orpo_alpha", beta))
        elif rl == "simpo":
            defaults = {"simpo_gamma": 0.5, "cpo_alpha": 1.0}  # those of TRL's CPOConfig
            fields |= {key: (key, c.take(key, default)) for key, default in defaults.items()}
            fields["beta"] = ("rl_beta", 0.1 if beta is None else beta)
        if rl == "grpo":
            rest = dict(trl) | {"beta": beta}
            groups(c, rest.pop, "trl.")
            trl = {k: v for k, v in rest.items() if k not in DRAWN_HERE}
        else:
            c.objective(AIMS.get(str(rl), str(rl)), "rl", fields)
            without_dropout(c, str(rl))
        for key in trl.keys() - {"beta"}:
            c.lose(f"trl.{key}", trl[key], "it is not carried over")
    elif trl:
        c.lose("trl", trl, "there is no `rl`")
    if c.take("reward_model"):
        c.objective(
            "reward", "reward_model", {"center_rewards_coefficient": ("center_rewards_coefficient", c.take("center_rewards_coefficient"))}
        )
        c.take("num_labels")
    if c.take("process_reward_model"):
        c.objective("stepwise", "process_reward_model", {})
        c.take("num_labels")
    if c.variant.get("objective") in ("reward", "stepwise"):
        without_dropout(c, c.variant["objective"])
    if c.variant["method"] == "full" and c.variant.get("objective") in ("reward", "stepwise"):
        c.refuse("adapter", None, "the head that gives rewards is a part of an adapter: without one it is not trained")


def _data(c: Carry, data: str | None) -> None:
    c.set_aside(data, "datasets", "pretraining_dataset")
    if c.take("train_on_inputs"):
        c.lose("train_on_inputs", True, "what stands before an answer is never supervised")
    size = number(c.take("val_set_size", 0))
    sets, tests, texts = c.take("datasets", []), c.take("test_datasets"), c.take("pretraining_dataset")
    if not isinstance(sets, list) or not isinstance(texts or [], list):
        sets, texts = ([sets] if sets else []), ([texts] if texts else [])
    found = [_source(c, s, f"datasets[{i}]") for i, s in enumerate(sets)]
    found += [_text(c, s, f"pretraining_dataset[{i}]") for i, s in enumerate(texts or [])]
    found += [data] if data else []
    if not found:
        c.refuse("datasets", None, "there are no rows to train on: name them with --data")
    rows: dict[str, Any] = {"train": [s for s in found if s is not None]}
    if tests:
        rows["valid"] = [s for i, t in enumerate(tests) if (s := _source(c, t, f"test_datasets[{i}]")) is not None]
    elif size:
        rows["split"] = size
    c.data["rows"] = rows
    _validation(c, bool(tests or size))


def _validation(c: Carry, held: bool) -> None:
    steps, often = number(c.take("eval_steps")), number(c.take("evals_per_epoch"))
    patience, best = c.take("early_stopping_patience"), c.take("load_best_model_at_end")
    strategy = c.take("eval_strategy", c.take("evaluation_strategy"))
    given = {"eval_steps": steps, "evals_per_epoch": often, "early_stopping_patience": patience, "load_best_model_at_end": best}
    if not held:
        for key, value in given.items():
            if value is not None:
                c.needless(key, value, "there are no rows to validate on")
        return
    if str(strategy) == "no":
        c.lose("eval_strategy", strategy, "rows that are held out are validated on once an epoch")
    if steps:
        c.option("eval_every", "eval_steps", steps)
    if often and often != 1 and (part := _part(c, often)) < 1:
        c.option("eval_every", "evals_per_epoch", part)
    elif often and often != 1:
        c.needless("evals_per_epoch", often, "rows that are held out are always validated on at the end")
    c.option("patience", "early_stopping_patience", patience)
    if best is False:
        c.option("keep_best", "load_best_model_at_end", False)


def _part(c: Carry, per_epoch: Any) -> float:
    """So often an epoch, as a part of all steps; 1 and more are the end alone, as in axolotl."""
    return 1 / (per_epoch * float(c.variant.get("epochs", 1)))


def _source(c: Carry, given: Any, where: str) -> Any:
    """A source; None where its rows cannot be read as they are meant, which is noted."""
    given = {"path": given} if isinstance(given, str) else dict(given)
    kind, columns, where_type = given.pop("type", None), dict[str, str](), f"{where}.type"
    kind = "sharegpt" if kind is None and "conversation" in given else kind
    given.pop("conversation", None)
    if isinstance(kind, Mapping):
        columns = {
            ours: str(v) for ours in ("instruction", "input", "output", "system") if (v := kind.get(f"field_{ours}")) not in (None, ours)
        }
        c.lose(where_type, dict(kind), WORDING)
    elif kind in TYPES:
        columns = dict(TYPES[str(kind)])
        c.lose(where_type, kind, WORDING)
    elif "objective" in c.variant or any(n.key in ("rl", "reward_model", "process_reward_model") for n in c.refused):
        columns = {ours: v for ours in ("chosen", "rejected") if (v := given.pop(f"field_{ours}", ours)) != ours}
        one_answer = c.variant.get("objective") == "kto"
        columns |= {ours: v for ours, v in PAIRED.get(str(kind), {}).items() if ours == "prompt" or not one_answer}
        _talk(c, given, columns, where)
        if kind in PAIRED and "chat_template" not in str(kind):
            c.lose(where_type, kind, WORDING)
        elif kind == "stepwise_supervised" and c.variant.get("objective") == "stepwise":
            _steps(c, given, where)
        elif kind not in (*TALK, *PAIRED, None):
            c.refuse(where_type, kind, "trimtab does not know how its rows are to be read")
    elif kind in TALK or (kind is None and "chat_template" in given):
        _talk(c, given, columns, where)
    elif kind in ("completion", "pretrain"):
        return _text(c, given, where)
    else:
        c.refuse(where_type, kind, "trimtab does not know how its rows are to be read")
    return _finished(c, given, columns, where)


def _talk(c: Carry, given: dict[str, Any], columns: dict[str, str], where: str) -> None:
    if (messages := given.pop("field_messages", None)) not in (None, "messages"):
        columns["messages"] = str(messages)
    if (system := given.pop("field_system", None)) not in (None, "system"):
        columns["system"] = str(system)
    names = dict(given.pop("message_property_mappings", None) or {})
    names |= {ours: v for ours in ("role", "content") if (v := given.pop(f"message_field_{ours}", None)) is not None}
    strange = {k: v for k, v in names.items() if v != k and (k, v) not in (("role", "from"), ("content", "value"))}
    if strange:
        c.refuse(f"{where}.message_property_mappings", strange, "messages have role and content, or from and value")
    roles = given.pop("roles", None) or {}
    wrong = {k: v for k, v in roles.items() if any(ROLES.get(name) != k for name in v)}
    if wrong:
        c.lose(f"{where}.roles", wrong, f"the roles there are: {', '.join(ROLES)}")
    learnt = given.pop("roles_to_train", None)
    if learnt and not {ROLES.get(r) for r in learnt} <= {"assistant"}:
        c.lose(f"{where}.roles_to_train", learnt, "answers of the assistant are supervised, nothing else")
    if (ends := given.pop("train_on_eos", None)) not in (None, "turn"):
        c.lose(f"{where}.train_on_eos", ends, "the end of each supervised turn is learnt")
    for key in ("field_thinking", "template_thinking_key"):
        if (thought := given.pop(key, None)) not in (None, "reasoning_content", "thinking"):
            c.lose(f"{where}.{key}", thought, "reasoning stands in reasoning_content or thinking")
    if (mark := given.pop("message_field_training", None)) not in (None, "train", "training", "weight"):
        c.lose(f"{where}.message_field_training", mark, "a turn is marked by `train`, `training` or `weight`")
    if (template := given.pop("chat_template", None)) not in (None, "tokenizer_default"):
        c.lose(f"{where}.chat_template", template, "the base's own chat template is used, in training as in serving")


def _steps(c: Carry, given: dict[str, Any], where: str) -> None:
    if (separator := given.pop("step_separator", None)) not in (None, "\n"):
        c.refuse(f"{where}.step_separator", separator, "each step ends with a line break")
    if given.pop("train_on_last_step_only", None):
        c.refuse(f"{where}.train_on_last_step_only", True, "every step is judged")


def _text(c: Carry, given: Any, where: str) -> Any:
    given = {"path": given} if isinstance(given, str) else dict(given)
    given.pop("type", None)
    name = given.pop("field", None) or given.pop("text_column", None) or "text"
    c.lose(f"{where}.type", "text", "texts longer than sequence_len are left out, not cut into several rows")
    return _finished(c, given, {} if name == "text" else {"text": str(name)}, where)


def _finished(c: Carry, given: dict[str, Any], columns: dict[str, str], where: str) -> Any:
    path, files = given.pop("path", None), given.pop("data_files", None)
    kind, split, name = given.pop("ds_type", None), given.pop("split", None), given.pop("name", None)
    if path is None:
        c.refuse(where, given, "it has no path")
        return None
    if files:
        first = files[0] if isinstance(files, list) and len(files) == 1 else files
        if kind == path or path in ("json", "csv", "parquet", "text"):
            path = first
        else:
            c.refuse(f"{where}.data_files", files, "single files of a hub data set are not read: download them and name them")
    if isinstance(path, list):
        c.refuse(f"{where}.data_files", path, "give each file a source of its own")
        return None
    place = located(path, c, name)
    format = {"json": "jsonl" if str(path).endswith("l") else "json", "arrow": None}.get(str(kind), kind)
    for key, value in given.items():
        if key in ("trust_remote_code", "streaming", "shards", "preprocess_shards") and is_off(value):
            continue
        if not is_off(value):
            c.lose(f"{where}.{key}", value, "it is not carried over")
    hub = place.startswith("hf:")
    if split not in (None, "train") and not hub:
        c.lose(f"{where}.split", split, "a file has no splits: write `limit`, or `split` with a number")
    known = format in ("jsonl", "json", "csv", "parquet", "text") and not hub
    return source(place, columns=columns, split=split if hub and split != "train" else None, format=format if known else None)
