"""Settings of other programs, and files of rows, become run files. What is expected was written by hand from those programs' documents."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from trimtab.cli import main
from trimtab.errors import ConfigError, DataError
from trimtab.train import RunConfig
from trimtab.train.imported import content, read_settings, run_text
from trimtab.train.imported.carry import Carry
from trimtab.train.initial import guess
from trimtab.train.initial import run_text as first_file

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
import trl
from trl.experimental.cpo import CPOConfig
from trl.experimental.orpo import ORPOConfig

AXOLOTL = """
base_model: org/base
datasets:
  - {path: rows.jsonl, type: chat_template, field_messages: talk, message_property_mappings: {role: from, content: value}, split: train}
  - {path: org/set, name: en, type: alpaca, split: "train[:10%]"}
val_set_size: 0.05
output_dir: ./out
adapter: qlora
load_in_4bit: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
sequence_len: 2048
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
optimizer: adamw_torch_fused
lr_scheduler: constant_with_warmup
learning_rate: 2e-5
warmup_ratio: 0.1
bf16: auto
tf32: true
gradient_checkpointing: true
flash_attention: true
wandb_project:
made_up_key: 3
"""
LLAMA_FACTORY = """
model_name_or_path: org/base
stage: sft
finetuning_type: lora
lora_target: q_proj,v_proj
dataset: talks,pairs
dataset_dir: data
template: qwen
cutoff_len: 512
max_samples: 100
learning_rate: 1.0e-4
warmup_ratio: 0.1
lr_scheduler_type: cosine
bf16: true
val_size: 0.1
mask_history: true
"""
TRL = """
model_name_or_path: org/base
dataset_name: org/set
use_peft: true
lora_target_modules: all-linear
learning_rate: 2.0e-4
per_device_train_batch_size: 4
assistant_only_loss: true
"""
UNSLOTH = """
model: unsloth/base
data: {dataset: org/set, format_type: auto}
training: {training_type: lora, max_seq_length: 512, load_in_4bit: false, num_epochs: 1, learning_rate: 0.0002, batch_size: 2,
  random_seed: 7, gradient_accumulation_steps: 4, warmup_steps: 5, max_steps: 0, weight_decay: 0.001,
  gradient_checkpointing: unsloth, optim: adamw_torch}
lora: {lora_r: 64, lora_alpha: 16, lora_dropout: 0.0, target_modules: "q_proj,v_proj", use_rslora: true}
logging: {enable_wandb: false}
"""


def _read(folder: Path, text: str, name: str = "settings.yml", data: str | None = None, program: str | None = None) -> Carry:
    (folder / name).write_text(text)
    return read_settings(folder / name, program, data=data)


def _run(carry: Carry) -> dict[str, Any]:
    """The run file's content as YAML gives it, which `RunConfig` must take."""
    assert not carry.refused
    found = yaml.safe_load(run_text(carry, "settings.yml"))
    RunConfig.from_dict(found, root=carry.folder)
    return dict(found)


def _lost(carry: Carry) -> set[str]:
    return {note.key for note in carry.lost}


def test_axolotl(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"talk": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}))
    carry = _read(tmp_path, AXOLOTL)
    run = _run(carry)
    assert run["base"] == "org/base" and run["out"] == "./out" and run["activation_checkpointing"] is True
    assert run["data"] == {
        "rows": {
            "train": [{"path": "rows.jsonl", "columns": {"messages": "talk"}}, {"path": "hf:org/set:en", "split": "train[:10%]"}],
            "split": 0.05,
        }
    }
    assert run["variants"]["lora"] == {
        "data": "rows", "method": "lora", "batch_size": 2, "gradient_accumulation_steps": 4, "epochs": 3, "lr": 2e-5, "max_length": 2048,
        "warmup_steps": 0.1, "schedule": "constant", "r": 32, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear",
    }  # fmt: skip
    assert run["quantize"] == "nf4-double" and {"sample_packing", "datasets[1].type", "made_up_key"} <= _lost(carry)
    assert not carry.given, "every key is looked at"
    named = {n.key for n in [*carry.idle, *carry.lost]}
    assert {"tf32", "flash_attention"} <= named and "wandb_project" not in named


@pytest.mark.parametrize(
    ("rl", "columns"),
    [
        ("dpo", {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"}),
        ("kto", {"prompt": "instruction"}),  # axolotl's prompt_strategies/kto/llama3.py: instruction and completion
    ],
)
def test_preferences_of_axolotl(tmp_path: Path, rl: str, columns: dict[str, str]) -> None:
    rows = "datasets: [{path: org/set, type: llama3.argilla}]"
    run = _run(_read(tmp_path, f"base_model: b\nadapter: lora\nlora_r: 8\nlearning_rate: 1e-5\nrl: {rl}\n{rows}"))
    assert run["variants"]["lora"]["objective"] == rl and run["data"]["rows"]["train"] == [{"path": "hf:org/set", "columns": columns}]


def test_full_fine_tuning_and_defaults_of_axolotl(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"chapter": "x"}')
    rows = "datasets: [{path: t.jsonl, type: completion, field: chapter}]"
    run = _run(_read(tmp_path, f"base_model: b\nlearning_rate: 1e-5\n{rows}\nlr_scheduler: constant\nwarmup_ratio: 0.1"))
    v = run["variants"]["full"]
    assert (v["method"], v["batch_size"], v["epochs"], v["schedule"]) == ("full", 1, 1, "constant")
    assert "warmup_steps" not in v and "target_modules" not in v
    assert run["data"]["rows"] == {"train": [{"path": "t.jsonl", "columns": {"text": "chapter"}}]}


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("rl: no_such_thing", "rl"),
        ("adapter: oft", "adapter"),
        ("relora: true", "relora"),
        ("datasets: [{path: t.jsonl, type: my.own.module}]", "datasets[0].type"),
        ("datasets: []", "datasets"),
        ("lora_model_dir: x", "lora_model_dir"),
    ],
)
def test_another_training_is_refused(tmp_path: Path, line: str, key: str) -> None:
    settings = {"base_model": "b", "learning_rate": 1e-5, "datasets": [{"path": "hf:a/b", "type": "alpaca"}]}
    (tmp_path / "s.yml").write_text(yaml.safe_dump(settings | yaml.safe_load(line)))
    assert [n.key for n in read_settings(tmp_path / "s.yml").refused] == [key]
    result = CliRunner().invoke(main, ["import-config", str(tmp_path / "s.yml"), "--out", str(tmp_path / "run.yaml")])
    assert result.exit_code == 2 and not (tmp_path / "run.yaml").exists()


def test_llama_factory(tmp_path: Path) -> None:
    info = {
        "talks": {"file_name": "talks.json", "formatting": "sharegpt", "columns": {"messages": "dialog"}},
        "pairs": {"hf_hub_url": "org/pairs", "subset": "en", "num_samples": 50, "columns": {"prompt": "q", "response": "a"}},
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "data" / "talks.json").write_text(
        json.dumps([{"dialog": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}])
    )
    carry = _read(tmp_path, LLAMA_FACTORY)
    run = _run(carry)
    talks = {"path": str(tmp_path / "data" / "talks.json"), "columns": {"conversations": "dialog"}, "limit": 100}
    pairs = {"path": "hf:org/pairs:en", "columns": {"instruction": "q", "output": "a"}, "limit": 50}
    assert run["data"]["rows"] == {"train": [talks, pairs], "split": 0.1}
    v = run["variants"]["lora"]
    assert (v["r"], v["lora_alpha"], v["lora_dropout"], v["target_modules"]) == (8, 16, 0.0, ["q_proj", "v_proj"])
    assert (v["epochs"], v["batch_size"], v["max_length"], v["last_turn_only"]) == (3, 8, 512, True)
    assert run["dtype"] == "bfloat16" and {"template", "cutoff_len"} <= _lost(carry)


def test_trl(tmp_path: Path) -> None:
    run = _run(_read(tmp_path, TRL))
    v = run["variants"]["lora"]
    assert (v["r"], v["lora_alpha"], v["lora_dropout"], v["target_modules"]) == (16, 32, 0.05, "all-linear")
    assert (v["epochs"], v["schedule"], v["max_length"], v["batch_size"]) == (3, "linear", 1024, 4)
    assert run["activation_checkpointing"] is True and run["data"]["rows"]["train"] == ["hf:org/set"]


CONFIGS = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig, "kto": trl.KTOConfig, "reward": trl.RewardConfig, "grpo": trl.GRPOConfig}
CONFIGS |= {"rloo": trl.RLOOConfig, "orpo": ORPOConfig, "cpo": CPOConfig}


@pytest.mark.parametrize("aim", CONFIGS)
def test_what_a_file_of_trl_leaves_out_is_what_trl_takes(tmp_path: Path, aim: str) -> None:
    """By the configs of the installed TRL. Two of its keys are in no other trainer's file, so --from says which it is."""
    text = "model_name_or_path: b\ndataset_name: org/set\nuse_peft: true\nreward_funcs: [my.lib.close]\nbf16: true"
    carry = _read(tmp_path, text, program=f"trl {aim}")
    run = content(carry)
    for reward in run["variants"]["lora"].get("rewards", ()):
        reward["trusted"] = True
    (variant,) = RunConfig.from_dict(run, root=tmp_path).variants
    kind = CONFIGS[aim]
    theirs = {f.name: f.default for f in dataclasses.fields(kind) + dataclasses.fields(trl.ModelConfig)}
    is_drawn = aim in ("grpo", "rloo")
    assert variant.objective.name == ("grpo" if is_drawn else aim) and not carry.refused
    options = {"learning_rate": "lr", "num_train_epochs": "epochs", "lr_scheduler_type": "schedule"}
    options |= {} if is_drawn else {n: n for n in ("gradient_accumulation_steps", "max_length")}
    options |= {n: n for n in ("warmup_steps", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon")}
    assert {n: getattr(variant.options, ours) for n, ours in options.items()} == {n: theirs[n] for n in options}
    batch = theirs["per_device_train_batch_size"]
    assert variant.options.batch_size == (batch // theirs["num_generations"] if is_drawn else batch)
    method = {"lora_r": "r", "lora_alpha": "lora_alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}
    assert {n: getattr(variant.method, ours) for n, ours in method.items()} == {n: theirs[n] for n in method}
    off = theirs.get("disable_dropout", False)  # TRL's trainers of pairs and rewards turn the adapter's dropout off too
    assert variant.method.lora_dropout == (0.0 if off else theirs["lora_dropout"])  # type: ignore[attr-defined]
    assert off == (aim in ("dpo", "kto", "reward", "orpo", "cpo"))
    mine = {f.name for f in dataclasses.fields(variant.objective)} & theirs.keys() - {"min_p"}
    defaults = {n: theirs[n] for n in mine - {"loss_type"}}
    assert {n: getattr(variant.objective, n) for n in defaults} == defaults
    if aim == "rloo":
        assert variant.objective.loss_type == "rloo"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("keys", "aim"),
    [
        ("assistant_only_loss: true", "sft"),
        ("packing: true", "sft"),
        ("loss_type: [sigmoid, sft]\nloss_weights: [1, 0.5]", "dpo"),
        ("desirable_weight: 1.5", "kto"),
        ("loss_type: apo_zero_unpaired", "kto"),
        ("center_rewards_coefficient: 0.01", "reward"),
        ("loss_type: simpo", "simpo"),
        ("cpo_alpha: 0.5", "cpo"),
        ("num_generations: 8\nscale_rewards: batch\nreward_funcs: [m.f]", "grpo"),
        ("num_generations: 8\nloss_type: dr_grpo\nreward_funcs: [m.f]\ndataset_text_field: text", "grpo"),
    ],
)
def test_a_file_of_trl_is_read_by_the_trainer_that_has_its_keys(tmp_path: Path, keys: str, aim: str) -> None:
    text = f"model_name_or_path: b\ndataset_name: org/set\n{keys}"
    carry = _read(tmp_path, text)
    assert carry.variant.get("objective", "sft") == aim and "--from" not in {n.key for n in carry.refused}


@pytest.mark.parametrize(
    ("keys", "may_be"),
    [
        ("", "sft, dpo, kto, orpo, cpo, reward, grpo, rloo"),
        ("beta: 0.1", "dpo, kto, orpo, cpo, grpo, rloo"),
        ("beta: 0.1\nlabel_smoothing: 0.1", "dpo, cpo"),
        ("beta: 0.1\nnum_generations: 4", "grpo, rloo"),
        ("label_smoothing: 0.1\nnum_generations: 4", "dpo, cpo, grpo, rloo"),
        ("desirable_weight: 1.5\ncpo_alpha: 1", "cpo, kto"),
    ],
)
def test_a_file_that_several_trainers_read_is_refused(tmp_path: Path, keys: str, may_be: str) -> None:
    """`trl dpo --config` takes the file that `trl sft --config` takes: imitation would be another training."""
    text = f"model_name_or_path: b\ndataset_name: org/set\n{keys}"
    (note,) = [n for n in _read(tmp_path, text).refused if n.key == "--from"]
    assert f"({may_be})" in note.why and f'--from "trl {may_be.split(",")[0]}"' in note.why
    assert _read(tmp_path, text, program="trl dpo").variant["objective"] == "dpo"
    (tmp_path / "s.yml").write_text(text)
    result = CliRunner().invoke(main, ["import-config", str(tmp_path / "s.yml"), "--from", "trl dpoo"])
    assert result.exit_code == 2 and "did you mean 'dpo'" in result.output
    result = CliRunner().invoke(main, ["import-config", str(tmp_path / "s.yml"), "--from", "axolotl dpo"])
    assert result.exit_code == 2 and "axolotl has no trainer" in result.output


@pytest.mark.parametrize(
    ("aim", "line", "key"),
    [
        ("dpo", "f_divergence_type: js_divergence", "f_divergence_type"),
        ("dpo", "loss_type: [no_such_loss]", "loss_type"),
        ("rloo", "reward_clip_range: [-1, 1]", "reward_clip_range"),
        ("grpo", "loss_type: sapo", "loss_type"),
        ("kto", "beta: -1", "beta"),
    ],
)
def test_an_objective_that_there_is_not_is_refused(tmp_path: Path, aim: str, line: str, key: str) -> None:
    text = f"model_name_or_path: b\ndataset_name: org/set\n{line}\nreward_funcs: [m.f]"
    assert [n.key for n in _read(tmp_path, text, program=f"trl {aim}").refused] == [key]


def test_dropout_that_a_trainer_turns_off_is_off(tmp_path: Path) -> None:
    """TRL's DPO, KTO, ORPO and rewards call `disable_dropout_in_model` on the model with its adapter; LLaMA-Factory's DPO and KTO too."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text('{"pairs": {"hf_hub_url": "org/pairs", "ranking": true}}')
    lf = "model_name_or_path: b\ntemplate: qwen\ndataset: pairs\ndataset_dir: data\nlora_dropout: 0.1\nstage: "
    ax = "base_model: b\nadapter: lora\nlora_r: 8\nlora_dropout: 0.1\nlearning_rate: 1e-5\ndatasets: [{path: o/s, type: chatml.intel}]\n"
    hf = "model_name_or_path: b\ndataset_name: o/s\nuse_peft: true\nlora_dropout: 0.1\n"
    texts = [*((lf + stage, None, off) for stage, off in (("dpo", True), ("kto", True), ("rm", False), ("sft", False)))]
    texts += [(ax + f"rl: {rl}", None, True) for rl in ("dpo", "kto", "orpo", "simpo", "ipo")]
    texts += [(hf, "trl dpo", True), (hf, "trl sft", False), (hf + "disable_dropout: false", "trl dpo", False)]
    for text, program, off in texts:
        carry = _read(tmp_path, text, program=program)
        assert carry.variant.get("lora_dropout") == (None if off else 0.1), text
        assert ("lora_dropout" in {n.key for n in carry.idle}) == off and not carry.refused, text


def test_groups_of_trl(tmp_path: Path) -> None:
    """A batch of TRL counts answers; what a file leaves out is what TRL's config has."""
    text = (
        "model_name_or_path: b\ndataset_name: org/set\nuse_peft: true\nreward_funcs: [my.lib.close]\nuse_vllm: true\nscale_rewards: false"
    )
    carry = _read(tmp_path, f"{text}\nper_device_train_batch_size: 4\ngradient_accumulation_steps: 4\nsteps_per_generation: 8")
    run = content(carry)
    v = run["variants"]["lora"]
    assert (v["batch_size"], v["gradient_accumulation_steps"], v["rewards"]) == (2, 1, [{"reward": "my/lib.py:close"}])
    assert {"reward_funcs", "steps_per_generation"} <= _lost(carry) and "use_vllm" not in _lost(carry)
    v["rewards"][0]["trusted"] = True  # by whoever trusts that code
    objective = RunConfig.from_dict(run, root=tmp_path).variants[0].objective
    theirs = {f.name: f.default for f in dataclasses.fields(trl.GRPOConfig)}
    mine = {f.name for f in dataclasses.fields(objective)} & theirs.keys() - {"scale_rewards", "min_p"}
    assert {n: getattr(objective, n) for n in mine} == {n: theirs[n] for n in mine} and len(mine) >= 12
    assert objective.scale_rewards == "none"  # type: ignore[attr-defined]


def test_groups_of_axolotl(tmp_path: Path) -> None:
    inner = "{num_generations: 4, reward_funcs: [r.f], reward_weights: [0.5], use_vllm: true, epsilon: 0.1, beta: 0.04, nothing: 1}"
    carry = _read(
        tmp_path,
        f"base_model: b\nadapter: lora\nlearning_rate: 1e-5\nrl: grpo\nmicro_batch_size: 8\ntrl: {inner}\ndatasets: [{{path: o/s}}]",
    )
    v = content(carry)["variants"]["lora"]
    assert (v["objective"], v["batch_size"], v["num_generations"], v["epsilon"], v["beta"]) == ("grpo", 2, 4, 0.1, 0.04)
    assert v["rewards"] == [{"reward": "r.py:f", "weight": 0.5}] and {"trl.nothing", "trl.reward_funcs"} <= _lost(carry)
    assert not carry.refused


def test_unsloth(tmp_path: Path) -> None:
    run = _run(_read(tmp_path, UNSLOTH))
    v = run["variants"]["lora"]
    assert (v["r"], v["lora_alpha"], v["use_rslora"], v["target_modules"]) == (64, 16, True, ["q_proj", "v_proj"])
    assert (v["epochs"], v["warmup_steps"], v["seed"], v["max_length"]) == (1, 5, 7, 512) and "max_steps" not in v


def test_columns_of_other_programs(tmp_path: Path) -> None:
    """LLaMA-Factory's `tools` and `kto_tag`, TRL's `dataset_text_field`; plain texts are packed there by default."""
    columns = {"messages": "talk", "tools": "functions_json", "kto_tag": "good"}
    (tmp_path / "data").mkdir()
    info = {"marked": {"hf_hub_url": "o/s", "formatting": "sharegpt", "columns": columns}, "texts": {"hf_hub_url": "o/t"}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    lf = "model_name_or_path: b\ntemplate: qwen\ndataset_dir: data\n"
    carry = _read(tmp_path, lf + "stage: kto\ndataset: marked")
    assert _run(carry)["data"]["rows"]["train"] == [
        {"path": "hf:o/s", "columns": {"conversations": "talk", "tools": "functions_json", "kto_tag": "good"}}
    ]
    assert "packing" in _lost(_read(tmp_path, lf + "stage: pt\ndataset: texts")) and "packing" not in _lost(carry)
    run = _run(_read(tmp_path, "model_name_or_path: b\ndataset_name: o/s\ndataset_text_field: body"))
    assert run["data"]["rows"]["train"] == [{"path": "hf:o/s", "columns": {"text": "body"}}]
    assert [n.key for n in _read(tmp_path, "model_name_or_path: b\ndataset_name: o/s\nloss_type: dft").refused] == ["loss_type"]


def test_what_trl_validates_on(tmp_path: Path) -> None:
    """Its split `test` unless another one is named, if it is to validate; a file has no splits."""
    text = "model_name_or_path: b\ncompletion_only_loss: true\neval_steps: 5\n"
    steps = text + "dataset_name: o/s\neval_strategy: steps\n"
    for more, split in (("", "test"), ("dataset_test_split: dev", "dev"), ("dataset_train_split: part", "test")):
        run = _run(_read(tmp_path, steps + more))
        assert run["data"]["rows"]["valid"] == [{"path": "hf:o/s", "split": split}] and run["variants"]["full"]["eval_every"] == 5
    column = _run(_read(tmp_path, steps + "dataset_text_field: body"))
    assert column["data"]["rows"]["valid"] == [{"path": "hf:o/s", "columns": {"text": "body"}, "split": "test"}]
    for off in ("dataset_name: o/s", "dataset_name: o/s\neval_strategy: no", "dataset_name: o/s\neval_strategy: 'no'"):
        assert "valid" not in _run(_read(tmp_path, text + off))["data"]["rows"]
    held = _run(_read(tmp_path, steps + "test_split_size: 0.1"))["data"]["rows"]
    assert held["split"] == 0.1 and "valid" not in held
    file = _read(tmp_path, text + "dataset_name: ./rows.jsonl\neval_strategy: steps")
    assert "valid" not in _run(file)["data"]["rows"] and "dataset_test_split" in _lost(file)


def test_a_notebook_of_unsloth(tmp_path: Path) -> None:
    """What is left out is what Unsloth puts into TRL's configs (its rl.py): not TRL's defaults, and not those of its studio."""
    flat = "model_name: org/base\nmax_seq_length: 512\nload_in_4bit: true\ntarget_modules: [all-linear]\n"
    v = _run(_read(tmp_path, flat, data="hf:o/s"))["variants"]["lora"]
    assert (v["batch_size"], v["gradient_accumulation_steps"], v["lr"], v["warmup_steps"]) == (4, 2, 5e-5, 0.1)
    assert (v["weight_decay"], v["seed"], v["optimizer"], v["target_modules"]) == (0.001, 3407, "adamw8bit", "all-linear")
    assert "objective" not in v
    whole = flat.replace("[all-linear]", "[q_proj, embed_tokens, lm_head]")
    v = _run(_read(tmp_path, whole, data="hf:o/s"))["variants"]["lora"]
    assert (v["target_modules"], v["modules_to_save"]) == (["q_proj"], ["embed_tokens", "lm_head"])
    v = _run(_read(tmp_path, flat + "beta: 0.2\nwarmup_steps: 5", data="hf:o/s", program="unsloth dpo"))["variants"]["lora"]
    assert (v["objective"], v["beta"], v["warmup_steps"]) == ("dpo", 0.2, 5)
    assert [n.key for n in _read(tmp_path, flat + "beta: 0.2", data="hf:o/s").refused] == ["--from"]
    drawn = (
        flat + "reward_funcs: [m.f]\nnum_generations: 6\nper_device_train_batch_size: 1\ngradient_accumulation_steps: 1\ntemperature: 0.7"
    )
    carry = _read(tmp_path, drawn, data="hf:o/s", program="unsloth grpo")
    v = content(carry)["variants"]["lora"]
    assert (v["objective"], v["batch_size"], v["num_generations"], v["temperature"]) == ("grpo", 1, 6, 0.7)
    assert content(carry)["quantize"] == "nf4-double" and "max_length" in _lost(carry)  # as its loader packs
    assert (v["beta"], v["loss_type"]) == (0.001, "bnpo") and not carry.refused


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (AXOLOTL, "datasets"),
        ("base_model: org/base\nadapter: lora\nlora_r: 8\nlora_target_linear: true", None),
        (LLAMA_FACTORY, "dataset"),
        ("model_name_or_path: org/base\nstage: sft\nlora_rank: 8", None),
        (TRL, "dataset_name"),
        (UNSLOTH, "dataset"),
    ],
)
def test_rows_that_are_named_beside_settings_take_the_place_of_theirs(tmp_path: Path, text: str, key: str | None) -> None:
    carry = _read(tmp_path, text, data="mine.jsonl")
    assert not carry.refused
    (source,) = content(carry)["data"]["rows"]["train"]
    assert source == "mine.jsonl" or source["path"] == "mine.jsonl"
    aside = [note.key for note in carry.idle if "--data" in note.why]
    assert aside == ([key] if key else [])


def test_settings_without_rows_say_how_to_name_them(tmp_path: Path) -> None:
    for text in ("base_model: org/base\nadapter: lora\nlora_r: 8", LLAMA_FACTORY, LLAMA_FACTORY.replace("dataset: talks,pairs", "")):
        notes = [str(note) for note in _read(tmp_path, text).refused]
        assert notes and all("with --data" in note for note in notes), notes


def test_settings_of_unsloth_s_studio(tmp_path: Path) -> None:
    """Defaults of a model name neither a model nor rows."""
    text = "training: {num_epochs: 0, max_steps: 30, learning_rate: 2e-4}\nlora: {lora_r: 8}\nlogging: {log_frequency: 10}"
    assert [n.key for n in _read(tmp_path, text).refused] == ["dataset", "base"]
    carry = read_settings(tmp_path / "settings.yml", data="hf:o/s", base="org/base")
    run = _run(carry)
    assert (run["base"], run["log_every"], run["variants"]["lora"]["max_steps"]) == ("org/base", 10, 30) and not _lost(carry)
    sound = _read(tmp_path, "audio_type: whisper\nmodel: org/base\n" + text, data="hf:o/s")
    assert [n.key for n in sound.refused] == ["audio_type"]


@pytest.mark.parametrize(
    ("text", "whose"),
    [
        ("compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP", "accelerate's"),
        ("zero_optimization: {stage: 3}", "DeepSpeed's"),
        ("model: org/base\nmodel_class: llm", "LLaMA-Factory's v1"),
    ],
)
def test_settings_of_no_training_say_whose_they_are(tmp_path: Path, text: str, whose: str) -> None:
    with pytest.raises(ConfigError, match=whose):
        _read(tmp_path, text)


def test_the_config_of_an_adapter(tmp_path: Path) -> None:
    peft = {
        "peft_type": "LORA",
        "base_model_name_or_path": "org/base",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    run = _run(_read(tmp_path, json.dumps(peft | {"task_type": "CAUSAL_LM", "inference_mode": True}), "adapter_config.json", "rows.jsonl"))
    assert run["variants"]["lora"] == {"data": "rows", "method": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    assert [n.key for n in _read(tmp_path, json.dumps(peft)).refused] == ["data"]
    first = _read(tmp_path, json.dumps(peft | {"layers_to_transform": 0, "init_lora_weights": False}), "adapter_config.json", "rows.jsonl")
    assert _run(first)["variants"]["lora"]["layers_to_transform"] == 0 and _lost(first) == {"init_lora_weights"}


def test_paths_start_at_the_run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings, rows and run file in three folders; called from a fourth."""
    for name in ("conf", "rows", "out/runs", "data"):
        (tmp_path / name).mkdir(parents=True)
    row = '{"instruction": "a", "output": "b"}'
    for file in ("rows/r.jsonl", "data/r.jsonl"):
        (tmp_path / file).write_text(row)
    (tmp_path / "data" / "dataset_info.json").write_text('{"mine": {"file_name": "r.jsonl"}}')
    lora = "model_name_or_path: b\ntemplate: qwen\nfinetuning_type: lora"
    settings = {
        "axolotl": "base_model: b\nlearning_rate: 1e-5\ndatasets: [{path: ../rows/r.jsonl, type: alpaca}]",
        "llama": f"{lora}\ndataset: mine\ndataset_dir: data",
        "trl": "model_name_or_path: b\ndataset_name: rows/r.jsonl\ncompletion_only_loss: true",
    }
    monkeypatch.chdir(tmp_path)
    for name, text in settings.items():
        (tmp_path / "conf" / f"{name}.yml").write_text(text)
        result = CliRunner().invoke(main, ["import-config", f"conf/{name}.yml", "--out", f"out/runs/{name}.yml"])
        assert result.exit_code == 0, result.output
        (source,) = next(iter(RunConfig.load(tmp_path / "out/runs" / f"{name}.yml").data.values())).train
        assert (tmp_path / "out/runs" / source.path).read_text() == row, name


@pytest.mark.parametrize("line", ["eval_steps: 50", "load_best_model_at_end: false"])
def test_validation_without_rows_needs_nothing(tmp_path: Path, line: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text('{"pairs": {"hf_hub_url": "org/pairs"}}')
    llama_factory = "model_name_or_path: b\ntemplate: qwen\ndataset: pairs\ndataset_dir: data\n"
    for text in (TRL, llama_factory, UNSLOTH):
        carry = _read(tmp_path, text + line)
        assert _run(carry)["variants"] and line.partition(":")[0] in {note.key for note in carry.idle}


def test_parts_of_all_steps_are_named(tmp_path: Path) -> None:
    parts = "logging_steps: 0.1\nsave_steps: 0.25\neval_steps: 0.25\nsave_total_limit: 2"
    for text in (AXOLOTL, TRL):
        carry = _read(tmp_path, text + parts)
        assert {"logging_steps"} <= _lost(carry) and not {"save_steps", "eval_steps"} & _lost(carry)
        run = _run(carry)
        assert run["keep_checkpoints"] == 2 and run["checkpoint_every"] == 0.25 and "log_every" not in run


def test_so_often_an_epoch_is_a_part_of_all_steps(tmp_path: Path) -> None:
    """As axolotl computes it: 1 / (evals_per_epoch · num_epochs)."""
    run = _run(_read(tmp_path, AXOLOTL + "evals_per_epoch: 4\nsaves_per_epoch: 2"))
    assert run["variants"]["lora"]["eval_every"] == pytest.approx(1 / 12) and run["checkpoint_every"] == pytest.approx(1 / 6)
    once = _run(_read(tmp_path, AXOLOTL.replace("num_epochs: 3", "num_epochs: 1") + "evals_per_epoch: 1\nsaves_per_epoch: 1"))
    assert "checkpoint_every" not in once and "eval_every" not in once["variants"]["lora"], "1.0 would be every step"
    half = _run(_read(tmp_path, AXOLOTL.replace("num_epochs: 3", "num_epochs: 0.5") + "evals_per_epoch: 2\nsaves_per_epoch: 2"))
    assert "checkpoint_every" not in half and "eval_every" not in half["variants"]["lora"]


def test_rewards_of_axolotl_train_a_head(tmp_path: Path) -> None:
    steps = AXOLOTL.replace("type: chat_template", "type: stepwise_supervised, step_separator: STEP").replace(
        ", field_messages: talk, message_property_mappings: {role: from, content: value}", ""
    )
    steps = steps.replace('  - {path: org/set, name: en, type: alpaca, split: "train[:10%]"}\n', "process_reward_model: true\n")
    carry = _read(tmp_path, steps.replace("STEP", '"\\n"'))
    assert _run(carry)["variants"]["lora"]["objective"] == "stepwise" and "datasets[0].step_separator" not in _lost(carry)
    refused = _read(tmp_path, steps.replace("STEP", '" "')).refused
    assert [n.key for n in refused] == ["datasets[0].step_separator"]
    full = _read(tmp_path, steps.replace("STEP", '"\\n"').replace("adapter: qlora", "")).refused
    assert [n.key for n in full] == ["adapter"] and "head" in full[0].why


@pytest.mark.parametrize(
    ("value", "ours"),
    [
        *((name, "adamw8bit") for name in ("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "adamw_torch_8bit")),
        *((name, None) for name in ("adamw_torch", "paged_adamw_32bit", "adamw_apex_fused", "lion_8bit", "galore_adamw")),
        ("adafactor", "adafactor"),
        ("muon", "muon"),
        ("sgd", "sgd"),
    ],
)
def test_optimizers(tmp_path: Path, value: str, ours: str | None) -> None:
    """transformers' `OptimizerNames`, and axolotl's own. What there is none of is named."""
    trainer = TRL + f"optim: {value}\nadam_beta1: 0.8\nneftune_noise_alpha: 5"
    for text in (AXOLOTL.replace("adamw_torch_fused", value) + "adam_beta1: 0.8\nneftune_noise_alpha: 5", trainer):
        carry = _read(tmp_path, text)
        (variant,) = _run(carry)["variants"].values()
        assert (variant.get("optimizer"), variant["neftune_noise_alpha"]) == (ours, 5)
        assert ("adam_beta1" in variant) == (ours not in ("adafactor", "sgd"))
        assert any(key in _lost(carry) for key in ("optim", "optimizer")) == (value in ("lion_8bit", "galore_adamw"))


def test_double_quantisation_and_starts(tmp_path: Path) -> None:
    """axolotl packs with nf4 and double quantisation unless `bnb_config_kwargs` says otherwise."""
    carry = _read(tmp_path, AXOLOTL + "peft_init_lora_weights: pissa")
    variant = _run(carry)["variants"]["lora"]
    assert variant["init_lora_weights"] == "pissa" and "lora_dropout" not in variant and "lora_dropout" in _lost(carry)
    plain = "bnb_config_kwargs: {bnb_4bit_use_double_quant: false, bnb_4bit_quant_type: fp4}"
    assert _run(_read(tmp_path, AXOLOTL + plain))["quantize"] == "fp4"
    nested = TRL + "load_in_4bit: true\nuse_bnb_nested_quant: true"
    assert _run(_read(tmp_path, nested))["quantize"] == "nf4-double"


def test_strict_and_strangers(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "a.yml").write_text(AXOLOTL)
    (tmp_path / "b.yml").write_text("who: knows")
    for args, code in ((["a.yml"], 0), (["a.yml", "--strict"], 2), (["b.yml"], 2), (["b.yml", "--from", "axolotel"], 2)):
        assert CliRunner().invoke(main, ["import-config", str(tmp_path / args[0]), *args[1:]]).exit_code == code
    said = json.loads(CliRunner().invoke(main, ["import-config", str(tmp_path / "a.yml"), "--json"]).stdout)
    assert said["run"] == json.loads(json.dumps(content(read_settings(tmp_path / "a.yml")), default=str))


def _rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.mark.parametrize(
    ("row", "form", "columns"),
    [
        ({"Question": "a", "Answer": "b", "id": 3}, "prompt", {"prompt": "Question", "completion": "Answer"}),
        ({"text": "a", "intent": "b"}, "label", {"text": "text", "label": "intent"}),
        ({"instruction": "a", "input": "", "output": "b"}, "instruction", {}),
        ({"chat": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages", {"messages": "chat"}),
        ({"body": "a"}, "text", {"text": "body"}),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "dpo", {}),
        ({"prompt": "a", "completion": "b", "label": True}, "kto", {}),
        ({"text": "a", "label": 1}, "label", {"text": "text", "label": "label"}),
    ],
)
def test_columns_are_guessed(tmp_path: Path, row: dict[str, Any], form: str, columns: dict[str, str]) -> None:
    _rows(tmp_path / "r.jsonl", [row] * 3)
    found = guess("r.jsonl", tmp_path)
    assert (found.form, found.columns) == (form, columns)
    RunConfig.from_dict(yaml.safe_load(first_file(found, "smollm2-135m-instruct")), root=tmp_path)


def test_files_that_only_have_a_split_s_name_are_left_out(tmp_path: Path) -> None:
    """As references of e2e: their columns are no row's."""
    talk = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    _rows(tmp_path / "d" / "train.jsonl", talk * 3)
    _rows(tmp_path / "d" / "valid.jsonl", [{"mr": "a", "refs": ["b"]}])
    _rows(tmp_path / "d" / "test.jsonl", [{"prompt": "a", "completion": "b"}])
    found = guess("d", tmp_path)
    assert found.splits.keys() == {"train", "test"} and "d/valid.jsonl is left out: its columns are mr, refs" in found.said
    assert not any(said.startswith("valid rows") for said in found.said)


def test_folders_of_folders_are_named(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        _rows(tmp_path / name / "train.jsonl", [{"text": "a"}])
    (tmp_path / "README.txt").write_text("what this is")
    with pytest.raises(DataError, match="holds folders with rows: a, b"):
        guess(".", tmp_path)


def test_labels_of_few_rows_make_a_run_file(tmp_path: Path) -> None:
    _rows(tmp_path / "r.jsonl", [{"text": f"words {i}", "label": ["buy", "sell"][i % 2]} for i in range(10)])
    found = guess("r.jsonl", tmp_path)
    assert found.labels
    RunConfig.from_dict(yaml.safe_load(first_file(found, "smollm2-135m-instruct")), root=tmp_path)


@pytest.mark.parametrize(("text", "why"), [('[\n{\n"prompt": "a"\n}\n]\n', "r.jsonl:1: not JSON"), ('"a"\n', "r.jsonl:1: not an object")])
def test_a_first_run_file_of_rows_that_cannot_be_read(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(DataError, match="holds no rows") as caught:
        guess("r.jsonl", tmp_path)
    assert why in str(caught.value) and str(caught.value).count("r.jsonl:") <= 3


def test_a_first_run_file(tmp_path: Path) -> None:
    rows = [{"utterance": f"words {i}", "category": ["buy", "sell", "ask"][i % 3]} for i in range(60)]
    for name in ("intents-train.jsonl", "intents-test.jsonl"):
        _rows(tmp_path / "d" / name, rows)
    out = tmp_path / "run.yaml"
    assert CliRunner().invoke(main, ["init", str(tmp_path / "d"), "--out", str(out)]).exit_code == 0
    run, text = yaml.safe_load(out.read_text()), out.read_text()
    assert run["data"] == {
        "intents": {
            "train": {"path": "d/intents-train.jsonl", "columns": {"text": "utterance", "label": "category"}},
            "test": {"path": "d/intents-test.jsonl", "columns": {"text": "utterance", "label": "category"}},
            "split": 0.1,
            "labels": "auto",
        }
    }
    assert "3 distinct answers" in text and "held out" in text
    RunConfig.load(out)
    again = CliRunner().invoke(main, ["init", str(tmp_path / "d"), "--out", str(out)])
    assert again.exit_code == 2 and out.read_text() == text
    lost = CliRunner().invoke(main, ["init", str(tmp_path / "d"), "--out", str(tmp_path / "gone" / "run.yaml")])
    assert lost.exit_code == 2 and "there is no folder" in lost.output and not (tmp_path / "gone").exists()
