"""Folders that peft wrote for other bases, with other trainers or long ago: each loads with peft's logits and a warning, or is refused.

Every folder is made by peft itself on a tiny base and then changed. What it must compute is what peft computes from the folder as it was
made, and, where peft can still read it, from the changed one.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.laws.common import one_thread
from tests.store.common import SEQUENCES, stir_trained_, tiny_base
from tests.tiny import tiny_model
from trimtab.errors import AdapterError
from trimtab.store import Adapter, Store
from trimtab.store.files import open_folder
from trimtab.store.folder import check_layout
from trimtab.store.imports import import_folder

peft = pytest.importorskip("peft")
__all__ = ["one_thread"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LAYERS = "model.layers."
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def bases() -> Any:
    made: dict[str, Any] = {}
    return lambda family: made.setdefault(family, tiny_base(family))


def make(folder: Path, family: str = "llama", **options: Any) -> Path:
    """A folder of peft's, with tensors that matter."""
    config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]} | options)
    return _save(folder, family, config)


def _save(folder: Path, family: str, config: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny_model(family), config)
        stir_trained_(model, torch.Generator().manual_seed(3))
        model.save_pretrained(str(folder))
    return folder


def peft_logits(folder: Path, family: str = "llama") -> list[Tensor]:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(tiny_model(family), str(folder)).eval()
        return [model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :] for ids in SEQUENCES]


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def loads_as(folder: Path, wanted: list[Tensor], base: Any, caplog: Any) -> tuple[str, ...]:
    """The warnings, which are logged too; the logits are those that are wanted, and not the base's."""
    caplog.clear()
    adapter = Adapter.load(folder, base)
    ours = base.logits(SEQUENCES, [adapter] * len(SEQUENCES))
    assert distance(ours, wanted) < 1e-4
    assert distance(ours, base.logits(SEQUENCES, [None] * len(SEQUENCES))) > 0.1, "the adapter must matter"
    logged = [r.getMessage() for r in caplog.records if r.name == "trimtab.store.folder"]
    assert logged == [f"adapter {str(folder)!r}: {w}" for w in adapter.warnings]
    return adapter.warnings


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def rename(folder: Path, change: Callable[[str], str]) -> None:
    save_file({change(n): t for n, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS, metadata={"format": "pt"})


# ---- what a config names and this base lacks ----

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STRANGE: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    # what it is -> (as it is made, what is changed, words of the warnings)
    "targets of many families": (
        {}, {"target_modules": ["q_proj", "v_proj", "c_attn", "Wqkv"]}, ["target_modules: 'c_attn', 'Wqkv' match no module"],
    ),
    "one stranger": ({}, {"target_modules": ["c_attn", "v_proj", "q_proj"]}, ["target_modules: 'c_attn' matches no module"]),
    "heads of a classifier": ({}, {"modules_to_save": ["classifier", "score"]}, ["modules_to_save: 'classifier', 'score'"]),
    "a head that is there, one that is not": (
        {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head", "score"]}, ["modules_to_save: 'score'"],
    ),
    "exclusions of a vision tower": ({"target_modules": ALL}, {"exclude_modules": ["vision_tower"]}, ["exclude_modules: 'vision_tower'"]),
    "an exclusion by expression": ({"target_modules": ALL}, {"exclude_modules": ".*visual.*"}, ["exclude_modules: '.*visual.*'"]),
    "one exclusion that matches, one that does not": (
        {"target_modules": ALL, "exclude_modules": ["up_proj"]}, {"exclude_modules": ["visual", "up_proj"]}, ["exclude_modules: 'visual'"],
    ),
    "experts": (
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        ["target_parameters: 'mlp.experts.gate_up_proj' matches no module"],
    ),
    "ranks of other modules": ({}, {"rank_pattern": {"vision.q": 8}}, ["rank_pattern: 'vision.q' matches no module"]),
    "alphas of modules that are not targeted": ({}, {"alpha_pattern": {"up_proj": 3}}, ["alpha_pattern: 'up_proj' matches no module"]),
    "a stray rank before the one that counts": (
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}},
        {"rank_pattern": {"vision.q_proj": 8, "q_proj": 2, ".*proj": 4}},
        ["rank_pattern: 'vision.q_proj'"],
    ),
    "layers that are not there": ({"layers_to_transform": [1]}, {"layers_to_transform": [1, 7]}, ["layers_to_transform: layers 7"]),
    "a pattern of layers without layers": ({}, {"layers_pattern": ["h"]}, ["layers_pattern = ['h']"]),
    "biases where there are none": ({}, {"bias": "all"}, ["bias = 'all': this base has no biases"]),
    "only LoRA's biases where there are none": ({}, {"bias": "lora_only"}, ["bias = 'lora_only'"]),
    "no bias": ({}, {"bias": None}, []),
    "another task": ({}, {"task_type": "SEQ_2_SEQ_LM"}, ["task_type = 'SEQ_2_SEQ_LM'"]),
    "a task of classifiers": ({}, {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}, ["task_type", "modules_to_save"]),
    "no task": ({}, {"task_type": None}, []),
    "a task that peft does not know": ({}, {"task_type": "DIFFUSION"}, ["task_type = 'DIFFUSION'"]),
    "CorDA, converted": ({}, {"corda_config": {"cache_file": None, "corda_method": "ipm"}}, ["corda_config"]),
    "EVA": ({}, {"eva_config": {"rho": 2.0}, "init_lora_weights": "eva"}, ["eva_config"]),
    "LoftQ's leftovers": ({}, {"loftq_config": {"loftq_bits": 4}}, ["loftq_config"]),
    "LoRA-GA's leftovers": ({}, {"lora_ga_config": {"direction": "ArB2r"}}, ["lora_ga_config"]),
    "where it ran": ({}, {"runtime_config": {"ephemeral_gpu_offload": True}}, ["runtime_config"]),
    "Megatron": ({}, {"megatron_config": {"tensor_model_parallel_size": 2}, "megatron_core": "megatron.core"}, ["megatron_config"]),
    "options of later versions that are off": ({}, {"new": None, "newer": False, "newest": [], "use_x": {}, "y": ""}, []),
    "saved while training": ({}, {"inference_mode": False, "revision": None, "peft_version": "0.4.0"}, []),
    "made by auto mapping": ({}, {"task_type": None, "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "x"}}, []),
    "an old config": ({}, dict.fromkeys(["lora_bias", "use_dora", "use_rslora", "exclude_modules", "peft_version", "eva_config"], ...), []),
}  # fmt: skip
PEFT_STUMBLES = {
    "a pattern of layers without layers",
    "no bias",
    "a task that peft does not know",
    "Megatron",
    "made by auto mapping",
    "EVA",
}
"""Changed folders that peft itself cannot read, or reads only with data at hand: judged by what the folder was made from."""


@pytest.mark.parametrize("what", STRANGE)
def test_what_means_nothing_on_this_base_is_a_warning(bases, what, tmp_path, caplog):
    options, changes, words = STRANGE[what]
    folder = make(tmp_path / "a", **options)
    wanted = peft_logits(folder)
    edit(folder, **changes)
    if what not in PEFT_STUMBLES:
        assert distance(peft_logits(folder), wanted) < 1e-4
    said = loads_as(folder, wanted, bases("llama"), caplog)
    assert len(said) == len(words) and all(word in line for word, line in zip(sorted(words), sorted(said), strict=True)), said


def test_one_config_for_several_families(bases, tmp_path, caplog):
    """Llama's names on Phi-3, which has two of them; and on GPT-2, whose matrices lie transposed."""
    for family, targets in {"phi3": ALL, "gpt2": ["c_attn", "q_proj", "c_proj"]}.items():
        folder = make(tmp_path / family, family, target_modules=targets)
        (said,) = loads_as(folder, peft_logits(folder, family), bases(family), caplog)
        assert said.startswith("target_modules: ") and "'q_proj'" in said and "'down_proj'" not in said


def test_ia3_with_names_of_other_families(bases, tmp_path, caplog):
    names = {"target_modules": ["k_proj", "v_proj", "down_proj", "fc2"], "feedforward_modules": ["down_proj", "fc2"]}
    folder = _save(tmp_path / "a", "llama", peft.IA3Config(task_type="SEQ_2_SEQ_LM", **names))
    said = loads_as(folder, peft_logits(folder), bases("llama"), caplog)
    assert [s.partition(":")[0].partition(" ")[0] for s in said] == ["task_type", "target_modules", "feedforward_modules"]


def test_a_rank_above_a_side(bases, tmp_path, caplog):
    """PiSSA's conversion doubles the rank. It loads, is saved as ours and loaded again, is merged, and trains no more of its kind."""
    folder = make(tmp_path / "a", r=32, lora_alpha=32, rank_pattern={"v_proj": 60})
    wanted = peft_logits(folder)
    (said,) = loads_as(folder, wanted, bases("llama"), caplog)
    assert "rank 32 is above" not in said and "above the smaller side, 24, of model.layers.0.self_attn.v_proj" in said
    adapter = Adapter.load(folder, bases("llama"))
    loads_as(adapter.save(tmp_path / "ours"), wanted, bases("llama"), caplog)
    assert adapter.merge_into(tmp_path / "merged").relative < 1e-4
    with pytest.raises(Exception, match="rank 60 is above its smaller side 24"):
        Adapter.create(bases("llama"), adapter.method)


SAVED = [
    ("llama", ["norm"]),
    ("llama", ["embed_tokens", "norm"]),
    ("llama", ["head"]),
    ("llama", ["mlp", "norm"]),
    ("llama", ["self_attn"]),
    ("llama", ["layers.1"]),
    ("gpt2", ["mlp", "ln_f"]),
    ("qwen3", ["layernorm"]),
]


@pytest.mark.parametrize(("family", "names"), SAVED)
def test_modules_to_save_mean_what_they_mean_to_peft(bases, family, names, tmp_path, caplog):
    """Every module whose name ends in the text, and all that is in a container, but for targets there. Saved as ours it is the same."""
    targets = ["c_attn", "c_proj"] if family == "gpt2" else ["q_proj", "down_proj"]
    folder = make(tmp_path / "a", family, target_modules=targets, modules_to_save=names)
    wanted = peft_logits(folder, family)
    assert loads_as(folder, wanted, bases(family), caplog) == ()
    adapter = Adapter.load(folder, bases(family))
    assert {s.name for s in adapter.sites if s.saved} == {
        n.removeprefix("base_model.model.").rpartition(".")[0] for n in load_file(folder / WEIGHTS) if ".lora_" not in n
    }
    ours = adapter.save(tmp_path / "ours")
    loads_as(ours, wanted, bases(family), caplog)
    assert distance(peft_logits(ours, family), wanted) < 1e-4


def test_norms_of_heads_are_refused_before_they_run(bases, tmp_path):
    """ "norm" is Qwen3's q_norm and k_norm too: their rows are heads."""
    folder = make(tmp_path / "a", "qwen3", modules_to_save=["norm"])
    with pytest.raises(AdapterError, match=r"modules_to_save: model\.layers\.0\.self_attn\.q_norm acts on each head"):
        Adapter.load(folder, bases("qwen3"))


# ---- tensors decide ----


@pytest.mark.parametrize(
    ("options", "changes", "said"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["q_proj"]}, "v_proj.lora_A.weight (4, 48) belongs to no module"),
        ({"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["q_proj", "v_porj"]}, "belongs to no module"),
        ({"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "v_proj"]}, "v_proj.lora_A.weight is missing"),
        ({}, {"target_modules": ["c_attn", "Wqkv"]}, "'c_attn' matches no module"),
        ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["score"]}, "lm_head.weight is not the base's own"),
        ({"exclude_modules": ["layers.1.self_attn.v_proj"]}, {"exclude_modules": ["layers.9"]}, "is missing"),
        ({"rank_pattern": {"q_proj": 2}}, {"rank_pattern": {"vision.q_proj": 2}}, "has shape (2, 48)"),
        ({"layers_to_transform": [0]}, {"layers_to_transform": [0, 1]}, "is missing"),
        ({"bias": "none"}, {"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({}, {"target_parameters": ["experts.down_proj"], "target_modules": []}, "matches no parameter of experts"),
        ({}, {"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({}, {"lora_bias": True}, "lora_bias"),
        ({}, {"use_qalora": True}, "use_qalora"),
        ({}, {"kasa_config": {"beta": 1e-4}}, "kasa_config"),
        ({}, {"init_lora_weights": "corda", "corda_config": {"corda_method": "ipm"}}, "init_lora_weights = 'corda'"),
    ],
)
def test_what_changes_the_result_is_refused(bases, options, changes, said, tmp_path):
    folder = make(tmp_path / "a", **options)
    edit(folder, **changes)
    with pytest.raises(AdapterError) as caught:
        Adapter.load(folder, bases("llama"))
    assert said in str(caught.value)


def test_tensors_of_a_tower_that_this_base_lacks_are_refused(bases, tmp_path):
    """Layers of another tower have the same last parts and could have the same shapes: nothing is guessed."""
    folder = make(tmp_path / "a")
    rename(folder, lambda name: name.replace("model.layers", "model.vision_tower.layers"))
    with pytest.raises(AdapterError, match=r"vision_tower.*belongs to no module"):
        Adapter.load(folder, bases("llama"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(bases, dtype, tmp_path, caplog):
    folder = make(tmp_path / "a")
    save_file({n: t.to(dtype) for n, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    assert loads_as(folder, peft_logits(folder), bases("llama"), caplog) == ()


# ---- names ----

NAMES: dict[str, Callable[[str], str]] = {
    "with the adapter's name": lambda n: n.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
    "compiled": lambda n: "_orig_mod." + n,
    "compiled inside": lambda n: n.replace(PREFIX, PREFIX + "_orig_mod."),
    "compiled layer by layer": lambda n: n.replace("self_attn", "_orig_mod.self_attn").replace("mlp", "_orig_mod.mlp"),
    "FSDP": lambda n: "_fsdp_wrapped_module." + n.replace(".mlp", "._fsdp_wrapped_module.mlp"),
    "FSDP and checkpointing": lambda n: n.replace(".self_attn", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn"),
    "data parallel": lambda n: "module." + n,
    "data parallel inside": lambda n: n.replace(PREFIX, PREFIX + "module."),
    "DeepSpeed": lambda n: "_forward_module." + n,
    "without the prefix": lambda n: n.removeprefix(PREFIX),
    "of a model in a model": lambda n: n.replace(PREFIX, PREFIX + "model."),
    "wrapped by peft twice": lambda n: PREFIX + n,
    "of the model without its head": lambda n: n.replace(PREFIX + "model.", PREFIX) if "layers" in n else n,
    "all at once": lambda n: "module._orig_mod." + n.replace("lora_A.", "lora_A.default.").replace("mlp", "_fsdp_wrapped_module.mlp"),
}  # fmt: skip


@pytest.mark.parametrize("what", NAMES)
def test_names_of_wrapped_models(bases, what, tmp_path, caplog):
    folder = make(tmp_path / "a", target_modules=[*ALL, "embed_tokens"], use_dora=False)
    wanted = peft_logits(folder)
    rename(folder, NAMES[what])
    (said,) = loads_as(folder, wanted, bases("llama"), caplog)
    assert "do not have the names that peft writes today" in said
    assert import_folder(folder, bases("llama")).changes == (said,)
    store = Store(tmp_path / "store", create=True)
    loads_as_stored = Adapter.load(store.publish(folder, "acme/a", base=bases("llama")).ref, bases("llama"), store=store)
    assert loads_as_stored.warnings == (said,)


def test_a_gpt2_has_other_roots(bases, tmp_path, caplog):
    folder = make(tmp_path / "a", "gpt2", target_modules=["c_attn"])
    wanted = peft_logits(folder, "gpt2")
    rename(folder, lambda n: "module.base_model.model._orig_mod." + n.removeprefix(PREFIX))
    loads_as(folder, wanted, bases("gpt2"), caplog)


def test_two_names_that_are_one(bases, tmp_path):
    folder = make(tmp_path / "a")
    tensors = load_file(folder / WEIGHTS)
    name = next(iter(tensors))
    save_file(tensors | {"module." + name: tensors[name].clone()}, folder / WEIGHTS)
    with pytest.raises(AdapterError, match="are both"):
        Adapter.load(folder, bases("llama"))


# ---- files ----


def test_a_pickle_beside_the_safetensors_is_never_opened(bases, tmp_path, caplog):
    folder = make(tmp_path / "a")
    wanted = peft_logits(folder)
    (folder / "adapter_model.bin").symlink_to("/dev/zero")
    (said,) = loads_as(folder, wanted, bases("llama"), caplog)
    assert said.startswith("adapter_model.bin is a pickle and is not read")


def test_a_snapshot_of_a_hub_cache(bases, tmp_path, caplog):
    """As huggingface_hub lays it out: links to blobs two or, for a subfolder, three levels up; also links by whole path from elsewhere."""
    made = make(tmp_path / "made")
    wanted, blobs = peft_logits(made), tmp_path / "hub" / "models--acme--support" / "blobs"
    blobs.mkdir(parents=True)
    hashes = {name: f"{i}" * 40 for i, name in enumerate((CONFIG, WEIGHTS), start=1)}
    for name, digits in hashes.items():
        shutil.copy(made / name, blobs / digits)
    places = {"snapshots/c0ffee": "../../blobs", "snapshots/c0ffee/sub": "../../../blobs"}
    folders = {blobs.parent / at: up for at, up in places.items()} | {tmp_path / "filled": str(blobs)}
    for folder, up in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        for name, digits in hashes.items():
            (folder / name).symlink_to(f"{up}/{digits}")
        assert loads_as(folder, wanted, bases("llama"), caplog) == ()
    version = Store(tmp_path / "store", create=True).publish(tmp_path / "filled", "acme/a", base=bases("llama"))
    assert version.files[WEIGHTS].size == (made / WEIGHTS).stat().st_size


def test_links_and_their_texts_within_the_folder(bases, tmp_path, caplog):
    """The layout in one folder; and the texts that git leaves where it can make no links."""
    folder = make(tmp_path / "a")
    wanted = peft_logits(folder)
    (folder / "blobs").mkdir()
    for make_link in (lambda p, to: p.symlink_to(to), lambda p, to: p.write_text(to)):
        for name in (CONFIG, WEIGHTS):
            if not (folder / "blobs" / name).exists():
                (folder / name).rename(folder / "blobs" / name)
            (folder / name).unlink(missing_ok=True)
            make_link(folder / name, f"blobs/{name}")
        loads_as(folder, wanted, bases("llama"), caplog)


@pytest.mark.parametrize(
    "target",
    [
        "/etc/passwd",
        "../outside.json",
        "../made/../outside.json",
        "blobs/../../outside.json",
        "/dev/zero",
        "../blobs/secret",
        "../fifo",
        "more/x",
    ],
)
@pytest.mark.parametrize("as_text", [False, True])
def test_links_that_leave_are_refused(bases, target, as_text, tmp_path):
    """Links to what is no blob of a cache, links through other links, and what is no regular file behind one."""
    folder = make(tmp_path / "a")
    shutil.copy(folder / CONFIG, tmp_path / "outside.json")
    (tmp_path / "blobs").mkdir()
    shutil.copy(folder / CONFIG, tmp_path / "blobs" / "secret")
    os.mkfifo(tmp_path / "fifo")
    (folder / "more").symlink_to(tmp_path / "blobs")
    shutil.copy(folder / CONFIG, tmp_path / "blobs" / "x")
    (folder / CONFIG).unlink()
    (folder / CONFIG).write_text(target) if as_text else (folder / CONFIG).symlink_to(target)
    with pytest.raises(AdapterError, match=r"symbolic link|not readable JSON"):
        Adapter.load(folder, bases("llama"))
    with pytest.raises(AdapterError), open_folder(folder) as opened:
        check_layout(opened, bases("llama"), "x")


def test_a_link_in_a_cache_leads_to_a_regular_file_once(bases, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c", tmp_path / "models--a--b" / "blobs"
    made = make(tmp_path / "made")
    blobs.mkdir(parents=True)
    shutil.copytree(made, snapshot)
    for blob in (lambda p: os.mkfifo(p), lambda p: p.symlink_to(made / CONFIG), Path.mkdir):
        (snapshot / CONFIG).unlink()
        (snapshot / CONFIG).symlink_to("../../blobs/" + "a" * 40)
        blob(blobs / ("a" * 40))
        with pytest.raises(AdapterError, match=r"symbolic link|not a regular file"):
            Adapter.load(snapshot, bases("llama"))
        (blobs / ("a" * 40)).rmdir() if (blobs / ("a" * 40)).is_dir() else (blobs / ("a" * 40)).unlink()
